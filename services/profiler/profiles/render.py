"""Profiles as text for a terminal."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from lemix.internal.v1 import profile_pb2
from lemix.internal.v1 import profiler_service_pb2 as profiler_pb2


def listing(listed: profiler_pb2.ListProfilesResponse) -> Iterator[str]:
    """A row per profile, newest first."""
    head = ("profile", "measured", "model", "stages", "engine", "device", "error", "")
    rows = [
        (
            item.profile_id,
            _date(item.created_unix_s),
            item.model,
            str(item.num_stages),
            item.engine,
            item.device,
            f"{item.mape:.1%}",
            f"incomplete: {item.incomplete_reason}" if item.incomplete_reason else "",
        )
        for item in listed.profiles
    ]
    yield from columns([head, *rows])
    for problem in listed.problems:
        yield f"cannot be used: {problem}"


def details(profile: profile_pb2.Profile) -> Iterator[str]:
    """What a profile is, and the chosen fit of every operation."""
    yield from columns(
        [
            ("profile", profile.profile_id),
            ("content hash", profile.content_hash or "none"),
            ("measured", _date(profile.created_unix_s)),
            ("node", profile.node_id or "none"),
            ("model", f"{profile.model}, {profile.num_stages} stages, {profile.dtype}"),
            ("device", f"{profile.device}, {profile.threads_per_stage} threads per stage"),
            ("engine", profile.engine),
            ("source", profile.source),
            ("incomplete", profile.incomplete_reason or "no"),
        ]
    )
    yield ""
    head = ("operation", "stage", "form", "error", "90 % interval", "coefficients, s")
    rows = [
        (
            kind(fit.op),
            str(fit.stage),
            fit.model,
            f"{fit.mape:.1%}",
            f"{fit.residual_p5:+.1%} to {fit.residual_p95:+.1%}",
            " ".join(f"{value:.3g}" for value in fit.coefficients),
        )
        for fit in sorted(profile.fits, key=lambda fit: (fit.op, fit.stage))
        if fit.chosen
    ]
    yield from columns([head, *rows])
    for item in profile.interference:
        yield f"{kind(item.op)} on stage {item.stage} beside {kind(item.busy)}: {item.slowdown:+.1%}"
    for link in profile.host_links:
        rates = f"{link.offload_bytes_per_s / 1e9:.2f} GB/s offload, {link.reload_bytes_per_s / 1e9:.2f} GB/s reload"
        yield f"host link of stage {link.stage}: {rates}"
    if profile.HasField("loss"):
        yield f"{profile.loss.count} samples: loss {profile.loss.mean:.3f}, length {profile.length.mean:.1f} on average"
    for memory in profile.memory:
        yield (
            f"memory of stage {memory.stage}: {memory.fixed_bytes / 2**20:.0f} MiB fixed, "
            f"{memory.activation_bytes_per_token / 2**10:.1f} KiB per token in flight, "
            f"{memory.kv_bytes_per_token / 2**10:.1f} KiB per token of context"
        )


def difference(found: profiler_pb2.DiffProfilesResponse) -> Iterator[str]:
    """A row per operation and stage: the predictions of the other over those of the base."""
    for note in found.notes:
        yield f"different {note}"
    head = ("operation", "stage", "forms", "errors", "ratio: median", "smallest", "largest", "points")
    rows = []
    for item in found.ops:
        forms = f"{_form(item, 'base')} and {_form(item, 'other')}"
        errors = f"{item.base.mape:.1%} and {item.other.mape:.1%}"
        ratios = [f"{ratio:.3f}" for ratio in (item.ratio_p50, item.ratio_min, item.ratio_max)]
        if not item.points:
            ratios = ["-"] * 3
        rows.append((kind(item.op), str(item.stage), forms, errors, *ratios, str(item.points)))
    yield from columns([head, *rows])


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows with their cells under each other."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def kind(op: profile_pb2.OpKind) -> str:
    """An operation as people write it."""
    return profile_pb2.OpKind.Name(op).removeprefix("OP_KIND_").lower()


def _form(item: profiler_pb2.OpDifference, side: str) -> str:
    fit = item.base if side == "base" else item.other
    return fit.model if item.HasField("base" if side == "base" else "other") else "none"


def _date(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, tz=UTC).strftime("%Y-%m-%d %H:%M")
