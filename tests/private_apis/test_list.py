"""The tests of this folder cover every private name of a library that the package uses, and no other."""

from __future__ import annotations

import ast

import pytest

# Imported for their lists.
from tests.private_apis import (  # noqa: F401
    test_deepspeed,
    test_peft,
    test_ray_and_uvicorn,
    test_torch,
    test_transformers,
)
from tests.private_apis.listing import LISTED, ROOT, private_names


def test_every_private_name_of_a_library_has_a_test() -> None:
    """A name that is missing below needs a test in this folder, with `relies_on`; better, use a public way."""
    found: set[tuple[str, str]] = set()
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {(path.relative_to(ROOT).as_posix(), name) for name in private_names(tree)}
    assert len(found) >= 12
    assert found - LISTED == set()


def test_what_is_listed_is_still_used() -> None:
    """Remove what is named here from its `relies_on`, or the whole test: the package does without it now."""
    gone = {
        (file, name)
        for file, name in LISTED
        if not (ROOT / file).is_file() or name not in (ROOT / file).read_text(encoding="utf-8")
    }
    assert gone == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch._C.f()", {"_C"}),
        ("from torch._utils import x", {"_utils"}),
        ("from torch import _foreach_norm", {"_foreach_norm"}),
        ("def f(p):\n return p.grad._values()", {"_values"}),
        ("def f(p):\n return p.ds_numel", {"ds_numel"}),
        ("def f(e):\n return getattr(e, '_cause', None)", {"_cause"}),
        ("import torch.nn.functional as F\nF.linear = 1", {"linear"}),
        ("def f(m):\n m.forward = 1", {"forward"}),
        ("import deepspeed\ndeepspeed.ops.__compatible_ops__", {"__compatible_ops__"}),
        ("class A:\n def f(self):\n  return self._x", {"_x"}),
        ("class A:\n def __init__(self):\n  self._x = 1\n def f(self):\n  return self._x", set()),
        ("class A:\n def _f(self):\n  return super().__init__()\n def g(self, other):\n  return other._f()", set()),
        ("from cllm4rec_dist import step\nstep._values", set()),
    ],
)
def test_private_names_are_found_in_a_source(source: str, expected: set[str]) -> None:
    assert set(private_names(ast.parse(source))) == expected
