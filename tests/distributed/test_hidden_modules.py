"""Modules that an import must not see, and that may be imported later."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from cllm4rec_dist.distributed.hidden_modules import hidden_modules
from tests.harness import make_backbone, make_catalog


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


@pytest.mark.slow
def test_the_engine_starts_without_mlflow_and_leaves_it_to_trackers() -> None:
    """If this fails, DeepSpeed imports MLflow elsewhere than in its autotuner: see who does, and whether it is used."""
    pytest.importorskip("mlflow")
    absent = "not any(name.partition('.')[0] == 'mlflow' for name in sys.modules)"
    code = f"import sys, cllm4rec_dist.distributed.engine; assert {absent}; import mlflow"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
def test_adapters_do_without_bitsandbytes_unless_weights_are_quantized(tmp_path: Path) -> None:
    """If this fails, PEFT imports bitsandbytes elsewhere, or remembers for longer that it was not found."""
    pytest.importorskip("bitsandbytes")
    backbone = make_backbone(tmp_path / "backbone", make_catalog(), family="llama")
    code = f"""
import sys
from pathlib import Path
import torch
from cllm4rec_dist.config import AdapterConfig
from cllm4rec_dist.model.backbone import load_backbone
load = lambda quantization: load_backbone(Path({str(backbone)!r}), AdapterConfig(), torch.bfloat16, 0, quantization)
load("none")
assert "bitsandbytes" not in sys.modules
from peft.tuners.lora.bnb import Linear4bit
assert any(isinstance(module, Linear4bit) for module in load("nf4").modules())
"""
    found = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert found.returncode == 0, found.stderr
