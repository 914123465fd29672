"""How long emulated operations take."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.latency import LatencyModel, OpKind
from services.node_agent.engine.inference_ops import Decode, DecodeSequence, Prefill
from services.node_agent.engine.ops import Measure, StageOp
from services.node_agent.engine.training_ops import OptimizerStep, TrainBackward, TrainForward
from services.node_agent.engine.weight_ops import LoadWeights, RestoreCheckpoint, SaveCheckpoint, Snapshot


@dataclass(frozen=True, slots=True)
class EmulatedTiming:
    """Latency models by kind, the same on every stage; a kind without one takes no time."""

    models: Mapping[OpKind, LatencyModel] = field(default_factory=dict)

    def predict_s(self, kind: OpKind, batch: int, length: float) -> float:
        """Seconds for `batch` sequences of `length` tokens (decode: context tokens)."""
        model = self.models.get(kind)
        return model.predict_s(batch, length) if model is not None else 0.0

    def op_s(self, op: StageOp, train_shapes: Mapping[str, tuple[int, int, int]]) -> float:
        """Seconds for this op. train_shapes: of the micro-batches a backward may name, see `train_shape`."""
        match op:
            case Prefill():
                return self._prefill_s(op)
            case Decode():
                return self._decode_s(op.sequences)
            case TrainForward():
                batch, length, parts = train_shape(op)
                return self.predict_s(OpKind.TRAIN_FORWARD, batch, length) / parts
            case TrainBackward():
                batch, length, parts = train_shapes.get(op.task_id, (0, 0, 1))
                return self.predict_s(OpKind.TRAIN_BACKWARD, batch, length) / parts
            case OptimizerStep():
                return self.predict_s(OpKind.OPTIMIZER_STEP, 1, 1)
            case Snapshot() | LoadWeights() | SaveCheckpoint() | RestoreCheckpoint():
                return self.predict_s(OpKind.WEIGHT_SYNC, 1, 1)
            case Measure():
                # Once is enough: every repetition would take the same.
                return sum(self.predict_s(kind, op.batch, op.length) for kind in measured_kinds(op.kind))
            case _:
                return 0.0

    def _prefill_s(self, op: Prefill) -> float:
        """A prefill of tokens that follow cached ones takes what the whole takes more than they do."""
        sequences = [sequence for sequence in op.sequences if not sequence.shares]
        batch = len(sequences)
        tokens = sum(sequence.end_token or len(sequence.token_ids) for sequence in sequences)
        references = (len(s.reference_ids) for s in sequences if s.end_token in (0, len(s.token_ids)))
        whole_s = self.predict_s(OpKind.PREFILL, batch, (tokens + sum(references)) / max(1, batch))
        whole_s += self._decode_s(op.decodes) if op.decodes else 0.0
        cached_tokens = sum(sequence.cached_tokens for sequence in sequences)
        if not cached_tokens:
            return whole_s
        saved_s = self.predict_s(OpKind.PREFILL, batch, cached_tokens / batch)
        return whole_s - saved_s + self.predict_s(OpKind.PREFILL, batch, 0)

    def _decode_s(self, sequences: tuple[DecodeSequence, ...]) -> float:
        contexts = [sequence.position + 1 for sequence in sequences]
        return self.predict_s(OpKind.DECODE, len(contexts), sum(contexts) / max(1, len(contexts)))


def train_shape(op: TrainForward) -> tuple[int, int, int]:
    """Examples and padded length of a micro-batch, and the pieces it is cut into."""
    return len(op.examples), max(len(example.token_ids) for example in op.examples), op.parts


def measured_kinds(kind: str) -> tuple[OpKind, ...]:
    """Kinds whose durations a measurement of `kind` returns; none for an unknown kind."""
    if kind == OpKind.TRAIN_FORWARD:
        return (OpKind.TRAIN_FORWARD, OpKind.TRAIN_BACKWARD)
    return tuple(known for known in OpKind if known == kind)
