"""`recommend` and `similar`: lists of items for users, baskets and items."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cllm4rec_dist import preflight
from cllm4rec_dist.cli.formats import Format
from cllm4rec_dist.cli.frame import app
from cllm4rec_dist.cli.options import (
    LIST_LENGTH,
    BackboneOption,
    BatchUsers,
    CorpusOption,
    NewItemOffset,
    RunArgument,
    ShortLauncher,
    Workers,
    announce,
    announce_printed,
    expanded,
    find_trained,
    moved_paths,
    output_problems,
    parse_number,
)
from cllm4rec_dist.cli.printed import (
    as_table,
    require_known_basket,
    require_printed_format,
    show,
    split_basket,
    warn_unknown,
)
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.launchers.imports import importing_libraries
from cllm4rec_dist.launchers.launch import ranks_are_elsewhere, require_launchable
from cllm4rec_dist.launchers.short_jobs import launch_short, runs_here
from cllm4rec_dist.serving.id_list import read_ids
from cllm4rec_dist.serving.known_ids import (
    LATER_ORDERS,
    NEW_ITEMS,
    KnownIds,
    find_item,
    read_known_ids,
    require_joined_items,
    unknown_error,
    warn_of_alike_users,
)
from cllm4rec_dist.serving.new_items import NewItem
from cllm4rec_dist.suggestions import plural


class KnownItems(StrEnum):
    """Items of the corpus that count as a user's items."""

    ALL = "all"
    TRAIN = "train"


TopOption = Annotated[int, typer.Option("--top", "-k", min=1, help="Items of a list.")]
NewItemsOption = Annotated[
    str | None,
    typer.Option(
        help="New products, known by their texts alone: CSV, JSON lines or Parquet with an id and a title or"
        " description in each row. They may be listed, and histories may have them. Products that the run has"
        " already are left out.",
        callback=expanded,
    ),
]
ShownFormat = Annotated[Format | None, typer.Option("--format", help="table (default), csv or jsonl.")]


@app.command(context_settings={"allow_extra_args": True})  # for a better message
def recommend(
    context: typer.Context,
    run: RunArgument,
    output: Annotated[
        Path | None,
        typer.Argument(
            help="Folder to write; if omitted, the list of --basket or of one --user is printed.", callback=expanded
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option("--top", "-k", min=1, help=f"Items of a list; {LIST_LENGTH} in files, 10 if printed."),
    ] = None,
    user: Annotated[list[str] | None, typer.Option("--user", help="Only this user (may be repeated).")] = None,
    users_file: Annotated[
        Path | None, typer.Option(help="Only the users in this file, one id per line.", callback=expanded)
    ] = None,
    history: Annotated[
        str | None,
        typer.Option(
            help="Later orders: CSV, JSON lines or Parquet with a user, an item and optionally a time in each row."
            " Lists are made for its users, new ones included, unless others are named.",
            callback=expanded,
        ),
    ] = None,
    user_column: Annotated[str | None, typer.Option(help="Column of --history with user ids.")] = None,
    item_column: Annotated[str | None, typer.Option(help="Column of --history with item ids.")] = None,
    time_column: Annotated[str | None, typer.Option(help="Column of --history with times.")] = None,
    time_format: Annotated[
        str | None, typer.Option(help="Format of the times of --history, such as %d/%m/%Y %H:%M.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Field separator of --history, if it is CSV; detected by default.")
    ] = None,
    encoding: Annotated[str | None, typer.Option(help="Encoding of --history; detected by default.")] = None,
    new_items: NewItemsOption = None,
    basket: Annotated[
        list[str] | None,
        typer.Option("--basket", help="Items A,B that a user has; prints their list. Quote blanks: 'A, B'."),
    ] = None,
    known_items: Annotated[
        KnownItems, typer.Option(help="Items of the corpus that count as a user's items: all, or train.")
    ] = KnownItems.ALL,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Also list items of the history.")] = False,
    exclude_file: Annotated[
        Path | None, typer.Option(help="Items never to list (sold out), one id per line.", callback=expanded)
    ] = None,
    items_file: Annotated[
        Path | None, typer.Option(help="List only these items (a category), one id per line.", callback=expanded)
    ] = None,
    min_score: Annotated[
        float | None, typer.Option(help="Leave out items with a lower score.", parser=parse_number, metavar="FLOAT")
    ] = None,
    skip_unknown_users: Annotated[
        bool, typer.Option("--skip-unknown-users", help="Leave out and count unknown users.")
    ] = False,
    titles: Annotated[bool, typer.Option("--titles", help="Also write the items' titles.")] = False,
    file_format: Annotated[
        Format | None,
        typer.Option("--format", help="Files: parquet (default), csv or jsonl. Printed: table, csv or jsonl."),
    ] = None,
    new_item_offset: NewItemOffset = None,
    backbone: BackboneOption = None,
    corpus: CorpusOption = None,
    batch_users: BatchUsers = 256,
    launcher: ShortLauncher = "auto",
    workers: Workers = "1",
) -> None:
    """Write each user's top items with scores, by external ids; or print the list of one basket or user.

    All items of a user, held-out ones included, are in the prompt and are left out of the list. Lists are in the order
    of --user and --users-file, else of --history, else of the corpus. Lists already in OUTPUT are replaced.
    """
    require_launchable(launcher, workers, os.environ)
    _require_one_destination(output, context.args, basket)
    _require_new_history(history)
    if min_score is not None and min_score != min_score:
        raise ConfigError("--min-score", min_score, "must be a number", "Leave it out for no limit.")
    exclude, only = _item_ids(exclude_file, "--exclude-file"), _item_ids(items_file, "--items-file")
    if only is not None and not only:
        raise DataError("--items-file", str(items_file), "has no ids", "Write one id per line, or omit the option.")
    _require_history(
        history,
        {
            "--user-column": user_column,
            "--item-column": item_column,
            "--time-column": time_column,
            "--time-format": time_format,
            "--separator": separator,
            "--encoding": encoding,
        },
    )
    if output is None:
        _require_printable(
            run, basket, user, users_file, history, file_format, known_items, skip_unknown_users=skip_unknown_users
        )
        options = {"top": top or 10, "min_score": min_score, "include_seen": include_seen}
        _print_list(
            run, basket or (), user, exclude, only, options, file_format, backbone, corpus, new_items, new_item_offset
        )
        return
    problems = output_problems("output", output, launcher)
    if file_format is Format.TABLE:
        problems.append(ConfigError("--format", "table", "is for the terminal", "Write parquet, csv or jsonl."))
    preflight.require_none(problems, "recommend")
    users = None if user is None and users_file is None else list(user or ())
    if users is not None and users_file is not None:
        users += read_ids(users_file, "--users-file")
    run_path = find_trained(run)
    announce(f"recommend: reading {run}, importing torch", launcher)
    is_here = not ranks_are_elsewhere(launcher, os.environ) or runs_here(launcher, workers, os.environ)
    known_ids = read_known_ids(run_path, corpus) if is_here else None
    products = _read_new_items(new_items, known_ids)
    if known_ids is not None:
        known_ids = known_ids.with_new(products)
    orders = None
    if history is not None:
        from cllm4rec_dist.serving.history_file import HistoryFormat, read_histories

        separator = separator.replace("\\t", "\t") if separator else None
        history_format = HistoryFormat(user_column, item_column, time_column, time_format, separator, encoding)
        orders = read_histories(history, history_format, known_ids.order_columns if known_ids is not None else None)
    if known_ids is not None:
        _require_known(known_ids, users, orders or {}, only, exclude, skip_unknown_users=skip_unknown_users)
    del known_ids  # of a million users and items they take 0.3 GB
    with importing_libraries():
        from cllm4rec_dist.serving.bulk import BulkRequest, recommend_users

    request = BulkRequest(
        top=top or LIST_LENGTH,
        users=users,
        orders=orders,
        skip_unknown_users=skip_unknown_users,
        known_items=known_items.value,
        exclude=exclude or frozenset(),
        only=only,
        min_score=min_score,
        include_seen=include_seen,
        titles=titles,
        file_format=(file_format or Format.PARQUET).value,  # type: ignore[arg-type]
        batch_users=batch_users,
        new_items=products,
    )
    launch_short(
        recommend_users,
        launcher,
        workers,
        run=run_path,
        request=request,
        output=str(output.absolute()),
        new_item_offset=new_item_offset,
        **moved_paths(backbone, corpus),
    )


@app.command()
def similar(
    run: RunArgument,
    item: Annotated[str, typer.Argument(help="Item id, or words that only one item has in its title.")],
    top: TopOption = 10,
    new_items: NewItemsOption = None,
    file_format: ShownFormat = None,
    backbone: BackboneOption = None,
    corpus: CorpusOption = None,
) -> None:
    """Print the items with the trained embeddings nearest to that of an item, by cosine similarity."""
    require_printed_format(file_format)
    run_path = find_trained(run)
    known_ids = read_known_ids(run_path, corpus)
    products = _read_new_items(new_items, known_ids)
    chosen = find_item("ITEM", item, known_ids.with_new(products).items)
    del known_ids
    announce_printed(f"similar: reading {run}, importing torch")
    with importing_libraries():
        from cllm4rec_dist.serving.recommender import Recommender

    recommender = Recommender.load(run_path, **moved_paths(backbone, corpus)).with_feed(products, NEW_ITEMS)
    show(recommender.similar(chosen, top), file_format)


def _print_list(
    run: str,
    basket: Sequence[str],
    user: Sequence[str] | None,
    exclude: frozenset[str] | None,
    only: frozenset[str] | None,
    options: Mapping[str, Any],
    file_format: Format | None,
    backbone: str | None,
    corpus: str | None,
    new_items: str | None,
    new_item_offset: float | None,
) -> None:
    """Print the list of a basket or a user."""
    run_path = find_trained(run)
    known_ids = read_known_ids(run_path, corpus)
    products = _read_new_items(new_items, known_ids)
    known_ids = known_ids.with_new(products)
    _require_known(known_ids, user, {}, only, exclude, skip_unknown_users=False)
    items = split_basket(basket, known_ids.items)
    if user is None:
        require_known_basket(items, known_ids.items)
    warn_unknown("--basket", items, known_ids.items)
    del known_ids
    announce_printed(f"recommend: reading {run}, importing torch")
    with importing_libraries():
        from cllm4rec_dist.serving.queries import Query
        from cllm4rec_dist.serving.recommender import Recommender

    recommender = Recommender.load(run_path, new_item_offset=new_item_offset, **moved_paths(backbone, corpus))
    recommender = recommender.with_feed(products, NEW_ITEMS)
    query = Query(items, user[0] if user else None, exclude=exclude or frozenset(), only=only, **options)
    (answer,) = recommender.answer([query])
    if answer.fallback:
        typer.echo("no known item in the history: popular items, without a score", err=True)
    show(as_table(answer), file_format)
    if len(answer.items) < query.top:
        typer.echo(f"{len(answer.items)} of {plural(query.top, 'item')}: no more are left", err=True)


def _read_new_items(path: str | None, known_ids: KnownIds | None) -> tuple[NewItem, ...]:
    if path is None:
        return ()
    from cllm4rec_dist.serving.feed import new_products
    from cllm4rec_dist.serving.new_item_file import read_new_items

    if known_ids is None:  # the ranks leave out what cannot be added
        return tuple(read_new_items(path))
    return new_products(NEW_ITEMS, read_new_items(path, known_ids.item_columns), known_ids.items)


def _item_ids(path: Path | None, option: str) -> frozenset[str] | None:
    return None if path is None else frozenset(read_ids(path, option))


def _require_one_destination(output: Path | None, more: Sequence[str], basket: Sequence[str] | None) -> None:
    """Refuse arguments after OUTPUT, and OUTPUT with a basket: it is often the rest of one typed with blanks."""
    extra = [*([] if output is None else [str(output)]), *more]
    if basket and extra and any(text.rstrip().endswith(",") for text in basket):
        what = f"ends at the blank after its comma, so {', '.join(map(repr, extra))} is not in it"
        raise ConfigError("--basket", list(basket), what, "Write --basket A,B or, in quotes, --basket 'A, B'.")
    if more:
        raise ConfigError("OUTPUT", extra, "must be one folder", "Write RUN OUTPUT, with quotes around blanks.")
    if basket and output is not None:
        raise ConfigError("--basket", list(basket), "is printed, not written to OUTPUT", "Leave OUTPUT out.")


def _require_history(history: str | None, options: Mapping[str, str | None]) -> None:
    """Refuse options for `--history` without `--history`."""
    for option, value in options.items():
        if history is None and value:
            raise ConfigError(option, value, "is about --history", "Give --history FILE too.")


def _require_new_history(history: str | None) -> None:
    """Refuse the values that `--history` took in an earlier version."""
    if history in ("all", "train") and not Path(history).exists():
        raise ConfigError(
            "--history", history, "is no file of later orders", f"The option was renamed: --known-items {history}."
        )


def _require_printable(
    run: str,
    basket: list[str] | None,
    user: list[str] | None,
    users_file: Path | None,
    history: str | None,
    file_format: Format | None,
    known_items: KnownItems,
    *,
    skip_unknown_users: bool,
) -> None:
    """Refuse a call without OUTPUT for several lists or with options for files."""
    if not basket and (user is None or len(user) > 1 or users_file is not None or history is not None):
        raise ConfigError(
            "RUN", run, "has no OUTPUT after it", "Give a folder for lists, or --basket A,B or one --user to print one."
        )
    for_files = {
        "--user": user if user is not None and len(user) > 1 else None,
        "--users-file": users_file,
        "--history": history,
        "--known-items": known_items.value if known_items is KnownItems.TRAIN else None,
        "--skip-unknown-users": skip_unknown_users or None,
    }
    for option, value in for_files.items():
        if value is not None:
            cure = "Give OUTPUT too, without --basket." if basket else "Give OUTPUT too."
            raise ConfigError(option, str(value), "is for lists that are written to OUTPUT", cure)
    require_printed_format(file_format)


def _require_known(
    known_ids: KnownIds,
    users: Sequence[str] | None,
    orders: Mapping[str, Sequence[str]],
    only: frozenset[str] | None,
    exclude: frozenset[str] | None,
    *,
    skip_unknown_users: bool,
) -> None:
    """Refuse unknown users and an `--items-file` without a known item; print other unknown items."""
    if users is not None and not skip_unknown_users:
        known_users = set(known_ids.users)
        unknown_users = [name for name in dict.fromkeys(users) if name not in known_users and name not in orders]
        if unknown_users:
            raise unknown_error("users", unknown_users, known_ids.users, "user", LATER_ORDERS)
    warn_of_alike_users("--history", orders, known_ids.users)
    require_joined_items("--history", (item for items in orders.values() for item in items), known_ids.items)
    known_items = set(known_ids.items.ids)
    if only is not None and not only & known_items:
        cure = "Give ids of the catalog, one per line."
        raise unknown_error("--items-file", sorted(only), known_ids.items.ids, "item", cure)
    for option, ids in (("--items-file", only), ("--exclude-file", exclude)):
        unknown = sorted((ids or frozenset()) - known_items)
        if unknown:
            typer.echo(f"{option}: {plural(len(unknown), 'item')} unknown to the run, such as {unknown[0]!r}", err=True)
