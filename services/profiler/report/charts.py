"""Charts of one operation on one stage."""

from collections.abc import Mapping, Sequence
from statistics import median

from lemix.internal.v1 import profile_pb2
from services.charts.svg import Chart, Point, legend, text
from services.latency import LatencyModel
from services.profile_messages import model_from_fit

_WIDTH, _HEIGHT = 540, 300
_COLORS = ("#1f6fb5", "#d3622a", "#1b9e77", "#a05cc0", "#b58900", "#c2588f", "#17a2b8", "#7a8288")
FORM_COLORS = {
    "quadratic": "#d3622a",
    "affine": "#1b9e77",
    "full": "#1f6fb5",
    "full_decode": "#1f6fb5",
    "tabulated": "#a05cc0",
    "constant": "#1f6fb5",
}
_LINE_POINTS = 60
#: Residuals beyond this are triangles at the edge.
_MOST_RESIDUAL = 1.0


def durations(points: Sequence[profile_pb2.Measurement], fit: profile_pb2.LatencyFit, title: str) -> str:
    """Medians of the points alone, by batch, with what the chosen form predicts for them; x: tokens per sequence."""
    model = model_from_fit(fit)
    marks: dict[int, list[Point]] = {batch: [] for batch in sorted({point.batch for point in points})}
    for point in points:
        marks[point.batch].append((float(point.length), 1000.0 * median(point.durations_s)))
    lines = {
        batch: _line(model, batch, min(x for x, _ in here), max(x for x, _ in here)) for batch, here in marks.items()
    }
    top_ms = max(y for shapes in (marks, lines) for here in shapes.values() for _, y in here)
    longest = max(point.length for point in points)
    chart = Chart.plot(_WIDTH, _HEIGHT, (0.0, float(longest)), (0.0, 1.1 * top_ms))
    chart.axes("context, tokens per sequence" if fit.op == profile_pb2.OP_KIND_DECODE else "tokens per sequence", "ms")
    for index, batch in enumerate(marks):
        dash_px = _dash_px(index)
        chart.line(lines[batch], _color(index), dashed=dash_px > 0.0, dash_px=dash_px)
        chart.dots(marks[batch], _color(index))
    keys = [(f"batch {batch}", _key(index)) for index, batch in enumerate(marks)]
    return f'<div class="figure">{legend(keys)}{chart.render(title)}</div>'


def residuals(
    points: Sequence[profile_pb2.Measurement], fits: Sequence[profile_pb2.LatencyFit], title: str, seen: str
) -> str:
    """Every duration against what each form predicts for it, with the chosen form's 90 % interval as a band.

    seen: what the durations are, "measured" or "derived".
    """
    found = {fit.model: _residuals(points, model_from_fit(fit)) for fit in fits}
    chosen = next((fit for fit in fits if fit.chosen), fits[0])
    edge = max((abs(y) for marks in found.values() for _, y in marks), default=0.0)
    edge = min(_MOST_RESIDUAL, max(edge, abs(chosen.residual_p5), abs(chosen.residual_p95), 0.05))
    times = [1000.0 * duration for point in points for duration in point.durations_s]
    low, high = min(times), max(times)
    chart = Chart.plot(_WIDTH, _HEIGHT, (low, max(high, 1.01 * low)), (-edge, edge), log_x=True)
    chart.axes(f"{seen}, ms", f"{seen} / predicted - 1", y_percent=True)
    chart.rule(0.0, strong=True)
    chart.area([(x, chosen.residual_p5, chosen.residual_p95) for x in (low, high)], form_color(chosen.model))
    for form, marks in found.items():
        chart.dots([(x, y) for x, y in marks if abs(y) <= edge], form_color(form))
        chart.beyond([(x, y) for x, y in marks if abs(y) > edge], form_color(form))
    keys = [(fit.model + (" (chosen)" if fit.chosen else ""), form_color(fit.model)) for fit in fits]
    return f'<div class="figure">{legend(keys)}{chart.render(title)}{_outside(found, edge)}</div>'


def peaks(points: Sequence[profile_pb2.Measurement], memory: profile_pb2.StageMemory, title: str) -> str:
    """Peak memory of training points by tokens, with the fitted line."""
    marks = [(float(point.batch * point.length), point.peak_bytes / 2**20) for point in points]
    most = max(x for x, _ in marks)
    line = [
        (tokens, (memory.fixed_bytes + memory.activation_bytes_per_token * tokens) / 2**20) for tokens in (0.0, most)
    ]
    low = min(y for _, y in marks + line)
    high = max(y for _, y in marks + line)
    chart = Chart.plot(_WIDTH, _HEIGHT, (0.0, most), (0.98 * low, 1.02 * high))
    chart.axes("tokens of a micro-batch", "MiB")
    chart.line(line, _color(0))
    chart.dots(marks, _color(0))
    return f'<div class="figure">{chart.render(title)}</div>'


def form_color(form: str) -> str:
    """The colour of a form in every chart."""
    return FORM_COLORS.get(form, _COLORS[-1])


def _residuals(points: Sequence[profile_pb2.Measurement], model: LatencyModel) -> list[Point]:
    marks = []
    for point in points:
        predicted_s = model.predict_s(point.batch, point.length, point.cached_tokens)
        if predicted_s > 0.0:
            marks += [(1000.0 * duration, duration / predicted_s - 1.0) for duration in point.durations_s]
    return marks


def _outside(found: Mapping[str, Sequence[Point]], edge: float) -> str:
    """How many residuals of each form lie beyond the edge of the chart; nothing without any."""
    counts = {form: sum(abs(y) > edge for _, y in marks) for form, marks in found.items()}
    named = ", ".join(f"{form} {count} of {len(found[form])}" for form, count in counts.items() if count)
    return f'<p class="soft">Triangles: beyond {100.0 * edge:.0f} % ({text(named)}).</p>' if named else ""


def _line(model: LatencyModel, batch: int, low: float, high: float) -> list[Point]:
    step = (high - low) / _LINE_POINTS
    lengths = [low + index * step for index in range(_LINE_POINTS + 1)]
    return [(length, 1000.0 * model.predict_s(batch, length)) for length in lengths]


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def _dash_px(index: int) -> float:
    """Series of one colour differ by their dashes; 0: a solid line."""
    return 3.0 * (index // len(_COLORS))


def _key(index: int) -> str:
    """What fills the key of a series in the legend."""
    color, dash_px = _color(index), _dash_px(index)
    if not dash_px:
        return color
    return f"repeating-linear-gradient(90deg,{color} 0 {dash_px:g}px,transparent {dash_px:g}px {dash_px + 2:g}px)"
