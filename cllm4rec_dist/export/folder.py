"""Export of a checkpoint in standard formats: the folder that `cllm4rec export` writes.

    collaborative/, content/             PEFT adapters for AutoModel and AutoModelForCausalLM; content/ only if the run
                                         has a content LLM
    collaborative-causal-lm/, content-causal-lm/    the same with task_type CAUSAL_LM, for AutoModelForCausalLM only and
                                         programs that check it (AutoPeftModelForCausalLM)
    backbone/                            a fully trained backbone instead of adapters, for both classes
    tables.safetensors                   embeddings and item head, see `source.read_tables`
    users.parquet, items.parquet         external ids of the rows
    item_embeddings.parquet, user_embeddings.parquet    ids with vectors, items also with titles (`embeddings.py`)
    items.faiss                          optional: an exact index of the items' score vectors
    scoring.json                         how to compute scores from these files (`scoring.py`)

A folder to publish also has a model card (README.md), omits users unless requested, contains no local path, and
includes a backbone that is not on the hub, so that it is self-contained.
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
    new_item_offset: float | None = None,
) -> list[str]:
    """Write a run's best checkpoint to a new folder, and upload it if `options.push` is set.

    Args:
        options: what to write, by default everything but an index; must have passed `option_problems`.
        backbone: current path of the backbone, if it differs from the one in the checkpoint.
        corpus: likewise for the corpus, which provides titles and the model card.
        new_item_offset: offset of the item biases of new items, instead of the run's.

    Returns:
        names of the written files and folders.

    Raises:
        CheckpointError: if no checkpoint is intact, or the backbone or corpus has changed.
        ConfigError: if the output exists, the backbone is missing, or the hub refuses.
        CorpusError: if the corpus is missing and a folder to publish needs it.
    """
    options = options or ExportOptions()
    disable_progress_bar()  # transformers shows one per file
    require_none(output_problems(output), "export")
    source = open_source(
        run,
        backbone,
        corpus,
        new_item_offset=new_item_offset,
        base_model=options.base_model,
        needs_corpus=options.is_public,
    )
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
        _warn_missing_licenses(source, options, output / BACKBONE_FOLDER)


def _warn_missing_licenses(source: Source, options: ExportOptions, backbone: Path) -> None:
    """Log one warning for the licences that a folder to publish lacks."""
    missing = [] if options.license else ["the model card names none (--license apache-2.0)"]
    if backbone.is_dir() and not models.copy_licenses(source.backbone, backbone):
        missing.append(f"{source.backbone}, which is copied into the folder, has no licence file")
    if missing:
        logger.warning("no licence: %s; without one nobody else may use the published model", "; ".join(missing))


def _write_models(source: Source, options: ExportOptions, output: Path) -> str:
    """Write adapters or backbone; return the name under which a reader of the folder loads the backbone."""
    kind = source.config.adapter.kind
    if not options.is_public:
        backbone = source.config.backbone
    elif source.base_model is not None:
        backbone = source.base_model
    else:
        backbone = BACKBONE_FOLDER
        if kind != "full":
            logger.warning(
                "the backbone %s is copied into the folder with all of its weights; if it is on the hub, name it with"
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
    """Titles of the items; null for an item without one, or if there is no corpus."""
    if source.corpus is None:
        return pa.chunked_array([pa.nulls(source.opened.metadata.num_items, pa.string())])
    titles = source.corpus.items()["title"].cast(pa.string())
    return pc.if_else(pc.equal(titles, ""), None, titles)


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `output` at the end, so that a failed export leaves nothing."""
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
