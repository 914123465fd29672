"""Latency profiles from the JSON artifacts that the profiler stores (`<directory>/<fingerprint>/<version>.json`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from services.latency import HostLink, Interference, LatencyModel, LatencyTable, MixedCost, NodeLatency, OpKind
from services.profile_document import ArtifactError, check_content, in_file, read_document, read_text

_Place = tuple[int | str, ...]

_PREFIX = "OP_KIND_"
_KINDS = {f"{_PREFIX}{kind.name}": kind for kind in OpKind}


class ProfileError(ValueError):
    """The file cannot be used; the message is one line that names file, line and field."""


class Grid(NamedTuple):
    """Range of the points at which an operation was measured: sequences, tokens of each, tokens of all."""

    batch: tuple[int, int]
    length: tuple[int, int]
    tokens: tuple[int, int]


class Profile(NamedTuple):
    """What a simulation takes from a profile. `noise`: relative standard deviation of its operations' durations.

    measured: empty for a profile without its measurements.
    """

    profile_id: str
    model: str
    latency: NodeLatency
    noise: float
    measured: Mapping[OpKind, Grid]


class _Table(BaseModel):
    """Protobuf's JSON leaves out what is 0, false or empty, here and below."""

    batches: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    durations_s: tuple[FiniteFloat, ...] = ()


class _Fit(BaseModel):
    stage: int = Field(default=0, ge=0)
    op: str = ""
    model: str = ""
    coefficients: tuple[FiniteFloat, ...] = ()
    mape: FiniteFloat = 0.0
    residual_p5: FiniteFloat = 0.0
    residual_p95: FiniteFloat = 0.0
    chosen: bool = False
    table: _Table | None = None


class _Measurement(BaseModel):
    op: str = ""
    batch: int = 0
    length: int = 0


class _Interference(BaseModel):
    stage: int = 0
    op: str = ""
    busy: str = ""
    slowdown: FiniteFloat = 0.0
    std: float = 0.0


class _HostLink(BaseModel):
    stage: int = 0
    offload_bytes_per_s: FiniteFloat = 0.0
    reload_bytes_per_s: FiniteFloat = 0.0
    fixed_s: FiniteFloat = 0.0


class _Mixed(BaseModel):
    stage: int = 0
    prefill: FiniteFloat = 0.0
    decode: FiniteFloat = 0.0
    shared: FiniteFloat = 0.0
    mape: float = 0.0
    residual_p5: float = 0.0
    residual_p95: float = 0.0


class _Artifact(BaseModel):
    profile_id: str = ""
    model: str = ""
    num_stages: int = Field(default=0, ge=1, le=64, validate_default=True)
    fits: tuple[_Fit, ...] = ()
    measurements: tuple[_Measurement, ...] = ()
    interference: tuple[_Interference, ...] = ()
    host_links: tuple[_HostLink, ...] = ()
    mixed: tuple[_Mixed, ...] = ()


def read_profile(path: Path, *, model: str = "", num_stages: int = 0) -> Profile:
    """The chosen fits. Raises ProfileError; also when the profile is of another `model` or number of stages, has no
    hash, or was changed after it was written."""
    try:
        text = read_text(path)
    except ArtifactError as error:
        raise ProfileError(str(error)) from error
    try:
        document = read_document(text)
        artifact = _Artifact.model_validate_json(text)
        check_content(document)
    except ArtifactError as error:
        raise ProfileError(str(in_file(path, error))) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _error(path, text, first["loc"], _reason(first)) from error
    if model and artifact.model != model:
        raise _error(path, text, ("model",), f"is {artifact.model!r}, asked for is {model!r}")
    if num_stages and artifact.num_stages != num_stages:
        raise _error(path, text, ("num_stages",), f"is {artifact.num_stages}, asked for are {num_stages} stages")
    models = _models(path, text, artifact)
    for stage, known in enumerate(models):
        if OpKind.PREFILL not in known:
            raise _error(path, text, ("fits",), f"no fit is chosen for {_PREFIX}PREFILL on stage {stage}")
    latency = _together(path, text, artifact, tuple(models))
    return Profile(artifact.profile_id, artifact.model, latency, _noise(models), _measured(artifact))


def _together(
    path: Path, text: str, artifact: _Artifact, models: tuple[Mapping[OpKind, LatencyModel], ...]
) -> NodeLatency:
    """The models with what operations cost beside and within each other."""
    field = "interference"
    try:
        beside = tuple(
            Interference(item.stage, _KINDS[item.op], _KINDS[item.busy], item.slowdown, item.std)
            for item in artifact.interference
            if item.op in _KINDS and item.busy in _KINDS
        )
        field = "host_links"
        links = tuple(
            HostLink(link.offload_bytes_per_s, link.reload_bytes_per_s, link.fixed_s)
            for link in sorted(artifact.host_links, key=lambda link: link.stage)
        )
        NodeLatency(models, beside, links)
        field = "mixed"
        mixed = tuple(
            MixedCost(cost.prefill, cost.decode, cost.shared, cost.mape, cost.residual_p5, cost.residual_p95)
            for cost in sorted(artifact.mixed, key=lambda cost: cost.stage)
        )
        return NodeLatency(models, beside, links, mixed)
    except ValueError as error:
        raise _error(path, text, (field,), str(error)) from error


def _models(path: Path, text: str, artifact: _Artifact) -> list[dict[OpKind, LatencyModel]]:
    """The chosen model of every operation by stage; operations that this version does not know are left out."""
    stages: list[dict[OpKind, LatencyModel]] = [{} for _ in range(artifact.num_stages)]
    for index, fit in enumerate(artifact.fits):
        kind = _KINDS.get(fit.op)
        if not fit.chosen or kind is None:
            continue
        place: _Place = ("fits", index)
        if fit.stage >= artifact.num_stages:
            raise _error(path, text, (*place, "stage"), f"is {fit.stage}, of {artifact.num_stages} stages")
        if kind in stages[fit.stage]:
            raise _error(path, text, (*place, "chosen"), f"a second fit is chosen for {fit.op} on stage {fit.stage}")
        if min(fit.coefficients, default=0.0) < 0.0:
            raise _error(path, text, (*place, "coefficients"), "must not be negative")
        try:
            stages[fit.stage][kind] = _model(fit)
        except ValueError as error:
            raise _error(path, text, (*place, "model"), str(error)) from error
    return stages


def _model(fit: _Fit) -> LatencyModel:
    table = None
    if fit.table is not None:
        table = LatencyTable(fit.table.batches, fit.table.lengths, fit.table.durations_s)
    return LatencyModel(fit.model, fit.coefficients, fit.mape, fit.residual_p5, fit.residual_p95, table)


def _measured(artifact: _Artifact) -> dict[OpKind, Grid]:
    points: dict[OpKind, list[tuple[int, int]]] = {}
    for point in artifact.measurements:
        kind = _KINDS.get(point.op)
        if kind is not None:
            points.setdefault(kind, []).append((point.batch, point.length))
    return {kind: _grid(known) for kind, known in points.items()}


def _grid(points: Sequence[tuple[int, int]]) -> Grid:
    batches, lengths = zip(*points, strict=True)
    tokens = [batch * length for batch, length in points]
    return Grid((min(batches), max(batches)), (min(lengths), max(lengths)), (min(tokens), max(tokens)))


def _noise(models: list[dict[OpKind, LatencyModel]]) -> float:
    """Mean over the operations that depend on a length: the others are single, rare measurements."""
    known = [model.noise for stage in models for model in stage.values() if model.form != "constant"]
    return sum(known) / len(known) if known else 0.0


def _reason(error: Any) -> str:
    got = error["input"]
    shown = f", got {got!r}" if isinstance(got, str | int | float) and error["type"] != "json_invalid" else ""
    message: str = error["msg"]
    return message.splitlines()[0] + shown


def _error(path: Path, text: str, place: _Place, reason: str) -> ProfileError:
    if not place:  # no JSON: the parser's message has the line
        return ProfileError(f"{path}: {reason}")
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    try:
        line = f"line {_line(text, place)}: "
    except yaml.YAMLError:  # of JSON's escapes YAML lacks one
        line = ""
    return ProfileError(f"{path}: {line}field {field!r}: {reason}")


def _line(text: str, place: _Place) -> int:
    """Line of a field, or of the innermost thing around it that is there. JSON is YAML, whose parser keeps places."""
    node = yaml.compose(text.replace("\t", " "), Loader=yaml.SafeLoader)
    line = 1
    for part in place:
        if isinstance(part, int) and isinstance(node, yaml.SequenceNode) and part < len(node.value):
            node = node.value[part]
        elif isinstance(part, str) and isinstance(node, yaml.MappingNode):
            found = [value for key, value in node.value if key.value == part]
            if not found:
                break
            node = found[-1]
        else:
            break
        line = node.start_mark.line + 1
    return line
