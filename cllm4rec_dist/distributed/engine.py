"""The ZeRO-3 engine. This is the only file that imports DeepSpeed.

`Engine` wraps a ZeRO-3 engine around the backbone and has what a training step needs: forward, backward, this rank's
gradient partitions for joint clipping, step, and its partitions of weights and optimizer state for checkpoints. The
tables are outside of the engine (see `model/sharded_embedding.py`).

Scaling of all gradients: each rank's loss is `local_sum * W / global_count`, summed over the micro-batches of a step.
ZeRO-3 averages over W ranks; the gradients of tables are sums over ranks, which `step.py` divides by W. DeepSpeed's
clipping is off, because its norm does not include the tables.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.distributed import rendezvous
from cllm4rec_dist.distributed.adam import MOMENTS
from cllm4rec_dist.distributed.diagnosis import HANG_SECONDS
from cllm4rec_dist.distributed.hidden_modules import hidden_modules, torch_compile_disabled
from cllm4rec_dist.distributed.topology import (
    BACKEND_EXTRA_SECONDS,
    RowPartition,
    World,
    adopt_slurm_environment,
)
from cllm4rec_dist.distributed.watchdog import Watch, Watchdog
from cllm4rec_dist.errors import ConfigError

with hidden_modules("mlflow"):  # DeepSpeed's autotuner would import it, for a second at each start
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_get_local_grad,
        safe_get_local_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_grad,
        safe_set_local_optimizer_state,
        set_z3_leaf_module,
    )
# ZeRO-3 imports this optimizer when an engine starts, and with it the whole compiler of torch.
with torch_compile_disabled(), suppress(ImportError):  # other versions of DeepSpeed may not have it
    import deepspeed.runtime.zero.muon.muon_optimizer

DEFAULT_SETTINGS = Path(__file__).with_name("ds_configs") / "zero3.json"
"""Default DeepSpeed file, which is part of the package."""

_KNOWN_SECTIONS = frozenset(
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
"""Sections of a DeepSpeed file that are supported. DeepSpeed itself ignores unknown keys."""


def start_world(collective_timeout_seconds: float = HANG_SECONDS) -> World:
    """Join the ranks that the launcher started (Ray, torchrun, deepspeed, srun), or start a run of one process.

    All work of a rank belongs in `with world.watch`, which names the rank at fault if the run fails.

    Args:
        collective_timeout_seconds: the longest time that a collective may take. The backend's timeout, which cannot
            name a rank, is set 60 s later; that of an existing process group (Ray's: 1800 s) is not changed.

    Collectives: the rendezvous and one broadcast.

    Raises:
        ConfigError: for invalid launcher variables, an unknown host, or a port in use.
        RankError: if other ranks do not arrive.
    """
    adopt_slurm_environment(os.environ)
    for name, default in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, default)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = "0" if os.environ["WORLD_SIZE"] == "1" else "29500"
    timeout = collective_timeout_seconds + BACKEND_EXTRA_SECONDS
    store = None if dist.is_initialized() else rendezvous.wait_for_ranks(os.environ, timeout)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # Compiling its C++ shared-memory collectives takes a minute, and they are not needed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed|torch")
    deepspeed.init_distributed(
        dist_backend=None, auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout)
    )
    del store  # torch's own store has the port now
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rank, size = dist.get_rank(), dist.get_world_size()
    watch = Watchdog(rank, size, device, collective_timeout_seconds) if size > 1 else Watch()
    return World(rank, size, local_rank, device, watch)


def resolve_settings(config: RunConfig) -> dict[str, Any]:
    """Read the run's DeepSpeed file and replace every "auto" by the run's value.

    Raises:
        ConfigError: if the file is not a ZeRO-3 file, or has a value that conflicts with the run's configuration.
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
    for key in settings.keys() - _KNOWN_SECTIONS:
        raise ConfigError(
            f"{path}: {key}",
            settings[key],
            "would have no effect, or is decided by the run",
            f"Remove it; supported are {', '.join(sorted(_KNOWN_SECTIONS))}.",
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
    """Return DeepSpeed's ZeRO configuration for `settings` of `resolve_settings`, with DeepSpeed's defaults."""
    return DeepSpeedConfig(copy.deepcopy(settings)).zero_config


def _decide(field: str, given: Any, decided: Any) -> Any:
    if given not in ("auto", decided):
        raise ConfigError(field, given, f"conflicts with the run, which sets {decided!r}", 'Set it to "auto".')
    return decided


@contextmanager
def sharded_loading(settings: dict[str, Any]) -> Iterator[None]:
    """Make Hugging Face models partition their weights while loading, so that no rank ever holds the whole backbone."""
    reference = HfDeepSpeedConfig(settings)  # transformers keeps only a weak reference
    yield
    del reference


@contextmanager
def gathered_by_layer(module: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Let a module built inside `sharded_loading` run before it has an engine: one layer is gathered at a time.

    An engine that ran forwards without backward before its first step would gather weights more often in later steps.

    Args:
        layers: as of `Engine`; weights outside of them are gathered for the whole time.

    Collectives: all-gathers weights, in forwards; every rank must run equally many.
    """
    module.to(device)
    inside: set[nn.Parameter] = set()
    hooks = []
    gathered: dict[nn.Module, ExitStack] = {}

    def gather(layer: nn.Module, _: Any) -> None:
        gathered[layer] = ExitStack()
        gathered[layer].enter_context(GatheredParameters([*layer.parameters()]))

    def release(layer: nn.Module, _: Any, __: Any) -> None:
        gathered.pop(layer).close()

    for layer in layers:
        inside.update(layer.parameters())
        hooks += [layer.register_forward_pre_hook(gather), layer.register_forward_hook(release)]
    with GatheredParameters([parameter for parameter in module.parameters() if parameter not in inside]):
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for context in gathered.values():  # of a layer that raised
                context.close()


class Engine:
    """A ZeRO-3 engine around the backbone.

    Args:
        module: built inside `sharded_loading`.
        settings: from `resolve_settings`.
        optimizer: over the module's trainable parameters.
        layers: modules that are gathered and released as a whole (ZeRO-3 leaf modules). Otherwise ZeRO-3 hooks every
            small module: for a layer with adapters about forty times as many hooks and collectives. A layer must run
            once per forward; if it is trained, its inputs must require gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: dict[str, Any],
        optimizer: torch.optim.Optimizer,
        layers: Iterable[nn.Module],
    ) -> None:
        self.layers = [*layers]
        for layer in self.layers:
            set_z3_leaf_module(layer, True)
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self.trainable: dict[str, Any] = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def __call__(self, *inputs: Any) -> Tensor:
        """Run one forward of the module. Every rank must call it equally often."""
        return self._engine(*inputs)

    def num_parameters(self) -> tuple[int, int]:
        """Number of trained and of frozen parameters over all ranks."""
        counts = [0, 0]
        for parameter in self._engine.module.parameters():
            packed = 2 if parameter.dtype == torch.uint8 else 1  # two 4-bit weights in a byte
            counts[not parameter.requires_grad] += parameter.ds_numel * packed
        return counts[0], counts[1]

    def train(self, mode: bool) -> None:
        """Switch dropout on or off."""
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> bool:
        """Accumulate the gradients of a micro-batch; True after the last one of a step, when gradients are complete."""
        self._engine.backward(loss, scale_wrt_gas=False)
        return self._engine.is_gradient_accumulation_boundary()

    def gradients(self) -> dict[str, Tensor]:
        """This rank's partition of each trainable gradient, fp32, zero-padded. Only when gradients are complete."""
        return {name: safe_get_local_grad(parameter) for name, parameter in self.trainable.items()}

    def scale_gradients(self, factor: float) -> None:
        """Multiply every gradient partition by `factor`. Only when gradients are complete."""
        for parameter in self.trainable.values():
            safe_set_local_grad(parameter, safe_get_local_grad(parameter) * factor)

    def step(self, lr: float) -> None:
        """End a micro-batch; when gradients are complete, the optimizer steps with learning rate `lr`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    def discard(self) -> None:
        """Set this step's gradients to NaN, so that `step` drops them and changes nothing. Only when they are complete.

        ZeRO-3 skips a step with a non-finite gradient norm in every precision. It has no other way to drop gradients
        without an update of the optimizer's moments.
        """
        self.scale_gradients(math.nan)

    def partitions(self) -> dict[str, RowPartition]:
        """Partition of each flattened trainable parameter, whose elements ZeRO-3 assigns to ranks as we assign rows."""
        return {name: RowPartition(p.ds_numel, dist.get_world_size()) for name, p in self.trainable.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each whole trainable parameter."""
        return {name: tuple(p.ds_shape) for name, p in self.trainable.items()}

    def weights(self) -> dict[str, Tensor]:
        """This rank's elements of each flattened trainable parameter, from the fp32 masters, without padding."""
        return {name: safe_get_local_fp32_param(self.trainable[name])[:n] for name, n in self._num_local().items()}

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """By parameter, `exp_avg` and `exp_avg_sq` of the elements in `weights`; empty before the first step."""
        state = self._optimizer_state()
        return {
            name: {key: safe_get_local_optimizer_state(self.trainable[name], key)[:n] for key in MOMENTS}
            for name, n in self._num_local().items()
            if state
        }

    def steps_taken(self) -> float:
        """Number of steps that Adam has taken, which its bias correction needs."""
        return float(self._optimizer_state().get("step", 0))

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        """Restore the result of `weights`, before the first forward. No collective.

        Writes both the fp32 master and the partition that is gathered for a forward. DeepSpeed's `GatheredParameters`
        writes only the latter, so that the first step would restore the old values.
        """
        for name, local in weights.items():
            parameter = self.trainable[name]
            assert parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE, "weights must be set before the first forward"
            padded = parameter.ds_tensor.new_zeros(parameter.partition_numel(), dtype=torch.float32)
            padded[: len(local)] = local
            safe_set_local_fp32_param(parameter, padded)
            parameter.ds_tensor.data.copy_(padded)

    def set_moments(self, moments: dict[str, dict[str, Tensor]], steps_taken: float) -> None:
        """Restore the results of `moments` and `steps_taken`. No collective."""
        zero = self._engine.optimizer
        for flat in zero.fp32_partitioned_groups_flat:
            zeros = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.tensor(steps_taken), **zeros}
        for name, state in moments.items():
            parameter = self.trainable[name]
            for key, local in state.items():
                padded = parameter.ds_tensor.new_zeros(parameter.partition_numel(), dtype=torch.float32)
                padded[: len(local)] = local
                safe_set_local_optimizer_state(parameter, padded, key)

    def _num_local(self) -> dict[str, int]:
        return {name: partition.num_local(dist.get_rank()) for name, partition in self.partitions().items()}

    def _optimizer_state(self) -> dict[str, Any]:
        """Adam's state of the first flat group; all groups take the same steps."""
        zero = self._engine.optimizer
        return dict(zero.optimizer.state.get(zero.fp32_partitioned_groups_flat[0], {}))
