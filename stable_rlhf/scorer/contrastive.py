"""The contrastive term of arXiv 2401.06080: features of a response should know it again under another dropout mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_rlhf import ops


class Contrastive(nn.Module):
    """SimCSE or SwAV on the features f(x, y) that the reward head reads.

    Two dropout masks of the same features are the two views. Compared are the responses, {f(x, y_c), f(x, y_r)}, or
    with ``differences`` each pair's two differences, {f_c - f_r, f_r - f_c}, taken after dropout. The loss is
    ``ops.info_nce(a, b)`` (SimCSE), or with prototypes ``ops.swav_loss(a, b, prototypes)``, over the rows of the batch,
    in float32.

    Args:
        width: of the features, H.
        num_prototypes: K of SwAV; 0: SimCSE, which has none. They train with the scorer, and scoring needs none of
            them, so they are not saved with it. The operation takes them at unit length; nothing has to project them.
        differences: compare differences, not responses.
        temperature: of the operation.
        seed: of the prototypes.
        process_group: the ranks that share the batch.
    """

    prototypes: nn.Parameter | None

    def __init__(
        self,
        width: int,
        *,
        num_prototypes: int,
        differences: bool,
        temperature: float,
        seed: int,
        process_group: object | None = None,
    ) -> None:
        super().__init__()
        self.differences, self.temperature, self.process_group = differences, temperature, process_group
        self.register_parameter("prototypes", None)
        if num_prototypes:
            generator = torch.Generator(device="cpu").manual_seed(seed)
            rows = torch.randn(num_prototypes, width, generator=generator, dtype=torch.float32, device="cpu")
            self.prototypes = nn.Parameter(F.normalize(rows))

    def forward(self, features: Tensor, views: Tensor, pairs: Tensor) -> Tensor:
        """The loss of all ranks' rows, 0-d float32, the same on every rank; gradients are this rank's.

        Args:
            features: [R, H].
            views: [2, R, H] dropout masks, 0 or 1 / (1 - p).
            pairs: [M, 2] rows of a better and a worse response.
        """
        a, b = features.float() * views
        if self.differences:
            a, b = (torch.cat([d, -d]) for d in (x[pairs[:, 0]] - x[pairs[:, 1]] for x in (a, b)))
        group = self.process_group
        if self.prototypes is None:
            return ops.info_nce(a, b, temperature=self.temperature, process_group=group)
        return ops.swav_loss(a, b, self.prototypes.float(), temperature=self.temperature, process_group=group)
