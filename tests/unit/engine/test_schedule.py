"""Schedules equal those of transformers, step by step."""

import pytest
import torch
from transformers import get_scheduler

from services.node_agent.engine.torch.schedule import SCHEDULES, make_schedule
from services.node_agent.engine.training_ops import OptimizerSpec


def adamw() -> torch.optim.AdamW:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.3)


@pytest.mark.parametrize("total", [1, 7, 20])
@pytest.mark.parametrize("warmup", [0, 1, 4, 9])
@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_those_of_transformers(name: str, warmup: int, total: int) -> None:
    optimizers = adamw(), adamw()
    spec = OptimizerSpec(learning_rate=0.3, lr_schedule=name, warmup_steps=warmup, total_steps=total)
    ours = make_schedule(optimizers[0], spec)
    theirs = get_scheduler(name, optimizers[1], num_warmup_steps=warmup, num_training_steps=total)
    for _ in range(total + 5):
        assert ours.get_last_lr() == pytest.approx(theirs.get_last_lr(), rel=1e-15, abs=0.0)
        for optimizer, schedule in zip(optimizers, (ours, theirs), strict=True):
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize(("name", "message"), [("polynomial", "not a schedule"), ("cosine", "needs the number")])
def test_what_cannot_be_built_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(adamw(), OptimizerSpec(lr_schedule=name))
