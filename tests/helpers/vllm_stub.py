"""A stand-in for a vLLM server: the same paths, requests and answers, a small transformers model behind them.

What it promises about vLLM is what vLLM's own sources say; it has not been held against a real server.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from transformers import AutoModelForCausalLM

from stable_rlhf.rollout.local import GenerationSettings, generate


class StubServer(ThreadingHTTPServer):
    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.tokenizer = model, tokenizer
        self.lock = threading.Lock()
        self.loaded: list[str] = []  # folders that weights were reloaded from
        self.reloads, self.dev_mode, self.knows_token_ids = True, True, True
        self.shift = 0.0  # added to every log-prob that it reports
        self.key: str | None = None  # that a request must bring
        self.emptied: dict[str, Any] | None = None  # what it says once its prefix cache is to be emptied
        self.keeps_head = False  # a tied model's, whatever is reloaded, as vLLM's CPU server does

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        settings = GenerationSettings(
            request["max_tokens"], request["temperature"], request["top_p"], tuple(request["stop"])
        )
        assert request["logprobs"] == 0 and request["return_token_ids"] is True
        # As vLLM: it knows the tokenizer's EOS and what it is told, and looks for stop strings in what it shows.
        config = self.model.generation_config = copy.deepcopy(self.model.generation_config)
        config.eos_token_id = [self.tokenizer.eos_token_id, *request["stop_token_ids"]]
        special = self.tokenizer.all_special_tokens
        assert not request["skip_special_tokens"] or not any(t in s for s in request["stop"] for t in special)
        with self.lock:
            (rollout,) = generate(
                self.model, self.tokenizer, [request["prompt"]], settings, seeds=[request["seed"]]
            )  # fmt: skip
        response = list(rollout.encoded.response)
        logprobs = rollout.logprobs or [0.0] * len(response)
        choice = {
            "index": 0, "text": rollout.text, "finish_reason": "stop" if rollout.finished else "length",
            "logprobs": {"token_logprobs": [p + self.shift for p in logprobs]},
        }  # fmt: skip
        return {
            "object": "text_completion",
            "choices": [choice | ({"token_ids": response} if self.knows_token_ids else {})],
        }

    def reload(self, request: dict[str, Any]) -> dict[str, Any]:
        assert request["method"] == "reload_weights" and set(request["kwargs"]) == {"weights_path"}
        self.loaded.append(request["kwargs"]["weights_path"])
        if self.reloads:
            head = self.model.get_output_embeddings().weight
            self.model = AutoModelForCausalLM.from_pretrained(request["kwargs"]["weights_path"]).eval()
            if self.keeps_head:
                self.model.get_output_embeddings().weight = head
        return {"results": [None]}


class _Handler(BaseHTTPRequestHandler):
    server: StubServer

    def log_message(self, *args: Any) -> None:
        pass

    def _send(self, content: dict[str, Any] | None, status: int = 200) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refused(self) -> bool:
        if self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return False
        self._send({"error": "Unauthorized"}, 401)
        return True

    def do_GET(self) -> None:
        if self._refused():
            return None
        if self.path == "/v1/models":
            context = self.server.model.config.max_position_embeddings
            return self._send({"object": "list", "data": [{"id": "policy", "max_model_len": context}]})
        self._send({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return None
        if self.path == "/v1/completions":
            if request["model"] != "policy":
                return self._send({"error": {"message": f"The model `{request['model']}` does not exist."}}, 404)
            return self._send(self.server.complete(request))
        if self.server.dev_mode and self.path == "/collective_rpc":
            return self._send(self.server.reload(request))
        if self.server.dev_mode and self.path == "/reset_prefix_cache":
            return self._send(self.server.emptied)
        self._send({"detail": "Not Found"}, 404)


@contextmanager
def serving(model: Any, tokenizer: Any) -> Iterator[StubServer]:
    """A stub server in a thread of this process."""
    with StubServer(model, tokenizer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
