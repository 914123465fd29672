"""The page for people: one HTML file without any outside resource."""

from collections.abc import Mapping, Sequence
from typing import Any

from services.charts import page
from services.charts.svg import Chart, text

_SIZE = (540, 340)
_MARGINS = (26, 16, 40, 60)
_COLOR = "#1f6fb5"
#: Share of the points that set the scale of a chart, and by what factor others may lie beyond and still be shown.
_USUAL, _MOST_STRETCH = 0.99, 1.25

Points = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]


def render(summary: Mapping[str, Any], points: Points) -> str:
    """The whole page. points: by run and kind (measured, predicted) in milliseconds, of the first repetition."""
    parts = [
        _header(summary),
        page.notice("Take care", [*summary["warnings"], *summary["problems"][:10]]),
        _claims(summary["claims"]),
        "<h2>Operations of the real engine</h2><p>Calibrated: what the scheduler would have predicted just before the "
        "operation. Error is |measured − predicted| / measured; the noise floor is that of the best predictor there "
        "could be (median of the other repetitions of the same size). Measured over profile: half of the operations "
        "took at least so much longer than the profile says; negative: they were faster. Operations that the profile "
        "expects to take less than 5 ms are left out, so a kind of operation may be missing.</p>",
        *(_ops(name, run["ops"]) for name, run in summary["real"].items()),
        "<h2>Responses of the real engine</h2><p>Time to first token as predicted when the request was placed, against "
        "what it was on the node. Requests after which another one was sent to the same node before their first "
        "token are counted apart: nobody could know. Error from noise alone: what the same predictor is off by in "
        "simulated runs where every operation takes what the scheduler expects but for its noise; knowing operations "
        "better would not mend that part.</p>",
        _responses(summary["real"]),
        "<h2>Predicted and measured</h2><p>Times of the first repetition; on the dashed line they are equal. Points "
        "far beyond the 99th percentile are left out and counted in the title.</p>",
        *(_plots(name, kinds) for name, kinds in points.items()),
        "<h2>Simulator against the emulated live cluster</h2><p>Simulated less live, in percent of live or in points. "
        "Delays of the control plane are medians measured in the live run.</p>",
        _comparison(summary["simulator_vs_live"]),
        "<h2>Simulator against the real cluster</h2>",
        _comparison([summary["simulator_vs_cpu"][name] for name in summary["simulator_vs_cpu"]]),
        page.configuration(summary["config"]),
    ]
    return page.document("LeMix: fidelity", parts)


def _header(summary: Mapping[str, Any]) -> str:
    repetitions = summary["repetitions"]
    return (
        "<h1>Predictions against reality</h1>"
        f'<p class="soft">{text(summary["started_at"])} · {text(summary["machine"]["cpu"])}, '
        f"{summary['machine']['cores']} cores · commit {text(summary['git_commit'])} · "
        f"{repetitions} repetition{'' if repetitions == 1 else 's'} · {summary['seconds_total']:.0f} s</p>"
    )


def _claims(claims: Sequence[Mapping[str, Any]]) -> str:
    return f'<div class="tiles">{"".join(_tile(claim) for claim in claims)}</div>'


def _tile(claim: Mapping[str, Any]) -> str:
    # The badge of a claim that is unresolved says why; its limit moves above it.
    below = [claim["note"], claim["limit"] if claim["reason"] else ""]
    details = "".join(f"<span>{text(line)}</span>" for line in below if line)
    badge = page.chip(claim["verdict"], claim["reason"] or claim["limit"])
    return page.tile(text(claim["shown"]), claim["claim"], details + badge)


def _ops(name: str, ops: Mapping[str, Any]) -> str:
    rows = [
        [
            text(kind),
            f"{found['ops']:,}",
            f"{found['median_ms']:.1f}",
            percent(found["online_mape"]),
            percent(found["profile_mape"]),
            percent(found["noise_floor"]),
            percent(found["online_coverage"]),
            percent(found["profile_coverage"]),
            percent(found["profile_bias"]),
        ]
        for kind, found in ops["kinds"].items()
    ]
    head = (
        f"{text(name)}",
        "operations",
        "median, ms",
        "error, calibrated",
        "error, profile",
        "noise floor",
        "in 90 % interval, calibrated",
        "in 90 % interval, profile",
        "measured over profile, median",
    )
    return page.table(head, rows)


def _responses(runs: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, run in runs.items():
        found = run["responses"]
        later = found["with_later_arrivals"]
        rows.append(
            [
                text(name),
                f"{found['requests']}",
                percent(found["mape"]),
                percent(found["noise_floor"]),
                percent(found["median_error"]),
                percent(found["bias"]),
                f"{later['requests']}",
                percent(later["mape"]),
            ]
        )
    head = (
        "run",
        "requests",
        "mean error",
        "error from noise alone",
        "median error",
        "median bias",
        "with later arrivals",
        "their mean error",
    )
    return page.table(head, rows)


def _plots(name: str, kinds: Mapping[str, Sequence[Sequence[float]]]) -> str:
    charts = "".join(_scatter(f"{name}: {kind}", found) for kind, found in kinds.items() if found)
    return f'<div class="pair">{charts}</div><br>'


def _scatter(title: str, points: Sequence[Sequence[float]]) -> str:
    most = _shown_up_to([max(point) for point in points])
    inside = [(measured, predicted) for measured, predicted in points if max(measured, predicted) <= most]
    chart = Chart.plot(*_SIZE, (0.0, 1.05 * most), (0.0, 1.05 * most), margins=_MARGINS)
    chart.axes("measured, ms", "predicted, ms")
    chart.line([(0.0, 0.0), (1.05 * most, 1.05 * most)], "var(--soft)", dashed=True)
    chart.dots(inside, _COLOR)
    outside = len(points) - len(inside)
    told = f"{len(points):,} points"
    if outside:
        told += f", {outside} of them outside (up to {max(max(point) for point in points):,.0f} ms)"
    return f'<div class="figure"><b>{text(title)}</b> <span class="soft">{told}</span>{chart.render(title)}</div>'


def _shown_up_to(values: Sequence[float]) -> float:
    """The largest value that is not far beyond the 99th percentile, so that outliers do not stretch a chart."""
    ordered = sorted(values)
    usual = ordered[int(_USUAL * (len(ordered) - 1))]
    return max(value for value in ordered if value <= _MOST_STRETCH * usual)


def _comparison(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"{text(entry['workload'])}<small>{text(entry.get('title', ''))}</small>",
            f"{entry['live']['requests']}",
            _pair(entry, "slo_attainment", 100.0, "%", "slo_attainment_points"),
            _pair(entry, "tokens_per_s", 1.0, "", "throughput_pct"),
            _pair(entry, "output_tokens_per_s", 1.0, "", "output_tokens_pct"),
            _pair(entry, "trained_tokens_per_s", 1.0, "", "trained_tokens_pct"),
            _pair(entry, "ttft_p50_s", 1000.0, "ms", "ttft_p50_pct"),
            _pair(entry, "ttft_p95_s", 1000.0, "ms", "ttft_p95_pct"),
            _pair(entry, "tpot_p50_s", 1000.0, "ms", "tpot_p50_pct"),
            _pair(entry, "utilisation", 100.0, "%", "utilisation_points"),
            _apart(entry.get("live_spread")),
            _apart(entry.get("simulated_spread")),
        ]
        for entry in entries
    ]
    head = (
        "workload",
        "requests",
        "attainment",
        "tokens/s",
        "output tokens/s",
        "trained tokens/s",
        "TTFT p50",
        "TTFT p95",
        "TPOT p50",
        "utilisation",
        "live runs apart: attainment, points; TTFT p95, %",
        "their simulations apart",
    )
    return page.table(head, rows)


def _apart(spread: Mapping[str, Any] | None) -> str:
    if spread is None:
        return ""
    values = (spread["slo_attainment_points"], spread["ttft_p95_pct"])
    return ", ".join("∞" if value is None else f"{value:.1f}" for value in values)


def _pair(entry: Mapping[str, Any], key: str, factor: float, unit: str, difference: str) -> str:
    apart = entry[difference]
    shown = "–" if apart is None else f"{apart:+.1f}"
    values = [entry[side][key] for side in ("live", "simulated")]
    told = " → ".join("∞" if value is None else f"{factor * value:,.1f}" for value in values)
    return f"{shown}<small>{told} {unit}</small>"


def percent(value: float | None) -> str:
    """A share; a dash for what was not measured."""
    return "–" if value is None else f"{100 * value:.1f} %"
