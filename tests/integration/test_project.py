"""From dirty files of a shop to lists by two commands, stopped and gone on with in between."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.integration.runs import BIN, ROOT, clean_environment, finish
from tests.integration.shop_data import make_shop

SMALL = ["epochs=2", "backbone.hidden_size=32"]


def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(BIN / "cllm4rec"), *arguments],
        cwd=folder,
        env=clean_environment(PYTHONPATH=str(ROOT)),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )


def told(started: subprocess.Popen[str], status: int = 0) -> str:
    text = finish(started, timeout=600)
    assert started.returncode == status, text[-3000:]
    return text


@pytest.mark.slow
@pytest.mark.integration
def test_two_commands_from_a_dirty_shop_to_lists(tmp_path: Path) -> None:
    shop = make_shop(tmp_path / "data", num_customers=200, num_products=80)
    files = ["--orders", str(shop.orders), "--items", str(shop.products), "--customers", str(shop.customers)]
    assert "200 customers" in told(command(tmp_path, "init", "shop", *files))

    started = command(tmp_path, "run", "shop", *SMALL)
    deadline = time.monotonic() + 240
    while not (tmp_path / "shop/runs/pretrain/metrics.jsonl").exists():
        assert started.poll() is None, told(started)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    text = told(started, status=75)
    assert f"`cllm4rec run shop {' '.join(SMALL)}` resumes from there" in text
    assert text.count(" are left out: ") == 1, "two stages read the files, and one says what it leaves out"

    text = told(command(tmp_path, "run", "shop", *SMALL, "--top", "5"))
    assert "[2/6] prepare         done before" in text
    assert "[3/6] pretrain" in text
    assert "next: " not in text, "the summary alone says what comes next"
    for words in ("200 customers", "left out:", "CLLM4Rec", "EASE", "recall@20", "report.html", "next"):
        assert words in text.partition("\ndata ")[2], text[-3000:]
    results = json.loads((tmp_path / "shop/runs/finetune/evaluation/results.json").read_text())
    assert {row["name"] for row in results["rows"]} >= {"CLLM4Rec", "Popularity", "EASE"}
    lists = pd.read_parquet(tmp_path / "shop/recommendations")
    assert lists.groupby("user").size().eq(5).all()
    assert lists["user"].nunique() == shop.num_customers

    again = told(command(tmp_path, "run", "shop", *SMALL, "--top", "5"))
    assert again.count("done before") == 6
    refused = told(command(tmp_path, "run", "shop", *SMALL, "recipe.min_user_items=4"), status=2)
    assert "recipe.min_user_items: 1 is now 4" in refused
