"""TRL's reward trainer with the bounds of the Advantage Model, and its expectation head."""

from __future__ import annotations

import json
import types
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from trl import RewardTrainer

from stable_rlhf import ops


class AdvantageRewardTrainer(RewardTrainer):
    """TRL's ``RewardTrainer`` with the loss of :func:`stable_rlhf.ops.advantage_loss` (arXiv 2309.10202, eq. 6): scores
    are kept within ``margin`` of their prompt's expectation, so that no response looks arbitrarily good.

    Args:
        margin: the bound; None: TRL's own loss.
        expected_head: learn e(x) beside r(x, y), a linear head read at the prompt's last token; scores are then
            r - e. It is ``model.expected_head``, saved with the model under that name: what loads the folder as a
            reward model finds r, and may leave e out where responses to one prompt are compared. Without it e is 0 and
            r itself is bounded. The data set needs a column ``prompt``, or ``prompt_length`` (in tokens) where it holds
            token ids.

    Raises:
        ValueError: ``expected_head`` with peft, whose adapter would be saved without the head; with a data set that
            does not tell its prompts; or a model whose head is not called ``score``.
    """

    data_collator: Any

    def __init__(self, *arguments: Any, margin: float | None = 2.5, expected_head: bool = False, **named: Any):
        if expected_head and named.get("peft_config") is not None:
            raise ValueError("expected_head: peft would save its adapter without this head; train without peft_config")
        self._margin, self._expected = margin, expected_head
        super().__init__(*arguments, **named)
        if expected_head:
            _add_expected_head(self.model, self.args.seed)
            self.data_collator = _WithPromptLengths(self.data_collator)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *arguments: Any) -> Any:
        dataset = super()._prepare_dataset(dataset, processing_class, *arguments)
        if not self._expected:
            return dataset
        example: dict[str, Any] = next(iter(dataset), {})
        if "prompt_length" in example:
            return dataset
        if "prompt" not in example:
            raise ValueError(
                "expected_head: needs to know where prompts end; give the data set a column prompt, or prompt_length "
                f"beside token ids; it has {', '.join(example)}"
            )
        return dataset.map(_prompt_length, fn_kwargs={"processing_class": processing_class})

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns
        if self._expected and "prompt_length" not in columns:
            columns.append("prompt_length")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = {**inputs, "use_cache": False}
        rank_margin = inputs.pop("margin", 0.0)
        expected = None
        if self._expected:
            outputs, expected = model(**inputs)
            inputs.pop("prompt_length")
        else:
            outputs = model(**inputs)
        reward = outputs.logits.squeeze(-1).float()  # [2B], chosen first
        loss = ops.advantage_loss(reward, expected, margin=self._margin, rank_margin=rank_margin).loss
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * reward.view(2, -1).sum(0).pow(2).mean()
        # TRL's own function makes its metrics from the same outputs.
        super().compute_loss(lambda **_: outputs, dict(inputs), num_items_in_batch=num_items_in_batch)
        if expected is not None:
            mode = "train" if self.model.training else "eval"
            mean = self.accelerator.gather_for_metrics(expected.detach().mean()).mean().item()
            self._metrics[mode]["mean_expected"].append(mean)
        return (loss, outputs) if return_outputs else loss


class _WithPromptLengths:
    """A collator of preferences that passes on where prompts end."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        lengths = torch.tensor([example["prompt_length"] for example in examples], dtype=torch.int64, device="cpu")
        return {**self._inner(examples), "prompt_length": lengths}


def _prompt_length(example: dict[str, Any], processing_class: Any) -> dict[str, int]:
    """How many tokens the prompt has in both its sequences. Tokens may join over its end: those count as response."""
    prompt = example["prompt"]
    if isinstance(prompt, str):
        alone = processing_class(text=prompt)["input_ids"]
    else:
        tools = example.get("tools")  # which stand before the prompt
        extra = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
        extra |= example.get("chat_template_kwargs") or {}
        alone = processing_class.apply_chat_template(
            prompt, tokenize=True, add_generation_prompt=True, return_dict=True, **extra
        )["input_ids"]
    sequences = zip(alone, example["chosen_ids"], example["rejected_ids"], strict=False)
    same = takewhile(lambda ids: len({*ids}) == 1, sequences)
    length = sum(1 for _ in same)
    if not length:
        raise ValueError(f"expected_head: the sequences of a row do not begin with its prompt: {str(prompt)[:80]}")
    return {"prompt_length": length}


def _add_expected_head(model: Any, seed: int) -> None:
    """Give a sequence classifier ``expected_head``, and a forward that with ``prompt_length`` [B] also returns e(x) [B]
    of its first B rows. Inside its forward ZeRO-3 and FSDP2 gather the head."""
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear):
        raise ValueError(f"expected_head: {type(model).__name__} has no linear head called score; use a decoder's")
    if not hasattr(model, "expected_head"):
        head = nn.Linear(score.in_features, 1, dtype=torch.float32, device="cpu")
        generator = torch.Generator(device="cpu").manual_seed(seed)
        with torch.no_grad():  # as the scorer's heads begin: Stiennon et al. (2020)
            head.weight.normal_(0.0, (score.in_features + 1) ** -0.5, generator=generator)
            head.bias.zero_()
        model.expected_head = head.to(score.weight.device)
    inner = model.forward

    def forward(self: Any, *arguments: Any, prompt_length: Tensor | None = None, **named: Any) -> Any:
        if prompt_length is None:
            return inner(*arguments, **named)
        states: list[Tensor] = []
        watch = self.score.register_forward_pre_hook(lambda _, given: states.append(given[0]))
        try:
            outputs = inner(*arguments, **named)
        finally:
            watch.remove()
        rows = torch.arange(len(prompt_length), dtype=torch.int64, device=states[0].device)
        hidden = states[0][rows, prompt_length - 1]  # padded on the right: the collator's only way
        return outputs, self.expected_head(hidden.to(self.expected_head.weight.dtype)).squeeze(-1).float()

    model.forward = types.MethodType(forward, model)
