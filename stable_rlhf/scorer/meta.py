"""MetaRM's objective (arXiv 2401.06080): how far a scorer tells the responses of a shifted policy apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def response_difference(reward: Tensor, counts: Sequence[int]) -> Tensor:
    """J = (2 / k²) Σ_{i<j} σ(|r(s_i) − r(s_j)|) of each prompt's k responses.

    Two equal rewards give σ(0) = 1/2 and no gradient, so J lies between (k − 1)/(2k) and (k − 1)/k.

    Args:
        reward: [R] rewards, prompt by prompt.
        counts: responses of each prompt, k >= 2, R in all.

    Returns:
        [len(counts)], in the type of ``reward``.
    """
    first, second, owner, weight = [], [], [], []
    start = 0
    for prompt, k in enumerate(counts):
        i, j = torch.triu_indices(k, k, offset=1, dtype=torch.int64, device="cpu")
        first.append(start + i)
        second.append(start + j)
        owner.append(torch.full_like(i, prompt))
        weight.append(torch.full(i.shape, 2 / k**2, dtype=reward.dtype, device="cpu"))
        start += k
    i, j, prompt_of, share = (torch.cat(parts).to(reward.device) for parts in (first, second, owner, weight))
    difference = torch.sigmoid((reward[i] - reward[j]).abs())
    return reward.new_zeros(len(counts)).index_add(0, prompt_of, share * difference)
