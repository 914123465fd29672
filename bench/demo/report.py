"""The page for people: one HTML file without any outside resource."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.demo import figures
from bench.demo.records import RunRecord
from bench.demo.svg import legend, text
from bench.demo.table import COLUMNS, cell

_STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1c2329;--soft:#5b6770;--edge:#dfe3e6;--track:#eceff1;
--good:#14784f;--bad:#b3372b;--unsure:#8a6100;--mark:#b3372b;--band:#00000010}
@media (prefers-color-scheme:dark){:root{--bg:#14181b;--card:#1c2226;--ink:#e6eaed;--soft:#9aa6ae;--edge:#333c42;
--track:#2a3238;--good:#5fce9b;--bad:#f08a7d;--unsure:#e0b252;--mark:#f08a7d;--band:#ffffff14}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1140px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;margin:0 0 6px}h2{font-size:19px;margin:38px 0 4px}
p{margin:4px 0 10px;max-width:78ch}.soft{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:12px;margin:18px 0 8px}
.tile{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:12px 14px}
.tile b{display:block;font-size:25px;line-height:1.25}.tile span{font-size:13px;color:var(--soft);display:block}
.chip{display:inline-block!important;font-weight:600;font-size:12px!important;border:1px solid;border-radius:99px;
padding:0 8px;margin-top:6px}.held{color:var(--good)!important}.missed{color:var(--bad)!important}
.unresolved{color:var(--unsure)!important}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--edge);border-radius:10px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 8px;text-align:right;border-bottom:1px solid var(--edge);white-space:nowrap}
th{font-weight:600;font-size:13px;color:var(--soft);vertical-align:bottom;white-space:normal}
th:first-child,td:first-child{text-align:left}tr:last-child td{border-bottom:0}
td small{display:block;color:var(--soft);font-size:11px;font-weight:400}td.best{font-weight:700}
.figure{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:14px;margin:8px 0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(380px,1fr));gap:12px}.pair .figure{margin:0}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font:12px system-ui,sans-serif;
paint-order:stroke;stroke:var(--card);stroke-width:3px}
svg .name{fill:var(--ink);font-size:12.5px}svg .strong{font-weight:600;fill:var(--ink)}
.grid{stroke:var(--edge)}.axis{stroke:var(--soft)}.line{fill:none;stroke-width:2;stroke-linejoin:round}
.marker{stroke:var(--mark);stroke-width:1.5;stroke-dasharray:4 3}.band{fill:var(--band)}.track{fill:var(--track)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;margin:0 0 8px;font-size:13px}
.key i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.warn{border-left:4px solid var(--bad);padding:6px 12px;background:var(--card)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;margin:8px 0}dt{color:var(--soft)}dd{margin:0}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:12px;
font-size:12.5px}
"""


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
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>LeMix demo</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


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
    return _notice("Something went wrong in this run", summary["problems"]) + _notice(
        "Take these figures with care", summary["warnings"]
    )


def _notice(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f'<div class="warn"><b>{title}:</b><ul>{items}</ul></div>'


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
            tiles += f'<div class="tile"><b>{_value(claim)}</b><span>{text(label)}</span>{_chip(claim)}</div>'
    return f'<div class="tiles">{tiles}</div>' if tiles else ""


def _value(claim: Mapping[str, Any], key: str = "median") -> str:
    return _claim_number(claim, claim[key])


def _claim_number(claim: Mapping[str, Any], value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:+.1f}" if claim["kind"] == "difference" else f"{value:.2f}×"


def _chip(claim: Mapping[str, Any]) -> str:
    limit = _claim_number(claim, claim["threshold"])
    words = {"held": "held", "missed": "missed", "unresolved": "unresolved"}[claim["verdict"]]
    return f'<span class="chip {claim["verdict"]}">{words}: {claim["direction"]} {limit}</span>'


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
    rows = "".join(
        f"<tr><td>{text(claim['claim'])}</td><td>{text(', '.join(_claim_number(claim, v) for v in claim['values']))}"
        f"</td><td>{_chip(claim)}</td></tr>"
        for claim in summary["claims"]
    )
    return (
        "<h2>Claims</h2><p>One value per repetition, both policies in the same repetition. <i>Unresolved</i>: the "
        "repetitions disagree. A single repetition shows a direction, not a spread.</p>"
        '<div class="scroll"><table><thead><tr><th>claim</th><th>ratio, or points</th><th>verdict</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _setup(summary: Mapping[str, Any]) -> str:
    workload, capacity = summary["workload"], summary["capacity"]
    facts = {
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
    items = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts.items())
    config = "\n".join(_flat("", summary["config"]))
    return (
        f"<h2>Set-up</h2><dl>{items}</dl><details><summary>Configuration</summary><pre>{text(config)}</pre></details>"
    )


def _flat(prefix: str, values: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, value in values.items():
        lines += _flat(f"{prefix}{key}.", value) if isinstance(value, Mapping) else [f"{prefix}{key} = {value}"]
    return lines
