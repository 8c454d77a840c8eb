"""Every operation once on tiny inputs, for tools that slow a program down a hundredfold.

python -m bench.gpu.tiny cuda
"""

from __future__ import annotations

import sys

import torch

import stable_rlhf.ops as ops
from bench.gpu.correctness import CASES, SMALLER, results


def main(device: str) -> None:
    with ops.backend("triton"):
        for name, make in CASES.items():
            results(make(torch.device(device), SMALLER))
            print("ran", name, flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
