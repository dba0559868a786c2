"""`init` and `run`: from files of orders to a recommender, in one project folder."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from cllm4rec_dist.cli.child import BAD_INPUT, STOPPED, CommandEnded, run_command
from cllm4rec_dist.cli.corpus import make_backbone, make_corpus
from cllm4rec_dist.cli.frame import app
from cllm4rec_dist.cli.options import LIST_LENGTH, Workers, expanded, launcher_of_stages, parse_number
from cllm4rec_dist.config import path_override
from cllm4rec_dist.project.layout import Project
from cllm4rec_dist.project.pipeline import load_settings, require_project, run_stages, split_overrides
from cllm4rec_dist.project.sample import Role
from cllm4rec_dist.project.stages import Settings
from cllm4rec_dist.project.summary import summarize

_NAMES = "Column names of a CSV file without a header, comma-separated."


@app.command()
def init(
    name: Annotated[Path, typer.Argument(help="New folder of the project.", callback=expanded)],
    orders: Annotated[
        str,
        typer.Option(
            help="Orders, clicks or ratings: CSV, JSON, Parquet; a pattern or a folder of parts.", callback=expanded
        ),
    ],
    items: Annotated[
        str | None, typer.Option(help="Items with titles; may be the same file.", callback=expanded)
    ] = None,
    customers: Annotated[str | None, typer.Option(help="Customers with their attributes.", callback=expanded)] = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="Folder of a pretrained decoder; default: a small one is built.", callback=expanded),
    ] = None,
    user_column: Annotated[str | None, typer.Option(help="Orders' column of customer ids.")] = None,
    item_column: Annotated[str | None, typer.Option(help="Orders' column of item ids.")] = None,
    time_column: Annotated[str | None, typer.Option(help="Orders' column of times, or none.")] = None,
    time_format: Annotated[str | None, typer.Option(help="Format of the times, such as %d/%m/%Y %H:%M.")] = None,
    rating_column: Annotated[str | None, typer.Option(help="Orders' column of ratings, or none.")] = None,
    rating_threshold: Annotated[
        float | None, typer.Option(help="Lowest rating that counts as liked.", parser=parse_number, metavar="FLOAT")
    ] = None,
    review_column: Annotated[str | None, typer.Option(help="Orders' column of reviews, or none.")] = None,
    title_column: Annotated[str | None, typer.Option(help="Items' column of titles, or none.")] = None,
    category_column: Annotated[str | None, typer.Option(help="Items' column of categories, or none.")] = None,
    items_key: Annotated[str | None, typer.Option(help="Items' column of item ids.")] = None,
    customers_key: Annotated[str | None, typer.Option(help="Customers' column of customer ids.")] = None,
    separator: Annotated[str | None, typer.Option(help="Field separator of CSV files; detected by default.")] = None,
    quoting: Annotated[
        Literal["auto", "double", "none"], typer.Option(help="What a quotation mark means in CSV files.")
    ] = "auto",
    escape: Annotated[str | None, typer.Option(help="Escape character of CSV files, such as a backslash.")] = None,
    encoding: Annotated[
        str, typer.Option(help="Encoding of text files that are not UTF-8; detected by default.")
    ] = "auto",
    orders_names: Annotated[str | None, typer.Option(help=_NAMES)] = None,
    items_names: Annotated[str | None, typer.Option(help=_NAMES)] = None,
    customers_names: Annotated[str | None, typer.Option(help=_NAMES)] = None,
) -> None:
    """Propose a recipe and run files for your data: columns, formats and sizes are guessed, shown and explained.

    Nothing is trained. If a guess is unsure, a terminal prompts for it; otherwise the error names the option to set.
    """
    from cllm4rec_dist.corpus.sources.records import Dialect
    from cllm4rec_dist.project.create import InitOptions, absolute, create, dialects
    from cllm4rec_dist.project.guess import ColumnOptions, refuse
    from cllm4rec_dist.project.machine import this_machine

    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
    columns = ColumnOptions(
        user=user_column,
        item=item_column,
        time=time_column,
        rating=rating_column,
        review=review_column,
        title=title_column,
        category=category_column,
        items_key=items_key,
        customers_key=customers_key,
        time_format=time_format,
        rating_threshold=rating_threshold,
        choose=_prompt if sys.stdin.isatty() and sys.stdout.isatty() else refuse,
    )
    common = Dialect(separator.replace("\\t", "\t") if separator else None, quoting, escape, encoding)
    names: dict[Role, tuple[str, ...] | None] = {
        "orders": _split(orders_names),
        "items": _split(items_names),
        "customers": _split(customers_names),
    }
    orders_path = absolute(orders)
    assert orders_path is not None
    options = InitOptions(
        orders_path, absolute(items), absolute(customers), dialects(common, names), absolute(backbone), columns
    )
    create(name, options, this_machine(), typer.echo)


def _split(names: str | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(name.strip() for name in names.split(","))


def _prompt(option: str, question: str, names: Sequence[str]) -> str:
    """Prompt in the terminal until one of the names is chosen."""
    typer.echo(f"{option} {question}:")
    for index, name in enumerate(names, start=1):
        typer.echo(f"  {index}  {name}")
    while True:
        answer = typer.prompt("Number or name").strip()
        if answer.isdigit() and 1 <= int(answer) <= len(names):
            return names[int(answer) - 1]
        if answer in names:
            return answer
        typer.echo(f"{answer!r} is none of them.")


@app.command()
def run(
    name: Annotated[Path, typer.Argument(help="Folder of the project that `init` made.", callback=expanded)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings of both runs, or recipe.KEY=VALUE, backbone.KEY=VALUE, pretrain.KEY=VALUE,"
            " finetune.KEY=VALUE.",
            metavar="[KEY=VALUE]...",
        ),
    ] = None,
    launcher: Annotated[
        str, typer.Option("--launcher", help="process (one local rank), ray; auto: Ray if --workers is more than 1.")
    ] = "auto",
    workers: Workers = "1",
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="Items of each list.")] = LIST_LENGTH,
    redo: Annotated[
        bool,
        typer.Option(
            "--redo",
            help="Train again what is out of date; earlier runs are kept. If only the number of epochs grows, the run"
            " is resumed, with or without --redo.",
        ),
    ] = False,
) -> None:
    """Run the missing stages of a project: prepare, build-backbone, pretrain, finetune, evaluate, recommend.

    The same command resumes after a stop at any point. Stages whose file, recipe or setting has changed are reported
    and run again; a trained run is replaced only with --redo. With more epochs training resumes; with fewer than it has
    been trained for, the run is out of date.
    """
    stages = f"cllm4rec pretrain -c {name}/pretrain.yaml, cllm4rec finetune -c {name}/finetune.yaml"
    by_hand = f", or start the stages with that launcher: {stages}, cllm4rec evaluate {name}"
    chosen = launcher_of_stages(launcher, workers, "a project", by_hand)
    project = require_project(name)
    by_file = split_overrides(overrides or ())
    settings = load_settings(project, by_file, top)
    commands = _commands(project, settings, by_file, chosen, workers)
    command_line = _command_line(name, overrides or (), {"--launcher": launcher, "--workers": workers, "--top": top})
    again = f"{command_line} --redo" if redo else command_line
    try:
        run_stages(project, settings, commands, typer.echo, redo=redo, command_line=command_line)
    except KeyboardInterrupt:
        typer.echo(f"stopped: `{again}` resumes", err=True)
        raise typer.Exit(STOPPED) from None
    except CommandEnded as ended:
        first = "correct the input, then " if ended.status == BAD_INPUT else ""
        typer.echo(f"{ended}: {first}`{again}` resumes from there", err=True)
        raise typer.Exit(ended.status) from None
    typer.echo(summarize(project, settings, command_line))


_DEFAULTS = {"--launcher": "auto", "--workers": "1", "--top": LIST_LENGTH}


def _command_line(name: Path, overrides: Sequence[str], options: Mapping[str, str | int]) -> str:
    """Return the command as typed, for a shell; without an override the stages would be out of date."""
    given = [(option, str(value)) for option, value in options.items() if value != _DEFAULTS[option]]
    return shlex.join(["cllm4rec", "run", str(name), *overrides, *(part for pair in given for part in pair)])


def _commands(
    project: Project, settings: Settings, overrides: Mapping[str, Sequence[str]], launcher: str, workers: str
) -> dict[str, Callable[[], object]]:
    """Return the command of each stage, on the project's paths."""
    ranks = ["--launcher", launcher, "--workers", workers]
    trains = [*ranks, "--no-next"]  # the summary prints the next commands
    folder = settings.pretrain.backbone if settings.backbone is None else str(project.backbone)
    backbone = path_override("backbone", folder)
    first, second = str(project.pretrain_run), str(project.finetune_run)
    corpus = path_override("corpus", str(project.corpus))
    pretrain = [*overrides["pretrain"], corpus, backbone, path_override("output", first)]
    finetune = [*overrides["finetune"], corpus, backbone, path_override("output", second)]
    finetune.append(path_override("init_from", first))
    lists = str(project.recommendations)
    return {
        "build-backbone": partial(_build_backbone, project, settings),
        "prepare": partial(make_corpus, settings.recipe, folder, str(project.corpus), overwrite=True),
        "pretrain": partial(run_command, "pretrain", "--config", str(project.pretrain_file), *pretrain, *trains),
        "finetune": partial(run_command, "finetune", "--config", str(project.finetune_file), *finetune, *trains),
        "evaluate": partial(run_command, "evaluate", second, *ranks),
        "recommend": partial(run_command, "recommend", second, lists, "--top", str(settings.top), *ranks),
    }


def _build_backbone(project: Project, settings: Settings) -> None:
    assert settings.backbone is not None
    reading = logging.getLogger("cllm4rec_dist.corpus")
    level = reading.level
    reading.setLevel(logging.ERROR)  # `prepare` reads the same files next, and logs what it leaves out of them
    try:
        make_backbone(settings.recipe, settings.backbone, project.backbone)
    finally:
        reading.setLevel(level)
