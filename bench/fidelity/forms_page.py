"""Tables and charts of which law fits where. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.report.table import percent
from services.charts.page import configuration, document, facts, table
from services.charts.svg import Chart, legend, text

COLORS = {"quadratic": "#c0392b", "affine": "#c98a00", "full": "#1f6fb5", "tabulated": "#14784f"}
HEAD = ("model", "op", "tokens", *COLORS, "noise")

#: A line that is off by more than this lies on the edge of its chart.
_MOST_ERROR = 1.0


def rows(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells of the table under HEAD: held-out error of every form, with a star at the chosen one, and noise."""
    return [
        [
            f"{entry['attention']} {entry['weights']}",
            entry["op"],
            f"{entry['shortest']}-{entry['longest']}",
            *(_error(entry, form) for form in COLORS),
            percent(entry["noise"]),
        ]
        for entry in entries
    ]


def _error(entry: Mapping[str, Any], form: str) -> str:
    if form not in entry["forms"]:
        return "–"
    return percent(entry["forms"][form]["mape"]) + ("*" if form == entry["chosen"] else "")


def section(entries: Sequence[Mapping[str, Any]]) -> str:
    """What the study found, for a page of its own or another's."""
    whole = [entry for entry in entries if entry["range"] == "all"]
    panels = "".join(f'<div class="figure">{_panel(entry)}</div>' for entry in whole)
    cells = [[text(cell) for cell in row] for row in rows(entries)]
    return (
        "<h2>Which law fits where</h2><p>Held-out error (mean absolute percentage) of every form by attention, number "
        "format and length, the chosen one with a star. Noise is what one repetition differs from the median of its "
        f"point. The paper's form is <i>quadratic</i>.</p>{table(HEAD, cells)}"
        "<h2>Error over length</h2><p>Prediction over measurement, less 1, of one sequence; each form is fitted to all "
        f'lengths.</p>{legend(COLORS.items())}<div class="pair">{panels}</div>'
    )


def _panel(entry: Mapping[str, Any]) -> str:
    lengths = (float(entry["shortest"]), float(entry["longest"]))
    chart = Chart.plot(540, 260, lengths, (-_MOST_ERROR, _MOST_ERROR), log_x=True)
    title = f"{entry['op']}, {entry['attention']}, {entry['weights']}"
    chart.axes("tokens", title, y_percent=True)
    chart.rule(0.0, strong=True)
    for form, color in COLORS.items():
        if form in entry["forms"]:
            errors = entry["forms"][form]["error_by_length"]
            chart.line(sorted((float(length), error) for length, error in errors.items()), color)
    return chart.render(title)


def page(summary: Mapping[str, Any]) -> str:
    """The whole page."""
    machine = summary["machine"]
    parts = [
        "<h1>Latency forms</h1>",
        facts({"machine": machine, "commit": summary["git_commit"], "started": summary["started_at"]}),
        section(summary["forms"]),
        configuration(summary["config"]),
    ]
    return document("LeMix: latency forms", parts)
