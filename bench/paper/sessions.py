"""Dependent requests: conversations and chains of agent steps whose nodes keep KV caches between the turns."""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bench.paper.charts import Panel, Series, panels
from bench.paper.claims import judged
from bench.paper.config import SUBJECT, PaperConfig
from bench.paper.family import Family, Labelled, Row, Shown
from bench.paper.prediction import ttft_errors
from bench.paper.scenario import DECODE, DECODE_BATCH, MAX_TRAINING_PARTS, NODE, Point, Run, configuration
from bench.paper.series import grouped, over_seeds
from bench.paper.variants import captioned, count, everywhere, policy_of
from bench.report.colors import policy_color
from bench.report.table import percent
from services.charts.svg import legend
from services.latency import LatencyModel, NodeLatency, OpKind
from services.node_agent.core.types import NodeCoreConfig
from services.simulator.cluster import Simulation
from services.simulator.conversations import CONVERSATIONS, draw
from services.simulator.metrics import quantile
from services.simulator.types import Microbatch, Request, SimulationResult, VirtualNode

NAME = "sessions"
#: LeMix with `sessions: false`.
WITHOUT = "no sessions"
_VARIANTS: tuple[tuple[str, str, tuple[tuple[str, bool], ...]], ...] = (
    (SUBJECT, SUBJECT, ()),
    (WITHOUT, SUBJECT, (("sessions", False),)),
    ("least_loaded", "least_loaded", ()),
    ("round_robin", "round_robin", ()),
)
#: Sessions that begin per second. Without reuse the largest keeps over half of the cluster busy.
RATES: Mapping[str, tuple[float, ...]] = {"chat": (0.25, 0.5, 1.0), "agent": (0.15, 0.3, 0.6)}
#: Seconds that a prompt of `_WHOLE` tokens takes on a stage. The promises that follow from it: 1 s to the first token,
#: 0.1 s for any further one.
MEAN_FORWARD_S = 0.1
_WHOLE = 1000
#: Shares of that time: constant, per token, and with the square of the length.
_CONSTANT, _LINEAR, _SQUARE = 0.1, 0.8, 0.1
#: A decode iteration in whole prompts: what it costs at least, and per token of context.
_DECODE_BASE, _DECODE_PER_TOKEN = 0.1, 1e-6
KV_TOKENS, KEPT_TOKENS = 65_536, 32_768
#: Share of the tasks that trains, tokens of a micro-batch, and micro-batches per optimizer step.
TRAINING_SHARE, _TRAINING_TOKENS, _ACCUMULATION = 0.2, 256, 8


class _Column(NamedTuple):
    title: str
    key: str
    form: Callable[[float], str]


_COLUMNS = (
    _Column("SLO", "slo_attainment", percent),
    _Column("p50, s", "ttft_p50_s", "{:.3f}".format),
    _Column("p95, s", "ttft_p95_s", "{:.3f}".format),
    _Column("error", "ttft_error_mean", "{:.0%}".format),
    _Column("median", "ttft_error_median", "{:.0%}".format),
    _Column("saved", "saved_share", "{:.0%}".format),
    _Column("held, s", "held_node_s", "{:,.0f}".format),
)


def runs(config: PaperConfig) -> list[Labelled]:
    """Every variant at every rate of both kinds (at the highest when other axes have one place only); few sessions, for
    each is several requests, and with one seed of the policies that nothing is claimed of."""
    num_sessions = max(1, config.num_tasks * (20 if config.full else 15) // 100)
    first = 0 if len(config.axis_rates) > 1 else -1
    return [
        labelled
        for kind, simulation in (("chat", chat), ("agent", agent))
        for label, policy, options in _VARIANTS
        for labelled in everywhere(
            label,
            [Point(rate, TRAINING_SHARE, MEAN_FORWARD_S) for rate in RATES[kind][first:]],
            config.seeds if policy == SUBJECT else config.first_seed,
            num_sessions,
            policy,
            options=options,
            mode=DECODE,
            simulation=simulation,
            also=figures,
        )
    ]


# ------------------------------------------------------------------------- one run


def chat(run: Run) -> SimulationResult:
    """Conversations."""
    return _simulate(run, "chat")


def agent(run: Run) -> SimulationResult:
    """Chains of steps that follow each other at once."""
    return _simulate(run, "agent")


def _simulate(run: Run, kind: str) -> SimulationResult:
    point = run.point
    work = draw(
        CONVERSATIONS[kind], f"{run.seed}/{kind}", sessions_per_s=point.rate, num_sessions=run.num_tasks, slo=run.slo
    )
    requests_per_s = point.rate * CONVERSATIONS[kind].mean_turns
    training = _training(requests_per_s * point.training_share / (1.0 - point.training_share))
    return Simulation(configuration(run), _nodes(run), work, training).run()


def _training(per_s: float) -> Iterator[Microbatch]:
    for index in itertools.count():
        yield Microbatch(f"m{index}", index / per_s, "job", 1, _TRAINING_TOKENS, _ACCUMULATION)


def _nodes(run: Run) -> list[VirtualNode]:
    values = {**NODE, "max_batch": DECODE_BATCH, "max_prefill_tokens": 2048}
    core = NodeCoreConfig(
        num_stages=run.stages, kv_capacity_tokens=KV_TOKENS, prefix_cache_tokens=KEPT_TOKENS, **values
    )
    return [
        VirtualNode(node_id=f"node-{index}", latency=_latency(run), core=core, max_training_parts=MAX_TRAINING_PARTS)
        for index in range(run.nodes)
    ]


def _latency(run: Run) -> NodeLatency:
    whole_s = run.point.mean_forward_s
    forward = (_CONSTANT * whole_s, _LINEAR * whole_s / _WHOLE, _SQUARE * whole_s / _WHOLE**2)
    models = {
        OpKind.PREFILL: LatencyModel("full", forward),
        OpKind.DECODE: LatencyModel("affine", (_DECODE_BASE * whole_s, _DECODE_PER_TOKEN * whole_s)),
        OpKind.TRAIN_FORWARD: LatencyModel("full", forward),
        OpKind.TRAIN_BACKWARD: LatencyModel("full", tuple(2.0 * value for value in forward)),
        OpKind.OPTIMIZER_STEP: LatencyModel("constant", (0.0,)),
    }
    return NodeLatency((models,) * run.stages)


def figures(run: Run, result: SimulationResult) -> dict[str, Any]:
    """What happened to first tokens, what was predicted of them, and how much prefill was saved."""
    answered = [
        (record, record.first_token_s - record.work.arrival_s)
        for record in result.requests()
        if record.first_token_s is not None
    ]
    ttfts_s = sorted(ttft_s for _, ttft_s in answered)
    errors = ttft_errors(result) if run.policy == SUBJECT else []  # LeMix alone predicts it
    saved_tokens = sum(record.cached_tokens for record, _ in answered)
    prompt_tokens = sum(record.work.prompt_tokens for record, _ in answered if isinstance(record.work, Request))
    return {
        "kind": "chat" if run.simulation is chat else "agent",
        "num_sessions": run.num_tasks,
        # Of the endless training there is always something left.
        "n_tasks": len(list(result.requests())),
        "n_ok": sum(record.ok for record in result.requests()),
        "ttft_p50_s": quantile(ttfts_s, 0.5),
        "ttft_p95_s": quantile(ttfts_s, 0.95),
        "ttft_error_mean": statistics.fmean(errors) if errors else None,
        "ttft_error_median": statistics.median(errors) if errors else None,
        "saved_tokens": saved_tokens,
        "saved_share": saved_tokens / max(1, prompt_tokens),
    }


# ------------------------------------------------------------------------- the comparison


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Every kind, rate and variant over the seeds."""
    cells = [
        {"kind": kind, "rate": rate, "label": label}
        | {column.key: over_seeds(row[column.key] for row in group) for column in _COLUMNS}
        for (kind, rate, label), group in grouped(rows, lambda row: (row["kind"], row["rate"], row["label"])).items()
    ]
    by_label = grouped(rows, lambda row: row["label"])
    found = {
        "seeds": {label: len({row["seed"] for row in group}) for label, group in by_label.items()},
        "sessions_per_run": max(row["num_sessions"] for row in rows),
        "kv_tokens": KV_TOKENS,
        "kept_tokens": KEPT_TOKENS,
        "rows": sorted(cells, key=lambda cell: (list(RATES).index(cell["kind"]), cell["rate"])),
    }
    return {NAME: found, "claims": _claims(rows)}


def _mean(rows: Sequence[Row], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return statistics.fmean(values) if values else None


def _claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    by_run = grouped(rows, lambda row: (row["label"], row["seed"]))
    pairs = [(by_run[SUBJECT, seed], by_run[WITHOUT, seed]) for label, seed in by_run if label == SUBJECT]

    def over(key: str) -> list[float | None]:
        return [_over(_mean(aware, key), _mean(unaware, key)) for aware, unaware in pairs]

    points = [
        100.0 * ((_mean(aware, "slo_attainment") or 0.0) - (_mean(unaware, "slo_attainment") or 0.0))
        for aware, unaware in pairs
    ]
    return [
        judged(
            "sessions_prediction",
            "lemix: mean error of the predicted TTFT of dependent requests, with sessions over without",
            f"{NAME}.ttft_error_mean",
            over("ttft_error_mean"),
            0.5,
            "{:.2f}×",
            at_least=False,
        ),
        judged(
            "sessions_saved",
            "lemix: prefill saved by kept KV caches, with sessions over without",
            f"{NAME}.saved_share",
            over("saved_share"),
            1.1,
            "{:.2f}×",
        ),
        judged(
            "sessions_attainment",
            "lemix: SLO attainment of dependent requests, with sessions minus without",
            f"{NAME}.slo_attainment",
            points,
            0.0,
            "{:+.1f} points",
        ),
    ]


def _over(mine: float | None, other: float | None) -> float | None:
    return mine / other if mine is not None and other else None


def tables(summary: Mapping[str, Any]) -> list[Shown]:
    """One per kind: medians over the seeds."""
    found = summary[NAME]
    shown = []
    for kind in RATES:
        rows = [
            (f"{row['rate']:g}", row["label"], *(_cell(row[column.key], column.form) for column in _COLUMNS))
            for row in found["rows"]
            if row["kind"] == kind
        ]
        title = f"Sessions, {kind} · {found['sessions_per_run']:,} sessions per run, {_seeds(found['seeds'])}"
        shown.append(Shown(title, ("per s", "", *(column.title for column in _COLUMNS)), rows))
    return shown


def _seeds(of: Mapping[str, int]) -> str:
    """How many, in words; fewer for the policies that no claim is about."""
    most = max(of.values())
    fewer = [label for label, number in of.items() if number < most]
    return count(most, "seed") + (f" (first only: {', '.join(fewer)})" if fewer else "")


def _cell(figure: Mapping[str, float] | None, form: Callable[[float], str]) -> str:
    return "–" if figure is None else form(figure["median"])


def sections(config: PaperConfig, summary: Mapping[str, Any]) -> list[str]:
    """Panels over the rate and a table, per kind."""
    del config
    found = summary[NAME]
    labels = list(dict.fromkeys(row["label"] for row in found["rows"]))
    parts = []
    for kind, shown in zip(RATES, tables(summary), strict=True):
        own = [row for row in found["rows"] if row["kind"] == kind]
        items = [
            Panel(f"{kind}: {title}", "sessions per second", [_series(label, own, key) for label in labels], form)
            for title, key, form in (
                ("SLO attainment", "slo_attainment", "{:.0%}".format),
                ("TTFT p95, s", "ttft_p95_s", "{:.1f}".format),
                ("prefill saved", "saved_share", "{:.0%}".format),
            )
        ]
        parts.append(f'<div class="figure">{panels(items, f"Sessions, {kind}")}</div>{captioned(shown)}')
    return [
        "<h2>Sessions</h2><p>A turn arrives when the one before it has been answered and thought about; its prompt is "
        f"all that was said and something new. Nodes keep up to {KEPT_TOKENS:,} of their {KV_TOKENS:,} tokens of KV "
        "cache for sessions between two turns, whatever the policy. A fifth of the tasks trains. A prompt of "
        f"{_WHOLE:,} tokens takes {MEAN_FORWARD_S:g} s per stage; first tokens are promised within 1 s, further ones "
        "within 0.1 s; p50 and p95 are of the time to first token. The error, mean and median, is that of the time "
        "predicted at placement, as a share of what it came to; saved are prompt tokens found in a kept KV cache; held "
        "is the time of all nodes together. Without sessions lemix takes turns for requests like any other.</p>"
        + legend((label, _color(label)) for label in labels)
        + "".join(parts)
    ]


def _series(label: str, rows: Sequence[Row], key: str) -> Series:
    points = [(row["rate"], row[key]) for row in rows if row["label"] == label]
    return Series(label, _color(label), [(rate, v["low"], v["median"], v["high"]) for rate, v in points])


def _color(label: str) -> str:
    return "#888888" if label == WITHOUT else policy_color(policy_of(label))


SESSIONS = Family(NAME, runs, summarise, tables, sections)
