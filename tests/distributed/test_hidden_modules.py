"""Imports without modules that may be imported later, and without torch's compiler."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

from cllm4rec_dist.distributed.hidden_modules import hidden_modules, torch_compile_disabled


def test_hidden_modules_are_not_found_and_can_be_imported_afterwards() -> None:
    sys.modules.pop("colorsys", None)
    with hidden_modules("colorsys"), pytest.raises(ModuleNotFoundError):
        importlib.import_module("colorsys")
    assert importlib.import_module("colorsys").__name__ == "colorsys"


def test_modules_that_are_there_stay_as_they_are() -> None:
    with hidden_modules("json"):
        assert importlib.import_module("json") is sys.modules["json"] is not None


def test_an_error_while_importing_hides_nothing_for_longer() -> None:
    with pytest.raises(RuntimeError), hidden_modules("colorsys_of_nobody"):
        raise RuntimeError
    assert "colorsys_of_nobody" not in sys.modules


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_functions_are_not_compiled_while_the_compiler_is_disabled(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    if before is not None:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", before)

    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    with torch_compile_disabled():
        assert torch.compile(double) is double
    assert os.environ.get("TORCHDYNAMO_DISABLE") == before


@pytest.mark.slow
def test_the_engine_starts_without_mlflow_and_leaves_it_to_trackers() -> None:
    """If this fails, DeepSpeed imports MLflow elsewhere than in its autotuner: see who does, and whether it is used."""
    pytest.importorskip("mlflow")
    absent = "not any(name.partition('.')[0] == 'mlflow' for name in sys.modules)"
    code = f"import sys, cllm4rec_dist.distributed.engine; assert {absent}; import mlflow"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
