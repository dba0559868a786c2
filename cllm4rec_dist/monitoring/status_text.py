"""Status of a run as text: a table for a terminal, and one line for `--follow`."""

from __future__ import annotations

from cllm4rec_dist.monitoring.progress import format_best, format_duration, format_losses, format_metrics, format_rows
from cllm4rec_dist.monitoring.status import Condition, RunStatus

_SENTENCES: dict[Condition, str] = {
    "starting": "is starting",
    "running": "is running",
    "silent": "is running, but has logged nothing for longer than its steps take",
    "done": "is done",
    "interrupted": "was interrupted and has saved",
    "failed": "has failed",
    "killed": "ended without recording why (killed, out of memory, machine lost)",
    "unknown": "has no record of how it ended",
}


def format_status(status: RunStatus) -> str:
    """Format the status as a headline and one line for each known property."""
    rows: list[tuple[str, str]] = []
    schedule = status.schedule
    if status.message:
        rows.append(("message", status.message))
    if status.num_ranks is not None:
        ranks = f"{status.num_ranks} rank{'s' * (status.num_ranks > 1)} on {status.device}, rank 0 on {status.host}"
        rows.append(("machine", ranks))
    if schedule is not None:
        fraction = status.step / schedule.total_steps
        epoch = f"epoch {schedule.epoch(status.step)} of {schedule.num_epochs}"
        rows.append(("progress", f"{epoch}, step {status.step:,} of {schedule.total_steps:,} ({fraction:.0%})"))
    elif status.step:
        rows.append(("progress", f"step {status.step:,}"))
    if status.tokens_per_second is not None:
        left = "" if status.eta is None else f", {format_duration(status.eta)} to go"
        rows.append(("speed", f"{status.tokens_per_second:,.0f} tokens/s{left}"))
    if status.losses:
        rows.append(("loss", format_losses(status.losses)))
    if status.validation:
        rows.append(("validation", f"{format_metrics(status.validation)} at step {status.validated_step:,}"))
    if status.best is not None:
        rows.append(("best", _best(status)))
    for label, newest in (("checkpoint", status.checkpoint), ("", status.best_checkpoint)):
        if newest is not None:
            age = "" if newest.age is None else f", {format_duration(newest.age)} old"
            rows.append((label, f"{newest.name}{age}"))
    if status.checkpoints is not None and status.checkpoint is None and status.best_checkpoint is None:
        is_early = status.lives or not status.step
        none = "none that is intact" if status.damaged else "none yet" if is_early else "none"
        rows.append(("checkpoint", f"{none} in {status.checkpoints}"))
    if status.updated is not None:
        rows.append(("updated", f"{format_duration(status.updated)} ago"))
    if status.chosen:
        rows.append(("chosen", " ".join(status.chosen)))
    rows += [("note", problem) for problem in status.problems]
    rows += [("next" if status.condition == "done" else "resume", command) for command in status.next]
    return f"{status.run}: {status.stage or 'run'} {_SENTENCES[status.condition]}\n{format_rows(rows)}"


def _best(status: RunStatus) -> str:
    assert status.best is not None
    metric, step = status.best_metric or "validation result", status.best_step or 0
    if status.schedule is None:
        return f"{metric} {status.best:.4f} at step {step:,}"
    return format_best(metric, status.best, step, status.schedule).removeprefix("best ")


def format_brief(status: RunStatus) -> str:
    """Format the status as one line, for `--follow`."""
    parts = [f"{status.stage or 'run'} {status.condition}"]
    schedule = status.schedule
    if schedule is not None:
        parts.append(f"epoch {schedule.epoch(status.step)}/{schedule.num_epochs}")
        parts.append(f"step {status.step:,}/{schedule.total_steps:,}")
    if status.losses:
        parts.append(f"loss {format_losses(status.losses)}")
    if status.validation:
        parts.append(format_metrics(status.validation))
    if status.eta is not None:
        parts.append(f"ETA {format_duration(status.eta)}")
    return "  ".join(parts)
