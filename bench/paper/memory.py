"""Long sequences on stages short of memory: with wait-or-offload over links of several speeds, and without."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from bench.paper.charts import Panel, Series, panels
from bench.paper.config import BASELINE, SUBJECT, PaperConfig
from bench.paper.family import Family, Labelled, Row, Shown
from bench.paper.scenario import Run
from bench.paper.traffic import Lengths
from bench.paper.variants import compared, everywhere, html, size
from bench.report.colors import policy_color
from bench.report.table import percent
from services.charts.svg import legend
from services.node_agent.core.types import MemoryConfig
from services.simulator.lengths import LogNormal
from services.simulator.types import SimulationResult

NAME = "memory"
POLICIES = (BASELINE, "round_robin", "paper_additive", SUBJECT)
#: Eight times the grid's; a forward takes as long as there on average.
_MEAN, _LONGEST = 2000, 8192
LENGTHS = Lengths(LogNormal.of(_MEAN, 1200, shortest=64, longest=_LONGEST))
#: A stage with half of a 7B model in 16 bit: 16 layers of width 4096. Of 80 GB, 56 hold its weights, gradients and
#: optimizer state. Activations are kept whole (34 bytes per token and unit of width, fused attention).
MEMORY = MemoryConfig(
    peak_bytes=24 * 10**9, kv_bytes_per_token=2 * 2 * 4096 * 16, activation_bytes_per_token=34 * 4096 * 16
)
_GB = 1e9


class Condition(NamedTuple):
    """memory: None: as much as anybody wants."""

    memory: MemoryConfig | None
    link_bytes_per_s: float = float("inf")


NO_LIMIT, HASTY, FAILS = "no limit", "25 GB/s, hasty", "fail at once"
#: Name -> condition, the fastest link first: NVLink-C2C, PCIe 5, 4 and 3, and a link that others use too.
CONDITIONS: Mapping[str, Condition] = {
    NO_LIMIT: Condition(None),
    **{f"{speed:g} GB/s": Condition(MEMORY, speed * _GB) for speed in (400.0, 50.0, 25.0, 12.0, 4.0)},
    HASTY: Condition(replace(MEMORY, max_forward_wait_s=MEMORY.max_wait_s), 25.0 * _GB),
    FAILS: Condition(replace(MEMORY, wait_or_offload=False)),
}
#: Those of the charts.
LINKS = [name for name in CONDITIONS if name not in (HASTY, FAILS)]


def figures(run: Run, result: SimulationResult) -> dict[str, Any]:
    """What memory cost, for the row: ops that waited, seconds waited and bytes moved per task, tasks lost.

    may_fail: that tasks are lost is what the run is to show.
    """
    counters = result.memory.values()
    num_tasks = len(result.tasks)
    return {
        "memory_waits": sum(c.waits for c in counters) / num_tasks,
        "memory_waited_s": sum(c.waited_s for c in counters) / num_tasks,
        "moved_gb": sum(c.offloaded_bytes + c.reloaded_bytes for c in counters) / _GB / num_tasks,
        "may_fail": run.node == (("memory", CONDITIONS[FAILS].memory),),
        "lost_share": sum(not record.ok for record in result.tasks.values()) / num_tasks,
    }


def runs(config: PaperConfig) -> list[Labelled]:
    """Every policy under every condition."""
    return [
        labelled
        for name, condition in CONDITIONS.items()
        for policy in POLICIES
        for labelled in everywhere(
            f"{policy}, {name}",
            config.axis_points(),
            config.first_seed,
            config.few_tasks,
            policy,
            lengths=LENGTHS,
            node=(("memory", condition.memory),),
            link_bytes_per_s=condition.link_bytes_per_s,
            also=figures,
        )
    ]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything against separate clusters without a limit, and by label what memory cost."""
    baseline = f"{BASELINE}, {NO_LIMIT}"
    found, _ = compared([{**row, "label": BASELINE if row["label"] == baseline else row["label"]} for row in rows])
    found["policies"][baseline] = found["policies"].pop(BASELINE)
    found["spread"][baseline] = found["spread"].pop(BASELINE)
    found["costs"] = {label: _mean_costs(rows, label) for label in dict.fromkeys(row["label"] for row in rows)}
    return {NAME: found}


def _mean_costs(rows: Sequence[Row], label: str) -> dict[str, float]:
    mine = [row for row in rows if row["label"] == label]
    keys = ("memory_waits", "memory_waited_s", "moved_gb", "lost_share")
    return {key: sum(row[key] for row in mine) / len(mine) for key in keys}


def tables(summary: Mapping[str, Any]) -> list[Shown]:
    """A row per condition."""
    found = summary[NAME]
    about = size(found)
    policies, costs = found["policies"], found["costs"]

    def rows(cell: Callable[[str], str]) -> list[tuple[str, ...]]:
        return [(name, *(cell(f"{policy}, {name}") for policy in POLICIES)) for name in CONDITIONS]

    ratio = rows(lambda label: f"{policies[label]['throughput_ratio']['geomean']:.2f}")
    kept = rows(lambda label: percent(policies[label]["attainment_mean"]))
    moved = rows(lambda label: f"{costs[label]['moved_gb']:.2f}")
    waited = rows(lambda label: f"{1000.0 * costs[label]['memory_waited_s']:.0f}")
    lost = rows(lambda label: percent(costs[label]["lost_share"]))
    return [
        Shown(f"Memory: throughput over separate clusters without a limit · {about}", ("", *POLICIES), ratio),
        Shown(f"Memory: SLO attainment · {about}", ("", *POLICIES), kept),
        Shown(f"Memory: GB moved per task · {about}", ("", *POLICIES), moved),
        Shown(f"Memory: ms waited for room per task · {about}", ("", *POLICIES), waited),
        Shown(f"Memory: tasks lost · {about}", ("", *POLICIES), lost),
    ]


def sections(config: PaperConfig, summary: Mapping[str, Any]) -> list[str]:
    """Throughput and attainment by condition."""
    del config
    found = summary[NAME]
    items = [
        _panel("throughput over separate clusters without a limit", found, ("throughput_ratio", "geomean")),
        _panel("SLO attainment", found, ("attainment_mean",)),
    ]
    keys = legend((policy, policy_color(policy)) for policy in POLICIES)
    return [
        f"<h2>Memory</h2><p>Sequences of {_MEAN:,} tokens on average, up to {_LONGEST:,}. A "
        f"stage has {MEMORY.peak_bytes / _GB:.0f} GB for KV caches and activations and uses {percent(MEMORY.kappa)} of "
        f"it; a token takes {MEMORY.kv_bytes_per_token / 1e6:.2f} MB of KV cache or "
        f"{MEMORY.activation_bytes_per_token / 1e6:.1f} MB of activations. What does not fit waits for "
        f"{1000.0 * MEMORY.max_wait_s:.0f} ms, a micro-batch’s forward {MEMORY.max_forward_wait_s:g} s; then other "
        "data goes to host memory over a link of the given speed. <i>Hasty</i>: forwards wait no longer than the rest. "
        f"<i>Fail at once</i>: no memory check. {size(found)}.</p>{keys}"
        f'<div class="figure">{panels(items, "By link", columns=2)}</div>{"".join(map(html, tables(summary)))}'
    ]


def _panel(title: str, found: Mapping[str, Any], path: tuple[str, ...]) -> Panel:
    series = []
    for policy in POLICIES:
        points = []
        for index, name in enumerate(LINKS):
            label = f"{policy}, {name}"
            middle, extent = found["policies"][label], found["spread"][label]
            for key in path:
                middle, extent = middle[key], extent[key]
            points.append((float(index), extent[0], middle, extent[1]))
        series.append(Series(policy, policy_color(policy), points))
    return Panel(title, "host link", series, names=LINKS)


MEMORY_FAMILY = Family(NAME, runs, summarise, tables, sections)
