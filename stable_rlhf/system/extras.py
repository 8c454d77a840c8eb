"""Which extra brings a library that the base install, torch, triton and numpy, does not have."""

from __future__ import annotations

import importlib.util

# Modules as they are imported, by the extra that brings them. jinja2 comes with torch as well.
TRAIN = (
    "transformers", "deepspeed", "accelerate", "safetensors", "jsonargparse", "yaml", "rich", "matplotlib", "jinja2",
    "sklearn", "tensorboard",
)  # fmt: skip
BROUGHT = ("tokenizers", "huggingface_hub", "scipy", "threadpoolctl")  # by transformers and scikit-learn
EXTRAS = {
    **dict.fromkeys(TRAIN, "train"),
    **dict.fromkeys(BROUGHT, "train"),
    "sentence_transformers": "embed", "faiss": "embed",
    "peft": "lora",
    "gguf": "smollm2",
    "datasets": "data", "pyarrow": "data",
    "wandb": "tracking", "trackio": "tracking",
}  # fmt: skip


class MissingExtra(ImportError):
    """A library of an extra is not installed. One line: who needs it, and what to install."""


def require(who: str, *modules: str) -> None:
    """Imports nothing; the look costs a few milliseconds.

    Raises:
        MissingExtra: one of `modules` is not installed.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingExtra(_line(who, module))


def explained(error: ModuleNotFoundError, who: str) -> str:
    """The error in the words of `require` where an extra brings what is missing, else in its own."""
    name = (error.name or "").split(".")[0]
    return _line(who, name) if name in EXTRAS else str(error)


def _line(who: str, module: str) -> str:
    extra = EXTRAS[module]
    return f"{who} needs stable-rlhf[{extra}] ({module} is missing): pip install 'stable-rlhf[{extra}]'"
