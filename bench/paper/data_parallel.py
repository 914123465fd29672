"""The same devices as nodes of one stage each."""

from dataclasses import replace

from bench.paper.config import PaperConfig
from bench.paper.family import Labelled
from bench.paper.scenario import NODES, STAGES
from bench.paper.variants import everywhere, side_by_side

_DEVICES = NODES * STAGES


def runs(config: PaperConfig) -> list[Labelled]:
    """Every policy of the grid. A device runs the whole model, so its forward takes what a node's stages took."""
    points = replace(config, axis_forward_s=config.axis_forward_s * STAGES).axis_points()
    return [
        labelled
        for policy in config.policies
        for labelled in everywhere(
            policy, points, config.first_seed, config.num_tasks, policy, nodes=_DEVICES, stages=1
        )
    ]


DATA_PARALLEL = side_by_side(
    "data_parallel",
    "Data parallelism",
    f"The same {_DEVICES} devices as {_DEVICES} nodes of one stage with the whole model. A forward takes as long as on "
    "all stages of a node of the grid, so the promise is the same.",
    runs,
)
