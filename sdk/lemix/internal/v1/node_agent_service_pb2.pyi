from lemix.internal.v1 import profile_pb2 as _profile_pb2
from lemix.internal.v1 import work_pb2 as _work_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StreamTokensRequest(_message.Message):
    __slots__ = ("request_id", "offset", "gateway_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    offset: int
    gateway_id: str
    def __init__(self, request_id: _Optional[str] = ..., offset: _Optional[int] = ..., gateway_id: _Optional[str] = ...) -> None: ...

class StreamTokensResponse(_message.Message):
    __slots__ = ("chunks",)
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    chunks: _containers.RepeatedCompositeFieldContainer[TokenChunk]
    def __init__(self, chunks: _Optional[_Iterable[_Union[TokenChunk, _Mapping]]] = ...) -> None: ...

class TokenChunk(_message.Message):
    __slots__ = ("request_id", "offset", "token_ids", "outcome", "logprobs")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    offset: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    outcome: _work_pb2.InferenceOutcome
    logprobs: _containers.RepeatedCompositeFieldContainer[_work_pb2.TokenLogprobs]
    def __init__(self, request_id: _Optional[str] = ..., offset: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., outcome: _Optional[_Union[_work_pb2.InferenceOutcome, _Mapping]] = ..., logprobs: _Optional[_Iterable[_Union[_work_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class GridPoint(_message.Message):
    __slots__ = ("op", "batch", "length", "cached_tokens", "decodes", "decode_length", "num_bytes", "busy")
    OP_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODES_FIELD_NUMBER: _ClassVar[int]
    DECODE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUSY_FIELD_NUMBER: _ClassVar[int]
    op: _profile_pb2.OpKind
    batch: int
    length: int
    cached_tokens: int
    decodes: int
    decode_length: int
    num_bytes: int
    busy: _profile_pb2.OpKind
    def __init__(self, op: _Optional[_Union[_profile_pb2.OpKind, str]] = ..., batch: _Optional[int] = ..., length: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., decodes: _Optional[int] = ..., decode_length: _Optional[int] = ..., num_bytes: _Optional[int] = ..., busy: _Optional[_Union[_profile_pb2.OpKind, str]] = ...) -> None: ...

class MeasureOpsRequest(_message.Message):
    __slots__ = ("points", "repetitions", "warmup", "samples", "rounds", "budget_s", "allow_busy")
    POINTS_FIELD_NUMBER: _ClassVar[int]
    REPETITIONS_FIELD_NUMBER: _ClassVar[int]
    WARMUP_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_S_FIELD_NUMBER: _ClassVar[int]
    ALLOW_BUSY_FIELD_NUMBER: _ClassVar[int]
    points: _containers.RepeatedCompositeFieldContainer[GridPoint]
    repetitions: int
    warmup: int
    samples: _containers.RepeatedCompositeFieldContainer[_work_pb2.TrainingExample]
    rounds: int
    budget_s: float
    allow_busy: bool
    def __init__(self, points: _Optional[_Iterable[_Union[GridPoint, _Mapping]]] = ..., repetitions: _Optional[int] = ..., warmup: _Optional[int] = ..., samples: _Optional[_Iterable[_Union[_work_pb2.TrainingExample, _Mapping]]] = ..., rounds: _Optional[int] = ..., budget_s: _Optional[float] = ..., allow_busy: _Optional[bool] = ...) -> None: ...

class MeasureOpsResponse(_message.Message):
    __slots__ = ("measurements", "sample_losses", "peak_memory_bytes", "memory", "point", "left_out_reason")
    MEASUREMENTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_LOSSES_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_REASON_FIELD_NUMBER: _ClassVar[int]
    measurements: _containers.RepeatedCompositeFieldContainer[_profile_pb2.Measurement]
    sample_losses: _containers.RepeatedScalarFieldContainer[float]
    peak_memory_bytes: _containers.RepeatedScalarFieldContainer[int]
    memory: _containers.RepeatedCompositeFieldContainer[_profile_pb2.StageMemory]
    point: int
    left_out_reason: str
    def __init__(self, measurements: _Optional[_Iterable[_Union[_profile_pb2.Measurement, _Mapping]]] = ..., sample_losses: _Optional[_Iterable[float]] = ..., peak_memory_bytes: _Optional[_Iterable[int]] = ..., memory: _Optional[_Iterable[_Union[_profile_pb2.StageMemory, _Mapping]]] = ..., point: _Optional[int] = ..., left_out_reason: _Optional[str] = ...) -> None: ...

class FetchWeightsRequest(_message.Message):
    __slots__ = ("sync_id",)
    SYNC_ID_FIELD_NUMBER: _ClassVar[int]
    sync_id: str
    def __init__(self, sync_id: _Optional[str] = ...) -> None: ...

class FetchWeightsResponse(_message.Message):
    __slots__ = ("name", "shape", "dtype", "data", "offset_bytes", "trained_unix_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAINED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    data: bytes
    offset_bytes: int
    trained_unix_s: float
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., data: _Optional[bytes] = ..., offset_bytes: _Optional[int] = ..., trained_unix_s: _Optional[float] = ...) -> None: ...

class GetNodeInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetNodeInfoResponse(_message.Message):
    __slots__ = ("node_id", "model", "num_stages", "profile_fingerprint", "max_context_tokens", "max_batch", "vocab_size", "worker_pids", "weight_step", "engine", "device", "dtype", "threads_per_stage", "kv_bytes_per_token", "kv_capacity_tokens", "clock_slip")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    WORKER_PIDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_STEP_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    THREADS_PER_STAGE_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CLOCK_SLIP_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    model: str
    num_stages: int
    profile_fingerprint: str
    max_context_tokens: int
    max_batch: int
    vocab_size: int
    worker_pids: _containers.RepeatedScalarFieldContainer[int]
    weight_step: int
    engine: str
    device: str
    dtype: str
    threads_per_stage: int
    kv_bytes_per_token: int
    kv_capacity_tokens: int
    clock_slip: ClockSlip
    def __init__(self, node_id: _Optional[str] = ..., model: _Optional[str] = ..., num_stages: _Optional[int] = ..., profile_fingerprint: _Optional[str] = ..., max_context_tokens: _Optional[int] = ..., max_batch: _Optional[int] = ..., vocab_size: _Optional[int] = ..., worker_pids: _Optional[_Iterable[int]] = ..., weight_step: _Optional[int] = ..., engine: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., threads_per_stage: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ..., kv_capacity_tokens: _Optional[int] = ..., clock_slip: _Optional[_Union[ClockSlip, _Mapping]] = ...) -> None: ...

class ClockSlip(_message.Message):
    __slots__ = ("ops", "p50", "p99", "worst_s", "late_s", "busy_s")
    OPS_FIELD_NUMBER: _ClassVar[int]
    P50_FIELD_NUMBER: _ClassVar[int]
    P99_FIELD_NUMBER: _ClassVar[int]
    WORST_S_FIELD_NUMBER: _ClassVar[int]
    LATE_S_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    ops: int
    p50: float
    p99: float
    worst_s: float
    late_s: float
    busy_s: float
    def __init__(self, ops: _Optional[int] = ..., p50: _Optional[float] = ..., p99: _Optional[float] = ..., worst_s: _Optional[float] = ..., late_s: _Optional[float] = ..., busy_s: _Optional[float] = ...) -> None: ...
