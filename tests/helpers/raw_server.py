"""A server on the loopback that answers every request with bytes of the test's choice, at a pace of its choice."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

Answer = bytes | Callable[[socket.socket, threading.Event], None]


def http(content: bytes | Any, status: str = "200 OK", **headers: str) -> bytes:
    """A whole answer; content that is no bytes is sent as JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = {"Content-Length": str(len(body)), **{k.replace("_", "-"): v for k, v in headers.items()}}
    return (
        f"HTTP/1.1 {status}\r\n".encode() + "".join(f"{k}: {v}\r\n" for k, v in lines.items()).encode() + b"\r\n" + body
    )


def forever(begin: bytes, more: bytes, pause: float = 0.0) -> Answer:
    """``begin``, then ``more`` again and again until somebody hangs up."""

    def answer(peer: socket.socket, closed: threading.Event) -> None:
        peer.sendall(begin)
        while not closed.wait(pause) if pause else not closed.is_set():
            peer.sendall(more)

    return answer


class RawServer:
    """``answers`` are given out in turn, the last one again and again; ``seen`` are the requests as they came."""

    def __init__(self, *answers: Answer) -> None:
        self.answers, self.seen = list(answers), list[bytes]()
        self._socket, self._closed = socket.create_server(("127.0.0.1", 0)), threading.Event()
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                peer, _ = self._socket.accept()
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                threading.Thread(target=self._answer, args=(peer, answer), daemon=True).start()

    def _answer(self, peer: socket.socket, answer: Answer) -> None:
        with suppress(OSError), peer:
            self.seen.append(_request(peer))
            if isinstance(answer, bytes):
                peer.sendall(answer)
            else:
                answer(peer, self._closed)
            peer.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _request(peer: socket.socket) -> bytes:
    found = b""
    while b"\r\n\r\n" not in found and (block := peer.recv(1 << 16)):
        found += block
    head, _, body = found.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
    while len(body) < length and (block := peer.recv(1 << 16)):
        body += block
    return head + b"\r\n\r\n" + body


@contextmanager
def answering(*answers: Answer) -> Iterator[RawServer]:
    server = RawServer(*answers)
    try:
        yield server
    finally:
        server.close()
