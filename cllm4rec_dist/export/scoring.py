"""`scoring.json`: how to compute scores from the exported files and the backbone alone.

It describes `PromptBuilder.prediction`, `Recommender.item_queries` and `ItemHead` with the settings of the run:

    prompt      tokens in order: a token id of the backbone's tokenizer, "user" for the user, or "history" for the items
    history     the user's last `longest` items, oldest first, after all but the first of repeated items are left out
    users       names of the tables of user rows: `rows`, null in a folder to publish without users, and `without_row`,
                the row for anyone who has none
    inputs      one embedding per token: the backbone's input embedding, a user row, or a row of collaborative.items;
                user and item rows are first rounded to `rows_dtype`, then multiplied with the table
                `input_projection` if that is true
    hidden      hidden state of the last token after the decoder's final norm, with `adapter.folder` loaded
    head        similarity, temperature, item_bias, pool_residual, projection (`HeadConfig`)
    linear      weight of the linear memory's score, null without one
    formula     the resulting score
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cllm4rec_dist.checkpointing.format import LINEAR_WEIGHTS
from cllm4rec_dist.corpus.prompts import PromptBuilder
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.tokenizer import TokenSpace
from cllm4rec_dist.export.source import SHARED_USER, Source
from cllm4rec_dist.model.backbone import COLLABORATIVE
from cllm4rec_dist.model.item_head import SHORTEST_QUERY

SCHEMA_VERSION = 1
BACKBONE_FOLDER = "backbone"


def describe_scoring(source: Source, backbone: str, *, with_users: bool, with_paths: bool) -> dict[str, Any]:
    """Return the contents of `scoring.json`.

    Args:
        backbone: hub id, path, or folder in the export.
        with_users: True if users' rows are exported.
        with_paths: include the local paths of checkpoint and corpus.
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
        "history": {"longest": config.method.max_history, "order": "oldest first", "distinct": True},
        "users": {
            "rows": f"{COLLABORATIVE}.users" if with_users else None,
            "without_row": f"{COLLABORATIVE}.{SHARED_USER}",
        },
        "rows_dtype": config.embeddings.comm_dtype,
        "input_projection": "input_projection" in source.tables,
        "head": {
            "similarity": config.head.similarity,
            "temperature": None if temperature is None else float(temperature),
            "item_bias": "head.bias" in source.tables,
            "pool_residual": config.head.pool_residual,
            "projection": "head.projection" in source.tables,
        },
        "linear": {"weight": opened.metadata.run.linear_weight} if LINEAR_WEIGHTS in source.tables else None,
        "formula": _formula(source),
    }


def _prompt(source: Source) -> list[int | str]:
    space = TokenSpace(source.decoder.vocab_size, 1, 1)
    prompts = PromptBuilder(source.tokenizer, space, source.config.method, source.config.seed, source.config.stage)
    documents = prompts.prediction(np.zeros(1, np.int64), Ragged.from_lists([[0]]))
    slots = {space.first_user: "user", space.first_item: "history"}
    return [slots.get(token, token) for token in documents.tokens[0].tolist()]


def _formula(source: Source) -> list[str]:
    """The score of item i, one line per step, with D the width of hidden states and d that of rows."""
    projects = "head.projection" in source.tables
    lines = ["q = sqrt(D) * normalize(hidden) @ head.projection" if projects else "q = hidden"]
    if source.config.head.pool_residual:
        lines.append("q = q + sqrt(d) * normalize(sum of collaborative.items over the history; zero where it is empty)")
    if source.config.head.similarity == "cosine":
        direction = f"q / max(|q|, {SHORTEST_QUERY} * sqrt(d))" if projects else "normalize(q)"
        lines.append(f"score[i] = {direction} . normalize(collaborative.items[i]) / temperature")
    else:
        lines.append("score[i] = q . collaborative.items[i]")
    if "head.bias" in source.tables:
        lines[-1] += " + head.bias[i]"
    if LINEAR_WEIGHTS in source.tables:
        lines.append(
            "score[i] = score[i] + linear.weight * sum of linear.weights[i, k] over k with linear.neighbors[i, k] in"
            " the whole history, each item counted once"
        )
    return lines
