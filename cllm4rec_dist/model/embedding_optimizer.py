"""Adam for the parameters outside the engine: dense, or lazy for tables that are only looked up.

A dense gradient moves every row, in blocks of rows; a sparse one moves the rows of the step alone, which are gathered,
stepped and put back (torch's SparseAdam passes more often over them). Both use torch's fused AdamW. Nothing
decays: rows have their priors instead.

Moments live where the rows do, as fp32, as 8 bits by bitsandbytes, or in host memory. Whatever they are, they are saved
and restored as fp32.

Legend: R local rows, D width, k rows of a step.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.recommender import Recommender

Storage = Literal["fp32", "int8", "cpu"]
Rows = slice | Tensor
"""Consecutive rows, or an index of distinct ones, int64 [k]."""
_BLOCK_ENTRIES = 1 << 22
"""Entries of a dense parameter stepped at a time: bounds what is unpacked or copied to the host."""
_SCALED_TOGETHER = (256, 128, 64)
"""Neighbouring entries of a row that may share a scale; blocks must not cross rows, which are stepped alone."""


class EmbeddingOptimizer:
    """Steps the rows and the head of a `Recommender`; gradients must be complete, clipped and coalesced.

    Args:
        model: whose sharded and replicated parameters are trained.
        betas: Adam's moments.
        storage: of the moments.

    Raises:
        ConfigError: where 8 bits cannot be had.
    """

    def __init__(self, model: Recommender, betas: tuple[float, float], storage: Storage = "fp32") -> None:
        named = [(name, parameter) for name, parameter, _ in model.sharded_parameters()]
        self._named, self._betas = [*named, *model.replicated_parameters()], betas
        self._moments = {name: _make_moments(_as_rows(parameter), storage) for name, parameter in self._named}

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Everything stepped here."""
        return [parameter for _, parameter in self._named]

    @property
    def names(self) -> list[str]:
        """Their names, in the same order."""
        return [name for name, _ in self._named]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update with learning rate `lr` and drop the gradients."""
        for name, parameter in self._named:
            if parameter.grad is None:
                continue
            moments = self._moments[name]
            for rows, gradient in _parts(parameter.grad):
                self._update(_as_rows(parameter), rows, gradient, moments, lr)
            moments.steps += 1
            # The fused kernel does not tell autograd of its writing, and `tables.lookup` asks.
            torch.autograd.graph.increment_version(parameter)
        self.discard()

    def _update(self, weights: Tensor, rows: Rows, gradient: Tensor, moments: _Moments, lr: float) -> None:
        part = _read(weights, rows).to(moments.device)
        first, second = moments.read(rows)
        steps = torch.full((), float(moments.steps), device=moments.device)
        adamw(
            [part],
            [gradient.to(moments.device)],
            [first],
            [second],
            [],
            [steps],
            fused=True,
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
        moments.write(rows, first, second)
        if isinstance(rows, Tensor) or part.device != weights.device:  # else `part` is a view
            _write(weights, rows, part.to(weights.device))

    def discard(self) -> None:
        """Drop the gradients of a step that is left out."""
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> dict[str, dict[str, Tensor]]:
        """By parameter name: `exp_avg` and `exp_avg_sq` in the parameter's shape, fp32, and `step` as a scalar."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._named:
            moments = self._moments[name]
            first, second = (value.view(parameter.shape) for value in moments.whole())
            found[name] = {"exp_avg": first, "exp_avg_sq": second, "step": torch.tensor(float(moments.steps))}
        return found

    def load_state(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Put back what `state` gave; a parameter without state starts anew."""
        for name, parameter in self._named:
            moments, state = self._moments[name], states.get(name)
            zero = torch.zeros_like(parameter.detach())
            moments.steps = 0 if state is None else int(state["step"])
            first, second = (zero, zero) if state is None else (state["exp_avg"], state["exp_avg_sq"])
            moments.fill(_as_rows(first), _as_rows(second))


def _as_rows(parameter: Tensor) -> Tensor:
    """A view of [R, D] or [R]."""
    return parameter.detach().view(-1) if parameter.dim() == 0 else parameter.detach()


def _parts(gradient: Tensor) -> Iterator[tuple[Rows, Tensor]]:
    """Rows to step together, and their gradients."""
    if gradient.is_sparse:
        if gradient._nnz():
            yield gradient.indices()[0], gradient.values()
    else:
        yield from ((rows, _as_rows(gradient)[rows]) for rows in _blocks(_as_rows(gradient)))


def _read(values: Tensor, rows: Rows) -> Tensor:
    """A view of consecutive rows, a copy of others, where `values` are."""
    return values[rows] if isinstance(rows, slice) else values.index_select(0, rows.to(values.device))


def _write(values: Tensor, rows: Rows, new: Tensor) -> None:
    if isinstance(rows, slice):
        values[rows] = new
    else:
        values.index_copy_(0, rows.to(values.device), new)


def _blocks(values: Tensor) -> Iterator[slice]:
    """Consecutive rows, a bounded number of entries at a time."""
    size = max(1, _BLOCK_ENTRIES // max(1, values[:1].numel()))
    yield from (slice(start, start + size) for start in range(0, len(values), size))


def _make_moments(weights: Tensor, storage: Storage) -> _Moments:
    if storage == "int8" and weights.dim() == 2 and weights.shape[1] > 1:  # biases are not worth it
        return _PackedMoments(weights)
    return _Moments(weights, torch.device("cpu") if storage == "cpu" else weights.device)


class _Moments:
    """Adam's two moments of a parameter as fp32.

    Args:
        weights: [R, D] or [R] that they belong to.
        device: where they live and a step is computed.

    Attributes:
        steps: taken so far.
    """

    def __init__(self, weights: Tensor, device: torch.device) -> None:
        self.device, self.steps = device, 0
        self._first, self._second = (torch.zeros(weights.shape, device=device) for _ in range(2))

    def read(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Moments of some rows; views of consecutive ones."""
        return _read(self._first, rows), _read(self._second, rows)

    def write(self, rows: Rows, first: Tensor, second: Tensor) -> None:
        """Put back what was read and has changed."""
        if isinstance(rows, Tensor):
            _write(self._first, rows, first)
            _write(self._second, rows, second)

    def whole(self) -> tuple[Tensor, Tensor]:
        """Both, of all rows."""
        return self._first, self._second

    def fill(self, first: Tensor, second: Tensor) -> None:
        """Overwrite both."""
        self._first.copy_(first)
        self._second.copy_(second)


class _PackedMoments(_Moments):
    """The same in 8 bits an entry: block-wise dynamic quantization (Dettmers et al., arXiv 2110.02861) by bitsandbytes.

    What is packed of the second moment is its root, which has the range of the first one: small entries of either get
    lost at the same size (on CPUs below some 3e-5 of the largest that shares their scale), and no row moves by a first
    moment over a second one of zero. The ends of the code are 1 and
    -1 (bitsandbytes' own has -0.993), so that the largest of the entries that share a scale is kept exactly. The others
    are kept to about 1 %; packing once more what was unpacked, after a resume, moves none by more than 1e-4 of it.
    """

    def __init__(self, weights: Tensor) -> None:
        self.device, self.steps = weights.device, 0
        self._bnb = _bitsandbytes()
        width = weights.shape[1]
        self._scaled_together = next((size for size in _SCALED_TOGETHER if width % size == 0), 0)
        if not self._scaled_together:
            raise ConfigError(
                "optimizer.embeddings_state",
                "int8",
                f"needs rows of a multiple of 64 entries, which {width} is not",
                "Use fp32 or cpu, or another backbone.",
            )
        signed = self._bnb.create_dynamic_map(signed=True)
        signed[0] = -1.0
        self._maps = [signed.to(self.device), self._bnb.create_dynamic_map(signed=False).to(self.device)]
        self._codes = [torch.zeros(weights.shape, dtype=torch.uint8, device=self.device) for _ in self._maps]
        num_scales = width // self._scaled_together
        self._scales = [torch.zeros(len(weights), num_scales, device=self.device) for _ in self._maps]

    def read(self, rows: Rows) -> tuple[Tensor, Tensor]:
        first, root = (
            self._bnb.dequantize_blockwise(
                _read(codes, rows), absmax=_read(scales, rows).flatten(), code=code, blocksize=self._scaled_together
            )
            for codes, scales, code in zip(self._codes, self._scales, self._maps, strict=True)
        )
        return first, root.square_()

    def write(self, rows: Rows, first: Tensor, second: Tensor) -> None:
        pairs = zip(self._codes, self._scales, self._maps, (first, second.sqrt()), strict=True)
        for codes, scales, code, values in pairs:
            packed, state = self._bnb.quantize_blockwise(values, code=code, blocksize=self._scaled_together)
            _write(codes, rows, packed)
            _write(scales, rows, state.absmax.view(len(values), -1))

    def whole(self) -> tuple[Tensor, Tensor]:
        """Both, of all rows, on the host."""
        parts = [tuple(value.cpu() for value in self.read(rows)) for rows in _blocks(self._codes[0])]
        empty = torch.zeros(0, self._codes[0].shape[1])
        first, second = (torch.cat([empty, *(part[number] for part in parts)]) for number in range(2))
        return first, second

    def fill(self, first: Tensor, second: Tensor) -> None:
        for rows in _blocks(first):
            self.write(rows, first[rows].to(self.device), second[rows].to(self.device))


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ConfigError(
            "optimizer.embeddings_state",
            "int8",
            f"needs bitsandbytes, which is not there ({error})",
            "Install it with pip install 'cllm4rec_dist[qlora]', or use fp32 or cpu.",
        ) from error
