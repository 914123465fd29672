"""Predicted durations of one node's operations, corrected by what its operations really took.

Training operations are corrected job by job: one that trains an adapter takes a fraction of what was profiled, and the
next job takes all of it again.

Every latency form is a case of `a + C * (b + l * (c + l * d))` for C sequences of l tokens, so the coefficients are
brought into that shape once, when the node joins: a decision evaluates them several times per candidate.
"""

from dataclasses import dataclass

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
#: The ratio of a job begins with the node's, which counts like so many observations, less this one.
_JOB_PRIOR = 4
#: Jobs with ratios of their own, those that trained here last.
_MAX_JOBS = 64


def _terms_of(model: LatencyModel | None) -> _Terms:
    terms = [0.0, 0.0, 0.0, 0.0]
    if model is not None:
        if model.form not in _POSITIONS:
            raise ValueError(f"the scheduler cannot evaluate the latency form {model.form!r}")
        for position, coefficient in zip(_POSITIONS[model.form], model.coefficients, strict=True):
            terms[position] = coefficient
    return (terms[0], terms[1], terms[2], terms[3])


@dataclass(slots=True)
class _Ratio:
    """Of real to predicted durations of one job's operations of one kind."""

    value: float
    count: int = 0

    def observe(self, ratio: float) -> None:
        """The first ones count for more: a job should not be over before its ratio is right."""
        gain = max(_CALIBRATION_GAIN, 1.0 / (_JOB_PRIOR + self.count))
        self.count += 1
        self.value += gain * (ratio - self.value)


class NodeCosts:
    """Durations in seconds of one node's operations; batch in sequences, length in tokens per sequence.

    job_id: whose training operation it is; of an unknown job it takes what this node's operations take in general.
    """

    __slots__ = ("_jobs", "_ratio", "_terms", "num_stages")

    def __init__(self, latency: NodeLatency) -> None:
        self.num_stages = latency.num_stages
        self._terms = {op: tuple(_terms_of(models.get(op)) for models in latency.models) for op in OpKind}
        self._ratio = dict.fromkeys(OpKind, 1.0)
        #: By job, the one that trained last at the end.
        self._jobs: dict[str, dict[OpKind, _Ratio]] = {}

    def stage_s(
        self, stage: int, op: OpKind, batch: float, length: float, cached: float = 0.0, job_id: str = ""
    ) -> float:
        """Duration of `op` on one stage; `cached`: tokens per sequence that come before those computed (prefill)."""
        a, b, c, d = self._terms[op][stage]
        # What grows with the square of the length costs (cached + length)^2 - cached^2.
        value = a + batch * (b + length * (c + (length + 2.0 * cached) * d))
        if value <= 0.0:
            return 0.0
        return value * (self._ratio_of(op, job_id) if job_id else self._ratio[op])

    def node_s(self, op: OpKind, batch: float, length: float, cached: float = 0.0, job_id: str = "") -> float:
        """Sum of the durations of `op` over the stages."""
        total = 0.0
        for a, b, c, d in self._terms[op]:
            value = a + batch * (b + length * (c + (length + 2.0 * cached) * d))
            if value > 0.0:
                total += value
        return total * (self._ratio_of(op, job_id) if job_id else self._ratio[op])

    def _ratio_of(self, op: OpKind, job_id: str) -> float:
        own = self._jobs[job_id].get(op) if job_id in self._jobs else None
        return self._ratio[op] if own is None else own.value

    def training_op_s(self, batch: int, length: int, job_id: str = "") -> float:
        """Longest single operation that a micro-batch brings to a stage: once started it blocks that long."""
        longest = 0.0
        for stage in range(self.num_stages):
            longest = max(
                longest,
                self.stage_s(stage, OpKind.TRAIN_FORWARD, batch, length, job_id=job_id),
                self.stage_s(stage, OpKind.TRAIN_BACKWARD, batch, length, job_id=job_id),
                self.stage_s(stage, OpKind.OPTIMIZER_STEP, 1, 1, job_id=job_id),
            )
        return longest

    def training_work_s(self, batch: int, length: int, job_id: str = "") -> float:
        """Mean time that a micro-batch keeps a stage busy."""
        kinds = (OpKind.TRAIN_FORWARD, OpKind.TRAIN_BACKWARD)
        return sum(self.node_s(kind, batch, length, job_id=job_id) for kind in kinds) / self.num_stages

    def calibrate(
        self, stage: int, op: OpKind, batch: float, length: float, actual_s: float, cached: float = 0.0
    ) -> None:
        """Learn from a real duration: later predictions of `op` move towards real / predicted."""
        real = self._real_ratio(stage, op, batch, length, actual_s, cached)
        if real is not None:
            ratio = self._ratio[op]
            self._ratio[op] = ratio + _CALIBRATION_GAIN * (real - ratio)

    def calibrate_job(self, job_id: str, stage: int, op: OpKind, batch: float, length: float, actual_s: float) -> None:
        """The same for the operations of one job."""
        real = self._real_ratio(stage, op, batch, length, actual_s, 0.0)
        if real is None:
            return
        # The one that trained last goes to the end.
        ratios = self._jobs[job_id] = self._jobs.pop(job_id, {})
        if op not in ratios:
            ratios[op] = _Ratio(self._ratio[op])
        ratios[op].observe(real)
        if len(self._jobs) > _MAX_JOBS:
            del self._jobs[next(iter(self._jobs))]

    def knows_job(self, job_id: str) -> bool:
        """Whether it has ratios of its own."""
        return job_id in self._jobs

    def forget_job(self, job_id: str) -> None:
        """It trains no more."""
        self._jobs.pop(job_id, None)

    def _real_ratio(
        self, stage: int, op: OpKind, batch: float, length: float, actual_s: float, cached: float
    ) -> float | None:
        a, b, c, d = self._terms[op][stage]
        predicted_s = a + batch * (b + length * (c + (length + 2.0 * cached) * d))
        if predicted_s <= 0.0 or actual_s <= 0.0:
            return None
        return min(max(actual_s / predicted_s, _CALIBRATION_MIN), _CALIBRATION_MAX)
