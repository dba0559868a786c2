"""DeepSpeed: how ZeRO-3 keeps, gathers and steps the weights of an engine."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

from cllm4rec_dist import cli
from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.distributed.engine import Engine, resolve_settings, sharded_loading
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.model.backbone import load_backbone
from cllm4rec_dist.planning import tracing, zero3_simulation
from tests.harness import make_catalog, make_corpus, run_ranks
from tests.private_apis.backbone import LORA, NUM_LAYERS, WIDTH
from tests.private_apis.listing import ROOT, relies_on


@pytest.fixture(scope="module")
def ranks(llama: Path) -> list[dict[str, Any]]:
    """What two ranks see of one engine: frozen layers gathered as late and as briefly as ZeRO-3 can."""
    return run_ranks(2, look_into_deepspeed, str(llama))


def look_into_deepspeed(world: World, folder: str) -> dict[str, Any]:
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    tree = {"stage": "pretrain", "corpus": "-", "backbone": folder, "output": "-"}
    settings = resolve_settings(validate(RunConfig, tree, "test"))
    settings["zero_optimization"] |= dict.fromkeys(
        ("stage3_param_persistence_threshold", "stage3_max_reuse_distance"), 0
    ) | {"stage3_prefetch_bucket_size": 1}
    with sharded_loading(settings):
        dual = load_backbone(Path(folder), LORA, torch.float32, 5)
        linear_while_loading = F.linear.__module__
    dual.enable_activation_checkpointing()
    optimizer = torch.optim.AdamW([p for p in dual.parameters() if p.requires_grad], lr=0.0)
    engine = Engine(dual, settings, optimizer, dual.layers)
    engine.train(True)
    named = dict(dual.named_parameters())
    found = {
        "shm": deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"],
        "linear": linear_while_loading,
        "statuses": {p.ds_status is ZeroParamStatus.NOT_AVAILABLE for p in named.values()},
        "shapes": {name: tuple(p.ds_shape) for name, p in named.items()},
        "numels": {name: p.ds_numel for name, p in named.items()},
        "part sizes": {name: p.partition_numel() for name, p in named.items()},
        "parts": {name: p.ds_tensor.clone() for name, p in named.items()},
    }
    gathered: list[int] = []

    def count(*_: Any) -> None:
        frozen = [p for p in named.values() if not p.requires_grad]
        gathered.append(sum(p.ds_numel for p in frozen if p.ds_status is not ZeroParamStatus.NOT_AVAILABLE))

    def watch(_: Any, inputs: Any, output: Any) -> None:
        count()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(count)

    for layer in dual.layers:
        for module in layer.modules():
            if not [*module.children()]:
                module.register_forward_hook(watch)
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(world.rank)).requires_grad_()

    def step(*, discard: bool = False) -> None:
        loss = engine(x, None, 9).square().sum()
        gathered.clear()
        engine.backward(loss)
        if discard:
            engine.discard()
        engine.step(1e-2)

    step()
    zero = engine._engine.optimizer
    flats = zero.fp32_partitioned_groups_flat
    found["flat sizes"] = [flat.numel() for flat in flats]
    found["states"] = [{key: value.numel() for key, value in zero.optimizer.state[flat].items()} for flat in flats]
    found["before"] = state_of(engine)
    step(discard=True)
    found["discarded"] = state_of(engine)
    step()
    found["next"] = state_of(engine)
    found["gathered"] = [*gathered]  # in the third step: ZeRO-3 fetches nothing ahead before it knows the order
    count()
    found["gathered afterwards"] = gathered[-1]
    return found


def state_of(engine: Engine) -> dict[str, Tensor]:
    """A copy of this rank's weights and moments, and the number of steps."""
    weights, moments = engine.weights(), engine.moments()
    named = {f"{name}.{key}": moment for name, state in moments.items() for key, moment in state.items()}
    copies = {name: value.detach().clone() for name, value in (weights | named).items()}
    return copies | {"steps": torch.tensor(engine.steps_taken())}


@pytest.mark.slow
@relies_on("distributed/engine.py", "ds_numel", "ds_shape", "ds_tensor", "ds_status", "partition_numel")
def test_deepspeed_cuts_each_flattened_weight_into_equal_parts(llama: Path, ranks: list[dict[str, Any]]) -> None:
    """`Engine` reads and writes ZeRO-3's parts itself, for checkpoints that any number of ranks can read.

    If this fails, look for the new names in deepspeed/runtime/zero/partition_parameters.py (`Init`), and for a public
    way in deepspeed.utils (`safe_get_local_*`); `Engine.set_weights`, `partitions` and `shapes` are to be adapted.
    """
    whole = dict(load_backbone(llama, LORA, torch.float32, 5).named_parameters())
    assert ranks[0]["numels"].keys() == whole.keys()
    assert any(weight.numel() % 2 for weight in whole.values()) or len(whole) > 10
    for rank in ranks:
        assert rank["statuses"] == {True}, "no weight is gathered before the first forward"
        for name, weight in whole.items():
            assert rank["shapes"][name] == tuple(weight.shape)
            assert rank["numels"][name] == weight.numel()
            assert rank["part sizes"][name] == rank["parts"][name].numel() == -(-weight.numel() // 2)
    for name, weight in whole.items():
        parts = torch.cat([rank["parts"][name] for rank in ranks])
        assert torch.equal(parts[: weight.numel()], weight.detach().flatten()), name


@relies_on("distributed/engine.py", "fp32_partitioned_groups_flat", "optimizer.state")
def test_deepspeed_keeps_adams_state_under_its_flat_groups(ranks: list[dict[str, Any]]) -> None:
    """`Engine.set_moments` makes the state of the optimizer inside of ZeRO-3's before its first step.

    If this fails, look at `DeepSpeedZeroOptimizer_Stage3` in deepspeed/runtime/zero/stage3.py for where the flat fp32
    groups and the optimizer over them are; `Engine.moments`, `set_moments` and `steps_taken` are to be adapted.
    """
    for rank in ranks:
        trained = sum(size for name, size in rank["part sizes"].items() if "lora_" in name)
        assert sum(rank["flat sizes"]) >= trained > 0
        for size, state in zip(rank["flat sizes"], rank["states"], strict=True):
            assert state == {"step": 1, "exp_avg": size, "exp_avg_sq": size}


@relies_on("distributed/engine.py", "discard")
def test_deepspeed_skips_a_step_whose_gradients_are_not_finite(ranks: list[dict[str, Any]]) -> None:
    """`Engine.discard` leaves out a step by gradients of NaN, on which ZeRO-3 changes neither weights nor moments.

    If this fails, DeepSpeed trains on bad gradients (see `_overflow_check_and_loss_scale_update` in
    deepspeed/runtime/zero/stage3.py): a discarded step needs another way, or bad steps must end the run.
    """
    for rank in ranks:
        before, discarded, after = rank["before"], rank["discarded"], rank["next"]
        assert before["steps"] == discarded["steps"] == 1
        assert len(before) > NUM_LAYERS
        assert [name for name in before if not torch.equal(before[name], discarded[name])] == []
        assert after["steps"] == 2, "the step after it counts again"
        assert all(torch.isfinite(value).all() for value in after.values())
        assert any(not torch.equal(before[name], after[name]) for name in before if "lora_B" in name)


@relies_on("distributed/engine.py", "set_z3_leaf_module")
def test_frozen_weights_do_not_stay_gathered_after_backward(ranks: list[dict[str, Any]]) -> None:
    """Each decoder layer is a leaf of ZeRO-3, and with activation checkpointing one layer at a time is whole.

    A prefetch bucket or reuse distance above the size of a layer keeps more of them, as asked.
    DeepSpeed's pull request 8148 ties frozen weights that a checkpoint gathers again to modules. If this fails, they
    stay whole after their layer's backward, and a rank needs memory for the whole backbone: hold DeepSpeed back, or
    release them in a hook behind each layer.
    """
    frozen = {name: size for name, size in ranks[0]["numels"].items() if "lora_" not in name}
    layer = sum(size for name, size in frozen.items() if ".layers.0." in name)
    ahead = max(frozen.values())  # the least that ZeRO-3 fetches ahead is one weight
    assert layer * NUM_LAYERS <= sum(frozen.values())
    for rank in ranks:
        assert rank["gathered afterwards"] == 0
        assert len(rank["gathered"]) >= 2 * NUM_LAYERS
        assert layer <= max(rank["gathered"]) <= layer + ahead < 2 * layer


@relies_on("distributed/engine.py", "__compatible_ops__")
def test_deepspeed_compiles_no_collectives_on_a_cpu(ranks: list[dict[str, Any]]) -> None:
    """`start_world` takes `deepspeed_shm_comm` off DeepSpeed's list of operators: compiling it takes a minute.

    If this fails, see `build_shm_op` in deepspeed/comm/torch.py for what it asks now. Nothing else depends on it.
    """
    assert [rank["shm"] for rank in ranks] == [False, False]


@relies_on("planning/tracing.py", "linear", "scaled_dot_product_attention")
def test_deepspeed_replaces_linear_layers_by_name(ranks: list[dict[str, Any]]) -> None:
    """The planner's `emulate_kernels` overwrites `F.linear` as ZeRO-3 does, whose function keeps frozen layers' input.

    If this fails, ZeRO-3 has another linear layer (`zero3_linear_wrap` in deepspeed/runtime/zero/linear.py); compare
    what it saves for backward with `_Linear` in planning/tracing.py, and run the slow tests of tests/planning.
    """
    assert [rank["linear"] for rank in ranks] == ["deepspeed.runtime.zero.linear"] * 2
    plain = F.linear, F.scaled_dot_product_attention
    with tracing.emulate_kernels(tracing.Trace()):
        assert torch.nn.functional.linear is not plain[0]
        assert torch.nn.functional.scaled_dot_product_attention is not plain[1]
    assert (F.linear, F.scaled_dot_product_attention) == plain


@relies_on("planning/zero3_simulation.py", "SIMULATED_VERSION")
def test_the_simulated_deepspeed_is_the_pinned_one() -> None:
    """`zero3_simulation.py` copies the rules by which this release gathers weights.

    If this fails, compare partitioned_param_coordinator.py of both releases, run the slow tests of tests/planning,
    which hold plans to measurements, and set SIMULATED_VERSION to the new one.
    """
    pinned = (ROOT.parent / "constraints.txt").read_text().splitlines()
    assert f"deepspeed=={zero3_simulation.SIMULATED_VERSION}" in pinned


def test_a_plan_warns_of_another_deepspeed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = make_corpus(tmp_path / "corpus", make_catalog(), llama)
    (tmp_path / "run.yaml").write_text(f"corpus: {corpus}\nbackbone: {llama}\noutput: unused\n")
    command = ["plan", "-c", str(tmp_path / "run.yaml"), "--gpus", "2", "--samples", "1"]

    def warnings() -> list[str]:
        caplog.clear()
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == 0, result.output
        return [line for line in (result.output + caplog.text).splitlines() if "is installed" in line]

    monkeypatch.setattr(zero3_simulation, "version", lambda name: zero3_simulation.SIMULATED_VERSION)
    assert warnings() == []
    monkeypatch.setattr(zero3_simulation, "version", lambda name: "0.20.1")
    (warning,) = warnings()
    assert "DeepSpeed 0.20.1 is installed and the plan follows the rules of 0.19.8" in warning


@relies_on("distributed/engine.py", "HfDeepSpeedConfig")
def test_transformers_shards_a_model_while_the_deepspeed_configuration_lives(llama: Path) -> None:
    """`sharded_loading` keeps a `HfDeepSpeedConfig` alive, to which transformers has a weak reference only.

    If this fails, models are loaded whole on each rank, or sharded outside of `sharded_loading`: see
    transformers/integrations/deepspeed.py.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    tree = {"stage": "pretrain", "corpus": "-", "backbone": str(llama), "output": "-"}
    settings = resolve_settings(validate(RunConfig, tree, "test"))
    with sharded_loading(settings):
        assert is_deepspeed_zero3_enabled()
    gc.collect()
    assert not is_deepspeed_zero3_enabled()


def imports_of_an_engine(world: World, folder: str) -> list[str]:
    settings = resolve_settings(
        validate(RunConfig, {"stage": "pretrain", "corpus": "-", "backbone": folder, "output": "-"}, "test")
    )
    with sharded_loading(settings):
        dual = load_backbone(Path(folder), LORA, torch.float32, 5)
    Engine(dual, settings, torch.optim.AdamW([p for p in dual.parameters() if p.requires_grad]), dual.layers)
    return [*sys.modules]


@pytest.mark.slow
@relies_on("distributed/engine.py", "muon_optimizer")
def test_an_engine_starts_without_the_compiler_of_torch(llama: Path) -> None:
    """ZeRO-3 imports the optimizer Muon when it starts, which decorates three functions with `torch.compile`.

    If this fails, each rank takes seconds longer to start: see who imports `torch._inductor`, with `-X importtime`.
    """
    code = f"""
from tests.harness import run_ranks
from tests.private_apis.test_deepspeed import imports_of_an_engine
(modules,) = run_ranks(1, imports_of_an_engine, {str(llama)!r})
assert "deepspeed.runtime.zero.stage3" in modules
assert "torch._inductor.compile_fx" not in modules
"""
    found = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=ROOT.parent)
    assert found.returncode == 0, found.stderr
