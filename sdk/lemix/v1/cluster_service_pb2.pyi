from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Model(_message.Message):
    __slots__ = ("id", "max_context_tokens", "created_unix_s", "parent")
    ID_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    id: str
    max_context_tokens: int
    created_unix_s: float
    parent: str
    def __init__(self, id: _Optional[str] = ..., max_context_tokens: _Optional[int] = ..., created_unix_s: _Optional[float] = ..., parent: _Optional[str] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpPrediction(_message.Message):
    __slots__ = ("stage", "op", "count", "error", "error_beside", "ratio", "interval_low", "interval_high", "drifting")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ERROR_BESIDE_FIELD_NUMBER: _ClassVar[int]
    RATIO_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_LOW_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_HIGH_FIELD_NUMBER: _ClassVar[int]
    DRIFTING_FIELD_NUMBER: _ClassVar[int]
    stage: int
    op: str
    count: int
    error: float
    error_beside: float
    ratio: float
    interval_low: float
    interval_high: float
    drifting: bool
    def __init__(self, stage: _Optional[int] = ..., op: _Optional[str] = ..., count: _Optional[int] = ..., error: _Optional[float] = ..., error_beside: _Optional[float] = ..., ratio: _Optional[float] = ..., interval_low: _Optional[float] = ..., interval_high: _Optional[float] = ..., drifting: _Optional[bool] = ...) -> None: ...

class PredictionError(_message.Message):
    __slots__ = ("predicted", "beside_training", "count", "error")
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    BESIDE_TRAINING_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    predicted: str
    beside_training: bool
    count: int
    error: float
    def __init__(self, predicted: _Optional[str] = ..., beside_training: _Optional[bool] = ..., count: _Optional[int] = ..., error: _Optional[float] = ...) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("node_id", "ready", "num_stages", "inflight_inference", "inflight_training", "weight_step", "role", "ops")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    INFLIGHT_INFERENCE_FIELD_NUMBER: _ClassVar[int]
    INFLIGHT_TRAINING_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_STEP_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    OPS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    ready: bool
    num_stages: int
    inflight_inference: int
    inflight_training: int
    weight_step: int
    role: str
    ops: _containers.RepeatedCompositeFieldContainer[OpPrediction]
    def __init__(self, node_id: _Optional[str] = ..., ready: _Optional[bool] = ..., num_stages: _Optional[int] = ..., inflight_inference: _Optional[int] = ..., inflight_training: _Optional[int] = ..., weight_step: _Optional[int] = ..., role: _Optional[str] = ..., ops: _Optional[_Iterable[_Union[OpPrediction, _Mapping]]] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("policy", "ready", "not_ready_reason", "nodes", "waiting_inference", "waiting_training", "predictions")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    NOT_READY_REASON_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    WAITING_INFERENCE_FIELD_NUMBER: _ClassVar[int]
    WAITING_TRAINING_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    policy: str
    ready: bool
    not_ready_reason: str
    nodes: _containers.RepeatedCompositeFieldContainer[NodeStatus]
    waiting_inference: int
    waiting_training: int
    predictions: _containers.RepeatedCompositeFieldContainer[PredictionError]
    def __init__(self, policy: _Optional[str] = ..., ready: _Optional[bool] = ..., not_ready_reason: _Optional[str] = ..., nodes: _Optional[_Iterable[_Union[NodeStatus, _Mapping]]] = ..., waiting_inference: _Optional[int] = ..., waiting_training: _Optional[int] = ..., predictions: _Optional[_Iterable[_Union[PredictionError, _Mapping]]] = ...) -> None: ...
