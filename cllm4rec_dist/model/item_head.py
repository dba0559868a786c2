"""The item head: queries from hidden states, and the output weight from the item table.

Legend: n positions, D hidden size, d width of the rows, at most D.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm4rec_dist.distributed.topology import World

SHORTEST_QUERY = 0.5
"""Length, in units of the pooled rows' direction, below which a projected query is not normalized."""


class ItemHead(nn.Module):
    """Computes queries from hidden states, and the output weight from the tied item rows.

    `similarity: dot` is the paper's tied head, `cosine` has a learned temperature. `item_bias` adds a popularity term
    per item. `pool_residual` adds the normalized sum of the item rows read so far to the hidden state. `projection`
    multiplies the hidden state, scaled to unit root mean square, by a learned matrix that starts at zero: a run starts
    with the scores of the pooled rows and learns what the language model adds.

    Args:
        local_items: number of this rank's item rows, for the bias.
        similarity, temperature, item_bias, pool_residual: see `HeadConfig`.
        projection: shape of the projection, (D, d); None for the plain form, which needs d = D.

    Attributes:
        log_temperature: replicated scalar (cosine only); its gradient must be summed over the ranks.
        projection: replicated [D, d]; its gradient must be summed over the ranks.
        local_bias: [local_items, 1], sharded like the item rows.
    """

    def __init__(
        self,
        local_items: int,
        world: World,
        *,
        similarity: str,
        temperature: float,
        item_bias: bool,
        pool_residual: bool,
        projection: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.similarity, self.pool_residual = similarity, pool_residual
        self.log_temperature: nn.Parameter | None = None
        if similarity == "cosine":
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature), device=world.device))
        self.projection: nn.Parameter | None = None
        if projection is not None:
            self.projection = nn.Parameter(torch.zeros(projection, device=world.device))
        self.local_bias: nn.Parameter | None = None
        if item_bias:
            self.local_bias = nn.Parameter(torch.zeros(local_items, 1, device=world.device))

    @property
    def normalizes_rows(self) -> bool:
        """True if item rows are divided by their lengths."""
        return self.similarity == "cosine"

    @torch.no_grad()
    def output_weight(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """Table rows [rows, d] -> weight of the item softmax as one matrix [rows, d or d+1], for predictions.

        Args:
            bias: item biases [rows, 1], if these are not the local rows; not used without item bias.
        """
        if self.local_bias is None:
            return F.normalize(rows, dim=1) if self.normalizes_rows else rows
        # Normalized in place, because a copy of the table is a large part of a process's memory.
        weight = torch.cat([rows, self.local_bias if bias is None else bias], dim=1)
        if self.normalizes_rows:
            F.normalize(rows, dim=1, out=weight[:, :-1])
        return weight

    def queries(self, hidden: Tensor, pooled: Tensor) -> Tensor:
        """Hidden states [n, D] and sums of the item rows read so far [n, d] -> queries [n, d], fp32 or wider."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        query, length = hidden.to(wide), math.sqrt(pooled.shape[1])
        if self.projection is not None:
            query = F.normalize(query, dim=1) * math.sqrt(hidden.shape[1]) @ self.projection
        if self.pool_residual:
            query = query + F.normalize(pooled.to(wide), dim=1) * length
        if self.log_temperature is not None:
            # Without items a projected query starts at zero, and normalizing zero has a gradient of 1e12.
            shortest = 1e-12 if self.projection is None else SHORTEST_QUERY * length
            query = F.normalize(query, dim=1, eps=shortest) / self.log_temperature.exp()
        return query

    def with_bias_column(self, queries: Tensor) -> Tensor:
        """Queries [n, d] -> queries [n, d or d+1] of `output_weight`, whose last column is the item biases."""
        return queries if self.local_bias is None else torch.cat([queries, torch.ones_like(queries[:, :1])], dim=1)
