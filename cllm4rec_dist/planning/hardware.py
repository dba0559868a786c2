"""GPUs that a plan can be made for.

Sources: NVIDIA's data sheets of the A100 (SXM), H100 (SXM), H200 (SXM) and L40S, and its Ada architecture paper for the
RTX 4090; networks of the DGX A100 (200 Gb/s per GPU) and the DGX H100 and H200 (400 Gb/s per GPU). For the others 100
Gb/s per host of eight GPUs is assumed. Peaks are dense, with fp32 accumulation; fp32 is without TF32, which is off by
default in torch. Memory is what torch reports.
"""

from __future__ import annotations

from dataclasses import dataclass

from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.suggestions import did_you_mean

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A GPU and its connections.

    Attributes:
        memory: bytes.
        bf16, fp32: peak FLOP/s of matrix products.
        bandwidth: bytes/s of its memory.
        link: bytes/s to GPUs of the same host, one way.
        network: bytes/s to GPUs of other hosts, one way.
    """

    name: str
    memory: int
    bf16: float
    fp32: float
    bandwidth: float
    link: float
    network: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", int(39.4 * GIB), 312e12, 19.5e12, 1555e9, 300e9, 25e9),
        Gpu("a100-80", int(79.2 * GIB), 312e12, 19.5e12, 2039e9, 300e9, 25e9),
        Gpu("h100", int(79.1 * GIB), 989e12, 67e12, 3350e9, 450e9, 50e9),
        Gpu("h200", int(139.8 * GIB), 989e12, 67e12, 4800e9, 450e9, 50e9),
        Gpu("l40s", int(44.4 * GIB), 362e12, 91.6e12, 864e9, 32e9, 1.6e9),
        Gpu("rtx4090", int(23.5 * GIB), 165e12, 82.6e12, 1008e9, 32e9, 1.6e9),
    )
}


def find_gpu(name: str) -> Gpu:
    """Return the GPU with a name.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in GPUS:
        raise ConfigError(
            "--gpu", name, f"is not one of {', '.join(GPUS)}", f"Choose the most similar one.{did_you_mean(name, GPUS)}"
        )
    return GPUS[name]
