"""A shop from its CSV to recommendations by the commands alone: nothing that a customer has is recommended."""

from __future__ import annotations

import csv
import random
import subprocess
from datetime import datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest

from cllm4rec_dist import cli
from tests.integration.runs import BIN, ROOT, clean_environment

RECIPE = """
name: shop
source:
  format: table
  interactions: {path: sales.csv, user: customer, item: sku, timestamp: bought_at}
  items: {path: sales.csv, item: sku, title: title}
split: {kind: last, num_valid: 1, num_test: 1}
"""
RUN = f"""
corpus: corpus
backbone: backbone
output: unset
deepspeed: {ROOT}/ds_configs/zero3.json
epochs: 1
adapter: {{kind: full}}
batch: {{users: 32, texts: 16}}
optimizer: {{warmup_steps: 2}}
"""


def sell(folder: Path) -> pd.DataFrame:
    """Write what 60 customers have bought of 40 things, in no order."""
    draw = random.Random(5)
    sales = []
    for customer in range(60):
        time = datetime(2024, 1, 1) + timedelta(days=draw.randrange(99))
        for thing in draw.sample(range(40), draw.randint(2, 12)):
            time += timedelta(minutes=draw.randint(1, 9999))
            sales.append((f"C{customer:03d}", f"SKU-{thing:03d}", time.isoformat(" "), f"thing number {thing}"))
    draw.shuffle(sales)
    with (folder / "sales.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("customer", "sku", "bought_at", "title"))
        writer.writerows(sales)
    return pd.DataFrame(sales, columns=["user", "item", "time", "title"])


def on_two_ranks(folder: Path, *arguments: str) -> None:
    """Run `cllm4rec ARGUMENTS` on two ranks."""
    found = subprocess.run(
        [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2", str(BIN / "cllm4rec"), *arguments],
        cwd=folder,
        env=clean_environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]


def here(*arguments: str) -> None:
    """Run `cllm4rec ARGUMENTS` in this process, which has imported torch already."""
    cli.app([*arguments], standalone_mode=False)


@pytest.mark.integration
def test_a_shop_recommends_nothing_that_its_customers_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sales = sell(tmp_path)
    (tmp_path / "shop.yaml").write_text(RECIPE)
    (tmp_path / "run.yaml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    sizes = ["hidden_size=32", "num_layers=1", "num_heads=2", "vocab_size=400"]
    here("build-backbone", "shop.yaml", "backbone", *sizes)
    here("prepare", "shop.yaml", "corpus", "--tokenizer", "backbone")
    on_two_ranks(tmp_path, "finetune", "-c", "run.yaml", "output=run")
    bought = set(zip(sales["user"], sales["item"], strict=True))

    def recommended(*options: str, ranks: int = 1) -> pd.DataFrame:
        """Lists of the command on one or two ranks."""
        arguments = ["recommend", "run", "out", "--top", "5", *options]
        if ranks == 2:
            on_two_ranks(tmp_path, *arguments)
        else:
            here(*arguments)
        found = pd.read_parquet(tmp_path / "out")
        assert not found.duplicated(["user", "rank"]).any()
        return found

    def num_bought(found: pd.DataFrame) -> int:
        return len(bought & set(zip(found["user"], found["item"], strict=True)))

    for ranks in (2, 1):
        found = recommended(ranks=ranks)
        assert set(found["user"]) == set(sales["user"])
        assert len(found) == 60 * 5
        assert num_bought(found) == 0
        assert len(list((tmp_path / "out").glob("*.parquet"))) == ranks
    assert num_bought(recommended("--include-seen")) > 0
    assert num_bought(recommended("--known-items", "train")) > 0  # held-out items may come, and some do

    (tmp_path / "some.txt").write_bytes(b"\xef\xbb\xbfC001 \r\n\r\nC002\r\nC001\r\n")
    some = recommended("--users-file", "some.txt", "--user", "C002", "--user", "C003")
    assert some["user"].value_counts().to_dict() == {"C001": 5, "C002": 5, "C003": 5}
    (tmp_path / "nobody.txt").write_text("\n \n")
    assert recommended("--users-file", "nobody.txt").empty
