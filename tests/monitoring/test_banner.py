"""What the banner of a run says of its validation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.corpus.manifest import Manifest
from cllm4rec_dist.monitoring.banner import describe_validation

CHOSEN_ONCE = "linear.text_weight, linear.regularization, linear.history_power, linear.dropout have their defaults"
ALL = "linear.weight is 0, so the linear memory will not be used and head.new_item_offset is -1.5"


@pytest.mark.parametrize(
    ("settings", "has_cold_items", "named"),
    [
        ({}, True, f". {ALL}: set what a validated run"),
        ({}, False, ". linear.weight is 0, so the linear memory will not be used: set"),
        ({"linear": {"weight": 3.5}}, True, ". head.new_item_offset is -1.5: set"),
        ({"linear": {"neighbors": 0}, "head": {"new_item_offset": -2}}, True, ""),
        ({"linear": {"weight": 0.0}}, False, ""),
        ({"linear": {"weight": 1.0}, "head": {"item_bias": False}}, True, ""),
    ],
    ids=["nothing-chosen", "no-new-items", "weight", "offset", "left-out", "no-bias"],
)
def test_a_run_without_validation_names_what_nothing_chooses(
    settings: dict[str, Any], has_cold_items: bool, named: str
) -> None:
    tree = {"stage": "finetune", "corpus": "-", "backbone": "-", "output": "-", "validation": {"every_epochs": 0}}
    config = validate(RunConfig, tree | settings, "test")
    manifest = cast(Manifest, SimpleNamespace(has_cold_items=has_cold_items, num_held_out=lambda split: 5))
    text = describe_validation(config, manifest, 0)
    start = "none (validation.every_epochs=0); the last checkpoint is the result"
    assert text.startswith(start + named)
    assert text == start or named
    assert describe_validation(config, manifest, 7) == start, "a resumed run keeps what was chosen"


def test_a_run_that_holds_nothing_out_names_the_settings_of_its_linear_memory() -> None:
    tree = {"stage": "finetune", "corpus": "-", "backbone": "-", "output": "-", "validation": {"every_epochs": 0}}
    config = validate(RunConfig, tree | {"linear": {"weight": 2.0}}, "test")
    manifest = cast(Manifest, SimpleNamespace(has_cold_items=False, num_held_out=lambda split: 0))
    assert f". {CHOSEN_ONCE}: set what" in describe_validation(config, manifest, 0)
