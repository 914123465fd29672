"""Why a benchmark on a live cluster cannot go on."""


class LiveError(RuntimeError):
    """The benchmark cannot go on for a reason its user can mend or must know; one line, no traceback."""
