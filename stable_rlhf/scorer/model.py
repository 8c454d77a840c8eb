"""The scorer: one backbone, a reward head r(x, y) and, for the Advantage Model, an expectation head e(x)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_rlhf import ops
from stable_rlhf.data.encoding import Encoded, encode, last_positions
from stable_rlhf.data.jsonl import to_json
from stable_rlhf.data.records import Prompt
from stable_rlhf.models.checked import first_not_finite, load_whole, read_tensors
from stable_rlhf.models.features import FeatureCache
from stable_rlhf.models.loading import context_length, load_tokenizer, prefer_flash_attention
from stable_rlhf.models.trunk import Trunk, length_batches
from stable_rlhf.scorer.classifier import is_classifier, load_classifier
from stable_rlhf.scorer.contrastive import Contrastive
from stable_rlhf.settings.ranges import CountOrNone, Positive, Rows, check_settings
from stable_rlhf.show.progress import progress

_SETTINGS_FILE = "advantage_model.json"
_HEADS_FILE = "heads.safetensors"
# Beside a backbone's weights: AutoModelForSequenceClassification, which would give the folder a head of random numbers,
# ends at a `score` of this size, and every other class leaves it out.
NO_CLASSIFIER = {"score.weight": torch.zeros(0, device="cpu", dtype=torch.float32)}


@dataclass(frozen=True)
class ScorerSettings:
    """What a scorer must remember to score: saved beside its weights.

    ``objective``: ``"am"`` (Advantage Model, Eq. 6) or ``"rm"`` (reward model, Eq. 1). ``num_policies`` is N and
    ``num_alternates`` is K of Eq. 8; N ≥ K ≥ 0 and N ≥ 1. ``margin`` is m of Eq. 6."""

    objective: str = "am"
    num_policies: Rows = 1
    num_alternates: CountOrNone = 0
    margin: Positive = 2.5

    def __post_init__(self) -> None:
        check_settings(self)
        if self.objective not in ("am", "rm"):
            raise ValueError(f"objective must be 'am' or 'rm', got {self.objective!r}")
        if self.num_policies < self.num_alternates:
            raise ValueError(
                f"num_policies (N={self.num_policies}) and num_alternates (K={self.num_alternates}) must hold N >= K"
            )


class AdvantageModel(nn.Module):
    """Scores (prompt, response) pairs.

    The reward head is read at the last response token (EOS), the expectation head at the last prompt token; both stand
    on one backbone. At inference there are no alternates, every w_k is 1, and Eq. 8 becomes

        a(x, y) = (N − K)/N · (r(x, y) − e(x)).

    A reward model (``objective="rm"``) has no expectation head and scores r(x, y).
    """

    def __init__(
        self,
        backbone: Any,
        tokenizer: Any,
        settings: ScorerSettings | None = None,
        *,
        num_trainable_layers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        settings = settings or ScorerSettings()
        self.settings = settings
        self.tokenizer = tokenizer
        self.trunk = Trunk(backbone, num_trainable_layers)
        generator = torch.Generator(device="cpu").manual_seed(seed)
        size = self.trunk.hidden_size
        self.reward_head = new_head(size, generator)
        self.expected_head = new_head(size, generator) if settings.objective == "am" else None
        self.contrastive: Contrastive | None = None  # of a trainer that wants it; nothing else needs it
        self.max_length = context_length(backbone.config)
        self._rows = int(backbone.get_input_embeddings().num_embeddings)
        known = (getattr(tokenizer, "unk_token_id", None), getattr(tokenizer, "pad_token_id", None), 0)
        self._unknown = next(i for i in known if i is not None and i < self._rows)

    def forward(
        self,
        inputs: dict[str, Tensor],
        last: Tensor,
        prompt_last: Tensor,
        views: Tensor | None = None,
        pairs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
        """Rewards [B] at columns ``last`` and expectations [B] at columns ``prompt_last`` (``None`` for a reward
        model), both float32. With ``views`` and ``pairs`` of the first rows also their contrastive loss: it is computed
        here because ZeRO-3 gathers prototypes only inside the engine's forward."""
        hidden = self.trunk(**inputs)  # [B, L, H]
        rows = torch.arange(hidden.shape[0], device=hidden.device, dtype=torch.int64)
        dtype = self.reward_head.weight.dtype
        features = hidden[rows, last]
        reward = self.reward_head(features.to(dtype)).squeeze(-1).float()
        expected = None
        if self.expected_head is not None:
            expected = self.expected_head(hidden[rows, prompt_last].to(dtype)).squeeze(-1).float()
        if views is None:
            return reward, expected
        assert self.contrastive is not None and pairs is not None
        return reward, expected, self.contrastive(features[: views.shape[1]], views, pairs)

    def prepare(
        self, examples: Sequence[Encoded], cache: FeatureCache | None = None, side: str = "right"
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Arguments of :meth:`forward` for encoded examples."""
        # A policy of the same family may have a longer embedding, padded with rows of no token, and sample one.
        sequences = [
            e.ids if max(e.ids) < self._rows else tuple(i if i < self._rows else self._unknown for i in e.ids)
            for e in examples
        ]
        features = cache.get(self.trunk, sequences) if cache is not None else None
        inputs = self.trunk.inputs(sequences, features=features, side=side)
        mask = inputs["attention_mask"]
        last = last_positions(mask, [len(e) for e in examples])
        prompt_last = last_positions(mask, [e.prompt_length for e in examples])
        return inputs, last, prompt_last

    def advantage(self, reward: Tensor, expected: Tensor | None) -> Tensor:
        """Scores from rewards and expectations as PPO, selection and evaluation use them (no alternates)."""
        if self.settings.objective == "rm":
            return reward
        return ops.advantage_score(
            reward, expected, num_policies=self.settings.num_policies, num_alternates=self.settings.num_alternates
        )

    @torch.no_grad()
    def score_encoded(
        self,
        examples: Sequence[Encoded],
        *,
        max_tokens: int = 8192,
        cache: FeatureCache | None = None,
        side: str = "right",
        description: str | None = None,
    ) -> Tensor:
        """Scores [n] float32 of encoded examples; batches of at most ``max_tokens`` padded tokens, sorted by length."""
        was_training = self.training
        self.eval()
        scores = torch.empty(len(examples), dtype=torch.float32, device="cpu")
        batches = length_batches([len(e) for e in examples], max_tokens)
        with progress(description or "scoring", total=len(examples), unit="responses") as bar:
            for rows in batches:
                reward, expected = self(*self.prepare([examples[i] for i in rows], cache, side))
                scores[rows] = self.advantage(reward, expected).cpu()
                bar.advance(len(rows))
        self.train(was_training)
        if not torch.isfinite(scores).all():
            raise ValueError(
                f"the scorer gave a score that is not finite (response {int((~torch.isfinite(scores)).nonzero()[0])})"
            )
        return scores

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], *, max_tokens: int = 8192) -> Tensor:
        """Scores [n] float32 of (prompt, response) pairs: text in, numbers out.

        A pair longer than the backbone's context is an error that names it."""
        if len(prompts) != len(responses):
            raise ValueError(f"prompts ({len(prompts)}) and responses ({len(responses)}) must have the same length")
        examples = [encode(self.tokenizer, p, r) for p, r in zip(prompts, responses, strict=True)]
        for i, example in enumerate(examples):
            if len(example) > self.max_length:
                raise ValueError(
                    f"pair {i} has {len(example)} tokens, more than the backbone's context of {self.max_length}"
                )
        return self.score_encoded(examples, max_tokens=max_tokens)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write backbone and tokenizer (which plain transformers loads), heads and settings to a folder."""
        backbone = self.trunk.backbone
        backbone.save_pretrained(folder, state_dict={**backbone.state_dict(), **NO_CLASSIFIER})
        self.save_heads(folder)

    def save_heads(self, folder: str | Path) -> None:
        """Write all but the backbone: tokenizer, heads and settings."""
        from safetensors.torch import save_file

        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        heads = {"reward_head." + k: v for k, v in self.reward_head.state_dict().items()}
        if self.expected_head is not None:
            heads |= {"expected_head." + k: v for k, v in self.expected_head.state_dict().items()}
        save_file({k: v.contiguous() for k, v in heads.items()}, folder / _HEADS_FILE)
        (folder / _SETTINGS_FILE).write_text(to_json(asdict(self.settings), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, num_trainable_layers: int | None = None
    ) -> AdvantageModel:
        """Load what :meth:`save_pretrained` wrote, or somebody's sequence-classification model with one label, which is
        a reward model (without e(x)). A missing path is an error, never a fresh model."""
        from transformers import AutoModel

        folder = check_scorer_folder(folder)
        what = f"scorer {str(folder)!r}"
        if not (folder / _SETTINGS_FILE).is_file():
            return cls._from_classifier(folder, what, dtype, num_trainable_layers)
        settings = _read_settings(folder / _SETTINGS_FILE)
        backbone = load_whole(
            AutoModel, str(folder), what, beside=NO_CLASSIFIER, dtype=dtype, use_safetensors=True
        )  # fmt: skip
        prefer_flash_attention(backbone, dtype)
        model = cls(backbone, load_tokenizer(str(folder)), settings, num_trainable_layers=num_trainable_layers)
        heads = read_tensors(folder / _HEADS_FILE)
        expected = {k: list(v.shape) for k, v in model.state_dict().items() if k.split(".")[0].endswith("_head")}
        if (shapes := {k: list(v.shape) for k, v in heads.items()}) != expected:
            raise ValueError(
                f"{folder / _HEADS_FILE}: has {shapes}, where these settings and this model want {expected}"
            )
        if name := next((k for k, v in heads.items() if not v.is_floating_point()), None):
            raise ValueError(f"{folder / _HEADS_FILE}: {name} holds {str(heads[name].dtype)[6:]}, not floating point")
        if name := first_not_finite(heads.items()):
            raise ValueError(f"{folder / _HEADS_FILE}: {name} holds NaN or infinity")
        model.load_state_dict(heads, strict=False)
        return model.eval()

    @classmethod
    def _from_classifier(
        cls, folder: Path, what: str, dtype: torch.dtype, num_trainable_layers: int | None
    ) -> AdvantageModel:
        backbone, weight, bias = load_classifier(str(folder), what, dtype)
        prefer_flash_attention(backbone, dtype)
        settings = ScorerSettings(objective="rm")
        model = cls(backbone, load_tokenizer(str(folder)), settings, num_trainable_layers=num_trainable_layers)
        model.reward_head.load_state_dict({"weight": weight, "bias": bias})
        return model.eval()


def check_scorer_folder(folder: str | Path) -> Path:
    """Refuse a folder that holds no scorer, before hours are spent on what it is to score."""
    folder = Path(folder)
    if not (folder / _SETTINGS_FILE).exists() and is_classifier(folder):
        return folder
    for name in (_SETTINGS_FILE, _HEADS_FILE, "config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"scorer {str(folder)!r}: no {name} there; is it a folder that train-scorer wrote?")
    return folder


def _read_settings(path: Path) -> ScorerSettings:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be an object, not {type(content).__name__}")
    known = [field.name for field in fields(ScorerSettings)]
    if unknown := sorted({*content} - {*known}):
        raise ValueError(f"{path}: unknown {unknown}; it has {', '.join(known)}")
    try:
        return ScorerSettings(**content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def new_head(size: int, generator: torch.Generator) -> nn.Linear:
    """A scorer's head before training."""
    # 1/√(H+1): the scale of Stiennon et al. (2020), scores start near unit variance or below.
    head = nn.Linear(size, 1, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        head.weight.normal_(0.0, (size + 1) ** -0.5, generator=generator)
        head.bias.zero_()
    return head
