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
    __slots__ = ("stage", "op", "batch", "length", "durations_s", "cached_tokens", "decodes", "decode_length", "num_bytes", "busy", "outliers", "peak_bytes")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    DURATIONS_S_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODES_FIELD_NUMBER: _ClassVar[int]
    DECODE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    OUTLIERS_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    stage: int
    op: OpKind
    batch: int
    length: int
    durations_s: _containers.RepeatedScalarFieldContainer[float]
    cached_tokens: int
    decodes: int
    decode_length: int
    num_bytes: int
    busy: OpKind
    outliers: int
    peak_bytes: int
    def __init__(self, stage: _Optional[int] = ..., op: _Optional[_Union[OpKind, str]] = ..., batch: _Optional[int] = ..., length: _Optional[int] = ..., durations_s: _Optional[_Iterable[float]] = ..., cached_tokens: _Optional[int] = ..., decodes: _Optional[int] = ..., decode_length: _Optional[int] = ..., num_bytes: _Optional[int] = ..., busy: _Optional[_Union[OpKind, str]] = ..., outliers: _Optional[int] = ..., peak_bytes: _Optional[int] = ...) -> None: ...

class LatencyTable(_message.Message):
    __slots__ = ("batches", "lengths", "durations_s")
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    DURATIONS_S_FIELD_NUMBER: _ClassVar[int]
    batches: _containers.RepeatedScalarFieldContainer[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    durations_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, batches: _Optional[_Iterable[int]] = ..., lengths: _Optional[_Iterable[int]] = ..., durations_s: _Optional[_Iterable[float]] = ...) -> None: ...

class Interference(_message.Message):
    __slots__ = ("stage", "op", "busy", "slowdown", "std")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    SLOWDOWN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    stage: int
    op: OpKind
    busy: OpKind
    slowdown: float
    std: float
    def __init__(self, stage: _Optional[int] = ..., op: _Optional[_Union[OpKind, str]] = ..., busy: _Optional[_Union[OpKind, str]] = ..., slowdown: _Optional[float] = ..., std: _Optional[float] = ...) -> None: ...

class HostLink(_message.Message):
    __slots__ = ("stage", "offload_bytes_per_s", "reload_bytes_per_s", "fixed_s")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    OFFLOAD_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    RELOAD_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    FIXED_S_FIELD_NUMBER: _ClassVar[int]
    stage: int
    offload_bytes_per_s: float
    reload_bytes_per_s: float
    fixed_s: float
    def __init__(self, stage: _Optional[int] = ..., offload_bytes_per_s: _Optional[float] = ..., reload_bytes_per_s: _Optional[float] = ..., fixed_s: _Optional[float] = ...) -> None: ...

class StageMemory(_message.Message):
    __slots__ = ("stage", "weight_bytes", "fixed_bytes", "activation_bytes_per_token", "kv_bytes_per_token", "mape")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    FIXED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MAPE_FIELD_NUMBER: _ClassVar[int]
    stage: int
    weight_bytes: int
    fixed_bytes: int
    activation_bytes_per_token: float
    kv_bytes_per_token: int
    mape: float
    def __init__(self, stage: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., fixed_bytes: _Optional[int] = ..., activation_bytes_per_token: _Optional[float] = ..., kv_bytes_per_token: _Optional[int] = ..., mape: _Optional[float] = ...) -> None: ...

class LatencyFit(_message.Message):
    __slots__ = ("stage", "op", "model", "coefficients", "mape", "r2", "chosen", "table", "residual_p5", "residual_p95")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    COEFFICIENTS_FIELD_NUMBER: _ClassVar[int]
    MAPE_FIELD_NUMBER: _ClassVar[int]
    R2_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_P5_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_P95_FIELD_NUMBER: _ClassVar[int]
    stage: int
    op: OpKind
    model: str
    coefficients: _containers.RepeatedScalarFieldContainer[float]
    mape: float
    r2: float
    chosen: bool
    table: LatencyTable
    residual_p5: float
    residual_p95: float
    def __init__(self, stage: _Optional[int] = ..., op: _Optional[_Union[OpKind, str]] = ..., model: _Optional[str] = ..., coefficients: _Optional[_Iterable[float]] = ..., mape: _Optional[float] = ..., r2: _Optional[float] = ..., chosen: _Optional[bool] = ..., table: _Optional[_Union[LatencyTable, _Mapping]] = ..., residual_p5: _Optional[float] = ..., residual_p95: _Optional[float] = ...) -> None: ...

class MixedCost(_message.Message):
    __slots__ = ("stage", "prefill", "decode", "shared", "mape", "residual_p5", "residual_p95")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    MAPE_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_P5_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_P95_FIELD_NUMBER: _ClassVar[int]
    stage: int
    prefill: float
    decode: float
    shared: float
    mape: float
    residual_p5: float
    residual_p95: float
    def __init__(self, stage: _Optional[int] = ..., prefill: _Optional[float] = ..., decode: _Optional[float] = ..., shared: _Optional[float] = ..., mape: _Optional[float] = ..., residual_p5: _Optional[float] = ..., residual_p95: _Optional[float] = ...) -> None: ...

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
    __slots__ = ("profile_id", "fingerprint", "version", "node_id", "created_unix_s", "num_stages", "model", "fits", "measurements", "loss", "length", "peak_memory_bytes", "content_hash", "engine", "device", "dtype", "threads_per_stage", "interference", "host_links", "incomplete_reason", "source", "mixed", "memory")
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
    CONTENT_HASH_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    THREADS_PER_STAGE_FIELD_NUMBER: _ClassVar[int]
    INTERFERENCE_FIELD_NUMBER: _ClassVar[int]
    HOST_LINKS_FIELD_NUMBER: _ClassVar[int]
    INCOMPLETE_REASON_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    MIXED_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
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
    content_hash: str
    engine: str
    device: str
    dtype: str
    threads_per_stage: int
    interference: _containers.RepeatedCompositeFieldContainer[Interference]
    host_links: _containers.RepeatedCompositeFieldContainer[HostLink]
    incomplete_reason: str
    source: str
    mixed: _containers.RepeatedCompositeFieldContainer[MixedCost]
    memory: _containers.RepeatedCompositeFieldContainer[StageMemory]
    def __init__(self, profile_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., version: _Optional[int] = ..., node_id: _Optional[str] = ..., created_unix_s: _Optional[float] = ..., num_stages: _Optional[int] = ..., model: _Optional[str] = ..., fits: _Optional[_Iterable[_Union[LatencyFit, _Mapping]]] = ..., measurements: _Optional[_Iterable[_Union[Measurement, _Mapping]]] = ..., loss: _Optional[_Union[Distribution, _Mapping]] = ..., length: _Optional[_Union[Distribution, _Mapping]] = ..., peak_memory_bytes: _Optional[_Iterable[int]] = ..., content_hash: _Optional[str] = ..., engine: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., threads_per_stage: _Optional[int] = ..., interference: _Optional[_Iterable[_Union[Interference, _Mapping]]] = ..., host_links: _Optional[_Iterable[_Union[HostLink, _Mapping]]] = ..., incomplete_reason: _Optional[str] = ..., source: _Optional[str] = ..., mixed: _Optional[_Iterable[_Union[MixedCost, _Mapping]]] = ..., memory: _Optional[_Iterable[_Union[StageMemory, _Mapping]]] = ...) -> None: ...
