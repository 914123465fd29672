"""How long emulated operations take."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.latency import MOVES, LatencyModel, NodeLatency, OpKind
from services.node_agent.engine.inference_ops import Decode, DecodeSequence, Prefill
from services.node_agent.engine.ops import Measure, Offload, Reload, StageOp
from services.node_agent.engine.training_ops import OptimizerStep, TrainBackward, TrainForward
from services.node_agent.engine.weight_ops import LoadWeights, RestoreCheckpoint, SaveCheckpoint, Snapshot

_KINDS: Mapping[type, OpKind] = {
    Prefill: OpKind.PREFILL,
    Decode: OpKind.DECODE,
    TrainForward: OpKind.TRAIN_FORWARD,
    TrainBackward: OpKind.TRAIN_BACKWARD,
    OptimizerStep: OpKind.OPTIMIZER_STEP,
    Snapshot: OpKind.WEIGHT_SYNC,
    LoadWeights: OpKind.WEIGHT_SYNC,
    SaveCheckpoint: OpKind.WEIGHT_SYNC,
    RestoreCheckpoint: OpKind.WEIGHT_SYNC,
    Offload: OpKind.OFFLOAD,
    Reload: OpKind.RELOAD,
}


@dataclass(frozen=True, slots=True)
class EmulatedTiming:
    """Latency of a node, and how many times as long its operations take here. A kind without a model takes no time."""

    latency: NodeLatency
    time_scale: float = 1.0

    @classmethod
    def alike(cls, models: Mapping[OpKind, LatencyModel], num_stages: int = 1) -> "EmulatedTiming":
        """The same models on every stage."""
        return cls(NodeLatency((models,) * num_stages))

    def predict_s(self, stage: int, kind: OpKind, batch: int, length: float, cached: float = 0.0) -> float:
        """Seconds for `batch` sequences of `length` tokens (decode: context tokens) behind `cached` others."""
        return self.latency.op_s(stage, kind, batch, length, cached) * self.time_scale

    def op_s(self, stage: int, op: StageOp, *, shape: tuple[int, int, int] = (0, 0, 1), num_bytes: int = 0) -> float:
        """Seconds for this op.

        shape: of the micro-batch that a backward names, see `train_shape`. num_bytes: what an offload or reload moves.
        """
        match op:
            case Prefill():
                return self._prefill_s(stage, op)
            case Decode():
                return self._decode_s(stage, op.sequences)
            case TrainForward():
                batch, length, parts = train_shape(op)
                return self.predict_s(stage, OpKind.TRAIN_FORWARD, batch, length) / parts
            case TrainBackward():
                batch, length, parts = shape
                return self.predict_s(stage, OpKind.TRAIN_BACKWARD, batch, length) / parts
            case Offload() | Reload():
                return self._move_s(stage, kind_of(op), num_bytes)
            case _:
                kind = kind_of(op)
                return self.predict_s(stage, kind, 1, 1) if kind is not None else 0.0

    def measured_s(self, stage: int, kind: OpKind, op: Measure) -> float:
        """Seconds of one repetition of a measurement."""
        if kind in MOVES:
            return self._move_s(stage, kind, op.num_bytes)
        alone_s = self.predict_s(stage, kind, op.batch, op.length, op.cached_tokens)
        if not op.decodes:
            return alone_s
        return self.latency.mixed_s(stage, alone_s, self.predict_s(stage, OpKind.DECODE, op.decodes, op.decode_length))

    def slowdown(self, stage: int, kind: OpKind, busy: Iterable[OpKind]) -> float:
        """What an op takes longer while other stages run these."""
        return self.latency.slowdown_beside(stage, kind, busy)

    def noise(self, stage: int, kind: OpKind) -> float:
        """Relative standard deviation of an operation's durations."""
        model = self.latency.models[stage].get(kind)
        return model.noise if model is not None else 0.0

    def _prefill_s(self, stage: int, op: Prefill) -> float:
        sequences = [sequence for sequence in op.sequences if not sequence.shares]
        batch = max(1, len(sequences))
        cached = sum(sequence.cached_tokens for sequence in sequences)
        tokens = sum(sequence.end_token or len(sequence.token_ids) for sequence in sequences) - cached
        tokens += sum(len(s.reference_ids) for s in sequences if s.end_token in (0, len(s.token_ids)))
        prefill_s = self.predict_s(stage, OpKind.PREFILL, batch, tokens / batch, cached / batch)
        if not op.decodes:
            return prefill_s
        return self.latency.mixed_s(stage, prefill_s, self._decode_s(stage, op.decodes))

    def _decode_s(self, stage: int, sequences: tuple[DecodeSequence, ...]) -> float:
        contexts = sum(sequence.position + 1 for sequence in sequences)
        return self.predict_s(stage, OpKind.DECODE, len(sequences), contexts / max(1, len(sequences)))

    def _move_s(self, stage: int, kind: OpKind | None, num_bytes: int) -> float:
        if kind is None or not self.latency.host_links:
            return 0.0
        return self.latency.host_links[stage].move_s(kind, num_bytes) * self.time_scale


def kind_of(op: StageOp) -> OpKind | None:
    """The kind an op is timed as; None for one that takes no time."""
    return _KINDS.get(type(op))


def train_shape(op: TrainForward) -> tuple[int, int, int]:
    """Examples and padded length of a micro-batch, and the pieces it is cut into."""
    return len(op.examples), max(len(example.token_ids) for example in op.examples), op.parts


def measured_kinds(kind: str) -> tuple[OpKind, ...]:
    """Kinds whose durations a measurement of `kind` returns; none for an unknown kind."""
    if kind == OpKind.TRAIN_FORWARD:
        return (OpKind.TRAIN_FORWARD, OpKind.TRAIN_BACKWARD)
    if kind == OpKind.OFFLOAD:
        return (OpKind.OFFLOAD, OpKind.RELOAD)
    return tuple(known for known in OpKind if known == kind)
