"""Predicted durations of one node's operations, corrected by what its operations really took.

Training operations of adapters are corrected job by job as well: one takes a fraction of what was profiled, and the
next job takes all of it again.

Every latency form but `tabulated` is a case of `a + C * (b + l * (c + l * d))` for C sequences of l tokens, so the
coefficients are kept in that shape: a decision evaluates them several times per candidate.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from services.latency import OPTIMIZER_STEP, TRAIN_BACKWARD, TRAIN_FORWARD, LatencyModel, NodeLatency, OpKind
from services.scheduler.core.calibration import Terms, coefficients_of, is_polynomial, terms_of
from services.scheduler.core.drift import DriftDetector
from services.scheduler.core.residuals import MeanError, Residuals

#: Weight of a new observation in the running ratio of a job.
_JOB_GAIN = 0.05
#: A ratio begins with 1, which counts like so many observations, less this one.
_JOB_PRIOR = 4
#: An observation counts as within these bounds, so that an outlier (a swapped-out process) does not stop a job.
_JOB_LEAST, _JOB_MOST = 0.02, 5.0
#: Jobs with ratios of their own, those that trained here last.
_MAX_JOBS = 64


@dataclass(slots=True)
class _Ratio:
    """Of durations of one job's operations of one kind to what the node's take in general."""

    value: float = 1.0
    count: int = 0

    def observe(self, ratio: float) -> None:
        """The first ones count for more: a job should not be over before its ratio is right."""
        gain = max(_JOB_GAIN, 1.0 / (_JOB_PRIOR + self.count))
        self.count += 1
        self.value += gain * (ratio - self.value)


class OpRecord(NamedTuple):
    """What was learnt of one operation on one stage.

    num_seen: operations. error, error_beside: running mean of |predicted - real| / real while the node did only its
    kind of work, and while it both served and trained (None: that did not happen). ratio: predicted now over profiled,
    of the newest operation. low, high: 90 % of the durations lie between these multiples of the prediction. drifting:
    the alarm.
    """

    stage: int
    op: OpKind
    num_seen: int
    error: float | None
    error_beside: float | None
    ratio: float
    low: float
    high: float
    drifting: bool


class DriftChange(NamedTuple):
    """The alarm of one operation on one stage began or ended. ratio: predicted now over profiled."""

    stage: int
    op: OpKind
    active: bool
    ratio: float


class _Learner:
    """All that is learnt of one operation on one stage."""

    __slots__ = ("alone", "beside", "coefficients", "drift", "residuals", "table")

    def __init__(self, model: LatencyModel, drift_band: float) -> None:
        self.coefficients = coefficients_of(model)
        self.table = None if is_polynomial(model) else model
        self.residuals = Residuals(model)
        # Where the form misses its own measurements by more than the band, being off is nothing new.
        self.drift = DriftDetector(max(drift_band, model.mape)) if drift_band else None
        self.alone = MeanError()
        self.beside = MeanError()

    def record(self, stage: int, op: OpKind) -> OpRecord:
        """What is known now."""
        alone, beside, residuals = self.alone, self.beside, self.residuals
        return OpRecord(
            stage,
            op,
            alone.count + beside.count,
            alone.value if alone.count else None,
            beside.value if beside.count else None,
            self.coefficients.ratio,
            math.exp(residuals.low),
            math.exp(residuals.high),
            self.drift is not None and self.drift.active,
        )


class NodeCosts:
    """Durations in seconds of one node's operations; batch in sequences, length in tokens per sequence.

    job_id: whose training operation it is; of an unknown job it takes what this node's operations take in general.
    drift_band: error of the profile that raises no alarm, a fraction; where the profile's own held-out error is larger,
    that. 0: no alarms.
    """

    __slots__ = (
        "_by_stage",
        "_drift_band",
        "_jobs",
        "_latency",
        "_learners",
        "_sums",
        "_tables",
        "_terms",
        "changes",
        "num_stages",
    )

    def __init__(self, latency: NodeLatency, drift_band: float = 0.0) -> None:
        self.num_stages = latency.num_stages
        #: Alarms that began or ended and were not taken yet.
        self.changes: list[DriftChange] = []
        self._latency = latency
        self._drift_band = drift_band
        self._terms: dict[OpKind, list[Terms]] = {}
        self._tables: dict[tuple[OpKind, int], LatencyModel] = {}
        for op in OpKind:
            models = [stage.get(op) for stage in latency.models]
            self._terms[op] = [terms_of(model) for model in models]
            tables = {(op, stage): model for stage, model in enumerate(models) if model and not is_polynomial(model)}
            self._tables.update(tables)
        #: Operations whose duration on the node is no sum of polynomials: a table, or one that may fall below 0.
        self._by_stage = {op for op, terms in self._terms.items() if min(map(min, terms), default=0.0) < 0.0}
        self._by_stage.update(op for op, _ in self._tables)
        #: Terms added up over the stages; None: to be added up again.
        self._sums: dict[OpKind, Terms | None] = dict.fromkeys(OpKind)
        self._learners: dict[OpKind, list[_Learner | None]] = {op: [None] * self.num_stages for op in OpKind}
        #: By job, the one that trained last at the end.
        self._jobs: dict[str, dict[OpKind, _Ratio]] = {}

    def stage_s(
        self, stage: int, op: OpKind, batch: float, length: float, cached: float = 0.0, job_id: str = ""
    ) -> float:
        """Duration of `op` on one stage; `cached`: tokens per sequence that come before those computed (prefill)."""
        a, b, c, d = self._terms[op][stage]
        if self._tables and (op, stage) in self._tables:
            value = a * self._tables[op, stage].predict_s(batch, length, cached)
        else:
            # What grows with the square of the length costs (cached + length)^2 - cached^2.
            value = a + batch * (b + length * (c + (length + 2.0 * cached) * d))
        if value <= 0.0:
            return 0.0
        return value * self._ratio_of(op, job_id) if job_id else value

    def node_s(self, op: OpKind, batch: float, length: float, cached: float = 0.0, job_id: str = "") -> float:
        """Sum of the durations of `op` over the stages."""
        sums = self._sums[op]
        if sums is None:
            if op in self._by_stage:
                return sum([self.stage_s(stage, op, batch, length, cached, job_id) for stage in range(self.num_stages)])
            sums = self._sums[op] = self._added_up(op)
        a, b, c, d = sums
        value = a + batch * (b + length * (c + (length + 2.0 * cached) * d))
        return value * self._ratio_of(op, job_id) if job_id else value

    def mixed_s(self, stage: int, prefill_s: float, decode_s: float) -> float:
        """Duration of a prefill and a decode in one operation, of what each takes alone."""
        return self._latency.mixed_s(stage, prefill_s, decode_s)

    def interval_s(
        self, stage: int, op: OpKind, batch: float, length: float, cached: float = 0.0
    ) -> tuple[float, float]:
        """Between these two durations on one stage 90 % of such operations should end."""
        predicted_s = self.stage_s(stage, op, batch, length, cached)
        learner = self._learner(stage, op)
        if learner is None:
            return predicted_s, predicted_s
        return predicted_s * math.exp(learner.residuals.low), predicted_s * math.exp(learner.residuals.high)

    def training_op_s(self, batch: int, length: int, job_id: str = "") -> float:
        """Longest single operation that a micro-batch brings to a stage: once started it blocks that long."""
        longest = 0.0
        for stage in range(self.num_stages):
            longest = max(
                longest,
                self.stage_s(stage, TRAIN_FORWARD, batch, length, job_id=job_id),
                self.stage_s(stage, TRAIN_BACKWARD, batch, length, job_id=job_id),
                self.stage_s(stage, OPTIMIZER_STEP, 1, 1, job_id=job_id),
            )
        return longest

    def training_work_s(self, batch: int, length: int, job_id: str = "") -> float:
        """Mean time that a micro-batch keeps a stage busy."""
        kinds = (TRAIN_FORWARD, TRAIN_BACKWARD)
        return sum(self.node_s(kind, batch, length, job_id=job_id) for kind in kinds) / self.num_stages

    # ----------------------------------------------------------------- learning

    def calibrate(
        self,
        stage: int,
        op: OpKind,
        batch: float,
        length: float,
        actual_s: float,
        cached: float = 0.0,
        *,
        beside: bool = False,
    ) -> None:
        """Learn from a real duration; nothing from one that is no positive number. beside: the node served and trained
        while it ran."""
        learner = self._learners[op][stage] or self._learner(stage, op)
        if learner is None or not 0.0 < actual_s < math.inf:
            return
        coefficients = learner.coefficients
        if learner.table is not None:
            actual_s /= learner.table.predict_s(batch, length, cached) or math.inf
        profiled_s = coefficients.profiled_s(batch, length, cached)
        if profiled_s <= 0.0 or actual_s <= 0.0:
            return
        residuals, drift = learner.residuals, learner.drift
        sigma = residuals.sigma
        residual = coefficients.observe(profiled_s, actual_s, sigma, batch, length, cached)
        self._terms[op][stage] = coefficients.terms
        self._sums[op] = None
        residuals.observe(residual)
        (learner.beside if beside else learner.alone).observe(abs(coefficients.ratio * profiled_s / actual_s - 1.0))
        if drift is not None and drift.observe(math.log(actual_s / profiled_s), sigma):
            self.changes.append(DriftChange(stage, op, drift.active, coefficients.ratio))

    def records(self) -> list[OpRecord]:
        """What was learnt, by stage and operation."""
        learners = [
            (stage, op, learner)
            for stage in range(self.num_stages)
            for op in OpKind
            if (learner := self._learners[op][stage]) is not None
        ]
        records = [learner.record(stage, op) for stage, op, learner in learners]
        return [record for record in records if record.num_seen]

    def _learner(self, stage: int, op: OpKind) -> _Learner | None:
        learner = self._learners[op][stage]
        if learner is None:
            model = self._latency.models[stage].get(op)
            if model is None:
                return None
            learner = self._learners[op][stage] = _Learner(model, self._drift_band)
        return learner

    def _added_up(self, op: OpKind) -> Terms:
        a = b = c = d = 0.0
        for terms in self._terms[op]:
            a += terms[0]
            b += terms[1]
            c += terms[2]
            d += terms[3]
        return (a, b, c, d)

    # ----------------------------------------------------------------- jobs

    def trains(self, job_id: str) -> None:
        """One of its operations ended here: from now on it is known, until it is forgotten."""
        # The one that trained last goes to the end, where it mostly is.
        if next(reversed(self._jobs), None) == job_id:
            return
        self._jobs[job_id] = self._jobs.pop(job_id, {})
        if len(self._jobs) > _MAX_JOBS:
            del self._jobs[next(iter(self._jobs))]

    def calibrate_job(self, job_id: str, stage: int, op: OpKind, batch: float, length: float, actual_s: float) -> None:
        """Learn from a real duration what the operations of this job take, compared with the node's in general."""
        self.trains(job_id)
        predicted_s = self.stage_s(stage, op, batch, length)
        if predicted_s > 0.0 and 0.0 < actual_s < math.inf:
            ratio = self._jobs[job_id].setdefault(op, _Ratio())
            ratio.observe(min(max(actual_s / predicted_s, _JOB_LEAST), _JOB_MOST))

    def knows_job(self, job_id: str) -> bool:
        """Whether it has trained here and was not forgotten."""
        return job_id in self._jobs

    def forget_job(self, job_id: str) -> None:
        """It trains no more."""
        self._jobs.pop(job_id, None)

    def _ratio_of(self, op: OpKind, job_id: str) -> float:
        own = self._jobs[job_id].get(op) if job_id in self._jobs else None
        return 1.0 if own is None else own.value
