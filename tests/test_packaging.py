"""What is published: data files are in the wheel, versions agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cllm4rec_dist"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_data_file_of_the_package_is_in_its_package_data() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["cllm4rec_dist"]
    packaged = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert PACKAGE / "py.typed" in files
    assert files <= packaged, files - packaged


def test_versions_agree() -> None:
    version = PROJECT["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert newest is not None
    assert citation["version"] == newest[1] == version


def test_what_is_installed_is_pinned_within_its_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    extras = PROJECT["project"]["optional-dependencies"]
    for_gpus = ("flash", "kernels")  # not installed by `make`, nor where there is no GPU
    listed = [line for extra, lines in extras.items() if extra not in for_gpus for line in lines]
    for requirement in map(Requirement, [*PROJECT["project"]["dependencies"], *listed]):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
