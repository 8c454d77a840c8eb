"""TRL: its log-probs by `ops.linear_logprob`, GRPO in one pass with rehearsal, rewards with bounds.

Importing this imports no TRL; its classes are subclasses of TRL's trainers, so asking for one of them does.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stable_rlhf import ops

if TYPE_CHECKING:
    from stable_rlhf.integrations.trl.grpo import FusedGRPOTrainer
    from stable_rlhf.integrations.trl.reward import AdvantageRewardTrainer

__all__ = ["AdvantageRewardTrainer", "FusedGRPOTrainer", "LogprobPatch", "patch_logprob"]

_FUNCTION = "_ChunkedLogProbFunction"  # of trl.trainer.utils, looked up there on each call
_MADE_HERE = {"log_probs", "entropy"}


def __getattr__(name: str) -> Any:
    if name == "FusedGRPOTrainer":
        from stable_rlhf.integrations.trl.grpo import FusedGRPOTrainer

        return FusedGRPOTrainer
    if name == "AdvantageRewardTrainer":
        from stable_rlhf.integrations.trl.reward import AdvantageRewardTrainer

        return AdvantageRewardTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class LogprobPatch:
    """TRL with its log-probs patched, until :meth:`undo`, or the end of a ``with`` block."""

    def __init__(self) -> None:
        from trl.trainer import utils

        self._utils = utils
        self._before = getattr(utils, _FUNCTION)
        self._ours = _LinearLogprob(self._before)
        setattr(utils, _FUNCTION, self._ours)

    def undo(self) -> None:
        """Put TRL's own function back.

        Raises:
            RuntimeError: it was undone already, or patched again since.
        """
        if getattr(self._utils, _FUNCTION) is not self._ours:
            raise RuntimeError(
                f"trl.trainer.utils.{_FUNCTION}: is not this patch's any more; undo the last patch first"
            )
        setattr(self._utils, _FUNCTION, self._before)

    def __enter__(self) -> LogprobPatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.undo()


def patch_logprob() -> LogprobPatch:
    """From now on, TRL's trainers with a fused head (GRPO, RLOO, DPO, KTO, SFT) compute log-probs and entropies by
    :func:`stable_rlhf.ops.linear_logprob`.

        with patch_logprob():
            trainer.train()

    or ``patch = patch_logprob()`` and ``patch.undo()``. What it cannot make stays TRL's: calls that ask for more than
    log-probs and entropy (the metrics of SFT, DPO and KTO), and heads that ZeRO-3 holds in shards.
    """
    return LogprobPatch()


class _LinearLogprob:
    """In the place of TRL's autograd function: what is called there is its ``apply``."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def apply(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] | None = None,  # None: all
    ) -> tuple[Tensor | None, ...]:
        if outputs is None or not _MADE_HERE.issuperset(outputs) or hasattr(weight, "ds_id"):
            rest = () if outputs is None else (outputs,)
            result: tuple[Tensor | None, ...] = self._own.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, *rest
            )
            return result
        logprob, entropy = ops.linear_logprob(
            hidden, weight.to(hidden.dtype), targets, bias=None if bias is None else bias.to(hidden.dtype),
            temperature=temperature, softcap=final_logit_softcapping, logit_scale=logit_scale,
            entropy="entropy" in outputs,
        )  # fmt: skip
        return logprob, entropy, None, None, None
