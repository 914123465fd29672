"""The one error family of LeMix, the same on the server, on the wire and in the client.

Over gRPC an error is a status plus an `lemix.v1.ErrorDetail` in the trailing metadata key `lemix-error-bin`. Only the
gateway turns it into HTTP.
"""

from enum import Enum

import grpc

from lemix.v1 import errors_pb2

__all__ = ["METADATA_KEY", "ErrorCode", "LemixError"]

METADATA_KEY = "lemix-error-bin"


class ErrorCode(Enum):
    """Stable reasons; the value is the string sent to REST clients. See errors.proto for the meanings."""

    INVALID_REQUEST = "invalid_request"
    INVALID_JSON = "invalid_json"
    MODEL_NOT_FOUND = "model_not_found"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    INVALID_TRAINING_FILE = "invalid_training_file"
    NOT_FOUND = "not_found"
    OVERLOADED = "overloaded"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    NODE_LOST = "node_lost"
    UNAVAILABLE = "unavailable"
    RESOURCE_EXHAUSTED = "resource_exhausted"
    CONFLICT = "conflict"
    INTERNAL = "internal"
    UNSUPPORTED = "unsupported"
    STALE_WEIGHTS = "stale_weights"


_STATUS = {
    ErrorCode.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.INVALID_JSON: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.INVALID_TRAINING_FILE: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorCode.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorCode.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    ErrorCode.CANCELLED: grpc.StatusCode.CANCELLED,
    ErrorCode.NODE_LOST: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorCode.CONFLICT: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorCode.INTERNAL: grpc.StatusCode.INTERNAL,
    ErrorCode.UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
    ErrorCode.STALE_WEIGHTS: grpc.StatusCode.FAILED_PRECONDITION,
}

_FROM_STATUS = {
    grpc.StatusCode.DEADLINE_EXCEEDED: ErrorCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED: ErrorCode.CANCELLED,
    grpc.StatusCode.UNAVAILABLE: ErrorCode.UNAVAILABLE,
    grpc.StatusCode.UNIMPLEMENTED: ErrorCode.UNSUPPORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ErrorCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INVALID_ARGUMENT: ErrorCode.INVALID_REQUEST,
}


class LemixError(Exception):
    """A failure with a stable code.

    code: why. message: one sentence for a person. param: the request field at fault, if one is.
    retry_after_s: seconds after which a retry may succeed, if known.
    answered: a server sent this error; False when none was reached.
    """

    answered: bool = False

    def __init__(
        self, code: ErrorCode, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"[{self.code.value}] {self.message}"

    @property
    def status(self) -> grpc.StatusCode:
        """gRPC status of this code."""
        return _STATUS[self.code]

    def to_proto(self) -> errors_pb2.ErrorDetail:
        """The wire form."""
        detail = errors_pb2.ErrorDetail(code=f"ERROR_CODE_{self.code.name}", message=self.message)
        if self.param is not None:
            detail.param = self.param
        if self.retry_after_s is not None:
            detail.retry_after_s = self.retry_after_s
        return detail

    @classmethod
    def from_proto(cls, detail: errors_pb2.ErrorDetail) -> "LemixError":
        """The error a wire form stands for; an unknown code becomes INTERNAL."""
        try:
            code = ErrorCode[errors_pb2.ErrorCode.Name(detail.code).removeprefix("ERROR_CODE_")]
        except (ValueError, KeyError):
            code = ErrorCode.INTERNAL
        error = cls(
            code,
            detail.message,
            param=detail.param if detail.HasField("param") else None,
            retry_after_s=detail.retry_after_s if detail.HasField("retry_after_s") else None,
        )
        error.answered = True
        return error

    @classmethod
    def from_rpc(cls, error: grpc.RpcError) -> "LemixError":
        """The error behind a failed call; without our metadata, the nearest code of its status."""
        metadata = getattr(error, "trailing_metadata", lambda: None)() or ()
        for key, value in metadata:
            if key == METADATA_KEY:
                detail = errors_pb2.ErrorDetail.FromString(value if isinstance(value, bytes) else value.encode())
                return cls.from_proto(detail)
        status = getattr(error, "code", lambda: None)()
        details = getattr(error, "details", lambda: "")() or "the call failed"
        code = _FROM_STATUS.get(status, ErrorCode.INTERNAL) if status is not None else ErrorCode.INTERNAL
        return cls(code, details)
