"""stable_rlhf: the Advantage Model and Selective Rehearsal for stable RLHF (arXiv 2309.10202).

Importing the package loads nothing heavy; import what you need from its rooms, for example `stable_rlhf.ops`.
"""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
