"""A checkpoint in the formats of other programs: the folder that `cllm4rec export` writes.

    collaborative/, content/             PEFT adapters that load into AutoModel and into AutoModelForCausalLM; content/
                                         where the run has a content LLM
    collaborative-causal-lm/, content-causal-lm/    the same as adapters of task_type CAUSAL_LM, for programs that go by
                                         it (AutoPeftModelForCausalLM) and for AutoModelForCausalLM alone
    backbone/                            instead of adapters, where the backbone is trained whole; for both classes
    tables.safetensors                   rows and head, see `source.read_tables`
    users.parquet, items.parquet         external ids of the rows
    item_embeddings.parquet, user_embeddings.parquet    the same with titles and vectors (`embeddings.py`)
    items.faiss                          if asked for: an exact index of the items' score vectors
    scoring.json                         how scores are computed from all these (`scoring.py`)

A folder to publish has a model card too (README.md), leaves users out unless they are asked for, names no path of this
machine, and holds a backbone that is on no hub: it is complete by itself.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from safetensors.torch import save_file
from transformers.utils.logging import disable_progress_bar

from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.export import embeddings, hub, models
from cllm4rec_dist.export.card import write_card
from cllm4rec_dist.export.options import ExportOptions, output_problems
from cllm4rec_dist.export.scoring import BACKBONE_FOLDER, describe_scoring
from cllm4rec_dist.export.source import Source, open_source
from cllm4rec_dist.preflight import require_none

logger = logging.getLogger(__name__)

TABLES_FILE, SCORING_FILE, INDEX_FILE, CARD_FILE = "tables.safetensors", "scoring.json", "items.faiss", "README.md"


def export(
    run: str,
    output: Path,
    options: ExportOptions | None = None,
    backbone: str | None = None,
    corpus: str | None = None,
) -> list[str]:
    """Write a run's best checkpoint to a new folder, and upload it where `options.push` says so.

    Args:
        options: what is written, by default everything but an index; `option_problems` says what is wrong with them.
        backbone: where it is now, if not where the checkpoint says.
        corpus: where it is now, likewise. Titles and the model card are made of it.

    Returns:
        the names of what was written.

    Raises:
        CheckpointError: where no checkpoint is whole, or the backbone or the corpus is another one.
        ConfigError: where the output exists, the backbone is gone, or the hub refuses.
        CorpusError: where the corpus is gone and a folder to publish needs it.
    """
    options = options or ExportOptions()
    disable_progress_bar()  # of transformers, for each file
    require_none(output_problems(output), "export")
    source = open_source(run, backbone, corpus, base_model=options.base_model, needs_corpus=options.is_public)
    if options.push is not None:
        hub.create_repository(options.push, private=options.private)
    with _new_folder(output) as part:
        _write(source, options, part)
    logger.info("exported %s", source.opened.path)
    if options.push is not None:
        hub.upload(output, options.push)
    return sorted(path.name for path in output.iterdir())


def _write(source: Source, options: ExportOptions, output: Path) -> None:
    backbone = _write_models(source, options, output)
    tables = {name: rows for name, rows in source.tables.items() if options.includes_users or ".users" not in name}
    save_file(tables, output / TABLES_FILE)
    _write_ids_and_embeddings(source, options, output)
    scoring = describe_scoring(source, backbone, with_users=options.includes_users, with_paths=not options.is_public)
    (output / SCORING_FILE).write_text(json.dumps(scoring, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.is_public:
        write_card(source, options, scoring, output / CARD_FILE)
        _tell_missing_licenses(source, options, output / BACKBONE_FOLDER)


def _tell_missing_licenses(source: Source, options: ExportOptions, backbone: Path) -> None:
    """Say in one line which licences a folder to publish lacks."""
    missing = [] if options.license else ["the model card names none (--license apache-2.0)"]
    if backbone.is_dir() and not models.copy_licenses(source.backbone, backbone):
        missing.append(f"{source.backbone}, which goes into the folder, has no licence file")
    if missing:
        logger.warning("no licence: %s; without one nobody else may use what you publish", "; ".join(missing))


def _write_models(source: Source, options: ExportOptions, output: Path) -> str:
    """Adapters or backbone; the name by which the folder's reader finds the backbone."""
    kind = source.config.adapter.kind
    if not options.is_public:
        backbone = source.config.backbone
    elif source.base_model is not None:
        backbone = source.base_model
    else:
        backbone = BACKBONE_FOLDER
        if kind != "full":
            logger.warning(
                "the backbone %s goes into the folder with all of its weights; if it is one of the hub, name it by"
                " --base-model ORG/NAME instead",
                source.backbone,
            )
            models.copy_backbone(source.backbone, output / BACKBONE_FOLDER)
    if kind == "lora":
        models.write_adapters(source, backbone, output)
    elif kind == "full":
        models.write_trained_backbone(source, output / BACKBONE_FOLDER)
    return backbone


def _write_ids_and_embeddings(source: Source, options: ExportOptions, output: Path) -> None:
    opened, tables, similarity = source.opened, source.tables, source.config.head.similarity
    items, bias = tables["collaborative.items"], tables.get("head.bias")
    ids = opened.external_ids("items")
    shutil.copyfile(opened.file("items.parquet"), output / "items.parquet")
    embeddings.write_items(output / "item_embeddings.parquet", ids, _titles(source), items, bias, similarity)
    if options.faiss:
        embeddings.write_index(output / INDEX_FILE, items, bias, similarity)
    if options.includes_users:
        users = opened.external_ids("users")
        shutil.copyfile(opened.file("users.parquet"), output / "users.parquet")
        embeddings.write_users(output / "user_embeddings.parquet", users, tables["collaborative.users"])


def _titles(source: Source) -> pa.ChunkedArray:
    """Titles of the items; null where there is none, or no corpus to read it from."""
    if source.corpus is None:
        return pa.chunked_array([pa.nulls(source.opened.metadata.num_items, pa.string())])
    titles = source.corpus.items()["title"].cast(pa.string())
    return pc.if_else(pc.equal(titles, ""), None, titles)


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` when it is whole, so that a failed export is not in the way of the next."""
    part = output.absolute().with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        part.rename(output)
    except OSError as error:
        raise ConfigError("output", str(output), f"cannot be written ({error})", "Choose another folder.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
