"""How much every knob matters: one at a time, against the same policy with its defaults."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.paper.charts import Panel, Series, panels
from bench.paper.claims import judged
from bench.paper.compare import place
from bench.paper.config import SUBJECT, PaperConfig
from bench.paper.family import Family, Labelled, Row, Shown
from bench.paper.knobs import KNOBS
from bench.paper.series import geomean, grouped
from bench.paper.variants import everywhere, html
from bench.report.colors import policy_color
from services.charts.svg import text

NAME = "sensitivity"
#: Knobs that cannot change a decision (docs/scheduler.md).
INERT = (("paper_ratio", "lambda_1"),)


def runs(config: PaperConfig) -> list[Labelled]:
    """Every policy with its defaults, and with every value of every knob."""
    points, seeds, num_tasks = config.axis_points(), config.first_seed, config.few_tasks
    found: list[Labelled] = []
    for policy, knobs in KNOBS.items():
        found += everywhere(policy, points, seeds, num_tasks, policy)
        for knob in knobs:
            for value in knob.values:
                label, options = _label(policy, knob.name, value), knob.options(value)
                found += everywhere(label, points, seeds, num_tasks, policy, options=options)
    return found


def _label(policy: str, knob: str, value: float) -> str:
    return f"{policy}, {knob}={value:g}"


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Policy -> knob -> what every value changes, and whether the knob changed any decision at all."""
    by_label = grouped(rows, lambda row: row["label"])
    found: dict[str, Any] = {}
    for policy, knobs in KNOBS.items():
        default = {(row["seed"], place(row)): row for row in by_label[policy]}
        for knob, _, values in knobs:
            effects = [_effect(value, by_label[_label(policy, knob, value)], default) for value in values]
            inert = all(effect["runs_changed"] == 0 for effect in effects)
            found.setdefault(policy, {})[knob] = {"inert": inert, "values": effects}
    first = next(iter(by_label.values()))
    about = {"runs_per_value": len(first), "tasks_per_point": first[0]["n_tasks"]}
    return {NAME: {**about, "policies": found}, "claims": [_inert_claim(found, *pair) for pair in INERT]}


def _effect(value: float, rows: Sequence[Row], default: Mapping[Any, Row]) -> dict[str, Any]:
    pairs = [(row, default[row["seed"], place(row)]) for row in rows]
    return {
        "value": value,
        "throughput_ratio": geomean(a["tasks_per_held_node_s"] / b["tasks_per_held_node_s"] for a, b in pairs),
        "attainment_points": 100.0 * sum(a["slo_attainment"] - b["slo_attainment"] for a, b in pairs) / len(pairs),
        "runs_changed": sum(a["decisions"] != b["decisions"] for a, b in pairs),
    }


def _inert_claim(found: Mapping[str, Any], policy: str, knob: str) -> dict[str, Any]:
    changed = sum(effect["runs_changed"] for effect in found[policy][knob]["values"])
    name, metric = f"inert_{policy}_{knob}", f"{NAME}.policies.{policy}.{knob}"
    text_ = f"{policy}: {knob} changes no decision; runs with another decision"
    return judged(name, text_, metric, [float(changed)], 0.0, "{:.0f}", at_least=False)


def tables(summary: Mapping[str, Any]) -> list[Shown]:
    """A row per knob: its smallest and largest effect."""
    found = summary[NAME]
    rows = []
    for policy, knobs in found["policies"].items():
        for knob, effects in knobs.items():
            values = effects["values"]
            ratios = [effect["throughput_ratio"] for effect in values]
            points = [effect["attainment_points"] for effect in values]
            changed = sum(effect["runs_changed"] for effect in values)
            rows.append(
                (
                    f"{policy}: {knob}",
                    f"{values[0]['value']:g} – {values[-1]['value']:g}",
                    f"{min(ratios):.3f} – {max(ratios):.3f}",
                    f"{min(points):+.1f} – {max(points):+.1f}",
                    "inert" if effects["inert"] else f"{changed} of {found['runs_per_value'] * (len(values) - 1)}",
                )
            )
    title = (
        f"Sensitivity, against the default · runs per value: {found['runs_per_value']}, "
        f"{found['tasks_per_point']:,} tasks per point"
    )
    return [Shown(title, ("knob", "from – to", "tasks ratio", "SLO points", "runs decided otherwise"), rows)]


def sections(config: PaperConfig, summary: Mapping[str, Any]) -> list[str]:
    """Panels for LeMix's knobs, a table for all."""
    del config
    knobs = summary[NAME]["policies"][SUBJECT]
    charts = panels(_panels(knobs), "Throughput and attainment of lemix against its default, by knob", columns=3)
    (shown,) = tables(summary)
    return [
        "<h2>Sensitivity</h2><p>One knob at a time, against the same policy with its defaults on the same input: tasks "
        "per held node-second as a ratio (geometric mean), attainment as a mean difference. A knob is <i>inert</i> "
        f"when every decision of every run is the same. {text(shown.title)}.</p>"
        f'<div class="figure">{charts}</div>{html(shown)}'
    ]


def _panels(knobs: Mapping[str, Any]) -> list[Panel]:
    """Throughput of every knob, then attainment, each row with the same axis."""
    items = []
    for name, title, form, neutral, least in (
        ("throughput_ratio", "tasks ratio", "{:.2f}".format, 1.0, 0.1),
        ("attainment_points", "SLO points", "{:+.0f}".format, 0.0, 2.0),
    ):
        figures = [effect[name] for effects in knobs.values() for effect in effects["values"]]
        low, high = min(neutral - least, *figures), max(neutral + least, *figures)
        limits = (low - 0.03 * (high - low), high + 0.03 * (high - low))
        for knob, effects in knobs.items():
            points = [
                (float(i), effect[name], effect[name], effect[name]) for i, effect in enumerate(effects["values"])
            ]
            names = [f"{effect['value']:g}" for effect in effects["values"]]
            series = [Series(SUBJECT, policy_color(SUBJECT), points)]
            items.append(Panel(f"{knob}: {title}", "", series, form, names, limits, neutral))
    return items


SENSITIVITY = Family(NAME, runs, summarise, tables, sections)
