"""How scores are computed from an exported run, for a program that has only the exported files and the backbone.

`scoring.json` says what `PromptBuilder.prediction`, `Recommender.item_queries` and `ItemHead` do, with the run's
settings:

    prompt      tokens in order: a number is a word id of the backbone's tokenizer, "user" the user, "history" the items
    history     which items: the last `longest` of the user's, oldest first
    users       where the rows of users are: `rows`, which a folder to publish leaves out (null), and `without_row`, the
                row for anyone who has none
    inputs      one embedding a token: the backbone's input embedding of a word, a row of a user, or a row of
                collaborative.items; rows are rounded to `rows_dtype` first
    hidden      of the last token, behind the decoder's final norm, with `adapter.folder` loaded
    head        similarity, temperature, item_bias, pool_residual (`HeadConfig`); `formula` is the score by them
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cllm4rec_dist.corpus.prompts import PromptBuilder
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.tokenizer import TokenSpace
from cllm4rec_dist.export.source import SHARED_USER, Source
from cllm4rec_dist.model.backbone import COLLABORATIVE

SCHEMA_VERSION = 1
BACKBONE_FOLDER = "backbone"


def describe_scoring(source: Source, backbone: str, *, with_users: bool, with_paths: bool) -> dict[str, Any]:
    """Contents of `scoring.json`.

    Args:
        backbone: hub id, path, or folder of the export that holds it.
        with_users: True where the users' rows are exported.
        with_paths: name checkpoint and corpus by their paths on this machine too.
    """
    opened, config, temperature = source.opened, source.config, source.tables.get("head.temperature")
    folders = {"lora": COLLABORATIVE, "full": BACKBONE_FOLDER, "none": None}
    checkpoint = {"name": opened.name, "step": opened.metadata.run.step, "stage": config.stage}
    corpus = source.corpus.manifest.name if source.corpus is not None else None
    return {
        "schema_version": SCHEMA_VERSION,
        "checkpoint": checkpoint | ({"path": opened.path} if with_paths else {}),
        "fingerprints": opened.metadata.fingerprints,
        "corpus": config.corpus if with_paths else corpus,
        "backbone": backbone,
        "precision": config.precision,
        "quantization": config.quantization,
        "adapter": {"kind": config.adapter.kind, "folder": folders[config.adapter.kind]},
        "prompt": _prompt(source),
        "history": {"longest": config.method.max_history, "order": "oldest first"},
        "users": {
            "rows": f"{COLLABORATIVE}.users" if with_users else None,
            "without_row": f"{COLLABORATIVE}.{SHARED_USER}",
        },
        "rows_dtype": config.embeddings.comm_dtype,
        "head": {
            "similarity": config.head.similarity,
            "temperature": None if temperature is None else float(temperature),
            "item_bias": "head.bias" in source.tables,
            "pool_residual": config.head.pool_residual,
        },
        "formula": _formula(source),
    }


def _prompt(source: Source) -> list[int | str]:
    space = TokenSpace(source.decoder.vocab_size, 1, 1)
    prompts = PromptBuilder(source.tokenizer, space, source.config.method, source.config.seed)
    documents = prompts.prediction(np.zeros(1, np.int64), Ragged.from_lists([[0]]))
    slots = {space.first_user: "user", space.first_item: "history"}
    return [slots.get(token, token) for token in documents.tokens[0].tolist()]


def _formula(source: Source) -> list[str]:
    """The score of item i, a line a step."""
    lines = ["q = hidden"]
    if source.config.head.pool_residual:
        lines.append("q = q + sqrt(D) * normalize(sum of collaborative.items over the history; zero where it is empty)")
    if source.config.head.similarity == "cosine":
        lines.append("score[i] = normalize(q) . normalize(collaborative.items[i]) / temperature")
    else:
        lines.append("score[i] = q . collaborative.items[i]")
    if "head.bias" in source.tables:
        lines[-1] += " + head.bias[i]"
    return lines
