"""Forward, backward and optimizer steps of one stage.

Gradients are taken with `torch.autograd.grad` for the parameters the forward ran with and added to the current
parameters, so a step may come between a micro-batch's forward and its backward (weight stashing): the step then works
on new parameter objects and leaves those the graph holds untouched.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.optimization import get_scheduler

from services.node_agent.engine.base import Example, OptimizerSpec, OptimizerStep, TrainBackward, TrainForward
from services.node_agent.engine.torch.attention import PackedRuns, TrainingAttention
from services.node_agent.engine.torch.stage import Stage, widen

#: Jobs whose AdamW moments (twice the parameters each) a stage keeps at most. A backstop: the agent has jobs forgotten
#: long before, but never one with micro-batches on the node.
MAX_JOBS = 32


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """`hidden` (T, hidden) for the next stage, or on the last stage the mean loss in nats and its label count."""

    hidden: Tensor | None
    loss: float | None
    label_tokens: int


@dataclass(frozen=True, slots=True)
class BackwardOutput:
    """`hidden`: gradient for the previous stage. `tied`: last stage's part of the tied embedding's gradient.

    grad_norm_sq: squared norm of everything accumulated on this stage so far.
    """

    hidden: Tensor | None
    tied: Tensor | None
    grad_norm_sq: float


@dataclass(frozen=True, slots=True)
class _Saved:
    """A micro-batch between forward and backward: its graph's ends, and the parameters it ran with."""

    inputs: Tensor | None
    output: Tensor
    parameters: list[nn.Parameter]


@dataclass(slots=True)
class _Job:
    spec: OptimizerSpec
    optimizer: torch.optim.AdamW
    scheduler: Any


class Training:
    """Training state of a stage: micro-batches in flight, accumulated gradients, one AdamW per job."""

    def __init__(self, stage: Stage, *, max_context_tokens: int) -> None:
        self._stage = stage
        self._max_context_tokens = max_context_tokens
        self._saved: dict[str, _Saved] = {}
        self._jobs: dict[str, _Job] = {}
        stage.weights.on_replace.append(self._rekey)

    @property
    def num_in_flight(self) -> int:
        """Micro-batches whose forward ran and whose backward has not."""
        return len(self._saved)

    def forward(self, op: TrainForward, hidden: Tensor | None) -> ForwardOutput:
        """Run a micro-batch and keep its graph. Raises ValueError for bad examples, ArithmeticError for a loss that
        is not finite."""
        if op.task_id in self._saved:
            raise ValueError(f"micro-batch {op.task_id} is in flight already")
        check_examples(op.examples, self._stage, self._max_context_tokens)
        saved, result = run_forward(self._stage, op.examples, op.loss_scale, hidden)
        self._saved[op.task_id] = saved
        return result

    def backward(self, op: TrainBackward, gradient: Tensor | None, tied: Tensor | None) -> BackwardOutput:
        """Add a micro-batch's gradient; `tied` is the last stage's part of the tied embedding's (stage 0 only)."""
        saved = self._saved.pop(op.task_id, None)
        if saved is None:
            raise KeyError(f"micro-batch {op.task_id} is not in flight on this stage")
        gradients = run_backward(saved, gradient)
        weights = self._stage.weights
        offset = 0 if saved.inputs is None else 1
        exported = None
        for weight, value in zip(weights.weights, gradients[offset:], strict=True):
            if weight.borrowed:
                exported = value
            else:
                _add_gradient(weight.parameter, value)
        if tied is not None:
            _add_gradient(weights.weights[0].parameter, tied)
        return BackwardOutput(gradients[0] if offset else None, exported, self._grad_norm_sq())

    def step(self, op: OptimizerStep, tied_weight: Tensor | None) -> float:
        """Apply the accumulated gradients; returns the squared norm used for clipping. They are dropped in any case.

        Raises, with weights unchanged, ValueError when nothing is accumulated or the job's optimizer changed, and
        ArithmeticError for a gradient that is not finite.
        """
        try:
            return self._step(op, tied_weight)
        finally:
            for weight in self._stage.weights.owned:
                weight.parameter.grad = None

    def _step(self, op: OptimizerStep, tied_weight: Tensor | None) -> float:
        weights = self._stage.weights
        if any(weight.parameter.grad is None for weight in weights.owned):
            raise ValueError(f"job {op.job_id} steps without an accumulated gradient")
        norm_sq = self._grad_norm_sq() if op.grad_norm_sq_total is None else op.grad_norm_sq_total
        if not math.isfinite(norm_sq):
            raise ArithmeticError(f"the squared gradient norm is {norm_sq}; step skipped, weights unchanged")
        borrowed = weights.borrowed
        if borrowed is not None and tied_weight is None:
            raise ValueError("the last stage of a tied model needs stage 0's new embedding (tied_weight)")
        job = self._job(op.job_id, op.optimizer)
        self.detach_in_flight()
        self._clip(math.sqrt(norm_sq), op.optimizer.max_grad_norm)
        job.optimizer.step()
        job.scheduler.step()
        if borrowed is not None and tied_weight is not None:
            with torch.no_grad():
                borrowed.parameter.copy_(tied_weight)
        return norm_sq

    def tied_embedding(self) -> Tensor | None:
        """Stage 0's embedding when another stage keeps a copy of it."""
        stage = self._stage
        if not (stage.spec.tied and stage.is_first and stage.num_stages > 1):
            return None
        return stage.weights.weights[0].parameter.detach()

    def detach_in_flight(self) -> None:
        """To be called before weights change: micro-batches in flight keep the values they ran with."""
        if self._saved:
            self._stage.weights.replace_parameters()

    def forget(self, ids: Sequence[str]) -> None:
        """Drop micro-batches in flight and optimizers of jobs by id; unknown ids are ignored."""
        for name in ids:
            self._saved.pop(name, None)
            self._jobs.pop(name, None)

    def _job(self, job_id: str, spec: OptimizerSpec) -> _Job:
        job = self._jobs.get(job_id)
        if job is None:
            if len(self._jobs) >= MAX_JOBS:
                raise ValueError(f"{MAX_JOBS} jobs hold optimizer state on this stage; forget one first")
            job = self._jobs[job_id] = make_job([w.parameter for w in self._stage.weights.owned], spec)
        elif job.spec != spec:
            raise ValueError(f"job {job_id} changed its optimizer from {job.spec} to {spec}")
        return job

    def _grad_norm_sq(self) -> float:
        return float(torch.stack(torch._foreach_norm(self._gradients())).double().square().sum())

    def _gradients(self) -> list[Tensor]:
        return [w.parameter.grad for w in self._stage.weights.owned if w.parameter.grad is not None]

    def _clip(self, norm: float, max_norm: float) -> None:
        """As torch.nn.utils.clip_grad_norm_, with the whole model's norm."""
        scale = max_norm / (norm + 1e-6)
        if max_norm > 0.0 and scale < 1.0:
            torch._foreach_mul_(self._gradients(), scale)

    def _rekey(self, old: nn.Parameter, new: nn.Parameter) -> None:
        for job in self._jobs.values():
            if old in job.optimizer.state:
                job.optimizer.state[new] = job.optimizer.state.pop(old)
            for group in job.optimizer.param_groups:
                group["params"] = [new if parameter is old else parameter for parameter in group["params"]]


def make_job(parameters: list[nn.Parameter], spec: OptimizerSpec) -> _Job:
    """AdamW and schedule over parameters. Raises ValueError for a schedule that cannot be built."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=spec.learning_rate,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
        fused=True,
    )
    scheduler = get_scheduler(
        spec.lr_schedule,
        optimizer,
        num_warmup_steps=spec.warmup_steps,
        num_training_steps=spec.total_steps or None,
    )
    return _Job(spec, optimizer, scheduler)


def run_forward(
    stage: Stage, examples: Sequence[Example], loss_scale: float, hidden: Tensor | None
) -> tuple[_Saved, ForwardOutput]:
    """Forward of a micro-batch with its graph."""
    lengths = [len(example.token_ids) for example in examples]
    positions = stage.tensor(list(chain.from_iterable(range(length) for length in lengths)))
    inputs = None
    if stage.is_first:
        entering = stage.tensor(list(chain.from_iterable(example.token_ids for example in examples)))
    else:
        assert hidden is not None
        entering = inputs = hidden.requires_grad_()
    parameters = stage.weights.parameters()
    rows = stage.forward(entering, positions, TrainingAttention(PackedRuns.of(lengths)))
    if not stage.is_last:
        return _Saved(inputs, rows, parameters), ForwardOutput(rows.detach(), None, 0)
    places, targets = _labels(examples)
    loss = functional.cross_entropy(widen(stage.logits(rows[places])), stage.tensor(targets))
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ArithmeticError(f"the loss is {value}")
    return _Saved(inputs, loss * loss_scale, parameters), ForwardOutput(None, value, len(targets))


def run_backward(saved: _Saved, gradient: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of (inputs if there are any, then the parameters)."""
    wanted: list[Tensor] = [*saved.parameters]
    if saved.inputs is not None:
        wanted.insert(0, saved.inputs)
    return torch.autograd.grad(saved.output, wanted, gradient)


def check_examples(examples: Sequence[Example], stage: Stage, max_context_tokens: int) -> None:
    """Raise ValueError for examples that cannot be trained on."""
    if not any(_num_labels(example) for example in examples):
        raise ValueError("the micro-batch has no label token")
    for example in examples:
        length = len(example.token_ids)
        if not 1 <= length <= max_context_tokens:
            raise ValueError(f"an example has {length} tokens; the context holds 1 to {max_context_tokens}")
        if min(example.token_ids) < 0 or max(example.token_ids) >= stage.spec.vocab_size:
            raise ValueError(f"an example has a token id outside the vocabulary of {stage.spec.vocab_size}")


def _num_labels(example: Example) -> int:
    return max(0, len(example.token_ids) - max(1, example.num_context_tokens))


def _labels(examples: Sequence[Example]) -> tuple[list[int], list[int]]:
    """Packed rows whose logits are scored, and the token each must predict."""
    starts = [0, *accumulate(len(example.token_ids) for example in examples)]
    places: list[int] = []
    targets: list[int] = []
    for start, example in zip(starts, examples, strict=False):
        first = max(1, example.num_context_tokens)
        places.extend(range(start + first - 1, start + len(example.token_ids) - 1))
        targets.extend(example.token_ids[first:])
    return places, targets


def _add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)
