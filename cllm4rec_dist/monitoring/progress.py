"""Progress of a run as text: pure functions, without torch.

Used by the run itself (`run_reporter.py`) and by `cllm4rec status`, which reads the run's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Schedule:
    """The steps of a run.

    Attributes:
        first_step: completed steps at the start of this process.
        total_steps: completed steps at the end of the run.
        steps_per_epoch: optimizer steps of one pass over the users.
    """

    first_step: int
    total_steps: int
    steps_per_epoch: int

    @property
    def num_epochs(self) -> int:
        """Epochs of the run; the last one may be cut short by `max_steps`."""
        return -(-self.total_steps // self.steps_per_epoch)

    def epoch(self, step: int) -> int:
        """Return the epoch, from 1, of a step, from 1."""
        return max(0, step - 1) // self.steps_per_epoch + 1

    def ends_epoch(self, step: int) -> bool:
        """Return True if this step completes an epoch or the run."""
        return step % self.steps_per_epoch == 0 or step == self.total_steps


@dataclass(frozen=True)
class Validation:
    """Result of a validation.

    Attributes:
        metrics: by name; empty if there was none.
        is_best: True if it is the best so far.
        parts: metrics of the LLM alone (`llm`) and of the linear memory alone (`linear`); empty without a memory.
        linear_weight: chosen weight of the linear memory.
        new_item_offset: chosen offset of new items' biases; None if none was chosen.
    """

    metrics: Mapping[str, float]
    is_best: bool = False
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    linear_weight: float = 0.0
    new_item_offset: float | None = None


@dataclass(frozen=True)
class EpochReport:
    """Values reported for one epoch.

    Attributes:
        losses: mean over its steps by term, in nats.
        lr: learning rate of its last step.
        validation: the validation at its end.
        tokens_per_second: over its steps, without validation and saving.
        eta: estimated seconds to the end of the run; None after the last step.
    """

    epoch: int
    num_epochs: int
    losses: Mapping[str, float]
    lr: float
    validation: Validation
    tokens_per_second: float
    eta: float | None


class EpochMeter:
    """Accumulates mean losses and speed over the steps of the current epoch."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new epoch."""
        self._sums: dict[str, float] = {}
        self._steps = self._tokens = 0
        self._seconds = 0.0

    def add(self, losses: Mapping[str, float], tokens: int, seconds: float) -> None:
        """Count one step."""
        for term, value in losses.items():
            self._sums[term] = self._sums.get(term, 0.0) + value
        self._steps += 1
        self._tokens += tokens
        self._seconds += seconds

    @property
    def losses(self) -> dict[str, float]:
        """Mean loss over the steps, by term."""
        return {term: value / max(1, self._steps) for term, value in self._sums.items()}

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks per second of step time."""
        return self._tokens / self._seconds if self._seconds else 0.0


def format_duration(seconds: float) -> str:
    """Format as `8 s`, `2 min 05 s`, `3 h 07 min` or `2 d 04 h`."""
    whole = max(0, round(seconds))
    for unit, size, smaller, part in (("d", 86_400, "h", 3_600), ("h", 3_600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part:02d} {smaller}"
    return f"{whole} s"


def format_rows(rows: Sequence[tuple[str, str]], indent: str = "  ") -> str:
    """Format labels and texts as two columns, one line each."""
    width = max((len(label) for label, _ in rows), default=0)
    return "\n".join(f"{indent}{label:<{width}}  {text}" for label, text in rows)


def format_losses(losses: Mapping[str, float]) -> str:
    """Format as `9.605 (items 4.624, text 4.981, mutual 5.1e-05)`."""
    return f"{sum(losses.values()):.3f} ({', '.join(f'{term} {format_loss(value)}' for term, value in losses.items())})"


def format_loss(value: float) -> str:
    """Format with three decimals, or two significant digits if the value is below 0.001."""
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Format as `recall@20 0.6603, ndcg@100 0.4414`."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def format_epoch(report: EpochReport) -> str:
    """Format one line for an epoch; `* best` marks the best validation so far."""
    width = len(str(report.num_epochs))
    parts = [
        f"epoch {report.epoch:>{width}}/{report.num_epochs}",
        f"loss {format_losses(report.losses)}",
        f"lr {report.lr:.1e}",
    ]
    if report.validation.metrics:
        parts.append(format_validation(report.validation))
    parts.append(f"{report.tokens_per_second:,.0f} tokens/s")
    if report.eta is not None:
        parts.append(f"ETA {format_duration(report.eta)}")
    return "  ".join(parts)


def format_validation(validation: Validation) -> str:
    """Format as `recall@20 0.1870 * best (LLM alone 0.1670, linear memory alone 0.1770, weight 128)`."""
    details = []
    if validation.parts:
        name = next(iter(validation.metrics))
        llm, linear = (validation.parts[part][name] for part in ("llm", "linear"))
        weight = f"weight {validation.linear_weight:.4g}"
        details = [f"{name}: LLM alone {llm:.4f}", f"linear memory alone {linear:.4f}", weight]
    if validation.new_item_offset is not None:
        details.append(f"offset of new items {validation.new_item_offset:g}")
    text = format_metrics(validation.metrics) + (" * best" if validation.is_best else "")
    return f"{text} ({', '.join(details)})" if details else text


def format_best(metric: str, value: float, step: int, schedule: Schedule) -> str:
    """Format as `best recall@20 0.6742 at epoch 1 of 12 (step 10)`."""
    return f"best {metric} {value:.4f} at epoch {schedule.epoch(step)} of {schedule.num_epochs} (step {step})"


def format_end(
    stage: str,
    step: int,
    schedule: Schedule,
    seconds: float,
    *,
    result: str,
    signal_name: str | None = None,
    stopped_early: bool = False,
) -> str:
    """Format the last line of a run.

    Args:
        step: completed steps.
        seconds: run time of this process.
        result: text with the best validation or the last losses.
        signal_name: signal that ended the run before its last step.
        stopped_early: True if validation had stopped improving.
    """
    if signal_name is not None:
        return (
            f"{stage} interrupted by {signal_name} after {format_duration(seconds)}: saved at step {step:,} of"
            f" {schedule.total_steps:,}; run the same command to continue"
        )
    if schedule.first_step >= step:
        return f"{stage} is already done: {result}; raise epochs to train longer"
    early = f", stopped early after epoch {schedule.epoch(step)} of {schedule.num_epochs}" if stopped_early else ""
    return f"{stage} done in {format_duration(seconds)}{early}: {result}"
