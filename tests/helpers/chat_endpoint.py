"""A server that answers as a chat model does."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[str, str], str]  # the answers shown first and second -> the model's words


class Endpoint:
    """Chat completions whose ``reply`` decides; ``failures`` are (status, headers) sent before it answers."""

    def __init__(self) -> None:
        self.reply: Reply = lambda first, second: "[[tie]]"
        self.failures: list[tuple[int, dict[str, str]]] = []
        self.raw: bytes | None = None
        self.seen: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
                status, headers, answer = 200, {}, outer.raw
                if outer.failures:
                    status, headers = outer.failures.pop(0)
                    answer = b"busy or refused"
                elif answer is None:
                    text = body["messages"][0]["content"]
                    shown = re.findall(r"<answer_[AB]>\n(.*?)\n</answer_[AB]>", text, re.S)
                    answer = json.dumps({"choices": [{"message": {"content": outer.reply(*shown)}}]}).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def longest(first: str, second: str) -> str:
    """A judge that means it: the longer answer, wherever it stands."""
    if len(first) == len(second):
        return "They are as good as each other. [[tie]]"
    return f"I first thought [[tie]], but no.\n[[{'A' if len(first) > len(second) else 'B'}]]"
