"""Read-only picture of the core for status calls and benchmarks."""

from dataclasses import dataclass

from services.scheduler.core.node_spec import NodeRole
from services.scheduler.core.state import Cluster


@dataclass(frozen=True, slots=True)
class NodeSnapshot:
    """One node. held_s: time held so far; the span runs from its first assignment to its last end (None: none yet)."""

    node_id: str
    num_stages: int
    role: NodeRole
    inflight_inference: int
    inflight_training: int
    weight_step: int
    held_s: float
    first_assigned_s: float | None
    last_ended_s: float | None
    #: Since when training that could go there has been held back; None: it is not.
    held_back_since_s: float | None


@dataclass(frozen=True, slots=True)
class CoreSnapshot:
    """The whole core. sync_id: the synchronisation that runs, "" if none."""

    policy: str
    nodes: tuple[NodeSnapshot, ...]
    waiting_inference: int
    waiting_training: int
    sync_id: str


def take_snapshot(policy: str, cluster: Cluster, now_s: float, sync_id: str) -> CoreSnapshot:
    """Picture of the cluster; nodes by id."""
    nodes = tuple(
        NodeSnapshot(
            node_id=node.node_id,
            num_stages=node.spec.num_stages,
            role=node.role,
            inflight_inference=len(node.inference),
            inflight_training=len(node.training),
            weight_step=node.weight_step,
            held_s=node.held.total_s(now_s),
            first_assigned_s=node.held.first_assigned_s,
            last_ended_s=node.held.last_ended_s,
            held_back_since_s=node.held_back_since_s,
        )
        for node in sorted(cluster.nodes.values(), key=lambda node: node.node_id)
    )
    return CoreSnapshot(policy, nodes, len(cluster.waiting_inference), len(cluster.waiting_training), sync_id)
