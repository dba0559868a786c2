"""Counters of the bytes that a run sends and allocates, as torch dispatch modes."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cllm4rec_dist.distributed.topology import World

_NOTHING_SENT = ("wait_tensor", "barrier", "_wrap_tensor_autograd")


class SentBytes(TorchDispatchMode):
    """Context manager that counts the bytes that collectives send from this rank, as defined in `planning/traffic.py`.

    Attributes:
        sent: bytes by name of the collective.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world.rank, world.size
        self.sent: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        """Bytes of all collectives."""
        return self.sent.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name not in _NOTHING_SENT:
            self.sent[name] += self._leaving(name, args)
        return func(*args, **(kwargs or {}))

    def _leaving(self, name: str, args: Any) -> int:
        groups = (dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        rank, size = next(((group.rank(), group.size()) for group in groups), self._world)
        others = size - 1
        match name:
            case "allreduce_":
                return 2 * others * -(-_bytes(args[0]) // size)
            case "_allgather_base_" | "_reduce_scatter_base_":  # output, input
                return others * min(_bytes(args[0]), _bytes(args[1]))
            case "all_gather_into_tensor":  # input
                return others * _bytes(args[0])
            case "reduce_scatter_tensor":
                return others * _bytes(args[0]) // size
            case "alltoall_base_":
                rows, counts = args[1], args[4]
                if not counts:
                    return _bytes(rows) * others // size
                return (sum(counts) - counts[rank]) * _bytes(rows[:1])
        raise AssertionError(f"unknown collective {name}")


def _bytes(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


class LiveMemory(TorchDispatchMode):
    """Context manager that counts the bytes of live storages, including those that exist before it.

    Attributes:
        before: bytes alive at the start.
        highest: peak of bytes alive.
    """

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        self._counted: set[int] = set()
        self.alive = self.highest = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some objects of torch warn when they are inspected
            for x in gc.get_objects():
                if isinstance(x, Tensor) and x.device.type == "cpu" and x.layout is torch.strided:
                    self._count(x.untyped_storage())
        self.before = self.alive

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._counted:
            return
        self._counted.add(key)
        size = storage.nbytes()
        self.alive += size
        self.highest = max(self.highest, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.alive -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                for part in (x._values(), x._indices()) if x.is_sparse else (x,):
                    self._count(part.untyped_storage())
        return out
