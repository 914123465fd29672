"""When a call is tried again: the server was not there, nothing was received, repeating is safe."""

from lemix._calls import Call
from lemix.errors import ErrorCode, LemixError

MAX_TRIES = 4
_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 2.0


def pause_s(call: "Call[object]", error: LemixError, tries: int, remaining_s: float) -> float | None:
    """Seconds to wait before the next try; None: give up.

    tries: made so far. remaining_s: what is left of the caller's time.
    """
    if error.code is not ErrorCode.UNAVAILABLE or not call.idempotent or tries >= MAX_TRIES:
        return None
    pause = max(_FIRST_PAUSE_S * 2 ** (tries - 1), error.retry_after_s or 0)
    pause = min(pause, _MAX_PAUSE_S)
    return pause if pause < remaining_s else None
