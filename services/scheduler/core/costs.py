"""Predicted durations of one node's operations, corrected by what its operations really took.

Every latency form is a case of `a + C * (b + l * (c + l * d))` for C sequences of l tokens, so the coefficients are
brought into that shape once, when the node joins: a decision evaluates them several times per candidate.
"""

from services.latency import LatencyModel, NodeLatency, OpKind

_Terms = tuple[float, float, float, float]

#: Form name -> position of its coefficients in (a, b, c, d).
_POSITIONS = {
    "constant": (0,),
    "affine": (0, 2),
    "quadratic": (3,),
    "full": (0, 2, 3),
    "full_decode": (0, 1, 2),
}

#: Weight of a new observation in the running ratio of real to predicted duration.
_CALIBRATION_GAIN = 0.05
#: The ratio stays within these bounds, so that one outlier (a swapped-out process) cannot freeze a node out.
_CALIBRATION_MIN, _CALIBRATION_MAX = 0.2, 5.0


def _terms_of(model: LatencyModel | None) -> _Terms:
    terms = [0.0, 0.0, 0.0, 0.0]
    if model is not None:
        if model.form not in _POSITIONS:
            raise ValueError(f"the scheduler cannot evaluate the latency form {model.form!r}")
        for position, coefficient in zip(_POSITIONS[model.form], model.coefficients, strict=True):
            terms[position] = coefficient
    return (terms[0], terms[1], terms[2], terms[3])


class NodeCosts:
    """Durations in seconds of one node's operations; batch in sequences, length in tokens per sequence."""

    __slots__ = ("_ratio", "_terms", "num_stages")

    def __init__(self, latency: NodeLatency) -> None:
        self.num_stages = latency.num_stages
        self._terms = {op: tuple(_terms_of(models.get(op)) for models in latency.models) for op in OpKind}
        self._ratio = dict.fromkeys(OpKind, 1.0)

    def stage_s(self, stage: int, op: OpKind, batch: float, length: float, cached: float = 0.0) -> float:
        """Duration of `op` on one stage; `cached`: tokens per sequence that come before those computed (prefill)."""
        a, b, c, d = self._terms[op][stage]
        # What grows with the square of the length costs (cached + length)^2 - cached^2.
        value = a + batch * (b + length * (c + (length + 2.0 * cached) * d))
        return value * self._ratio[op] if value > 0.0 else 0.0

    def node_s(self, op: OpKind, batch: float, length: float, cached: float = 0.0) -> float:
        """Sum of the durations of `op` over the stages."""
        total = 0.0
        for a, b, c, d in self._terms[op]:
            value = a + batch * (b + length * (c + (length + 2.0 * cached) * d))
            if value > 0.0:
                total += value
        return total * self._ratio[op]

    def training_op_s(self, batch: int, length: int) -> float:
        """Longest single operation that a micro-batch brings to a stage: once started it blocks that long."""
        longest = 0.0
        for stage in range(self.num_stages):
            longest = max(
                longest,
                self.stage_s(stage, OpKind.TRAIN_FORWARD, batch, length),
                self.stage_s(stage, OpKind.TRAIN_BACKWARD, batch, length),
                self.stage_s(stage, OpKind.OPTIMIZER_STEP, 1, 1),
            )
        return longest

    def training_work_s(self, batch: int, length: int) -> float:
        """Mean time that a micro-batch keeps a stage busy."""
        kinds = (OpKind.TRAIN_FORWARD, OpKind.TRAIN_BACKWARD)
        return sum(self.node_s(kind, batch, length) for kind in kinds) / self.num_stages

    def calibrate(
        self, stage: int, op: OpKind, batch: float, length: float, actual_s: float, cached: float = 0.0
    ) -> None:
        """Learn from a real duration: later predictions of `op` move towards real / predicted."""
        a, b, c, d = self._terms[op][stage]
        predicted_s = a + batch * (b + length * (c + (length + 2.0 * cached) * d))
        if predicted_s <= 0.0 or actual_s <= 0.0:
            return
        ratio = self._ratio[op]
        ratio += _CALIBRATION_GAIN * (min(max(actual_s / predicted_s, _CALIBRATION_MIN), _CALIBRATION_MAX) - ratio)
        self._ratio[op] = ratio
