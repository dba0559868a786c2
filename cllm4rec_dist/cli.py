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
from typing import Annotated, Any

import typer

from cllm4rec_dist.config import BackboneConfig, RunConfig, load_config
from cllm4rec_dist.errors import CLLM4RecError, ConfigError
from cllm4rec_dist.id_list import read_ids
from cllm4rec_dist.launchers import launch

METRICS = "recall@20,recall@40,ndcg@100"


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
pretrained decoder at hand, **backbone** builds a small one first.

Every setting of a run is documented in `cllm4rec_dist/config.py` and may be given as `section.key=value`.""",
)

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings, as section.key=value.", metavar="[KEY=VALUE]...")
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
    str | None, typer.Option("--backbone", help="Where the backbone is now, if not where the run says.")
]
CorpusOption = Annotated[
    str | None, typer.Option("--corpus", help="Where the corpus is now, if not where the run says.")
]
AllowLeak = Annotated[
    bool,
    typer.Option("--allow-leak", help="Go on from a run that was trained on held-out interactions; reports say so."),
]
BatchUsers = Annotated[int, typer.Option("--batch-users", min=1, help="Users ranked at a time by each rank.")]


@app.command()
def prepare(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file as in shards/.")],
    output: Annotated[str, typer.Argument(help="Corpus folder or fsspec URL to write.")],
    tokenizer: Annotated[str, typer.Option(help="Backbone folder whose tokenizer the texts are read with.")],
    overwrite: Annotated[bool, typer.Option(help="Replace a corpus that is there.")] = False,
    workers: Annotated[
        int, typer.Option("--workers", "-w", min=1, help="Ray tasks that write shards at a time, here or on a cluster.")
    ] = 1,
    overrides: Overrides = None,
) -> None:
    """Build a corpus of raw data: read, filter, split, tokenize, write shards and a manifest."""
    from cllm4rec_dist.corpus.prepare import prepare as build
    from cllm4rec_dist.corpus.recipe import PrepareConfig
    from cllm4rec_dist.corpus.tokenizer import WordTokenizer

    _log_alone()
    config = load_config(PrepareConfig, recipe, overrides or ())
    manifest = build(config, WordTokenizer.load(tokenizer), output, overwrite=overwrite, num_workers=workers)
    typer.echo(f"{output}: {manifest.num_users:,} users, {manifest.num_items:,} items")


@app.command()
def backbone(
    recipe: Annotated[Path, typer.Argument(help="Recipe whose texts the tokenizer is trained on.")],
    output: Annotated[Path, typer.Argument(help="Backbone folder to write.")],
    overrides: Overrides = None,
) -> None:
    """Build a small decoder with random weights and a tokenizer trained on a recipe's texts.

    Settings: family, hidden, layers, heads, words, max_positions, dropout, seed.
    """
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
    config: Annotated[Path, typer.Option("--config", "-c", help="Run configuration, as in launch/configs/.")],
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
    config: Annotated[Path, typer.Option("--config", "-c", help="Run configuration, as in launch/configs/.")],
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
    config: Annotated[Path, typer.Option("--config", "-c", help="Run configuration, as in launch/configs/.")],
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs that the run shall have, a rank on each.")],
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option("--gpu", help="a100-40, a100-80, h100, h200, l40s or rtx4090.")] = "h100",
    gpus_per_host: Annotated[int, typer.Option(min=1, help="GPUs that reach each other without the network.")] = 8,
    stage: Annotated[str | None, typer.Option(help="pretrain, or finetune; told by init_from if left out.")] = None,
    efficiency: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the GPU's peak that matrix products reach, assumed.")
    ] = 0.45,
    samples: Annotated[int, typer.Option(min=1, help="Steps of the corpus that are counted.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures.")] = None,
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

    read = load_config(RunConfig, config, [*(overrides or ()), f"stage={stage or 'pretrain'}"])
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
    from cllm4rec_dist.interruption import EXIT_STATUS
    from cllm4rec_dist.train import TrainResult, resolve_resume, train

    more = [f"stage={stage}", *([f"resume={resume}"] if resume else []), *(["allow_leak=true"] if allow_leak else [])]
    loaded = load_config(RunConfig, path, [*(overrides or ()), *more])
    config = resolve_resume(_with_absolute_paths(loaded), os.environ)
    result = launch(
        train, launcher, workers, Path(config.output) / "ray",
        hang_seconds=config.faults.hang_seconds, max_failures=max_failures, config=config,
    )  # fmt: skip
    if isinstance(result, TrainResult) and result.interrupted:
        raise typer.Exit(EXIT_STATUS)
    if _is_main():
        typer.echo(f"{stage} done: {config.output}")


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    paths = {name: _absolute(getattr(config, name)) for name in ("corpus", "output", "init_from", "deepspeed")}
    if Path(config.backbone).is_dir():
        paths["backbone"] = _absolute(config.backbone)
    checkpoint = config.checkpoint.model_copy(update={"folder": _absolute(config.checkpoint.folder)})
    return config.model_copy(update={**paths, "checkpoint": checkpoint})


def _absolute(path: str | None) -> str | None:
    """Ray's workers run in a folder of their own, so local paths are made absolute; URLs stay."""
    return path if path is None or "://" in path else str(Path(path).absolute())


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="Run folder (its best checkpoint) or checkpoint folder.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the report; RUN/evaluation if left out.")] = None,
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
    from cllm4rec_dist.inference import evaluate_run

    folder = (output or Path(run) / "evaluation").absolute()
    names = [name.strip() for name in metrics.split(",")]
    started = time.monotonic()
    launch(
        evaluate_run, launcher, workers, folder / "ray",
        run=_trained(run), split=split, metrics=names, batch_users=batch_users, output=str(folder),
        **_moved(backbone, corpus),
    )  # fmt: skip
    if _is_main():
        from cllm4rec_dist.comparison import compare

        _log_alone()
        typer.echo(compare(folder, names, with_baselines=baselines, seconds=time.monotonic() - started))


@app.command()
def recommend(
    run: Annotated[str, typer.Argument(help="Run folder (its best checkpoint) or checkpoint folder.")],
    output: Annotated[Path, typer.Argument(help="Folder of the Parquet files to write.")],
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="Items for each user.")] = 100,
    user: Annotated[list[str] | None, typer.Option("--user", help="Only this user (may be repeated).")] = None,
    users_file: Annotated[Path | None, typer.Option(help="Only the users of this file, one id a line.")] = None,
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
    chosen = None if user is None and users_file is None else list(user or ())
    if chosen is not None and users_file is not None:
        chosen += read_ids(users_file)
    from cllm4rec_dist.inference import recommend_users

    launch(
        recommend_users, launcher, workers, output.absolute() / "ray",
        run=_trained(run), users=chosen, num_best=top, batch_users=batch_users, output=str(output.absolute()),
        history=history.value, include_seen=include_seen, **_moved(backbone, corpus),
    )  # fmt: skip


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Run folder (its best checkpoint) or checkpoint folder.")],
    output: Annotated[Path, typer.Argument(help="New folder to write.")],
    backbone: BackboneOption = None,
    corpus: CorpusOption = None,
) -> None:
    """Write a run for other programs: PEFT adapters or the backbone, tables, head, external ids."""
    from cllm4rec_dist.export import export

    _log_alone()
    typer.echo(f"exported to {output}: {', '.join(export(run, output, backbone, corpus))}")


@app.command()
def audit(run: Annotated[Path, typer.Argument(help="Run folder that trained with audit=true.")]) -> None:
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
    local = backbone is not None and Path(backbone).is_dir()
    return {"backbone": _absolute(backbone) if local else backbone, "corpus": _absolute(corpus)}


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _log_alone() -> None:
    import torch

    from cllm4rec_dist.log import setup_logging
    from cllm4rec_dist.topology import World

    setup_logging(World(0, 1, 0, torch.device("cpu")))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error of ours is one message and its exit status."""
    try:
        app(arguments)
    except CLLM4RecError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(error.exit_status)
