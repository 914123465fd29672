"""The parameters of one stage: one set, used by serving and training alike.

Projections that read the same input (q, k, v; gate, up) are stored as one matrix, which saves a dispatch each; they
are cut apart again under their full-model names wherever weights leave the stage.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from services.node_agent.engine.torch.load import ModelDirectoryError, ModelSpec, stored_name
from services.node_agent.engine.weight_ops import round_of


@dataclass(slots=True)
class Weight:
    """One parameter. `names`: full-model names of its parts, `rows`: their sizes along dimension 0.

    borrowed: the last stage's copy of a tied embedding; stage 0 owns and updates it.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    parameter: nn.Parameter
    borrowed: bool = False
    #: What adapters add to the projection's output, a function of (rows, output); None: nothing.
    update: Callable[[Tensor, Tensor], Tensor] | None = None

    def parts(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Cut a tensor of this parameter's shape (the parameter, its gradient) into its named parts."""
        yield from zip(self.names, torch.split(tensor, list(self.rows)), strict=True)


class WeightLoader:
    """Loads parameters of one stage lazily from the files of a model directory."""

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        self._spec = spec
        self._device = device
        self._dtype = dtype
        self.weights: list[Weight] = []

    def load(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], *, borrowed: bool = False) -> Weight:
        """Read and join the named tensors along dimension 0. Raises ModelDirectoryError on a missing or odd one."""
        tensors = [self.read(name, shape) for name, shape in zip(names, shapes, strict=True)]
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        parameter = nn.Parameter(joined.to(self._device, self._dtype, copy=True).contiguous())
        weight = Weight(tuple(names), tuple(shape[0] for shape in shapes), parameter, borrowed)
        self.weights.append(weight)
        return weight

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor. Raises ModelDirectoryError on a missing or odd one."""
        file = self._spec.files.get(name)
        if file is None:
            raise ModelDirectoryError(f"the weights in {self._spec.path} lack the tensor {name}")
        with safe_open(file, framework="pt") as stored:
            available = set(stored.keys())
            tensor: Tensor = stored.get_tensor(stored_name(name, available, self._spec.architecture))
        if tuple(tensor.shape) != shape:
            raise ModelDirectoryError(
                f"{name} in {file} has shape {tuple(tensor.shape)}, but config.json asks for {shape}"
            )
        return tensor


@dataclass(slots=True)
class WeightSet:
    """All parameters of a stage: the current ones, and those of older versions for ops stamped with them.

    Graphs refer to parameter objects, and older versions are the objects they were: values stay as they are because the
    current objects are replaced before they change, see `replace_parameters`.
    """

    weights: tuple[Weight, ...]
    version: int = 0
    #: Whether the current values are those of the model directory.
    pristine: bool = True
    #: Called with old -> new whenever `replace_parameters` swaps the parameter objects.
    on_replace: list[Callable[[Mapping[nn.Parameter, nn.Parameter]], None]] = field(default_factory=list)
    _kept: dict[int, list[nn.Parameter]] = field(default_factory=dict)

    @property
    def owned(self) -> list[Weight]:
        """Parameters this stage updates."""
        return [weight for weight in self.weights if not weight.borrowed]

    @property
    def borrowed(self) -> Weight | None:
        """The copy of a tied embedding, on the last stage of several."""
        return next((weight for weight in self.weights if weight.borrowed), None)

    @property
    def versions(self) -> tuple[int, ...]:
        """Versions an op can run with, the current one last."""
        return (*self._kept, self.version)

    def parameters(self) -> list[nn.Parameter]:
        """Parameter objects in use, in the order of `weights`."""
        return [weight.parameter for weight in self.weights]

    def advance(self, oldest_version: int | None) -> None:
        """Begin the next version, with the current values; keep older ones from `oldest_version` on, None: none.

        A version whose values do not change after all shares its parameters with the one before.
        """
        self._kept[self.version] = self.parameters()
        self.version += 1
        oldest = self.version if oldest_version is None else oldest_version
        self._kept = {version: kept for version, kept in self._kept.items() if version >= oldest}

    @contextmanager
    def at(self, version: int) -> Iterator[None]:
        """Every reader of the weights sees those of one of `versions`. Raises KeyError for another one."""
        if version == self.version:
            yield
            return
        with self.using(self._kept[version]):
            yield

    @contextmanager
    def using(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Every reader of the weights sees these, in the order of `weights`."""
        current = self.parameters()
        self._put(parameters)
        try:
            yield
        finally:
            self._put(current)

    def replace_parameters(self, in_use: bool) -> None:
        """To be called before values change. When an older version shares the current parameter objects, or `in_use`
        says that the graph of a micro-batch in flight does, equal new ones take their place."""
        self.pristine = False
        old = self.parameters()
        if not (in_use or any(kept[0] is old[0] for kept in self._kept.values())):
            return
        renewed = {parameter: nn.Parameter(parameter.detach().clone()) for parameter in old}
        self._put(list(renewed.values()))
        for callback in self.on_replace:
            callback(renewed)

    def _put(self, parameters: Sequence[nn.Parameter]) -> None:
        for weight, parameter in zip(self.weights, parameters, strict=True):
            weight.parameter = parameter

    def named(self, *, with_borrowed: bool) -> dict[str, Tensor]:
        """Full-model name -> view of the current value."""
        chosen = self.weights if with_borrowed else self.owned
        return {name: part for weight in chosen for name, part in weight.parts(weight.parameter.detach())}

    def apply(self, update: Callable[[str, Tensor], Tensor]) -> None:
        """Set every part to `update(name, current)`. All results are computed before any is written."""
        pairs = [(part, update(name, part)) for name, part in self.named(with_borrowed=True).items()]
        for part, value in pairs:
            part.copy_(value)


class Snapshots:
    """Copies of this stage's weights in files, those of the newest `KEEP` rounds only."""

    KEEP = 2

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._taken: dict[str, Path] = {}
        self._borrowed: dict[str, dict[str, Tensor]] = {}
        self._count = 0

    def take(self, sync_id: str, weights: WeightSet) -> Path:
        """Write a snapshot under `sync_id`; forgets the oldest rounds beyond `KEEP`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self.drop(sync_id)
        self._count += 1
        path = self._folder / f"snapshot-{self._count}.safetensors"
        save_file({name: part.contiguous() for name, part in weights.named(with_borrowed=False).items()}, path)
        self._taken[sync_id] = path
        # The owner's file holds the tied embedding; the copy is kept here only to average it the same way.
        borrowed = weights.borrowed
        if borrowed is not None:
            self._borrowed[sync_id] = {name: part.clone() for name, part in borrowed.parts(borrowed.parameter.detach())}
        rounds = list(dict.fromkeys(map(round_of, self._taken)))
        for name in [name for name in self._taken if round_of(name) in rounds[: -self.KEEP]]:
            self.drop(name)
        return path

    def read(self, sync_id: str) -> dict[str, Tensor]:
        """The snapshot's tensors by full-model name. Raises KeyError when it is not kept (any more)."""
        path = self._taken.get(sync_id)
        if path is None:
            raise KeyError(f"no snapshot {sync_id!r} on this stage; kept: {', '.join(self._taken) or 'none'}")
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return tensors | self._borrowed.get(sync_id, {})

    def drop(self, sync_id: str) -> None:
        """Remove a snapshot; unknown ids are ignored."""
        self._borrowed.pop(sync_id, None)
        path = self._taken.pop(sync_id, None)
        if path is not None:
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove every snapshot and the folder."""
        for sync_id in list(self._taken):
            self.drop(sync_id)
        if self._folder.is_dir():
            self._folder.rmdir()


def read_weights(path: str, weights: WeightSet, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """This stage's tensors from a safetensors file that holds the whole model, or the whole adapter, of these shapes.

    Raises ValueError when any of them is missing or of another shape, on whichever stage it is used, so
    that all stages refuse together.
    """
    if not Path(path).is_file():
        raise ValueError(f"weights file {path} does not exist")
    with safe_open(path, framework="pt") as stored:
        missing = sorted(set(shapes) - set(stored.keys()))
        if missing:
            raise ValueError(f"weights file {path} lacks {len(missing)} of the model's tensors, first {missing[0]}")
        for name, shape in shapes.items():
            found = tuple(stored.get_slice(name).get_shape())
            if found != shape:
                raise ValueError(f"{name} in {path} has shape {found}, the model's is {shape}")
        return {name: stored.get_tensor(name) for name in weights.named(with_borrowed=True)}
