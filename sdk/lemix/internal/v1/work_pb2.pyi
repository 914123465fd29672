from lemix.v1 import errors_pb2 as _errors_pb2
from lemix.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ResolvedSampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "seed", "ignore_eos", "min_tokens", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "stop")
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
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    ignore_eos: bool
    min_tokens: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    logprobs: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., ignore_eos: _Optional[bool] = ..., min_tokens: _Optional[int] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., logprobs: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("logprob", "top_token_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class InferenceWork(_message.Message):
    __slots__ = ("prompt_token_ids", "sampling", "slo", "session_id", "reference_token_ids", "gateway_id", "arrival_unix_s", "deadline_unix_s", "max_staleness_s", "queue_ttft_s", "choice_of", "adapter_id")
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SLO_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    MAX_STALENESS_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    CHOICE_OF_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: ResolvedSampling
    slo: _types_pb2.Slo
    session_id: str
    reference_token_ids: _containers.RepeatedScalarFieldContainer[int]
    gateway_id: str
    arrival_unix_s: float
    deadline_unix_s: float
    max_staleness_s: float
    queue_ttft_s: float
    choice_of: str
    adapter_id: str
    def __init__(self, prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[ResolvedSampling, _Mapping]] = ..., slo: _Optional[_Union[_types_pb2.Slo, _Mapping]] = ..., session_id: _Optional[str] = ..., reference_token_ids: _Optional[_Iterable[int]] = ..., gateway_id: _Optional[str] = ..., arrival_unix_s: _Optional[float] = ..., deadline_unix_s: _Optional[float] = ..., max_staleness_s: _Optional[float] = ..., queue_ttft_s: _Optional[float] = ..., choice_of: _Optional[str] = ..., adapter_id: _Optional[str] = ...) -> None: ...

class TrainingExample(_message.Message):
    __slots__ = ("token_ids", "num_context_tokens")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_context_tokens: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., num_context_tokens: _Optional[int] = ...) -> None: ...

class TrainingWork(_message.Message):
    __slots__ = ("job_id", "sequence", "examples", "hyperparameters", "total_steps", "last", "parts", "checkpoint", "lora", "isolated", "attempt")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    ISOLATED_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    sequence: int
    examples: _containers.RepeatedCompositeFieldContainer[TrainingExample]
    hyperparameters: _types_pb2.Hyperparameters
    total_steps: int
    last: bool
    parts: int
    checkpoint: _types_pb2.CheckpointPolicy
    lora: _types_pb2.Lora
    isolated: bool
    attempt: int
    def __init__(self, job_id: _Optional[str] = ..., sequence: _Optional[int] = ..., examples: _Optional[_Iterable[_Union[TrainingExample, _Mapping]]] = ..., hyperparameters: _Optional[_Union[_types_pb2.Hyperparameters, _Mapping]] = ..., total_steps: _Optional[int] = ..., last: _Optional[bool] = ..., parts: _Optional[int] = ..., checkpoint: _Optional[_Union[_types_pb2.CheckpointPolicy, _Mapping]] = ..., lora: _Optional[_Union[_types_pb2.Lora, _Mapping]] = ..., isolated: _Optional[bool] = ..., attempt: _Optional[int] = ...) -> None: ...

class WorkItem(_message.Message):
    __slots__ = ("task_id", "inference", "training", "fencing_token", "node_keeps_checkpoints")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    INFERENCE_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    FENCING_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NODE_KEEPS_CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    inference: InferenceWork
    training: TrainingWork
    fencing_token: int
    node_keeps_checkpoints: bool
    def __init__(self, task_id: _Optional[str] = ..., inference: _Optional[_Union[InferenceWork, _Mapping]] = ..., training: _Optional[_Union[TrainingWork, _Mapping]] = ..., fencing_token: _Optional[int] = ..., node_keeps_checkpoints: _Optional[bool] = ...) -> None: ...

class InferenceOutcome(_message.Message):
    __slots__ = ("finish_reason", "token_ids", "prompt_tokens", "report", "error", "node_ttft_s", "node_response_s", "logprobs")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    NODE_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    NODE_RESPONSE_S_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    finish_reason: _types_pb2.FinishReason
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_tokens: int
    report: _types_pb2.ServingReport
    error: _errors_pb2.ErrorDetail
    node_ttft_s: float
    node_response_s: float
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, finish_reason: _Optional[_Union[_types_pb2.FinishReason, str]] = ..., token_ids: _Optional[_Iterable[int]] = ..., prompt_tokens: _Optional[int] = ..., report: _Optional[_Union[_types_pb2.ServingReport, _Mapping]] = ..., error: _Optional[_Union[_errors_pb2.ErrorDetail, _Mapping]] = ..., node_ttft_s: _Optional[float] = ..., node_response_s: _Optional[float] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class TrainingOutcome(_message.Message):
    __slots__ = ("job_id", "sequence", "loss", "label_tokens", "weight_step", "error", "skipped", "fresh_optimizer")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LABEL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_STEP_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    FRESH_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    sequence: int
    loss: float
    label_tokens: int
    weight_step: int
    error: _errors_pb2.ErrorDetail
    skipped: bool
    fresh_optimizer: bool
    def __init__(self, job_id: _Optional[str] = ..., sequence: _Optional[int] = ..., loss: _Optional[float] = ..., label_tokens: _Optional[int] = ..., weight_step: _Optional[int] = ..., error: _Optional[_Union[_errors_pb2.ErrorDetail, _Mapping]] = ..., skipped: _Optional[bool] = ..., fresh_optimizer: _Optional[bool] = ...) -> None: ...

class WorkOutcome(_message.Message):
    __slots__ = ("task_id", "node_id", "inference", "training")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    INFERENCE_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    node_id: str
    inference: InferenceOutcome
    training: TrainingOutcome
    def __init__(self, task_id: _Optional[str] = ..., node_id: _Optional[str] = ..., inference: _Optional[_Union[InferenceOutcome, _Mapping]] = ..., training: _Optional[_Union[TrainingOutcome, _Mapping]] = ...) -> None: ...

class FileRecord(_message.Message):
    __slots__ = ("file_id", "filename", "size_bytes", "num_examples", "created_unix_s", "max_tokens", "num_skipped", "num_truncated")
    FILE_ID_FIELD_NUMBER: _ClassVar[int]
    FILENAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_SKIPPED_FIELD_NUMBER: _ClassVar[int]
    NUM_TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    file_id: str
    filename: str
    size_bytes: int
    num_examples: int
    created_unix_s: float
    max_tokens: int
    num_skipped: int
    num_truncated: int
    def __init__(self, file_id: _Optional[str] = ..., filename: _Optional[str] = ..., size_bytes: _Optional[int] = ..., num_examples: _Optional[int] = ..., created_unix_s: _Optional[float] = ..., max_tokens: _Optional[int] = ..., num_skipped: _Optional[int] = ..., num_truncated: _Optional[int] = ...) -> None: ...

class JobRecord(_message.Message):
    __slots__ = ("job", "next_sequence", "request_id", "heldout_losses", "bad_evaluations", "skipped_in_row", "attempt", "done_ahead")
    class HeldoutLossesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class BadEvaluationsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    JOB_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    HELDOUT_LOSSES_FIELD_NUMBER: _ClassVar[int]
    BAD_EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_IN_ROW_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DONE_AHEAD_FIELD_NUMBER: _ClassVar[int]
    job: _types_pb2.TrainingJob
    next_sequence: int
    request_id: str
    heldout_losses: _containers.ScalarMap[str, float]
    bad_evaluations: _containers.ScalarMap[str, int]
    skipped_in_row: int
    attempt: int
    done_ahead: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, job: _Optional[_Union[_types_pb2.TrainingJob, _Mapping]] = ..., next_sequence: _Optional[int] = ..., request_id: _Optional[str] = ..., heldout_losses: _Optional[_Mapping[str, float]] = ..., bad_evaluations: _Optional[_Mapping[str, int]] = ..., skipped_in_row: _Optional[int] = ..., attempt: _Optional[int] = ..., done_ahead: _Optional[_Iterable[int]] = ...) -> None: ...
