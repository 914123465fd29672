from lemix.v1 import errors_pb2 as _errors_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]

class JobStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_STATUS_UNSPECIFIED: _ClassVar[JobStatus]
    JOB_STATUS_QUEUED: _ClassVar[JobStatus]
    JOB_STATUS_RUNNING: _ClassVar[JobStatus]
    JOB_STATUS_SUCCEEDED: _ClassVar[JobStatus]
    JOB_STATUS_FAILED: _ClassVar[JobStatus]
    JOB_STATUS_CANCELLED: _ClassVar[JobStatus]
    JOB_STATUS_PAUSED: _ClassVar[JobStatus]

class TrainingMethod(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRAINING_METHOD_UNSPECIFIED: _ClassVar[TrainingMethod]
    TRAINING_METHOD_FULL: _ClassVar[TrainingMethod]
    TRAINING_METHOD_LORA: _ClassVar[TrainingMethod]

class TrainingMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRAINING_MODE_UNSPECIFIED: _ClassVar[TrainingMode]
    TRAINING_MODE_ONLINE: _ClassVar[TrainingMode]
    TRAINING_MODE_ISOLATED: _ClassVar[TrainingMode]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_ERROR: FinishReason
JOB_STATUS_UNSPECIFIED: JobStatus
JOB_STATUS_QUEUED: JobStatus
JOB_STATUS_RUNNING: JobStatus
JOB_STATUS_SUCCEEDED: JobStatus
JOB_STATUS_FAILED: JobStatus
JOB_STATUS_CANCELLED: JobStatus
JOB_STATUS_PAUSED: JobStatus
TRAINING_METHOD_UNSPECIFIED: TrainingMethod
TRAINING_METHOD_FULL: TrainingMethod
TRAINING_METHOD_LORA: TrainingMethod
TRAINING_MODE_UNSPECIFIED: TrainingMode
TRAINING_MODE_ONLINE: TrainingMode
TRAINING_MODE_ISOLATED: TrainingMode

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class ChatPrompt(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class TokenPrompt(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "include_stop_str_in_output", "min_tokens", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "n")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_STOP_STR_IN_OUTPUT_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    ignore_eos: bool
    include_stop_str_in_output: bool
    min_tokens: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    logprobs: int
    n: int
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., ignore_eos: _Optional[bool] = ..., include_stop_str_in_output: _Optional[bool] = ..., min_tokens: _Optional[int] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., logprobs: _Optional[int] = ..., n: _Optional[int] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "token", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    token: str
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., token: _Optional[str] = ..., logprob: _Optional[float] = ...) -> None: ...

class OutputLogprob(_message.Message):
    __slots__ = ("chosen", "top")
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    chosen: TokenLogprob
    top: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, chosen: _Optional[_Union[TokenLogprob, _Mapping]] = ..., top: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class Slo(_message.Message):
    __slots__ = ("ttft_s", "tpot_s")
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    ttft_s: float
    tpot_s: float
    def __init__(self, ttft_s: _Optional[float] = ..., tpot_s: _Optional[float] = ...) -> None: ...

class WeightVersion(_message.Message):
    __slots__ = ("node_id", "incarnation", "step", "job_id")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    incarnation: int
    step: int
    job_id: str
    def __init__(self, node_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., step: _Optional[int] = ..., job_id: _Optional[str] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ...) -> None: ...

class ServingReport(_message.Message):
    __slots__ = ("weight_versions", "staleness_s", "node_id", "reference_loss")
    WEIGHT_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    STALENESS_S_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_LOSS_FIELD_NUMBER: _ClassVar[int]
    weight_versions: _containers.RepeatedCompositeFieldContainer[WeightVersion]
    staleness_s: float
    node_id: str
    reference_loss: float
    def __init__(self, weight_versions: _Optional[_Iterable[_Union[WeightVersion, _Mapping]]] = ..., staleness_s: _Optional[float] = ..., node_id: _Optional[str] = ..., reference_loss: _Optional[float] = ...) -> None: ...

class Hyperparameters(_message.Message):
    __slots__ = ("learning_rate", "num_epochs", "batch_size", "gradient_accumulation_steps", "lr_schedule", "warmup_steps", "weight_decay", "max_grad_norm", "max_skipped_in_row")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    NUM_EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_ACCUMULATION_STEPS_FIELD_NUMBER: _ClassVar[int]
    LR_SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    MAX_SKIPPED_IN_ROW_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    num_epochs: int
    batch_size: int
    gradient_accumulation_steps: int
    lr_schedule: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    max_skipped_in_row: int
    def __init__(self, learning_rate: _Optional[float] = ..., num_epochs: _Optional[int] = ..., batch_size: _Optional[int] = ..., gradient_accumulation_steps: _Optional[int] = ..., lr_schedule: _Optional[str] = ..., warmup_steps: _Optional[int] = ..., weight_decay: _Optional[float] = ..., max_grad_norm: _Optional[float] = ..., max_skipped_in_row: _Optional[int] = ...) -> None: ...

class Lora(_message.Message):
    __slots__ = ("rank", "alpha", "dropout", "target_modules")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    rank: int
    alpha: float
    dropout: float
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, rank: _Optional[int] = ..., alpha: _Optional[float] = ..., dropout: _Optional[float] = ..., target_modules: _Optional[_Iterable[str]] = ...) -> None: ...

class TrainingJob(_message.Message):
    __slots__ = ("job_id", "model", "training_file", "status", "created_unix_s", "finished_unix_s", "hyperparameters", "total_microbatches", "trained_microbatches", "trained_tokens", "last_loss", "steps_per_node", "error", "num_examples", "checkpoint", "method", "mode", "lora", "served_model", "unsaved_microbatches", "validation_file", "quality_gate", "heldout_loss", "best_heldout_loss", "best_checkpoint_id", "skipped_microbatches")
    class StepsPerNodeEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FILE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    FINISHED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    TRAINED_MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    TRAINED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LAST_LOSS_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_NODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    SERVED_MODEL_FIELD_NUMBER: _ClassVar[int]
    UNSAVED_MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_FILE_FIELD_NUMBER: _ClassVar[int]
    QUALITY_GATE_FIELD_NUMBER: _ClassVar[int]
    HELDOUT_LOSS_FIELD_NUMBER: _ClassVar[int]
    BEST_HELDOUT_LOSS_FIELD_NUMBER: _ClassVar[int]
    BEST_CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    model: str
    training_file: str
    status: JobStatus
    created_unix_s: float
    finished_unix_s: float
    hyperparameters: Hyperparameters
    total_microbatches: int
    trained_microbatches: int
    trained_tokens: int
    last_loss: float
    steps_per_node: _containers.ScalarMap[str, int]
    error: _errors_pb2.ErrorDetail
    num_examples: int
    checkpoint: CheckpointPolicy
    method: TrainingMethod
    mode: TrainingMode
    lora: Lora
    served_model: str
    unsaved_microbatches: int
    validation_file: str
    quality_gate: QualityGate
    heldout_loss: float
    best_heldout_loss: float
    best_checkpoint_id: str
    skipped_microbatches: int
    def __init__(self, job_id: _Optional[str] = ..., model: _Optional[str] = ..., training_file: _Optional[str] = ..., status: _Optional[_Union[JobStatus, str]] = ..., created_unix_s: _Optional[float] = ..., finished_unix_s: _Optional[float] = ..., hyperparameters: _Optional[_Union[Hyperparameters, _Mapping]] = ..., total_microbatches: _Optional[int] = ..., trained_microbatches: _Optional[int] = ..., trained_tokens: _Optional[int] = ..., last_loss: _Optional[float] = ..., steps_per_node: _Optional[_Mapping[str, int]] = ..., error: _Optional[_Union[_errors_pb2.ErrorDetail, _Mapping]] = ..., num_examples: _Optional[int] = ..., checkpoint: _Optional[_Union[CheckpointPolicy, _Mapping]] = ..., method: _Optional[_Union[TrainingMethod, str]] = ..., mode: _Optional[_Union[TrainingMode, str]] = ..., lora: _Optional[_Union[Lora, _Mapping]] = ..., served_model: _Optional[str] = ..., unsaved_microbatches: _Optional[int] = ..., validation_file: _Optional[str] = ..., quality_gate: _Optional[_Union[QualityGate, _Mapping]] = ..., heldout_loss: _Optional[float] = ..., best_heldout_loss: _Optional[float] = ..., best_checkpoint_id: _Optional[str] = ..., skipped_microbatches: _Optional[int] = ...) -> None: ...

class CheckpointPolicy(_message.Message):
    __slots__ = ("every_steps", "every_s")
    EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    EVERY_S_FIELD_NUMBER: _ClassVar[int]
    every_steps: int
    every_s: float
    def __init__(self, every_steps: _Optional[int] = ..., every_s: _Optional[float] = ...) -> None: ...

class QualityGate(_message.Message):
    __slots__ = ("tolerance", "max_bad_evaluations", "publish")
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    MAX_BAD_EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_FIELD_NUMBER: _ClassVar[int]
    tolerance: float
    max_bad_evaluations: int
    publish: bool
    def __init__(self, tolerance: _Optional[float] = ..., max_bad_evaluations: _Optional[int] = ..., publish: _Optional[bool] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("checkpoint_id", "node_id", "created_unix_s", "size_bytes", "trained_microbatches", "reason", "heldout_loss")
    class TrainedMicrobatchesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRAINED_MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    HELDOUT_LOSS_FIELD_NUMBER: _ClassVar[int]
    checkpoint_id: str
    node_id: str
    created_unix_s: float
    size_bytes: int
    trained_microbatches: _containers.ScalarMap[str, int]
    reason: str
    heldout_loss: float
    def __init__(self, checkpoint_id: _Optional[str] = ..., node_id: _Optional[str] = ..., created_unix_s: _Optional[float] = ..., size_bytes: _Optional[int] = ..., trained_microbatches: _Optional[_Mapping[str, int]] = ..., reason: _Optional[str] = ..., heldout_loss: _Optional[float] = ...) -> None: ...

class JobEvent(_message.Message):
    __slots__ = ("sequence", "created_unix_s", "level", "message", "loss", "trained_microbatches")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TRAINED_MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    created_unix_s: float
    level: str
    message: str
    loss: float
    trained_microbatches: int
    def __init__(self, sequence: _Optional[int] = ..., created_unix_s: _Optional[float] = ..., level: _Optional[str] = ..., message: _Optional[str] = ..., loss: _Optional[float] = ..., trained_microbatches: _Optional[int] = ...) -> None: ...
