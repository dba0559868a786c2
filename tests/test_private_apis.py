"""Parts of libraries that the package uses although they are not public: each may change with any release.

Each test checks one of them against the installed release and says in its docstring what to do when it fails.
`relies_on` lists what a test covers; the first two tests compare this list with the source of the package, so that a
new access needs a test, and a test goes with its last access.
"""

from __future__ import annotations

import ast
import gc
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry
from transformers import AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

import cllm4rec_dist
from cllm4rec_dist import cli
from cllm4rec_dist.config import AdapterConfig, RunConfig, validate
from cllm4rec_dist.distributed.engine import Engine, resolve_settings, sharded_loading
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CLLM4RecError, ConfigError
from cllm4rec_dist.launchers import ray_launcher
from cllm4rec_dist.model.backbone import COLLABORATIVE, CONTENT, DualBackbone, load_backbone, load_config
from cllm4rec_dist.model.pretrained import LORA_TARGETS, meta_decoder
from cllm4rec_dist.model.weights import stored_weights
from cllm4rec_dist.planning import tracing, zero3_simulation
from tests.harness import make_backbone, make_catalog, make_corpus, run_ranks

ROOT = Path(cllm4rec_dist.__file__).parent
LORA = AdapterConfig(kind="lora", rank=2, alpha=4)
NUM_LAYERS, WIDTH = 6, 16

TestT = TypeVar("TestT", bound=Callable[..., None])
LISTED: set[tuple[str, str]] = set()
"""File of the package and name in a library that a test covers."""


def relies_on(file: str, *names: str) -> Callable[[TestT], TestT]:
    """List names that a file of the package uses and the test below checks."""
    LISTED.update((file, name) for name in names)
    return lambda test: test


# The list

PYTHON_OWN = {
    name
    for kind in (object, type, BaseException, int, str, list, dict, types.FunctionType, types.ModuleType)
    for name in dir(kind)
}
DOCUMENTED = {"_exit", "_replace", "_Environ"}
"""Underscored names of the standard library that are documented, or are in its type stubs alone."""


def is_private(name: str) -> bool:
    return name.startswith("_") and name not in PYTHON_OWN | DOCUMENTED


def members_of(tree: ast.Module) -> set[str]:
    """Names that the classes of a file define themselves."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.add(part.name)
                elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and is_self(part.value):
                    found.add(part.attr)
            for statement in node.body:
                targets = [statement.target] if isinstance(statement, ast.AnnAssign) else []
                targets = statement.targets if isinstance(statement, ast.Assign) else targets
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def root_of(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def private_names(tree: ast.Module) -> Iterator[str]:
    """Names of other libraries in a file that are private, set by DeepSpeed on parameters, or overwritten."""
    members = members_of(tree)
    libraries, ours = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
            names = {alias.asname or alias.name.split(".")[0] for alias in node.names}
            (ours if module.split(".")[0] in ("cllm4rec_dist", "__future__") else libraries).update(names)
            if module.split(".")[0] not in ("cllm4rec_dist", "__future__"):
                parts = {*module.split("."), *(alias.name for alias in node.names)}
                yield from filter(is_private, parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_own = root_of(node) in ours or (node.attr in members and node.attr.startswith("_"))
            overwrites = isinstance(node.ctx, ast.Store) and (node.attr == "forward" or root_of(node) in libraries)
            if (is_private(node.attr) and not is_own) or node.attr.startswith("ds_") or overwrites:
                yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield str(name.value)


def test_every_private_name_of_a_library_has_a_test() -> None:
    """A name that is missing below needs a test in this file, with `relies_on`; better, a public way to do the same."""
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


# DeepSpeed


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private") / "llama"
    return make_backbone(folder, make_catalog(), family="llama", hidden_size=WIDTH, num_layers=NUM_LAYERS)


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


# PEFT


@relies_on("model/backbone.py", "forward", "base_layer", "lora_A", "lora_B", "lora_dropout", "scaling")
def test_an_adapted_layer_computes_what_peft_computes(llama: Path) -> None:
    """`_adapt` replaces the forward of PEFT's layers on each instance, and reads the parts of an adapter by name.

    If this fails, compare `forward` of `Linear` in peft/tuners/lora/layer.py with `_adapt`: PEFT computes an adapter in
    another way now, or keeps its parts elsewhere.
    """
    dual = load_backbone(llama, LORA, torch.float32, 5)
    layers = [module for module in dual.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == NUM_LAYERS * len(LORA_TARGETS["llama"])
    random = torch.Generator().manual_seed(1)
    for layer in layers[:7]:
        for name in (COLLABORATIVE, CONTENT):
            layer.lora_B[name].weight.data = torch.randn(layer.lora_B[name].weight.shape, generator=random)
        x = torch.randn(3, 5, layer.in_features, generator=random)
        for name, boundary in ((COLLABORATIVE, 15), (CONTENT, 0)):
            dual._content_start.index = boundary
            layer.set_adapter(name)
            torch.testing.assert_close(layer.forward(x), type(layer).forward(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@relies_on("model/backbone.py", "lora_variant", "lora_bias", "merged_adapters")
@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "lora_bias"), ({}, "merged"), ({}, "neither LLM")],
)
def test_adapters_that_are_not_plain_lora_are_refused(
    llama: Path, tmp_path: Path, settings: dict[str, Any], problem: str
) -> None:
    """`_adapt` computes plain LoRA alone and would leave out what PEFT adds to it.

    If this fails, PEFT notes it elsewhere (`LoraLayer.__init__` in peft/tuners/lora/layer.py), and a kind of adapter
    would be computed wrongly without a word.
    """
    folder = make_backbone(tmp_path / "gpt2", make_catalog(), family="gpt2", hidden_size=WIDTH, num_layers=1)
    decoder = AutoModel.from_pretrained(folder)
    names = [COLLABORATIVE, CONTENT, *(["third"] if problem == "neither LLM" else [])]
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **settings)
    for name in names:
        inject_adapter_in_model(lora, decoder, name)
    if problem == "merged":
        for layer in decoder.modules():
            if isinstance(layer, LoraLayer):
                layer.merge(adapter_names=[COLLABORATIVE])
    with pytest.raises(ConfigError, match=problem):
        DualBackbone(decoder, dual=True)


@pytest.mark.parametrize("setting", ["use_dora", "lora_bias", "use_rslora", "bias"])
def test_settings_of_other_adapters_are_refused(setting: str) -> None:
    tree = {"stage": "pretrain", "corpus": "-", "backbone": "-", "output": "-", "adapter": {setting: True}}
    with pytest.raises(ConfigError, match=f"adapter.{setting}"):
        validate(RunConfig, tree, "test")


# transformers


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, catalog = tmp_path_factory.mktemp("families"), make_catalog()
    return {family: make_backbone(root / family, catalog, family=family, hidden_size=WIDTH) for family in LORA_TARGETS}


@relies_on("model/backbone.py", "_attn_implementation", "_no_split_modules")
@relies_on("planning/dry_run.py", "_attn_implementation")
def test_transformers_names_the_attention_and_the_layers_of_a_decoder(families: dict[str, Path]) -> None:
    """Packing depends on the attention in use, and ZeRO-3 gathers the decoder's layers, which transformers names.

    If this fails, see `PreTrainedModel` for where the class names of layers are now (`DualBackbone.layers`), and
    `PreTrainedConfig` for the attention that was chosen (`DualBackbone.forward`, `_mask_packed_rows`).
    """
    for family, folder in families.items():
        dual = load_backbone(folder, LORA, torch.float32, 0)
        assert dual.decoder.config._attn_implementation == "sdpa"
        assert len(dual.layers) == dual.decoder.config.num_hidden_layers == 2, family


@relies_on("model/pretrained.py", "base_model_prefix")
@relies_on("export/models.py", "base_model_prefix")
def test_transformers_stores_a_decoder_under_its_prefix(families: dict[str, Path]) -> None:
    """Weights of a causal language model are those of its decoder behind `base_model_prefix`.

    If this fails, `require_weights` finds none of them, and exported adapters fit one of two model classes: see
    `PreTrainedModel.save_pretrained` for the names.
    """
    for family, folder in families.items():
        decoder = meta_decoder(load_config(folder))
        prefix = f"{decoder.base_model_prefix}."
        stored = {name.removeprefix(prefix) for name in stored_weights(folder) if name.startswith(prefix)}
        assert stored == {*decoder.state_dict()}, family
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert {name for name in model.state_dict() if name.startswith(prefix)} == {prefix + name for name in stored}


@relies_on("model/backbone.py", "position_ids")
def test_transformers_keeps_documents_apart_where_positions_start_again(families: dict[str, Path]) -> None:
    """Documents are packed into rows without a mask: transformers finds them by `position_ids` that start again.

    If this fails, documents see those before them in their row: see `find_packed_sequence_indices` in
    transformers/masking_utils.py for what it expects, or pass a mask in `DualBackbone.forward`.
    """
    x = torch.randn(1, 9, WIDTH, generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    for family, folder in families.items():
        decoder = AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
        packed = decoder(inputs_embeds=x, position_ids=positions, use_cache=False).last_hidden_state
        for start, stop in ((0, 4), (4, 6), (6, 9)):
            alone = decoder(inputs_embeds=x[:, start:stop], use_cache=False).last_hidden_state
            torch.testing.assert_close(packed[:, start:stop], alone, rtol=1e-4, atol=1e-5, msg=family)


# bitsandbytes


@relies_on("model/backbone.py", "Linear4bit")
def test_bitsandbytes_calls_its_layer_linear4bit(tmp_path: Path) -> None:
    """`DualBackbone.train` finds 4-bit layers by the name of their class and keeps them in training mode.

    If this fails, they switch to evaluation with the rest, and bitsandbytes repacks their weights in place on some
    CPUs: training that goes on from there is wrong. Look for the class in bitsandbytes/nn/modules.py.
    """
    folder = make_backbone(tmp_path / "wide", make_catalog(), family="llama", hidden_size=64, num_layers=1)
    dual = load_backbone(folder, LORA, torch.float32, 0, "nf4").train(False)
    packed = [module for module in dual.modules() if type(module).__module__ == "bitsandbytes.nn.modules"]
    assert {type(module).__name__ for module in packed} == {"Linear4bit"}
    assert len(packed) == len(LORA_TARGETS["llama"])
    assert all(module.training for module in packed)
    assert not dual.training


# torch


@relies_on("model/sharded_embedding.py", "_version")
def test_torch_counts_changes_of_a_tensor() -> None:
    """A lookup asserts by `_version` that a table has not changed between its start and its backward.

    If this fails, the assertion sees nothing, or fails in each step: see `start_lookup`.
    """
    rows = torch.nn.Parameter(torch.zeros(3, 2))
    before = rows._version
    rows.index_select(0, torch.tensor([1]))
    assert rows._version == before
    with torch.no_grad():
        rows[1:].add_(1)
    assert rows._version > before


@relies_on("step.py", "_values")
@relies_on("model/embedding_optimizer.py", "_nnz")
def test_torch_gives_the_values_of_a_sparse_gradient_to_change() -> None:
    """Gradients of tables are divided and clipped in place through `_values`; `values()` would be a copy in autograd.

    If this fails, tables are trained on gradients that are not clipped: see `_values` in step.py.
    """
    indices = torch.tensor([[2, 0, 2]])
    gradient = torch.sparse_coo_tensor(indices, torch.ones(3, 2), (4, 2), check_invariants=True).coalesce()
    assert gradient._nnz() == 2
    gradient._values().mul_(3)
    assert gradient.to_dense().tolist() == [[3, 3], [0, 0], [6, 6], [0, 0]]


@relies_on("planning/zero3_simulation.py", "_C", "_current_graph_task_id")
def test_torch_numbers_the_backward_that_is_running() -> None:
    """The planner tells a forward that backward repeats, for an activation checkpoint, from the first one by this.

    If this fails, plans of runs with activation checkpointing count what is gathered wrongly: see `_hook`.
    """
    inside: list[bool] = []

    def forward(x: Tensor) -> Tensor:
        inside.append(torch._C._current_graph_task_id() != -1)
        return x.exp()

    checkpoint(forward, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert inside == [False, True]
    assert torch._C._current_graph_task_id() == -1


@relies_on("planning/tracing.py", "_python_dispatch", "_pytree", "_overloadpacket", "_counted_for")
@relies_on("planning/zero3_simulation.py", "_pytree")
def test_torch_shows_every_operator_and_keeps_a_storage_the_same_object() -> None:
    """`Trace` counts products by the packet of an operator and storages once, by an attribute that it sets on them.

    If this fails, plans count FLOPs or memory wrongly: see torch/utils/_python_dispatch.py and flop_counter.py, which
    does the same.
    """
    assert torch.ops.aten.mm.default._overloadpacket in flop_registry
    with tracing.Trace("here") as trace:
        x = torch.empty(4, 8, device="meta")
        y = x.view(8, 4) @ x  # a view is the same storage
    assert trace.live == {"here": 4 * (32 + 64)}
    assert trace.flops == {"here": 2 * 8 * 4 * 8}
    assert y.view(-1).untyped_storage()._counted_for == ["here"]  # type: ignore[attr-defined]
    del x, y
    gc.collect()
    assert trace.live == {"here": 0}


# Ray and uvicorn


@relies_on("launchers/ray_launcher.py", "_base_exc", "worker_failures")
def test_ray_keeps_the_error_of_a_worker() -> None:
    """A run on Ray ends with the error that a rank raised, which is inside of what Ray makes of it.

    If this fails, see ray/train/v2/api/exceptions.py for where the errors of workers are: else people see Ray's own
    message with a traceback of it instead of ours.
    """
    from ray.train import TrainingFailedError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
    from ray.train.v2.api.exceptions import WorkerGroupError

    ours = CLLM4RecError("field", 1, "is wrong", "Mend it.")
    for failure in (ours, UserExceptionWithTraceback(ours, "a traceback")):
        error = WorkerGroupError("a worker failed", {0: failure})
        assert isinstance(error, TrainingFailedError)
        assert ray_launcher._original(error) is ours


@relies_on(
    "launchers/ray_launcher.py",
    "RAY_USAGE_STATS_ENABLED",
    "RAY_TRAIN_ENABLE_PRINT_PATCH",
    "RAY_DEDUP_LOGS",
    "RAY_DISABLE_WORKER_LOG_PREFIX",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER",
)
def test_ray_reads_the_variables_that_keep_it_quiet() -> None:
    """Ray's notices are turned off by environment variables, some of which are not documented.

    If this fails, a variable has another name and Ray's lines are among ours; nothing else depends on it.
    """
    import ray
    from ray.train.v2._internal import constants

    assert constants.ENABLE_PRINT_PATCH_ENV_VAR in ray_launcher._QUIET
    assert constants.ENABLE_PREEMPTION_WATCHER_ENV_VAR in ray_launcher._QUIET
    sources = [Path(ray.__file__).parent / "_private" / name for name in ("ray_constants.py", "worker.py")]
    sources.append(Path(ray.__file__).parent / "_common" / "usage" / "usage_constants.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_DEDUP_LOGS", "RAY_DISABLE_WORKER_LOG_PREFIX"):
        assert name in text, name


@relies_on("launchers/ray_launcher.py", "ray_current_cluster")
@pytest.mark.parametrize(
    "variables", [{}, {"TMPDIR": "/a"}, {"RAY_TMPDIR": "/b"}, {"TMPDIR": "/a", "RAY_TMPDIR": "/b"}]
)
def test_ray_notes_its_cluster_in_a_file(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """RAY_ADDRESS=auto is answered in a second where the cluster that `ray start` noted is gone.

    If this fails, the file has moved (`get_ray_address_file`): Ray itself then waits for a minute before it says so.
    """
    from ray._common.utils import get_ray_address_file

    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(ray_launcher._current_cluster(variables)) == get_ray_address_file(None)


@relies_on("serving/app.py", "__serve_build_asgi_app__")
def test_ray_serve_asks_a_replica_for_its_application() -> None:
    """A replica makes its application when it starts, by a method that Ray Serve calls by this name.

    If this fails, see `serve.ingress` in ray/serve/api.py for how a class gives its application.
    """
    from ray.serve._private.replica import SERVE_BUILD_ASGI_APP_METHOD

    from cllm4rec_dist.serving.app import _Replica

    assert hasattr(_Replica, SERVE_BUILD_ASGI_APP_METHOD)


@relies_on("log.py", "tqdm_ray")
def test_ray_has_bars_for_workers() -> None:
    """Bars of rank 0 in a Ray worker are drawn by the driver, by an experimental part of Ray.

    If this fails, leave bars in Ray workers to lines (`progress_bar` in log.py).
    """
    from ray.experimental import tqdm_ray

    assert {"update", "close", "set_description"} <= {*dir(tqdm_ray.tqdm)}


@relies_on("serving/slow_clients.py", "HttpToolsProtocol", "cycle", "response_complete", "on_headers_complete", "loop")
def test_uvicorn_has_the_parts_that_end_slow_headers() -> None:
    """`TimedHeaderProtocol` starts and stops its timer in methods of uvicorn's protocol and reads its request cycle.

    If this fails, see uvicorn/protocols/http/httptools_impl.py; without the timer a client that never finishes a header
    holds its connection for ever (tests/serving/test_slow_clients.py).
    """
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

    protocol = HttpToolsProtocol.__init__.__code__.co_names
    assert {"loop", "transport", "cycle"} <= {*protocol}
    assert "response_complete" in RequestResponseCycle.__init__.__code__.co_names
    for name in ("connection_made", "connection_lost", "data_received", "on_headers_complete"):
        assert callable(getattr(HttpToolsProtocol, name))
