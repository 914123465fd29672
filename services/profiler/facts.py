"""What a profile is: the facts that the command line and the page tell of it."""

from collections.abc import Iterator
from datetime import UTC, datetime

from lemix.internal.v1 import profile_pb2

_MEASURED = "measured"


def is_measured(profile: profile_pb2.Profile) -> bool:
    """Whether it was timed on a node; else it was derived from published figures."""
    return profile.source in ("", _MEASURED)


def facts_of(profile: profile_pb2.Profile) -> Iterator[tuple[str, str]]:
    """Name and value. What a derived profile has no value of is left out."""
    yield "profile", profile.profile_id
    yield "content hash", profile.content_hash
    if is_measured(profile):
        yield _MEASURED, date_text(profile.created_unix_s)
    else:
        yield "derived", f"{date_text(profile.created_unix_s)} from {profile.source.removeprefix('derived from ')}"
    if profile.node_id:
        yield "node", profile.node_id
    yield "model", _listed(profile.model, counted(profile.num_stages, "stage"), profile.dtype)
    threads = profile.threads_per_stage
    yield "device", _listed(profile.device, f"{counted(threads, 'thread')} per stage" if threads else "")
    yield "engine", profile.engine
    yield "incomplete", profile.incomplete_reason or "no"


def counted(number: int, thing: str) -> str:
    """A number of things."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def date_text(unix_s: float) -> str:
    """Date and time, UTC."""
    return datetime.fromtimestamp(unix_s, tz=UTC).strftime("%Y-%m-%d %H:%M")


def _listed(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
