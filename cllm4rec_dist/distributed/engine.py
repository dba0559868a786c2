"""DeepSpeed, and nothing else of the project: the only file that imports it.

`Engine` wraps a ZeRO-3 engine around the backbone and offers what one training step needs: forward, backward, this
rank's gradient partitions for joint clipping, step, and its slices of weights and optimizer state for checkpoints.
Tables live outside (see `model/sharded_embedding.py`).

Scaling, the one rule for all gradients: each rank's loss is `local_sum * W / global_count`, summed over the
micro-batches of a step. ZeRO-3 averages over W ranks; tables get the gradient of the sum over ranks and are divided by
W in `train.py`. DeepSpeed's own clipping stays off, since its norm does not know the tables.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
    set_z3_leaf_module,
)
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.distributed import rendezvous
from cllm4rec_dist.distributed.adam import MOMENTS
from cllm4rec_dist.distributed.diagnosis import HANG_SECONDS
from cllm4rec_dist.distributed.topology import RowPartition, World, adopt_slurm_environment
from cllm4rec_dist.distributed.watchdog import Watch, Watchdog
from cllm4rec_dist.errors import ConfigError

DEFAULT_SETTINGS = Path(__file__).with_name("ds_configs") / "zero3.json"
"""The DeepSpeed file of a run that names none: part of the package, so that any folder will do."""
_BACKEND_MORE_SECONDS = 60.0

_UNDERSTOOD = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "bf16",
        "comms_logger",
        "communication_data_type",
        "compile",
        "dump_state",
        "flops_profiler",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "memory_breakdown",
        "prescale_gradients",
        "gradient_predivide_factor",
        "steps_per_print",
        "timers",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
"""Sections of a DeepSpeed file that mean something here: DeepSpeed itself reads past a key that it does not know."""


def start_world(collective_timeout_seconds: float = HANG_SECONDS) -> World:
    """Join the run that the launcher made (Ray, torchrun, deepspeed, srun), or be a run of one process.

    What a rank does goes into `with world.watch`, which ends in order or names the rank that is at fault.

    Args:
        collective_timeout_seconds: the longest that a collective may take. The backend's own timeout, which names
            nobody, comes later; one of a process group that exists (Ray's: 1800 s) stays as it is.

    Collectives: the rendezvous and one broadcast.

    Raises:
        ConfigError: for variables of a launcher that cannot be right, a host that is not found, a port in use.
        RankError: where other ranks do not come.
    """
    adopt_slurm_environment(os.environ)
    for name, alone in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, alone)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = "0" if os.environ["WORLD_SIZE"] == "1" else "29500"
    timeout = collective_timeout_seconds + _BACKEND_MORE_SECONDS
    roll = None if dist.is_initialized() else rendezvous.meet(os.environ, timeout)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # Its C++ shared-memory collectives are compiled at first use, a minute for nothing on a CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed|torch")
    deepspeed.init_distributed(
        dist_backend=None, auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout)
    )
    del roll  # torch's own store has the port now
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank, size = dist.get_rank(), dist.get_world_size()
    watch = Watchdog(rank, size, device, collective_timeout_seconds) if size > 1 else Watch()
    return World(rank, size, local_rank, device, watch)


def resolve_settings(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed file with every "auto" filled in by the run.

    Raises:
        ConfigError: where the file fixes a value that the run decides otherwise, or is not a ZeRO-3 file.
    """
    path = DEFAULT_SETTINGS if config.deepspeed is None else Path(config.deepspeed)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "deepspeed", str(path), f"is not a readable JSON file ({error})", "See ds_configs/."
        ) from error
    if not isinstance(settings, dict):
        raise ConfigError(str(path), settings, "must be a JSON object", "Start from ds_configs/zero3.json.")
    for key in settings.keys() - _UNDERSTOOD:
        raise ConfigError(
            f"{path}: {key}",
            settings[key],
            "would do nothing, or what the run decides",
            f"Remove it; understood are {', '.join(sorted(_UNDERSTOOD))}.",
        )
    for section in ("bf16", "zero_optimization"):
        if not isinstance(settings.setdefault(section, {}), dict):
            raise ConfigError(
                f"{path}: {section}", settings[section], "must be an object", "See ds_configs/zero3.json."
            )
    decided = {
        "train_micro_batch_size_per_gpu": 1,  # batches are made by our stream; DeepSpeed only prints this
        "gradient_accumulation_steps": config.batch.gradient_accumulation_steps,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    for key, value in decided.items():
        settings[key] = _decide(f"{path}: {key}", settings.get(key, "auto"), value)
    bf16 = settings["bf16"]
    bf16["enabled"] = _decide(f"{path}: bf16.enabled", bf16.get("enabled", "auto"), config.precision == "bf16")
    stage = settings["zero_optimization"].get("stage")
    if stage != 3:
        raise ConfigError(f"{path}: zero_optimization.stage", stage, "must be 3", "Start from ds_configs/zero3.json.")
    settings.setdefault("steps_per_print", 1 << 30)
    try:
        DeepSpeedConfig(copy.deepcopy(settings))
    except Exception as error:
        raise ConfigError(
            "deepspeed", str(path), f"is refused by DeepSpeed ({error})", "Start from ds_configs/zero3.json."
        ) from error
    return settings


def zero_config(settings: dict[str, Any]) -> Any:
    """What DeepSpeed makes of the section `zero_optimization` of `resolve_settings`, its own defaults included."""
    return DeepSpeedConfig(copy.deepcopy(settings)).zero_config


def _decide(field: str, given: Any, decided: Any) -> Any:
    if given not in ("auto", decided):
        raise ConfigError(field, given, f"conflicts with the run, which says {decided!r}", 'Write "auto" there.')
    return decided


@contextmanager
def sharded_loading(settings: dict[str, Any]) -> Iterator[None]:
    """Inside, Hugging Face models are born partitioned: no rank ever holds the whole backbone."""
    alive = HfDeepSpeedConfig(settings)  # transformers keeps only a weak reference
    yield
    del alive


class Engine:
    """A ZeRO-3 engine around the backbone.

    Args:
        module: built inside `sharded_loading`.
        settings: from `resolve_settings`.
        optimizer: over the module's trainable parameters.
        layers: modules of which each is gathered and let go as a whole. Else ZeRO-3 would hook every small module:
            for a layer with adapters some forty times as many hooks and collectives, each over less. A layer must run
            once in a forward, on inputs that ask for gradients where it is trained.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: dict[str, Any],
        optimizer: torch.optim.Optimizer,
        layers: Iterable[nn.Module],
    ) -> None:
        for layer in layers:
            set_z3_leaf_module(layer, True)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self.trainable: dict[str, Any] = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def __call__(self, *inputs: Any) -> Tensor:
        """One forward of the module. Every rank must call it equally often."""
        return self._engine(*inputs)

    def num_parameters(self) -> tuple[int, int]:
        """Elements of the trained and of the frozen parameters, of all ranks together."""
        counts = [0, 0]
        for parameter in self._engine.module.parameters():
            packed = 2 if parameter.dtype == torch.uint8 else 1  # two 4-bit weights in a byte
            counts[not parameter.requires_grad] += parameter.ds_numel * packed
        return counts[0], counts[1]

    def train(self, mode: bool) -> None:
        """Switch dropout on or off."""
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> bool:
        """Accumulate gradients of a micro-batch's loss; True at the boundary, when gradients are complete."""
        self._engine.backward(loss, scale_wrt_gas=False)
        return self._engine.is_gradient_accumulation_boundary()

    def gradients(self) -> dict[str, Tensor]:
        """This rank's partition of each trainable gradient, fp32 (padding is zero). At the boundary only."""
        return {name: safe_get_local_grad(parameter) for name, parameter in self.trainable.items()}

    def scale_gradients(self, factor: float) -> None:
        """Multiply every gradient partition. At the boundary only."""
        for parameter in self.trainable.values():
            safe_set_local_grad(parameter, safe_get_local_grad(parameter) * factor)

    def step(self, lr: float) -> None:
        """End of a micro-batch; at the boundary the optimizer steps with learning rate `lr`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    def discard(self) -> None:
        """Spoil this step's gradients, at the boundary: `step` then drops them and changes nothing.

        ZeRO-3 leaves out a step whose gradient norm is not finite, in every precision; there is no other way to drop
        gradients that does not also move the optimizer's moments.
        """
        self.scale_gradients(math.nan)

    def partitions(self) -> dict[str, RowPartition]:
        """Which elements of each flattened trainable parameter a rank holds: ZeRO-3 cuts it as we cut rows."""
        return {name: RowPartition(p.ds_numel, dist.get_world_size()) for name, p in self.trainable.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each whole trainable parameter."""
        return {name: tuple(p.ds_shape) for name, p in self.trainable.items()}

    def weights(self) -> dict[str, Tensor]:
        """This rank's elements of each flattened trainable parameter, fp32 (the master copy), without padding."""
        return {name: safe_get_local_fp32_param(self.trainable[name])[:n] for name, n in self._num_local().items()}

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """By parameter: `exp_avg` and `exp_avg_sq` of the same elements; empty before the first step."""
        state = self._optimizer_state()
        return {
            name: {key: safe_get_local_optimizer_state(self.trainable[name], key)[:n] for key in MOMENTS}
            for name, n in self._num_local().items()
            if state
        }

    def steps_taken(self) -> float:
        """Adam's count of steps, which its bias correction needs."""
        return float(self._optimizer_state().get("step", 0))

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Overwrite what `weights` gave, before the first forward. No collective.

        Both the fp32 master and the partition that is gathered for a forward are written: DeepSpeed's
        `GatheredParameters` writes the latter alone, and the first step would bring back the old values.
        """
        for name, local in weights.items():
            parameter = self.trainable[name]
            assert parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE, "weights are set before the first forward"
            padded = parameter.ds_tensor.new_zeros(parameter.partition_numel(), dtype=torch.float32)
            padded[: len(local)] = local
            safe_set_local_fp32_param(parameter, padded)
            parameter.ds_tensor.data.copy_(padded)

    def set_moments(self, moments: dict[str, dict[str, Tensor]], steps_taken: float) -> None:
        """Overwrite what `moments` and `steps_taken` gave. No collective."""
        zero = self._engine.optimizer
        for flat in zero.fp32_partitioned_groups_flat:
            zeros = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.tensor(steps_taken), **zeros}
        for name, found in moments.items():
            parameter = self.trainable[name]
            for key, local in found.items():
                padded = parameter.ds_tensor.new_zeros(parameter.partition_numel(), dtype=torch.float32)
                padded[: len(local)] = local
                safe_set_local_optimizer_state(parameter, padded, key)

    def _num_local(self) -> dict[str, int]:
        return {name: partition.num_local(dist.get_rank()) for name, partition in self.partitions().items()}

    def _optimizer_state(self) -> dict[str, Any]:
        """Of the first flat group; all groups take the same steps."""
        zero = self._engine.optimizer
        return dict(zero.optimizer.state.get(zero.fp32_partitioned_groups_flat[0], {}))
