"""What `import cllm4rec_dist` offers, and what it does not import."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import cllm4rec_dist
from cllm4rec_dist.errors import CLLM4RecError
from cllm4rec_dist.serving.recommender import Recommender
from tests.integration.runs import clean_environment

PUBLIC = ["CLLM4RecError", "Recommender", "__version__"]


def test_just_the_public_names_are_offered() -> None:
    assert dir(cllm4rec_dist) == PUBLIC
    assert cllm4rec_dist.__all__ == PUBLIC
    assert cllm4rec_dist.Recommender is Recommender
    assert cllm4rec_dist.CLLM4RecError is CLLM4RecError
    assert cllm4rec_dist.__version__ == version("cllm4rec_dist")
    with pytest.raises(AttributeError, match="no attribute 'train_on_everything'"):
        cllm4rec_dist.train_on_everything  # noqa: B018
    assert dir(cllm4rec_dist) == PUBLIC  # also after use


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, cllm4rec_dist; dir(cllm4rec_dist); print(*sorted(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean_environment()
    )
    heavy = {"torch", "numpy", "pandas", "polars", "pyarrow", "pydantic", "transformers", "deepspeed", "ray", "yaml"}
    assert not heavy & set(found.stdout.split())


@pytest.mark.slow
def test_a_recommender_needs_neither_deepspeed_nor_ray() -> None:
    code = "import sys; from cllm4rec_dist import Recommender; print(*sorted(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean_environment()
    )
    assert not {"deepspeed", "ray", "peft", "sklearn", "tensorboard", "matplotlib"} & set(found.stdout.split())
