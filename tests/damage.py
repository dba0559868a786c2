"""Ways to spoil a file, seeded: what disks, copies and people who mean harm do to it."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

Spoil = Callable[[Path, random.Random], object]


def truncate(path: Path, draw: random.Random) -> None:
    """Cut anywhere."""
    os.truncate(path, draw.randrange(path.stat().st_size))


def flip_bit(path: Path, draw: random.Random) -> None:
    """One bit anywhere."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content))


def append(path: Path, draw: random.Random) -> None:
    """Some bytes more."""
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 100)))


def noise(path: Path, draw: random.Random) -> None:
    """Nothing but noise."""
    path.write_bytes(draw.randbytes(path.stat().st_size))


def folder(path: Path, draw: random.Random) -> None:
    """A folder of this name."""
    path.unlink()
    path.mkdir()


class Bomb:
    """Leaves a file where somebody unpickles it."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch exploded",)


DAMAGE: dict[str, tuple[Spoil, int]] = {
    "truncated": (truncate, 6),
    "bit flipped": (flip_bit, 10),
    "appended": (append, 3),
    "noise": (noise, 2),
    "folder": (folder, 1),
    "missing": (lambda path, draw: path.unlink(), 1),
    "empty": (lambda path, draw: path.write_bytes(b""), 1),
    "pickled": (lambda path, draw: path.write_bytes(pickle.dumps(Bomb())), 1),
}
"""Each with how often it is tried on a file."""
