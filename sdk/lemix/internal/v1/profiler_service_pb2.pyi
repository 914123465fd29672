from lemix.internal.v1 import profile_pb2 as _profile_pb2
from lemix.internal.v1 import work_pb2 as _work_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ProfileNodeRequest(_message.Message):
    __slots__ = ("node_address", "samples", "budget_s", "allow_busy")
    NODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_S_FIELD_NUMBER: _ClassVar[int]
    ALLOW_BUSY_FIELD_NUMBER: _ClassVar[int]
    node_address: str
    samples: _containers.RepeatedCompositeFieldContainer[_work_pb2.TrainingExample]
    budget_s: float
    allow_busy: bool
    def __init__(self, node_address: _Optional[str] = ..., samples: _Optional[_Iterable[_Union[_work_pb2.TrainingExample, _Mapping]]] = ..., budget_s: _Optional[float] = ..., allow_busy: _Optional[bool] = ...) -> None: ...

class ProfileNodeResponse(_message.Message):
    __slots__ = ("profile", "progress")
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    profile: _profile_pb2.Profile
    progress: ProfileProgress
    def __init__(self, profile: _Optional[_Union[_profile_pb2.Profile, _Mapping]] = ..., progress: _Optional[_Union[ProfileProgress, _Mapping]] = ...) -> None: ...

class ProfileProgress(_message.Message):
    __slots__ = ("points_done", "points_total", "op", "seconds_left")
    POINTS_DONE_FIELD_NUMBER: _ClassVar[int]
    POINTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    points_done: int
    points_total: int
    op: _profile_pb2.OpKind
    seconds_left: float
    def __init__(self, points_done: _Optional[int] = ..., points_total: _Optional[int] = ..., op: _Optional[_Union[_profile_pb2.OpKind, str]] = ..., seconds_left: _Optional[float] = ...) -> None: ...

class GetProfileRequest(_message.Message):
    __slots__ = ("fingerprint", "profile_id")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PROFILE_ID_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    profile_id: str
    def __init__(self, fingerprint: _Optional[str] = ..., profile_id: _Optional[str] = ...) -> None: ...

class GetProfileResponse(_message.Message):
    __slots__ = ("profile",)
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    profile: _profile_pb2.Profile
    def __init__(self, profile: _Optional[_Union[_profile_pb2.Profile, _Mapping]] = ...) -> None: ...

class ListProfilesRequest(_message.Message):
    __slots__ = ("fingerprint",)
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    def __init__(self, fingerprint: _Optional[str] = ...) -> None: ...

class ListProfilesResponse(_message.Message):
    __slots__ = ("profiles", "problems")
    PROFILES_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    profiles: _containers.RepeatedCompositeFieldContainer[ProfileSummary]
    problems: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, profiles: _Optional[_Iterable[_Union[ProfileSummary, _Mapping]]] = ..., problems: _Optional[_Iterable[str]] = ...) -> None: ...

class ProfileSummary(_message.Message):
    __slots__ = ("profile_id", "node_id", "model", "num_stages", "engine", "device", "dtype", "created_unix_s", "incomplete_reason", "source", "content_hash", "mape")
    PROFILE_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    INCOMPLETE_REASON_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_HASH_FIELD_NUMBER: _ClassVar[int]
    MAPE_FIELD_NUMBER: _ClassVar[int]
    profile_id: str
    node_id: str
    model: str
    num_stages: int
    engine: str
    device: str
    dtype: str
    created_unix_s: float
    incomplete_reason: str
    source: str
    content_hash: str
    mape: float
    def __init__(self, profile_id: _Optional[str] = ..., node_id: _Optional[str] = ..., model: _Optional[str] = ..., num_stages: _Optional[int] = ..., engine: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., created_unix_s: _Optional[float] = ..., incomplete_reason: _Optional[str] = ..., source: _Optional[str] = ..., content_hash: _Optional[str] = ..., mape: _Optional[float] = ...) -> None: ...

class DiffProfilesRequest(_message.Message):
    __slots__ = ("base_id", "other_id")
    BASE_ID_FIELD_NUMBER: _ClassVar[int]
    OTHER_ID_FIELD_NUMBER: _ClassVar[int]
    base_id: str
    other_id: str
    def __init__(self, base_id: _Optional[str] = ..., other_id: _Optional[str] = ...) -> None: ...

class DiffProfilesResponse(_message.Message):
    __slots__ = ("ops", "notes")
    OPS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    ops: _containers.RepeatedCompositeFieldContainer[OpDifference]
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ops: _Optional[_Iterable[_Union[OpDifference, _Mapping]]] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...

class OpDifference(_message.Message):
    __slots__ = ("stage", "op", "base", "other", "ratio_min", "ratio_p50", "ratio_max", "points")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    OTHER_FIELD_NUMBER: _ClassVar[int]
    RATIO_MIN_FIELD_NUMBER: _ClassVar[int]
    RATIO_P50_FIELD_NUMBER: _ClassVar[int]
    RATIO_MAX_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    stage: int
    op: _profile_pb2.OpKind
    base: _profile_pb2.LatencyFit
    other: _profile_pb2.LatencyFit
    ratio_min: float
    ratio_p50: float
    ratio_max: float
    points: int
    def __init__(self, stage: _Optional[int] = ..., op: _Optional[_Union[_profile_pb2.OpKind, str]] = ..., base: _Optional[_Union[_profile_pb2.LatencyFit, _Mapping]] = ..., other: _Optional[_Union[_profile_pb2.LatencyFit, _Mapping]] = ..., ratio_min: _Optional[float] = ..., ratio_p50: _Optional[float] = ..., ratio_max: _Optional[float] = ..., points: _Optional[int] = ...) -> None: ...

class DeleteProfileRequest(_message.Message):
    __slots__ = ("profile_id",)
    PROFILE_ID_FIELD_NUMBER: _ClassVar[int]
    profile_id: str
    def __init__(self, profile_id: _Optional[str] = ...) -> None: ...

class DeleteProfileResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
