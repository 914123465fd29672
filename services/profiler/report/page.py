"""The page of one profile: a single file without any outside resource."""

from collections.abc import Sequence
from statistics import median

from lemix.internal.v1 import profile_pb2
from services.charts.page import document, facts, notice, table, tile
from services.charts.svg import number, text
from services.latency import MOVES, NodeLatency, OpKind
from services.profile_messages import KIND_OF_PROTO, latency_from_profile
from services.profiler.facts import facts_of, is_measured
from services.profiler.report import charts
from services.profiler.report.forms import choice, passed_over

_MS = 1000.0
#: An error beyond this is told as "more than".
_MOST_ERROR = 10.0


def report(profile: profile_pb2.Profile) -> str:
    """HTML of a profile. Raises ValueError for one that predicts nothing."""
    latency = latency_from_profile(profile)
    parts = [
        f"<h1>Profile {text(profile.profile_id)}</h1>",
        notice("Incomplete", [profile.incomplete_reason] if profile.incomplete_reason else []),
        _derivation(profile),
        facts(dict(facts_of(profile))),
        _tiles(profile),
        *_operations(profile),
        *_behind_and_mixed(profile, latency),
        *_interference(profile),
        *_host_links(profile),
        *_memory(profile),
        *_samples(profile),
    ]
    return document(f"Profile {profile.profile_id}", parts)


def _seen(profile: profile_pb2.Profile) -> str:
    """What the durations of the profile are."""
    return "measured" if is_measured(profile) else "derived"


def _derivation(profile: profile_pb2.Profile) -> str:
    """Where a profile comes from that nobody measured; nothing for one that was."""
    if is_measured(profile):
        return ""
    return (
        f'<div class="warn"><b>Derived from published tables, not measured.</b> Source: '
        f"{text(profile.source)}. Nothing ran on the device that it names.</div>"
    )


def _tiles(profile: profile_pb2.Profile) -> str:
    seen = _seen(profile)
    chosen = [fit for fit in profile.fits if fit.chosen and not _is_given(fit, seen)]
    durations = sum(len(item.durations_s) for item in profile.measurements)
    outliers = sum(item.outliers for item in profile.measurements)
    tiles = []
    if chosen:
        worst = max(chosen, key=lambda fit: fit.mape)
        mean = sum(fit.mape for fit in chosen) / len(chosen)
        tiles += [
            tile(_percent(mean), "mean held-out error of the chosen forms", ""),
            tile(_percent(worst.mape), f"largest of them: {_kind(worst.op)}, stage {worst.stage}", ""),
        ]
    tiles += [
        tile(
            str(len(profile.measurements)),
            f"points with {durations} {'repetitions' if seen == 'measured' else 'durations from the tables'}",
            "",
        ),
    ]
    if seen == "measured":
        tiles.append(tile(str(outliers), "repetitions left out as outliers", ""))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _operations(profile: profile_pb2.Profile) -> list[str]:
    """Every operation of every stage: durations, residuals of every form, and the forms."""
    seen = _seen(profile)
    drawn = "repetitions" if seen == "measured" else "all durations of the tables (smallest, median and largest)"
    parts = [
        "<h2>Operations alone</h2>",
        f"<p class='soft'>Dots are medians (left) and {drawn} (right); lines are predictions of the chosen form. "
        "Errors and the 90 % interval (band) are those of points that the fit did not see, the residuals drawn those "
        "of the final fits.</p>",
        choice(profile.fits),
    ]
    for op in sorted({fit.op for fit in profile.fits}):
        for stage in range(profile.num_stages):
            fits = [fit for fit in profile.fits if fit.op == op and fit.stage == stage]
            points = [
                item
                for item in profile.measurements
                if item.op == op and item.stage == stage and not (item.busy or item.decodes)
            ]
            if fits:
                parts += _operation(f"{_kind(op)}, stage {stage}", fits, points, seen)
    return parts


def _operation(
    name: str, fits: Sequence[profile_pb2.LatencyFit], points: Sequence[profile_pb2.Measurement], seen: str
) -> list[str]:
    parts = [f"<h3>{text(name)}</h3>"]
    plain = [point for point in points if not point.cached_tokens]
    chosen = next((fit for fit in fits if fit.chosen), fits[0])
    if len({point.length for point in plain}) > 1:
        drawn = charts.durations(plain, chosen, f"{name}: durations")
        beside = charts.residuals(points, fits, f"{name}: residuals", seen)
        parts.append(f'<div class="pair">{drawn}{beside}</div>')
    rows = [
        [
            f"<b>{text(fit.model)}</b>" if fit.chosen else text(fit.model),
            text(", ".join(f"{value:.3g}" for value in fit.coefficients) or _table_size(fit)),
            "-" if _is_given(fit, seen) else _percent(fit.mape),
            "-" if fit.model == "constant" else f"{fit.r2:.4f}",
            "-" if _is_given(fit, seen) else f"{_signed(fit.residual_p5)} to {_signed(fit.residual_p95)}",
        ]
        for fit in fits
    ]
    parts.append(table(("form", "coefficients, s", "held-out error", "R²", "90 % interval"), rows))
    return [*parts, passed_over(fits)]


def _is_given(fit: profile_pb2.LatencyFit, seen: str) -> bool:
    """Whether the form is one number that was computed: it has no error to speak of."""
    return fit.model == "constant" and seen == "derived"


def _table_size(fit: profile_pb2.LatencyFit) -> str:
    return f"{len(fit.table.batches)} batches x {len(fit.table.lengths)} lengths"


def _behind_and_mixed(profile: profile_pb2.Profile, latency: NodeLatency) -> list[str]:
    """Prefills behind cached tokens and with decoding requests: measured and predicted."""
    points = [item for item in profile.measurements if (item.cached_tokens or item.decodes) and not item.busy]
    if not points:
        return []
    rows = []
    for item in points:
        predicted_s = latency.op_s(item.stage, OpKind.PREFILL, item.batch, item.length, item.cached_tokens)
        if item.decodes:
            decode_s = latency.op_s(item.stage, OpKind.DECODE, item.decodes, item.decode_length)
            predicted_s = latency.mixed_s(item.stage, predicted_s, decode_s)
        measured_s = median(item.durations_s)
        error = _signed(measured_s / predicted_s - 1.0) if predicted_s > 0.0 else "-"
        decodes = f"{item.decodes} x {item.decode_length}" if item.decodes else "-"
        rows.append(
            [
                str(item.stage),
                f"{item.batch} x {item.length}",
                str(item.cached_tokens or "-"),
                decodes,
                _ms(measured_s),
                _ms(predicted_s),
                error,
            ]
        )
    seen = _seen(profile)
    head = (
        "stage",
        "prefill, sequences x tokens",
        "cached, tokens",
        "decodes, sequences x context",
        f"{seen}, ms",
        "predicted, ms",
        f"{seen} / predicted - 1",
    )
    return [
        "<h2>Prefills behind cached tokens, and with decodes</h2>",
        "<p class='soft'>One step that prefills sequences x tokens, either behind tokens of each sequence that are in "
        "the KV cache already, or while it decodes sequences x tokens of context, too.</p>",
        table(head, rows),
    ]


def _interference(profile: profile_pb2.Profile) -> list[str]:
    heading = "<h2>Interference</h2>"
    if not profile.interference:
        return [heading, "<p class='soft'>Not measured: an operation is taken to last as long beside busy stages.</p>"]
    rows = [
        [_kind(item.op), str(item.stage), _kind(item.busy), _signed(item.slowdown), _percent(item.std)]
        for item in profile.interference
    ]
    head = ("operation", "stage", "other stages run", "takes longer by", "standard deviation")
    return [heading, table(head, rows, words=(0, 2))]


def _host_links(profile: profile_pb2.Profile) -> list[str]:
    if not profile.host_links:
        return []
    rows = [
        [
            str(link.stage),
            number(link.offload_bytes_per_s / 1e9),
            number(link.reload_bytes_per_s / 1e9),
            _ms(link.fixed_s),
        ]
        for link in profile.host_links
    ]
    parts = ["<h2>Host link</h2>", table(("stage", "offload, GB/s", "reload, GB/s", "fixed, ms"), rows)]
    moves = [item for item in profile.measurements if KIND_OF_PROTO.get(item.op) in MOVES]
    rows = [
        [str(item.stage), _kind(item.op), number(item.num_bytes / 2**20), _ms(median(item.durations_s))]
        for item in moves
    ]
    return [*parts, table(("stage", "move", "MiB", f"{_seen(profile)}, ms"), rows, words=(0, 1))] if rows else parts


def _memory(profile: profile_pb2.Profile) -> list[str]:
    if not profile.memory:
        return []
    figures = [charts.peaks(points, item, f"stage {item.stage}: peak memory") for item, points in _peaks(profile)]
    rows = [
        [
            str(item.stage),
            number(item.weight_bytes / 2**20),
            number(item.fixed_bytes / 2**20) if item.fixed_bytes else "-",
            number(item.activation_bytes_per_token / 2**10) if item.fixed_bytes else "-",
            number(item.kv_bytes_per_token / 2**10),
            _percent(item.mape) if item.fixed_bytes and figures else "-",
        ]
        for item in profile.memory
    ]
    head = ("stage", "weights, MiB", "fixed, MiB", "activations, KiB/token", "KV cache, KiB/token", "error of the line")
    dots = "Dots are the largest memory of a stage while it trained." if figures else "Peak memory was not measured."
    parts = [
        "<h2>Memory</h2>",
        "<p class='soft'>M_peak, the most memory that a stage takes at any moment, = fixed (what it takes with nothing "
        f"in flight, weights included) + activations x tokens in flight + KV cache x tokens of context. {dots}</p>",
        table(head, rows),
    ]
    return [*parts, f'<div class="pair even">{"".join(figures)}</div>'] if figures else parts


def _peaks(
    profile: profile_pb2.Profile,
) -> list[tuple[profile_pb2.StageMemory, list[profile_pb2.Measurement]]]:
    """Fitted stages, each with its training points that tell a peak; without those that have none."""
    training = [
        point
        for point in profile.measurements
        if point.op == profile_pb2.OP_KIND_TRAIN_FORWARD and point.peak_bytes and not point.busy
    ]
    found = [(item, [point for point in training if point.stage == item.stage]) for item in profile.memory]
    return [(item, points) for item, points in found if points and item.fixed_bytes]


def _samples(profile: profile_pb2.Profile) -> list[str]:
    if not profile.HasField("loss"):
        return []
    rows = [
        [name, str(values.count), number(values.mean), number(values.std), number(values.p50), number(values.p99)]
        for name, values in (("loss, nats per token", profile.loss), ("length, tokens", profile.length))
    ]
    return ["<h2>Sample examples</h2>", table(("", "count", "mean", "std", "median", "p99"), rows)]


def _kind(op: profile_pb2.OpKind) -> str:
    kind = KIND_OF_PROTO.get(op)
    return kind.value.replace("_", " ") if kind is not None else f"operation {op}"


def _ms(seconds: float) -> str:
    return number(_MS * seconds)


def _percent(fraction: float) -> str:
    return f"{100.0 * fraction:.1f} %"


def _signed(fraction: float) -> str:
    if fraction > _MOST_ERROR:
        return f"&gt; {100.0 * _MOST_ERROR:+,.0f} %"
    return f"{100.0 * fraction:+.1f} %"
