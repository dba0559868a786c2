"""A shop of 1,000 customers and 300 products, from its dirty files to a page in a browser, by the commands alone.

`cllm4rec run` is stopped in its first training and goes on.
"""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from playwright.sync_api import expect

from cllm4rec_dist.corpus.manifest import load_manifest
from tests.integration.runs import BIN, ROOT, clean_environment, finish
from tests.integration.shop_data import Shop, make_shop
from tests.serving.browser import running_browser

pytestmark = [pytest.mark.slow, pytest.mark.integration]

SMALL = ["epochs=2", "backbone.hidden_size=64"]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(BIN / "cllm4rec"), *arguments],
        cwd=folder,
        env=clean_environment(PYTHONPATH=str(ROOT)),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )


def ended(started: subprocess.Popen[str], status: int = 0) -> str:
    """What a command prints and logs; it must end with this status."""
    text = finish(started, timeout=900)
    assert started.returncode == status, text[-3000:]
    return text


def cllm4rec(folder: Path, *arguments: str, status: int = 0) -> str:
    """What a command prints and logs; it must end with this status."""
    return ended(start(folder, *arguments), status)


@dataclass(frozen=True)
class Project:
    """A project that `init` and `run` have made in `folder`, and what they printed; `run` was stopped once."""

    folder: Path
    shop: Shop
    proposed: str
    stopped: str
    resumed: str


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("shop")
    shop = make_shop(folder / "data", num_customers=1000, num_products=300)
    files = ["--orders", str(shop.orders), "--items", str(shop.products), "--customers", str(shop.customers)]
    proposed = cllm4rec(folder, "init", "shop", *files)
    started = start(folder, "run", "shop", *SMALL)
    deadline = time.monotonic() + 240
    while not (folder / "shop/runs/pretrain/metrics.jsonl").exists():
        assert started.poll() is None, ended(started)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    stopped = ended(started, status=75)
    return Project(folder, shop, proposed, stopped, cllm4rec(folder, "run", "shop", *SMALL, "--top", "5"))


def test_init_reads_the_files_as_the_shop_means_them(project: Project) -> None:
    for line in (
        r"user +Kundennummer +'K\d+'",
        r"item +Artikelnummer +'A-\d+'",
        r"timestamp +Bestelldatum +.*%d\.%m\.%Y %H:%M",
        r"title +Bezeichnung",
        r"category +Warengruppe",
        r"data +1,000 customers",
    ):
        assert re.search(line, project.proposed), (line, project.proposed)


def test_run_counts_every_dirty_line(project: Project) -> None:
    manifest, _ = load_manifest(str(project.folder / "shop/corpus"))
    assert manifest.num_users == project.shop.num_customers
    dirty = ("row that has", "repeated interaction")
    counted = sum(found.count for reason, found in manifest.skipped.items() if reason.startswith(dirty))
    assert counted == project.shop.num_dirty


def test_a_stopped_run_says_how_to_go_on_and_goes_on(project: Project) -> None:
    assert f"`cllm4rec run shop {' '.join(SMALL)}` resumes from there" in project.stopped
    assert project.stopped.count(" are left out: ") == 1, "two stages read the files, and one says what it leaves out"
    assert "[2/6] prepare         done before" in project.resumed
    assert "[3/6] pretrain" in project.resumed


def test_run_ends_with_a_table_and_what_is_next(project: Project) -> None:
    results = json.loads((project.folder / "shop/runs/finetune/evaluation/results.json").read_text(encoding="utf-8"))
    recall = {row["name"]: row["metrics"]["recall@20"] for row in results["rows"]}
    assert recall["CLLM4Rec"] > 2 * recall["Popularity"]
    assert "next: " not in project.resumed, "the summary alone says what comes next"
    summary = project.resumed.partition("\ndata ")[2]
    next_commands = ("cllm4rec serve shop", "cllm4rec recommend shop")
    for words in ("1,000 customers", "left out:", "EASE", "recall@20", *recall, "report.html", "next", *next_commands):
        assert words in summary, (words, summary)


def test_run_writes_a_list_for_each_customer(project: Project) -> None:
    lists = pd.read_parquet(project.folder / "shop/recommendations")
    assert lists.groupby("user").size().eq(5).all()
    assert lists["user"].nunique() == project.shop.num_customers


def test_a_finished_run_is_not_run_again_and_refuses_another_recipe(project: Project) -> None:
    again = cllm4rec(project.folder, "run", "shop", *SMALL, "--top", "5")
    assert again.count("done before") == 6
    refused = cllm4rec(project.folder, "run", "shop", *SMALL, "recipe.min_user_items=4", status=2)
    assert "recipe.min_user_items: 1 is now 4" in refused


def test_later_and_new_customers_get_lists_without_what_they_have(project: Project) -> None:
    shop, output = project.shop, project.folder / "later"
    told = cllm4rec(
        project.folder,
        "recommend",
        "shop",
        str(output),
        "--history",
        str(shop.later_orders),
        "--user-column",
        "Kundennummer",
        "--item-column",
        "Artikelnummer",
        "--time-column",
        "Bestelldatum",
        "--top",
        "5",
        "--titles",
        "--format",
        "csv",
    )
    orders = [*rows(shop.orders, ";"), *rows(shop.later_orders, ";")]
    bought = {(row["Kundennummer"], row["Artikelnummer"]) for row in orders}
    later = {row["Kundennummer"] for row in rows(shop.later_orders, ";")}
    (file,) = output.glob("*.csv")
    lists = rows(file, ",")
    assert {row["user"] for row in lists} == later
    assert set(shop.new_customers) <= later
    assert len(lists) == 5 * len(later)
    assert not {(row["user"], row["item"]) for row in lists} & bought
    assert all(row["title"] for row in lists)
    assert f"{len(later):,} users" in told


def rows(path: Path, separator: str) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=separator))


@contextmanager
def service(project: Project) -> Iterator[str]:
    """The URL of `cllm4rec serve`, which must end in order when it is interrupted."""
    started = start(project.folder, "serve", "shop", "--port", "0")
    assert started.stdout is not None
    printed: list[str] = []
    try:
        for line in started.stdout:
            printed.append(line)
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            if found:
                break
        assert printed, "the service printed nothing"
        assert found, "".join(printed)
        threading.Thread(target=started.stdout.read, daemon=True).start()  # or its pipe is full some day
        yield found[0]
    finally:
        started.terminate()
        started.wait(60)


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_the_shop_is_served_and_its_page_recommends_for_a_basket(project: Project) -> None:
    with service(project) as url:
        known = post(f"{url}/recommend", {"user": "K00001", "top": 3})
        assert len(known["items"]) == 3
        new = post(f"{url}/recommend", {"history": ["A-0001", "A-0007"], "top": 3})
        assert not {"A-0001", "A-0007"} & {item["item"] for item in new["items"]}
        with running_browser() as browser:
            page = browser.new_page()
            page.goto(url)
            page.get_by_role("combobox").fill("gießkanne")
            page.get_by_role("option").first.wait_for()
            page.keyboard.press("ArrowDown")
            page.keyboard.press("Enter")
            expect(page.locator("#basket li")).to_have_count(1)
            expect(page.get_by_role("heading", name="Recommended for this basket")).to_be_visible()
            expect(page.locator("#list > li").first).to_be_visible()
