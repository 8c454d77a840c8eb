"""What verl loads at its start, by the entry point `verl.plugins`: active where ``STABLE_RLHF_VERL=1``."""

from __future__ import annotations

import logging
import os

from stable_rlhf.integrations.verl import patch_linear_cross_entropy

_SETTING = os.environ.get("STABLE_RLHF_VERL", "0")

if _SETTING == "1":
    try:
        patch_linear_cross_entropy()
    except Exception:  # verl itself tells nobody why a plugin failed
        logging.getLogger(__name__).exception("STABLE_RLHF_VERL=1: verl's linear cross-entropy was not replaced")
        raise
elif _SETTING not in ("", "0"):
    logging.getLogger(__name__).warning("STABLE_RLHF_VERL=%s: takes 0 or 1; nothing was replaced", _SETTING)
