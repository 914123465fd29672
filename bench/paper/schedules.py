"""Asynchronous and synchronous pipeline training: A-PP, GPipe and 1F1B."""

from bench.paper.config import BASELINE, SUBJECT, PaperConfig
from bench.paper.family import Labelled
from bench.paper.variants import everywhere, side_by_side

POLICIES = (BASELINE, "round_robin", "paper_additive", SUBJECT)
SCHEDULES = ("async", "gpipe", "1f1b")
#: Micro-batches per optimizer step: a mini-batch of the synchronous schedules.
ACCUMULATION = 4


def runs(config: PaperConfig) -> list[Labelled]:
    """Every policy under every schedule; a plain name is A-PP."""
    points, seeds, num_tasks = config.axis_points(), config.first_seed, config.num_tasks
    return [
        labelled
        for policy in POLICIES
        for schedule in SCHEDULES
        for labelled in everywhere(
            policy if schedule == "async" else f"{policy}, {schedule}",
            points,
            seeds,
            num_tasks,
            policy,
            accumulation=ACCUMULATION,
            node=(("training_schedule", schedule),),
        )
    ]


SCHEDULES_FAMILY = side_by_side(
    "schedules",
    "Pipeline schedules",
    f"Asynchronous training (A-PP, the plain names) and synchronous (S-PP: GPipe and 1F1B) with {ACCUMULATION} "
    "micro-batches per optimizer step. With S-PP the next mini-batch leaves for a node when the step of the one before "
    "has ended; one that gets no further micro-batch for a second is trained as it is.",
    runs,
)
