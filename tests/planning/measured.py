"""What a real run sends and holds, counted where torch is asked for it, for comparison with a plan."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Wire(TorchDispatchMode):
    """Inside, every collective is counted: bytes that leave this rank, as `planning/traffic.py` defines them."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._overloadpacket.__name__
            self.sent[name] += self._bytes(name, args)
        return func(*args, **(kwargs or {}))

    def _bytes(self, name: str, args: Any) -> int:
        others = self.size - 1
        if name == "allreduce_":
            return 2 * others * -(-_bytes(args[0]) // self.size)
        if name in ("_allgather_base_", "_reduce_scatter_base_"):  # result, operand
            return others * min(_bytes(args[0]), _bytes(args[1]))
        assert name == "alltoall_base_", name
        operand, counts = args[1], args[4]
        if not counts:
            return _bytes(operand) * others // self.size
        return (sum(counts) - counts[self.rank]) * _bytes(operand[:1])


def _bytes(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


class Held(TorchDispatchMode):
    """Inside, every storage is counted from birth to death; what is there before counts from the start.

    Attributes:
        before: bytes alive at the start.
        highest: most bytes alive.
    """

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        self._known: set[int] = set()
        self.alive = self.highest = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some objects of torch warn when they are looked at
            for x in gc.get_objects():
                if isinstance(x, Tensor) and x.device.type == "cpu" and x.layout is torch.strided:
                    self._count(x.untyped_storage())
        self.before = self.alive

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.alive += size
        self.highest = max(self.highest, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                for part in (x._values(), x._indices()) if x.is_sparse else (x,):
                    self._count(part.untyped_storage())
        return out
