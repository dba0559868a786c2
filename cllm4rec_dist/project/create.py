"""`cllm4rec init`: a project for files of orders, items and customers.

Columns are guessed (`guess.py`), the recipe that follows is tried on the data, the model is sized to them
(`sizing.py`), and commented files are written (`files.py`). Nothing is written before all of it has worked.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import polars as pl

from cllm4rec_dist.config import validate
from cllm4rec_dist.corpus.raw import RawData
from cllm4rec_dist.corpus.recipe import ItemTable, PrepareConfig
from cllm4rec_dist.corpus.sources import read_source
from cllm4rec_dist.corpus.sources.files import find_files
from cllm4rec_dist.corpus.sources.records import Dialect
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.filesystems import as_os_errors, is_url
from cllm4rec_dist.project import files
from cllm4rec_dist.project.facts import Facts, facts_of
from cllm4rec_dist.project.guess import (
    ColumnOptions,
    Customers,
    Interactions,
    Items,
    guess_customers,
    guess_interactions,
    guess_items,
)
from cllm4rec_dist.project.layout import Project, is_project
from cllm4rec_dist.project.machine import Machine
from cllm4rec_dist.project.sample import Role, Sample, read_sample
from cllm4rec_dist.project.sizing import Core, Numbers, Sizes, choose_core, choose_sizes
from cllm4rec_dist.suggestions import did_you_mean_path

READ_BYTES = 256 << 20
"""Files up to this size are read as a whole; of larger ones the sample has to do."""


@dataclass(frozen=True)
class InitOptions:
    """What the command line gives.

    Attributes:
        orders, items, customers: path, pattern, folder or URL each; items and customers may be left out.
        dialects: how their delimited text is written, as far as the user says it.
        backbone: folder of a pretrained decoder, or None for a small one that is built.
        wanted: what the user says of columns.
    """

    orders: str
    items: str | None
    customers: str | None
    dialects: dict[Role, Dialect]
    backbone: str | None
    wanted: ColumnOptions


@dataclass(frozen=True)
class Proposal:
    """What was found and chosen.

    Attributes:
        samples: of the files, by what they are about.
        interactions, items, customers: their columns.
        recipe: the recipe, plain values.
        numbers: size of the data.
        core, sizes: chosen for them.
        left_out: what the recipe leaves out of the data, by reason.
    """

    samples: dict[Role, Sample]
    interactions: Interactions
    items: Items | None
    customers: Customers | None
    recipe: dict[str, Any]
    numbers: Numbers
    core: Core
    sizes: Sizes
    left_out: dict[str, int]


def create(folder: Path, given: InitOptions, machine: Machine, tell: Callable[[str], None]) -> Project:
    """Make a project and say what was found.

    Raises:
        CLLM4RecError: for a folder that is in use, files that cannot be read, and columns that cannot be told.
    """
    _require_new(folder)
    _require_paths(given)
    proposal = propose(folder.name, given, machine)
    project = Project(folder)
    texts = files.render(project, proposal, given.backbone)
    _write(project, texts)
    tell(files.describe(project, proposal, machine, given.backbone))
    return project


def propose(name: str, given: InitOptions, machine: Machine) -> Proposal:
    """Columns, recipe and sizes for some files."""
    wanted = given.wanted
    samples: dict[Role, Sample] = {"orders": _sample("orders", given.orders, given)}
    if given.items is not None:
        samples["items"] = _sample("items", given.items, given)
    if given.customers is not None:
        samples["customers"] = _sample("customers", given.customers, given)
    others: dict[Role, dict[str, Facts]] = {role: facts_of(sample) for role, sample in samples.items()}
    interactions = guess_interactions(
        samples["orders"], wanted, _others("items", samples, others), _others("customers", samples, others)
    )
    items: Items | None = guess_items(_about("items", samples), wanted, others["orders"][interactions.item])
    if given.items is None and items is not None and not (items.title or items.category or items.description):
        items = None
    customers = None
    if "customers" in samples:
        about = _about("customers", samples)
        customers = guess_customers(about, wanted, others["orders"][interactions.user])
    recipe = _recipe(name, samples, interactions, items, customers)
    numbers, left_out = _numbers(recipe, samples["orders"], given)
    core = choose_core(numbers)
    recipe |= {"min_user_items": core.min_user_items, "min_item_users": core.min_item_users}
    return Proposal(
        samples, interactions, items, customers, recipe, numbers, core, choose_sizes(numbers, machine), left_out
    )


def _about(role: Role, samples: dict[Role, Sample]) -> Sample:
    """The sample of items or customers: that of the orders where there is no other file of them."""
    sample = samples.get(role)
    return samples["orders"] if sample is None or sample.path == samples["orders"].path else sample


def _others(role: Role, samples: dict[Role, Sample], facts: dict[Role, dict[str, Facts]]) -> dict[str, Facts]:
    """Columns of another file than that of the orders."""
    sample = samples.get(role)
    return {} if sample is None or sample.path == samples["orders"].path else facts[role]


def _sample(role: Role, path: str, given: InitOptions) -> Sample:
    try:
        return read_sample(role, path, given.dialects[role])
    except DataError as error:
        raise _with_options(error) from None


def _with_options(error: DataError) -> DataError:
    """An error about delimited text that also says how the command line decides it."""
    cure = error.cure
    for key in ("quoting", "escape", "encoding", "separator", "time_format"):
        if key in cure:
            cure = f"{cure.rstrip()} (cllm4rec init: --{key.replace('_', '-')})"
            break
    return DataError(error.field, error.value, error.constraint, cure)


def _require_new(folder: Path) -> None:
    if is_project(folder):
        raise ConfigError(
            "name",
            str(folder),
            "is a project already",
            f"Go on with `cllm4rec run {folder}`, or choose another name.",
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is a file"
        raise ConfigError("name", str(folder), what, "Choose another name; nothing was changed.")


def _require_paths(given: InitOptions) -> None:
    for option, path in (("orders", given.orders), ("items", given.items), ("customers", given.customers)):
        if path is None or is_url(path) or any(letter in path for letter in "*?[") or Path(path).exists():
            continue
        raise DataError(f"--{option}", path, "does not exist", f"Mend the path.{did_you_mean_path(path)}")
    if given.backbone is not None and not (Path(given.backbone) / "config.json").is_file():
        hint = did_you_mean_path(given.backbone)
        raise ConfigError(
            "--backbone",
            given.backbone,
            "is no folder of a backbone (config.json)",
            f"Give one, or leave it out for a small decoder.{hint}",
        )


def _recipe(
    name: str,
    samples: dict[Role, Sample],
    interactions: Interactions,
    items: Items | None,
    customers: Customers | None,
) -> dict[str, Any]:
    """The recipe as plain values, without what is left to its defaults."""
    orders = _table(samples["orders"]) | {"user": interactions.user, "item": interactions.item}
    orders |= _given(
        timestamp=interactions.time,
        time_format=interactions.time_format,
        rating=interactions.rating,
        decimal=None if interactions.decimal == "." else interactions.decimal,
        text=interactions.text,
        html=interactions.has_html or None,
    )
    source: dict[str, Any] = {"format": "table", "interactions": orders}
    if items is not None:
        category = items.category if "category" in ItemTable.model_fields else None
        source["items"] = _table(samples.get("items", samples["orders"])) | _given(
            item=items.item,
            title=items.title,
            category=category,
            description=list(items.description) or None,
            html=items.has_html or None,
        )
    if customers is not None and customers.text:
        source["users"] = _table(samples["customers"]) | _given(
            user=customers.user, text=list(customers.text), html=customers.has_html or None
        )
    recipe: dict[str, Any] = {"name": name, "source": source}
    if interactions.rating_threshold is not None:
        recipe["rating_threshold"] = interactions.rating_threshold
    recipe["split"] = (
        {"kind": "random", "valid": 0.1, "test": 0.1}
        if interactions.time is None
        else {"kind": "last", "num_valid": 1, "num_test": 1}
    )
    return recipe


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _table(sample: Sample) -> dict[str, Any]:
    """Path and dialect of a file, in the words of a recipe."""
    found: dict[str, Any] = {"path": sample.path.replace("$", "$$")}
    if sample.kind != "csv":
        return found | _given(encoding=sample.encoding)
    dialect = sample.dialect
    return found | _given(
        kind="csv" if dialect.names else None,
        names=None if dialect.names is None else list(dialect.names),
        separator=None if dialect.separator == "," else dialect.separator,
        quoting=None if dialect.quoting == "auto" else dialect.quoting,
        escape=dialect.escape,
        encoding=sample.encoding,
    )


def _numbers(recipe: dict[str, Any], orders: Sample, given: InitOptions) -> tuple[Numbers, dict[str, int]]:
    """Size of the data, and what could not be used of them: of everything, or of the sample of large files."""
    config = validate(PrepareConfig, recipe, "recipe")
    if _num_bytes(given) > READ_BYTES:
        return _sampled(recipe, orders), {}
    try:
        raw = read_source(config.source)
    except DataError as error:
        raise _with_options(error) from None
    counts = {reason: count for reason, count in raw.log.counts.items() if "without interactions" not in reason}
    return _measured(raw, config.rating_threshold), counts


def _num_bytes(given: InitOptions) -> int:
    paths = dict.fromkeys(path for path in (given.orders, given.items, given.customers) if path is not None)
    total = 0
    for file in find_files(list(paths)):
        fs, place = fsspec.core.url_to_fs(file.path)
        with as_os_errors():
            total += int(fs.info(place)["size"])
    return total


def _measured(raw: RawData, threshold: float | None) -> Numbers:
    frame = raw.interactions
    if threshold is not None:
        frame = frame.filter(pl.col("rating") >= threshold)
    pairs = frame.select("user", "item").unique()
    users, items = (pairs[name].value_counts()["count"].to_numpy().astype(np.int64) for name in ("user", "item"))
    popularity = pairs.with_columns(pl.len().over("item").alias("count"))
    best = popularity.group_by("user").agg(pl.col("count").max())["count"].to_numpy().astype(np.int64)
    lengths = [len(text) for text in raw.texts()]
    if not len(pairs):
        raise DataError("rating_threshold", threshold, "leaves no interaction", "Give --rating-threshold.")
    return Numbers(len(users), len(items), items, users, len(lengths), sum(lengths), best_counts=best)


def _sampled(recipe: dict[str, Any], orders: Sample) -> Numbers:
    columns = recipe["source"]["interactions"]
    pairs = orders.columns.select(columns["user"], columns["item"]).drop_nulls().unique()
    users, items = (
        pairs[columns[name]].value_counts()["count"].to_numpy().astype(np.int64) for name in ("user", "item")
    )
    has_texts = len(recipe["source"]) > 2
    return Numbers(len(users), len(items), items, users, len(items) * has_texts, 100 * len(items) * has_texts, True)


def _write(project: Project, texts: dict[Path, str]) -> None:
    """Make the folder with its files, all or none."""
    folder = project.folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for path, text in texts.items():
                (part / path.name).write_text(text, encoding="utf-8")
            part.chmod(0o755)
            if folder.exists():
                folder.rmdir()
            part.replace(folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except OSError as error:
        raise ConfigError(
            "name", str(folder), f"cannot be written ({error.strerror or error})", "Choose another name."
        ) from error


def absolute(path: str | None) -> str | None:
    """A path that holds in any folder; a URL stays."""
    return path if path is None or is_url(path) else str(Path(path).absolute())


def dialects(common: Dialect, names: dict[Role, tuple[str, ...] | None]) -> dict[Role, Dialect]:
    """The dialect of each file: what holds for all, and its own names of columns."""
    return {role: replace(common, names=columns) for role, columns in names.items()}
