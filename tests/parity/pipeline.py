"""Drives an engine's stages through whole-model operations, as the node agent does, one operation at a time."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from services.node_agent.engine.base import EngineConfig, StageResult
from services.node_agent.engine.handle import Handle
from services.node_agent.engine.inference_ops import Decode, DecodeSequence, Prefill, PrefillSequence
from services.node_agent.engine.ops import Forget, StageOp
from services.node_agent.engine.torch.engine import InProcessStageWorker, TorchEngine, load_inprocess_engine
from services.node_agent.engine.torch.executor import StageExecutor
from services.node_agent.engine.training_ops import (
    AdapterSpec,
    Example,
    OptimizerSpec,
    OptimizerStep,
    TrainBackward,
    TrainForward,
)
from services.node_agent.engine.weight_ops import LoadWeights, Snapshot

#: Where the stages compute; the references stay on the CPU.
DEVICE = os.environ.get("LEMIX_TEST_DEVICE", "cpu")


@dataclass
class Pipeline:
    """`version` is the weights version the next op is stamped with.

    grad_norms_sq: squared norm of what each accumulation group holds on all stages.
    """

    engine: TorchEngine
    version: int = 0
    grad_norms_sq: dict[int, float] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, stages: int = 1, *, dtype: str = "float64", **config: object) -> "Pipeline":
        """All stages in this process."""
        given: dict[str, object] = {"devices": (DEVICE,), **config}
        settings = EngineConfig(model_path=str(path), num_stages=stages, dtype=dtype, **given)  # type: ignore[arg-type]
        return cls(load_inprocess_engine(settings))

    @property
    def executors(self) -> list[StageExecutor]:
        """The stages themselves (in-process engines only)."""
        workers = self.engine.workers
        return [worker.executor for worker in workers if isinstance(worker, InProcessStageWorker)]

    async def run(self, stage: int, op: StageOp) -> StageResult:
        """One op on one stage, which must not fail."""
        result = await self.engine.workers[stage].run(op)
        assert result.error == "", result.error
        return result

    async def up(self, make: Callable[[Handle | None], StageOp]) -> StageResult:
        """A forward through all stages; the last stage's result."""
        handle: Handle | None = None
        for stage in range(len(self.engine.workers)):
            result = await self.run(stage, make(handle))
            handle = result.output
        return result

    async def prefill(self, *sequences: PrefillSequence) -> StageResult:
        """Prefill requests together."""
        return await self.up(lambda hidden: Prefill(0, self.version, sequences, hidden))

    async def decode(self, *sequences: DecodeSequence) -> StageResult:
        """One iteration."""
        return await self.up(lambda hidden: Decode(0, self.version, sequences, hidden))

    async def forward(
        self,
        task_id: str,
        examples: Sequence[Example],
        loss_scale: float = 1.0,
        *,
        parts: int = 1,
        adapter: AdapterSpec | None = None,
    ) -> StageResult:
        """Training forward of a micro-batch, in pieces on every stage."""
        batch = tuple(examples)
        hidden: Handle | None = None
        for stage in range(len(self.engine.workers)):
            for part in range(parts):
                given = hidden if part == 0 else None
                op = TrainForward(0, self.version, task_id, batch, loss_scale, given, part, parts, adapter=adapter)
                result = await self.run(stage, op)
            hidden = result.output
        return result

    async def backward(self, task_id: str, group: int = 0, *, parts: int = 1) -> None:
        """Backward of a micro-batch on all stages, in as many pieces as its forward."""
        gradient = tied = None
        self.grad_norms_sq[group] = 0.0
        for stage in reversed(range(len(self.engine.workers))):
            for part in range(parts):
                given = (gradient, tied if stage == 0 else None) if part == 0 else (None, None)
                result = await self.run(stage, TrainBackward(0, task_id, *given, group, part))
            gradient, tied = result.output, result.tied_gradient or tied
            assert result.grad_norm_sq is not None
            self.grad_norms_sq[group] += result.grad_norm_sq

    async def step(
        self, optimizer: OptimizerSpec, job_id: str = "job", *, group: int = 0, oldest_version: int | None = None
    ) -> None:
        """Optimizer step on every stage."""
        last = len(self.engine.workers) - 1
        tied: Handle | None = None
        for stage in range(last + 1):
            given = tied if stage == last else None
            norm_sq = self.grad_norms_sq[group]
            op = OptimizerStep(0, self.version, job_id, optimizer, norm_sq, given, group, oldest_version)
            result = await self.run(stage, op)
            tied = result.output or tied
        self.version += 1

    async def snapshot(self, sync_id: str, adapter: AdapterSpec | None = None) -> list[str]:
        """Snapshot every stage; the files."""
        stages = range(len(self.engine.workers))
        return [(await self.run(stage, Snapshot(0, self.version, sync_id, adapter))).weights_path for stage in stages]

    async def load_weights(
        self,
        sync_id: str,
        path: Path,
        mode: str,
        *,
        oldest_version: int | None = None,
        adapter: AdapterSpec | None = None,
    ) -> None:
        """Replace or average the weights of every stage."""
        for stage in range(len(self.engine.workers)):
            await self.run(stage, LoadWeights(0, self.version, sync_id, str(path), mode, oldest_version, adapter))
        self.version += 1

    async def forget(self, *task_ids: str) -> None:
        """Forget tasks on every stage."""
        for stage in range(len(self.engine.workers)):
            await self.run(stage, Forget(0, task_ids))

    async def generate(self, sequence: PrefillSequence) -> list[int]:
        """Prefill one request and decode it to its end; its tokens."""
        result = await self.prefill(sequence)
        tokens = [result.tokens[0].token_id]
        while len(tokens) < sequence.max_tokens and not result.tokens[0].is_end:
            position = len(sequence.token_ids) + len(tokens) - 1
            result = await self.decode(DecodeSequence(sequence.request_id, tokens[-1], position))
            tokens.append(result.tokens[0].token_id)
        return tokens

    def record_logits(self) -> list[Tensor]:
        """Everything the last stage's projection returns from now on."""
        recorded: list[Tensor] = []
        stage = self.executors[-1].stage
        project = stage.logits

        def logits(rows: Tensor) -> Tensor:
            output = project(rows)
            recorded.append(output.cpu())
            return output

        stage.logits = logits  # type: ignore[method-assign]
        return recorded

    def weights(self) -> dict[str, Tensor]:
        """Current parameters of all stages by full-model name."""
        named: dict[str, Tensor] = {}
        for executor in self.executors:
            named |= {
                name: part.clone().cpu() for name, part in executor.stage.weights.named(with_borrowed=False).items()
            }
        return named

    def adapter(self, adapter_id: str) -> dict[str, Tensor]:
        """An adapter's parameters of all stages by their names in an adapter_model.safetensors."""
        named: dict[str, Tensor] = {}
        for executor in self.executors:
            weights = executor.stage.adapters.get(adapter_id).weights
            named |= {name: part.clone().cpu() for name, part in weights.named(with_borrowed=False).items()}
        return named

    def adapter_gradients(self, adapter_id: str, group: int = 0) -> dict[str, Tensor]:
        """A group's accumulated gradients of an adapter."""
        named: dict[str, Tensor] = {}
        for executor in self.executors:
            weights = executor.stage.adapters.get(adapter_id).weights
            for weight, gradient in zip(weights.owned, executor.training.gradients[group], strict=True):
                named |= dict(weight.parts(gradient.cpu()))
        return named

    def gradients(self, group: int = 0) -> dict[str, Tensor]:
        """A group's accumulated gradients of all stages by full-model name."""
        named: dict[str, Tensor] = {}
        for executor in self.executors:
            held = executor.training.gradients[group]
            for weight, gradient in zip(executor.stage.weights.owned, held, strict=True):
                named |= dict(weight.parts(gradient.cpu()))
        return named


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Same names, and per tensor ||found - expected|| <= tolerance * ||expected||."""
    assert set(found) == set(expected)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]}"


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float64).tiny))
