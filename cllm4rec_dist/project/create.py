"""`cllm4rec init`: create a project for files of orders, items and customers.

Guess the columns (`guess.py`), try the resulting recipe on the data, choose model and batch sizes (`sizing.py`), and
write commented files (`files.py`). Nothing is written unless all steps succeed.
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
from cllm4rec_dist.project.column_stats import ColumnStats, column_stats
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
from cllm4rec_dist.project.sizing import Core, DataStats, Sizes, choose_core, choose_sizes
from cllm4rec_dist.suggestions import did_you_mean_path

READ_BYTES = 256 << 20
"""Files up to this total size are read completely; beyond it, statistics come from the sample."""


@dataclass(frozen=True)
class InitOptions:
    """Options of `cllm4rec init`.

    Attributes:
        orders, items, customers: path, pattern, folder or URL; items and customers are optional.
        dialects: dialect of the delimited text of each file, as far as given.
        backbone: folder of a pretrained decoder, or None to build a small one.
        columns: column names and formats given by the user.
    """

    orders: str
    items: str | None
    customers: str | None
    dialects: dict[Role, Dialect]
    backbone: str | None
    columns: ColumnOptions


@dataclass(frozen=True)
class Proposal:
    """Guessed columns and chosen sizes of a project.

    Attributes:
        samples: first rows of each file, by role.
        interactions, items, customers: guessed columns.
        recipe: recipe as plain values.
        data: statistics of the data.
        core, sizes: filters and sizes for the data.
        left_out: number of rows that the recipe leaves out, by reason.
        embedding_scale: root mean square of a pretrained backbone's word embeddings; None for a small decoder.
    """

    samples: dict[Role, Sample]
    interactions: Interactions
    items: Items | None
    customers: Customers | None
    recipe: dict[str, Any]
    data: DataStats
    core: Core
    sizes: Sizes
    left_out: dict[str, int]
    embedding_scale: float | None


def create(folder: Path, options: InitOptions, machine: Machine, echo: Callable[[str], None]) -> Project:
    """Create a project and print a description of it with `echo`.

    Raises:
        CLLM4RecError: if the folder is in use, a file cannot be read, or a column cannot be guessed.
    """
    _require_new(folder)
    _require_paths(options)
    proposal = propose(folder.name, options, machine)
    project = Project(folder)
    texts = files.render(project, proposal, options.backbone)
    _write(project, texts)
    echo(files.describe(project, proposal, machine, options.backbone))
    return project


def propose(name: str, options: InitOptions, machine: Machine) -> Proposal:
    """Guess columns, and choose recipe and sizes for files of orders, items and customers."""
    embedding_scale = _embedding_scale(options.backbone)
    samples: dict[Role, Sample] = {"orders": _sample("orders", options.orders, options)}
    if options.items is not None:
        samples["items"] = _sample("items", options.items, options)
    if options.customers is not None:
        samples["customers"] = _sample("customers", options.customers, options)
    stats: dict[Role, dict[str, ColumnStats]] = {role: column_stats(sample) for role, sample in samples.items()}
    interactions = guess_interactions(
        samples["orders"], options.columns, _separate("items", samples, stats), _separate("customers", samples, stats)
    )
    item_ids = stats["orders"][interactions.item]
    items: Items | None = guess_items(_sample_with("items", samples), options.columns, item_ids)
    if options.items is None and items is not None and not (items.title or items.category or items.description):
        items = None
    customers = None
    if "customers" in samples:
        sample = _sample_with("customers", samples)
        customers = guess_customers(sample, options.columns, stats["orders"][interactions.user])
    recipe = _recipe(name, samples, interactions, items, customers)
    data, left_out = _data_stats(recipe, samples["orders"], options)
    core = choose_core(data)
    recipe |= {"min_user_items": core.min_user_items, "min_item_users": core.min_item_users}
    sizes = choose_sizes(data, machine)
    return Proposal(samples, interactions, items, customers, recipe, data, core, sizes, left_out, embedding_scale)


def _embedding_scale(backbone: str | None) -> float | None:
    """Import torch only for a pretrained backbone."""
    if backbone is None:
        return None
    from cllm4rec_dist.model.frozen_embeddings import embedding_scale

    return embedding_scale(Path(backbone))


def _sample_with(role: Role, samples: dict[Role, Sample]) -> Sample:
    """Return the sample with items or customers: the orders' sample if they have no separate file."""
    sample = samples.get(role)
    return samples["orders"] if sample is None or sample.path == samples["orders"].path else sample


def _separate(
    role: Role, samples: dict[Role, Sample], stats: dict[Role, dict[str, ColumnStats]]
) -> dict[str, ColumnStats]:
    """Return the columns of a role's file; none if it is the file of the orders."""
    sample = samples.get(role)
    return {} if sample is None or sample.path == samples["orders"].path else stats[role]


def _sample(role: Role, path: str, options: InitOptions) -> Sample:
    try:
        return read_sample(role, path, options.dialects[role])
    except DataError as error:
        raise _with_option(error) from None


def _with_option(error: DataError) -> DataError:
    """Add the options of `init` that set the keys of the recipe in the cure of an error."""
    keys = [key for key in ("separator", "quoting", "escape", "encoding", "time_format") if key in error.cure]
    options = ", ".join(f"--{key.replace('_', '-')}" for key in keys)
    cure = f"{error.cure.rstrip()} (cllm4rec init: {options})" if keys else error.cure
    return DataError(error.field, error.value, error.constraint, cure)


def _require_new(folder: Path) -> None:
    if is_project(folder):
        raise ConfigError(
            "name",
            str(folder),
            "is a project already",
            f"Continue with `cllm4rec run {folder}`, or choose another name.",
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is a file"
        raise ConfigError("name", str(folder), what, "Choose another name; nothing was changed.")


def _require_paths(options: InitOptions) -> None:
    for option, path in (("orders", options.orders), ("items", options.items), ("customers", options.customers)):
        if path is None or is_url(path) or any(letter in path for letter in "*?[") or Path(path).exists():
            continue
        raise DataError(f"--{option}", path, "does not exist", f"Correct the path.{did_you_mean_path(path)}")
    if options.backbone is not None and not (Path(options.backbone) / "config.json").is_file():
        hint = did_you_mean_path(options.backbone)
        raise ConfigError(
            "--backbone",
            options.backbone,
            "is no folder of a backbone (config.json)",
            f"Give one, or omit it for a small decoder.{hint}",
        )


def _recipe(
    name: str,
    samples: dict[Role, Sample],
    interactions: Interactions,
    items: Items | None,
    customers: Customers | None,
) -> dict[str, Any]:
    """Return the recipe as plain values, without defaults."""
    orders = _table(samples["orders"]) | {"user": interactions.user, "item": interactions.item}
    orders |= _without_none(
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
        source["items"] = _table(samples.get("items", samples["orders"])) | _without_none(
            item=items.item,
            title=items.title,
            category=category,
            description=list(items.description) or None,
            html=items.has_html or None,
        )
    if customers is not None and customers.text:
        source["users"] = _table(samples["customers"]) | _without_none(
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


def _without_none(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _table(sample: Sample) -> dict[str, Any]:
    """Return path and dialect of a file as keys of a recipe."""
    table: dict[str, Any] = {"path": sample.path.replace("$", "$$")}
    if sample.kind != "csv":
        return table | _without_none(encoding=sample.encoding)
    dialect = sample.dialect
    return table | _without_none(
        kind="csv" if dialect.names else None,
        names=None if dialect.names is None else list(dialect.names),
        separator=None if dialect.separator == "," else dialect.separator,
        quoting=None if dialect.quoting == "auto" else dialect.quoting,
        escape=dialect.escape,
        encoding=sample.encoding,
    )


def _data_stats(recipe: dict[str, Any], orders: Sample, options: InitOptions) -> tuple[DataStats, dict[str, int]]:
    """Return statistics of the data and counts of unusable rows by reason; of large files, from the sample alone."""
    config = validate(PrepareConfig, recipe, "recipe")
    if _num_bytes(options) > READ_BYTES:
        return _sampled(recipe, orders), {}
    try:
        raw = read_source(config.source)
    except DataError as error:
        raise _with_option(error) from None
    counts = {reason: count for reason, count in raw.log.counts.items() if "without interactions" not in reason}
    return _measured(raw, config.rating_threshold), counts


def _num_bytes(options: InitOptions) -> int:
    paths = dict.fromkeys(path for path in (options.orders, options.items, options.customers) if path is not None)
    total = 0
    for file in find_files(list(paths)):
        fs, path = fsspec.core.url_to_fs(file.path)
        with as_os_errors():
            total += int(fs.info(path)["size"])
    return total


def _measured(raw: RawData, threshold: float | None) -> DataStats:
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
    return DataStats(len(users), len(items), items, users, len(lengths), sum(lengths), best_counts=best)


def _sampled(recipe: dict[str, Any], orders: Sample) -> DataStats:
    columns = recipe["source"]["interactions"]
    pairs = orders.columns.select(columns["user"], columns["item"]).drop_nulls().unique()
    users, items = (
        pairs[columns[name]].value_counts()["count"].to_numpy().astype(np.int64) for name in ("user", "item")
    )
    has_texts = len(recipe["source"]) > 2
    return DataStats(len(users), len(items), items, users, len(items) * has_texts, 100 * len(items) * has_texts, True)


def _write(project: Project, texts: dict[Path, str]) -> None:
    """Write the folder with all of its files, or nothing."""
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
    """Make a local path absolute; a URL stays as it is."""
    return path if path is None or is_url(path) else str(Path(path).absolute())


def dialects(common: Dialect, names: dict[Role, tuple[str, ...] | None]) -> dict[Role, Dialect]:
    """Return the dialect of each file: the common one with the file's column names."""
    return {role: replace(common, names=columns) for role, columns in names.items()}
