"""Durations of one emulated stage: what the profile predicts, with its spread and what neighbours cost."""

from collections.abc import Iterable
from random import Random

from services.latency import OpKind
from services.node_agent.engine.emulated.timing import EmulatedTiming, kind_of
from services.node_agent.engine.ops import Measure, StageOp

#: A duration stays above this share of the predicted one.
_SHORTEST = 0.1
#: What a measurement says of an op that takes no time, and takes itself, seconds.
_SHORTEST_S = 1e-6


class StageDurations:
    """`seed`: of the spread; the same seed gives the same durations. None: exactly what is predicted."""

    def __init__(self, timing: EmulatedTiming, stage: int, seed: str | None) -> None:
        self.timing = timing
        self._stage = stage
        self._random = None if seed is None else Random(f"{seed}/{stage}")

    def op_s(
        self,
        op: StageOp,
        *,
        shape: tuple[int, int, int] = (0, 0, 1),
        num_bytes: int = 0,
        busy: Iterable[OpKind] = (),
    ) -> float:
        """Seconds for this op beside the ops that other stages run. See EmulatedTiming.op_s."""
        kind = kind_of(op)
        if kind is None:
            # What a measurement asks for is known: its repetitions need not be waited for.
            return _SHORTEST_S if isinstance(op, Measure) else 0.0
        duration_s = self.timing.op_s(self._stage, op, shape=shape, num_bytes=num_bytes)
        return duration_s * (1.0 + self.timing.slowdown(self._stage, kind, busy)) * self._noise(kind)

    def measured_s(self, kind: OpKind, op: Measure) -> tuple[float, ...]:
        """What the repetitions of a measurement took."""
        predicted_s = self.timing.measured_s(self._stage, kind, op)
        if op.beside:
            predicted_s *= 1.0 + self.timing.latency.slowdown(self._stage, kind, OpKind(op.beside))
        return tuple(max(_SHORTEST_S, predicted_s) * self._noise(kind) for _ in range(op.repetitions))

    def _noise(self, kind: OpKind) -> float:
        if self._random is None:
            return 1.0
        return max(_SHORTEST, 1.0 + self.timing.noise(self._stage, kind) * self._random.gauss(0.0, 1.0))
