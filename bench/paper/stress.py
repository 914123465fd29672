"""Rates far above the grid's on faster stages: where does training begin to wait for serving?"""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.paper.charts import Panel, Series, panels
from bench.paper.config import BASELINE, SUBJECT, PaperConfig
from bench.paper.family import Family, Labelled, Row, Shown
from bench.paper.scenario import Point
from bench.paper.series import grouped, over_seeds
from bench.paper.variants import captioned, count, everywhere, policy_of
from bench.report.colors import policy_color
from bench.report.table import percent
from services.charts.svg import legend, number

NAME = "stress"
_SHARE, _FORWARD_S = 0.5, 0.01
#: Training counts as held back when this share of it waits for a node.
SETS_IN = 0.05
_NO_HOLD_BACK = "paper_additive, no hold-back"
_METRICS = ("slo_attainment", "tasks_per_held_node_s", "training_waiting_share", "training_wait_max_s")


def runs(config: PaperConfig) -> list[Labelled]:
    """The policies that mix, with and without hold-back, and separate clusters."""
    points = [Point(rate, _SHARE, _FORWARD_S) for rate in config.stress_rates]
    num_tasks = config.num_tasks
    found = []
    for policy in (BASELINE, "round_robin", "paper_additive", SUBJECT):
        found += everywhere(policy, points, config.seeds, num_tasks, policy)
    options = (("hold_back", False),)
    return found + everywhere(_NO_HOLD_BACK, points, config.seeds, num_tasks, "paper_additive", options=options)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Label -> figures by rate, and the rate at which hold-back sets in (None: nowhere)."""
    policies = {}
    for label, own in grouped(rows, lambda row: row["label"]).items():
        rates = grouped(own, lambda row: row["rate"])
        figures = {name: [over_seeds(row[name] for row in some) for some in rates.values()] for name in _METRICS}
        waiting = zip(rates, figures["training_waiting_share"], strict=True)
        sets_in = next((rate for rate, share in waiting if share and share["median"] >= SETS_IN), None)
        policies[label] = {"rates": list(rates), **figures, "hold_back_sets_in": sets_in}
    seeds = len({row["seed"] for row in rows})
    about = {"seeds": seeds, "tasks_per_point": rows[0]["n_tasks"], "mean_forward_s": _FORWARD_S}
    return {NAME: {**about, "training_share": _SHARE, "policies": policies}}


def tables(summary: Mapping[str, Any]) -> list[Shown]:
    """Attainment, and share of training that waits, by rate."""
    found = summary[NAME]
    rates = next(iter(found["policies"].values()))["rates"]
    kept, waits = [], []
    for label, figures in found["policies"].items():
        sets_in = figures["hold_back_sets_in"]
        kept.append((label, *(percent(value["median"]) for value in figures["slo_attainment"])))
        shares = (percent(value["median"]) for value in figures["training_waiting_share"])
        waits.append((label, *shares, "nowhere" if sets_in is None else f"{sets_in:g}/s"))
    about = f"{count(found['seeds'], 'seed')}, {found['tasks_per_point']:,} tasks per rate"
    head = ("", *(f"{rate:g}/s" for rate in rates))
    return [
        Shown(f"Stress: SLO attainment · {about}", head, kept),
        Shown(f"Stress: share of training that waits for a node · {about}", (*head, "from"), waits),
    ]


def sections(config: PaperConfig, summary: Mapping[str, Any]) -> list[str]:
    """Three panels over the rate."""
    del config
    found = summary[NAME]
    titles = {
        "slo_attainment": ("SLO attainment", "{:.0%}".format),
        "training_waiting_share": ("training that waits for a node", "{:.0%}".format),
        "tasks_per_held_node_s": ("tasks per held node-second", number),
    }
    items = [
        Panel(title, "tasks per second", [_series(label, own, name) for label, own in found["policies"].items()], form)
        for name, (title, form) in titles.items()
    ]
    kept, waits = tables(summary)
    keys = legend((label, _color(label)) for label in found["policies"])
    return [
        f"<h2>Stress</h2><p>Half of the tasks train, mean forward {1000 * _FORWARD_S:g} ms. Hold-back sets in where "
        f"{100 * SETS_IN:g} % of the micro-batches wait for a node. They also wait when 32 are on every node "
        f'that trains.</p>{keys}<div class="figure">{panels(items, "Stress")}</div>'
        f"{captioned(kept)}{captioned(waits)}"
    ]


def _series(label: str, figures: Mapping[str, Any], name: str) -> Series:
    pairs = zip(figures["rates"], figures[name], strict=True)
    return Series(label, _color(label), [(rate, v["low"], v["median"], v["high"]) for rate, v in pairs])


def _color(label: str) -> str:
    return "#888888" if label == _NO_HOLD_BACK else policy_color(policy_of(label))


STRESS = Family(NAME, runs, summarise, tables, sections)
