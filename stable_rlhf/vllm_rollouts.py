"""Rollouts from a vLLM server, over HTTP: nothing of vLLM is imported, and it may run on other machines.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --generation-config vllm --logprobs-mode processed_logprobs

The development mode opens ``/collective_rpc``, through which the workers reload weights from a folder of safetensors
that trainer and server both see. Processed log-probs are those of the distribution that a token was drawn from.
**This has been tested against a stub of the same protocol only, never against a real vLLM.**
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stable_rlhf.data.packing import Encoded
from stable_rlhf.data.turns import StopStrings, ends_of_turn
from stable_rlhf.generate import GenerationSettings, Rollout, response_text
from stable_rlhf.progress import progress

_AT_ONCE = 64  # requests of one process in flight: the server batches them itself


class VLLMRollouts:
    """The interface of :class:`stable_rlhf.generate.RolloutEngine` over a vLLM server.

    Args:
        url: Of the server, http://host:port; the first model that it lists is the policy.
        tokenizer: The policy's; token ids go over the wire in both directions.
        ends: Tokens that end a response, of :func:`ends_of_turn`; None: those that the tokenizer knows of.
        timeout: Seconds that one response, or loading the weights, may take.

    Raises:
        ValueError: nothing answers at ``url``, or it refuses a request; the message names the address and the answer.
    """

    holds_a_copy = True

    def __init__(self, url: str, tokenizer: Any, *, ends: Sequence[int] | None = None, timeout: float = 600.0) -> None:
        self.url, self.tokenizer, self.timeout = url.rstrip("/"), tokenizer, timeout
        self.ends = ends_of_turn(tokenizer) if ends is None else tuple(ends)
        models = self._ask("/v1/models").get("data")
        if not models:
            raise ValueError(f"vLLM server {self.url}: /v1/models lists no model")
        self.model = models[0]["id"]

    def sample(
        self, prompts: Sequence[Sequence[int]], settings: GenerationSettings, *, seeds: Sequence[int] | None = None
    ) -> list[Rollout]:
        """One response per prompt, each drawn with its own seed."""
        if settings.temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
            raise ValueError("seeds: one integer a prompt is needed when temperature > 0")
        with ThreadPoolExecutor(_AT_ONCE) as pool, progress("rollouts", total=len(prompts), unit="responses") as bar:
            found = []
            for rollout in pool.map(self._one, prompts, seeds or [0] * len(prompts), [settings] * len(prompts)):
                found.append(rollout)
                bar.advance()
        return found

    def load(self, folder: Path) -> None:
        """Reload the weights of every worker from ``folder``; what was computed with the old ones is forgotten.

        No request may be under way: the trainer calls this between two rollouts."""
        self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}})
        self._ask("/reset_prefix_cache", {})

    def _one(self, prompt: Sequence[int], seed: int, settings: GenerationSettings) -> Rollout:
        request = {
            "model": self.model, "prompt": list(prompt), "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature, "top_p": settings.top_p, "seed": seed, "stop": list(settings.stop),
            "logprobs": 0, "return_token_ids": True,
            # Not the model's own ends, of which a server may know fewer, and special tokens only where a stop string
            # has one: else it would look for that in a text without them.
            "stop_token_ids": list(self.ends),
            "skip_special_tokens": not StopStrings(self.tokenizer, settings.stop).hidden,
            # A server started without `--generation-config vllm` takes its defaults from the model's own file.
            "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        }  # fmt: skip
        answer = self._ask("/v1/completions", request)
        try:
            (choice,) = answer["choices"]
            response, logprobs = list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"])
            finished = choice["finish_reason"] == "stop"
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"vLLM server {self.url}: an answer without token ids and log-probs ({error!r}); a vLLM that knows "
                "`return_token_ids` is needed"
            ) from None
        if len(response) != len(logprobs) or not response:
            raise ValueError(f"vLLM server {self.url}: {len(response)} token ids with {len(logprobs)} log-probs")
        end = next((at for at, token in enumerate(response, start=1) if token in self.ends), None)
        if end is not None:
            response, logprobs, finished = response[:end], logprobs[:end], True
        return Rollout(
            Encoded((*prompt, *response), len(prompt)),
            response_text(self.tokenizer, response, settings.stop, self.ends),
            finished,
            tuple(logprobs) if settings.temperature > 0 else None,
        )

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """POST ``body`` (GET without one); the answer's JSON, {} when it has none."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                text = answer.read()
            found = json.loads(text) if text else {}
        except urllib.error.HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:300]
            hint = (
                ": start it with VLLM_SERVER_DEV_MODE=1, or it cannot load new weights"
                if error.code == 404 and not path.startswith("/v1")
                else f": {said}"
            )
            raise ValueError(f"vLLM server {self.url}{path} answered {error.code}{hint}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ValueError(f"vLLM server {self.url}: no answer to {path} ({reason}); is it up?") from None
        except ValueError as error:
            raise ValueError(f"vLLM server {self.url}{path}: the answer is not JSON ({error})") from None
        return found if isinstance(found, dict) else {}
