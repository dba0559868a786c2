"""A checkpoint in the formats of other programs: PEFT adapters (or a whole backbone), tables, item head, external ids.

Written from the checkpoint's files alone, by one process and without building the run's model: the ranks' slices are
put together tensor by tensor. The folder:

    collaborative/, content/             PEFT adapters that load into AutoModel and into AutoModelForCausalLM; content/
                                         where the run has a content LLM
    collaborative-causal-lm/, content-causal-lm/    the same as adapters of task_type CAUSAL_LM, for programs that go by
                                         it (AutoPeftModelForCausalLM) and for AutoModelForCausalLM alone
    backbone/                            instead of adapters, where the backbone is trained whole; for both classes
    tables.safetensors                   rows and head, see `export`
    users.parquet, items.parquet         external ids of the rows
    scoring.json                         how scores are computed from all these (`scoring.py`)

AutoModelForCausalLM nests the decoder below a prefix, and PEFT finds a weight by the name of its module. A weight under
another name is passed over with no more than a warning, so the adapters for both classes hold each weight under the
names of both: the word head must not be computed from a model without its adapter.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from cllm4rec_dist import checkpoint
from cllm4rec_dist.checkpoint import ADAPTER, Checkpoint
from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.tokenizer import WordTokenizer
from cllm4rec_dist.errors import CheckpointError, ConfigError
from cllm4rec_dist.export.scoring import describe_scoring
from cllm4rec_dist.model.backbone import COLLABORATIVE, CONTENT, fingerprint, load_config, local_folder, lora_settings
from cllm4rec_dist.topology import World
from cllm4rec_dist.trained_run import log_choice, recorded_config

logger = logging.getLogger(__name__)

TABLES_FILE, SCORING_FILE = "tables.safetensors", "scoring.json"
CAUSAL_LM = "-causal-lm"
"""Behind the names of the folders of adapters for AutoModelForCausalLM alone."""
_PREFIX = "decoder."


def export(run: str, output: Path, backbone: str | None = None, corpus: str | None = None) -> list[str]:
    """Write a run's best checkpoint to a new folder; the names of what was written.

    `tables.safetensors` holds `collaborative.users`, `collaborative.items` and, where the run has a content LLM,
    `content.users` and `content.items`: fp32 [rows, D], in units of the backbone's embedding scale, in the order of
    users.parquet and items.parquet; `collaborative.shared_user` and `content.shared_user` [D], where the run has them,
    stand for people without a row. Of the item head it holds `head.bias` [items] and `head.temperature` [], where the
    run has them.

    Args:
        backbone: where it is now, if not where the checkpoint says.
        corpus: a corpus that must be the run's; none is read otherwise.

    Raises:
        CheckpointError: where no checkpoint is whole, or the backbone or the corpus is another one.
        ConfigError: where the output exists, or the backbone is gone.
    """
    if output.exists():
        raise ConfigError("output", str(output), "exists", "Choose another folder, or remove it.")
    store, names = checkpoint.find(run)
    world = World(0, 1, 0, torch.device("cpu"))
    found = checkpoint.first_good(store, names, world, lambda opened: (_tensors(opened), _tables(opened)))
    if found is None:
        raise CheckpointError("checkpoint", run, "is damaged, and so is every other one there", "Use another run.")
    opened, (tensors, tables) = found
    config = recorded_config(opened, backbone, corpus or str(opened.about.config["corpus"]))
    folder = local_folder(config.backbone)
    decoder = load_config(folder)  # refuses a backbone that cannot be used
    tokenizer = WordTokenizer.load(folder)
    fingerprints = {"backbone": fingerprint(folder), "tokenizer": tokenizer.fingerprint}
    if corpus is not None:
        fingerprints["corpus"] = Corpus.open(corpus, verify=False).fingerprint
    checkpoint.require_same(opened, fingerprints)
    log_choice(store, names, opened)
    with _new_folder(output) as part:
        if config.adapter.kind == "lora":
            # Without a content LLM its adapter is there, as it started.
            llms = [llm for llm in (COLLABORATIVE, CONTENT) if f"{llm}.users" in tables]
            _write_adapters(config, folder, tensors, llms, part)
        elif config.adapter.kind == "full":
            _write_backbone(folder, tensors, part / "backbone")
        save_file(tables, part / TABLES_FILE)
        for file in ("users.parquet", "items.parquet"):
            shutil.copyfile(opened.file(file), part / file)
        scoring = describe_scoring(opened, config, tokenizer, decoder.vocab_size, tables)
        (part / SCORING_FILE).write_text(json.dumps(scoring, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    logger.info("exported %s", opened.path)
    return sorted(path.name for path in output.iterdir())


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


def _tensors(opened: Checkpoint) -> dict[str, Tensor]:
    """What the engine trains, whole, under the names that it has there."""
    found: dict[str, Tensor] = {}
    for name, shape in opened.about.shapes.items():
        flat = opened.rows(ADAPTER + name, math.prod(shape), 0, math.prod(shape))
        if flat is None:
            raise CheckpointError(opened.path, name, "is missing", "Use another checkpoint.")
        found[name] = flat.reshape(shape)
    return found


def _tables(opened: Checkpoint) -> dict[str, Tensor]:
    """User and item rows, and the parameters of the item head."""
    about, found = opened.about, {}
    for llm in (COLLABORATIVE, CONTENT):
        for kind, size in (("users", about.num_user_rows), ("items", about.num_items)):
            rows = opened.rows(f"{llm}.{kind}", size, 0, size)
            if rows is not None:
                found[f"{llm}.{kind}"] = rows
        if about.has_shared_user and f"{llm}.users" in found:
            users = found[f"{llm}.users"]
            found[f"{llm}.users"], found[f"{llm}.shared_user"] = users[:-1].contiguous(), users[-1].clone()
    bias = opened.rows("head.bias", about.num_items, 0, about.num_items)
    if bias is not None:
        found["head.bias"] = bias.flatten()
    log_temperature = opened.replicated().get("head.log_temperature")
    if log_temperature is not None:
        found["head.temperature"] = log_temperature.exp()
    return found


def _write_adapters(
    config: RunConfig, backbone: Path, tensors: dict[str, Tensor], llms: Sequence[str], output: Path
) -> None:
    """The adapters of `llms`, each for both model classes and for AutoModelForCausalLM alone."""
    decoder = load_config(backbone)
    with torch.device("meta"):
        prefix = f"{AutoModel.from_config(decoder).base_model_prefix}."
    for llm in llms:
        weights = {
            full.removeprefix(_PREFIX).replace(f".{llm}.", "."): value
            for full, value in tensors.items()
            if f".{llm}." in full
        }
        forms = ((llm, "FEATURE_EXTRACTION", ("", prefix)), (llm + CAUSAL_LM, "CAUSAL_LM", (prefix,)))
        for name, task_type, prefixes in forms:
            settings = lora_settings(config.adapter, decoder.model_type)
            settings.task_type = task_type
            settings.base_model_name_or_path = config.backbone
            settings.inference_mode = True
            settings.save_pretrained(str(output / name))
            # Cloned, as safetensors stores no memory under two names.
            named = {f"base_model.model.{p}{key}": value.clone() for p in prefixes for key, value in weights.items()}
            save_file(named, output / name / "adapter_model.safetensors", metadata={"format": "pt"})


def _write_backbone(backbone: Path, tensors: dict[str, Tensor], output: Path) -> None:
    """The backbone with its trained weights, its own word embeddings and word head, and its tokenizer."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        backbone, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    decoder = model.base_model
    kept = decoder.load_state_dict({name.removeprefix(_PREFIX): value for name, value in tensors.items()}, strict=False)
    assert not kept.unexpected_keys, kept.unexpected_keys
    if missing:
        logger.warning(
            "%s has no word head (%s): what is exported loads into AutoModel, and has none for AutoModelForCausalLM",
            backbone, ", ".join(missing),
        )  # fmt: skip
    (decoder if missing else model).save_pretrained(output)
    for file in backbone.glob("*token*"):
        shutil.copyfile(file, output / file.name)
