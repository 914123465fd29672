"""Every policy of the registry, and the paper's `+` variants: a baseline with no more nodes than LeMix used there."""

from collections.abc import Sequence
from typing import Any

from bench.paper.claims import judged, over_others
from bench.paper.config import ALL_POLICIES, SUBJECT, PaperConfig
from bench.paper.family import Labelled, Row
from bench.paper.scenario import NODES, Point, Run
from bench.paper.variants import Repetitions, everywhere, side_by_side

#: Policies that know `max_nodes`.
_LIMITED = ("round_robin", "random", "least_loaded", "least_utilised", "queue_work")


def runs(config: PaperConfig) -> list[Labelled]:
    """The registry."""
    return [
        labelled
        for policy in ALL_POLICIES
        for labelled in everywhere(policy, config.axis_points(), config.seeds, config.num_tasks, policy)
    ]


def with_fewer_nodes(config: PaperConfig, rows: Sequence[Row]) -> list[Labelled]:
    """The `+` variants."""
    return [
        Labelled(f"{policy}+", _limited(row, policy, config.num_tasks))
        for policy in _LIMITED
        for row in rows
        if row["label"] == SUBJECT
    ]


def _limited(row: Row, policy: str, num_tasks: int) -> Run:
    point = Point(row["rate"], row["training_share"], row["mean_forward_s"])
    # All nodes is what the policy has without the option, and simulated already.
    options = (("max_nodes", row["nodes_used"]),) if row["nodes_used"] < NODES else ()
    return Run(point, policy, row["seed"], num_tasks, options)


def claims(repetitions: Repetitions) -> list[dict[str, Any]]:
    """LeMix against the best of the registry."""
    others = [name for name in ALL_POLICIES if name != SUBJECT]
    path = ("attainment_weighted",)
    return [
        judged(
            "attainment_weighted_registry",
            "throughput weighted by attainment over the best other policy of the registry",
            "policies.policies.lemix.attainment_weighted",
            over_others(repetitions, path, others),
            1.0,
            "{:.2f}×",
        )
    ]


POLICIES = side_by_side(
    "policies",
    "Every policy",
    "Every policy of the registry against separate clusters. The + variants may use only as many nodes as lemix used "
    "at any time on the same input, as in the paper.",
    runs,
    then=with_fewer_nodes,
    claims=claims,
)
