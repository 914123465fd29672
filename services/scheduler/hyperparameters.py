"""Hyperparameters of a job: checked, defaults filled in."""

import math
from collections.abc import Sequence

from lemix.errors import ErrorCode, LemixError
from lemix.v1 import training_service_pb2, types_pb2

_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
#: Lowest, highest, default.
_WHOLE = {
    "num_epochs": (1, 1000, 1),
    "batch_size": (1, 256, 1),
    "gradient_accumulation_steps": (1, 256, 1),
    "max_skipped_in_row": (1, 1000, 3),
}
#: Names all projections of the model.
_ALL_LINEAR = "all-linear"
_POSITIVE = {"learning_rate": 1e-4, "max_grad_norm": 1.0}


def resolve(given: types_pb2.Hyperparameters) -> types_pb2.Hyperparameters:
    """Every field set. Raises INVALID_REQUEST naming the field that is out of range."""
    resolved = types_pb2.Hyperparameters()
    for name, (lowest, highest, standard) in _WHOLE.items():
        value = getattr(given, name) if given.HasField(name) else standard
        _check(lowest <= value <= highest, name, f"must be in [{lowest}, {highest}]")
        setattr(resolved, name, value)
    for name, default in _POSITIVE.items():
        value = getattr(given, name) if given.HasField(name) else default
        _check(math.isfinite(value) and value > 0.0, name, "must be a number > 0")
        setattr(resolved, name, value)
    _check(math.isfinite(given.weight_decay) and given.weight_decay >= 0.0, "weight_decay", "must be a number >= 0")
    resolved.weight_decay = given.weight_decay
    resolved.lr_schedule = given.lr_schedule if given.HasField("lr_schedule") else "constant"
    _check(resolved.lr_schedule in _SCHEDULES, "lr_schedule", f"must be one of {', '.join(_SCHEDULES)}")
    resolved.warmup_steps = given.warmup_steps
    return resolved


def resolve_method(
    request: training_service_pb2.CreateJobRequest,
) -> tuple[types_pb2.TrainingMethod, types_pb2.TrainingMode, types_pb2.Lora | None]:
    """What a job trains, and for whom; the adapter with every field but its targets set, None: there is none.

    Raises INVALID_REQUEST when an own model is wanted without an adapter.
    """
    is_isolated = request.mode == types_pb2.TRAINING_MODE_ISOLATED
    mode = types_pb2.TRAINING_MODE_ISOLATED if is_isolated else types_pb2.TRAINING_MODE_ONLINE
    if request.method != types_pb2.TRAINING_METHOD_LORA and not request.HasField("lora"):
        if is_isolated:
            raise LemixError(ErrorCode.INVALID_REQUEST, "mode 'isolated' needs method 'lora'", param="mode")
        return types_pb2.TRAINING_METHOD_FULL, mode, None
    given = request.lora
    lora = types_pb2.Lora(
        rank=given.rank or 8, alpha=given.alpha or 16.0, dropout=given.dropout, target_modules=given.target_modules
    )
    return types_pb2.TRAINING_METHOD_LORA, mode, lora


def check_targets(names: Sequence[str], projections: frozenset[str]) -> None:
    """Raises INVALID_REQUEST for a projection that the model lacks. projections: its own; empty: not known."""
    unknown = sorted(set(names) - projections)
    if projections and unknown and list(names) != [_ALL_LINEAR]:
        message = f"the model has no projection {unknown[0]!r} to adapt; it has {', '.join(sorted(projections))}"
        raise LemixError(ErrorCode.INVALID_REQUEST, f"{message}, or {_ALL_LINEAR}", param="lora.target_modules")


def resolve_checkpoints(given: types_pb2.CheckpointPolicy) -> types_pb2.CheckpointPolicy:
    """The policy as given; what is absent is left to the nodes. Raises INVALID_REQUEST naming a field."""
    for name, highest in (("every_steps", 100_000), ("every_s", 86_400)):
        value = getattr(given, name)
        if given.HasField(name) and not 1 <= value <= highest:
            param = f"checkpoint.{name}"
            raise LemixError(ErrorCode.INVALID_REQUEST, f"{param} must be in [1, {highest}]", param=param)
    return given


def resolve_gate(given: types_pb2.QualityGate) -> types_pb2.QualityGate:
    """Every field set. Raises INVALID_REQUEST naming the field that is out of range."""
    tolerance = given.tolerance if given.HasField("tolerance") else 0.05
    if not (math.isfinite(tolerance) and tolerance >= 0.0):
        param = "quality_gate.tolerance"
        raise LemixError(ErrorCode.INVALID_REQUEST, f"{param} must be a number >= 0", param=param)
    max_bad = given.max_bad_evaluations if given.HasField("max_bad_evaluations") else 3
    if max_bad > 1000:
        param = "quality_gate.max_bad_evaluations"
        raise LemixError(ErrorCode.INVALID_REQUEST, f"{param} must be in [0, 1000]", param=param)
    return types_pb2.QualityGate(tolerance=tolerance, max_bad_evaluations=max_bad, publish=given.publish)


def _check(is_right: bool, name: str, problem: str) -> None:
    if not is_right:
        param = f"hyperparameters.{name}"
        raise LemixError(ErrorCode.INVALID_REQUEST, f"{param} {problem}", param=param)
