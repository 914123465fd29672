"""The page for people: one HTML file without any outside resource."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.demo import figures
from bench.demo.records import RunRecord
from bench.demo.table import COLUMNS
from bench.demo.verdict import limit, meaning
from bench.report.table import cell
from services.charts.page import chip, configuration, document, facts, notice, table, tile
from services.charts.svg import legend, text


def render(summary: Mapping[str, Any], runs: Sequence[RunRecord]) -> str:
    """The whole page. `runs` are the records of the first repetition, in the order of the policies."""
    parts = [
        _header(summary),
        _problems(summary),
        _tiles(summary),
        _table(summary),
        _responses(summary, runs),
        _loss(summary, runs),
        _timelines(summary, runs),
        _usage(summary, runs),
        _claims(summary),
        _setup(summary),
    ]
    return document("LeMix demo", parts)


def _header(summary: Mapping[str, Any]) -> str:
    workload, cluster = summary["workload"], summary["config"]["cluster"]
    nodes = f"{cluster['nodes']} nodes × {cluster['stages']} pipeline stage{'s' if cluster['stages'] > 1 else ''}"
    return (
        "<h1>Serving a language model while training it</h1>"
        f"<p>{nodes} answer requests and train the same model at the same time. Every policy gets the same "
        f"{workload['requests']} requests over {workload['seconds']:g} s, the same training text and the same initial "
        f"weights. At {workload['drift_s']:g} s both prompts and training text switch from Python's documentation to "
        "source code: weights that are not trained on go stale.</p>"
        f'<p class="soft">{text(summary["started_at"])} · {text(summary["machine"]["cpu"])}, '
        f"{summary['machine']['cores']} cores · commit {text(summary['git_commit'])} · "
        f"{summary['repetitions']} repetition{'s' if summary['repetitions'] > 1 else ''}</p>"
    )


def _problems(summary: Mapping[str, Any]) -> str:
    return notice("Something went wrong in this run", summary["problems"]) + notice(
        "Take these figures with care", summary["warnings"]
    )


_TILES = (
    ("throughput", "tasks per held node-second, lemix / separate"),
    ("attainment", "points of SLO attainment, lemix − separate"),
    ("loss_after_drift", "inference loss after the drift, lemix / separate"),
    ("training", "trained tokens per second, lemix / separate"),
)


def _tiles(summary: Mapping[str, Any]) -> str:
    claims = {claim["name"]: claim for claim in summary["claims"]}
    tiles = ""
    for name, label in _TILES:
        claim = claims.get(name)
        if claim is not None:
            tiles += tile(_claim_number(claim, claim["median"]), label, _chip(claim))
    return f'<div class="tiles">{tiles}</div>' if tiles else ""


def _claim_number(claim: Mapping[str, Any], value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:+.1f}" if claim["kind"] == "difference" else f"{value:.2f}×"


def _chip(claim: Mapping[str, Any]) -> str:
    return chip(claim["verdict"], claim["reason"] or limit(claim))


def _table(summary: Mapping[str, Any]) -> str:
    policies = summary["policies"]
    head = "".join(f'<th title="{text(column.help)}">{text(column.title)}</th>' for column in COLUMNS)
    best = [column.best(policies) for column in COLUMNS]
    rows = ""
    for name, metrics in policies.items():
        cells = ""
        for column, winner in zip(COLUMNS, best, strict=True):
            low_high = cell(column, summary["spread"].get(name, {})) if summary["repetitions"] > 1 else ""
            extra = f"<small>{text(low_high)}</small>" if low_high else ""
            cells += f"<td{' class=best' if name == winner else ''}>{text(cell(column, metrics))}{extra}</td>"
        rows += f"<tr><td>{text(name)}</td>{cells}</tr>"
    slo = summary["slo"]
    note = "Medians over the repetitions, with min – max below. " if summary["repetitions"] > 1 else ""
    return (
        f"<h2>Results</h2><p>SLO: first token within {slo['ttft_ms']:.0f} ms and at most {slo['tpot_ms']:.1f} ms per "
        f"further token ({summary['config']['slo_units']:g} times what an idle node needs for the mean request, fixed "
        f"before the first policy ran). Failed and rejected requests count as misses. {note}Bold: best.</p>"
        f'<div class="scroll"><table><thead><tr><th>policy</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _responses(summary: Mapping[str, Any], runs: Sequence[RunRecord]) -> str:
    first = figures.response_cdf(
        runs, lambda item: item.ttft_s, summary["slo"]["ttft_ms"], "time to first token (TTFT)"
    )
    further = figures.response_cdf(
        runs, lambda item: item.tpot_s, summary["slo"]["tpot_ms"], "time per further token (TPOT)"
    )
    return (
        "<h2>Response times</h2><p>Share of all requests answered within a time: the further left and up, the better; "
        "right of the dashed line the promise is broken.</p>"
        f'{figures.policy_legend(runs)}<div class="pair"><div class="figure">{first}</div>'
        f'<div class="figure">{further}</div></div>'
    )


def _loss(summary: Mapping[str, Any], runs: Sequence[RunRecord]) -> str:
    burst_s = summary["workload"]["burst_s"]
    parts = [figures.loss_over_time(runs, burst_s)]
    if len(runs) > 1:
        parts.append(figures.loss_against(runs, runs[0], burst_s))
    return (
        "<h2>Loss of what is served</h2><p>How well the serving weights predict the true continuation of each prompt, "
        "measured while the prompt is served. It goes up and down with how hard the prompts are, for all policies "
        "alike; the second chart takes that out. After the drift it falls where training reaches the serving "
        f"weights.</p>{figures.policy_legend(runs)}" + "".join(f'<div class="figure">{part}</div>' for part in parts)
    )


def _timelines(summary: Mapping[str, Any], runs: Sequence[RunRecord]) -> str:
    drift_s = summary["workload"]["drift_s"]
    windows = [("around the drift", (drift_s - 1.0, drift_s + 2.0), (drift_s, "drift"))]
    burst_s = summary["workload"]["burst_s"]
    if burst_s is not None:
        windows.insert(0, ("at the start of the burst", (burst_s[0] - 1.0, burst_s[0] + 2.0), (burst_s[0], "burst")))
    parts = "".join(
        f'<p><b>Three seconds {name}</b></p><div class="figure">{figures.timeline(runs, *window, marker)}</div>'
        for name, window, marker in windows
    )
    return (
        "<h2>What every stage did</h2><p>One row per node/stage. Blue serves, orange trains; the background is idle "
        f"time.</p>{figures.op_legend()}{parts}"
    )


def _usage(summary: Mapping[str, Any], runs: Sequence[RunRecord]) -> str:
    shares = {name: metrics["cpu_share"] for name, metrics in summary["policies"].items()}
    roles = dict.fromkeys(role for items in shares.values() for role in items)
    keys = [(role.replace("_", " "), figures.CPU_COLORS.get(role, "#9aa4ad")) for role in roles]
    return (
        "<h2>Where the time went</h2><p>Share of the run each stage spent on each operation.</p>"
        f'{figures.op_legend()}<div class="figure">{figures.utilisation_bars(runs)}</div>'
        f"<p>Share of the machine's {summary['machine']['cores']} cores by process. Everything runs on one machine, so "
        "the gateway, the scheduler and the client that sends the requests cost the nodes something, under every "
        f'policy alike.</p>{legend(keys)}<div class="figure">{figures.cpu_bars(shares)}</div>'
    )


def _claims(summary: Mapping[str, Any]) -> str:
    if not summary["claims"]:
        return ""
    rows = [
        (
            text(claim["claim"]),
            text(", ".join(_claim_number(claim, value) for value in claim["values"])),
            text(limit(claim)),
            _chip(claim),
        )
        for claim in summary["claims"]
    ]
    return (
        "<h2>Claims</h2><p>One value per repetition, both policies in the same repetition. "
        f"{text(meaning(summary['repetitions']))}</p>" + table(("claim", "ratio, or points", "limit", "verdict"), rows)
    )


def _setup(summary: Mapping[str, Any]) -> str:
    workload, capacity = summary["workload"], summary["capacity"]
    setup = {
        "model": summary["model"]["description"],
        "traffic": f"{workload['requests']} requests, {workload['mean_rate_rps']:.2f}/s on average, "
        f"{workload['prompt_tokens_mean']:.0f} prompt and {workload['output_tokens_mean']:.0f} output tokens on "
        f"average, open loop; {workload['description']}",
        "capacity of one node": f"{capacity['requests_per_s']:.1f} requests/s (by its profile "
        f"{capacity['profile_id']}: prefill {1000 * capacity['prefill_s']:.1f} ms, decode "
        f"{1000 * capacity['decode_s']:.2f} ms per token alone)",
        "training": summary["training"]["description"],
        "fairness": summary["fairness"],
        "took": f"{summary['seconds_total']:.0f} s in all",
    }
    return f"<h2>Set-up</h2>{facts(setup)}{configuration(summary['config'])}"
