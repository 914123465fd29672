"""One pipeline stage of a model: its layers, and on the first and last stage the embedding and the projection.

The forward runs on packed rows (T, hidden) and is written out over plain weights instead of going through the module
classes of transformers: at a few milliseconds per op their Python overhead would be a large part of it. Parity with
transformers is tested in float64. Dropout is off, in training too: an op replayed gives the same result.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from services.node_agent.engine.torch.adapters import Adapters
from services.node_agent.engine.torch.attention import Attend
from services.node_agent.engine.torch.linear import linear
from services.node_agent.engine.torch.load import ModelSpec
from services.node_agent.engine.torch.outlet import CLOSED, Outlet
from services.node_agent.engine.torch.weights import Weight, WeightLoader, WeightSet

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


class Family(Protocol):
    """The parts of a model family. Rows are (T, hidden), positions (T,)."""

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """Rows that enter the first layer."""
        ...

    def run_layers(
        self, rows: Tensor, positions: Tensor, attend: Attend, layers: range | None = None, outlet: Outlet = CLOSED
    ) -> Tensor:
        """Rows behind this stage's layers, or behind those of them in `layers`, counted from 0 within the stage; at
        least one."""
        ...

    def project(self, rows: Tensor) -> Tensor:
        """Logits (T, vocab) of final rows."""
        ...


class Stage:
    """A stage with its weights. `forward` takes token ids on the first stage, rows on the others."""

    def __init__(
        self, spec: ModelSpec, stage: int, num_stages: int, *, device: str = "cpu", dtype: str = "float32"
    ) -> None:
        """Load the stage's tensors. Raises ModelDirectoryError, or ValueError for an unknown device or dtype."""
        # Imported here because the families need Stage's helpers below.
        from services.node_agent.engine.torch.gpt2 import Gpt2Family
        from services.node_agent.engine.torch.llama import LlamaFamily

        self.spec = spec
        self.index = stage
        self.is_first = stage == 0
        self.is_last = stage == num_stages - 1
        self.num_stages = num_stages
        self.num_layers = len(spec.layer_range(stage, num_stages))
        self.device = torch.device(device)
        self.dtype = parse_dtype(dtype)
        loader = WeightLoader(spec, self.device, self.dtype)
        family = LlamaFamily if spec.architecture == "LlamaForCausalLM" else Gpt2Family
        self.family: Family = family(spec, stage, num_stages, loader)
        self.weights = WeightSet(tuple(loader.weights))
        self.adapters = Adapters(spec, self.weights, self.device, self.dtype)

    def forward(self, inputs: Tensor, positions: Tensor, attend: Attend, outlet: Outlet = CLOSED) -> Tensor:
        """Rows behind this stage's layers, (T, hidden)."""
        rows = self.family.embed(inputs, positions) if self.is_first else inputs
        return self.family.run_layers(rows, positions, attend, outlet=outlet)

    def weights_of(self, job_id: str) -> WeightSet:
        """What a job trains: its adapter, if it has one, else all weights."""
        return self.adapters.get(job_id).weights if job_id in self.adapters.ids else self.weights

    def original_weights(self) -> dict[str, Tensor]:
        """The values of the model directory by full-model name. Raises ModelDirectoryError."""
        if self.weights.pristine:
            return self.weights.named(with_borrowed=True)
        loader = WeightLoader(self.spec, self.device, self.dtype)
        named = self.weights.named(with_borrowed=True)
        return {name: loader.read(name, tuple(part.shape)) for name, part in named.items()}

    def advance(self, oldest_version: int | None) -> None:
        """Begin the next version of all weights; see WeightSet.advance."""
        self.weights.advance(oldest_version)
        self.adapters.advance(oldest_version)

    @contextmanager
    def at(self, version: int) -> Iterator[None]:
        """Every reader sees the weights of this version, one of `weights.versions`."""
        if version == self.weights.version:
            yield
            return
        with self.weights.at(version), self.adapters.at(version):
            yield

    def logits(self, rows: Tensor) -> Tensor:
        """Logits (T, vocab), at least float32. Last stage only."""
        return widen(self.family.project(rows))

    def tensor(self, values: Any) -> Tensor:
        """A tensor of integers on this stage's device."""
        return torch.tensor(values, device=self.device)


class BoundaryWeights:
    """Embedding and output projection of whichever of the two this stage holds."""

    def __init__(self, spec: ModelSpec, stage: int, num_stages: int, loader: WeightLoader) -> None:
        shape = [(spec.vocab_size, spec.hidden_size)]
        self.embedding = loader.load([spec.embedding_name], shape) if stage == 0 else None
        self.head: Weight | None = None
        if stage == num_stages - 1:
            if spec.tied and self.embedding is not None:
                self.head = self.embedding
            else:
                self.head = loader.load([spec.head_name], shape, borrowed=spec.tied)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token embeddings, (T, hidden)."""
        assert self.embedding is not None
        return functional.embedding(token_ids, self.embedding.parameter)

    def project(self, rows: Tensor) -> Tensor:
        """Logits, (T, vocab)."""
        assert self.head is not None
        return linear(rows, self.head.parameter)


def widen(tensor: Tensor) -> Tensor:
    """At least float32: losses, norms and sampling are not computed in half precision."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def project(rows: Tensor, weight: Weight, bias: Weight | None) -> Tensor:
    """Outputs (T, outputs) of one or several joined projections, with what adapters add."""
    output = linear(rows, weight.parameter, None if bias is None else bias.parameter)
    return output if weight.update is None else weight.update(rows, output)


def parse_dtype(name: str) -> torch.dtype:
    """Element type by its torch name. Raises ValueError."""
    known = {
        "float32": torch.float32,
        "float64": torch.float64,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name not in known:
        raise ValueError(f"unknown dtype {name!r}; known: {', '.join(known)}")
    return known[name]
