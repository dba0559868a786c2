"""How scores are computed from an exported run, for a program that has only the exported files and the backbone.

`scoring.json` says what `Composer.prediction`, `Recommender.item_queries` and `ItemHead` do, with the run's settings:

    prompt      tokens in order: a number is a word id of the backbone's tokenizer, "user" the user, "history" the items
    history     which items: the last `longest` of the user's, oldest first
    inputs      one embedding a token: the backbone's input embedding of a word, a row of collaborative.users or of
                collaborative.items
    user        what stands for somebody without a row: collaborative.shared_user, or a vector of zeros
    hidden      of the last token, behind the decoder's final norm, with `adapter.folder` loaded
    head        similarity, temperature, item_bias, pool_residual (`HeadConfig`); `formula` is the score by them
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from cllm4rec_dist.checkpoint import Checkpoint
from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.prompts import Composer
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.tokenizer import TokenSpace, WordTokenizer
from cllm4rec_dist.model.backbone import COLLABORATIVE

SCHEMA_VERSION = 1
SHARED_USER = f"{COLLABORATIVE}.shared_user"
"""Name of the shared user row among the exported tables, of runs that have one."""


def describe_scoring(
    opened: Checkpoint, config: RunConfig, tokenizer: WordTokenizer, num_words: int, tables: dict[str, Tensor]
) -> dict[str, Any]:
    """Contents of `scoring.json`.

    Args:
        num_words: rows of the backbone's word embeddings.
        tables: what is exported as `tables.safetensors`.
    """
    about, temperature = opened.about, tables.get("head.temperature")
    folders = {"lora": COLLABORATIVE, "full": "backbone", "none": None}
    return {
        "schema_version": SCHEMA_VERSION,
        "checkpoint": {"path": opened.path, "step": about.run.step, "stage": config.stage},
        "fingerprints": about.fingerprints,
        "corpus": config.corpus,
        "backbone": config.backbone,
        "precision": config.precision,
        "quantization": config.quantization,
        "adapter": {"kind": config.adapter.kind, "folder": folders[config.adapter.kind]},
        "prompt": _prompt(config, tokenizer, num_words),
        "history": {"longest": config.method.max_history, "order": "oldest first"},
        "user": {"without_row": SHARED_USER if SHARED_USER in tables else "zeros"},
        "head": {
            "similarity": config.head.similarity,
            "temperature": None if temperature is None else float(temperature),
            "item_bias": "head.bias" in tables,
            "pool_residual": config.head.pool_residual,
        },
        "formula": _formula(config, tables),
    }


def _prompt(config: RunConfig, tokenizer: WordTokenizer, num_words: int) -> list[int | str]:
    space = TokenSpace(num_words, 1, 1)
    composer = Composer(tokenizer, space, config.method, config.seed)
    documents = composer.prediction(np.zeros(1, np.int64), Ragged.from_lists([[0]]))
    slots = {space.first_user: "user", space.first_item: "history"}
    return [slots.get(token, token) for token in documents.tokens[0].tolist()]


def _formula(config: RunConfig, tables: dict[str, Tensor]) -> list[str]:
    """The score of item i, a line a step."""
    lines = ["q = hidden"]
    if config.head.pool_residual:
        lines.append("q = q + sqrt(D) * normalize(sum of collaborative.items over the history; zero where it is empty)")
    if config.head.similarity == "cosine":
        lines.append("score[i] = normalize(q) . normalize(collaborative.items[i]) / temperature")
    else:
        lines.append("score[i] = q . collaborative.items[i]")
    if "head.bias" in tables:
        lines[-1] += " + head.bias[i]"
    return lines
