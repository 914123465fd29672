"""Placement policies and their registry. A policy is one small pure class; see `base.Policy`."""

from collections.abc import Callable

from services.scheduler.core.policies.base import Options, Policy
from services.scheduler.core.policies.lemix import LeMix
from services.scheduler.core.policies.paper import PaperAdditive
from services.scheduler.core.policies.round_robin import RoundRobin
from services.scheduler.core.policies.separate import Separate

__all__ = ["POLICIES", "Policy", "create"]

#: Name -> class.
POLICIES: dict[str, Callable[[Options], Policy]] = {
    "lemix": LeMix,
    "paper_additive": PaperAdditive,
    "round_robin": RoundRobin,
    "separate": Separate,
}


def create(name: str, options: Options) -> Policy:
    """Build a policy. Raises ValueError for an unknown name or option, naming it and what is known."""
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(sorted(POLICIES))}")
    return POLICIES[name](options)
