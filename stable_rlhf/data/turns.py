"""What ends a turn: the one place that knows it, for encoding, sampling and a vLLM server alike.

A model may end its answers with several tokens (``generation_config.eos_token_id`` of Llama 3 and Gemma is a list),
and a chat template often closes an assistant's turn with another one than the tokenizer's EOS.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from stable_rlhf.data.templates import closing_text

_KNOWN: WeakKeyDictionary[Any, tuple[Any, int | None]] = WeakKeyDictionary()


def end_of_turn(tokenizer: Any) -> int:
    """The token that a response ends with where it is trained on: what the chat template closes an assistant's turn
    with, where that is a token of its own, else EOS.

    Raises:
        ValueError: there is neither.
    """
    closing = _template_end(tokenizer)
    end = tokenizer.eos_token_id if closing is None else closing
    if end is None:
        raise ValueError("its tokenizer has no EOS token, so the end of a response cannot be marked")
    return int(end)


def ends_of_turn(tokenizer: Any, model: Any = None) -> tuple[int, ...]:
    """Every token that ends a sampled response: that of :func:`end_of_turn` first, then the tokenizer's EOS and what
    the model's generation configuration names."""
    own: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = own.tolist() if hasattr(own, "tolist") else own
    named = [tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])]
    return tuple(dict.fromkeys([end_of_turn(tokenizer), *(int(token) for token in named if token is not None)]))


def check_ends(model: Any, where: str) -> None:
    """Refuse ends in a model's generation configuration that are none; transformers takes them as they come.

    Raises:
        ValueError: names ``where`` and the field.
    """
    config = getattr(model, "generation_config", None)
    tokens, texts = getattr(config, "eos_token_id", None), getattr(config, "stop_strings", None)
    tokens = tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]
    if not all(type(token) is int for token in tokens):
        raise ValueError(f"{where}: eos_token_id must be a token id or a list of them, got {tokens!r:.80}")
    texts = texts if isinstance(texts, list | tuple) else [] if texts is None else [texts]
    if not all(isinstance(text, str) and text for text in texts):  # an empty one would end every response at once
        raise ValueError(f"{where}: stop_strings must be a text or a list of texts, none empty, got {texts!r:.80}")


def ends_in_text(model: Any, stop: Sequence[str] = ()) -> tuple[str, ...]:
    """Every text that ends a sampled response: ``stop``, then what the model's generation configuration names."""
    own = getattr(getattr(model, "generation_config", None), "stop_strings", None) or ()
    return tuple(dict.fromkeys([*stop, *([own] if isinstance(own, str) else own)]))


def _template_end(tokenizer: Any) -> int | None:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return None
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != template:
        known = _KNOWN[tokenizer] = (template, _closing_token(tokenizer))
    return known[1]


def _closing_token(tokenizer: Any) -> int | None:
    tail = closing_text(tokenizer).lstrip()
    added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    first = max((t for t in added if tail.startswith(t)), key=len, default=None)
    return None if first is None else added[first]


class StopStrings:
    """Looks for stop strings in the tokens of a response. One that holds a special token (``<|im_end|>``) is looked for
    in the text that shows such tokens, every other one in the text that leaves them out."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {}) if stop else {}
        self._special = [str(token) for token in added.values() if token.special]
        self.hidden = [s for s in stop if any(token in s for token in self._special)]
        self.plain = [s for s in stop if s not in self.hidden]

    def __bool__(self) -> bool:
        return bool(self.plain or self.hidden)

    def hold(self, ids: Sequence[int]) -> bool:
        """Whether one of them is in the text of these tokens."""
        return any(
            s in text
            for stop, skip in ((self.plain, True), (self.hidden, False))
            if stop
            for text in [self.tokenizer.decode(ids, skip_special_tokens=skip)]
            for s in stop
        )

    def text_before(self, ids: Sequence[int]) -> str:
        """The text of these tokens up to the first of them, without special tokens."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        text = _cut(text, self.plain)
        if self.hidden:
            with_special: str = self.tokenizer.decode(ids, skip_special_tokens=False)
            if (until := _cut(with_special, self.hidden)) != with_special:
                longest_first = sorted(self._special, key=len, reverse=True)
                text = text[: len(re.sub("|".join(map(re.escape, longest_first)), "", until))]
        return text


def _cut(text: str, stop: Sequence[str]) -> str:
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]
