"""Optimizers of the parameters outside the engine, as torch ships them.

Parameters with dense gradients go to AdamW; tables that are only looked up have sparse gradients and go to SparseAdam,
which touches the rows of the step alone. Neither decays weights: rows have their priors instead. State is fp32 and
local to the rank that holds the rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cllm4rec_dist.model.recommender import Recommender


class TableOptimizer:
    """Steps the rows and the head of a `Recommender`; gradients must be complete and clipped.

    Args:
        model: whose sharded and replicated parameters are trained.
        betas: Adam's moments.
    """

    def __init__(self, model: Recommender, betas: tuple[float, float]) -> None:
        lazy = [table.local_rows for table in model.tables if table.sparse_gradients and len(table.local_rows)]
        named = [(name, parameter) for name, parameter, _ in model.sharded_parameters()]
        self._named = [*named, *model.replicated_parameters()]
        dense = [p for _, p in self._named if not any(p is other for other in lazy)]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(dense, lr=0.0, betas=betas, weight_decay=0.0)
        ]
        if lazy:
            self._optimizers.append(torch.optim.SparseAdam(lazy, lr=1.0, betas=betas))

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Everything stepped here."""
        return [parameter for _, parameter in self._named]

    @property
    def names(self) -> list[str]:
        """Their names, in the same order."""
        return [name for name, _ in self._named]

    def step(self, lr: float) -> None:
        """Update with learning rate `lr` and drop the gradients."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def discard(self) -> None:
        """Drop the gradients of a step that is left out."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _states(self) -> Iterator[tuple[str, torch.nn.Parameter, torch.optim.Optimizer]]:
        owners = {
            id(p): optimizer for optimizer in self._optimizers for g in optimizer.param_groups for p in g["params"]
        }
        for name, parameter in self._named:
            yield name, parameter, owners[id(parameter)]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """By parameter name: `exp_avg` and `exp_avg_sq` in the parameter's shape, and `step` as a scalar."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, parameter, optimizer in self._states():
            state = optimizer.state.get(parameter, {})
            if state:
                found[name] = {key: torch.as_tensor(value) for key, value in state.items()}
        return found

    def load_state(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Put back what `state` gave; a parameter without state starts anew."""
        for name, parameter, optimizer in self._states():
            optimizer.state.pop(parameter, None)
            if name in states:
                state: dict[str, object] = dict(states[name])
                if isinstance(optimizer, torch.optim.SparseAdam):
                    state["step"] = int(states[name]["step"])
                optimizer.state[parameter] = state
