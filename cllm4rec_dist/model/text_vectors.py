"""Dense vectors of the items' texts, as features of the spectral initialization.

Raw vectors of a language model share a few dominant directions. Whitening makes all directions count alike, which was
better than centring alone (docs/initialization.md).

Legend: n items of this rank, d size of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cllm4rec_dist.distributed.collectives import all_reduce_sum
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.model.spectral import gram_matrix, matrix_function

_RIDGE = 1e-3
"""Added to the covariance's eigenvalues in units of their mean; else directions of mere noise would be amplified."""


def whiten(vectors: Tensor, world: World) -> Tensor:
    """Centre, whiten and scale to unit norm: [n, d] -> fp32 [n, d]. All-reduces the mean and a covariance [d, d].

    Args:
        vectors: this rank's items; zero rows have no vector, stay zero and do not count.
    """
    vectors = vectors.to(world.device, torch.float32)
    has_vector = vectors.any(dim=1, keepdim=True)
    sums = torch.cat([vectors.sum(0, dtype=torch.float64), has_vector.sum()[None].double()])
    total, count = all_reduce_sum(sums, world, "text vectors").split([vectors.shape[1], 1])
    count = count.clamp_min(1)
    centred = torch.where(has_vector, vectors - (total / count).float(), 0.0)
    covariance = gram_matrix(centred, world) / count

    def inverse_root(eigenvalues: Tensor) -> Tensor:
        return (eigenvalues.clamp_min(0) + _RIDGE * eigenvalues.mean().clamp_min(1e-30)).rsqrt()

    white = centred @ matrix_function(covariance, inverse_root).to(centred)
    return white / white.norm(dim=1, keepdim=True).clamp_min(1e-12)
