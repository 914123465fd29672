from lemix.internal.v1 import profile_pb2 as _profile_pb2
from lemix.internal.v1 import work_pb2 as _work_pb2
from lemix.v1 import cluster_service_pb2 as _cluster_service_pb2
from lemix.v1 import errors_pb2 as _errors_pb2
from lemix.v1 import training_service_pb2 as _training_service_pb2
from lemix.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SyncMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SYNC_MODE_UNSPECIFIED: _ClassVar[SyncMode]
    SYNC_MODE_REPLACE: _ClassVar[SyncMode]
    SYNC_MODE_AVERAGE: _ClassVar[SyncMode]

class DecisionFate(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DECISION_FATE_UNSPECIFIED: _ClassVar[DecisionFate]
    DECISION_FATE_UNFINISHED: _ClassVar[DecisionFate]
    DECISION_FATE_OK: _ClassVar[DecisionFate]
    DECISION_FATE_FAILED: _ClassVar[DecisionFate]
    DECISION_FATE_CANCELLED: _ClassVar[DecisionFate]
    DECISION_FATE_NODE_LOST: _ClassVar[DecisionFate]
    DECISION_FATE_REFUSED: _ClassVar[DecisionFate]

class ResponseMeaning(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESPONSE_MEANING_UNSPECIFIED: _ClassVar[ResponseMeaning]
    RESPONSE_MEANING_FIRST_TOKEN: _ClassVar[ResponseMeaning]
    RESPONSE_MEANING_FORWARD_END: _ClassVar[ResponseMeaning]
SYNC_MODE_UNSPECIFIED: SyncMode
SYNC_MODE_REPLACE: SyncMode
SYNC_MODE_AVERAGE: SyncMode
DECISION_FATE_UNSPECIFIED: DecisionFate
DECISION_FATE_UNFINISHED: DecisionFate
DECISION_FATE_OK: DecisionFate
DECISION_FATE_FAILED: DecisionFate
DECISION_FATE_CANCELLED: DecisionFate
DECISION_FATE_NODE_LOST: DecisionFate
DECISION_FATE_REFUSED: DecisionFate
RESPONSE_MEANING_UNSPECIFIED: ResponseMeaning
RESPONSE_MEANING_FIRST_TOKEN: ResponseMeaning
RESPONSE_MEANING_FORWARD_END: ResponseMeaning

class GatewaySessionRequest(_message.Message):
    __slots__ = ("hello", "submit", "cancel")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    hello: GatewayHello
    submit: SubmitInference
    cancel: CancelInference
    def __init__(self, hello: _Optional[_Union[GatewayHello, _Mapping]] = ..., submit: _Optional[_Union[SubmitInference, _Mapping]] = ..., cancel: _Optional[_Union[CancelInference, _Mapping]] = ...) -> None: ...

class GatewayHello(_message.Message):
    __slots__ = ("gateway_id",)
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    def __init__(self, gateway_id: _Optional[str] = ...) -> None: ...

class SubmitInference(_message.Message):
    __slots__ = ("request_id", "work")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    work: _work_pb2.InferenceWork
    def __init__(self, request_id: _Optional[str] = ..., work: _Optional[_Union[_work_pb2.InferenceWork, _Mapping]] = ...) -> None: ...

class CancelInference(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class GatewaySessionResponse(_message.Message):
    __slots__ = ("request_id", "welcome", "accepted", "assigned", "rejected", "finished")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    ASSIGNED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    welcome: GatewayWelcome
    accepted: InferenceAccepted
    assigned: InferenceAssigned
    rejected: _errors_pb2.ErrorDetail
    finished: _work_pb2.InferenceOutcome
    def __init__(self, request_id: _Optional[str] = ..., welcome: _Optional[_Union[GatewayWelcome, _Mapping]] = ..., accepted: _Optional[_Union[InferenceAccepted, _Mapping]] = ..., assigned: _Optional[_Union[InferenceAssigned, _Mapping]] = ..., rejected: _Optional[_Union[_errors_pb2.ErrorDetail, _Mapping]] = ..., finished: _Optional[_Union[_work_pb2.InferenceOutcome, _Mapping]] = ...) -> None: ...

class GatewayWelcome(_message.Message):
    __slots__ = ("default_slo",)
    DEFAULT_SLO_FIELD_NUMBER: _ClassVar[int]
    default_slo: _types_pb2.Slo
    def __init__(self, default_slo: _Optional[_Union[_types_pb2.Slo, _Mapping]] = ...) -> None: ...

class InferenceAccepted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InferenceAssigned(_message.Message):
    __slots__ = ("node_id", "node_address")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    node_address: str
    def __init__(self, node_id: _Optional[str] = ..., node_address: _Optional[str] = ...) -> None: ...

class NodeSessionRequest(_message.Message):
    __slots__ = ("hello", "heartbeat", "outcome", "sync_finished", "trained", "checkpoint", "evaluation", "traces")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SYNC_FINISHED_FIELD_NUMBER: _ClassVar[int]
    TRAINED_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_FIELD_NUMBER: _ClassVar[int]
    TRACES_FIELD_NUMBER: _ClassVar[int]
    hello: NodeHello
    heartbeat: NodeHeartbeat
    outcome: _work_pb2.WorkOutcome
    sync_finished: SyncFinished
    trained: _work_pb2.WorkOutcome
    checkpoint: CheckpointReport
    evaluation: EvaluationReport
    traces: TraceBatch
    def __init__(self, hello: _Optional[_Union[NodeHello, _Mapping]] = ..., heartbeat: _Optional[_Union[NodeHeartbeat, _Mapping]] = ..., outcome: _Optional[_Union[_work_pb2.WorkOutcome, _Mapping]] = ..., sync_finished: _Optional[_Union[SyncFinished, _Mapping]] = ..., trained: _Optional[_Union[_work_pb2.WorkOutcome, _Mapping]] = ..., checkpoint: _Optional[_Union[CheckpointReport, _Mapping]] = ..., evaluation: _Optional[_Union[EvaluationReport, _Mapping]] = ..., traces: _Optional[_Union[TraceBatch, _Mapping]] = ...) -> None: ...

class NodeHello(_message.Message):
    __slots__ = ("node_id", "address", "num_stages", "model", "max_inflight_inference", "incarnation", "profile_fingerprint", "sent_monotonic_s", "max_context_tokens", "kv_capacity_tokens", "max_batch", "prefix_cache_tokens", "epoch_steps", "max_prefill_tokens", "max_inflight_training", "weight_handling", "gradient_buffers", "training_schedule", "max_training_parts", "keeps_checkpoints", "checkpoints", "restore_note", "max_batch_tokens", "kv_block_tokens", "projections", "adapters", "weights_changed", "weights_age_s")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_STAGES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_INFLIGHT_INFERENCE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SENT_MONOTONIC_S_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    PREFIX_CACHE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_INFLIGHT_TRAINING_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_HANDLING_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_BUFFERS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    MAX_TRAINING_PARTS_FIELD_NUMBER: _ClassVar[int]
    KEEPS_CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    RESTORE_NOTE_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROJECTIONS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_CHANGED_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_AGE_S_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    address: str
    num_stages: int
    model: str
    max_inflight_inference: int
    incarnation: int
    profile_fingerprint: str
    sent_monotonic_s: float
    max_context_tokens: int
    kv_capacity_tokens: int
    max_batch: int
    prefix_cache_tokens: int
    epoch_steps: int
    max_prefill_tokens: int
    max_inflight_training: int
    weight_handling: str
    gradient_buffers: int
    training_schedule: str
    max_training_parts: int
    keeps_checkpoints: bool
    checkpoints: _containers.RepeatedCompositeFieldContainer[_types_pb2.Checkpoint]
    restore_note: str
    max_batch_tokens: int
    kv_block_tokens: int
    projections: _containers.RepeatedScalarFieldContainer[str]
    adapters: _containers.RepeatedCompositeFieldContainer[HeldAdapter]
    weights_changed: bool
    weights_age_s: float
    def __init__(self, node_id: _Optional[str] = ..., address: _Optional[str] = ..., num_stages: _Optional[int] = ..., model: _Optional[str] = ..., max_inflight_inference: _Optional[int] = ..., incarnation: _Optional[int] = ..., profile_fingerprint: _Optional[str] = ..., sent_monotonic_s: _Optional[float] = ..., max_context_tokens: _Optional[int] = ..., kv_capacity_tokens: _Optional[int] = ..., max_batch: _Optional[int] = ..., prefix_cache_tokens: _Optional[int] = ..., epoch_steps: _Optional[int] = ..., max_prefill_tokens: _Optional[int] = ..., max_inflight_training: _Optional[int] = ..., weight_handling: _Optional[str] = ..., gradient_buffers: _Optional[int] = ..., training_schedule: _Optional[str] = ..., max_training_parts: _Optional[int] = ..., keeps_checkpoints: _Optional[bool] = ..., checkpoints: _Optional[_Iterable[_Union[_types_pb2.Checkpoint, _Mapping]]] = ..., restore_note: _Optional[str] = ..., max_batch_tokens: _Optional[int] = ..., kv_block_tokens: _Optional[int] = ..., projections: _Optional[_Iterable[str]] = ..., adapters: _Optional[_Iterable[_Union[HeldAdapter, _Mapping]]] = ..., weights_changed: _Optional[bool] = ..., weights_age_s: _Optional[float] = ...) -> None: ...

class HeldAdapter(_message.Message):
    __slots__ = ("adapter_id", "lora", "isolated")
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    ISOLATED_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    lora: _types_pb2.Lora
    isolated: bool
    def __init__(self, adapter_id: _Optional[str] = ..., lora: _Optional[_Union[_types_pb2.Lora, _Mapping]] = ..., isolated: _Optional[bool] = ...) -> None: ...

class NodeHeartbeat(_message.Message):
    __slots__ = ("sent_monotonic_s", "weight_step", "kv_used_tokens", "draining", "weights_age_s", "adapters", "weights_changed")
    SENT_MONOTONIC_S_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_STEP_FIELD_NUMBER: _ClassVar[int]
    KV_USED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_AGE_S_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_CHANGED_FIELD_NUMBER: _ClassVar[int]
    sent_monotonic_s: float
    weight_step: int
    kv_used_tokens: int
    draining: bool
    weights_age_s: float
    adapters: _containers.RepeatedCompositeFieldContainer[HeldAdapter]
    weights_changed: bool
    def __init__(self, sent_monotonic_s: _Optional[float] = ..., weight_step: _Optional[int] = ..., kv_used_tokens: _Optional[int] = ..., draining: _Optional[bool] = ..., weights_age_s: _Optional[float] = ..., adapters: _Optional[_Iterable[_Union[HeldAdapter, _Mapping]]] = ..., weights_changed: _Optional[bool] = ...) -> None: ...

class OpTrace(_message.Message):
    __slots__ = ("stage", "op", "begin_monotonic_s", "duration_s", "task_ids", "num_tokens", "weight_step", "first_token", "context_tokens", "part", "parts", "partials", "decodes", "decode_context_tokens", "isolated", "job_id")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    BEGIN_MONOTONIC_S_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    TASK_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_STEP_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    PARTIALS_FIELD_NUMBER: _ClassVar[int]
    DECODES_FIELD_NUMBER: _ClassVar[int]
    DECODE_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ISOLATED_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    stage: int
    op: _profile_pb2.OpKind
    begin_monotonic_s: float
    duration_s: float
    task_ids: _containers.RepeatedScalarFieldContainer[str]
    num_tokens: int
    weight_step: int
    first_token: bool
    context_tokens: int
    part: int
    parts: int
    partials: int
    decodes: int
    decode_context_tokens: int
    isolated: bool
    job_id: str
    def __init__(self, stage: _Optional[int] = ..., op: _Optional[_Union[_profile_pb2.OpKind, str]] = ..., begin_monotonic_s: _Optional[float] = ..., duration_s: _Optional[float] = ..., task_ids: _Optional[_Iterable[str]] = ..., num_tokens: _Optional[int] = ..., weight_step: _Optional[int] = ..., first_token: _Optional[bool] = ..., context_tokens: _Optional[int] = ..., part: _Optional[int] = ..., parts: _Optional[int] = ..., partials: _Optional[int] = ..., decodes: _Optional[int] = ..., decode_context_tokens: _Optional[int] = ..., isolated: _Optional[bool] = ..., job_id: _Optional[str] = ...) -> None: ...

class TraceBatch(_message.Message):
    __slots__ = ("ops",)
    OPS_FIELD_NUMBER: _ClassVar[int]
    ops: _containers.RepeatedCompositeFieldContainer[OpTrace]
    def __init__(self, ops: _Optional[_Iterable[_Union[OpTrace, _Mapping]]] = ...) -> None: ...

class SyncFinished(_message.Message):
    __slots__ = ("sync_id", "weight_step", "error", "snapshot_only")
    SYNC_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_STEP_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_ONLY_FIELD_NUMBER: _ClassVar[int]
    sync_id: str
    weight_step: int
    error: _errors_pb2.ErrorDetail
    snapshot_only: bool
    def __init__(self, sync_id: _Optional[str] = ..., weight_step: _Optional[int] = ..., error: _Optional[_Union[_errors_pb2.ErrorDetail, _Mapping]] = ..., snapshot_only: _Optional[bool] = ...) -> None: ...

class CheckpointReport(_message.Message):
    __slots__ = ("request_id", "checkpoint", "error", "held", "path", "version")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    checkpoint: _types_pb2.Checkpoint
    error: _errors_pb2.ErrorDetail
    held: _containers.RepeatedCompositeFieldContainer[_types_pb2.Checkpoint]
    path: str
    version: _types_pb2.WeightVersion
    def __init__(self, request_id: _Optional[str] = ..., checkpoint: _Optional[_Union[_types_pb2.Checkpoint, _Mapping]] = ..., error: _Optional[_Union[_errors_pb2.ErrorDetail, _Mapping]] = ..., held: _Optional[_Iterable[_Union[_types_pb2.Checkpoint, _Mapping]]] = ..., path: _Optional[str] = ..., version: _Optional[_Union[_types_pb2.WeightVersion, _Mapping]] = ...) -> None: ...

class EvaluationReport(_message.Message):
    __slots__ = ("request_id", "loss", "label_tokens", "error")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LABEL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    loss: float
    label_tokens: int
    error: _errors_pb2.ErrorDetail
    def __init__(self, request_id: _Optional[str] = ..., loss: _Optional[float] = ..., label_tokens: _Optional[int] = ..., error: _Optional[_Union[_errors_pb2.ErrorDetail, _Mapping]] = ...) -> None: ...

class NodeSessionResponse(_message.Message):
    __slots__ = ("welcome", "cancel", "take_snapshot", "apply_weights", "checkpoint", "evaluate", "forget_adapter")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    TAKE_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    APPLY_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    FORGET_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    welcome: NodeWelcome
    cancel: CancelWork
    take_snapshot: TakeSnapshot
    apply_weights: ApplyWeights
    checkpoint: CheckpointCommand
    evaluate: EvaluateCommand
    forget_adapter: ForgetAdapter
    def __init__(self, welcome: _Optional[_Union[NodeWelcome, _Mapping]] = ..., cancel: _Optional[_Union[CancelWork, _Mapping]] = ..., take_snapshot: _Optional[_Union[TakeSnapshot, _Mapping]] = ..., apply_weights: _Optional[_Union[ApplyWeights, _Mapping]] = ..., checkpoint: _Optional[_Union[CheckpointCommand, _Mapping]] = ..., evaluate: _Optional[_Union[EvaluateCommand, _Mapping]] = ..., forget_adapter: _Optional[_Union[ForgetAdapter, _Mapping]] = ...) -> None: ...

class EvaluateCommand(_message.Message):
    __slots__ = ("request_id", "examples", "adapter_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    examples: _containers.RepeatedCompositeFieldContainer[_work_pb2.TrainingExample]
    adapter_id: str
    def __init__(self, request_id: _Optional[str] = ..., examples: _Optional[_Iterable[_Union[_work_pb2.TrainingExample, _Mapping]]] = ..., adapter_id: _Optional[str] = ...) -> None: ...

class KeepCheckpoint(_message.Message):
    __slots__ = ("job_id", "checkpoint_id")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    checkpoint_id: str
    def __init__(self, job_id: _Optional[str] = ..., checkpoint_id: _Optional[str] = ...) -> None: ...

class CheckpointCommand(_message.Message):
    __slots__ = ("request_id", "save", "restore", "export", "keep", "export_job_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SAVE_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    EXPORT_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    EXPORT_JOB_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    save: str
    restore: str
    export: str
    keep: KeepCheckpoint
    export_job_id: str
    def __init__(self, request_id: _Optional[str] = ..., save: _Optional[str] = ..., restore: _Optional[str] = ..., export: _Optional[str] = ..., keep: _Optional[_Union[KeepCheckpoint, _Mapping]] = ..., export_job_id: _Optional[str] = ...) -> None: ...

class NodeWelcome(_message.Message):
    __slots__ = ("fencing_token", "queue_order", "lease_s", "default_slo")
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    QUEUE_ORDER_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SLO_FIELD_NUMBER: _ClassVar[int]
    fencing_token: int
    queue_order: str
    lease_s: float
    default_slo: _types_pb2.Slo
    def __init__(self, fencing_token: _Optional[int] = ..., queue_order: _Optional[str] = ..., lease_s: _Optional[float] = ..., default_slo: _Optional[_Union[_types_pb2.Slo, _Mapping]] = ...) -> None: ...

class CancelWork(_message.Message):
    __slots__ = ("task_id",)
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    def __init__(self, task_id: _Optional[str] = ...) -> None: ...

class ForgetAdapter(_message.Message):
    __slots__ = ("adapter_id",)
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    adapter_id: str
    def __init__(self, adapter_id: _Optional[str] = ...) -> None: ...

class TakeSnapshot(_message.Message):
    __slots__ = ("sync_id", "skip_weights", "adapters")
    SYNC_ID_FIELD_NUMBER: _ClassVar[int]
    SKIP_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    sync_id: str
    skip_weights: bool
    adapters: _containers.RepeatedCompositeFieldContainer[HeldAdapter]
    def __init__(self, sync_id: _Optional[str] = ..., skip_weights: _Optional[bool] = ..., adapters: _Optional[_Iterable[_Union[HeldAdapter, _Mapping]]] = ...) -> None: ...

class ApplyWeights(_message.Message):
    __slots__ = ("sync_id", "mode", "source_addresses", "skip_weights", "adapters")
    SYNC_ID_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    SKIP_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    sync_id: str
    mode: SyncMode
    source_addresses: _containers.RepeatedScalarFieldContainer[str]
    skip_weights: bool
    adapters: _containers.RepeatedCompositeFieldContainer[ApplyAdapter]
    def __init__(self, sync_id: _Optional[str] = ..., mode: _Optional[_Union[SyncMode, str]] = ..., source_addresses: _Optional[_Iterable[str]] = ..., skip_weights: _Optional[bool] = ..., adapters: _Optional[_Iterable[_Union[ApplyAdapter, _Mapping]]] = ...) -> None: ...

class ApplyAdapter(_message.Message):
    __slots__ = ("adapter", "mode", "source_addresses")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    adapter: HeldAdapter
    mode: SyncMode
    source_addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, adapter: _Optional[_Union[HeldAdapter, _Mapping]] = ..., mode: _Optional[_Union[SyncMode, str]] = ..., source_addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class StoreFileRequest(_message.Message):
    __slots__ = ("file", "examples")
    FILE_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    file: _work_pb2.FileRecord
    examples: _containers.RepeatedCompositeFieldContainer[_work_pb2.TrainingExample]
    def __init__(self, file: _Optional[_Union[_work_pb2.FileRecord, _Mapping]] = ..., examples: _Optional[_Iterable[_Union[_work_pb2.TrainingExample, _Mapping]]] = ...) -> None: ...

class StoreFileResponse(_message.Message):
    __slots__ = ("file",)
    FILE_FIELD_NUMBER: _ClassVar[int]
    file: _work_pb2.FileRecord
    def __init__(self, file: _Optional[_Union[_work_pb2.FileRecord, _Mapping]] = ...) -> None: ...

class GetFileRequest(_message.Message):
    __slots__ = ("file_id",)
    FILE_ID_FIELD_NUMBER: _ClassVar[int]
    file_id: str
    def __init__(self, file_id: _Optional[str] = ...) -> None: ...

class GetFileResponse(_message.Message):
    __slots__ = ("file",)
    FILE_FIELD_NUMBER: _ClassVar[int]
    file: _work_pb2.FileRecord
    def __init__(self, file: _Optional[_Union[_work_pb2.FileRecord, _Mapping]] = ...) -> None: ...

class CreateJobRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: _training_service_pb2.CreateJobRequest
    def __init__(self, request: _Optional[_Union[_training_service_pb2.CreateJobRequest, _Mapping]] = ...) -> None: ...

class CreateJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: _types_pb2.TrainingJob
    def __init__(self, job: _Optional[_Union[_types_pb2.TrainingJob, _Mapping]] = ...) -> None: ...

class GetJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class GetJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: _types_pb2.TrainingJob
    def __init__(self, job: _Optional[_Union[_types_pb2.TrainingJob, _Mapping]] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs",)
    JOBS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.TrainingJob]
    def __init__(self, jobs: _Optional[_Iterable[_Union[_types_pb2.TrainingJob, _Mapping]]] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class CancelJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: _types_pb2.TrainingJob
    def __init__(self, job: _Optional[_Union[_types_pb2.TrainingJob, _Mapping]] = ...) -> None: ...

class PauseJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class PauseJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: _types_pb2.TrainingJob
    def __init__(self, job: _Optional[_Union[_types_pb2.TrainingJob, _Mapping]] = ...) -> None: ...

class ResumeJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class ResumeJobResponse(_message.Message):
    __slots__ = ("job",)
    JOB_FIELD_NUMBER: _ClassVar[int]
    job: _types_pb2.TrainingJob
    def __init__(self, job: _Optional[_Union[_types_pb2.TrainingJob, _Mapping]] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("job_id", "after_sequence", "existing_only")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EXISTING_ONLY_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    after_sequence: int
    existing_only: bool
    def __init__(self, job_id: _Optional[str] = ..., after_sequence: _Optional[int] = ..., existing_only: _Optional[bool] = ...) -> None: ...

class WatchJobResponse(_message.Message):
    __slots__ = ("event", "job")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    event: _types_pb2.JobEvent
    job: _types_pb2.TrainingJob
    def __init__(self, event: _Optional[_Union[_types_pb2.JobEvent, _Mapping]] = ..., job: _Optional[_Union[_types_pb2.TrainingJob, _Mapping]] = ...) -> None: ...

class SubmitFeedbackRequest(_message.Message):
    __slots__ = ("example", "request_id", "model")
    EXAMPLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    example: _work_pb2.TrainingExample
    request_id: str
    model: str
    def __init__(self, example: _Optional[_Union[_work_pb2.TrainingExample, _Mapping]] = ..., request_id: _Optional[str] = ..., model: _Optional[str] = ...) -> None: ...

class SubmitFeedbackResponse(_message.Message):
    __slots__ = ("job_id", "sequence")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    sequence: int
    def __init__(self, job_id: _Optional[str] = ..., sequence: _Optional[int] = ...) -> None: ...

class DeleteModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class DeleteModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SaveCheckpointRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class SaveCheckpointResponse(_message.Message):
    __slots__ = ("checkpoints",)
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[_types_pb2.Checkpoint]
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[_types_pb2.Checkpoint, _Mapping]]] = ...) -> None: ...

class ListCheckpointsRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class ListCheckpointsResponse(_message.Message):
    __slots__ = ("checkpoints",)
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[_types_pb2.Checkpoint]
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[_types_pb2.Checkpoint, _Mapping]]] = ...) -> None: ...

class ExportCheckpointRequest(_message.Message):
    __slots__ = ("checkpoint_id", "job_id")
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    checkpoint_id: str
    job_id: str
    def __init__(self, checkpoint_id: _Optional[str] = ..., job_id: _Optional[str] = ...) -> None: ...

class ExportCheckpointResponse(_message.Message):
    __slots__ = ("node_id", "path")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    path: str
    def __init__(self, node_id: _Optional[str] = ..., path: _Optional[str] = ...) -> None: ...

class RestoreCheckpointRequest(_message.Message):
    __slots__ = ("checkpoint_id", "node_id")
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    checkpoint_id: str
    node_id: str
    def __init__(self, checkpoint_id: _Optional[str] = ..., node_id: _Optional[str] = ...) -> None: ...

class RestoreCheckpointResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: _types_pb2.WeightVersion
    def __init__(self, version: _Optional[_Union[_types_pb2.WeightVersion, _Mapping]] = ...) -> None: ...

class PublishCheckpointRequest(_message.Message):
    __slots__ = ("checkpoint_id", "node_ids", "force")
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_IDS_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    checkpoint_id: str
    node_ids: _containers.RepeatedScalarFieldContainer[str]
    force: bool
    def __init__(self, checkpoint_id: _Optional[str] = ..., node_ids: _Optional[_Iterable[str]] = ..., force: _Optional[bool] = ...) -> None: ...

class PublishCheckpointResponse(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[_types_pb2.WeightVersion]
    def __init__(self, versions: _Optional[_Iterable[_Union[_types_pb2.WeightVersion, _Mapping]]] = ...) -> None: ...

class GetClusterStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetClusterStateResponse(_message.Message):
    __slots__ = ("status", "adapters")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    status: _cluster_service_pb2.GetStatusResponse
    adapters: _containers.RepeatedCompositeFieldContainer[_cluster_service_pb2.Model]
    def __init__(self, status: _Optional[_Union[_cluster_service_pb2.GetStatusResponse, _Mapping]] = ..., adapters: _Optional[_Iterable[_Union[_cluster_service_pb2.Model, _Mapping]]] = ...) -> None: ...

class ExplainTaskRequest(_message.Message):
    __slots__ = ("task_id",)
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    def __init__(self, task_id: _Optional[str] = ...) -> None: ...

class ExplainTaskResponse(_message.Message):
    __slots__ = ("decisions", "waits", "now_monotonic_s")
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    NOW_MONOTONIC_S_FIELD_NUMBER: _ClassVar[int]
    decisions: _containers.RepeatedCompositeFieldContainer[Decision]
    waits: _containers.RepeatedCompositeFieldContainer[TaskWait]
    now_monotonic_s: float
    def __init__(self, decisions: _Optional[_Iterable[_Union[Decision, _Mapping]]] = ..., waits: _Optional[_Iterable[_Union[TaskWait, _Mapping]]] = ..., now_monotonic_s: _Optional[float] = ...) -> None: ...

class ListDecisionsRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class ListDecisionsResponse(_message.Message):
    __slots__ = ("decisions", "now_monotonic_s")
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    NOW_MONOTONIC_S_FIELD_NUMBER: _ClassVar[int]
    decisions: _containers.RepeatedCompositeFieldContainer[Decision]
    now_monotonic_s: float
    def __init__(self, decisions: _Optional[_Iterable[_Union[Decision, _Mapping]]] = ..., now_monotonic_s: _Optional[float] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("sequence", "at_monotonic_s", "policy", "task_id", "arrival_monotonic_s", "request", "microbatch", "node_id", "refusal", "candidates", "waits", "outcome", "response_meaning", "predicted_response_s", "actual_response_s")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    AT_MONOTONIC_S_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_MONOTONIC_S_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_MEANING_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_RESPONSE_S_FIELD_NUMBER: _ClassVar[int]
    ACTUAL_RESPONSE_S_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    at_monotonic_s: float
    policy: str
    task_id: str
    arrival_monotonic_s: float
    request: DecidedRequest
    microbatch: DecidedMicrobatch
    node_id: str
    refusal: str
    candidates: _containers.RepeatedCompositeFieldContainer[CandidateTerms]
    waits: _containers.RepeatedCompositeFieldContainer[TaskWait]
    outcome: DecisionOutcome
    response_meaning: ResponseMeaning
    predicted_response_s: float
    actual_response_s: float
    def __init__(self, sequence: _Optional[int] = ..., at_monotonic_s: _Optional[float] = ..., policy: _Optional[str] = ..., task_id: _Optional[str] = ..., arrival_monotonic_s: _Optional[float] = ..., request: _Optional[_Union[DecidedRequest, _Mapping]] = ..., microbatch: _Optional[_Union[DecidedMicrobatch, _Mapping]] = ..., node_id: _Optional[str] = ..., refusal: _Optional[str] = ..., candidates: _Optional[_Iterable[_Union[CandidateTerms, _Mapping]]] = ..., waits: _Optional[_Iterable[_Union[TaskWait, _Mapping]]] = ..., outcome: _Optional[_Union[DecisionOutcome, _Mapping]] = ..., response_meaning: _Optional[_Union[ResponseMeaning, str]] = ..., predicted_response_s: _Optional[float] = ..., actual_response_s: _Optional[float] = ...) -> None: ...

class DecidedRequest(_message.Message):
    __slots__ = ("prompt_tokens", "max_tokens", "session_id")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    max_tokens: int
    session_id: str
    def __init__(self, prompt_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., session_id: _Optional[str] = ...) -> None: ...

class DecidedMicrobatch(_message.Message):
    __slots__ = ("job_id", "batch", "length", "parts")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    batch: int
    length: int
    parts: int
    def __init__(self, job_id: _Optional[str] = ..., batch: _Optional[int] = ..., length: _Optional[int] = ..., parts: _Optional[int] = ...) -> None: ...

class CandidateTerms(_message.Message):
    __slots__ = ("node_id", "idleness_s", "response_s", "idleness_profit_s", "length_consistency", "score", "kv_share", "cached_tokens")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    IDLENESS_S_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_S_FIELD_NUMBER: _ClassVar[int]
    IDLENESS_PROFIT_S_FIELD_NUMBER: _ClassVar[int]
    LENGTH_CONSISTENCY_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    KV_SHARE_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    idleness_s: float
    response_s: float
    idleness_profit_s: float
    length_consistency: float
    score: float
    kv_share: float
    cached_tokens: int
    def __init__(self, node_id: _Optional[str] = ..., idleness_s: _Optional[float] = ..., response_s: _Optional[float] = ..., idleness_profit_s: _Optional[float] = ..., length_consistency: _Optional[float] = ..., score: _Optional[float] = ..., kv_share: _Optional[float] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class TaskWait(_message.Message):
    __slots__ = ("reason", "since_monotonic_s")
    REASON_FIELD_NUMBER: _ClassVar[int]
    SINCE_MONOTONIC_S_FIELD_NUMBER: _ClassVar[int]
    reason: str
    since_monotonic_s: float
    def __init__(self, reason: _Optional[str] = ..., since_monotonic_s: _Optional[float] = ...) -> None: ...

class DecisionOutcome(_message.Message):
    __slots__ = ("fate", "first_op_monotonic_s", "first_token_monotonic_s", "forward_end_monotonic_s", "ended_monotonic_s", "output_tokens")
    FATE_FIELD_NUMBER: _ClassVar[int]
    FIRST_OP_MONOTONIC_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_MONOTONIC_S_FIELD_NUMBER: _ClassVar[int]
    FORWARD_END_MONOTONIC_S_FIELD_NUMBER: _ClassVar[int]
    ENDED_MONOTONIC_S_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    fate: DecisionFate
    first_op_monotonic_s: float
    first_token_monotonic_s: float
    forward_end_monotonic_s: float
    ended_monotonic_s: float
    output_tokens: int
    def __init__(self, fate: _Optional[_Union[DecisionFate, str]] = ..., first_op_monotonic_s: _Optional[float] = ..., first_token_monotonic_s: _Optional[float] = ..., forward_end_monotonic_s: _Optional[float] = ..., ended_monotonic_s: _Optional[float] = ..., output_tokens: _Optional[int] = ...) -> None: ...
