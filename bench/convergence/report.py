"""The page for people: one HTML file without any outside resource."""

from collections.abc import Mapping, Sequence
from typing import Any

from services.charts import page
from services.charts.svg import Chart, legend, text

_COLORS = {
    "one_trainer": "#6b7780",
    "none": "#d3622a",
    "average_1": "#1b9e77",
    "average_10": "#1f6fb5",
    "average_100": "#7fb8e6",
    "checkpoint_100": "#a05cc0",
}
_SIZE = (540, 300)
_MARGINS = (26, 26, 40, 52)


def render(summary: Mapping[str, Any]) -> str:
    """The whole page."""
    counts = sorted({row["replicas"] for row in summary["results"]} - {1})
    parts = [
        _header(summary),
        _table(summary),
        _curves(summary, counts, "loss", "Held-out loss", "nats per token", _LOSS),
        _curves(summary, counts, "distance", "How far apart the weights are", "||w − mean|| / ||mean||", _DISTANCE),
        _curves(summary, counts, "kl", "How far apart the predictions are", "KL, nats per token", _KL),
        _claims(summary),
        _setup(summary),
    ]
    return page.document("LeMix: convergence", parts)


_LOSS = (
    "Mean over the replicas: what a request sees that may go to any of them. Medians of the seeds; the shade is their "
    "range. Dashed: one trainer that gets every example."
)
_DISTANCE = "Just before the round that is due, when replicas are furthest apart."
_KL = "Between the next-token predictions of two replicas on the held-out text, at the same times."


def _header(summary: Mapping[str, Any]) -> str:
    seeds = summary["seeds"]
    return (
        "<h1>Training replicas together and apart</h1>"
        f"<p>Replicas of one model share {summary['updates']:,} optimizer steps: every policy trains on the same "
        "examples in the same order, dealt out in turn. average(k) makes all replicas the mean of all after every k "
        "steps of each; checkpoint(k) lets one of them train and copies it to the others every k steps. Optimizer "
        "state stays where it is. Examples are equal, time is not: R replicas that train take 1/R of one trainer's. "
        "Steps, snapshots, means and loading run in the node agent's own code.</p>"
        f'<p class="soft">{text(summary["started_at"])} · {text(summary["machine"]["cpu"])}, '
        f"{summary['machine']['cores']} cores · commit {text(summary['git_commit'])} · "
        f"{seeds} seed{'s' if seeds > 1 else ''}</p>"
    )


def _table(summary: Mapping[str, Any]) -> str:
    rows = []
    for row in summary["results"]:
        values, extent = row["final"], row["spread"]
        low, high = extent["loss"]
        rows.append(
            [
                text(row["title"]),
                str(row["replicas"]),
                f"{values['loss']:.3f}<small>{low:.3f} – {high:.3f}</small>",
                f"{100 * (values['over_reference'] - 1):+.1f} %",
                f"{100 * (values['over_reference_in_time'] - 1):+.1f} %",
                f"{values['worst']:.3f}",
                f"{values['distance']:.4f}",
                f"{values['kl']:.4f}",
                f"{values['rounds']:,}",
            ]
        )
    head = (
        "policy",
        "replicas",
        "held-out loss",
        "over one trainer",
        "over one trainer in the same time",
        "worst replica",
        "distance of weights",
        "KL of predictions",
        "rounds",
    )
    return f"<h2>At the end</h2><p>Medians of the seeds, smallest – largest below.</p>{page.table(head, rows)}"


def _curves(summary: Mapping[str, Any], counts: Sequence[int], key: str, title: str, unit: str, note: str) -> str:
    rows = [row for row in summary["results"] if key == "loss" or row["replicas"] > 1]
    high = max(point["loss_high" if key == "loss" else key] for row in rows for point in row["curve"])
    low = min(point["loss_low"] for row in rows for point in row["curve"]) if key == "loss" else 0.0
    margin = 0.05 * (high - low) or 1.0
    figures = ""
    for count in counts:
        chart = Chart.plot(*_SIZE, (0.0, summary["updates"]), (max(0.0, low - margin), high + margin), margins=_MARGINS)
        chart.axes(f"updates, {count} replicas", unit)
        for row in rows:
            if row["replicas"] in (1, count):
                _draw(chart, row, key)
        figures += f'<div class="figure">{chart.render(f"{title}, {count} replicas")}</div>'
    names = {row["policy"]: row["title"] for row in rows}
    keys = legend((name, _COLORS[policy]) for policy, name in names.items())
    return f'<h2>{text(title)}</h2><p>{text(note)}</p>{keys}<div class="pair">{figures}</div>'


def _draw(chart: Chart, row: Mapping[str, Any], key: str) -> None:
    color = _COLORS[row["policy"]]
    if key == "loss":
        chart.area([(point["updates"], point["loss_low"], point["loss_high"]) for point in row["curve"]], color)
    chart.line([(point["updates"], point[key]) for point in row["curve"]], color, dashed=row["replicas"] == 1)


def _claims(summary: Mapping[str, Any]) -> str:
    if not summary["claims"]:
        return ""
    rows = [
        [
            text(claim["claim"]),
            " ".join(f"{value:.4f}" for value in claim["values"]),
            page.chip(claim["verdict"], "at most 1"),
        ]
        for claim in summary["claims"]
    ]
    return (
        "<h2>Claims</h2><p>Ratio of the final held-out losses, seed by seed; held or missed when all seeds agree.</p>"
        + page.table(("claim", "ratios", "verdict"), rows)
    )


def _setup(summary: Mapping[str, Any]) -> str:
    model = summary["model"]
    setup = {
        "model": f"Llama of {model['parameters'] / 1e6:.2f} M parameters, one token per byte, pre-trained on "
        f"documentation; held-out loss on source code before: {model['heldout_loss']['code']:.3f}",
        "text": summary["text"],
        "training": f"one piece of {summary['config']['piece_tokens']} tokens per AdamW step at "
        f"{summary['config']['learning_rate']:g}, the same for all policies",
        "took": f"{summary['seconds_total']:.0f} s in all",
    }
    return f"<h2>Set-up</h2>{page.facts(setup)}{page.configuration(summary['config'])}"
