"""The `cllm4rec` command: thin entry points over the package.

Every command that computes runs under any launcher (see `launchers.py`). An error that input caused ends with its one
message and exit status 2, one that a fault caused with status 1; a run that was told to stop and has saved, with 75.
"""

from __future__ import annotations

import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from cllm4rec_dist import preflight
from cllm4rec_dist.config import BackboneConfig, RunConfig, load_config
from cllm4rec_dist.errors import CLLM4RecError, ConfigError
from cllm4rec_dist.filesystems import expand_path, is_url
from cllm4rec_dist.id_list import read_ids
from cllm4rec_dist.launchers import is_main, launch, ranks_are_elsewhere, require_launchable
from cllm4rec_dist.renames import COMMANDS

METRICS = "recall@20,recall@40,ndcg@100"
PathT = TypeVar("PathT", str, Path)


def _expanded(option: typer.CallbackParam, path: PathT | None) -> PathT | None:
    """A path of the command line with `~` and variables replaced, as in a run file: in quotes no shell does it."""
    if path is None:
        return None
    try:
        return type(path)(expand_path(str(path)))
    except ValueError as error:
        raise ConfigError(str(option.name), str(path), f"cannot be resolved: {error}", "Write $$ for $.") from None


class History(StrEnum):
    """What `recommend` takes for a user's history."""

    ALL = "all"
    TRAIN = "train"


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Train an LLM recommender (CLLM4Rec) on many GPUs, or on a laptop.

The way through: **prepare** raw data into a corpus, **pretrain**, **finetune**, **evaluate**, **recommend**. Without a
pretrained decoder at hand, **build-backbone** builds a small one first.

Every setting of a run is documented in `cllm4rec_dist/config.py` and may be given as `section.key=value`.""",
)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings, as section.key=value.", metavar="[KEY=VALUE]...")
]
ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", help="Run configuration, as in launch/configs/.", callback=_expanded)
]
RunArgument = Annotated[
    str, typer.Argument(help="Run folder (its best checkpoint) or checkpoint folder.", callback=_expanded)
]
LauncherOption = Annotated[
    str, typer.Option("--launcher", help="auto joins torchrun, deepspeed or srun and else starts Ray; ray; process.")
]
Workers = Annotated[
    str, typer.Option("--workers", "-w", help="Ranks that Ray starts: 8, or 4:8 for as many as there are of these.")
]
MaxFailures = Annotated[
    int, typer.Option("--max-failures", min=0, help="How often Ray starts again after a rank was lost.")
]
MetricNames = Annotated[str, typer.Option("--metrics", help="Comma-separated recall@K and ndcg@K.")]
Resume = Annotated[
    str | None,
    typer.Option(help="auto (default): go on from this run's newest good checkpoint; none; or a checkpoint or run."),
]
BackboneOption = Annotated[
    str | None,
    typer.Option("--backbone", help="Where the backbone is now, if not where the run says.", callback=_expanded),
]
CorpusOption = Annotated[
    str | None, typer.Option("--corpus", help="Where the corpus is now, if not where the run says.", callback=_expanded)
]
AllowLeak = Annotated[
    bool,
    typer.Option("--allow-leak", help="Go on from a run that was trained on held-out interactions; reports say so."),
]
BatchUsers = Annotated[int, typer.Option("--batch-users", min=1, help="Users ranked at a time by each rank.")]


@app.command()
def prepare(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file as in shards/.", callback=_expanded)],
    output: Annotated[str, typer.Argument(help="Corpus folder or fsspec URL to write.", callback=_expanded)],
    tokenizer: Annotated[
        str, typer.Option(help="Backbone folder whose tokenizer the texts are read with.", callback=_expanded)
    ],
    overwrite: Annotated[bool, typer.Option(help="Replace a corpus that is there.")] = False,
    workers: Annotated[
        int, typer.Option("--workers", "-w", min=1, help="Ray tasks that write shards at a time, here or on a cluster.")
    ] = 1,
    overrides: Overrides = None,
) -> None:
    """Build a corpus of raw data: read, filter, split, tokenize, write shards and a manifest."""
    if not is_url(output):
        preflight.require_none(preflight.folder_problems("output", output), "prepare")
    from cllm4rec_dist.corpus.prepare import prepare as build
    from cllm4rec_dist.corpus.recipe import PrepareConfig
    from cllm4rec_dist.corpus.tokenizer import WordTokenizer

    _log_alone()
    config = load_config(PrepareConfig, recipe, overrides or ())
    manifest = build(config, WordTokenizer.load(tokenizer), output, overwrite=overwrite, num_workers=workers)
    typer.echo(f"{output}: {manifest.num_users:,} users, {manifest.num_items:,} items")


@app.command("build-backbone")
def backbone(
    recipe: Annotated[Path, typer.Argument(help="Recipe whose texts the tokenizer is trained on.", callback=_expanded)],
    output: Annotated[Path, typer.Argument(help="Backbone folder to write.", callback=_expanded)],
    overrides: Overrides = None,
) -> None:
    """Build a small decoder with random weights and a tokenizer trained on a recipe's texts.

    Settings: family, hidden_size, num_layers, num_heads, vocab_size, max_positions, dropout, seed.
    """
    preflight.require_none(preflight.folder_problems("output", str(output)), "build-backbone")
    from cllm4rec_dist.corpus.recipe import PrepareConfig
    from cllm4rec_dist.corpus.sources import read_source
    from cllm4rec_dist.model.tiny import build_backbone

    _log_alone()
    if (output / "config.json").exists():
        raise ConfigError("output", str(output), "already holds a backbone", "Choose another folder or remove it.")
    config = load_config(BackboneConfig, None, overrides or ())
    raw = read_source(load_config(PrepareConfig, recipe).source)

    size = build_backbone(config, raw.texts(), output)
    typer.echo(f"{output}: {size:,} parameters")


@app.command()
def pretrain(
    config: ConfigFile,
    overrides: Overrides = None,
    launcher: LauncherOption = "auto",
    workers: Workers = "1",
    resume: Resume = None,
    max_failures: MaxFailures = 3,
    allow_leak: AllowLeak = False,
) -> None:
    """Mutually regularized pretraining of the collaborative and the content LLM. Resumes by itself."""
    _train("pretrain", config, overrides, launcher, workers, resume, max_failures, allow_leak)


@app.command()
def finetune(
    config: ConfigFile,
    overrides: Overrides = None,
    launcher: LauncherOption = "auto",
    workers: Workers = "1",
    resume: Resume = None,
    max_failures: MaxFailures = 3,
    allow_leak: AllowLeak = False,
) -> None:
    """Recommendation-oriented finetuning from a pretrained run (`init_from`). Resumes by itself."""
    _train("finetune", config, overrides, launcher, workers, resume, max_failures, allow_leak)


@app.command()
def plan(
    config: ConfigFile,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs that the run shall have, a rank on each.")],
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option("--gpu", help="a100-40, a100-80, h100, h200, l40s or rtx4090.")] = "h100",
    gpus_per_host: Annotated[int, typer.Option(min=1, help="GPUs that reach each other without the network.")] = 8,
    stage: Annotated[str | None, typer.Option(help="pretrain, or finetune; told by init_from if left out.")] = None,
    efficiency: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the GPU's peak that matrix products reach, assumed.")
    ] = 0.45,
    samples: Annotated[int, typer.Option(min=1, help="Steps of the corpus that are counted.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures.", callback=_expanded)] = None,
    backbone: BackboneOption = None,
    corpus: CorpusOption = None,
) -> None:
    """Tell what a run will need before it starts: memory by part, bytes on the wire, FLOPs, time, what to change.

    Starts nothing and loads no weights: the backbone's config.json, its tokenizer and the corpus are enough. Steps of
    the corpus are composed as the ranks would do it, and the model is run on tensors without values. Ends with status 3
    where the run does not fit.
    """
    import json

    from cllm4rec_dist.planning.hardware import find_gpu
    from cllm4rec_dist.planning.plan import Place, make_plan, ways_to_fit
    from cllm4rec_dist.planning.table import as_json, tell, tell_changes
    from cllm4rec_dist.trained_run import relocated

    read, problems = preflight.resolve_paths(
        load_config(RunConfig, config, [*(overrides or ()), f"stage={stage or 'pretrain'}"])
    )
    preflight.require_none(problems, "run")
    read = relocated(read, str(config), backbone, corpus)
    if stage is None and read.init_from is not None:
        read = read.model_copy(update={"stage": "finetune"})
    made = make_plan(read, Place(find_gpu(gpu), gpus, gpus_per_host, efficiency), samples)
    typer.echo(tell(made))
    changes = list(ways_to_fit(read, made, samples))
    if changes:
        typer.echo("\n" + tell_changes(changes, made.place.gpu.memory))
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(made, changes), indent=1) + "\n", encoding="utf-8")
    if not made.fits:
        raise typer.Exit(3)


def _train(
    stage: str, path: Path, overrides: list[str] | None, launcher: str, workers: str, resume: str | None,
    max_failures: int, allow_leak: bool,
) -> None:  # fmt: skip
    require_launchable(launcher, workers, os.environ)
    more = [f"stage={stage}", *([f"resume={resume}"] if resume else []), *(["allow_leak=true"] if allow_leak else [])]
    loaded, problems = preflight.resolve_paths(load_config(RunConfig, path, [*(overrides or ()), *more]))
    preflight.require_ready(
        loaded,
        problems,
        sees_files=not ranks_are_elsewhere(launcher, os.environ),
        writes_output=is_main(launcher, os.environ),
    )
    from cllm4rec_dist.interruption import EXIT_STATUS
    from cllm4rec_dist.train import TrainResult, resolve_resume, train

    config = resolve_resume(loaded, os.environ)
    result = launch(
        train, launcher, workers,
        collective_timeout_seconds=config.faults.collective_timeout_seconds, max_failures=max_failures, config=config,
    )  # fmt: skip
    if isinstance(result, TrainResult) and result.interrupted:
        raise typer.Exit(EXIT_STATUS)
    if is_main(launcher, os.environ):
        typer.echo(f"{stage} done: {config.output}")


@app.command()
def evaluate(
    run: RunArgument,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the report; RUN/evaluation if left out.", callback=_expanded)
    ] = None,
    split: Annotated[str, typer.Option(help="test or valid.")] = "test",
    metrics: MetricNames = METRICS,
    baselines: Annotated[bool, typer.Option(help="Fit popularity, EASE, title-aware EASE and iALS beside it.")] = True,
    backbone: BackboneOption = None,
    corpus: CorpusOption = None,
    batch_users: BatchUsers = 256,
    launcher: LauncherOption = "auto",
    workers: Workers = "1",
) -> None:
    """Rank the whole catalog for every user, print the metrics beside the baselines, write a report."""
    require_launchable(launcher, workers, os.environ)
    folder = output or Path(run) / "evaluation"
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    problems = preflight.metric_problems("--metrics", names) + _folder_problems("--output", folder, launcher)
    if split not in ("test", "valid"):
        problems.append(ConfigError("--split", split, "is neither test nor valid", "Leave it out for test."))
    preflight.require_none(problems, "evaluate")
    folder = folder.absolute()
    from cllm4rec_dist.inference import evaluate_run

    started = time.monotonic()
    launch(
        evaluate_run, launcher, workers,
        run=_trained(run), split=split, metrics=names, batch_users=batch_users, output=str(folder),
        baselines=baselines,
        **_moved(backbone, corpus),
    )  # fmt: skip
    if is_main(launcher, os.environ):
        from cllm4rec_dist.comparison import compare

        _log_alone()
        typer.echo(compare(folder, names, with_baselines=baselines, seconds=time.monotonic() - started))


@app.command()
def recommend(
    run: RunArgument,
    output: Annotated[Path, typer.Argument(help="Folder of the Parquet files to write.", callback=_expanded)],
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="Items for each user.")] = 100,
    user: Annotated[list[str] | None, typer.Option("--user", help="Only this user (may be repeated).")] = None,
    users_file: Annotated[
        Path | None, typer.Option(help="Only the users of this file, one id a line.", callback=_expanded)
    ] = None,
    history: Annotated[
        History, typer.Option(help="What a user's prompt shows and the list leaves out: all items, or train items.")
    ] = History.ALL,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Recommend items of the history too.")] = False,
    backbone: BackboneOption = None,
    corpus: CorpusOption = None,
    batch_users: BatchUsers = 256,
    launcher: LauncherOption = "auto",
    workers: Workers = "1",
) -> None:
    """Write each user's best items with scores as Parquet, by external ids.

    What a user has, held-out items included, is in the prompt and is left out of the list. A list that OUTPUT holds
    already is replaced.
    """
    require_launchable(launcher, workers, os.environ)
    preflight.require_none(_folder_problems("output", output, launcher), "recommend")
    chosen = None if user is None and users_file is None else list(user or ())
    if chosen is not None and users_file is not None:
        chosen += read_ids(users_file)
    from cllm4rec_dist.inference import recommend_users

    launch(
        recommend_users, launcher, workers,
        run=_trained(run), users=chosen, num_best=top, batch_users=batch_users, output=str(output.absolute()),
        history=history.value, include_seen=include_seen, **_moved(backbone, corpus),
    )  # fmt: skip


@app.command()
def export(
    run: RunArgument,
    output: Annotated[Path, typer.Argument(help="New folder to write.", callback=_expanded)],
    backbone: BackboneOption = None,
    corpus: CorpusOption = None,
) -> None:
    """Write a run for other programs: PEFT adapters or the backbone, tables, head, external ids."""
    preflight.require_none(preflight.folder_problems("output", str(output)), "export")
    from cllm4rec_dist.export import export

    _log_alone()
    typer.echo(f"exported to {output}: {', '.join(export(run, output, backbone, corpus))}")


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(help="Run folder that trained with audit=true.", callback=_expanded)],
) -> None:
    """Prove from its audit log that a run read every user and text exactly once, whatever befell it."""
    from cllm4rec_dist.audit import check
    from cllm4rec_dist.checkpoint import newest_step

    typer.echo(check(run, newest_step(run)).table())
    typer.echo("exactly once: yes")


def _trained(run: str) -> str:
    """Where the ranks find a run; refused before they start where there is nothing to find."""
    from cllm4rec_dist import checkpoint

    path = run if "://" in run else str(Path(run).absolute())
    checkpoint.find(path)
    return path


def _moved(backbone: str | None, corpus: str | None) -> dict[str, Any]:
    """Paths that override those of a checkpoint, for ranks that run in another folder; a hub id stays."""
    if backbone is not None and Path(backbone).is_dir():
        backbone = str(Path(backbone).absolute())
    if corpus is not None and not is_url(corpus):
        corpus = str(Path(corpus).absolute())
    return {"backbone": backbone, "corpus": corpus}


def _folder_problems(field: str, folder: Path, launcher: str) -> list[CLLM4RecError]:
    """Why results cannot be written there, as far as this process can tell."""
    if is_url(str(folder)) or not ranks_are_elsewhere(launcher, os.environ):
        return preflight.folder_problems(field, str(folder), "Give a local folder by --output.")
    return []


def _log_alone() -> None:
    import torch

    from cllm4rec_dist.log import setup_logging
    from cllm4rec_dist.topology import World

    setup_logging(World(0, 1, 0, torch.device("cpu")))


def _require_new_command(arguments: list[str]) -> None:
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    if name in COMMANDS:
        raise ConfigError("command", name, "has another name now", f"Write cllm4rec {COMMANDS[name]}.")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error of ours is one message and its exit status."""
    try:
        _require_new_command(sys.argv[1:] if arguments is None else arguments)
        app(arguments)
    except CLLM4RecError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(error.exit_status)
