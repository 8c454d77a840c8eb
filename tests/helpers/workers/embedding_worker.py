"""Embeds numbered texts into a folder with an encoder that is slow enough to be killed in the middle of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from stable_rlhf.rehearsal import embed_to_folder

WIDTH = 12


def texts(count: int) -> list[str]:
    return [f"text {i} " + "x" * (i * 7 % 41) for i in range(count)]


def encode(part: list[str]) -> np.ndarray:
    rows = [np.random.default_rng(list(text.encode())).normal(size=WIDTH) for text in part]
    return np.stack(rows).astype(np.float32)


def main(folder: str, count: int, seconds_per_shard: float, log: str) -> None:
    def slow(part: list[str]) -> np.ndarray:
        time.sleep(seconds_per_shard)
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{part[0].split()[1]}\n")
        return encode(part)

    embed_to_folder(texts(count), Path(folder), "fake", encoder=slow, shard_rows=8)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
