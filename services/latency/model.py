"""Latency of one operation on one stage as a function of batch and length.

Source: paper section 4 (quadratic form); the richer forms are LeMix's own, because fused attention and short,
memory-bound sequences do not follow a square law.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class OpKind(StrEnum):
    """Kinds of operation a stage runs, one at a time."""

    PREFILL = "prefill"
    DECODE = "decode"
    TRAIN_FORWARD = "train_forward"
    TRAIN_BACKWARD = "train_backward"
    OPTIMIZER_STEP = "optimizer_step"
    WEIGHT_SYNC = "weight_sync"
    #: KV caches or activations go to host memory, or come back. Their time is bytes / bandwidth, no latency model.
    OFFLOAD = "offload"
    RELOAD = "reload"


#: Kinds that no latency model is fitted for.
MOVES = frozenset((OpKind.OFFLOAD, OpKind.RELOAD))


def _quadratic(batch: float, length: float) -> tuple[float, ...]:
    return (batch * length * length,)


def _affine(batch: float, length: float) -> tuple[float, ...]:
    return (1.0, batch * length)


def _full(batch: float, length: float) -> tuple[float, ...]:
    return (1.0, batch * length, batch * length * length)


def _full_decode(batch: float, length: float) -> tuple[float, ...]:
    return (1.0, batch, batch * length)


def _constant(batch: float, length: float) -> tuple[float, ...]:
    del batch, length
    return (1.0,)


#: Form name -> features of (batch, length); a duration is the dot product with the coefficients.
#: `quadratic` is the paper's. Decode's length is the mean context per sequence.
FORMS = {
    "quadratic": _quadratic,
    "affine": _affine,
    "full": _full,
    "full_decode": _full_decode,
    "constant": _constant,
}


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """A fitted form. `interval_p90` is the half width of the 90 % interval of the relative residual (fraction)."""

    form: str
    coefficients: tuple[float, ...]
    mape: float = 0.0
    interval_p90: float = 0.0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"unknown latency form {self.form!r}; known: {', '.join(sorted(FORMS))}")
        expected = len(FORMS[self.form](1.0, 1.0))
        if len(self.coefficients) != expected:
            raise ValueError(f"form {self.form} takes {expected} coefficients, got {len(self.coefficients)}")

    def predict_s(self, batch: float, length: float) -> float:
        """Duration in seconds, never negative, for `batch` sequences of `length` tokens each."""
        features = FORMS[self.form](batch, length)
        total = 0.0
        for coefficient, feature in zip(self.coefficients, features, strict=True):
            total += coefficient * feature
        return total if total > 0.0 else 0.0


@dataclass(frozen=True, slots=True)
class NodeLatency:
    """Models of one node: `models[stage][op]`. Coefficients are per node, so a slow node is predicted as slow."""

    models: tuple[Mapping[OpKind, LatencyModel], ...]

    @property
    def num_stages(self) -> int:
        """Pipeline stages described."""
        return len(self.models)

    def op_s(self, stage: int, op: OpKind, batch: float, length: float) -> float:
        """Duration in seconds of `op` on `stage`; 0 for an operation the profile does not hold."""
        model = self.models[stage].get(op)
        return model.predict_s(batch, length) if model is not None else 0.0

    def node_s(self, op: OpKind, batch: float, length: float) -> float:
        """Sum of the operation's durations over all stages, seconds."""
        return sum(self.op_s(stage, op, batch, length) for stage in range(len(self.models)))
