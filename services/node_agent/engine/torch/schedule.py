"""Learning-rate schedules by their transformers names.

Four factors for torch's LambdaLR, because `transformers.optimization` takes seconds to import, which every stage worker
would pay at its start, and torch's own warm-up cannot begin at 0; see docs/decisions.md.
"""

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from services.node_agent.engine.training_ops import OptimizerSpec

_NEED_LENGTH = ("linear", "cosine")
SCHEDULES = ("constant", "constant_with_warmup", *_NEED_LENGTH)


def make_schedule(optimizer: torch.optim.Optimizer, spec: OptimizerSpec) -> LambdaLR:
    """As `transformers.get_scheduler`. Raises ValueError for an unknown name, or a length that is needed and 0."""
    if spec.lr_schedule not in SCHEDULES:
        raise ValueError(f"{spec.lr_schedule!r} is not a schedule; known: {', '.join(SCHEDULES)}")
    if spec.lr_schedule in _NEED_LENGTH and not spec.total_steps:
        raise ValueError(f"schedule {spec.lr_schedule!r} needs the number of steps")
    return LambdaLR(optimizer, _factor(spec.lr_schedule, spec.warmup_steps, spec.total_steps))


def _factor(name: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """The share of the peak rate that the step after so many steps has."""
    if name == "constant":
        return lambda step: 1.0

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        if name == "constant_with_warmup":
            return 1.0
        length = max(1, total_steps - warmup_steps)
        if name == "linear":
            return max(0.0, (total_steps - step) / length)
        progress = (step - warmup_steps) / length
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

    return factor
