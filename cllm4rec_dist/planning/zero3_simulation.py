"""Simulates ZeRO-3's gathers of weights in one process.

ZeRO-3 gathers a module's weights before its forward and before its backward, releases them afterwards unless they are
needed again soon, and prefetches the next ones in the order of the previous pass. This order and four settings
determine the communication of a step and the memory of gathered weights. With hpZ (ZeRO++) a released weight leaves a
second partition in a group of ranks, from which it is gathered until an optimizer step changes it: a frozen one for
good. `record` records the order while the module
runs on meta tensors; `Zero3Simulation.simulate` applies DeepSpeed's rules
(`partitioned_param_coordinator.py`) to it.

Legend: W ranks.
"""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

logger = logging.getLogger(__name__)

SIMULATED_VERSION = "0.19.8"
"""DeepSpeed release that the rules are copied from."""


def warn_of_other_version() -> None:
    """Log a warning if another DeepSpeed is installed than the one that is simulated."""
    installed = version("deepspeed")
    if installed != SIMULATED_VERSION:
        logger.warning(
            "DeepSpeed %s is installed and the plan follows the rules of %s: gathered weights and communication"
            " may differ",
            installed,
            SIMULATED_VERSION,
        )


@dataclass(frozen=True)
class Event:
    """Fetch or release of a module's weights, in its forward or in its backward.

    Attributes:
        recomputed: True for a forward inside of backward, which recomputes an activation checkpoint.
    """

    module: nn.Module
    fetch: bool
    forward: bool
    recomputed: bool


def record(root: nn.Module, leaf_modules: Collection[nn.Module], note: Callable[[Event], None]) -> None:
    """Call `note` at every event of `root`'s passes, with hooks on the modules that ZeRO-3 hooks.

    Args:
        leaf_modules: modules that are gathered as a whole, whose submodules are not hooked.
    """

    def add(module: nn.Module) -> None:
        if module not in leaf_modules:
            for child in module.children():
                add(child)
        _hook(module, note)

    add(root)


def _hook(module: nn.Module, note: Callable[[Event], None]) -> None:
    outputs = inputs = 0

    def event(*, fetch: bool, forward: bool) -> None:
        note(Event(module, fetch, forward, forward and torch._C._current_graph_task_id() != -1))

    class Before(torch.autograd.Function):
        """Identity after an output, whose backward runs before the module's."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            nonlocal outputs
            outputs += 1
            return x.detach()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            nonlocal outputs
            if outputs > 0:
                event(fetch=True, forward=False)
                outputs -= 1
            return grad

    class After(torch.autograd.Function):
        """Identity before an input, whose backward runs after the module's."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            nonlocal inputs
            inputs += x.requires_grad
            return x.detach()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            nonlocal inputs
            inputs -= 1
            if inputs == 0:
                event(fetch=False, forward=False)
            return grad

    def begin(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal inputs
        event(fetch=True, forward=True)
        inputs = 0
        return _each(After.apply, arguments)

    def end(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        event(fetch=False, forward=True)
        return _each(Before.apply, output)

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end)


def _each(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return tree_map(lambda x: function(x) if isinstance(x, Tensor) and x.requires_grad else x, tree)


@dataclass(frozen=True)
class Zero3Settings:
    """Settings of a DeepSpeed file that determine gathers, in elements.

    Attributes:
        hpz: ranks of a group with second partitions; 1 for none.
    """

    prefetch_bucket: int
    max_reuse_distance: int
    max_live_parameters: int
    persistence_threshold: int
    model_persistence_threshold: int
    reduce_bucket: int
    sub_group: int
    hpz: int = 1


@dataclass(frozen=True)
class Gathers:
    """Gathers of a step on each rank.

    Attributes:
        calls: elements of each all-gather over all ranks, padded.
        group_calls: elements of each all-gather within a group of hpZ, padded.
        gathered: elements of gathered weights after each event of the last micro-batch, without persistent ones.
        copied: elements that are in memory twice at that event, because a gather of several weights is split.
    """

    calls: list[int]
    group_calls: list[int]
    gathered: list[int]
    copied: list[int]


class Zero3Simulation:
    """ZeRO-3's rules for one module.

    Args:
        root: the engine's module.
        leaf_modules: see `record`.
        num_ranks: W.
        packed: number of stored elements of parameters that store several values in one.

    Attributes:
        parameters: parameters in DeepSpeed's order.
        persistent: parameters that are kept whole on every rank between steps.
    """

    def __init__(
        self,
        root: nn.Module,
        leaf_modules: Collection[nn.Module],
        num_ranks: int,
        settings: Zero3Settings,
        packed: Mapping[nn.Parameter, int],
    ) -> None:
        self.leaf_modules, self.num_ranks, self.settings, self.packed = set(leaf_modules), num_ranks, settings, packed
        # DeepSpeed orders weights as they are loaded, and adapters after all of them.
        self.parameters = [
            parameter for _, parameter in sorted(root.named_parameters(), key=lambda named: _is_added(named[0]))
        ]
        self._parameters_of: dict[tuple[nn.Module, bool], list[nn.Parameter]] = {}
        self._index = {parameter: index for index, parameter in enumerate(self.parameters)}
        self.persistent = self._persistent()

    def _persistent(self) -> set[nn.Parameter]:
        persistent: set[nn.Parameter] = set()
        numel = 0
        for parameter in self.parameters:
            fits = numel + self.numel(parameter) <= self.settings.model_persistence_threshold
            if fits and self.numel(parameter) <= self.settings.persistence_threshold:
                persistent.add(parameter)
                numel += self.numel(parameter)
        return persistent

    def numel(self, parameter: nn.Parameter) -> int:
        """Number of stored elements of a parameter."""
        return self.packed.get(parameter, parameter.numel())

    def part(self, parameter: nn.Parameter) -> int:
        """Number of elements of a parameter on each rank, with padding."""
        return -(-self.numel(parameter) // self.num_ranks)

    def padded(self, parameters: Iterable[nn.Parameter]) -> int:
        """Number of elements of parameters over all ranks, with padding."""
        return sum(self.part(p) for p in parameters) * self.num_ranks

    def parameters_of(self, module: nn.Module, *, recurse: bool) -> list[nn.Parameter]:
        """Parameters of a module, in DeepSpeed's order."""
        key = module, recurse
        if key not in self._parameters_of:
            self._parameters_of[key] = sorted(module.parameters(recurse=recurse), key=self._index.__getitem__)
        return self._parameters_of[key]

    def gathered_with(self, module: nn.Module) -> list[nn.Parameter]:
        """Parameters that are gathered with a module."""
        return self.parameters_of(module, recurse=module in self.leaf_modules)

    def simulate(self, events: list[Event], num_passes: int) -> Gathers:
        """Simulate a step of `num_passes` micro-batches with the given events, in steady state."""
        state = _State(self, events)
        after: list[tuple[int, int]] = []
        for _ in range(num_passes):
            state.begin()
            after = [state.apply(event) for event in events]
            state.leave()
        gathered, copied = ([*column] for column in zip(*after, strict=True))
        # Before an optimizer step all weights are released; the persistent ones are gathered again, one by one.
        persistent = [self.padded([p]) for p in self.parameters if p in self.persistent]
        return Gathers(state.calls + persistent, state.group_calls, gathered, copied)


def _is_added(name: str) -> bool:
    """True for a parameter that is added to the decoder after loading."""
    return "lora_" in name or name == "anchor"


@dataclass
class _State:
    """State of a simulated step."""

    zero: Zero3Simulation
    events: list[Event]
    calls: list[int] = field(default_factory=list)
    group_calls: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.modules = [event.module for event in self.events if event.fetch]
        self.trace = [(p, step) for step, module in enumerate(self.modules) for p in self.zero.gathered_with(module)]
        self.available = set(self.zero.persistent)
        self.users: defaultdict[nn.Parameter, set[nn.Module]] = defaultdict(set)
        self.recomputed: defaultdict[nn.Module, set[nn.Parameter]] = defaultdict(set)
        self.coming: dict[nn.Parameter, int] = {}
        self.has_second_partition: set[nn.Parameter] = set()
        if self.zero.settings.hpz > 1:
            self.has_second_partition.update(p for p in self.zero.parameters if not p.requires_grad)

    def begin(self) -> None:
        """Start a forward."""
        self.queue = deque(self.trace)
        self.fetched_for: defaultdict[nn.Parameter, int] = defaultdict(lambda: -1)
        self.in_backward: dict[nn.Module, None] = {}
        self.step = self.num_gathered = 0

    def apply(self, event: Event) -> tuple[int, int]:
        """Gather or release weights.

        Returns:
            Elements of gathered weights afterwards, without persistent ones, and elements in memory twice meanwhile.
        """
        copied = 0
        if event.fetch:
            copied = self._fetch(event)
        else:
            self._release(event)
        return sum(self.zero.numel(p) for p in self.available if p not in self.zero.persistent), copied

    def leave(self) -> None:
        """End a backward: release the weights of modules whose inputs had no gradient."""
        for module in reversed(self.in_backward):
            self._drop({*self.zero.gathered_with(module), *self.recomputed.pop(module, ())}, module)

    def _fetch(self, event: Event) -> int:
        needed = self.zero.gathered_with(event.module)
        if not event.forward:
            self.in_backward[event.module] = None
        self._gather(needed)
        copied = max([self.coming.pop(p, 0) for p in needed], default=0)
        for parameter in needed:
            self.users[parameter].add(event.module)
            if event.recomputed and self.in_backward and not parameter.requires_grad:
                owner = next(reversed(self.in_backward))
                self.recomputed[owner].add(parameter)
                self.users[parameter].add(owner)
        new = {p for p in needed if self.fetched_for[p] < self.step}
        seen: set[nn.Parameter] = set()
        while self.queue and len(seen) < len(new):
            parameter, self.fetched_for[parameter] = self.queue.popleft()
            seen.add(parameter)
        assert seen == new, "the order differs from that of the previous pass"
        self._prefetch()
        self.step += 1
        return copied

    def _prefetch(self) -> None:
        settings = self.zero.settings
        room = min(settings.max_live_parameters - self.num_gathered, settings.prefetch_bucket)
        prefetched: dict[nn.Parameter, None] = {}
        numel = 0
        while settings.prefetch_bucket > 0 and self.queue and numel < room:
            parameter, step = self.queue.popleft()
            self.fetched_for[parameter] = max(self.fetched_for[parameter], step)
            if parameter not in self.available and parameter not in prefetched:
                prefetched[parameter] = None
                numel += self.zero.numel(parameter)
        self._gather(prefetched)

    def _gather(self, parameters: Iterable[nn.Parameter]) -> None:
        missing = [p for p in parameters if p not in self.available]
        in_group = [p for p in missing if p in self.has_second_partition]
        over_all = [p for p in missing if p not in self.has_second_partition]
        for gathered, calls in ((in_group, self.group_calls), (over_all, self.calls)):
            if gathered:
                numel = self.zero.padded(gathered)
                calls.append(numel)
                self.coming.update(dict.fromkeys(gathered, numel if len(gathered) > 1 else 0))
        self.num_gathered += sum(self.zero.numel(p) for p in missing)
        self.available.update(missing)

    def _release(self, event: Event) -> None:
        unneeded = self._no_longer_needed(event.module)
        parameters = set(self.zero.gathered_with(event.module))
        if not event.forward:
            recomputed = self.recomputed.pop(event.module, set())
            parameters |= recomputed
            unneeded |= recomputed - self.zero.persistent
            self.in_backward.pop(event.module, None)
        for parameter in parameters:
            self.users[parameter].discard(event.module)
        self._drop(parameters & unneeded, event.module)

    def _drop(self, parameters: set[nn.Parameter], module: nn.Module) -> None:
        for parameter in parameters - self.zero.persistent:
            self.users[parameter].discard(module)
            if not self.users[parameter] and parameter in self.available:
                self.available.remove(parameter)
                if self.zero.settings.hpz > 1:
                    self.has_second_partition.add(parameter)
                self.num_gathered -= self.zero.numel(parameter)

    def _no_longer_needed(self, module: nn.Module) -> set[nn.Parameter]:
        candidates = set(self.zero.gathered_with(module)) - self.zero.persistent
        unneeded = {p for p in candidates if self.fetched_for[p] <= self.step}
        distance, recurse = 0, module in self.zero.leaf_modules
        for later in self.modules[self.step :]:
            if distance >= self.zero.settings.max_reuse_distance or not unneeded:
                break
            # DeepSpeed recurses into `later` if the module that it releases is a leaf module.
            parameters = self.zero.parameters_of(later, recurse=recurse)
            unneeded.difference_update(parameters)
            distance += sum(self.zero.numel(p) for p in parameters)
        return unneeded
