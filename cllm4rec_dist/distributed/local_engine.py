"""The backbone in one process: what `engine.Engine` offers for a forward, without DeepSpeed or a process group.

Ranking, checkpoints and `System` take either of the two.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cllm4rec_dist.distributed.topology import RowPartition


class ForwardEngine(Protocol):
    """What prediction and reading of a checkpoint need of an engine."""

    def __call__(self, *inputs: Any) -> Tensor: ...
    def train(self, mode: bool) -> None: ...
    def num_parameters(self) -> tuple[int, int]: ...
    def partitions(self) -> dict[str, RowPartition]: ...
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def weights(self) -> dict[str, Tensor]: ...
    def set_weights(self, weights: dict[str, Tensor]) -> None: ...


class LocalEngine:
    """Runs forwards of a module that lies whole on one device. It computes no gradients.

    Args:
        module: the backbone; parameters that ask for gradients are those that a checkpoint holds.
        device: where it computes.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module.to(device)
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Tensor:
        """One forward of the module."""
        found: Tensor = self._module(*inputs)
        return found

    def train(self, mode: bool) -> None:
        """Switch dropout on or off."""
        self._module.train(mode)

    def num_parameters(self) -> tuple[int, int]:
        """Elements of the trained and of the frozen parameters."""
        counts = [0, 0]
        for parameter in self._module.parameters():
            packed = 2 if parameter.dtype == torch.uint8 else 1  # two 4-bit weights in a byte
            counts[not parameter.requires_grad] += parameter.numel() * packed
        return counts[0], counts[1]

    def partitions(self) -> dict[str, RowPartition]:
        """The one part of each flattened trained parameter."""
        return {name: RowPartition(parameter.numel(), 1) for name, parameter in self._trained.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each trained parameter."""
        return {name: tuple(parameter.shape) for name, parameter in self._trained.items()}

    def weights(self) -> dict[str, Tensor]:
        """Each trained parameter, flat and in fp32."""
        return {name: parameter.detach().float().flatten() for name, parameter in self._trained.items()}

    @torch.no_grad()
    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Overwrite what `weights` gave."""
        for name, flat in weights.items():
            self._trained[name].copy_(flat.view(self._trained[name].shape))
