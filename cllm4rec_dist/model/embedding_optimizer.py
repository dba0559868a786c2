"""Adam for the parameters outside the engine, with dense or sparse updates.

A dense gradient updates all rows, in blocks. A sparse gradient updates only its rows, which are gathered, stepped and
written back (torch's SparseAdam makes more passes over them). Both use torch's fused AdamW without weight decay, since
the rows have priors.

Moments are kept in fp32 or in 8 bits (bitsandbytes) on the device of the rows, or in fp32 in host memory. They are
always saved and restored in fp32.

Legend: R local rows, D width, k rows of a step.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.recommender import Recommender
from cllm4rec_dist.model.shared_words import SharedWords

Storage = Literal["fp32", "int8", "cpu"]
Rows = slice | Tensor
"""Consecutive rows, or an index of distinct rows, int64 [k]."""
_ITEMS = "collaborative.items"
_WORDS = "collaborative.items.words"
"""Name of the moments of the words that items share."""
_BLOCK_ENTRIES = 1 << 22
"""Entries of a dense parameter stepped at a time; limits what is dequantized or copied to the host."""
_QUANTIZATION_BLOCKS = (256, 128, 64)
"""Block sizes of 8-bit moments; a block must not cross rows, which may be stepped separately."""


class EmbeddingOptimizer:
    """Steps the tables and the head of a `Recommender`; gradients must be complete, clipped and coalesced.

    Args:
        model: its sharded and replicated parameters are trained.
        betas: Adam's decay rates.
        storage: `fp32`, `int8`, or `cpu` (fp32 in host memory), of the moments.
        words: shares updates of the collaborative items, whose gradient must be dense; None for no sharing.

    Raises:
        ConfigError: if 8-bit moments are not possible.
    """

    def __init__(
        self,
        model: Recommender,
        betas: tuple[float, float],
        storage: Storage = "fp32",
        words: SharedWords | None = None,
    ) -> None:
        named = [(name, parameter) for name, parameter, _ in model.sharded_parameters()]
        self._tables, self._changed = dict(named), dict[str, Tensor]()
        self._named, self._betas = [*named, *model.replicated_parameters()], betas
        self._words, stepped = words, {name: parameter.detach() for name, parameter in self._named}
        if words is not None:
            items = self._tables[_ITEMS]
            stepped[_WORDS] = items.new_empty(words.num_words, items.shape[1])
        self._shapes = {name: values.shape for name, values in stepped.items()}
        self._moments = {name: _make_moments(_as_rows(values), storage) for name, values in stepped.items()}

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Parameters that this optimizer steps."""
        return [parameter for _, parameter in self._named]

    @property
    def names(self) -> list[str]:
        """Names of `parameters`, in the same order."""
        return [name for name, _ in self._named]

    @property
    def moment_names(self) -> list[str]:
        """Names of everything that has moments: `parameters`, and the words that items share."""
        return [*self._moments]

    @property
    def replicated_shapes(self) -> dict[str, torch.Size]:
        """Shapes by name of the moments that are the same on all ranks."""
        return {name: shape for name, shape in self._shapes.items() if name not in self._tables}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update with learning rate `lr` and drop the gradients. A collective if items share updates."""
        for name, parameter in self._named:
            if parameter.grad is None:
                continue
            if name == _ITEMS and self._words is not None:
                self._step_words(self._words, parameter, lr)
            moments = self._moments[name]
            for rows, gradient in _parts(parameter.grad):
                self._update(_as_rows(parameter), rows, gradient, moments, lr)
                if name in self._changed:
                    _mark(self._changed[name], rows)
            moments.steps += 1
            # The fused kernel does not increment the version, which `PendingLookup.wait` checks.
            torch.autograd.graph.increment_version(parameter)
        self.discard()

    def _step_words(self, words: SharedWords, items: torch.nn.Parameter, lr: float) -> None:
        assert items.grad is not None
        gradient, moments = words.gradient(items.grad), self._moments[_WORDS]
        update = torch.zeros_like(gradient)
        for rows, part in _parts(gradient):
            self._update(update, rows, part, moments, lr * words.lr_ratio)
        moments.steps += 1
        words.add_update(items.detach(), update)

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
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def record_changes(self) -> None:
        """Record from now on which rows of the tables change: one byte per local row on its device."""
        self._changed = {
            name: torch.zeros(len(parameter), dtype=torch.bool, device=parameter.device)
            for name, parameter in self._tables.items()
        }

    def changed_rows(self) -> dict[str, Tensor]:
        """Local rows that changed since `record_changes`, int64 [k] ascending, by table.

        A table is left out if all of its rows changed. Waits for the device.
        """
        return {name: flags.nonzero().flatten() for name, flags in self._changed.items() if not flags.all()}

    def state(self, rows: Mapping[str, Tensor] | None = None) -> dict[str, dict[str, Tensor]]:
        """State by name: `exp_avg` and `exp_avg_sq`, fp32 in the parameter's shape, and `step`, a scalar.

        Args:
            rows: by table, the local rows, int64 [k], whose moments are returned, on the host. Moments of other
                parameters are returned whole.
        """
        states: dict[str, dict[str, Tensor]] = {}
        for name, moments in self._moments.items():
            if rows is not None and name in rows:
                first, second = moments.take(rows[name])
            else:
                first, second = (value.view(self._shapes[name]) for value in moments.whole())
            states[name] = {"exp_avg": first, "exp_avg_sq": second, "step": torch.tensor(float(moments.steps))}
        return states

    def load_state(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Restore the result of `state`; what has no state starts from zero."""
        for name, moments in self._moments.items():
            state = states.get(name)
            zero = torch.zeros(self._shapes[name], device=moments.device)
            moments.steps = 0 if state is None else int(state["step"])
            first, second = (zero, zero) if state is None else (state["exp_avg"], state["exp_avg_sq"])
            moments.fill(_as_rows(first), _as_rows(second))


def _as_rows(parameter: Tensor) -> Tensor:
    """View a parameter as [R, D] or [R]."""
    return parameter.detach().view(-1) if parameter.dim() == 0 else parameter.detach()


def _parts(gradient: Tensor) -> Iterator[tuple[Rows, Tensor]]:
    """Yield rows that are stepped together, and their gradients."""
    if gradient.is_sparse:
        if gradient._nnz():
            yield gradient.indices()[0], gradient.values()
    else:
        yield from ((rows, _as_rows(gradient)[rows]) for rows in _blocks(_as_rows(gradient)))


def _read(values: Tensor, rows: Rows) -> Tensor:
    """Rows of `values`: a view if they are consecutive, else a copy on the same device."""
    return values[rows] if isinstance(rows, slice) else values.index_select(0, rows.to(values.device))


def _mark(flags: Tensor, rows: Rows) -> None:
    if isinstance(rows, slice):
        flags[rows] = True
    else:
        flags.index_fill_(0, rows, True)


def rows_on_host(values: Tensor, rows: Tensor) -> Tensor:
    """Copy rows, int64 [k], of `values` [R, ..] into host memory, a block at a time."""
    return torch.cat([_read(values, part).cpu() for part in _index_blocks(values, rows)])


def _index_blocks(values: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """Split an index of rows into parts with a bounded number of entries; one empty part for no rows."""
    return rows.split(max(1, _BLOCK_ENTRIES // max(1, values[:1].numel())))


def _write(values: Tensor, rows: Rows, new: Tensor) -> None:
    if isinstance(rows, slice):
        values[rows] = new
    else:
        values.index_copy_(0, rows.to(values.device), new)


def _blocks(values: Tensor) -> Iterator[slice]:
    """Yield blocks of consecutive rows with a bounded number of entries."""
    size = max(1, _BLOCK_ENTRIES // max(1, values[:1].numel()))
    yield from (slice(start, start + size) for start in range(0, len(values), size))


def _make_moments(weights: Tensor, storage: Storage) -> _Moments:
    if storage == "int8" and weights.dim() == 2 and weights.shape[1] > 1:  # a bias is too small to pack
        return _PackedMoments(weights)
    return _Moments(weights, torch.device("cpu") if storage == "cpu" else weights.device)


class _Moments:
    """Adam's two moments of a parameter in fp32.

    Args:
        weights: [R, D] or [R], the parameter.
        device: holds the moments and computes the steps.

    Attributes:
        steps: steps taken so far.
    """

    def __init__(self, weights: Tensor, device: torch.device) -> None:
        self.device, self.steps = device, 0
        self._first, self._second = (torch.zeros(weights.shape, device=device) for _ in range(2))

    def read(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Moments of some rows; views if the rows are consecutive."""
        return _read(self._first, rows), _read(self._second, rows)

    def write(self, rows: Rows, first: Tensor, second: Tensor) -> None:
        """Write back moments that `read` returned and a step has changed."""
        if isinstance(rows, Tensor):
            _write(self._first, rows, first)
            _write(self._second, rows, second)

    def whole(self) -> tuple[Tensor, Tensor]:
        """Both moments of all rows."""
        return self._first, self._second

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Both moments of rows, int64 [k], on the host."""
        return rows_on_host(self._first, rows), rows_on_host(self._second, rows)

    def fill(self, first: Tensor, second: Tensor) -> None:
        """Overwrite both moments."""
        self._first.copy_(first)
        self._second.copy_(second)


class _PackedMoments(_Moments):
    """Moments in 8 bits: block-wise dynamic quantization (Dettmers et al., arXiv 2110.02861) by bitsandbytes.

    The second moment is stored as its square root, which has the range of the first moment: small entries of both
    underflow at the same size (on CPUs below about 3e-5 of their block's maximum), so that no update divides a first
    moment by a second moment of zero. The code ends at 1 and -1 (-0.993 in bitsandbytes), so that a block's largest
    entry is exact. The others have an error of about 1 %. Packing the unpacked values again, after a resume, changes
    an entry by at most 1e-4 of it.
    """

    def __init__(self, weights: Tensor) -> None:
        self.device, self.steps = weights.device, 0
        self._bnb = _bitsandbytes()
        width = weights.shape[1]
        self._block_size = next((size for size in _QUANTIZATION_BLOCKS if width % size == 0), 0)
        if not self._block_size:
            raise ConfigError(
                "optimizer.embeddings_state",
                "int8",
                f"needs embeddings and a backbone whose widths are multiples of 64, not {width}",
                "Use fp32 or cpu, another embeddings.dim, or another backbone.",
            )
        signed = self._bnb.create_dynamic_map(signed=True)
        signed[0] = -1.0
        self._maps = [signed.to(self.device), self._bnb.create_dynamic_map(signed=False).to(self.device)]
        self._codes = [torch.zeros(weights.shape, dtype=torch.uint8, device=self.device) for _ in self._maps]
        num_scales = width // self._block_size
        self._scales = [torch.zeros(len(weights), num_scales, device=self.device) for _ in self._maps]

    def read(self, rows: Rows) -> tuple[Tensor, Tensor]:
        first, root = (
            self._bnb.dequantize_blockwise(
                _read(codes, rows), absmax=_read(scales, rows).flatten(), code=code, blocksize=self._block_size
            )
            for codes, scales, code in zip(self._codes, self._scales, self._maps, strict=True)
        )
        return first, root.square_()

    def write(self, rows: Rows, first: Tensor, second: Tensor) -> None:
        pairs = zip(self._codes, self._scales, self._maps, (first, second.sqrt()), strict=True)
        for codes, scales, code, values in pairs:
            packed, state = self._bnb.quantize_blockwise(values, code=code, blocksize=self._block_size)
            _write(codes, rows, packed)
            _write(scales, rows, state.absmax.view(len(values), -1))

    def whole(self) -> tuple[Tensor, Tensor]:
        """Both moments of all rows, on the host."""
        return self._on_host(_blocks(self._codes[0]))

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._on_host(part for part in _index_blocks(self._codes[0], rows) if len(part))

    def _on_host(self, blocks: Iterable[Rows]) -> tuple[Tensor, Tensor]:
        parts = [tuple(value.cpu() for value in self.read(rows)) for rows in blocks]
        empty = torch.zeros(0, self._codes[0].shape[1])
        first, second = (torch.cat([empty, *(part[index] for part in parts)]) for index in range(2))
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
            f"needs bitsandbytes, which cannot be imported ({error})",
            "Install it with pip install 'cllm4rec_dist[qlora]', or use fp32 or cpu.",
        ) from error
