"""Operations that touch the weights of all stages: asked for by name, run by the core between ops.

All stages change their weights or none does: a node whose stages disagree is broken.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from lemix.errors import ErrorCode, LemixError
from services.node_agent.core.types import Op
from services.node_agent.engine.base import StageResult
from services.node_agent.engine.ops import StageOp
from services.node_agent.loop_ports import NodeBroken
from services.node_agent.weight_ages import WeightAges


@dataclass(slots=True)
class WeightOp:
    """A weight operation on every stage. `payload` makes a stage's op.

    trained: unix time of the newest optimizer step contained, as a function of the time before (applied weights only).
    settles: see SyncRequested. adapter_ids: adapters that it reads or writes, which are not freed before its end.
    """

    changes_weights: bool
    payload: Callable[[Op], StageOp]
    trained: Callable[[float | None], float | None] = lambda before: before
    settles: bool = False
    adapter_ids: tuple[str, ...] = ()
    results: list[StageResult] = field(default_factory=list)
    version: int = 0


class WeightOps:
    """Weight operations and optimizer steps between their start and their last stage."""

    def __init__(self, num_stages: int, ages: WeightAges) -> None:
        self._top = num_stages - 1
        self._ages = ages
        self._under_way: dict[str, tuple[WeightOp, asyncio.Future[WeightOp]]] = {}
        # Optimizer steps on their way up: whether the stages so far have changed their weights.
        self._steps: dict[int, bool] = {}

    @property
    def is_idle(self) -> bool:
        """Whether no weight operation is asked for or runs."""
        return not self._under_way

    @property
    def adapter_ids(self) -> list[str]:
        """Adapters that what is asked for or runs reads or writes."""
        return [adapter_id for weight_op, _ in self._under_way.values() for adapter_id in weight_op.adapter_ids]

    def begin(self, subject: str, weight_op: WeightOp) -> "asyncio.Future[WeightOp]":
        """Ends with every stage's result. Raises LemixError CONFLICT when one of that name is under way."""
        if subject in self._under_way:
            raise LemixError(ErrorCode.CONFLICT, f"{subject} is under way already")
        future: asyncio.Future[WeightOp] = asyncio.get_running_loop().create_future()
        self._under_way[subject] = (weight_op, future)
        return future

    def payload(self, op: Op) -> StageOp:
        """What a stage runs for the core's op."""
        weight_op = self._under_way[op.subject][0]
        weight_op.version = op.version
        return weight_op.payload(op)

    def ended(self, stage: int, op: Op, result: StageResult) -> None:
        """Take over a stage's result; the operation ends with its last stage, or with an error that changed nothing.

        Raises NodeBroken when it changed the weights of some stages only.
        """
        weight_op, future = self._under_way[op.subject]
        weight_op.results.append(result)
        if stage != self._top and (op.changes_weights or not result.error):
            return
        del self._under_way[op.subject]
        if op.changes_weights:
            failed = [item for item in weight_op.results if item.error]
            if failed and len(failed) <= self._top:
                raise NodeBroken(f"{op.subject} changed the weights of some stages only: {failed[0].error}")
            before = self._ages.at(op.version)
            self._ages.record(op.version + 1, before if failed else weight_op.trained(before))
        if not future.done():
            future.set_result(weight_op)

    def step_ended(self, stage: int, op: Op, error: str) -> None:
        """Check an optimizer step. It has what it needs before it starts, so one that fails where others did not is
        never expected; if it happens, the weights belong to no version, and NodeBroken is raised."""
        is_last = stage == self._top
        changed = self._steps.pop(op.op_id, not error) if is_last else self._steps.setdefault(op.op_id, not error)
        if changed == bool(error):
            raise NodeBroken(f"optimizer step {op.version + 1} changed the weights of some stages only: {error}")

    def cancel(self) -> None:
        """Nothing that is under way ends any more."""
        for _, future in self._under_way.values():
            future.cancel()
