"""The item head: queries from hidden states, and the output weight from the item table."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm4rec_dist.distributed.topology import World


class ItemHead(nn.Module):
    """Computes queries from hidden states, and the output weight from the tied item rows.

    `similarity: dot` is the paper's tied head, `cosine` has a learned temperature. `item_bias` adds a popularity term
    per item. `pool_residual` adds the normalized sum of the item rows read so far to the hidden state.

    Args:
        local_items: number of this rank's item rows, for the bias.
        similarity, temperature, item_bias, pool_residual: see `HeadConfig`.

    Attributes:
        log_temperature: replicated scalar (cosine only); its gradient must be summed over the ranks.
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
    ) -> None:
        super().__init__()
        self.similarity, self.pool_residual = similarity, pool_residual
        self.log_temperature: nn.Parameter | None = None
        if similarity == "cosine":
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature), device=world.device))
        self.local_bias: nn.Parameter | None = None
        if item_bias:
            self.local_bias = nn.Parameter(torch.zeros(local_items, 1, device=world.device))

    def output_weight(self, local_rows: Tensor) -> Tensor:
        """Table rows [rows, D] -> weight of the item softmax [rows, D or D+1]."""
        weight = F.normalize(local_rows, dim=1) if self.similarity == "cosine" else local_rows
        return weight if self.local_bias is None else torch.cat([weight, self.local_bias], dim=1)

    def queries(self, hidden: Tensor, pooled: Tensor) -> Tensor:
        """Hidden states [n, D] and sums of the item rows read so far [n, D] -> queries [n, D or D+1], fp32 or wider."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        query = hidden.to(wide)
        if self.pool_residual:
            query = query + F.normalize(pooled.to(wide), dim=1) * math.sqrt(hidden.shape[1])
        if self.log_temperature is not None:
            query = F.normalize(query, dim=1) / self.log_temperature.exp()
        return query if self.local_bias is None else torch.cat([query, torch.ones_like(query[:, :1])], dim=1)
