"""The page: what was run, what it came to, and the sections of every family."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.paper.claims import limit, shown
from bench.paper.config import PaperConfig
from bench.paper.family import Family
from services.charts.page import chip, configuration, document, facts, notice, table, tile
from services.charts.svg import text

_TILES = {
    "throughput": "tasks per held node-second, lemix / separate, geometric mean",
    "attainment_worst": "SLO attainment, lemix − separate, at the worst point",
    "efficiency": "of what a clairvoyant scheduler could reach",
    "attainment_max": "SLO attainment, lemix / separate, at the best point",
}


def render(config: PaperConfig, families: Sequence[Family], summary: Mapping[str, Any]) -> str:
    """The whole page: a section per family that ran."""
    parts = [
        _header(summary),
        notice("Something went wrong in this run", summary["problems"]),
        _tiles(summary),
        _claims(summary),
    ]
    for family in families:
        parts += family.sections(config, summary)
    return document("LeMix: the paper's claims", [*parts, _setup(summary)])


def _header(summary: Mapping[str, Any]) -> str:
    config, seeds = summary["config"], len(summary["seeds"])
    return (
        "<h1>The paper’s claims</h1>"
        f"<p>{config['nodes']} nodes × {config['stages']} pipeline stages serve and train at the same time, under "
        f"every policy with the same traffic: {config['num_tasks']:,} tasks per point, Poisson arrivals, lognormal "
        "lengths, unless a section says otherwise. The scheduler and the nodes run the code of the real cluster; "
        "only the durations of operations and the clock are simulated, so the figures do not depend on the machine.</p>"
        f'<p class="soft">{text(summary["started_at"])} · {text(summary["machine"]["cpu"])}, '
        f"{summary['machine']['cores']} cores · commit {text(summary['git_commit'])} · "
        f"{seeds} seed{'s' if seeds > 1 else ''}</p>"
    )


def _tiles(summary: Mapping[str, Any]) -> str:
    claims = {claim["name"]: claim for claim in summary["claims"]}
    tiles = "".join(
        tile(shown(claims[name], claims[name]["median"]), label, chip(claims[name]["verdict"], limit(claims[name])))
        for name, label in _TILES.items()
        if name in claims
    )
    return f'<div class="tiles">{tiles}</div>' if tiles else ""


def _claims(summary: Mapping[str, Any]) -> str:
    if not summary["claims"]:
        return ""
    rows = [
        (
            text(claim["claim"]),
            f"<b>{text(shown(claim, claim['median']))}</b>",
            text(", ".join(shown(claim, value, unit=False) for value in claim["values"])),
            chip(claim["verdict"], limit(claim)),
        )
        for claim in summary["claims"]
    ]
    return (
        "<h2>Claims</h2><p>What lemix is to reach. Median of the seeds, then each seed. <i>Held</i> and <i>missed</i>: "
        "every seed agrees; <i>unresolved</i>: they do not.</p>" + table(("claim", "median", "seeds", "verdict"), rows)
    )


def _setup(summary: Mapping[str, Any]) -> str:
    config = summary["config"]
    lengths = config["lengths"]
    setup = {
        "durations": "quadratic in the length; a backward takes twice its forward, an optimizer step no time; cutting "
        f"a training operation into pieces adds {100 * config['simulation']['cut_overhead']:g} %",
        "lengths": f"lognormal, mean 250 and standard deviation 150 tokens, {lengths['shortest']} to "
        f"{lengths['longest']:,} tokens",
        "promise": f"a response within {config['slo_units']:g} units; a unit is the mean forward of a stage × stages",
        "held": f"a node is held from an assignment until it has been idle for {config['scheduler']['hold_s']:g} s",
        "alike for all": "bounds of training in flight and waiting, one request per operation, stashed weights with "
        f"two gradient buffers; up to {config['node']['max_training_parts']} pieces for a policy that asks for them",
        "took": f"{summary['seconds_total']:.0f} s",
    }
    return f"<h2>Set-up</h2>{facts(setup)}{configuration(config)}"
