"""Adam over rows: dense, sparse, in 8 bits and on the host, against the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cllm4rec_dist.config import HeadConfig
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model import embedding_optimizer
from cllm4rec_dist.model.backbone import FrozenEmbeddings
from cllm4rec_dist.model.embedding_optimizer import EmbeddingOptimizer, Storage
from cllm4rec_dist.model.recommender import Recommender
from tests.harness import alone

USERS, ITEMS, WIDTH = 30, 20, 64
SPARSE = ("collaborative.users", "content.users", "content.items")
BETAS = (0.9, 0.99)
STORAGES: list[Storage] = ["fp32", "int8", "cpu"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense parameters are stepped in several blocks, the last one shorter."""
    monkeypatch.setattr(embedding_optimizer, "_BLOCK_ENTRIES", 7 * WIDTH)


def make(storage: Storage, width: int = WIDTH) -> tuple[Recommender, EmbeddingOptimizer]:
    random = torch.Generator().manual_seed(0)
    words = FrozenEmbeddings(*torch.zeros(2, 5, width))
    model = Recommender(
        USERS,
        ITEMS,
        words,
        HeadConfig(),
        alone(),
        dropout=0.0,
        comm_dtype=torch.float32,
        sparse_gradients=True,
        content=True,
    )
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random)
    return model, EmbeddingOptimizer(model, BETAS, storage)


def give_gradients(optimizer: EmbeddingOptimizer, step: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Set the gradients of a step, sparse ones for other rows at each step; return those rows by name."""
    random = torch.Generator().manual_seed(step)
    touched = {}
    for name, parameter in zip(optimizer.names, optimizer.parameters, strict=True):
        if name in SPARSE:
            rows = torch.randperm(len(parameter), generator=random)[: 5 + step].sort().values
            values = scale * torch.randn(len(rows), parameter.shape[1], generator=random)
            parameter.grad = torch.sparse_coo_tensor(
                rows[None], values, parameter.shape, is_coalesced=True, check_invariants=True
            )
            touched[name] = rows
        else:
            parameter.grad = scale * torch.randn(parameter.shape, generator=random)
    return touched


def weights_of(optimizer: EmbeddingOptimizer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in zip(optimizer.names, optimizer.parameters, strict=True)}


def adam(optimizer: EmbeddingOptimizer, steps: int, lr: float) -> dict[str, Tensor]:
    """Adam's formula in fp64; untouched rows keep their weights and moments."""
    weights = {name: value.double() for name, value in weights_of(optimizer).items()}
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in weights.items()}
    for step in range(steps):
        touched = give_gradients(optimizer, step)
        for name, parameter in zip(optimizer.names, optimizer.parameters, strict=True):
            assert parameter.grad is not None
            gradient, (first, second) = parameter.grad.to_dense().double(), moments[name]
            rows: Any = touched.get(name, ...)
            first[rows] = BETAS[0] * first[rows] + (1 - BETAS[0]) * gradient[rows]
            second[rows] = BETAS[1] * second[rows] + (1 - BETAS[1]) * gradient[rows] ** 2
            correct = 1 - BETAS[0] ** (step + 1), 1 - BETAS[1] ** (step + 1)
            weights[name][rows] -= lr * (first[rows] / correct[0]) / ((second[rows] / correct[1]).sqrt() + 1e-8)
    return weights


@pytest.mark.parametrize("storage", STORAGES)
def test_steps_are_adams_and_leave_other_rows_alone(storage: Storage) -> None:
    _, optimizer = make(storage)
    expected = adam(optimizer, 4, 1e-2)
    for step in range(4):
        give_gradients(optimizer, step)
        optimizer.step(1e-2)
        assert all(parameter.grad is None for parameter in optimizer.parameters)
    # An 8-bit moment has an error of 1 %, and so has an update of at most 4 x 1e-2.
    tolerance = 2e-3 if storage == "int8" else 1e-6
    for name, value in weights_of(optimizer).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=tolerance, msg=name)


def test_a_sparse_step_updates_only_its_rows_in_8_bits_too() -> None:
    for storage in STORAGES:
        _, optimizer = make(storage)
        give_gradients(optimizer, 0)
        optimizer.step(1e-2)
        weights, state = weights_of(optimizer), {k: dict(v) for k, v in optimizer.state().items()}
        before = {name: {key: v.clone() for key, v in moments.items()} for name, moments in state.items()}
        touched = give_gradients(optimizer, 1)
        optimizer.step(1e-2)
        after, now = optimizer.state(), weights_of(optimizer)
        for name, rows in touched.items():
            others = torch.ones(len(now[name]), dtype=torch.bool)
            others[rows] = False
            assert torch.equal(now[name][others], weights[name][others])
            assert (now[name][rows] != weights[name][rows]).any(dim=1).all()
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(after[name][key][others], before[name][key][others])


@pytest.mark.parametrize("storage", STORAGES)
def test_rows_that_changed_are_those_of_all_steps_since_and_so_are_their_moments(storage: Storage) -> None:
    _, optimizer = make(storage)
    give_gradients(optimizer, 0)
    optimizer.step(1e-2)
    assert optimizer.changed_rows() == {}
    optimizer.record_changes()
    assert all(len(rows) == 0 for rows in optimizer.changed_rows().values())
    assert all(optimizer.state(optimizer.changed_rows())[name]["exp_avg"].shape == (0, WIDTH) for name in SPARSE)
    touched: dict[str, set[int]] = {name: set() for name in SPARSE}
    for step in (1, 2):
        for name, rows in give_gradients(optimizer, step).items():
            touched[name] |= {*rows.tolist()}
        optimizer.step(1e-2)
    give_gradients(optimizer, 3)
    optimizer.discard()
    changed = optimizer.changed_rows()
    assert {name: rows.tolist() for name, rows in changed.items()} == {n: sorted(rows) for n, rows in touched.items()}
    whole, part = optimizer.state(), optimizer.state(changed)
    assert part.keys() == whole.keys()
    for name, moments in part.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[key], whole[name][key][changed.get(name, ...)]), (name, key)
        assert moments["step"] == whole[name]["step"]
    optimizer.record_changes()
    assert all(len(rows) == 0 for rows in optimizer.changed_rows().values())


def test_moments_on_the_host_give_the_same_weights() -> None:
    results = {}
    for storage in ("fp32", "cpu"):
        _, optimizer = make(storage)
        for step in range(3):
            give_gradients(optimizer, step)
            optimizer.step(1e-2)
        results[storage] = weights_of(optimizer), optimizer.state()
        assert {value.device.type for state in results[storage][1].values() for value in state.values()} == {"cpu"}
    for name, value in results["fp32"][0].items():
        assert torch.equal(value, results["cpu"][0][name])


@pytest.mark.parametrize("storage", STORAGES)
def test_a_resumed_optimizer_steps_like_the_saved_one(storage: Storage) -> None:
    model, optimizer = make(storage)
    for step in range(3):
        give_gradients(optimizer, step)
        optimizer.step(1e-2)
    saved = {name: {key: v.clone() for key, v in moments.items()} for name, moments in optimizer.state().items()}
    assert {v.dtype for moments in saved.values() for v in moments.values()} == {torch.float32}
    other, resumed = make(storage)
    other.load_state_dict(model.state_dict())
    resumed.load_state(saved)
    for one in (optimizer, resumed):
        give_gradients(one, 3)
        one.step(1e-2)
    tolerance = 1e-5 if storage == "int8" else 0.0
    for name, value in weights_of(optimizer).items():
        torch.testing.assert_close(weights_of(resumed)[name], value, rtol=0, atol=tolerance, msg=name)
    resumed.load_state(saved)
    for name, moments in resumed.state().items():
        for key, value in moments.items():
            near = 1e-4 * value.abs().max().item() if storage == "int8" else 0.0
            torch.testing.assert_close(value, saved[name][key], rtol=0, atol=near, msg=f"{name}.{key}")


@pytest.mark.slow
def test_8_bits_take_a_quarter_of_the_memory_and_converge_as_fast() -> None:
    sizes, losses = {}, {}
    for storage in ("fp32", "int8"):
        model, optimizer = make(storage)
        rows = model.collaborative.items.local_rows
        target = torch.randn(rows.shape, generator=torch.Generator().manual_seed(5))
        weight = torch.logspace(-2, 2, WIDTH)  # gradients of a row from small to large
        for _ in range(300):
            ((rows - target).square() * weight).sum().backward()
            optimizer.step(1e-2)
        losses[storage] = (rows - target).square().mean().item()
        moments = optimizer._moments["collaborative.items"]
        held = [t for v in vars(moments).values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
        sizes[storage] = sum(t.nbytes for t in held if t.shape[0] == len(rows))
    assert sizes["int8"] < 0.27 * sizes["fp32"]
    assert losses["int8"] < 1.25 * losses["fp32"]


def test_a_width_that_cannot_be_packed_is_an_error() -> None:
    with pytest.raises(ConfigError, match="multiples of 64, not 48"):
        make("int8", width=48)


def test_a_missing_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(embedding_optimizer.importlib.sys.modules, "bitsandbytes.functional", None)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="qlora"):
        make("int8")


def test_a_step_increments_the_versions_of_its_parameters() -> None:
    _, optimizer = make("fp32")
    versions = [parameter._version for parameter in optimizer.parameters]
    give_gradients(optimizer, 0)
    optimizer.step(1e-2)
    assert all(p._version > before for p, before in zip(optimizer.parameters, versions, strict=True))
