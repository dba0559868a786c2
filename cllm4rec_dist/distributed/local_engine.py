"""An engine for inference in one process, without DeepSpeed or a process group."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cllm4rec_dist.distributed.topology import RowPartition


class ForwardEngine(Protocol):
    """Methods of an engine that inference and loading of checkpoints use."""

    def __call__(self, *inputs: Any) -> Tensor: ...
    def train(self, mode: bool) -> None: ...
    def num_parameters(self) -> tuple[int, int]: ...
    def partitions(self) -> dict[str, RowPartition]: ...
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def weights(self) -> dict[str, Tensor]: ...
    def set_weights(self, weights: dict[str, Tensor]) -> None: ...


class LocalEngine:
    """Runs forwards of a module on one device, without gradients.

    Args:
        module: the backbone; a checkpoint holds its parameters that require gradients.
        device: device of the module.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module.to(device)
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Tensor:
        """Run one forward of the module."""
        output: Tensor = self._module(*inputs)
        return output

    def train(self, mode: bool) -> None:
        """Switch dropout on or off."""
        self._module.train(mode)

    def num_parameters(self) -> tuple[int, int]:
        """Number of trained and of frozen parameters."""
        counts = [0, 0]
        for parameter in self._module.parameters():
            packed = 2 if parameter.dtype == torch.uint8 else 1  # two 4-bit weights in a byte
            counts[not parameter.requires_grad] += parameter.numel() * packed
        return counts[0], counts[1]

    def partitions(self) -> dict[str, RowPartition]:
        """Partition of each flattened trained parameter, which has one part."""
        return {name: RowPartition(parameter.numel(), 1) for name, parameter in self._trained.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each trained parameter."""
        return {name: tuple(parameter.shape) for name, parameter in self._trained.items()}

    def weights(self) -> dict[str, Tensor]:
        """Each trained parameter, flattened, fp32."""
        return {name: parameter.detach().float().flatten() for name, parameter in self._trained.items()}

    @torch.no_grad()
    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Restore the result of `weights`."""
        for name, flat in weights.items():
            self._trained[name].copy_(flat.view(self._trained[name].shape))
