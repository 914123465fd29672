"""Range checks shared by REST and gRPC."""

import math
import re
from collections.abc import Mapping

from lemix.errors import ErrorCode, LemixError
from lemix.v1 import training_service_pb2, types_pb2
from services.gateway.types import Sampling

MAX_STOP_STRINGS = 4
MAX_CHOICES = 128
MAX_LOGPROBS = 20
_MAX_BIASED_TOKENS = 300
_MAX_STOP_CHARS = 256
_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_MAX_TARGET_MODULES = 32
_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


def invalid(message: str, param: str | None = None) -> LemixError:
    """An INVALID_REQUEST error."""
    return LemixError(ErrorCode.INVALID_REQUEST, message, param=param)


def is_id(value: str) -> bool:
    """Whether it is a well-formed, non-empty id."""
    return _ID.fullmatch(value) is not None


def check_id(value: str, param: str) -> None:
    """Raises INVALID_REQUEST unless empty or 1 to 128 letters, digits and `._:-`: ids travel in keys and headers."""
    if value and not is_id(value):
        raise invalid(f"{param} must be 1 to 128 letters, digits, '.', '_', ':' or '-'", param)


def check_sampling(sampling: Sampling) -> None:
    """Raises INVALID_REQUEST naming the parameter that is out of range."""
    if sampling.max_tokens is not None and sampling.max_tokens < 1:
        raise invalid(f"max_tokens must be at least 1, not {sampling.max_tokens}", "max_tokens")
    if sampling.max_tokens is not None and sampling.max_tokens >= 2**32:
        raise invalid("max_tokens is too large", "max_tokens")
    if not 0 <= sampling.temperature <= 2:
        raise invalid(f"temperature must be in [0, 2], not {sampling.temperature:g}", "temperature")
    if not 0 < sampling.top_p <= 1:
        raise invalid(f"top_p must be in (0, 1], not {sampling.top_p:g}", "top_p")
    if sampling.top_k is not None and not 1 <= sampling.top_k < 2**32:
        raise invalid(f"top_k must be at least 1, not {sampling.top_k}", "top_k")
    if sampling.seed is not None and not 0 <= sampling.seed < 2**64:
        raise invalid("seed must be in [0, 2^64)", "seed")
    if len(sampling.stop) > MAX_STOP_STRINGS:
        raise invalid(f"at most {MAX_STOP_STRINGS} stop strings, not {len(sampling.stop)}", "stop")
    if any(not 1 <= len(stop) <= _MAX_STOP_CHARS for stop in sampling.stop):
        raise invalid(f"a stop string has 1 to {_MAX_STOP_CHARS} characters", "stop")
    _check_influence(sampling)


def _check_influence(sampling: Sampling) -> None:
    if not 0 <= sampling.min_tokens < 2**32:
        raise invalid(f"min_tokens must be at least 0, not {sampling.min_tokens}", "min_tokens")
    for name in ("presence_penalty", "frequency_penalty"):
        if not -2 <= getattr(sampling, name) <= 2:
            raise invalid(f"{name} must be in [-2, 2], not {getattr(sampling, name):g}", name)
    _check_logit_bias(sampling.logit_bias)
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= MAX_LOGPROBS:
        raise invalid(f"at most {MAX_LOGPROBS} log-probabilities per token, not {sampling.logprobs}", "logprobs")


def _check_logit_bias(logit_bias: Mapping[int, float]) -> None:
    if len(logit_bias) > _MAX_BIASED_TOKENS:
        raise invalid(f"logit_bias has {len(logit_bias)} tokens, at most {_MAX_BIASED_TOKENS} are taken", "logit_bias")
    for token, bias in logit_bias.items():
        if not -100 <= bias <= 100:
            raise invalid(f"logit_bias of token {token} must be in [-100, 100], not {bias:g}", "logit_bias")


def check_choices(n: int) -> None:
    """Raises INVALID_REQUEST unless so many outputs may be asked for."""
    if not 1 <= n <= MAX_CHOICES:
        raise invalid(f"n must be in [1, {MAX_CHOICES}], not {n}", "n")


def check_staleness(max_staleness_s: float | None) -> None:
    """Raises INVALID_REQUEST unless absent or a positive, finite number of seconds."""
    if max_staleness_s is not None and not (max_staleness_s > 0 and math.isfinite(max_staleness_s)):
        raise invalid("max_staleness_s must be positive", "max_staleness_s")


def check_slo(ttft_s: float | None, tpot_s: float | None) -> None:
    """Raises INVALID_REQUEST unless each promise is absent or a positive, finite number of seconds."""
    for name, value in (("ttft", ttft_s), ("tpot", tpot_s)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise invalid(f"the {name} promise must be positive", f"slo.{name}")


def check_hyperparameters(values: types_pb2.Hyperparameters) -> None:
    """Raises INVALID_REQUEST naming the hyperparameter that is out of the range types.proto gives."""
    for name, low, high in (
        ("num_epochs", 1, 1000),
        ("batch_size", 1, 256),
        ("gradient_accumulation_steps", 1, 256),
        ("warmup_steps", 0, 2**31),
        ("max_skipped_in_row", 1, 1000),
    ):
        if values.HasField(name) and not low <= getattr(values, name) <= high:
            raise invalid(f"{name} must be in [{low}, {high}], not {getattr(values, name)}", f"hyperparameters.{name}")
    for name, positive in (("learning_rate", True), ("max_grad_norm", True), ("weight_decay", False)):
        value = getattr(values, name)
        if values.HasField(name) and not (math.isfinite(value) and (value > 0 or (not positive and value == 0))):
            bound = "positive" if positive else "at least 0"
            raise invalid(f"{name} must be {bound}, not {value:g}", f"hyperparameters.{name}")
    if values.HasField("lr_schedule") and values.lr_schedule not in _SCHEDULES:
        raise invalid(f"lr_schedule must be one of {', '.join(_SCHEDULES)}", "hyperparameters.lr_schedule")


def check_training(request: training_service_pb2.CreateJobRequest) -> None:
    """Raises INVALID_REQUEST for an adapter out of range, and for what no training is: an adapter with all parameters,
    all parameters for an own model."""
    is_lora = request.method == types_pb2.TRAINING_METHOD_LORA or (
        request.method == types_pb2.TRAINING_METHOD_UNSPECIFIED and request.HasField("lora")
    )
    if request.HasField("lora") and not is_lora:
        raise invalid("lora goes with method 'lora' only", "lora")
    if request.mode == types_pb2.TRAINING_MODE_ISOLATED and not is_lora:
        raise invalid("mode 'isolated' needs method 'lora': only an adapter leaves the model as it is", "mode")
    lora = request.lora
    if lora.HasField("rank") and not 1 <= lora.rank <= 256:
        raise invalid(f"rank must be in [1, 256], not {lora.rank}", "lora.rank")
    if lora.HasField("alpha") and not (math.isfinite(lora.alpha) and lora.alpha > 0):
        raise invalid(f"alpha must be positive, not {lora.alpha:g}", "lora.alpha")
    if not 0 <= lora.dropout < 1:
        raise invalid(f"dropout must be in [0, 1), not {lora.dropout:g}", "lora.dropout")
    if len(lora.target_modules) > _MAX_TARGET_MODULES:
        raise invalid(f"at most {_MAX_TARGET_MODULES} target modules", "lora.target_modules")
    if any(not is_id(name) for name in lora.target_modules):
        raise invalid("target modules are named by the last part of their names, such as q_proj", "lora.target_modules")
