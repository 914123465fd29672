"""What every registered policy promises, whatever happens."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.latency import OpKind
from services.scheduler.core.commands import Assign, Command
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import Event, NodeJoined, NodeLost, OpFinished, TaskArrived, TaskEnded, Tick
from services.scheduler.core.node_spec import NodeRole
from services.scheduler.core.policies import POLICIES, Policy, create
from services.scheduler.core.policies.base import Options, Placement, TrainingPlacement
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.core.state import Cluster, LiveInference, LiveTraining, NodeState
from services.scheduler.core.tasks import SloTarget
from tests.unit.scheduler_core.support import constant_latency, microbatch, node, request

NODES = ("a", "b", "c", "d")
MAX_NODES: Options = {"max_nodes": 2}
ABLATED: Options = {"profile": False, "hold_back": False}
VARIANTS: list[tuple[str, Options]] = [
    *((name, Options()) for name in sorted(POLICIES)),
    *((name, MAX_NODES) for name in ("least_loaded", "least_utilised", "queue_work", "random", "round_robin")),
    *((name, ABLATED) for name in ("paper_additive", "paper_ratio", "paper_released")),
    ("separate", {"serving_share": 0.8}),
    ("separate_dynamic", {"window_s": 1.0, "dwell_s": 0.5}),
]


class Checked:
    """Stands between the core and a policy's placements."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def place_inference(
        self, now_s: float, live: LiveInference, candidates: Sequence[NodeState], cluster: Cluster
    ) -> Placement:
        placement = self._policy.place_inference(now_s, live, candidates, cluster)
        assert any(placement.node is candidate for candidate in candidates)
        assert placement.node.role in (NodeRole.SERVE, NodeRole.BOTH)
        return placement

    def place_training(
        self, now_s: float, live: LiveTraining, candidates: Sequence[NodeState], cluster: Cluster, *, may_hold: bool
    ) -> TrainingPlacement:
        placement = self._policy.place_training(now_s, live, candidates, cluster, may_hold=may_hold)
        assert all(any(held is candidate for candidate in candidates) for held in placement.held_back)
        if placement.node is None:
            assert may_hold
            return placement
        assert any(placement.node is candidate for candidate in candidates)
        assert placement.node.role in (NodeRole.TRAIN, NodeRole.BOTH)
        return placement

    def __getattr__(self, name: str) -> object:
        return getattr(self._policy, name)


Step = tuple[str, int, float]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["join", "lose", "request", "request", "train", "train", "end", "end", "op", "tick"]),
        st.integers(0, 10),
        st.sampled_from([0.0, 0.01, 0.3, 2.0]),
    ),
    max_size=60,
)


def play(name: str, options: Options, steps: Sequence[Step]) -> list[list[Command]]:
    """Commands of a core under this policy; a loss, an end or an operation concerns what exists."""
    core = SchedulerCore(
        CoreConfig(
            policy=name,
            policy_options=options,
            default_slo=SloTarget(ttft_s=0.3, tpot_s=0.05),
            max_waiting_inference=8,
            max_waiting_training=8,
            max_inflight_training=2,
            max_hold_back_s=1.0,
        )
    )
    core._policy = Checked(core._policy)  # type: ignore[assignment]
    now_s = 0.0
    held: dict[str, str] = {}
    log = []
    for index, (kind, number, gap_s) in enumerate(steps):
        now_s += gap_s
        event = _event(kind, number, index, now_s, held)
        if isinstance(event, NodeLost):
            held = {task_id: node_id for task_id, node_id in held.items() if node_id != event.node_id}
        if isinstance(event, TaskEnded):
            del held[event.task_id]
        commands = core.step(now_s, event)
        held.update((command.task_id, command.node_id) for command in commands if isinstance(command, Assign))
        log.append(commands)
    return log


def _event(kind: str, number: int, index: int, now_s: float, held: dict[str, str]) -> Event:
    node_id = NODES[number % len(NODES)]
    task_id = sorted(held)[number % len(held)] if held else ""
    match kind:
        case "join":
            # The speed belongs to the id, the stages to the attempt: the same node may come back with others.
            latency = constant_latency(1 + number % 2, prefill=0.05 * (1 + NODES.index(node_id)))
            return NodeJoined(node(node_id, 1 + number % 2, latency=latency, max_inflight_inference=3))
        case "lose":
            return NodeLost(node_id)
        case "request":
            return TaskArrived(request(f"r{index}", arrival_s=now_s, prompt=1 + 30 * number, output=1 + number))
        case "train":
            return TaskArrived(microbatch(f"m{index}", arrival_s=now_s, length=1 + 50 * number))
        case "end" if held:
            return TaskEnded(task_id, held[task_id], ok=True, output_tokens=1 + number)
        case "op" if held:
            op = OpKind.PREFILL if task_id.startswith("r") else OpKind.TRAIN_BACKWARD
            return OpFinished(held[task_id], 0, op, now_s, now_s + 0.01 * number, (task_id,), 10, first_token=True)
    return Tick()


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@settings(deadline=None, max_examples=60)
@given(steps=STEPS)
def test_names_a_candidate_that_has_the_role_and_decides_the_same_again(
    name: str, options: Options, steps: list[Step]
) -> None:
    joined: list[Step] = [("join", 0, 0.0), ("join", 1, 0.0), ("join", 2, 0.0)]
    assert play(name, options, joined + steps) == play(name, options, joined + steps)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@given(num_nodes=st.integers(1, 9))
def test_every_cluster_can_serve_and_train(name: str, options: Options, num_nodes: int) -> None:
    node_ids = [f"n{index}" for index in range(num_nodes)]
    roles = create(name, options).roles(node_ids)
    assert set(roles) <= set(node_ids)
    assert set(roles.values()) & {NodeRole.SERVE, NodeRole.BOTH}
    assert set(roles.values()) & {NodeRole.TRAIN, NodeRole.BOTH}
