"""`init` writes files that load, sized to data and machine, and nothing where something is wrong."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from cllm4rec_dist.cli import main
from cllm4rec_dist.config import BackboneConfig, OptimizerConfig, RunConfig, load_config, validate
from cllm4rec_dist.corpus.catalog import build_catalog
from cllm4rec_dist.corpus.recipe import PrepareConfig, TableSource
from cllm4rec_dist.corpus.sources import read_source
from cllm4rec_dist.corpus.split_settings import LastSplit, RandomSplit
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.project import create, files
from cllm4rec_dist.project.layout import is_project, run_of
from cllm4rec_dist.project.machine import Machine, this_machine
from cllm4rec_dist.project.sizing import Core, DataStats, choose_core, choose_sizes
from tests.harness import make_backbone, make_catalog
from tests.integration.shop_data import Shop, make_shop

REPOSITORY = Path(__file__).parents[2]
GIB = 1 << 30
LAPTOP = Machine(cores=2, memory=8 * GIB)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return make_shop(tmp_path_factory.mktemp("shop"), num_customers=120, num_products=60)


def test_init_of_a_shop_with_dirty_data(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = ["--orders", str(shop.orders), "--items", str(shop.products), "--customers", str(shop.customers)]
    with pytest.raises(SystemExit) as ended:
        main(["init", "mine", *files])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    recipe = load_config(PrepareConfig, "mine/recipe.yaml")
    source = recipe.source
    assert isinstance(source, TableSource)
    assert source.items is not None
    assert source.users is not None
    orders = source.interactions
    assert (orders.user, orders.item, orders.timestamp) == ("Kundennummer", "Artikelnummer", "Bestelldatum")
    assert (orders.separator, orders.time_format) == (";", "%d.%m.%Y %H:%M")
    assert (source.items.title, source.items.description) == ("Bezeichnung", ("Warengruppe", "Beschreibung"))
    assert source.items.html
    assert source.users.text == ("Altersgruppe", "Ort"), "names stay out of the texts"
    assert isinstance(recipe.split, LastSplit)
    raw = read_source(source)
    assert len(raw.user_ids) == shop.num_customers
    num_lost = sum(count for reason, count in raw.log.counts.items() if reason.startswith("row that"))
    assert num_lost == shop.num_dirty * 4 // 5, "a fifth of the dirty lines come again, and are no loss"
    for stage in ("pretrain", "finetune"):
        config = load_config(RunConfig, f"mine/{stage}.yaml", [f"stage={stage}"])
        assert (config.corpus, config.backbone, config.output) == ("mine/corpus", "mine/backbone", f"mine/runs/{stage}")
    load_config(BackboneConfig, "mine/backbone.yaml")
    for words in ("Kundennummer", "'A-00", "120 customers", "has 3 fields instead of 6", "next      cllm4rec run mine"):
        assert words in output
    assert is_project("mine")
    assert run_of("mine") == "mine/runs/finetune"
    assert run_of("elsewhere") == "elsewhere"


def test_without_times_the_split_is_random_and_reported(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["init", str(tmp_path / "mine"), "--orders", str(shop.orders), "--time-column", "none"])
    assert "no column of times" in capsys.readouterr().out
    assert isinstance(load_config(PrepareConfig, tmp_path / "mine" / "recipe.yaml").split, RandomSplit)


def test_orders_and_items_of_one_file(tmp_path: Path) -> None:
    rows = "".join(f"c{n % 9},s{n % 7},Thing {n % 7},2025-01-{1 + n % 28:02d}\n" for n in range(90))
    (tmp_path / "sales.csv").write_text(f"customer,sku,title,day\n{rows}")
    for name, options in (("one", []), ("both", ["--items", str(tmp_path / "sales.csv")])):
        with pytest.raises(SystemExit) as ended:
            main(["init", str(tmp_path / name), "--orders", str(tmp_path / "sales.csv"), *options])
        assert ended.value.code == 0
        source = load_config(PrepareConfig, tmp_path / name / "recipe.yaml").source
        assert isinstance(source, TableSource)
        assert source.items is not None
        assert (source.items.item, source.items.title) == ("sku", "title")


def returns_file(folder: Path, column: str, quantities: tuple[str, ...]) -> Path:
    """Write orders of 40 customers with 4 items each; quantities repeat."""
    rows = [(f"k{user}", f"p{(user + step) % 9}", f"2024-05-{step + 1:02}") for user in range(40) for step in range(4)]
    lines = [f"{';'.join(row)};{quantities[index % len(quantities)]}" for index, row in enumerate(rows)]
    path = folder / "orders.csv"
    path.write_text(f"customer_id;product_id;order_date;{column}\n" + "\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("column", "quantities", "decimal"),
    [("Menge", ("1", "2", "-1", "3", "1"), ""), ("pieces", ("1,5", "-2", "1", "2,5", "1"), ",")],
)
def test_negative_quantities_are_reported_with_a_cure_that_leaves_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str, quantities: tuple[str, ...], decimal: str
) -> None:
    path = returns_file(tmp_path, column, quantities)
    with pytest.raises(SystemExit):
        main(["init", str(tmp_path / "mine"), "--orders", str(path)])
    output = capsys.readouterr().out
    assert f"returns?    {column} is negative in 32 of the 160 rows, which count as purchases" in output
    assert f"`rating: {column}`" + (f" and `decimal: '{decimal}'`" if decimal else "") + " of interactions" in output
    assert "`rating_threshold: 0.001` of the recipe" in output
    settings = yaml.safe_load((tmp_path / "mine/recipe.yaml").read_text())
    without = {**settings, "rating_threshold": 0.001}
    orders = settings["source"]["interactions"] | {"rating": column} | ({"decimal": decimal} if decimal else {})
    without["source"] = {**settings["source"], "interactions": orders}
    counts = []
    for recipe in (validate(PrepareConfig, each, "recipe") for each in (settings, without)):
        catalog = build_catalog(read_source(recipe.source), recipe)
        counts.append(sum(len(part.values) for part in (catalog.train, catalog.valid, catalog.test)))
    assert counts == [160, 128]


@pytest.mark.parametrize(("column", "quantities"), [("Menge", ("1", "2")), ("discount", ("1", "-2")), ("x", ("-1",))])
def test_other_columns_are_no_returns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str, quantities: tuple[str, ...]
) -> None:
    path = returns_file(tmp_path, column, quantities)
    with pytest.raises(SystemExit):
        main(["init", str(tmp_path / "mine"), "--orders", str(path)])
    assert "returns?" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "times", "is_told"),
    [
        ("order_date", "20240501120000", True),
        ("order_date", "2024-05-01 12.00 Uhr", True),
        ("order_date", "2024-05-01", False),
        ("order_date", "morning", False),
        ("box", "20240501120000", False),
    ],
)
def test_a_column_of_times_that_cannot_be_read_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str, times: str, is_told: bool
) -> None:
    lines = [f"k{user};p{(user + step) % 9};{times}" for user in range(40) for step in range(4)]
    path = tmp_path / "orders.csv"
    path.write_text(f"customer_id;product_id;{column}\n" + "\n".join(lines) + "\n")
    with pytest.raises(SystemExit):
        main(["init", str(tmp_path / "mine"), "--orders", str(path)])
    output = capsys.readouterr().out
    assert (f"times?      {column} cannot be read, such as '{times}'" in output) == is_told
    assert (f"--time-column {column} --time-format" in output) == is_told


def test_ordered_items_without_a_row_in_the_file_of_items_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    orders = returns_file(tmp_path, "Menge", ("1",))
    (tmp_path / "items.csv").write_text("id,title\n" + "".join(f"p{index},Soap {index}\n" for index in range(8)))
    source = TableSource.model_validate(
        {
            "format": "table",
            "interactions": {"path": str(orders), "user": "customer_id", "item": "product_id"},
            "items": {"path": str(tmp_path / "items.csv"), "item": "id", "title": "title"},
        }
    )
    logging.getLogger("cllm4rec_dist").propagate = True
    read_source(source)
    expected = (
        "items.csv: has no row for 1 of 9 ordered items, such as 'p8' (16 customers in all): their texts are unknown"
    )
    assert caplog.messages == [expected]
    caplog.clear()
    with (tmp_path / "items.csv").open("a") as file:
        file.write("p8,Soap 8\n")
    read_source(source)
    assert not caplog.messages


def test_a_pretrained_backbone_gets_adapters(shop: Shop, tmp_path: Path) -> None:
    """The learning rate of embeddings is proportional to the scale of the backbone's word embeddings."""
    backbone = make_backbone(tmp_path / "llm", make_catalog())
    weights = load_file(backbone / "model.safetensors")
    rates = []
    for factor, name in ((1, "mine"), (7, "larger")):
        scaled = {key: weight * (factor if "wte" in key else 1) for key, weight in weights.items()}
        save_file(scaled, backbone / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SystemExit) as ended:
            main(["init", str(tmp_path / name), "--orders", str(shop.orders), "--backbone", str(backbone)])
        assert ended.value.code == 0
        config = load_config(RunConfig, tmp_path / name / "finetune.yaml", ["stage=finetune"])
        assert (config.adapter.kind, config.backbone) == ("lora", str(backbone))
        assert config.head.projection
        assert not (tmp_path / name / "backbone.yaml").exists()
        first = load_config(RunConfig, tmp_path / name / "pretrain.yaml", ["stage=pretrain"])
        assert first.optimizer == config.optimizer
        rates.append(config.optimizer.embeddings_lr)
    assert rates == pytest.approx([2e-4, 1.4e-3], rel=0.05)


def test_a_backbone_without_weights_is_refused_before_anything_is_read(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = make_backbone(tmp_path / "llm", make_catalog())
    (backbone / "model.safetensors").unlink()
    monkeypatch.setattr(create, "read_sample", lambda *_: pytest.fail("orders were read"))
    with pytest.raises(SystemExit) as ended:
        main(["init", str(tmp_path / "mine"), "--orders", str(shop.orders), "--backbone", str(backbone)])
    assert ended.value.code == 2
    assert str(backbone) in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_nothing_is_written_on_an_error(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "orders.csv").write_text("customer,sku\n" + "c1,s1\n" * 3)
    before = sorted(tmp_path.iterdir())
    for options in (["--orders", "nothing.csv"], ["--orders", str(tmp_path / "orders.csv"), "--time-column", "day"]):
        with pytest.raises(SystemExit) as ended:
            main(["init", str(tmp_path / "mine"), *options])
        assert ended.value.code == 2
        assert sorted(tmp_path.iterdir()) == before


def test_without_a_terminal_an_unsure_guess_is_an_error_not_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "orders.csv").write_text("a,b\n" + "".join(f"{n % 9},{n % 7}\n" for n in range(60)))
    completed = subprocess.run(
        [sys.executable, "-m", "cllm4rec_dist", "init", "mine", "--orders", "orders.csv"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        stdin=subprocess.PIPE,
    )
    assert completed.returncode == 2
    assert "Give --item-column with one of them" in completed.stderr


def numbers(users: int, items: int, mean: float = 8.0, letters: int = 50_000) -> DataStats:
    draw = np.random.default_rng(0)
    lengths = np.maximum(1, draw.poisson(mean, users))
    counts = np.bincount(draw.integers(0, items, int(lengths.sum())), minlength=items)
    return DataStats(users, items, counts[counts > 0], lengths, items, letters)


def test_sizes_follow_the_runs_that_train_well() -> None:
    """launch/configs/: 938 users of MovieLens in batches of 64, 22,363 of Beauty in batches of 256."""
    movielens = choose_sizes(numbers(938, 1447, mean=59, letters=60_000), LAPTOP)
    assert (movielens.hidden_size, movielens.users, movielens.finetune_epochs) == (256, 64, 40)
    assert (movielens.dropout, movielens.vocab_size) == (0.5, 2000)
    beauty = choose_sizes(numbers(22_363, 12_101, mean=7, letters=800_000), LAPTOP)
    assert (beauty.hidden_size, beauty.users, beauty.finetune_epochs) == (256, 256, 14)
    assert (beauty.dropout, beauty.num_layers, beauty.patience) == (0.7, 1, 3)


def test_one_epoch_is_no_shorter_than_its_warm_up(tmp_path: Path) -> None:
    """Some customers have nothing but an item that is too rare to be kept."""
    rows = [f"c{n},s{(n + k) % 9}" for n in range(400) for k in range(9)] + [f"d{n % 30},r{n}" for n in range(30)]
    (tmp_path / "orders.csv").write_text("customer,sku\n" + "\n".join(rows) + "\n")
    with pytest.raises(SystemExit) as ended:
        main(["init", str(tmp_path / "mine"), "--orders", str(tmp_path / "orders.csv")])
    assert ended.value.code == 0
    recipe = load_config(PrepareConfig, tmp_path / "mine" / "recipe.yaml")
    assert recipe.min_item_users > 1
    num_users = build_catalog(read_source(recipe.source), recipe).num_users
    for stage in ("pretrain", "finetune"):
        config = load_config(RunConfig, tmp_path / "mine" / f"{stage}.yaml", [f"stage={stage}"])
        assert config.optimizer.warmup_steps == -(-num_users // config.batch.users)


def test_sizes_fit_the_machine() -> None:
    many = numbers(300_000, 200_000, mean=3)
    gpu = choose_sizes(many, Machine(16, 64 * GIB, (80 * GIB,)))
    assert (gpu.hidden_size, gpu.precision, gpu.users) == (512, "bf16", 1024)
    small = choose_sizes(many, Machine(2, 2 * GIB))
    assert small.hidden_size * 500_000 * 24 <= GIB
    assert choose_sizes(many, LAPTOP).gradient_accumulation_steps >= gpu.gradient_accumulation_steps
    for sizes in (gpu, small):
        assert sizes.hidden_size % (2 * sizes.num_heads) == 0


def test_the_core_leaves_out_rare_items() -> None:
    few = DataStats(10, 3, np.array([20, 20, 1]), np.full(10, 4))
    assert choose_core(few) == Core(1, 1), "a fortieth of the orders is too much to lose"
    assert choose_core(DataStats(10, 3, np.array([200, 200, 1]), np.full(10, 40))) == Core(1, 5)
    assert choose_core(DataStats(300_000, 2, np.array([9, 9]), np.array([1]))).min_user_items == 3


def test_the_machine_is_detected_without_torch() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory > GIB // 4
    assert "no GPU" in str(LAPTOP)


def test_a_description_in_the_file_of_orders_is_read(tmp_path: Path) -> None:
    rows = "".join(f"c{n % 9};s{n % 7};Producto {n % 7}\n" for n in range(90))
    (tmp_path / "ventas.csv").write_text(f"cliente;sku;descripcion\n{rows}")
    with pytest.raises(SystemExit) as ended:
        main(["init", str(tmp_path / "mine"), "--orders", str(tmp_path / "ventas.csv")])
    assert ended.value.code == 0
    source = load_config(PrepareConfig, tmp_path / "mine" / "recipe.yaml").source
    assert isinstance(source, TableSource)
    assert source.items is not None
    assert (source.items.item, source.items.description) == ("sku", ("descripcion",))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_embeddings_learn_as_fast_as_in_the_committed_runs(tmp_path: Path, stage: str) -> None:
    """launch/configs/ of the Amazon data sets, whose rates docs/quality.md compares with others."""
    mine = proposed_optimizer(tmp_path, stage, "customer,sku,title", ",a thing")
    for data in ("amazon-beauty", "amazon-toys"):
        path = Path(__file__).parents[2] / f"launch/configs/{data}-{stage}.yaml"
        committed = load_config(RunConfig, path, [f"stage={stage}"]).optimizer
        assert mine.model_copy(update={"warmup_steps": committed.warmup_steps}) == committed


@pytest.mark.parametrize(("header", "title", "num_items"), [("customer,sku", "", 99), ("customer,sku,title", ",a", 9)])
def test_items_share_nothing_without_texts_or_with_many_interactions(
    tmp_path: Path, header: str, title: str, num_items: int
) -> None:
    optimizer = proposed_optimizer(tmp_path, "finetune", header, title, num_items)
    assert (optimizer.words_lr_ratio, optimizer.embeddings_lr) == (0.0, 3e-4)


def proposed_optimizer(folder: Path, stage: str, header: str, title: str, num_items: int = 99) -> OptimizerConfig:
    """What `init` proposes for 300 orders of 60 customers."""
    rows = [f"c{n},s{(5 * n + k) % num_items}{title}" for n in range(60) for k in range(5)]
    (folder / "orders.csv").write_text("\n".join([header, *rows, ""]))
    with pytest.raises(SystemExit) as ended:
        main(["init", str(folder / "mine"), "--orders", str(folder / "orders.csv")])
    assert ended.value.code == 0
    return load_config(RunConfig, folder / "mine" / f"{stage}.yaml", [f"stage={stage}"]).optimizer


@pytest.mark.slow
@pytest.mark.parametrize("name", ["amazon-beauty", "amazon-toys", "ml-100k"])
def test_committed_run_files_have_the_settings_that_init_chooses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(os.environ.get("CLLM4REC_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (folder / name).is_dir():
        pytest.skip(f"needs the raw files of {name}: set CLLM4REC_DATA to the folder that holds {name}/")
    monkeypatch.setenv("CLLM4REC_DATA", str(folder))
    recipe = load_config(PrepareConfig, REPOSITORY / "shards" / f"{name}.yaml")
    data = create._measured(read_source(recipe.source), recipe.rating_threshold)
    sizes = choose_sizes(data, Machine(cores=2, memory=24 * GIB))
    proposal = SimpleNamespace(recipe={"name": name}, sizes=sizes, embedding_scale=None)
    for stage in ("pretrain", "finetune"):
        chosen = files._run(SimpleNamespace(folder=Path("folder")), proposal, None, stage)  # type: ignore[arg-type]
        committed = (REPOSITORY / "launch" / "configs" / f"{name}-{stage}.yaml").read_text()
        settings = [validate(RunConfig, yaml.safe_load(text) | {"stage": stage}, name) for text in (chosen, committed)]
        ours, theirs = (config.model_dump(exclude={"corpus", "backbone", "output", "init_from"}) for config in settings)
        assert ours == theirs, stage


def test_an_error_about_a_recipe_names_all_options_that_may_mend_it() -> None:
    error = DataError("orders.csv line 3", "x", "is no row", "Fix the recipe (quoting, encoding, time_format).")
    assert create._with_option(error).cure.endswith("(cllm4rec init: --quoting, --encoding, --time-format)")
    assert create._with_option(DataError("a", "b", "c", "Fix the file.")).cure == "Fix the file."
