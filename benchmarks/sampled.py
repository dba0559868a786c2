"""Bias and time of a sampled item softmax, by the size of its sample.

    python -m benchmarks.sampled

Queries and rows are directions, with each query near its target, and a temperature of 0.1, as in a trained cosine head.
Compared with the exact softmax are the loss and the gradients of queries and rows, for one draw and for the mean of all
draws (whose error is the bias and some remaining noise), as fractions of the exact gradient's norm. Time is the CPU
time of one thread, forward and backward.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import parser, show_table, write_json
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.sharded_cross_entropy import GatheringQueries, sharded_cross_entropy

TEMPERATURE, NOISE = 0.1, 2.0


def inputs(positions: int, items: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make queries, rows and targets."""
    random = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(items, width, generator=random), dim=1)
    targets = torch.randint(items, (positions,), generator=random)
    noise = F.normalize(torch.randn(positions, width, generator=random), dim=1)
    queries = F.normalize(rows[targets] + NOISE * noise, dim=1) / TEMPERATURE
    return queries.requires_grad_(), rows.requires_grad_(), targets


def run(made: tuple[Tensor, Tensor, Tensor], num_negatives: int = 0, key: int = 0) -> tuple[float, list[Tensor], float]:
    """Return the mean loss, the gradients and the seconds."""
    queries, rows, targets = made
    world, partition = World(0, 1, 0, torch.device("cpu")), RowPartition(len(rows), 1)
    started = time.thread_time()
    positions = torch.arange(len(queries))
    gathering = GatheringQueries(queries, positions, targets, partition, world)
    loss = sharded_cross_entropy(gathering, rows, num_negatives, torch.tensor(key), sparse=True).mean()
    gradients = torch.autograd.grad(loss, (queries, rows))
    seconds = time.thread_time() - started
    return loss.item(), [gradient.to_dense() for gradient in gradients], seconds


def _relative_error(gradient: Tensor, exact: Tensor) -> float:
    return float((gradient - exact).norm() / exact.norm())


def main() -> None:
    options = parser("sampled", __doc__)
    options.add_argument("--shape", default="256x100000x64", help="positions x items x width (%(default)s)")
    options.add_argument("--samples", type=int, nargs="+", default=[300, 1000, 3000, 10_000, 30_000])
    options.add_argument("--draws", type=int, default=16)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    made = inputs(*map(int, chosen.shape.split("x")))
    exact = [run(made) for _ in range(6)][1:]  # the first one warms up
    loss, gradients, _ = exact[0]
    seconds = statistics.median(duration for _, _, duration in exact)
    figures, rows = {}, []
    for size in chosen.samples:
        draws = [run(made, size, key) for key in range(chosen.draws)]
        one = [_relative_error(*pair) for pair in zip(draws[0][1], gradients, strict=True)]
        means = [sum(parts) / len(draws) for parts in zip(*(d[1] for d in draws), strict=True)]
        mean = [_relative_error(*pair) for pair in zip(means, gradients, strict=True)]
        losses = [d[0] - loss for d in draws]
        figures[str(size)] = {
            "loss_error": statistics.mean(losses),
            "loss_error_std": statistics.stdev(losses),
            "gradient_error_one_draw": one,
            "gradient_error_of_the_mean": mean,
            "time_of_exact": statistics.median(d[2] for d in draws) / seconds,
        }
        result = figures[str(size)]
        rows.append(
            [
                f"{size:,}",
                f"{result['loss_error']:+.4f} ± {result['loss_error_std']:.4f}",
                *(f"{a:.3f} / {b:.3f}" for a, b in zip(one, mean, strict=True)),
                f"{result['time_of_exact']:.2f}",
            ]
        )
    show_table(["sample", f"loss - {loss:.4f}", "query gradient, one / mean", "row gradient", "time of exact"], rows)
    write_json(chosen.json, {"shape": chosen.shape, "exact_loss": loss, "exact_seconds": seconds, **figures})


if __name__ == "__main__":
    main()
