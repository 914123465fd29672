"""The charts of the report, each from the records of the runs."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from bench.demo.metrics import busy_shares, quantile
from bench.demo.records import RunRecord
from bench.live.cpu import OTHERS
from bench.live.requests import RequestRecord, Status
from bench.report.colors import policy_color
from services.charts.svg import Chart, Point, Scale, legend
from services.latency import OpKind

#: Serving is blue, training orange, what changes the weights purple and green.
OP_COLORS = {
    OpKind.PREFILL: ("prefill", "#1f6fb5"),
    OpKind.DECODE: ("decode", "#6db3e8"),
    OpKind.TRAIN_FORWARD: ("training forward", "#f0a63a"),
    OpKind.TRAIN_BACKWARD: ("training backward", "#d3622a"),
    OpKind.OPTIMIZER_STEP: ("optimizer step", "#a05cc0"),
    OpKind.WEIGHT_SYNC: ("weight synchronisation", "#1b9e77"),
}
CPU_COLORS = {
    "stage_workers": "#1f6fb5",
    "node_agents": "#6db3e8",
    "scheduler": "#f0a63a",
    "gateway": "#d3622a",
    "redis": "#a05cc0",
    "client": "#1b9e77",
    "demo": "#9aa4ad",
    "profiler": "#c7cdd2",
    OTHERS: "#4a4f55",
}
_WIDTH = 1060


def policy_legend(runs: Sequence[RunRecord]) -> str:
    """Colour keys of the policies."""
    return legend((run.policy, policy_color(run.policy)) for run in runs)


def op_legend() -> str:
    """Colour keys of the operations."""
    return legend([*OP_COLORS.values(), ("idle", "var(--track)")])


def response_cdf(
    runs: Sequence[RunRecord], value: Callable[[RequestRecord], float | None], slo_ms: float, name: str
) -> str:
    """Share of all requests answered within a time; what failed keeps a curve below 100 %."""
    curves = {run.policy: _cdf(run.requests, value) for run in runs}
    times = [x for points in curves.values() for x, _ in points] or [slo_ms]
    # One oddly quick answer must not squeeze all others: the axis begins at the first percentile.
    low = 0.8 * min(quantile(times, 0.01) or slo_ms, slo_ms)
    chart = Chart.plot(520, 310, (max(low, 0.01), 1.2 * max(*times, slo_ms)), (0.0, 1.0), log_x=True)
    chart.axes(f"{name}, ms (log scale)", "requests", y_percent=True)
    for policy, points in curves.items():
        chart.line(points, policy_color(policy), dashed=policy == "lemix_no_sync")
    chart.marker(slo_ms, f"SLO {slo_ms:.0f} ms", low=True)
    return chart.render(f"Cumulative distribution of {name} per policy")


def _cdf(requests: Sequence[RequestRecord], value: Callable[[RequestRecord], float | None]) -> list[Point]:
    seconds = [value(item) for item in requests if item.status is Status.OK]
    times = sorted(1000.0 * item for item in seconds if item is not None)
    points: list[Point] = []
    for index, at in enumerate(times):
        points += [(at, index / len(requests)), (at, (index + 1) / len(requests))]
    return points


def loss_over_time(runs: Sequence[RunRecord], burst_s: Sequence[float] | None) -> str:
    """Loss of the served prompts' true continuations, a moving mean over a tenth of the run."""
    curves = {run.policy: _moving_mean(run, _losses(run)) for run in runs}
    return _loss_chart(runs, curves, burst_s, "loss, nats per token (lower is better)", "Inference loss over time")


def loss_against(runs: Sequence[RunRecord], baseline: RunRecord, burst_s: Sequence[float] | None) -> str:
    """Loss less the baseline's loss on the very same requests, a moving mean: how hard a prompt is cancels out."""
    theirs = _losses(baseline)
    curves = {}
    for run in runs:
        mine = _losses(run)
        paired = {key: (at, loss - theirs[key][1]) for key, (at, loss) in mine.items() if key in theirs}
        curves[run.policy] = _moving_mean(run, paired)
    name = f"loss minus that of {baseline.policy} on the same requests (below 0 is better)"
    return _loss_chart(runs, curves, burst_s, name, f"Inference loss against {baseline.policy}")


def _loss_chart(
    runs: Sequence[RunRecord],
    curves: Mapping[str, Sequence[Point]],
    burst_s: Sequence[float] | None,
    y_name: str,
    title: str,
) -> str:
    losses = [y for points in curves.values() for _, y in points] or [0.0, 1.0]
    planned_s = max(run.planned_s for run in runs)
    chart = Chart.plot(_WIDTH, 300, (0.0, planned_s), (min(losses) - 0.02, max(losses) + 0.05))
    if burst_s is not None:
        chart.band(burst_s[0], burst_s[1], "burst")
    chart.axes("time since the start of the traffic, s", y_name)
    for policy, points in curves.items():
        chart.line(points, policy_color(policy), dashed=policy == "lemix_no_sync")
    chart.marker(runs[0].drift_s, "drift: documentation → source code")
    return chart.render(f"{title} per policy")


def _losses(run: RunRecord) -> dict[str, Point]:
    """(time, loss) by request."""
    return {
        item.request_id: (item.at_s, item.reference_loss) for item in run.requests if item.reference_loss is not None
    }


def _moving_mean(run: RunRecord, losses: Mapping[str, Point]) -> list[Point]:
    """Windows never reach over the drift: mixing the two kinds of text would smear the jump."""
    half = run.planned_s / 20.0
    points = []
    for step in range(121):
        at = run.planned_s * step / 120.0
        low, high = max(at - half, 0.0), at + half
        low, high = (low, min(high, run.drift_s)) if at < run.drift_s else (max(low, run.drift_s), high)
        inside = [loss for moment, loss in losses.values() if low <= moment < high]
        if inside:
            points.append((at, sum(inside) / len(inside)))
    return points


def timeline(runs: Sequence[RunRecord], begin_s: float, end_s: float, marker: tuple[float, str] | None = None) -> str:
    """What every stage of every node did in a window, policy by policy."""
    rows = [(run, _stages(run)) for run in runs]
    row_px, gap_px, head_px = 18, 4, 24
    body_px = sum(head_px + len(stages) * (row_px + gap_px) for _, stages in rows)
    chart = Chart(
        _WIDTH,
        body_px + 46,
        Scale(begin_s, end_s, 100, _WIDTH - 12),
        Scale(0.0, 1.0, body_px, 0),
    )
    top = 0.0
    for run, stages in rows:
        chart.label(2, top + 17, run.policy, css="name strong")
        top += head_px
        for node, stage in stages:
            chart.label(92, top + 13, f"{node}/{stage}", anchor="end")
            chart.frame(top, row_px)
            for op, (_, color) in OP_COLORS.items():
                chart.boxes(_intervals(run, node, stage, op, begin_s, end_s), top, row_px, color)
            top += row_px + gap_px
    for value in chart.x.ticks(10):
        chart.label(chart.x(value), body_px + 18, f"{value:g}", anchor="middle")
    chart.label((100 + _WIDTH) / 2, body_px + 36, "time, s", anchor="middle", css="name")
    if marker is not None:
        chart.marker(*marker)
    return chart.render(f"Operations on every stage from {begin_s:.1f} s to {end_s:.1f} s")


def _stages(run: RunRecord) -> list[tuple[str, int]]:
    return sorted({(op.node_id, op.stage) for op in run.ops})


def _intervals(run: RunRecord, node: str, stage: int, kind: OpKind, begin_s: float, end_s: float) -> list[Point]:
    return [
        (max(begin_s, op.begin_s), min(end_s, op.end_s))
        for op in run.ops
        if op.node_id == node and op.stage == stage and op.op is kind and op.begin_s < end_s and op.end_s > begin_s
    ]


def utilisation_bars(runs: Sequence[RunRecord]) -> str:
    """How every stage spent the run, by operation."""
    rows: list[tuple[str, str, Mapping[str, float]]] = []
    for run in runs:
        for index, (stage, shares) in enumerate(busy_shares(run.ops, run.wall_s).items()):
            rows.append((run.policy if index == 0 else "", stage, shares))
    colors = {op.value: color for op, (_, color) in OP_COLORS.items()}
    return _bars(rows, colors, 1.0, "Share of the run each stage spent on each operation")


def cpu_bars(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Who used the machine's cores, per policy."""
    rows = [(policy, "", roles) for policy, roles in shares.items()]
    top = max([1.0, *(sum(roles.values()) for roles in shares.values())])
    return _bars(rows, CPU_COLORS, top, "Share of the machine's CPU time by process, per policy")


def _bars(
    rows: Sequence[tuple[str, str, Mapping[str, float]]], colors: Mapping[str, str], high: float, title: str
) -> str:
    row_px, gap_px, left_px = 18, 7, 190
    body_px = len(rows) * (row_px + gap_px)
    chart = Chart(_WIDTH, body_px + 24, Scale(0.0, high, left_px, _WIDTH - 60), Scale(0.0, 1.0, body_px, 0))
    for index, (group, name, shares) in enumerate(rows):
        top = index * (row_px + gap_px)
        chart.label(2, top + 13, group, css="name strong")
        chart.label(left_px - 8, top + 13, name, anchor="end")
        chart.frame(top, row_px)
        ends: defaultdict[str, list[Point]] = defaultdict(list)
        at = 0.0
        for key in [*colors, *(key for key in shares if key not in colors)]:
            share = shares.get(key, 0.0)
            if share > 0:
                ends[colors.get(key, "#9aa4ad")].append((at, at + share))
                at += share
        for color, intervals in ends.items():
            chart.boxes(intervals, top, row_px, color)
        chart.label(_WIDTH - 54, top + 13, f"{100 * at:.0f} %")
    for value in chart.x.ticks(5):
        chart.label(chart.x(value), body_px + 14, f"{100 * value:.0f} %", anchor="middle")
    return chart.render(title)
