"""Forward, backward and optimizer steps of one stage.

Gradients are taken with `torch.autograd.grad` for the parameters the forward ran with and kept apart by accumulation
group, so steps may come between a micro-batch's forward and its backward, and backwards of the next group before the
step of this one (weight stashing): a step works on new parameter objects and leaves those a graph holds untouched.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from services.node_agent.engine.torch.adapters import Adapter
from services.node_agent.engine.torch.microbatch import ForwardOutput, Microbatch, TrainingOptions, num_labels
from services.node_agent.engine.torch.outlet import Allocate
from services.node_agent.engine.torch.schedule import make_schedule
from services.node_agent.engine.torch.stage import Stage
from services.node_agent.engine.torch.weights import WeightSet
from services.node_agent.engine.training_ops import (
    AdapterSpec,
    Example,
    OptimizerSpec,
    OptimizerStep,
    TrainBackward,
    TrainForward,
)

#: Jobs whose AdamW moments (twice the parameters each) a stage keeps at most. A backstop: the agent has jobs forgotten
#: long before, but never one with micro-batches on the node.
MAX_JOBS = 32


@dataclass(frozen=True, slots=True)
class BackwardOutput:
    """`hidden`: gradient for the previous stage. `tied`: last stage's part of the tied embedding's gradient.

    grad_norm_sq: squared norm of everything its group has accumulated on this stage so far. Nothing, when pieces are to
    come.
    """

    hidden: Tensor | None = None
    tied: Tensor | None = None
    grad_norm_sq: float | None = None


@dataclass(slots=True)
class _Job:
    """`weights`: all of the stage, or those of the job's adapter."""

    weights: WeightSet
    spec: OptimizerSpec
    optimizer: torch.optim.AdamW
    scheduler: LambdaLR


@dataclass(slots=True)
class _Accumulated:
    """Gradients of a group, in the order of the weights owned."""

    weights: WeightSet
    gradients: list[Tensor]


class Training:
    """Training state of a stage: micro-batches in flight, gradients by accumulation group, one AdamW per job."""

    def __init__(
        self, stage: Stage, *, max_context_tokens: int, options: TrainingOptions, allocate: Allocate | None = None
    ) -> None:
        """allocate: memory for what goes to another stage; None: memory like any other."""
        self._stage = stage
        self._allocate = allocate
        self._max_context_tokens = max_context_tokens
        self._options = options
        self._saved: dict[str, Microbatch] = {}
        #: What the last stage of a split model with tied embeddings has for stage 0, by micro-batch in its backward.
        self._tied: dict[str, Tensor] = {}
        self._groups: dict[int, _Accumulated] = {}
        self._jobs: dict[str, _Job] = {}
        stage.weights.on_replace.append(self._rekey)

    @property
    def num_in_flight(self) -> int:
        """Micro-batches whose forward ran and whose backward has not."""
        return len(self._saved)

    @property
    def gradients(self) -> Mapping[int, Sequence[Tensor]]:
        """What each group has accumulated, in the order of the weights it trains."""
        return {group: accumulated.gradients for group, accumulated in self._groups.items()}

    @property
    def jobs(self) -> Mapping[str, _Job]:
        """Jobs that hold optimizer state here."""
        return self._jobs

    def adopt(self, jobs: Mapping[str, _Job]) -> None:
        """Go on with the optimizers of these jobs, made over the owned parameters in use, and no others."""
        self._jobs = dict(jobs)

    def prepare(self, job_id: str, optimizer: OptimizerSpec, spec: AdapterSpec | None = None) -> None:
        """Take the memory of a job's steps, at the newest weights, and make its adapter if it trains one. Raises
        ValueError when the optimizer or the adapter changed, or for too many of them."""
        self._job(job_id, optimizer, self._stage.weights if spec is None else self.adapter(spec).weights)

    def adapter(self, spec: AdapterSpec) -> Adapter:
        """The adapter, made if it is new. Raises ValueError as Adapters.ensure does."""
        adapter = self._stage.adapters.ensure(spec)
        if not adapter.weights.on_replace:
            adapter.weights.on_replace.append(self._rekey)
        return adapter

    def forward(self, op: TrainForward, hidden: Tensor | None) -> ForwardOutput:
        """Run (a piece of) a micro-batch and keep its graph. Raises ValueError for bad examples or a wrong piece,
        ArithmeticError for a loss that is not finite; the micro-batch is dropped then."""
        if op.part == 0:
            if op.task_id in self._saved:
                raise ValueError(f"micro-batch {op.task_id} is in flight already")
            check_examples(op.examples, self._stage, self._max_context_tokens)
            microbatch = Microbatch(
                self._stage,
                op.examples,
                op.loss_scale,
                hidden,
                options=self._options,
                parts=op.parts,
                adapter=self._adapter_of(op),
                dropout_key="" if op.measures else op.task_id,
                allocate=self._allocate,
            )
        else:
            microbatch = self._in_flight(op.task_id)
        try:
            output = microbatch.forward(op.part)
        except BaseException:
            self._saved.pop(op.task_id, None)
            raise
        self._saved[op.task_id] = microbatch
        return output

    def backward(self, op: TrainBackward, gradient: Tensor | None, tied: Tensor | None) -> BackwardOutput:
        """Add (a piece of) a micro-batch's gradient to its group's; `tied` is the last stage's part of the tied
        embedding's (stage 0 only). A micro-batch that fails is dropped; what its group has of it stays there."""
        microbatch = self._in_flight(op.task_id)
        del self._saved[op.task_id]
        found = microbatch.backward(op.part, gradient)
        weights = microbatch.weights
        owned = [value for weight, value in zip(weights.weights, found.parameters, strict=True) if not weight.borrowed]
        if tied is not None:
            # A copy: what was taken from another stage goes when its micro-batch is forgotten.
            owned[0] = tied.clone() if owned[0] is None else owned[0].add_(tied)
        accumulated = self._accumulate(op.group, weights, owned)
        exported = self._export(op.task_id, weights, found.parameters)
        if op.part + 1 < microbatch.parts:
            self._saved[op.task_id] = microbatch
            return BackwardOutput()
        self._tied.pop(op.task_id, None)
        return BackwardOutput(found.entering, exported, _norm_sq(accumulated))

    @property
    def held_bytes(self) -> int:
        """Bytes of activations on the device."""
        return sum(microbatch.held_bytes for microbatch in self._saved.values())

    def offload(self, task_id: str) -> None:
        """A micro-batch's activations go to host memory. Raises KeyError, ValueError."""
        self._in_flight(task_id).offload()

    def reload(self, task_id: str) -> None:
        """They come back. Raises KeyError."""
        self._in_flight(task_id).reload()

    def holds(self, task_id: str) -> bool:
        """Whether a micro-batch is between forward and backward."""
        return task_id in self._saved

    def _adapter_of(self, op: TrainForward) -> Adapter | None:
        if op.adapter is None:
            return None
        return self._stage.adapters.get(op.adapter.adapter_id) if op.measures else self.adapter(op.adapter)

    def _in_flight(self, task_id: str) -> Microbatch:
        microbatch = self._saved.get(task_id)
        if microbatch is None:
            raise KeyError(f"micro-batch {task_id} is not in flight on this stage")
        return microbatch

    def _accumulate(self, group: int, weights: WeightSet, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        known = self._groups.get(group)
        if known is None:
            accumulated = [
                torch.zeros_like(weight.parameter, requires_grad=False) if value is None else value
                for weight, value in zip(weights.owned, gradients, strict=True)
            ]
            self._groups[group] = _Accumulated(weights, accumulated)
            return accumulated
        accumulated = known.gradients
        pairs = [(old, new) for old, new in zip(accumulated, gradients, strict=True) if new is not None]
        if pairs:
            torch._foreach_add_([old for old, _ in pairs], [new for _, new in pairs])
        return accumulated

    def _export(self, task_id: str, weights: WeightSet, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """What the pieces so far have for the borrowed weight; nothing where none is trained."""
        for weight, value in zip(weights.weights, gradients, strict=True):
            if weight.borrowed and value is not None:
                before = self._tied.get(task_id)
                self._tied[task_id] = value if before is None else before.add_(value)
        return self._tied.get(task_id)

    def step(self, op: OptimizerStep, tied_weight: Tensor | None) -> tuple[float, Tensor | None]:
        """Apply a group's gradients; returns the squared norm used for clipping, and the new embedding where another
        stage keeps a copy of it. The gradients are dropped in any case.

        Raises, with weights unchanged, ValueError when the group has accumulated nothing or the job's optimizer
        changed, and ArithmeticError for a gradient that is not finite.
        """
        group = self._groups.pop(op.group, None)
        if group is None:
            raise ValueError(f"job {op.job_id} steps without an accumulated gradient")
        weights, gradients = group.weights, group.gradients
        norm_sq = _norm_sq(gradients) if op.grad_norm_sq_total is None else op.grad_norm_sq_total
        if not math.isfinite(norm_sq):
            raise ArithmeticError(f"the squared gradient norm is {norm_sq}; step skipped, weights unchanged")
        borrowed = weights.borrowed
        if borrowed is not None and tied_weight is None:
            raise ValueError("the last stage of a tied model needs stage 0's new embedding (tied_weight)")
        job = self._job(op.job_id, op.optimizer, weights)
        self.before_change(weights)
        _clip(gradients, math.sqrt(norm_sq), op.optimizer.max_grad_norm)
        self._apply(job, gradients)
        if borrowed is not None and tied_weight is not None:
            with torch.no_grad():
                borrowed.parameter.copy_(tied_weight)
        return norm_sq, self.tied_embedding() if weights is self._stage.weights else None

    def _apply(self, job: _Job, gradients: Sequence[Tensor]) -> None:
        owned = job.weights.owned
        for weight, gradient in zip(owned, gradients, strict=True):
            weight.parameter.grad = gradient
        try:
            job.optimizer.step()
        finally:
            for weight in owned:
                weight.parameter.grad = None
        job.scheduler.step()

    def tied_embedding(self) -> Tensor | None:
        """Stage 0's embedding when another stage keeps a copy of it."""
        stage = self._stage
        if not (stage.spec.tied and stage.is_first and stage.num_stages > 1):
            return None
        return stage.weights.weights[0].parameter.detach()

    def wants_tied_gradient(self, task_id: str) -> bool:
        """Whether the backward of this micro-batch adds what the last stage has for the embedding."""
        trains_adapter = task_id in self._saved and self._saved[task_id].weights is not self._stage.weights
        return self.tied_embedding() is not None and not trains_adapter

    def before_change(self, weights: WeightSet) -> None:
        """To be called before these weights change: whatever runs with the current values, now or later, keeps them."""
        weights.replace_parameters(any(saved.runs_with_current(weights) for saved in self._saved.values()))

    def forget(self, ids: Sequence[str]) -> None:
        """Drop micro-batches in flight and optimizers of jobs by id; unknown ids are ignored."""
        for name in ids:
            self._saved.pop(name, None)
            self._tied.pop(name, None)
            self._jobs.pop(name, None)

    def _job(self, job_id: str, spec: OptimizerSpec, weights: WeightSet) -> _Job:
        job = self._jobs.get(job_id)
        if job is None:
            if len(self._jobs) >= MAX_JOBS:
                raise ValueError(f"{MAX_JOBS} jobs hold optimizer state on this stage; forget one first")
            job = self._jobs[job_id] = make_job(weights, spec)
        elif job.spec != spec:
            raise ValueError(f"job {job_id} changed its optimizer from {job.spec} to {spec}")
        return job

    def _rekey(self, renewed: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """The optimizers go on with the new parameter objects."""
        for job in self._jobs.values():
            state = job.optimizer.state
            for old, new in renewed.items():
                if old in state:
                    state[new] = state.pop(old)
            for group in job.optimizer.param_groups:
                group["params"] = [renewed.get(parameter, parameter) for parameter in group["params"]]


def make_optimizer(parameters: Sequence[nn.Parameter], spec: OptimizerSpec) -> torch.optim.AdamW:
    """AdamW, with its state in place."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=spec.learning_rate,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        fused=True,
    )
    for parameter in parameters:
        # As the first step would: it must not be the one that finds no memory.
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


def make_job(weights: WeightSet, spec: OptimizerSpec) -> _Job:
    """Optimizer and schedule over the weights owned. Raises ValueError for a schedule that cannot be built."""
    optimizer = make_optimizer([weight.parameter for weight in weights.owned], spec)
    return _Job(weights, spec, optimizer, make_schedule(optimizer, spec))


def check_examples(examples: Sequence[Example], stage: Stage, max_context_tokens: int) -> None:
    """Raise ValueError for examples that cannot be trained on."""
    if not any(num_labels(example) for example in examples):
        raise ValueError("the micro-batch has no label token")
    for example in examples:
        length = len(example.token_ids)
        if not 1 <= length <= max_context_tokens:
            raise ValueError(f"an example has {length} tokens; the context holds 1 to {max_context_tokens}")
        if min(example.token_ids) < 0 or max(example.token_ids) >= stage.spec.vocab_size:
            raise ValueError(f"an example has a token id outside the vocabulary of {stage.spec.vocab_size}")


def _norm_sq(gradients: list[Tensor]) -> float:
    return float(torch.stack(torch._foreach_norm(gradients)).double().square().sum())


def _clip(gradients: list[Tensor], norm: float, max_norm: float) -> None:
    """As torch.nn.utils.clip_grad_norm_, with the whole model's norm."""
    scale = max_norm / (norm + 1e-6)
    if max_norm > 0.0 and scale < 1.0:
        torch._foreach_mul_(gradients, scale)
