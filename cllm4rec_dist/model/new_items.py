"""Items that are in no table: their rows come from their texts, and they follow the items of the tables.

Legend: I items of the tables, n new items, d width of the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cllm4rec_dist.model.linear_memory import LinearMemory


@dataclass(frozen=True)
class NewItems:
    """n items I, I + 1, ..., whole on every rank.

    Attributes:
        rows: fp32 [n, d], as in the item table.
        output_weight: [n, d or d+1], as `Recommender.output_weight`.
        linear: linear memory of these items, whose neighbors are items of the tables and new ones.
    """

    rows: Tensor
    output_weight: Tensor
    linear: LinearMemory

    def __len__(self) -> int:
        """Number of new items n."""
        return len(self.rows)
