"""The application that commands are added to, and how it ends."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer
import typer.core

from cllm4rec_dist.cli.setting_flags import require_no_setting_flags, takes_settings
from cllm4rec_dist.config.renames import COMMANDS
from cllm4rec_dist.errors import CLLM4RecError, ConfigError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Train an LLM recommender (CLLM4Rec) on many GPUs, or on a laptop.

With your own orders: **init** proposes a project, **run** does everything that is missing of it.

Step by step: **prepare** raw data into a corpus, **pretrain**, **finetune**, **evaluate**, **recommend**, **serve**.
Without a pretrained decoder at hand, **build-backbone** builds a small one first.

**settings** prints every setting of a run; each may be given as `section.key=value`.""",
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"cllm4rec_dist {version('cllm4rec_dist')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _require_new_command(arguments: list[str]) -> None:
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    if name in COMMANDS:
        raise ConfigError("command", name, "has another name now", f"Write cllm4rec {COMMANDS[name]}.")


def _require_options(arguments: list[str]) -> None:
    """Refuse a setting that is written as an option; of other options that there are not, typer says so."""
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    if not takes_settings(name):
        return
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    options = {option for parameter in group.commands[name].params for option in parameter.opts}
    options |= {option for parameter in group.commands[name].params for option in parameter.secondary_opts}
    require_no_setting_flags(name, arguments[arguments.index(name) + 1 :], options | {"--help"})


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error of ours is one message and its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        _require_new_command(given)
        _require_options(given)
        app(arguments)
    except CLLM4RecError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(error.exit_status)
