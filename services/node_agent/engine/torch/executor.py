"""Runs stage ops one at a time on a loaded stage: checks versions, moves tensors, turns exceptions into results."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from services.node_agent.engine.base import EngineConfig, StageResult
from services.node_agent.engine.handle import Handle
from services.node_agent.engine.inference_ops import Decode, Prefill
from services.node_agent.engine.ops import Forget, Measure, Offload, Reload, StageOp, VersionedChange
from services.node_agent.engine.torch import checkpoint
from services.node_agent.engine.torch.inference import Inference, InferenceOutput
from services.node_agent.engine.torch.load import ModelSpec
from services.node_agent.engine.torch.lora_config import adapter_shapes
from services.node_agent.engine.torch.measure import StageTimer
from services.node_agent.engine.torch.microbatch import TrainingOptions
from services.node_agent.engine.torch.stage import Stage, parse_dtype, widen
from services.node_agent.engine.torch.training import Training
from services.node_agent.engine.torch.transport import Transport
from services.node_agent.engine.torch.weights import Snapshots, read_weights
from services.node_agent.engine.torch.wire import Ready, Shared, Sharing
from services.node_agent.engine.training_ops import OptimizerStep, TrainBackward, TrainForward
from services.node_agent.engine.weight_ops import LoadWeights, RestoreCheckpoint, SaveCheckpoint, Snapshot


class VersionMismatch(RuntimeError):
    """An op was stamped with a weights version that the stage does not hold (any more)."""


class StageExecutor:
    """One stage with everything it owns. Not thread-safe: one op at a time."""

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, stage: int, transport: Transport, snapshot_folder: Path
    ) -> None:
        """Loads the stage's weights. Raises ModelDirectoryError or ValueError."""
        context = spec.info(config.max_context_tokens).max_context_tokens
        self.stage = Stage(spec, stage, config.num_stages, device=config.device(stage), dtype=config.dtype)
        self._transport = transport
        self.inference = Inference(
            self.stage,
            kv_capacity_tokens=config.kv_capacity_tokens,
            max_context_tokens=context,
            kv_block_tokens=config.kv_block_tokens,
            allocate=transport.allocate,
        )
        options = training_options(config, self.stage)
        self.training = Training(self.stage, max_context_tokens=context, options=options, allocate=transport.allocate)
        self._can_offload = config.can_offload
        self._snapshots = Snapshots(snapshot_folder)
        self._timer = StageTimer(self.stage, snapshot_folder, context, config.kv_block_tokens, options)
        self._handlers: dict[type, Callable[[Any], StageResult]] = {
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
    def version(self) -> int:
        """The current weights version."""
        return self.stage.weights.version

    @property
    def ready(self) -> Ready:
        """What a token takes here."""
        shape = self.inference.cache.shape
        activation = self._timer.activation_bytes_per_token() if self._can_offload else 0
        return Ready(shape.block_bytes // shape.block_tokens, activation)

    @property
    def held_bytes(self) -> int:
        """Bytes of KV blocks and saved activations on the device."""
        return self.inference.cache.used_bytes + self.training.held_bytes

    def warm_up(self) -> None:
        """Make the first op as fast as the later ones; before any `run`."""
        self._timer.warm_up()

    def run(self, op: StageOp) -> StageResult:
        """Run one op to its end. What it raises becomes `StageResult.error`; the stage stays usable."""
        begin_s = time.monotonic()
        try:
            result = self._handlers[type(op)](op)
            if self.stage.device.type == "cuda":
                torch.cuda.synchronize(self.stage.device)
            self._transport.settle()
        except Exception as error:
            result = StageResult(op.op_id, 0.0, 0.0, 0, error=f"{type(error).__name__}: {_message(error)}")
            if isinstance(op, VersionedChange) and op.version == self.version:
                # The op travels on all the same: stages stay at one version although this one changed nothing.
                self.stage.advance(op.oldest_version)
        held_bytes = self.held_bytes if self._can_offload else 0
        return replace(result, begin_s=begin_s, end_s=time.monotonic(), version=self.version, held_bytes=held_bytes)

    def share(self, message: Sharing) -> Shared:
        """One step of sharing device memory with the other stages."""
        return self._transport.share(message)

    def close(self) -> None:
        """Remove what the stage left on disk and let go of shared memory."""
        self._snapshots.clear()
        self._transport.close()

    def _prefill(self, op: Prefill) -> StageResult:
        hidden = self._input(op.hidden)
        with self._weights_of(op.version):
            return self._inference_result(op, self.inference.prefill(op, hidden))

    def _decode(self, op: Decode) -> StageResult:
        hidden = self._input(op.hidden)
        with self._weights_of(op.version):
            return self._inference_result(op, self.inference.decode(op, hidden))

    def _inference_result(self, op: Prefill | Decode, output: InferenceOutput) -> StageResult:
        hidden = output.hidden
        names = [sequence.request_id for sequence in op.sequences]
        if isinstance(op, Prefill):
            names += [sequence.request_id for sequence in op.decodes]
        return _result(
            op,
            output=None if hidden is None else self._transport.put(hidden, names),
            tokens=output.tokens,
            reference_losses=output.reference_losses,
        )

    def _train_forward(self, op: TrainForward) -> StageResult:
        hidden = self._input(op.hidden, first=op.part == 0)
        if op.optimizer is not None:
            self.training.prepare(op.job_id, op.optimizer, op.adapter)
        with self._weights_of(op.version):
            output = self.training.forward(op, hidden)
        return _result(
            op,
            output=self._put(output.hidden, op.task_id),
            loss=output.loss,
            label_tokens=output.label_tokens,
        )

    def _train_backward(self, op: TrainBackward) -> StageResult:
        # Its version does not matter: the graph holds the weights its forward ran with.
        gradient, tied = self._input(op.gradient, first=False), self._input(op.tied_gradient, first=False)
        begins = op.part == 0
        if (gradient is not None) != (begins and not self.stage.is_last):
            raise ValueError("a backward takes a gradient on every stage but the last")
        if (tied is not None) != (begins and self.training.wants_tied_gradient(op.task_id)):
            raise ValueError(
                "a backward takes a tied gradient exactly on stage 0 of a split model with tied embeddings"
            )
        output = self.training.backward(op, gradient, tied)
        return _result(
            op,
            output=self._put(output.hidden, op.task_id),
            tied_gradient=self._put(output.tied, op.task_id),
            grad_norm_sq=output.grad_norm_sq,
        )

    def _optimizer_step(self, op: OptimizerStep) -> StageResult:
        tied_weight = self._input(op.tied_weight, first=False)
        self._begin_version(op)
        norm_sq, embedding = self.training.step(op, tied_weight)
        return _result(op, output=self._put(embedding, op.job_id), grad_norm_sq=norm_sq)

    def _snapshot(self, op: Snapshot) -> StageResult:
        with self._weights_of(op.version):
            adapter_id = "" if op.adapter is None else op.adapter.adapter_id
            weights = self.stage.adapters.get(adapter_id).weights if adapter_id else self.stage.weights
            return _result(op, weights_path=str(self._snapshots.take(op.sync_id, weights)))

    def _load_weights(self, op: LoadWeights) -> StageResult:
        self._begin_version(op)
        if op.mode not in ("replace", "average"):
            raise ValueError(f"unknown mode {op.mode!r}; known: replace, average")
        weights, shapes = self.stage.weights, self.stage.spec.parameter_shapes
        if op.adapter is not None:
            weights, shapes = self.training.adapter(op.adapter).weights, adapter_shapes(op.adapter, self.stage.spec)
        loaded = read_weights(op.path, weights, shapes)
        own = self._snapshots.read(op.sync_id) if op.mode == "average" else None

        def update(name: str, current: Tensor) -> Tensor:
            if own is None:
                return loaded[name]
            wide = widen(current)
            return wide + (loaded[name].to(wide) - own[name].to(wide))

        self.training.before_change(weights)
        with torch.no_grad():
            weights.apply(update)
        return _result(op)

    def _save_checkpoint(self, op: SaveCheckpoint) -> StageResult:
        if op.version != self.version:
            self._refuse(op.version, (self.version,))
        checkpoint.save(Path(op.folder), self.stage, self.training, op.adapters)
        return _result(op)

    def _restore_checkpoint(self, op: RestoreCheckpoint) -> StageResult:
        self._begin_version(op)
        checkpoint.restore(Path(op.folder), self.stage, self.training)
        return _result(op)

    def _forget(self, op: Forget) -> StageResult:
        self.inference.forget(op.task_ids)
        self.training.forget((*op.task_ids, *op.adapter_ids))
        self.stage.adapters.forget(op.adapter_ids)
        self._transport.forget(op.task_ids)
        return _result(op)

    def _offload(self, op: Offload) -> StageResult:
        for task_id in op.task_ids:
            if task_id in self.inference.cache:
                self.inference.cache.offload(task_id)
            elif self.training.holds(task_id):
                self.training.offload(task_id)
        return _result(op)

    def _reload(self, op: Reload) -> StageResult:
        for task_id in op.task_ids:
            if task_id in self.inference.cache:
                self.inference.cache.reload(task_id)
            elif self.training.holds(task_id):
                self.training.reload(task_id)
        return _result(op)

    def _measure(self, op: Measure) -> StageResult:
        durations_s, memory = self._timer.measure(op)
        return _result(op, durations_s=durations_s, memory=memory)

    def _input(self, handle: Handle | None, *, first: bool = True) -> Tensor | None:
        """The tensor behind a handle. Read before anything can fail, so that it never stays behind unread."""
        if handle is not None:
            return self._transport.take(handle, self.stage.device)
        if first and not self.stage.is_first:
            raise ValueError(f"stage {self.stage.index} needs the hidden states of the stage before it")
        return None

    def _put(self, tensor: Tensor | None, task_id: str) -> Handle | None:
        return None if tensor is None else self._transport.put(tensor, (task_id,))

    def _weights_of(self, version: int) -> AbstractContextManager[None]:
        """The weights an op was stamped with."""
        weights = self.stage.weights
        if version not in weights.versions:
            self._refuse(version, weights.versions)
        return self.stage.at(version)

    def _begin_version(self, op: VersionedChange) -> None:
        """Raised before the change: one that fails counts as well, so that all stages agree on the version."""
        if op.version != self.version:
            self._refuse(op.version, (self.version,))
        self.stage.advance(op.oldest_version)

    def _refuse(self, version: int, held: Sequence[int]) -> NoReturn:
        versions = ", ".join(map(str, held))
        raise VersionMismatch(f"the op is for weights version {version}, stage {self.stage.index} holds {versions}")


def training_options(config: EngineConfig, stage: Stage) -> TrainingOptions:
    """How a stage trains. Raises ValueError for a training_dtype that it cannot use."""
    if config.training_dtype in ("", config.dtype):
        return TrainingOptions(None, config.activation_checkpointing, config.can_offload)
    if (config.training_dtype, config.dtype) != ("bfloat16", "float32"):
        raise ValueError(
            f'training_dtype is {config.training_dtype!r} with dtype {config.dtype!r}; mixed precision is "bfloat16" '
            'with "float32"'
        )
    if stage.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f'{stage.device} does not compute in bfloat16; leave training_dtype ""')
    return TrainingOptions(parse_dtype(config.training_dtype), config.activation_checkpointing, config.can_offload)


def _result(op: StageOp, **fields: Any) -> StageResult:
    """Times and version are filled in by `run`."""
    return StageResult(op_id=op.op_id, begin_s=0.0, end_s=0.0, version=0, **fields)


def _message(error: Exception) -> str:
    # str(KeyError) is the repr of its argument.
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
