"""Placement policies and their registry. A policy is one small pure class; see `base.Policy`."""

from collections.abc import Callable

from services.scheduler.core.policies.base import Observer, Options, Policy, TrainingPlacement
from services.scheduler.core.policies.least import LeastLoaded, LeastUtilised
from services.scheduler.core.policies.lemix import LeMix
from services.scheduler.core.policies.paper import PaperAdditive, PaperRatio
from services.scheduler.core.policies.paper_released import PaperReleased
from services.scheduler.core.policies.queue_work import QueueWork
from services.scheduler.core.policies.round_robin import RoundRobin
from services.scheduler.core.policies.separate import Separate
from services.scheduler.core.policies.separate_dynamic import SeparateDynamic
from services.scheduler.core.policies.uniform import Random

__all__ = ["POLICIES", "Observer", "Policy", "TrainingPlacement", "create"]

#: Name -> class.
POLICIES: dict[str, Callable[[Options], Policy]] = {
    "least_loaded": LeastLoaded,
    "least_utilised": LeastUtilised,
    "lemix": LeMix,
    "paper_additive": PaperAdditive,
    "paper_ratio": PaperRatio,
    "paper_released": PaperReleased,
    "queue_work": QueueWork,
    "random": Random,
    "round_robin": RoundRobin,
    "separate": Separate,
    "separate_dynamic": SeparateDynamic,
}


def create(name: str, options: Options) -> Policy:
    """Build a policy. Raises ValueError for an unknown name or option, naming it and what is known."""
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(sorted(POLICIES))}")
    return POLICIES[name](options)
