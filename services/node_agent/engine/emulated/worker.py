"""The books of one emulated stage, and the results of its ops."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from services.node_agent.checkpoint_files import state_file, weights_file, weights_files
from services.node_agent.engine.base import EngineConfig, MeasuredMemory, ModelInfo, StageResult
from services.node_agent.engine.emulated.durations import StageDurations
from services.node_agent.engine.emulated.memory import EmulatedMemory
from services.node_agent.engine.emulated.timing import measured_kinds, train_shape
from services.node_agent.engine.handle import Handle
from services.node_agent.engine.inference_ops import (
    Decode,
    DecodeSequence,
    Logprobs,
    Prefill,
    PrefillSequence,
    SampledToken,
    Sampling,
)
from services.node_agent.engine.ops import Forget, Measure, Offload, Reload, StageOp, VersionedChange
from services.node_agent.engine.training_ops import OptimizerStep, TrainBackward, TrainForward
from services.node_agent.engine.weight_ops import LoadWeights, RestoreCheckpoint, SaveCheckpoint, Snapshot, round_of

_INITIAL_WEIGHT = 4.0
_ELEMENTS = 4
_MAX_SNAPSHOTS = 2
_MAX_NORMS = 16


class BookkeepingError(RuntimeError):
    """The op does not fit what the stage holds: whoever drives the stage made a mistake."""


def next_token(previous_id: int, position: int, vocab_size: int) -> int:
    """The token after `previous_id`; `position` is the 0-based index of the new token in prompt plus output."""
    return (previous_id * 31 + position * 7 + 1) % vocab_size


class EmulatedStage:
    """State of one stage.

    Its only parameter, `layers.<stage>.weight` (F32, shape (4,)), starts at 4. The loss of anything is the mean of all
    stages' weights. An optimizer step multiplies the weights by 1 - min(0.5, 100 * learning rate), so that the loss
    falls with every step; each backward adds 1 to its group's squared gradient norm.
    """

    def __init__(
        self, index: int, config: EngineConfig, info: ModelInfo, directory: Path, durations: StageDurations
    ) -> None:
        self.index = index
        self.is_first = index == 0
        self.is_last = index == config.num_stages - 1
        self.version = 0
        self.kv_tokens: dict[str, int] = {}
        self.train_shapes: dict[str, tuple[int, int, int]] = {}
        self.grad_norms_sq: dict[int, float] = {}
        #: Of the newest steps, for tests.
        self.clip_norms_sq: deque[float | None] = deque(maxlen=_MAX_NORMS)
        self.memory = EmulatedMemory(
            self.kv_tokens,
            self.train_shapes,
            kv_bytes_per_token=info.kv_bytes_per_token,
            activation_bytes_per_token=info.activation_bytes_per_token,
            kv_block_tokens=config.kv_block_tokens,
        )
        self._num_stages = config.num_stages
        self._info = info
        self._kv_capacity_tokens = config.kv_capacity_tokens
        self._can_offload = config.can_offload
        self._directory = directory
        self._durations = durations
        #: By request: how it is sampled, and the tokens of its prompt.
        self._samplings: dict[str, tuple[Sampling, int]] = {}
        #: Pieces of a micro-batch that have run, of forward and backward together.
        self._pieces: dict[str, int] = {}
        #: What entered a micro-batch with its first piece.
        self._partials: dict[str, float] = {}
        self._snapshots: dict[str, npt.NDArray[Any]] = {}
        # By version: the current one, and older ones that ops on their way need.
        self._weights = {0: np.full(_ELEMENTS, _INITIAL_WEIGHT, dtype=np.float32)}
        self._handlers: dict[type, Callable[[Any], dict[str, Any]]] = {
            Prefill: self._prefill,
            Decode: self._decode,
            TrainForward: self._train_forward,
            TrainBackward: self._train_backward,
            OptimizerStep: self._optimizer_step,
            Snapshot: self._snapshot,
            LoadWeights: self._load_weights,
            SaveCheckpoint: self._save_checkpoint,
            RestoreCheckpoint: self._restore_checkpoint,
            Forget: self._forget,
            Offload: self._offload,
            Reload: self._reload,
            Measure: self._measure,
        }

    @property
    def weight(self) -> float:
        """Mean of this stage's parameter."""
        return float(self._weights[self.version].mean())

    @property
    def versions(self) -> tuple[int, ...]:
        """Versions an op can run with, the current one last."""
        return tuple(self._weights)

    def bytes_to_move(self, op: Offload | Reload) -> int:
        """Bytes that an offload or reload copies."""
        return self.memory.bytes_to_move(op.task_ids, to_host=isinstance(op, Offload))

    def perform(self, op: StageOp, begin_s: float, end_s: float) -> StageResult:
        """Do the op's bookkeeping; one that breaks it, or cannot be done, is returned as failed."""
        try:
            fields = self._handlers[type(op)](op)
        except (BookkeepingError, ArithmeticError, OSError, SafetensorError, ValueError, KeyError) as error:
            fields = {"error": f"{type(error).__name__}: {error}"}
        if isinstance(op, VersionedChange) and op.version == self.version:
            self._advance(op)
        held_bytes = self.memory.device_bytes() if self._can_offload else 0
        return StageResult(
            op_id=op.op_id, begin_s=begin_s, end_s=end_s, version=self.version, held_bytes=held_bytes, **fields
        )

    # ------------------------------------------------------------- serving

    def _prefill(self, op: Prefill) -> dict[str, Any]:
        self._check_on_device(name for s in op.sequences for name in (s.request_id, s.continues))
        partial = self._partial(op)
        ended = []
        for sequence in op.sequences:
            end = sequence.end_token or len(sequence.token_ids)
            self._take_over(sequence)
            self._use_kv(sequence.request_id, end - self.kv_tokens.get(sequence.request_id, 0))
            self._samplings[sequence.request_id] = sequence.sampling, len(sequence.token_ids) - sequence.output_tokens
            if end == len(sequence.token_ids):
                ended.append(sequence)
        self._append(op.decodes)
        if not self.is_last:
            return {"output": Handle(partial)}
        firsts = [self._sample(s.request_id, s.token_ids[-1], len(s.token_ids)) for s in ended]
        return {
            "tokens": (*firsts, *self._next_tokens(op.decodes)),
            "reference_losses": tuple((sequence.request_id, partial) for sequence in ended if sequence.reference_ids),
        }

    def _take_over(self, sequence: PrefillSequence) -> None:
        """The first `cached_tokens` are in the cache: the request's own, or of the one it continues."""
        name = sequence.request_id
        if name in self.kv_tokens and (sequence.continues or sequence.shares or not sequence.cached_tokens):
            raise BookkeepingError(f"{name} is in the KV cache already")
        source = sequence.continues or sequence.shares or name
        held = self.kv_tokens.get(source, 0)
        if held < sequence.cached_tokens or (source == name and held != sequence.cached_tokens):
            raise BookkeepingError(f"{source} holds {held} tokens, not {sequence.cached_tokens}")
        if sequence.continues:
            del self.kv_tokens[sequence.continues]
            self._samplings.pop(sequence.continues, None)
        if sequence.cached_tokens:
            self.kv_tokens[name] = sequence.cached_tokens

    def _decode(self, op: Decode) -> dict[str, Any]:
        partial = self._partial(op)
        self._append(op.sequences)
        if not self.is_last:
            return {"output": Handle(partial)}
        return {"tokens": self._next_tokens(op.sequences)}

    def _append(self, sequences: tuple[DecodeSequence, ...]) -> None:
        self._check_on_device(sequence.request_id for sequence in sequences)
        for sequence in sequences:
            if self.kv_tokens.get(sequence.request_id) != sequence.position:
                held = self.kv_tokens.get(sequence.request_id)
                raise BookkeepingError(f"{sequence.request_id} holds {held} tokens, position {sequence.position}")
            self._use_kv(sequence.request_id, 1)

    def _next_tokens(self, sequences: tuple[DecodeSequence, ...]) -> tuple[SampledToken, ...]:
        return tuple(self._sample(s.request_id, s.token_id, s.position + 1) for s in sequences)

    def _sample(self, request_id: str, previous_id: int, position: int) -> SampledToken:
        token_id = next_token(previous_id, position, self._info.vocab_size)
        sampling, num_prompt = self._samplings[request_id]
        ends = token_id in self._info.eos_token_ids and not sampling.ignore_eos
        if position - num_prompt < sampling.min_tokens:
            ends = False
        return SampledToken(request_id, token_id, ends, self._logprobs(token_id, sampling))

    def _logprobs(self, token_id: int, sampling: Sampling) -> Logprobs | None:
        """As if every token were half as likely as the one before, beginning with the one that comes."""
        if sampling.logprobs is None:
            return None
        vocab_size = self._info.vocab_size
        likeliest = range(min(sampling.logprobs, vocab_size))
        return Logprobs(
            -math.log(2.0), tuple(((token_id + i) % vocab_size, -math.log(2.0) * (i + 1)) for i in likeliest)
        )

    def _use_kv(self, request_id: str, tokens: int) -> None:
        if sum(self.kv_tokens.values()) + tokens > self._kv_capacity_tokens:
            raise BookkeepingError(f"the KV cache of {self._kv_capacity_tokens} tokens is full")
        self.kv_tokens[request_id] = self.kv_tokens.get(request_id, 0) + tokens

    def _check_on_device(self, task_ids: Iterable[str]) -> None:
        missing = self.memory.missing(task_ids)
        if missing:
            raise BookkeepingError(f"{', '.join(missing)} is in host memory")

    def _offload(self, op: Offload) -> dict[str, Any]:
        self.memory.offload(task_id for task_id in op.task_ids if self.memory.task_bytes(task_id))
        return {}

    def _reload(self, op: Reload) -> dict[str, Any]:
        self.memory.reload(op.task_ids)
        return {}

    def _forget(self, op: Forget) -> dict[str, Any]:
        self.memory.reload(op.task_ids)
        for task_id in op.task_ids:
            self.kv_tokens.pop(task_id, None)
            self._samplings.pop(task_id, None)
            self.train_shapes.pop(task_id, None)
            self._pieces.pop(task_id, None)
            self._partials.pop(task_id, None)
        return {}

    # ------------------------------------------------------------- training

    def _train_forward(self, op: TrainForward) -> dict[str, Any]:
        if op.part == 0:
            if op.task_id in self.train_shapes:
                raise BookkeepingError(f"{op.task_id} has saved activations already")
            self._partials[op.task_id] = self._partial(op)
            self.train_shapes[op.task_id] = train_shape(op)
        self._check_on_device((op.task_id,))
        self._weight_of(op.version)
        self._count_piece(op.task_id, op.part)
        if op.part + 1 < op.parts:
            return {}
        partial = self._partials.pop(op.task_id)
        if not self.is_last:
            return {"output": Handle(partial)}
        labels = sum(len(example.token_ids) - max(1, example.num_context_tokens) for example in op.examples)
        return {"loss": partial, "label_tokens": labels}

    def _train_backward(self, op: TrainBackward) -> dict[str, Any]:
        if (op.gradient is not None) != (op.part == 0 and not self.is_last):
            raise BookkeepingError("a gradient comes from the next stage with the first piece, and only from there")
        if op.task_id not in self.train_shapes:
            raise BookkeepingError(f"{op.task_id} has no saved activations")
        self._check_on_device((op.task_id,))
        parts = self.train_shapes[op.task_id][2]
        self._count_piece(op.task_id, parts + op.part)
        if op.part + 1 < parts:
            return {}
        del self.train_shapes[op.task_id], self._pieces[op.task_id]
        norm_sq = self.grad_norms_sq[op.group] = self.grad_norms_sq.get(op.group, 0.0) + 1.0
        return {"grad_norm_sq": norm_sq, "output": None if self.is_first else Handle("gradient")}

    def _count_piece(self, task_id: str, place: int) -> None:
        ran = self._pieces.get(task_id, 0)
        if ran != place:
            raise BookkeepingError(f"{task_id} runs piece {place} after {ran} pieces")
        self._pieces[task_id] = ran + 1

    def _optimizer_step(self, op: OptimizerStep) -> dict[str, Any]:
        self._check_is_current(op.version)
        own_norm_sq = self.grad_norms_sq.pop(op.group, 0.0)
        norm_sq = own_norm_sq if op.grad_norm_sq_total is None else op.grad_norm_sq_total
        self.clip_norms_sq.append(op.grad_norm_sq_total)
        if not math.isfinite(norm_sq):
            raise ArithmeticError(f"the squared gradient norm is {norm_sq}")
        factor = np.float32(1.0 - min(0.5, 100.0 * op.optimizer.learning_rate))
        self._weights[op.version + 1] = self._weights[op.version] * factor
        return {"grad_norm_sq": norm_sq}

    # ------------------------------------------------------------- weights

    @property
    def _parameter(self) -> str:
        return f"layers.{self.index}.weight"

    def _snapshot(self, op: Snapshot) -> dict[str, Any]:
        weight = self._weight_of(op.version)
        self._directory.mkdir(mode=0o700, exist_ok=True)
        path = self._directory / f"{op.sync_id.replace('/', '_')}-{self.index}.safetensors"
        self._snapshots[op.sync_id] = weight
        rounds = list(dict.fromkeys(map(round_of, self._snapshots)))
        for name in [name for name in self._snapshots if round_of(name) in rounds[:-_MAX_SNAPSHOTS]]:
            del self._snapshots[name]
        save_file({self._parameter: weight}, path)
        return {"weights_path": str(path)}

    def _load_weights(self, op: LoadWeights) -> dict[str, Any]:
        self._check_is_current(op.version)
        loaded = load_file(op.path)[self._parameter].astype(np.float32)
        if op.mode == "average":
            loaded = self._weights[op.version] + loaded - self._snapshots[op.sync_id]
        self._weights[op.version + 1] = loaded
        return {}

    def _save_checkpoint(self, op: SaveCheckpoint) -> dict[str, Any]:
        self._check_is_current(op.version)
        tensors = {self._parameter: self._weights[op.version]}
        for name in (weights_file, state_file):
            save_file(tensors, Path(op.folder) / name(self.index, self._num_stages))
        return {}

    def _restore_checkpoint(self, op: RestoreCheckpoint) -> dict[str, Any]:
        self._check_is_current(op.version)
        loaded = {name: value for file in weights_files(Path(op.folder)) for name, value in load_file(file).items()}
        self._weights[op.version + 1] = loaded[self._parameter]
        return {}

    def _advance(self, op: VersionedChange) -> None:
        """The version rises also when the op failed, with equal weights: stages stay in step."""
        current = self._weights[self.version]
        self.version += 1
        self._weights.setdefault(self.version, current)
        oldest = self.version if op.oldest_version is None else op.oldest_version
        self._weights = {v: weight for v, weight in self._weights.items() if v >= min(oldest, self.version)}

    # ------------------------------------------------------------- the rest

    def _measure(self, op: Measure) -> dict[str, Any]:
        kinds = measured_kinds(op.kind)
        if not kinds:
            raise ValueError(f"cannot measure {op.kind!r}")
        return {
            "durations_s": tuple((kind.value, self._durations.measured_s(kind, op)) for kind in kinds),
            "memory": MeasuredMemory((self.index + 1) << 20, moved_bytes=op.num_bytes),
        }

    def _check_is_current(self, version: int) -> None:
        if version != self.version:
            raise BookkeepingError(f"stage {self.index} is at version {self.version}, the op wants {version}")

    def _weight_of(self, version: int) -> npt.NDArray[Any]:
        """The parameter as an op stamped `version` must see it."""
        if version not in self._weights:
            raise BookkeepingError(f"stage {self.index} has the versions {self.versions}, the op wants {version}")
        return self._weights[version]

    def _partial(self, op: Prefill | Decode | TrainForward) -> float:
        """Mean of the weights of this stage and those before it, weighted for the mean over all stages."""
        # All elements are equal; numpy's mean takes longer than the rest of a decode's bookkeeping.
        weight = float(self._weight_of(op.version)[0])
        if self.is_first != (op.hidden is None):
            raise BookkeepingError("activations come from the previous stage, and only from there")
        before = 0.0 if op.hidden is None else float(str(op.hidden.token))
        return before + weight / self._num_stages
