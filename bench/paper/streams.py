"""What separate clusters get: a training stream per node, or one for the whole cluster as in the released code."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.paper.claims import judged
from bench.paper.config import BASELINE, SUBJECT, PaperConfig
from bench.paper.family import Family, Labelled, Row, Shown
from bench.paper.variants import compared, comparison, everywhere, section

NAME = "streams"
KEY = "vs_separate_streams"
PER_NODE, ONE = "separate, a stream per node", "separate, one stream"
_GOALS = {PER_NODE: 1.3, ONE: 1.7}


def runs(config: PaperConfig) -> list[Labelled]:
    """The grid's policies on the whole grid, and separate clusters with one stream."""
    kinds: list[tuple[str, str, tuple[tuple[str, bool], ...]]] = [
        (policy, policy, ()) for policy in config.policies if policy != BASELINE
    ]
    kinds += [(PER_NODE, BASELINE, ()), (ONE, BASELINE, (("one_stream", True),))]
    return [
        labelled
        for label, policy, options in kinds
        for labelled in everywhere(label, config.points(), config.seeds, config.num_tasks, policy, options=options)
    ]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The same comparison against either kind."""
    found: dict[str, Any] = {}
    claims = []
    for kind, goal in _GOALS.items():
        relabelled = [{**row, "label": BASELINE if row["label"] == kind else row["label"]} for row in rows]
        found[kind], repetitions = compared(relabelled)
        if SUBJECT in repetitions:
            values = [figures["throughput_ratio"]["geomean"] for figures in repetitions[SUBJECT]]
            name = "stream_per_node" if kind == PER_NODE else "one_stream"
            text = f"tasks per held node-second over {kind}, geometric mean of all points"
            metric = f"{KEY}.{kind}.policies.lemix.throughput_ratio.geomean"
            claims.append(judged(name, text, metric, values, goal, "{:.2f}×"))
    return {KEY: found, "claims": claims}


def tables(summary: Mapping[str, Any]) -> list[Shown]:
    """One per kind."""
    return [comparison(f"Against {kind}", found) for kind, found in summary[KEY].items()]


def sections(config: PaperConfig, summary: Mapping[str, Any]) -> list[str]:
    """Bars and table per kind."""
    del config
    words = {
        PER_NODE: "The baseline of every other section: each training node takes micro-batches as fast as it can.",
        ONE: "As in the released code: the next micro-batch starts anywhere when the forward of the one before has "
        "left its first stage.",
    }
    return [section(f"Against {kind}", words[kind], found) for kind, found in summary[KEY].items()]


STREAMS = Family(NAME, runs, summarise, tables, sections)
