"""GPUs that a plan can be made for: public figures of their makers, and what is assumed where they say nothing.

Sources: NVIDIA's data sheets of the A100 (SXM), H100 (SXM), H200 (SXM) and L40S, and its Ada architecture paper for the
RTX 4090; networks as in the DGX A100 (200 Gb/s a GPU) and the DGX H100 and H200 (400 Gb/s a GPU). For the others 100
Gb/s a host of eight is assumed. Peaks are dense ones with fp32 accumulation; fp32 is without TF32, which torch leaves
off. Memory is what torch sees of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.suggestions import did_you_mean

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One GPU and its ways to the others.

    Attributes:
        memory: bytes.
        bf16, fp32: FLOP/s of matrix products at best.
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
    """The GPU of that name.

    Raises:
        ConfigError: for another one.
    """
    if name not in GPUS:
        raise ConfigError(
            "--gpu", name, f"is not one of {', '.join(GPUS)}", f"Choose the nearest one.{did_you_mean(name, GPUS)}"
        )
    return GPUS[name]
