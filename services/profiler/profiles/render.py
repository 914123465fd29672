"""Profiles as text for a terminal."""

from collections.abc import Iterator, Sequence

from lemix.internal.v1 import profile_pb2
from lemix.internal.v1 import profiler_service_pb2 as profiler_pb2
from services.profiler.facts import counted, date_text, facts_of

#: Latency form -> units of its coefficients, as `services.latency.FORMS` has its features.
UNITS = {
    "quadratic": ("s per token^2",),
    "affine": ("s", "s per token"),
    "full": ("s", "s per token", "s per token^2"),
    "full_decode": ("s", "s per sequence", "s per token"),
    "constant": ("s",),
}


def listing(listed: profiler_pb2.ListProfilesResponse) -> Iterator[str]:
    """A row per profile, newest first."""
    head = ("profile", "date", "model", "stages", "engine", "device", "held-out error", "")
    rows = [
        (
            item.profile_id,
            date_text(item.created_unix_s),
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
    yield from columns(list(facts_of(profile)))
    yield ""
    head = ("operation", "stage", "form", "held-out error", "90 % interval", "coefficients")
    rows = [
        (
            kind(fit.op),
            str(fit.stage),
            fit.model,
            f"{fit.mape:.1%}",
            f"{fit.residual_p5:+.1%} to {fit.residual_p95:+.1%}",
            _coefficients(fit),
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
        samples = counted(profile.loss.count, "sample")
        yield f"{samples}: loss {profile.loss.mean:.3f}, length {profile.length.mean:.1f} on average"
    for memory in profile.memory:
        yield (
            f"memory of stage {memory.stage}: {memory.fixed_bytes / 2**20:.0f} MiB fixed, "
            f"{memory.activation_bytes_per_token / 2**10:.1f} KiB per token in flight, "
            f"{memory.kv_bytes_per_token / 2**10:.1f} KiB per token of context"
        )


def _coefficients(fit: profile_pb2.LatencyFit) -> str:
    """Each with its unit; of a table its size."""
    if fit.HasField("table"):
        return f"table of {counted(len(fit.table.durations_s), 'duration')}"
    units = UNITS.get(fit.model, ("",) * len(fit.coefficients))
    return ", ".join(f"{value:.3g} {unit}".rstrip() for value, unit in zip(fit.coefficients, units, strict=False))


def difference(found: profiler_pb2.DiffProfilesResponse) -> Iterator[str]:
    """A row per operation and stage: the predictions of the other over those of the base."""
    for note in found.notes:
        yield f"different {note}"
    head = ("operation", "stage", "forms", "held-out errors", "ratio: median", "smallest", "largest", "points")
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
