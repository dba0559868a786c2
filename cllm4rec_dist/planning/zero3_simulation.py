"""Which weights ZeRO-3 gathers, when, and for how long: its rules, played through without a rank.

ZeRO-3 gathers a module's weights before its forward and before its backward, lets them go afterwards unless they come
again soon, and fetches the next ones ahead, in the order of the pass before. What goes over the wire in a step and how
many weights lie whole in memory follows from that order and four settings. `record` notes the order while the module
runs on meta tensors; `Zero3.play` applies the rules (`partitioned_param_coordinator.py` of DeepSpeed 0.19.8) to it.

Legend: W ranks.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Event:
    """A module's weights are wanted (`fetch`) or no longer wanted, in its forward or in its backward.

    Attributes:
        recomputed: a forward that runs inside of backward, for an activation checkpoint.
    """

    module: nn.Module
    fetch: bool
    forward: bool
    recomputed: bool


def record(root: nn.Module, whole: Collection[nn.Module], note: Callable[[Event], None]) -> None:
    """Call `note` at every event of `root`'s passes, in the places where ZeRO-3 hooks modules.

    Args:
        whole: modules that are gathered as a whole; what is inside of them is not hooked.
    """

    def add(module: nn.Module) -> None:
        if module not in whole:
            for child in module.children():
                add(child)
        _hook(module, note)

    add(root)


def _hook(module: nn.Module, note: Callable[[Event], None]) -> None:
    outputs = inputs = 0

    def event(*, fetch: bool, forward: bool) -> None:
        note(Event(module, fetch, forward, forward and torch._C._current_graph_task_id() != -1))

    class Before(torch.autograd.Function):
        """Stands behind an output, so that its backward comes before the module's."""

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
        """Stands before an input, so that its backward comes after the module's."""

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
    """What of a DeepSpeed file decides over gathering, in elements."""

    prefetch_bucket: int
    max_reuse_distance: int
    max_live_parameters: int
    persistence_threshold: int
    model_persistence_threshold: int
    reduce_bucket: int
    sub_group: int


@dataclass(frozen=True)
class Gathers:
    """What a step gathers on each rank.

    Attributes:
        calls: elements of each all-gather, padded, all ranks' parts together.
        whole: elements that lie whole in memory after each event of the last micro-batch, persistent ones left out.
        copied: elements that are in memory twice at that event, because a gather of several weights is taken apart.
    """

    calls: list[int]
    whole: list[int]
    copied: list[int]


class Zero3:
    """ZeRO-3's rules for one module.

    Args:
        root: the engine's module.
        whole: see `record`.
        num_ranks: W.
        packed: elements of those parameters that are stored in fewer than they have.

    Attributes:
        parameters: in DeepSpeed's order.
        persistent: those that stay whole on every rank between steps.
    """

    def __init__(
        self,
        root: nn.Module,
        whole: Collection[nn.Module],
        num_ranks: int,
        settings: Zero3Settings,
        packed: Mapping[nn.Parameter, int],
    ) -> None:
        self.whole, self.num_ranks, self.settings, self.packed = set(whole), num_ranks, settings, packed
        named = dict(root.named_parameters())
        # DeepSpeed numbers weights as they are loaded, adapters after all of them.
        added = lambda name: "lora_" in name or name == "anchor"  # noqa: E731
        self.parameters = sorted(named.values(), key=_order([named[n] for n in named if not added(n)]))
        self._of: dict[tuple[nn.Module, bool], list[nn.Parameter]] = {}
        self._number = {parameter: number for number, parameter in enumerate(self.parameters)}
        self.persistent = self._persistent()

    def _persistent(self) -> set[nn.Parameter]:
        found: set[nn.Parameter] = set()
        numel = 0
        for parameter in self.parameters:
            fits = numel + self.numel(parameter) <= self.settings.model_persistence_threshold
            if fits and self.numel(parameter) <= self.settings.persistence_threshold:
                found.add(parameter)
                numel += self.numel(parameter)
        return found

    def numel(self, parameter: nn.Parameter) -> int:
        """Elements that are stored of a parameter."""
        return self.packed.get(parameter, parameter.numel())

    def part(self, parameter: nn.Parameter) -> int:
        """Elements of a parameter on each rank, padding included."""
        return -(-self.numel(parameter) // self.num_ranks)

    def padded(self, parameters: Iterable[nn.Parameter]) -> int:
        """Elements of all ranks' parts of some parameters."""
        return sum(self.part(p) for p in parameters) * self.num_ranks

    def of(self, module: nn.Module, *, recurse: bool) -> list[nn.Parameter]:
        """The parameters of a module, in DeepSpeed's order."""
        key = module, recurse
        if key not in self._of:
            self._of[key] = sorted(module.parameters(recurse=recurse), key=self._number.__getitem__)
        return self._of[key]

    def own(self, module: nn.Module) -> list[nn.Parameter]:
        """The parameters that are gathered with a module."""
        return self.of(module, recurse=module in self.whole)

    def simulate(self, events: list[Event], num_passes: int) -> Gathers:
        """A whole step of `num_passes` micro-batches that each run `events`, after the first steps are over."""
        state = _State(self, events)
        after: list[tuple[int, int]] = []
        for _ in range(num_passes):
            state.begin()
            after = [state.apply(event) for event in events]
            state.leave()
        whole, copied = ([*column] for column in zip(*after, strict=True))
        # Before the optimizer steps every weight is let go; the persistent ones come back, one by one.
        return Gathers(state.calls + [self.padded([p]) for p in self.parameters if p in self.persistent], whole, copied)


def _order(first: list[nn.Parameter]) -> Callable[[nn.Parameter], int]:
    places = {parameter: place for place, parameter in enumerate(first)}
    return lambda parameter: places.get(parameter, len(places))


@dataclass
class _State:
    """Where a step is."""

    zero: Zero3
    events: list[Event]
    calls: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.modules = [event.module for event in self.events if event.fetch]
        self.trace = [(p, step) for step, module in enumerate(self.modules) for p in self.zero.own(module)]
        self.available = set(self.zero.persistent)
        self.users: defaultdict[nn.Parameter, set[nn.Module]] = defaultdict(set)
        self.recomputed: defaultdict[nn.Module, set[nn.Parameter]] = defaultdict(set)
        self.coming: dict[nn.Parameter, int] = {}

    def begin(self) -> None:
        """The start of a forward."""
        self.queue = deque(self.trace)
        self.fetched_for: defaultdict[nn.Parameter, int] = defaultdict(lambda: -1)
        self.in_backward: dict[nn.Module, None] = {}
        self.step = self.num_gathered = 0

    def apply(self, event: Event) -> tuple[int, int]:
        """Gather or let go; elements whole in memory afterwards, persistent ones left out, and those twice at it."""
        copied = 0
        if event.fetch:
            copied = self._fetch(event)
        else:
            self._release(event)
        return sum(self.zero.numel(p) for p in self.available if p not in self.zero.persistent), copied

    def leave(self) -> None:
        """The end of a backward: let go what modules hold whose inputs had no gradient."""
        for module in reversed(self.in_backward):
            self._drop({*self.zero.own(module), *self.recomputed.pop(module, ())}, module)

    def _fetch(self, event: Event) -> int:
        wanted = self.zero.own(event.module)
        if not event.forward:
            self.in_backward[event.module] = None
        self._gather(wanted)
        copied = max([self.coming.pop(p, 0) for p in wanted], default=0)
        for parameter in wanted:
            self.users[parameter].add(event.module)
            if event.recomputed and self.in_backward and not parameter.requires_grad:
                owner = next(reversed(self.in_backward))
                self.recomputed[owner].add(parameter)
                self.users[parameter].add(owner)
        new = {p for p in wanted if self.fetched_for[p] < self.step}
        seen: set[nn.Parameter] = set()
        while self.queue and len(seen) < len(new):
            parameter, self.fetched_for[parameter] = self.queue.popleft()
            seen.add(parameter)
        assert seen == new, "the order differs from that of the pass before"
        self._prefetch()
        self.step += 1
        return copied

    def _prefetch(self) -> None:
        settings = self.zero.settings
        room = min(settings.max_live_parameters - self.num_gathered, settings.prefetch_bucket)
        ahead: dict[nn.Parameter, None] = {}
        numel = 0
        while settings.prefetch_bucket > 0 and self.queue and numel < room:
            parameter, step = self.queue.popleft()
            self.fetched_for[parameter] = max(self.fetched_for[parameter], step)
            if parameter not in self.available and parameter not in ahead:
                ahead[parameter] = None
                numel += self.zero.numel(parameter)
        self._gather(ahead)

    def _gather(self, parameters: Iterable[nn.Parameter]) -> None:
        missing = [p for p in parameters if p not in self.available]
        if missing:
            numel = self.zero.padded(missing)
            self.calls.append(numel)
            self.coming.update(dict.fromkeys(missing, numel if len(missing) > 1 else 0))
            self.num_gathered += sum(self.zero.numel(p) for p in missing)
            self.available.update(missing)

    def _release(self, event: Event) -> None:
        let_go = self._no_longer_needed(event.module)
        own = set(self.zero.own(event.module))
        if not event.forward:
            recomputed = self.recomputed.pop(event.module, set())
            own |= recomputed
            let_go |= recomputed - self.zero.persistent
            self.in_backward.pop(event.module, None)
        for parameter in own:
            self.users[parameter].discard(event.module)
        self._drop(own & let_go, event.module)

    def _drop(self, parameters: set[nn.Parameter], module: nn.Module) -> None:
        for parameter in parameters - self.zero.persistent:
            self.users[parameter].discard(module)
            if not self.users[parameter] and parameter in self.available:
                self.available.remove(parameter)
                self.num_gathered -= self.zero.numel(parameter)

    def _no_longer_needed(self, module: nn.Module) -> set[nn.Parameter]:
        found = {p for p in self.zero.own(module) if p not in self.zero.persistent and self.fetched_for[p] <= self.step}
        passed, recurse = 0, module in self.zero.whole
        for later in self.modules[self.step :]:
            if passed >= self.zero.settings.max_reuse_distance or not found:
                break
            # Whether DeepSpeed looks inside of `later` depends on the module that it lets go.
            parameters = self.zero.of(later, recurse=recurse)
            found.difference_update(parameters)
            passed += sum(self.zero.numel(p) for p in parameters)
        return found
