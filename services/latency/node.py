"""Latency of a node: the models of its stages, and what operations cost that run together or beside each other."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from services.latency.kinds import OpKind
from services.latency.model import LatencyModel


@dataclass(frozen=True, slots=True)
class Interference:
    """What `op` on `stage` takes longer while the node's other stages run `busy`.

    slowdown: duration beside it over the duration alone, less 1 (a fraction; may be negative). std: of that over the
    points measured.
    """

    stage: int
    op: OpKind
    busy: OpKind
    slowdown: float
    std: float = 0.0

    def __post_init__(self) -> None:
        if not self.slowdown > -1.0:
            raise ValueError(f"slowdown of {self.op} beside {self.busy} must be more than -1, got {self.slowdown}")


@dataclass(frozen=True, slots=True)
class HostLink:
    """Copies between a stage's device and host memory: fixed_s + bytes / bandwidth."""

    offload_bytes_per_s: float
    reload_bytes_per_s: float
    fixed_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("offload_bytes_per_s", "reload_bytes_per_s"):
            if not getattr(self, name) > 0.0:
                raise ValueError(f"{name} of a host link must be positive, got {getattr(self, name)}")
        if not self.fixed_s >= 0.0:
            raise ValueError(f"fixed_s of a host link must not be negative, got {self.fixed_s}")

    def move_s(self, op: OpKind, num_bytes: float) -> float:
        """Seconds that an OFFLOAD or RELOAD of so many bytes takes."""
        bandwidth = self.offload_bytes_per_s if op is OpKind.OFFLOAD else self.reload_bytes_per_s
        return self.fixed_s + num_bytes / bandwidth


@dataclass(frozen=True, slots=True)
class MixedCost:
    """A prefill that decodes too, in terms of both alone: prefill * P + decode * D - shared * min(P, D).

    shared: what is done once instead of twice, first of all reading the weights. mape, residual_p5, residual_p95: like
    those of `LatencyModel`.
    """

    prefill: float = 1.0
    decode: float = 1.0
    shared: float = 0.0
    mape: float = 0.0
    residual_p5: float = 0.0
    residual_p95: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prefill", "decode", "shared"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name} of a mixed cost must not be negative, got {getattr(self, name)}")

    def predict_s(self, prefill_s: float, decode_s: float) -> float:
        """Duration of both together; never less than the longer one's share."""
        together_s = self.prefill * prefill_s + self.decode * decode_s
        least_s = max(self.prefill * prefill_s, self.decode * decode_s)
        return max(least_s, together_s - self.shared * min(prefill_s, decode_s))


@dataclass(frozen=True, slots=True)
class NodeLatency:
    """Models of one node: `models[stage][op]`. Coefficients are per node, so a slow node is predicted as slow.

    host_links, mixed: one per stage, or none when they were not measured.
    """

    models: tuple[Mapping[OpKind, LatencyModel], ...]
    interference: tuple[Interference, ...] = ()
    host_links: tuple[HostLink, ...] = ()
    mixed: tuple[MixedCost, ...] = ()
    _slowdowns: dict[tuple[int, OpKind, OpKind], float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("host_links", "mixed"):
            if len(getattr(self, name)) not in (0, len(self.models)):
                raise ValueError(f"{len(getattr(self, name))} {name} for {len(self.models)} stages")
        slowdowns = {(item.stage, item.op, item.busy): item.slowdown for item in self.interference}
        object.__setattr__(self, "_slowdowns", slowdowns)

    @property
    def num_stages(self) -> int:
        """Pipeline stages described."""
        return len(self.models)

    def op_s(self, stage: int, op: OpKind, batch: float, length: float, cached: float = 0.0) -> float:
        """Duration in seconds of `op` on `stage`; 0 for an operation the profile does not hold."""
        model = self.models[stage].get(op)
        return model.predict_s(batch, length, cached) if model is not None else 0.0

    def node_s(self, op: OpKind, batch: float, length: float, cached: float = 0.0) -> float:
        """Sum of the operation's durations over all stages, seconds."""
        return sum(self.op_s(stage, op, batch, length, cached) for stage in range(len(self.models)))

    def mixed_s(self, stage: int, prefill_s: float, decode_s: float) -> float:
        """Duration in seconds of a prefill and a decode in one operation; their sum when it was not measured."""
        return self.mixed[stage].predict_s(prefill_s, decode_s) if self.mixed else prefill_s + decode_s

    def slowdown(self, stage: int, op: OpKind, busy: OpKind) -> float:
        """What `op` takes longer while all other stages run `busy` (a fraction); 0 when it was not measured."""
        return self._slowdowns.get((stage, op, busy), 0.0)

    def slowdown_beside(self, stage: int, op: OpKind, busy: Iterable[OpKind]) -> float:
        """The same when only some of the other stages are busy, with an operation each.

        Approximate: what was measured with all of them busy is shared out evenly among them.
        """
        if not self._slowdowns:
            return 0.0
        return sum(self.slowdown(stage, op, other) for other in busy) / max(1, len(self.models) - 1)
