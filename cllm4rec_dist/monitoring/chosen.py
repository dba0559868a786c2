"""What validation has chosen, as settings of a run that is trained on everything and has no validation to choose by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def chosen_settings(state: Mapping[str, Any], steps_per_epoch: int | None) -> list[str]:
    """Return settings as `section.key=value`: epochs, linear memory and offset of new items; those that are known.

    Args:
        state: `state.json` of the run's best checkpoint.
        steps_per_epoch: of the run; None if unknown.
    """
    run, linear = state.get("run", {}), state.get("linear") or {}
    epochs, rest = divmod(run.get("step", 0), steps_per_epoch or 1)
    values = {
        "epochs": epochs if steps_per_epoch and not rest else None,
        "linear.weight": run.get("linear_weight"),
        **{f"linear.{name}": value for name, value in linear.items()},
        "head.new_item_offset": run.get("new_item_offset"),
    }
    return [f"{name}={value:g}" for name, value in values.items() if value is not None]
