"""A checkpoint in the formats of other programs: PEFT adapters (or a whole backbone), tables and external ids.

Written from the checkpoint's files alone, by one process and without building the model: the ranks' slices are put
together tensor by tensor.
"""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel

from cllm4rec_dist import checkpoint
from cllm4rec_dist.checkpoint import ADAPTER, Checkpoint
from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.errors import CheckpointError, ConfigError
from cllm4rec_dist.model.backbone import COLLABORATIVE, CONTENT, fingerprint, load_config, local_folder, lora_settings
from cllm4rec_dist.topology import World

logger = logging.getLogger(__name__)

TABLES_FILE = "tables.safetensors"
_PREFIX = "decoder."


def export(run: str, output: Path) -> list[str]:
    """Write a run's best checkpoint to a new folder; the names of what was written.

    `collaborative/` and `content/` are PEFT adapters on the backbone without its language-model head; where the
    backbone is trained whole, `backbone/` is a folder for `AutoModel.from_pretrained`. `tables.safetensors` holds the
    rows of users and items, fp32 [rows, d], in units of the backbone's embedding scale, in the order of users.parquet
    and items.parquet, and the small parameters that no rank shares out.

    Raises:
        CheckpointError: where no checkpoint is whole or the backbone has changed.
        ConfigError: where the output exists.
    """
    if output.exists():
        raise ConfigError("output", str(output), "exists", "Choose another folder, or remove it.")
    store, names = checkpoint.find(run)
    world = World(0, 1, 0, torch.device("cpu"))
    found = checkpoint.first_good(store, names, world, lambda opened: (_tensors(opened), _tables(opened)))
    if found is None:
        raise CheckpointError("checkpoint", run, "is damaged, and so is every other one there", "Use another run.")
    opened, (tensors, tables) = found
    config = validate(RunConfig, opened.about.config, f"{opened.path}: configuration")
    backbone = local_folder(config.backbone)
    if fingerprint(backbone) != opened.about.fingerprints["backbone"]:
        raise CheckpointError(
            "backbone", str(backbone), "is not the one that the checkpoint was trained on", "Bring that one back."
        )
    output.mkdir(parents=True)
    if config.adapter.kind == "lora":
        for name in (COLLABORATIVE, CONTENT):
            _write_adapter(config, backbone, tensors, name, output / name)
    elif config.adapter.kind == "full":
        decoder = AutoModel.from_pretrained(backbone, dtype=torch.float32, use_safetensors=True, local_files_only=True)
        decoder.load_state_dict({name.removeprefix(_PREFIX): value for name, value in tensors.items()}, strict=False)
        decoder.save_pretrained(output / "backbone")
    save_file(tables, output / TABLES_FILE)
    for file in ("users.parquet", "items.parquet"):
        shutil.copyfile(opened.file(file), output / file)
    logger.info("exported %s", opened.path)
    return sorted(path.name for path in output.iterdir())


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
    found = {}
    for llm in (COLLABORATIVE, CONTENT):
        for kind, size in (("users", opened.about.num_users), ("items", opened.about.num_items)):
            rows = opened.rows(f"{llm}.{kind}", size, 0, size)
            if rows is not None:
                found[f"{llm}.{kind}"] = rows
    return found


def _write_adapter(config: RunConfig, backbone: Path, tensors: dict[str, Tensor], name: str, folder: Path) -> None:
    settings = lora_settings(config.adapter, load_config(backbone).model_type)
    settings.base_model_name_or_path = config.backbone
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    weights = {
        f"base_model.model.{full.removeprefix(_PREFIX).replace(f'.{name}.', '.')}": value.contiguous()
        for full, value in tensors.items()
        if f".{name}." in full
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
