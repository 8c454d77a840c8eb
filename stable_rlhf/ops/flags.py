"""What a GPU finds wrong with values: noted on the device at once, told where the host reads the device anyway.

Reading a value on the host stops a GPU, so the operations check values there only where they read something anyway, or
everywhere with `STABLE_RLHF_CHECK=1`. What is found in between is noted in a few integers of the device's own memory,
and becomes an error in the next call that reads.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor


class Fault(enum.IntEnum):
    """The place of each fault among a device's notes."""

    LOGITS = 0
    TARGET = 1
    KIND = 2
    ACTIVE_ROWS = 3
    PER_ROW = 4
    CU_SEQLENS = 5


_WORDS = {
    Fault.LOGITS: "hidden, weight, bias or logits: non-finite logits",
    Fault.TARGET: "target: outside [0, V) and not -100",
    Fault.KIND: "kind: not 0 (ignored), 1 (policy) or 2 (rehearsal)",
    Fault.ACTIVE_ROWS: "active_rows: not the number of active rows",
    Fault.PER_ROW: "old_logprob, advantage, ref_logprob or row_weight: a non-finite value",
    Fault.CU_SEQLENS: "cu_seqlens: does not run from 0 to the number of tokens, or decreases",
}
_noted: dict[torch.device, Tensor] = {}


def notes(device: torch.device) -> Tensor:
    """[number of faults] int32 of `device`, 1 where a fault was found since the last reading."""
    if device not in _noted:
        _noted[device] = torch.zeros(len(Fault), dtype=torch.int32, device=device)
    return _noted[device]


def note(fault: Fault, condition: Tensor) -> None:
    """Notes a fault where the 0-d bool `condition` is true; the device is not asked."""
    notes(condition.device)[fault].logical_or_(condition)


def tell(device: torch.device, values: Sequence[int]) -> None:
    """Raises what `values`, the notes as the host has read them, say, and clears them.

    Raises:
        ValueError: names the argument of an earlier call.
    """
    faults = [_WORDS[fault] for fault in Fault if values[fault]]
    if faults:
        notes(device).zero_()
        raise ValueError(
            f"{'; '.join(faults)}: in an earlier call on {device}, whose results are not to be used "
            "(a GPU tells when it is asked next; STABLE_RLHF_CHECK=1 asks in each call)"
        )
