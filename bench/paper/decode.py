"""Requests that decode, in batches."""

from bench.paper.config import PaperConfig
from bench.paper.family import Labelled
from bench.paper.scenario import DECODE, DECODE_BATCH, OUTPUTS
from bench.paper.table import COLUMNS
from bench.paper.variants import everywhere, side_by_side

#: The promise has two parts here, of which the worst response tells neither.
_COLUMNS = [column for column in COLUMNS if column.title != "worst SLOs"]


def runs(config: PaperConfig) -> list[Labelled]:
    """Every policy of the grid; few tasks, for each takes dozens of operations."""
    return [
        labelled
        for policy in config.policies
        for labelled in everywhere(policy, config.axis_points(), config.seeds, config.few_tasks, policy, mode=DECODE)
    ]


DECODING = side_by_side(
    "decode",
    "Decoding",
    f"Requests yield {OUTPUTS.shortest} to {OUTPUTS.longest} tokens, lognormal with mean 64, in batches of up to "
    f"{DECODE_BATCH}. An iteration takes a tenth of the mean forward, and more with its context. The promise holds for "
    "the first token (5 units) and for every further one (5 iterations). There is no clairvoyant bound for batches.",
    runs,
    columns=_COLUMNS,
)
