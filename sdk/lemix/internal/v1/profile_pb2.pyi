from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OpKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OP_KIND_UNSPECIFIED: _ClassVar[OpKind]
    OP_KIND_PREFILL: _ClassVar[OpKind]
    OP_KIND_DECODE: _ClassVar[OpKind]
    OP_KIND_TRAIN_FORWARD: _ClassVar[OpKind]
    OP_KIND_TRAIN_BACKWARD: _ClassVar[OpKind]
    OP_KIND_OPTIMIZER_STEP: _ClassVar[OpKind]
    OP_KIND_WEIGHT_SYNC: _ClassVar[OpKind]
    OP_KIND_OFFLOAD: _ClassVar[OpKind]
    OP_KIND_RELOAD: _ClassVar[OpKind]
OP_KIND_UNSPECIFIED: OpKind
OP_KIND_PREFILL: OpKind
OP_KIND_DECODE: OpKind
OP_KIND_TRAIN_FORWARD: OpKind
OP_KIND_TRAIN_BACKWARD: OpKind
OP_KIND_OPTIMIZER_STEP: OpKind
OP_KIND_WEIGHT_SYNC: OpKind
OP_KIND_OFFLOAD: OpKind
OP_KIND_RELOAD: OpKind

class Measurement(_message.Message):
    __slots__ = ("stage", "op", "batch", "length", "durations_s")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    DURATIONS_S_FIELD_NUMBER: _ClassVar[int]
    stage: int
    op: OpKind
    batch: int
    length: int
    durations_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, stage: _Optional[int] = ..., op: _Optional[_Union[OpKind, str]] = ..., batch: _Optional[int] = ..., length: _Optional[int] = ..., durations_s: _Optional[_Iterable[float]] = ...) -> None: ...

class LatencyFit(_message.Message):
    __slots__ = ("stage", "op", "model", "coefficients", "mape", "r2", "chosen", "interval_p90")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    COEFFICIENTS_FIELD_NUMBER: _ClassVar[int]
    MAPE_FIELD_NUMBER: _ClassVar[int]
    R2_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_P90_FIELD_NUMBER: _ClassVar[int]
    stage: int
    op: OpKind
    model: str
    coefficients: _containers.RepeatedScalarFieldContainer[float]
    mape: float
    r2: float
    chosen: bool
    interval_p90: float
    def __init__(self, stage: _Optional[int] = ..., op: _Optional[_Union[OpKind, str]] = ..., model: _Optional[str] = ..., coefficients: _Optional[_Iterable[float]] = ..., mape: _Optional[float] = ..., r2: _Optional[float] = ..., chosen: _Optional[bool] = ..., interval_p90: _Optional[float] = ...) -> None: ...

class Distribution(_message.Message):
    __slots__ = ("count", "mean", "std", "p50", "p99")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    P50_FIELD_NUMBER: _ClassVar[int]
    P99_FIELD_NUMBER: _ClassVar[int]
    count: int
    mean: float
    std: float
    p50: float
    p99: float
    def __init__(self, count: _Optional[int] = ..., mean: _Optional[float] = ..., std: _Optional[float] = ..., p50: _Optional[float] = ..., p99: _Optional[float] = ...) -> None: ...

class Profile(_message.Message):
    __slots__ = ("profile_id", "fingerprint", "version", "node_id", "created_unix_s", "num_stages", "model", "fits", "measurements", "loss", "length", "peak_memory_bytes")
    PROFILE_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FITS_FIELD_NUMBER: _ClassVar[int]
    MEASUREMENTS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    profile_id: str
    fingerprint: str
    version: int
    node_id: str
    created_unix_s: float
    num_stages: int
    model: str
    fits: _containers.RepeatedCompositeFieldContainer[LatencyFit]
    measurements: _containers.RepeatedCompositeFieldContainer[Measurement]
    loss: Distribution
    length: Distribution
    peak_memory_bytes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, profile_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., version: _Optional[int] = ..., node_id: _Optional[str] = ..., created_unix_s: _Optional[float] = ..., num_stages: _Optional[int] = ..., model: _Optional[str] = ..., fits: _Optional[_Iterable[_Union[LatencyFit, _Mapping]]] = ..., measurements: _Optional[_Iterable[_Union[Measurement, _Mapping]]] = ..., loss: _Optional[_Union[Distribution, _Mapping]] = ..., length: _Optional[_Union[Distribution, _Mapping]] = ..., peak_memory_bytes: _Optional[_Iterable[int]] = ...) -> None: ...
