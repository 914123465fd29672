"""What callers are told who may come again."""

from lemix.errors import ErrorCode, LemixError

#: About what it takes until something has changed, such as the ledger being tried again.
_RETRY_AFTER_S = 1.0


def overloaded(message: str) -> LemixError:
    """A bound is reached; what holds it up moves by itself."""
    return LemixError(ErrorCode.OVERLOADED, message, retry_after_s=_RETRY_AFTER_S)


def unavailable(message: str) -> LemixError:
    """The scheduler, or what it needs for this call, is away for now."""
    return LemixError(ErrorCode.UNAVAILABLE, message, retry_after_s=_RETRY_AFTER_S)
