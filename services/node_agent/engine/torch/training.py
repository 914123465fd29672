"""Forward, backward and optimizer steps of one stage.

Gradients are taken with `torch.autograd.grad` for the parameters the forward ran with and kept apart by accumulation
group, so steps may come between a micro-batch's forward and its backward, and backwards of the next group before the
step of this one (weight stashing): a step works on new parameter objects and leaves those a graph holds untouched.
"""

import math
from collections.abc import Mapping, Sequence
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

    grad_norm_sq: squared norm of everything its group has accumulated on this stage so far.
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
    """Training state of a stage: micro-batches in flight, gradients by accumulation group, one AdamW per job."""

    def __init__(self, stage: Stage, *, max_context_tokens: int) -> None:
        self._stage = stage
        self._max_context_tokens = max_context_tokens
        self._saved: dict[str, _Saved] = {}
        # In the order of the owned weights.
        self._gradients: dict[int, list[Tensor]] = {}
        self._jobs: dict[str, _Job] = {}
        stage.weights.on_replace.append(self._rekey)

    @property
    def num_in_flight(self) -> int:
        """Micro-batches whose forward ran and whose backward has not."""
        return len(self._saved)

    @property
    def gradients(self) -> Mapping[int, Sequence[Tensor]]:
        """What each group has accumulated, in the order of the owned weights."""
        return self._gradients

    @property
    def jobs(self) -> Mapping[str, _Job]:
        """Jobs that hold optimizer state here."""
        return self._jobs

    def adopt(self, jobs: Mapping[str, _Job]) -> None:
        """Go on with the optimizers of these jobs, made over the owned parameters in use, and no others."""
        self._jobs = dict(jobs)

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
        """Add a micro-batch's gradient to its group's; `tied` is the last stage's part of the tied embedding's (stage 0
        only)."""
        saved = self._saved.pop(op.task_id, None)
        if saved is None:
            raise KeyError(f"micro-batch {op.task_id} is not in flight on this stage")
        gradients = run_backward(saved, gradient)
        entering = None if saved.inputs is None else gradients[0]
        by_weight = list(zip(self._stage.weights.weights, gradients[-len(saved.parameters) :], strict=True))
        accumulated = self._accumulate(op.group, [value for weight, value in by_weight if not weight.borrowed])
        if tied is not None:
            accumulated[0].add_(tied)
        exported = next((value for weight, value in by_weight if weight.borrowed), None)
        return BackwardOutput(entering, exported, _norm_sq(accumulated))

    def _accumulate(self, group: int, gradients: list[Tensor]) -> list[Tensor]:
        accumulated = self._gradients.setdefault(group, gradients)
        if accumulated is not gradients:
            torch._foreach_add_(accumulated, gradients)
        return accumulated

    def step(self, op: OptimizerStep, tied_weight: Tensor | None) -> float:
        """Apply a group's gradients; returns the squared norm used for clipping. They are dropped in any case.

        Raises, with weights unchanged, ValueError when the group has accumulated nothing or the job's optimizer
        changed, and ArithmeticError for a gradient that is not finite.
        """
        gradients = self._gradients.pop(op.group, None)
        if gradients is None:
            raise ValueError(f"job {op.job_id} steps without an accumulated gradient")
        norm_sq = _norm_sq(gradients) if op.grad_norm_sq_total is None else op.grad_norm_sq_total
        if not math.isfinite(norm_sq):
            raise ArithmeticError(f"the squared gradient norm is {norm_sq}; step skipped, weights unchanged")
        borrowed = self._stage.weights.borrowed
        if borrowed is not None and tied_weight is None:
            raise ValueError("the last stage of a tied model needs stage 0's new embedding (tied_weight)")
        job = self._job(op.job_id, op.optimizer)
        self.before_change()
        _clip(gradients, math.sqrt(norm_sq), op.optimizer.max_grad_norm)
        self._apply(job, gradients)
        if borrowed is not None and tied_weight is not None:
            with torch.no_grad():
                borrowed.parameter.copy_(tied_weight)
        return norm_sq

    def _apply(self, job: _Job, gradients: Sequence[Tensor]) -> None:
        owned = self._stage.weights.owned
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

    def before_change(self) -> None:
        """To be called before weights change: whatever runs with the current values, now or later, keeps them."""
        weights = self._stage.weights
        current = weights.weights[0].parameter
        weights.replace_parameters(any(saved.parameters[0] is current for saved in self._saved.values()))

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

    def _rekey(self, renewed: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """The optimizers go on with the new parameter objects."""
        for job in self._jobs.values():
            state = job.optimizer.state
            for old, new in renewed.items():
                if old in state:
                    state[new] = state.pop(old)
            for group in job.optimizer.param_groups:
                group["params"] = [renewed[parameter] for parameter in group["params"]]


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


def _norm_sq(gradients: list[Tensor]) -> float:
    return float(torch.stack(torch._foreach_norm(gradients)).double().square().sum())


def _clip(gradients: list[Tensor], norm: float, max_norm: float) -> None:
    """As torch.nn.utils.clip_grad_norm_, with the whole model's norm."""
    scale = max_norm / (norm + 1e-6)
    if max_norm > 0.0 and scale < 1.0:
        torch._foreach_mul_(gradients, scale)
