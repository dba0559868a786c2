"""EASE, a linear item-item model with a closed form.

Source: Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019.

Legend: U users, I items, W words or other features.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.linalg import lapack

from cllm4rec_dist.errors import ConfigError

Float32Array = NDArray[np.float32]

_BLOCK_ROWS = 1024


def gram_blocks(features: sp.csr_matrix) -> Iterator[tuple[slice, Float32Array]]:
    """Yield dense row blocks of features @ features.T for features [I, W]; the whole product is never sparse."""
    transposed = features.T.tocsr()
    for start in range(0, features.shape[0], _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        yield rows, (features[rows] @ transposed).toarray()


def gram_matrix(train: sp.csr_matrix) -> Float32Array:
    """Return X^T X [I, I] of the training matrix X [U, I]."""
    num_items = train.shape[1]
    gram = np.empty((num_items, num_items), dtype=np.float32)
    for rows, block in gram_blocks(train.T.tocsr().astype(np.float32)):
        gram[rows] = block
    return gram


def ease_weights(gram: Float32Array, l2: float) -> Float32Array:
    """Return the EASE solution B [I, I] of a Gram matrix (Steck 2019, equation 8). Overwrites `gram`.

    With P = (gram + l2)^-1: B_ij = -P_ij / P_jj off the diagonal, 0 on it. The Cholesky inverse works in place, so that
    a catalog needs one matrix in addition to the Gram matrix it is copied from. float32 suffices, because l2 bounds the
    condition number.

    Raises:
        ConfigError: if `l2` is too small for float32.
    """
    gram[np.diag_indices_from(gram)] += np.float32(l2)
    # LAPACK expects column-major order, which the transpose has without a copy. Its lower triangle is our upper one.
    factor, failed = lapack.spotrf(gram.T, lower=1, clean=0, overwrite_a=1)
    if not failed:
        inverse, failed = lapack.spotri(factor, lower=1, overwrite_c=1)
    if failed:
        raise ConfigError(
            "EASE lambda", l2, "is too small for this catalog in float32", "Use larger values in the lambda grids."
        )
    weights = inverse.T
    for start in range(0, len(weights), _BLOCK_ROWS):
        stop = start + _BLOCK_ROWS
        diagonal = np.triu(weights[start:stop, start:stop])
        weights[start:stop, start:stop] = diagonal + np.triu(diagonal, 1).T
        weights[stop:, start:stop] = weights[start:stop, stop:].T
    weights /= -weights.diagonal().copy()
    np.fill_diagonal(weights, 0.0)
    return weights
