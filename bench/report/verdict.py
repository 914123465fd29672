"""Repetitions put together: medians with their spread, and what they decide. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

#: Verdict -> colour on a terminal.
STYLES = {"held": "green", "missed": "red", "unresolved": "yellow"}


def combine(repetitions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Key by key the median of the repetitions. A value missing (None) in some is the median of the others."""
    return {key: _combine_values([item.get(key) for item in repetitions]) for key in repetitions[0]}


def spread(repetitions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Key by key `[min, max]` over the repetitions, for numbers only."""
    result: dict[str, Any] = {}
    for key in repetitions[0]:
        values = [item.get(key) for item in repetitions]
        if all(isinstance(value, Mapping) for value in values):
            result[key] = spread([value for value in values if isinstance(value, Mapping)])
        else:
            numbers = _numbers(values)
            if numbers:
                result[key] = [min(numbers), max(numbers)]
    return result


def _combine_values(values: Sequence[Any]) -> Any:
    if all(isinstance(value, Mapping) for value in values):
        keys = list(dict.fromkeys(key for value in values for key in value))
        return {key: _combine_values([value.get(key) for value in values]) for key in keys}
    numbers = _numbers(values)
    if not numbers:
        return values[0]
    middle = statistics.median(numbers)
    whole = all(isinstance(number, int) for number in numbers)
    return round(middle) if whole else middle


def _numbers(values: Sequence[Any]) -> list[float]:
    return [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]


def decide(values: Sequence[float | None], threshold: float, *, at_least: bool, single_run_noise: float = 0.0) -> str:
    """What the repetitions say together: held, missed or unresolved.

    Held or missed when every one agrees, unresolved when their spread spans the threshold or one has no value. A single
    repetition has no spread: nearer than `single_run_noise` to the threshold it decides nothing.
    """
    known = [value for value in values if value is not None]
    too_close = len(values) == 1 and bool(known) and abs(known[0] - threshold) < single_run_noise
    if not known or len(known) < len(values) or too_close:
        return "unresolved"
    good = [value >= threshold if at_least else value <= threshold for value in known]
    return "held" if all(good) else "unresolved" if any(good) else "missed"
