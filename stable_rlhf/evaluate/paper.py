"""Figures published in "Stabilizing RLHF through Advantage Model and Selective Rehearsal" (arXiv 2309.10202).

They stand beside a run's own figures in the report. The paper used BLOOMZ 7B scorers, a BLOOMZ 176B policy and GPT-4 as
the judge, so a small run is compared with them by direction, not by size. All shares are in percent.
"""

from __future__ import annotations

from typing import Any

SOURCE = "arXiv 2309.10202"

# Table 1: ranking accuracy and expected calibration error, in percent.
TABLE_1: dict[str, dict[str, dict[str, float]]] = {
    "HH-RLHF": {"rm": {"accuracy": 69.25, "ece": 4.70}, "am": {"accuracy": 69.43, "ece": 3.48}},
    "in-house": {"rm": {"accuracy": 74.75, "ece": 5.35}, "am": {"accuracy": 75.28, "ece": 3.83}},
}

# Table 2: share of prompts won, lost and tied against the SFT policy, in percent.
TABLE_2: dict[str, dict[str, dict[str, float]]] = {
    "rm": {"main": {"win": 12.72, "lose": 12.62, "tie": 74.66}, "forget": {"win": 16.87, "lose": 29.28, "tie": 53.84}},
    "am": {"main": {"win": 14.87, "lose": 10.38, "tie": 74.74}, "forget": {"win": 9.70, "lose": 8.44, "tie": 81.86}},
    "am-sr": {"main": {"win": 15.78, "lose": 9.77, "tie": 74.45}, "forget": {"win": 10.30, "lose": 7.95, "tie": 81.75}},
}

MARGIN = 2.5  # m of Eq. 6
REHEARSAL_COEFFICIENT = 0.01  # gamma of Eq. 9
TASKS = 61  # categories of the task spectrum behind Fig. 4
CLUSTER_COUNT_SPREAD = 0.05  # Fig. 6: test reward differs by about this much over cluster counts

DEFAULTS: dict[str, dict[str, float | int | str]] = {
    "scorer": {
        "backbone": "BLOOMZ 7B",
        "learning_rate": 5e-6,
        "warmup_ratio": 0.1,
        "schedule": "cosine to 10 %",
        "epochs": 1,
        "batch_size": 180,
        "margin": MARGIN,
    },
    "ppo": {
        "backbone": "BLOOMZ 176B",
        "learning_rate": 5e-7,
        "batch_size": 256,
        "steps": 100,
        "rehearsal_coefficient": REHEARSAL_COEFFICIENT,
    },
    "sets": {"main_prompts": 2623, "forget_prompts": 1704, "judge": "GPT-4"},
}


def constants() -> dict[str, Any]:
    """The figures above as one JSON-ready dict: what ``summary["paper"]`` holds."""
    return {
        "source": SOURCE,
        "table_1": TABLE_1,
        "table_2": TABLE_2,
        "tasks": TASKS,
        "cluster_count_spread": CLUSTER_COUNT_SPREAD,
        "defaults": DEFAULTS,
    }
