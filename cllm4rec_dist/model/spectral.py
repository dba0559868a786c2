"""Truncated singular value decomposition of a matrix whose rows are sharded over the ranks.

Randomized subspace iteration (Halko, Martinsson and Tropp, 2011) on A = F F^T, where each rank has its rows of F
[I, C]: the basis starts as noise, and each iteration multiplies it by A and makes it orthonormal. Factors are computed
in blocks of columns, so that nothing of size [C, k] or [I, k] is on one rank.

The basis is orthonormalized by the eigenvectors of its Gram matrix, whose rotations are undone in the end. Eigenvectors
of close eigenvalues change much when a sum is rounded differently; without them the result is a smooth function of the
sums (as with the inverse square root of the Gram matrix), so that it is the same at any world size up to rounding.

Memory of a rank, beside its rows of F: [n, k] fp32 for the basis and two blocks [C, b] of `_BLOCK_BYTES` each. Traffic:
all-reduces of 4 C k bytes for each of `NUM_PRODUCTS` products with A, and of [k, k] in fp64 for each Gram matrix.

Legend: I items, C columns of F, n rows of this rank, k factors, b columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm4rec_dist.distributed.collectives import all_reduce_sum
from cllm4rec_dist.distributed.topology import World

NUM_PRODUCTS = 12
"""Products with A: eleven iterations and one for the singular values. As accurate as scikit-learn's `randomized_svd`
with `n_iter=6` and its 10 further factors on the committed data sets."""
_BLOCK_BYTES = 1 << 28
_CHUNK_ROWS = 1 << 16
_SMALLEST_EIGENVALUE = 1e-6
"""Eigenvalues of A below this ratio to the largest are zero up to rounding in fp32; Gram matrices have squares."""
_SMALLEST_NORM = 1e-6
"""Rows of a norm below this ratio to the root mean square are zero up to rounding."""


@dataclass(frozen=True)
class RowShardedFeatures:
    """This rank's rows of F, a sparse part and a dense part side by side.

    Attributes:
        sparse: CSR [n, S] fp32.
        transposed: CSR [S, n], its transpose.
        dense: [n, d] fp32; d may be zero.
    """

    sparse: Tensor
    transposed: Tensor
    dense: Tensor

    def product(self, x: Tensor, world: World) -> Tensor:
        """Multiply by A = F F^T: [n, b] -> [n, b], this rank's rows. All-reduces [S, b], and [d, b] if d > 0."""
        y = self.sparse @ all_reduce_sum(self.transposed @ x, world, "a block of singular vectors")
        if self.dense.shape[1]:
            y += self.dense @ all_reduce_sum(self.dense.T @ x, world, "a block of singular vectors")
        return y


def spectral_rows(features: RowShardedFeatures, noise: Tensor, world: World) -> Tensor:
    """Return this rank's rows of U S^1/2 in an arbitrary rotation, scaled to unit norm: [n, k] fp32.

    U and S are the k largest singular vectors and values of F. A row without features is zero. Collective.

    Args:
        noise: N(0, 1) samples [n, k]; the result is written to them. k is at most min(I, C).
    """
    basis, num_factors = noise, noise.shape[1]
    rotation = torch.eye(num_factors, dtype=torch.float64)
    blocks = [*_blocks(num_factors, features.transposed.shape[0])]
    for _ in range(NUM_PRODUCTS - 1):
        for block in blocks:
            basis[:, block] = features.product(basis[:, block].contiguous(), world)
        rotation = rotation @ _orthonormalize(basis, world)
    rotation = rotation @ _orthonormalize(basis, world)  # the first pass multiplies rounding by a condition number
    projected = torch.cat(
        [_inner_product(basis, features.product(basis[:, block].contiguous(), world), world) for block in blocks], dim=1
    )
    _multiply(basis, matrix_function(projected, _fourth_root) @ rotation.T)
    squares = basis.square().sum(1, keepdim=True)
    total, count = all_reduce_sum(torch.stack([squares.sum(), (squares > 0).sum()]).double(), world, "norms").tolist()
    is_zero = squares <= _SMALLEST_NORM**2 * total / max(count, 1)
    return basis.div_(squares.sqrt().masked_fill_(is_zero, 1.0)).masked_fill_(is_zero, 0.0)


def matrix_function(symmetric: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to the eigenvalues of a symmetric matrix [k, k], in fp64 on the CPU."""
    values, vectors = _eigh(symmetric)
    return (vectors * function(values)) @ vectors.T


def gram_matrix(x: Tensor, world: World) -> Tensor:
    """X^T X over all ranks' rows, [k, k] fp64. All-reduces it."""
    return _inner_product(x, x, world)


def _blocks(num_factors: int, num_columns: int) -> Iterator[slice]:
    size = max(1, _BLOCK_BYTES // (4 * max(1, num_columns)))
    return (slice(start, start + size) for start in range(0, num_factors, size))


def _inner_product(x: Tensor, y: Tensor, world: World) -> Tensor:
    """X^T Y over all ranks' rows, [k, b] fp64. All-reduces it."""
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for left, right in zip(x.split(_CHUNK_ROWS), y.split(_CHUNK_ROWS), strict=True):
        total.addmm_(left.double().T, right.double())
    return all_reduce_sum(total, world, "inner products")


def _orthonormalize(basis: Tensor, world: World) -> Tensor:
    """Make the columns orthonormal in place, or zero where they depend on others; return the rotation, [k, k] fp64."""
    values, vectors = _eigh(gram_matrix(basis, world))
    is_zero = values <= _SMALLEST_EIGENVALUE**2 * values.max()
    _multiply(basis, vectors * values.masked_fill(is_zero, torch.inf).rsqrt())
    return vectors


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    matrix = symmetric.double().cpu()
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values, vectors


def _multiply(basis: Tensor, matrix: Tensor) -> None:
    matrix = matrix.to(basis)
    for chunk in basis.split(_CHUNK_ROWS):
        chunk.copy_(chunk @ matrix)


def _fourth_root(eigenvalues: Tensor) -> Tensor:
    is_zero = eigenvalues <= _SMALLEST_EIGENVALUE * eigenvalues.max()
    return eigenvalues.clamp_min(0).pow(0.25).masked_fill(is_zero, 0.0)
