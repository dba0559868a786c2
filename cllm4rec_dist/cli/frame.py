"""The Typer application, its entry point and its error handling."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, Any

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

For your own orders: **init** proposes a project, **run** does all of its missing steps.

Step by step: **prepare** raw data into a corpus, **pretrain**, **finetune**, **evaluate**, **recommend**, **serve**.
Without a pretrained decoder, build a small one first with **build-backbone**.

**settings** prints every setting of a run; each may be given as `section.key=value`.""",
)


def _show_version(is_given: bool) -> None:
    if is_given:
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
        raise ConfigError("command", name, "was renamed", f"Write cllm4rec {COMMANDS[name]}.")


def _require_options(arguments: list[str]) -> None:
    """Refuse a setting written as an option, and an option of another command. Typer reports other unknown ones."""
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    if not takes_settings(name):
        return
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    options = {other: _options_of(command) for other, command in group.commands.items()}
    elsewhere = {option: other for other in reversed(options) for option in options[other]}
    require_no_setting_flags(name, arguments[arguments.index(name) + 1 :], options[name] | {"--help"}, elsewhere)


def _options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. A `CLLM4RecError` is printed as one message and sets the exit status."""
    argv = sys.argv[1:] if arguments is None else arguments
    try:
        _require_new_command(argv)
        _require_options(argv)
        app(arguments)
    except CLLM4RecError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(error.exit_status)
