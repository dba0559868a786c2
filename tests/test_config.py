"""Configurations are validated once, errors name the key, and every committed file loads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from cllm4rec_dist.cli import main
from cllm4rec_dist.config import BackboneConfig, RunConfig, StrictModel, load_config, validate
from cllm4rec_dist.config.renames import BACKBONE_SETTINGS, RUN_SETTINGS
from cllm4rec_dist.distributed.engine import DEFAULT_SETTINGS, resolve_settings
from cllm4rec_dist.errors import CLLM4RecError, ConfigError
from cllm4rec_dist.system import without_missing_deepspeed_file

ROOT = Path(__file__).parents[1]
LAUNCH = sorted((ROOT / "launch" / "configs").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "ds_configs").glob("*.json"))
BASE = {"stage": "pretrain", "corpus": "corpus", "backbone": "backbone", "output": "runs/x"}


def load(*overrides: str, path: Path | None = None) -> RunConfig:
    given = [f"{key}={value}" for key, value in BASE.items()] if path is None else []
    return load_config(RunConfig, path, [*given, *overrides])


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_papers_method() -> None:
    method = load().method
    assert (method.target, method.order) == ("held_out", "shuffled")


def test_a_configuration_cannot_be_changed_after_it_is_checked() -> None:
    config = load()
    with pytest.raises(ValidationError, match="frozen"):
        config.epochs = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.optimizer.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("model", [RunConfig, BackboneConfig])
def test_every_field_is_documented(model: Any) -> None:
    pending = [model]
    while pending:
        node = pending.pop()
        for name, field in node.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, StrictModel):
                assert field.annotation.__doc__, field.annotation.__name__
                pending.append(field.annotation)
            else:
                assert field.description, f"{node.__name__}.{name}"


WRONG = {
    "optimizer.learning_rate=1e-3": "optimizer.learning_rate",  # unknown key
    "optimiser.lr=1e-3": "optimiser",  # unknown section
    "epochs=many": "epochs",  # type
    "corpus=3": "corpus",  # a number where a text belongs
    "batch.users=1.5": "batch.users",
    "epochs=0": "epochs",  # range
    "optimizer.lr=-1": "optimizer.lr",
    "optimizer.lr=nan": "optimizer.lr",
    "embeddings.dropout=1": "embeddings.dropout",
    "linear.text_weight=.inf": "linear.text_weight",
    "linear.regularization=1e-300": "linear.regularization",  # the regressions of equal items would be singular
    "adapter.kind=qlora": "adapter.kind",  # choice
    "method.mask_ratio=[0.9, 0.1]": "mask_ratio",
    "method.mask_ratio=[0, 0.5]": "mask_ratio",
    "method.mask_ratio=[0.5]": "method.mask_ratio",
    "adapter=3": "adapter",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(override)
    assert WRONG[override] in str(caught.value)
    assert isinstance(caught.value, CLLM4RecError)


def test_an_offset_of_new_items_requires_the_item_bias() -> None:
    assert load("head.new_item_offset=0").head.new_item_offset == 0
    with pytest.raises(ConfigError, match="new_item_offset requires item_bias"):
        load("head.new_item_offset=0", "head.item_bias=false")


def test_sampling_by_popularity_requires_a_sample() -> None:
    assert load("head.negative_sampling=popularity", "head.num_negatives=9").head.negative_sampling == "popularity"
    with pytest.raises(ConfigError, match="negative_sampling=popularity requires num_negatives"):
        load("head.negative_sampling=popularity")


def test_every_violation_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load("epochs=0", "optimizer.lr=-1", "batch.user=3")
    for field in ("epochs", "optimizer.lr", "batch.user"):
        assert field in str(caught.value)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match="corpus"):
        load_config(RunConfig, None, ["stage=pretrain"])


@pytest.mark.parametrize("override", ["epochs", "=3", "epochs.more=3", "corpus.x=1", "epochs=[1, 2", ""])
def test_a_bad_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("epochs=3", override)
    assert caught.value.field == "override"


OVERRIDES = [
    ("optimizer.lr=1e-3", lambda c: c.optimizer.lr, 1e-3),
    ("optimizer.lr=1E-3", lambda c: c.optimizer.lr, 1e-3),
    ("max_steps=1e3", lambda c: c.max_steps, 1000),
    ("optimizer.embeddings_lr=5", lambda c: c.optimizer.embeddings_lr, 5.0),
    ("method.mask_ratio=[0.2, 0.4]", lambda c: c.method.mask_ratio, (0.2, 0.4)),
    ("adapter.targets=[q_proj, v_proj]", lambda c: c.adapter.targets, ("q_proj", "v_proj")),
    ("max_steps=null", lambda c: c.max_steps, None),
    ("activation_checkpointing=true", lambda c: c.activation_checkpointing, True),
    ("output=a=b", lambda c: c.output, "a=b"),
    ("corpus=s3://bucket/corpus", lambda c: c.corpus, "s3://bucket/corpus"),
]


@pytest.mark.parametrize(("override", "read", "value"), OVERRIDES, ids=[o[0] for o in OVERRIDES])
def test_an_override_is_read_as_yaml(override: str, read: Any, value: Any) -> None:
    assert read(load(override)) == value


def test_overrides_come_after_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps(BASE | {"epochs": 3, "optimizer": {"lr": 0.5, "warmup_steps": 7}}))
    config = load("optimizer.lr=0.1", "optimizer.lr=0.2", path=path)
    assert (config.epochs, config.optimizer.lr, config.optimizer.warmup_steps) == (3, 0.2, 7)


@pytest.mark.parametrize(
    ("content", "overrides", "source"),
    [
        ({}, ["epoch=3"], "override of "),
        ({}, ["optimizr.lr=3"], "override of "),
        ({}, ["optimizer.lr=x"], "override of "),
        ({}, ["batch={users: x}"], "override of "),
        ({"epoch": 3}, ["seed=3"], ""),
        ({"epoch": 3}, ["sed=3"], ""),
        ({"optimizer": {"lr": "x"}}, ["optimizer.warmup_steps=3"], ""),
    ],
    ids=str,
)
def test_an_error_says_whether_the_file_or_an_override_is_wrong(
    tmp_path: Path, content: dict[str, Any], overrides: list[str], source: str
) -> None:
    path = written(tmp_path, json.dumps(BASE | content))
    with pytest.raises(ConfigError) as caught:
        load(*overrides, path=path)
    assert str(caught.value).startswith(f"{source}{path}: ")


@pytest.mark.parametrize("text", ["", "- a\n- b", "just words", "a: [1, 2", "a: b: c", "\t- x"])
def test_a_file_that_holds_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(path=written(tmp_path, text))
    assert "run.yaml" in str(caught.value)


def test_a_file_that_is_not_text_or_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match="does not exist"):
        load(path=path)
    with pytest.raises(ConfigError, match="is a folder"):
        load(path=tmp_path)
    path.write_bytes(b"\xff\xfe\x00stage: 1")
    with pytest.raises(ConfigError, match="not readable YAML"):
        load(path=path)


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not readable YAML"):
        load(path=written(tmp_path, "corpus: !!python/object/apply:os.getcwd []"))
    with pytest.raises(ConfigError, match="not YAML"):
        load("corpus=!!python/object/apply:os.getcwd []")


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="heads"):
        validate(BackboneConfig, {"hidden": 20, "heads": 3}, "test")


@pytest.mark.skipif(not LAUNCH, reason="no run configuration is committed")
@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_every_committed_run_configuration_loads(path: Path) -> None:
    # The entry point sets the stage.
    for stage in ("pretrain", "finetune"):
        config = load_config(RunConfig, path, [f"stage={stage}"])
        assert config.deepspeed is None or (ROOT / config.deepspeed).is_file()


def with_deepspeed(path: Path, *overrides: str) -> RunConfig:
    return load(f"deepspeed={json.dumps(str(path))}", *overrides)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.name)
def test_every_committed_deepspeed_file_is_filled_in_by_the_run(path: Path, precision: str) -> None:
    settings = resolve_settings(with_deepspeed(path, "batch.gradient_accumulation_steps=3", f"precision={precision}"))
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0.0, "clipping is joint with the tables, and not DeepSpeed's"
    assert settings["bf16"]["enabled"] == (precision == "bf16")
    assert settings["zero_optimization"]["stage"] == 3
    assert '"auto"' not in json.dumps(settings)


def test_the_default_deepspeed_file_is_the_packages_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package contains a copy of a file in ds_configs/: both must be equal.
    assert DEFAULT_SETTINGS.read_bytes() == (ROOT / "ds_configs" / "zero3.json").read_bytes()
    monkeypatch.chdir(tmp_path)
    assert load().deepspeed is None
    assert resolve_settings(load()) == resolve_settings(with_deepspeed(ROOT / "ds_configs" / "zero3.json"))


def test_evaluation_does_without_a_deepspeed_file_that_is_gone(tmp_path: Path) -> None:
    gone = with_deepspeed(tmp_path / "ds_configs" / "zero3.json")
    assert without_missing_deepspeed_file(gone).deepspeed is None
    here = with_deepspeed(deepspeed_file(tmp_path, ZERO3))
    assert without_missing_deepspeed_file(here) == here
    assert without_missing_deepspeed_file(load()) == load()
    with pytest.raises(ConfigError, match="deepspeed"):  # training never does
        resolve_settings(gone)


ZERO3 = {"zero_optimization": {"stage": 3}}


def deepspeed_file(tmp_path: Path, tree: Any) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(tree))
    return path


@pytest.mark.parametrize(
    ("field", "conflict"),
    [
        ("gradient_accumulation_steps", {"gradient_accumulation_steps": 4}),
        ("gradient_clipping", {"gradient_clipping": 1.0}),
        ("train_micro_batch_size_per_gpu", {"train_micro_batch_size_per_gpu": 8}),
        ("bf16.enabled", {"bf16": {"enabled": True}}),
        ("zero_optimization.stage", {"zero_optimization": {"stage": 2}}),
        ("zero_optimization.stage", {"zero_optimization": {}}),
    ],
)
def test_a_deepspeed_file_that_conflicts_with_the_run_is_refused(tmp_path: Path, field: str, conflict: Any) -> None:
    path = deepspeed_file(tmp_path, ZERO3 | conflict)
    with pytest.raises(ConfigError) as caught:
        resolve_settings(with_deepspeed(path))
    assert field in str(caught.value)
    assert "ds.json" in str(caught.value)


def test_a_deepspeed_file_may_say_what_the_run_says_and_leave_out_the_rest(tmp_path: Path) -> None:
    path = deepspeed_file(tmp_path, ZERO3 | {"gradient_accumulation_steps": 4, "bf16": {"enabled": False}})
    settings = resolve_settings(with_deepspeed(path, "batch.gradient_accumulation_steps=4"))
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["train_micro_batch_size_per_gpu"] == 1


def test_an_unreadable_deepspeed_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="deepspeed"):
        resolve_settings(with_deepspeed(tmp_path / "absent.json"))
    path = tmp_path / "ds.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match="deepspeed"):
        resolve_settings(with_deepspeed(path))


@pytest.mark.parametrize("tree", [[], {"bf16": True, **ZERO3}, {"zero_optimization": 3}])
def test_a_deepspeed_file_of_the_wrong_form_is_refused(tmp_path: Path, tree: Any) -> None:
    with pytest.raises(ConfigError):
        resolve_settings(with_deepspeed(deepspeed_file(tmp_path, tree)))


@pytest.mark.parametrize(("old", "new"), RUN_SETTINGS.items())
def test_an_old_name_of_a_setting_is_refused_with_the_new_one(old: str, new: str) -> None:
    value = "{}" if old == "rows" else "1"
    with pytest.raises(ConfigError, match=rf"Rename .*{re.escape(old)} -> {re.escape(new)}\b"):
        load_config(RunConfig, None, ["stage=pretrain", "corpus=c", "backbone=b", "output=o", f"{old}={value}"])


@pytest.mark.parametrize(("renamed", "model"), [(RUN_SETTINGS, RunConfig), (BACKBONE_SETTINGS, BackboneConfig)])
def test_every_new_name_is_a_setting_and_no_old_one_is(renamed: dict[str, str], model: type[StrictModel]) -> None:
    keys = set(setting_keys(model))
    assert set(renamed.values()) <= keys
    assert not set(renamed) & keys


def setting_keys(model: type[BaseModel], section: str = "") -> Iterator[str]:
    """Dotted keys of a configuration, those of its sections included."""
    for name, field in model.model_fields.items():
        yield f"{section}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from setting_keys(field.annotation, f"{section}{name}.")


def test_a_checkpoint_with_an_old_name_is_refused_with_the_new_one() -> None:
    recorded = load().model_dump(mode="json")
    recorded["rows"] = recorded.pop("embeddings")
    with pytest.raises(ConfigError, match=r"step-00000004: configuration: .* Rename rows -> embeddings"):
        validate(RunConfig, recorded, "step-00000004: configuration")


def test_an_old_name_of_a_command_is_refused_with_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["backbone", "recipe.yaml", "folder"])
    assert ended.value.code == 2
    assert "cllm4rec build-backbone" in capsys.readouterr().err


def test_validations_rank_a_sample_in_a_large_corpus_unless_a_number_is_named() -> None:
    sizes = (23, 100_000, 100_001)
    tree = {"stage": "finetune", "corpus": "c", "backbone": "b", "output": "o"}
    default = validate(RunConfig, tree, "test").validation
    assert [default.sample_size(size) for size in sizes] == [None, None, 10_000]
    named = validate(RunConfig, tree | {"validation": {"users": 7}}, "test").validation
    assert [named.sample_size(size) for size in sizes] == [7, 7, 7]
