"""One micro-batch on one stage: forward and backward, whole or cut into pieces, and what is kept in between.

The work is a list of units, each some examples through some layers with a graph of its own; a piece runs the next few
of them. Cut by examples first, by layers where there are fewer examples than pieces. With activation checkpointing
every layer is a unit that keeps its input alone. However it is cut, the sums are the same.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from services.node_agent.engine.torch.adapters import Adapter
from services.node_agent.engine.torch.attention import PackedRuns, TrainingAttention
from services.node_agent.engine.torch.host_memory import SavedTensors
from services.node_agent.engine.torch.outlet import CLOSED, Allocate, Outlet
from services.node_agent.engine.torch.stage import Stage, widen
from services.node_agent.engine.torch.weights import WeightSet
from services.node_agent.engine.training_ops import Example


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """dtype: matrix products are computed in it (None: in the weights' own). See EngineConfig for both."""

    dtype: torch.dtype | None = None
    checkpointing: bool = False
    #: What a micro-batch keeps can go to host memory.
    can_offload: bool = False


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """`hidden` (T, hidden) for the next stage, or on the last stage the mean loss in nats and its label count.

    Nothing, when pieces are to come.
    """

    hidden: Tensor | None = None
    loss: float | None = None
    label_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Gradients:
    """`entering` (T, hidden) for the previous stage, after the last piece. `parameters`: what this piece adds, None
    where that is nothing."""

    entering: Tensor | None
    parameters: list[Tensor | None]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Neighbouring examples. `rows`: theirs within the micro-batch; places: of those, whose logits are scored."""

    rows: slice
    tokens: Tensor
    positions: Tensor
    attention: TrainingAttention
    places: Tensor
    targets: Tensor


@dataclass(slots=True)
class _Unit:
    """`inputs`: what entered the layers, where that has a gradient. `output` has the graph, alone where its values left
    the stage; None: it is made again."""

    rows: _Rows
    layers: range
    inputs: Tensor | None = None
    output: Tensor | GradientEdge | None = None


class Microbatch:
    """From the first piece of its forward to the last one of its backward. Pieces run in order, all of the forward with
    the same weights, which the backward uses again whatever the stage's are by then."""

    def __init__(
        self,
        stage: Stage,
        examples: Sequence[Example],
        loss_scale: float,
        hidden: Tensor | None,
        *,
        options: TrainingOptions,
        parts: int = 1,
        adapter: Adapter | None = None,
        dropout_key: str = "",
        allocate: Allocate | None = None,
    ) -> None:
        """hidden: rows from the stage before, None on the first one. adapter: what is trained; None: all weights.
        allocate: memory for what leaves the stage; None: memory like any other."""
        #: The weights that get gradients, and the parameters they have in this micro-batch.
        self.weights = stage.weights if adapter is None else adapter.weights
        self.parameters = self.weights.parameters()
        self._uses = stage.adapters.of(adapter, dropout_key)
        sets = [stage.weights, *(use.adapter.weights for use in self._uses)]
        self._ran_with = [(weights, weights.parameters()) for weights in sets]
        self.parts = parts
        self.num_labels = sum(num_labels(example) for example in examples)
        self._stage = stage
        self._hidden = hidden
        self._loss_scale = loss_scale
        self._loss = 0.0
        self._options = options
        every = [parameter for _, parameters in self._ran_with for parameter in parameters]
        self._saved_tensors = SavedTensors(every) if options.can_offload else None
        self._allocate = allocate
        self._units = _units(stage, examples, parts, options.checkpointing)
        self._num_groups = sum(self._is_top(unit) for unit in self._units)
        #: Rows between two units of the same examples: values on the way up, gradients on the way down.
        self._carried: Tensor | None = None
        #: Forward: outputs of the last layers. Backward: gradients of what entered the first ones, last rows first.
        self._finished: list[Tensor] = []
        self._gradient: Tensor | None = None

    def runs_with_current(self, weights: WeightSet) -> bool:
        """Whether its graph refers to the parameters that these weights have now."""
        current = weights.weights[0].parameter
        return any(known is weights and parameters[0] is current for known, parameters in self._ran_with)

    def forward(self, part: int = 0) -> ForwardOutput:
        """Run a piece. Raises ArithmeticError for a loss that is not finite."""
        for unit in self._share(self._units, part):
            with torch.no_grad() if self._options.checkpointing else self._recording():
                unit.inputs = self._entering(unit)
                output = self._run(unit, self._outlet(unit))
            unit.output = None if self._options.checkpointing else output
            if not self._is_top(unit):
                self._carried = output.detach()
            elif self._stage.is_last:
                self._loss += float(output.detach())
            else:
                self._finished.append(output.detach())
                if unit.output is not None:
                    unit.output = get_gradient_edge(output)
        if part + 1 < self.parts:
            return ForwardOutput()
        self._hidden = self._carried = None
        if not self._stage.is_last:
            return ForwardOutput(self._take_finished())
        if not math.isfinite(self._loss):
            raise ArithmeticError(f"the loss is {self._loss}")
        return ForwardOutput(None, self._loss, self.num_labels)

    def backward(self, part: int, gradient: Tensor | None) -> Gradients:
        """Run a piece. gradient: of the output, with the first piece, on every stage but the last."""
        if part == 0:
            self._gradient = gradient
        total: list[Tensor | None] = [None] * len(self.parameters)
        with self._own_weights():
            for unit in self._share(self._units[::-1], part):
                _merge(total, self._differentiate(unit))
        entering = None
        if part + 1 == self.parts:
            self._gradient = self._carried = None
            self._finished.reverse()
            entering = None if self._stage.is_first else self._take_finished()
        return Gradients(entering, total)

    # ------------------------------------------------------------- memory

    @property
    def held_bytes(self) -> int:
        """Bytes that it keeps on the device, where it can be moved."""
        return 0 if self._saved_tensors is None else self._saved_tensors.num_bytes(self._tensors())

    def offload(self) -> None:
        """What it keeps goes to host memory. Raises ValueError when it cannot be moved."""
        if self._saved_tensors is None:
            raise ValueError("activations were not recorded so that they can be moved")
        self._saved_tensors.offload(self._tensors())

    def reload(self) -> None:
        """What it keeps comes back, if it is away."""
        if self._saved_tensors is not None:
            self._saved_tensors.reload()

    def _recording(self) -> AbstractContextManager[object]:
        return nullcontext() if self._saved_tensors is None else self._saved_tensors.recording()

    def _tensors(self) -> list[Tensor]:
        """What it holds itself, beside its graphs; each once."""
        held = [self._hidden, self._carried, self._gradient, *self._finished]
        for unit in self._units:
            held += [unit.inputs, unit.output if isinstance(unit.output, Tensor) else None]
        return list({id(tensor): tensor for tensor in held if tensor is not None}.values())

    # ------------------------------------------------------------- units

    def _share(self, units: list[_Unit], part: int) -> list[_Unit]:
        count = len(units)
        return units[part * count // self.parts : (part + 1) * count // self.parts]

    def _is_top(self, unit: _Unit) -> bool:
        return unit.layers.stop == self._stage.num_layers

    def _entering(self, unit: _Unit) -> Tensor | None:
        """What enters a unit's layers; nothing where it begins with tokens."""
        if unit.layers.start:
            assert self._carried is not None
            return self._carried.requires_grad_()
        if self._stage.is_first:
            return None
        assert self._hidden is not None
        return self._hidden[unit.rows.rows].detach().requires_grad_()

    def _outlet(self, unit: _Unit, *, again: bool = False) -> Outlet:
        """What of a unit leaves the stage as it is: nothing where results of several are joined first. again: the
        forward is repeated for its graph alone."""
        leaves = self._is_top(unit) and not self._stage.is_last and not again
        enters = unit.layers.start == 0 and not self._stage.is_first
        if self._num_groups > 1:
            return CLOSED
        return Outlet(self._allocate if leaves else None, self._allocate if enters else None)

    def _run(self, unit: _Unit, outlet: Outlet) -> Tensor:
        """Rows behind the unit's layers; at the model's end its part of the mean loss."""
        stage, rows = self._stage, unit.rows
        uses = [use.within(str(rows.rows.start)) for use in self._uses]
        with self._precision(), self._only_trained(), stage.adapters.applied(uses):
            inputs = unit.inputs
            if inputs is None:
                inputs = stage.family.embed(rows.tokens, rows.positions)
            output = stage.family.run_layers(inputs, rows.positions, rows.attention, unit.layers, outlet)
            if not (stage.is_last and self._is_top(unit)):
                return output
            logits = widen(stage.logits(output[rows.places]))
            return functional.cross_entropy(logits, rows.targets, reduction="sum") / self.num_labels

    def _differentiate(self, unit: _Unit) -> list[Tensor | None]:
        """Gradients of the parameters; that of the inputs is carried to the unit below."""
        output, unit.output = unit.output, None
        if output is None:
            output = self._run(unit, self._outlet(unit, again=True))
        wanted: list[Tensor] = [*self.parameters]
        if unit.inputs is not None:
            wanted.append(unit.inputs)
        gradients: list[Tensor | None] = list(
            torch.autograd.grad(output, wanted, self._leaving(unit, output), allow_unused=True)
        )
        if unit.inputs is not None:
            entering = gradients.pop()
            assert entering is not None
            if unit.layers.start:
                self._carried = entering
            else:
                self._finished.append(entering)
            unit.inputs = None
        return gradients

    def _leaving(self, unit: _Unit, output: Tensor | GradientEdge) -> Tensor:
        """Gradient of a unit's output."""
        if not self._is_top(unit):
            assert self._carried is not None
            return self._carried
        if isinstance(output, Tensor) and self._stage.is_last:
            return torch.full_like(output, self._loss_scale)
        assert self._gradient is not None
        return self._gradient[unit.rows.rows]

    def _take_finished(self) -> Tensor:
        finished, self._finished = self._finished, []
        first = finished[0]
        if len(finished) == 1:
            return first
        if self._allocate is None:
            return torch.cat(finished)
        shape = (sum(len(rows) for rows in finished), *first.shape[1:])
        return torch.cat(finished, out=self._allocate(shape, first.dtype, first.device))

    def _own_weights(self) -> AbstractContextManager[object]:
        """A graph holds the weights it was made with; one that is made again must find the same."""
        stack = ExitStack()
        for weights, parameters in self._ran_with if self._options.checkpointing else ():
            stack.enter_context(weights.using(parameters))
        return stack

    @contextmanager
    def _only_trained(self) -> Iterator[None]:
        """Of weights that get no gradient, nothing need be kept for one."""
        frozen = [] if self.weights is self._stage.weights else self._stage.weights.parameters()
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_()

    def _precision(self) -> AbstractContextManager[object]:
        if self._options.dtype is None:
            return nullcontext()
        return torch.autocast(self._stage.device.type, self._options.dtype)


def num_labels(example: Example) -> int:
    """Tokens of an example that the loss counts."""
    return max(0, len(example.token_ids) - max(1, example.num_context_tokens))


def _units(stage: Stage, examples: Sequence[Example], parts: int, checkpointing: bool) -> list[_Unit]:
    """In the order of the forward: the layers of some examples, then of the next ones."""
    num_groups = min(parts, len(examples))
    depth = stage.num_layers if checkpointing else min(stage.num_layers, -(-parts // num_groups))
    bounds = [index * stage.num_layers // depth for index in range(depth + 1)]
    layers = [range(first, end) for first, end in pairwise(bounds)]
    units: list[_Unit] = []
    start = 0
    for index in range(num_groups):
        first, end = index * len(examples) // num_groups, (index + 1) * len(examples) // num_groups
        rows = _rows(stage, examples[first:end], start)
        start = rows.rows.stop
        units += [_Unit(rows, own) for own in layers]
    return units


def _rows(stage: Stage, examples: Sequence[Example], start: int) -> _Rows:
    lengths = [len(example.token_ids) for example in examples]
    tokens = [example.token_ids for example in examples] if stage.is_first else []
    places, targets = _labels(examples) if stage.is_last else ([], [])
    return _Rows(
        slice(start, start + sum(lengths)),
        _whole(stage, list(chain.from_iterable(tokens))),
        _whole(stage, list(chain.from_iterable(range(length) for length in lengths))),
        TrainingAttention(PackedRuns.of(lengths)),
        _whole(stage, places),
        _whole(stage, targets),
    )


def _whole(stage: Stage, values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=stage.device)


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


def _merge(total: list[Tensor | None], added: Sequence[Tensor | None]) -> None:
    """Add gradients in place, parameter by parameter."""
    both = [(old, new) for old, new in zip(total, added, strict=True) if old is not None and new is not None]
    if both:
        torch._foreach_add_([old for old, _ in both], [new for _, new in both])
    for index, new in enumerate(added):
        if total[index] is None:
            total[index] = new
