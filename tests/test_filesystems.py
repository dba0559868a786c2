"""Variables and home folders in paths, and file systems."""

from __future__ import annotations

import pytest

from cllm4rec_dist.filesystems import expand_path, is_url

ENVIRON = {"DATA": "/mnt/data", "BUCKET": "s3://bucket", "EMPTY": ""}

PATHS = {
    "$DATA/x": "/mnt/data/x",
    "${DATA}/x": "/mnt/data/x",
    "${BUCKET}/x": "s3://bucket/x",
    "${NOWHERE:-../data}/x": "../data/x",
    "${EMPTY:-../data}/x": "../data/x",
    "${EMPTY:-}x": "x",
    "$$DATA/a$b$$".replace("$b", "$$b"): "$DATA/a$b$",
    "part-$1.csv": "part-$1.csv",
    "a~b/~": "a~b/~",
    "memory://run": "memory://run",
}


@pytest.mark.parametrize("path", PATHS)
def test_variables_are_replaced(path: str) -> None:
    assert expand_path(path, ENVIRON) == PATHS[path]


def test_the_home_is_replaced_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_path("~/runs") == "/home/me/runs"
    with pytest.raises(ValueError, match="the home of ~nobody-of-this-name is unknown"):
        expand_path("~nobody-of-this-name/runs")


@pytest.mark.parametrize("path", ["$NOWHERE/x", "${NOWHERE}/x", "$EMPTY/x"])
def test_a_variable_that_is_not_set_is_named(path: str) -> None:
    with pytest.raises(ValueError, match=r"environment variable (NOWHERE|EMPTY) is not set"):
        expand_path(path, ENVIRON)


def test_urls_are_told_from_paths() -> None:
    assert all(map(is_url, ["s3://bucket/x", "s3:/bucket/x", "memory://x", "simplecache::s3://bucket"]))
    assert not any(map(is_url, ["/tmp/x", "x", "a:b", "C:/x", "./s3:/x"]))
