"""The scheduler core over real node cores, under every policy, whatever happens in whatever order.

`live_cluster` checks every command; here is what happens, and what must be left at the end.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from services.scheduler.core.config import CoreConfig, SyncChoice
from services.scheduler.core.events import SnapshotReady, SyncIntervalSet, TaskEnded
from services.scheduler.core.policies import POLICIES
from services.scheduler.core.policies.base import TrainingPlacement
from services.scheduler.core.policies.round_robin import RoundRobin
from services.scheduler.core.state import Cluster, LiveTraining, NodeState
from services.scheduler.core.tasks import SloTarget
from services.simulator.types import Microbatch, Request
from tests.simulation.live_cluster import LiveCluster, virtual_node

NODE_IDS = ("a", "b", "c")
JOBS = ("j", "k")
#: Long enough for anything these machines can hold: all of it takes a few seconds.
DRAIN_S = 120.0


class ClusterMachine(RuleBasedStateMachine):
    """What happens to a cluster. Subclasses name the policy."""

    policy = "lemix"
    options: Mapping[str, str] = {}

    def __init__(self) -> None:
        super().__init__()
        self.next_id = 0

    @initialize(
        ttft_s=st.sampled_from([None, 0.02, 0.3]),
        max_hold_back_s=st.sampled_from([0.0, 0.5, 2.0]),
        sync=st.sampled_from(SyncChoice),
        sync_every_steps=st.sampled_from([0, 1, 1, 2]),
        max_inflight_training=st.integers(1, 3),
        num_nodes=st.integers(0, 3),
        num_stages=st.integers(1, 2),
    )
    def start(self, ttft_s: float | None, num_nodes: int, num_stages: int, **knobs: Any) -> None:
        promise = SloTarget(ttft_s=ttft_s)
        config = CoreConfig(
            policy=self.policy,
            policy_options=dict(self.options),
            default_slo=promise,
            max_waiting_inference=6,
            max_waiting_training=8,
            sync_timeout_s=5.0,
            **knobs,
        )
        self.cluster = LiveCluster(config)
        for node_id in NODE_IDS[:num_nodes]:
            self.cluster.join(virtual_node(node_id, num_stages))

    # ------------------------------------------------------------- nodes

    @rule(
        node_id=st.sampled_from(NODE_IDS),
        num_stages=st.integers(1, 3),
        slowdown=st.sampled_from([1.0, 4.0]),
        handling=st.sampled_from(["drain", "stash"]),
        buffers=st.integers(1, 2),
        room=st.sampled_from([60, 400]),
        inflight=st.integers(1, 3),
        parts=st.sampled_from([1, 4]),
    )
    def join(self, node_id: str, num_stages: int, slowdown: float, handling: str, buffers: int, **bounds: int) -> None:
        """A node joins, comes back, or says hello again with another profile."""
        node = virtual_node(
            node_id,
            num_stages,
            slowdown=slowdown,
            weight_handling=handling,
            gradient_buffers=buffers,
            kv_capacity_tokens=bounds["room"],
            max_inflight_inference=bounds["inflight"],
            max_training_parts=bounds["parts"],
        )
        self.cluster.join(node)

    @precondition(lambda self: self.cluster.lives)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.cluster.lose(data.draw(st.sampled_from(sorted(self.cluster.lives))))

    # ------------------------------------------------------------- work

    @rule(
        num=st.integers(1, 3),
        prompt=st.sampled_from([1, 40, 300]),
        output=st.sampled_from([1, 2, 20]),
        slack=st.sampled_from([0, 60]),
        twice=st.booleans(),
    )
    def request(self, num: int, prompt: int, output: int, slack: int, twice: bool) -> None:
        for _ in range(num):
            self.next_id += 1
            now_s = self.cluster.now_s
            self.cluster.arrive(Request(f"r{self.next_id}", now_s, prompt, output, output + slack), twice=twice)

    @rule(
        num=st.integers(1, 3),
        job=st.sampled_from(JOBS),
        length=st.sampled_from([16, 2000]),
        accumulation=st.integers(1, 3),
        twice=st.booleans(),
    )
    def train(self, num: int, job: str, length: int, accumulation: int, twice: bool) -> None:
        for _ in range(num):
            self.next_id += 1
            batch = Microbatch(f"m{self.next_id}", self.cluster.now_s, job, 1, length, accumulation)
            self.cluster.arrive(batch, twice=twice)

    @precondition(lambda self: self.cluster.tasks)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.cluster.cancel(data.draw(st.sampled_from(sorted(self.cluster.tasks))))

    # ------------------------------------------------------------- time and messages

    @rule(seconds=st.sampled_from([0.003, 0.05, 0.5, 3.0]))
    def wait(self, seconds: float) -> None:
        self.cluster.run(seconds)

    @rule(num=st.sampled_from([1, 3, 1000]))
    def delay_or_deliver_reports(self, num: int) -> None:
        if self.cluster.is_delaying:
            self.cluster.deliver(num)
        else:
            self.cluster.is_delaying = True

    @precondition(lambda self: self.cluster.told)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """A report comes again, perhaps long after."""
        self.cluster.tell(self.cluster.told[data.draw(st.integers(0, len(self.cluster.told) - 1))])

    @precondition(lambda self: self.cluster.holder)
    @rule(data=st.data(), node_id=st.sampled_from(NODE_IDS), ok=st.booleans())
    def end_told_by_another_node(self, data: st.DataObject, node_id: str, ok: bool) -> None:
        """A node that had a task before it was lost speaks up again; now another one has it, or none."""
        task_id = data.draw(st.sampled_from(sorted(self.cluster.holder)))
        if self.cluster.holder[task_id] != node_id:
            self.cluster.tell(TaskEnded(task_id, node_id, ok))

    @rule(what=st.sampled_from(["restart", "interval", *JOBS]), steps=st.integers(0, 2))
    def rarely(self, what: str, steps: int) -> None:
        """Another scheduler takes over, another interval of synchronisation, a job is cancelled."""
        if what == "restart":
            self.cluster.restart()
        elif what == "interval":
            self.cluster.tell(SyncIntervalSet(steps))
        else:
            self.cluster.cancel_job(what)

    # ------------------------------------------------------------- checks

    @invariant()
    def core_knows_what_is_live(self) -> None:
        core = self.cluster.cores[0]
        assert set(core._cluster.tasks) == set(self.cluster.tasks)
        snapshot = core.snapshot()
        assert {node.node_id for node in snapshot.nodes} == set(self.cluster.lives)
        num_held = sum(bool(node_id) for node_id in self.cluster.holder.values())
        assert sum(node.inflight_inference + node.inflight_training for node in snapshot.nodes) == num_held
        assert snapshot.waiting_inference + snapshot.waiting_training == len(self.cluster.tasks) - num_held

    def teardown(self) -> None:
        """Everything that was accepted comes to its one end, and the core remembers none of it."""
        if not hasattr(self, "cluster"):
            return
        cluster = self.cluster
        cluster.deliver()
        if not cluster.lives:
            cluster.join(virtual_node("a"))
        cluster.run(DRAIN_S)
        assert cluster.is_idle, f"left: {cluster.holder}"
        assert len(cluster.ends) == self.next_id
        assert all(life.node.core.tasks() == () for life in cluster.lives.values())


class Refuses(RoundRobin):
    """Says no to every micro-batch, also when it must not, and never says when to ask again."""

    def place_training(
        self, now_s: float, live: LiveTraining, candidates: Sequence[NodeState], cluster: Cluster, *, may_hold: bool
    ) -> TrainingPlacement:
        return TrainingPlacement(None, held_back=candidates)


class RefusesInSilence(RoundRobin):
    """The same, and names no node that it holds back."""

    def place_training(
        self, now_s: float, live: LiveTraining, candidates: Sequence[NodeState], cluster: Cluster, *, may_hold: bool
    ) -> TrainingPlacement:
        return TrainingPlacement(None)


def play(policy: str, max_examples: int, options: Mapping[str, str] = MappingProxyType({})) -> None:
    machine = type(f"Machine_{policy}", (ClusterMachine,), {"policy": policy, "options": options})
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=max_examples, stateful_step_count=50, deadline=None, derandomize=True),
    )


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_whatever_happens_the_rules_hold(policy: str) -> None:
    play(policy, 60)


def test_whatever_happens_the_rules_hold_with_nodes_run_ahead() -> None:
    play("lemix", 60, {"forecast": "fast_forward"})


@pytest.mark.parametrize("stubborn", [Refuses, RefusesInSilence])
def test_the_starvation_bound_holds_against_a_policy_that_refuses(
    stubborn: type[RoundRobin], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POLICIES, "stubborn", stubborn)
    play("stubborn", 40)


def test_a_round_of_synchronisation_goes_on_without_a_node_that_was_lost() -> None:
    cluster = LiveCluster(CoreConfig(policy="round_robin", sync_every_steps=1, sync_timeout_s=50.0))
    for node_id in NODE_IDS:
        cluster.join(virtual_node(node_id))
    cluster.arrive(Microbatch("m", 0.0, "j", 1, 16))
    while not cluster.cores[0].snapshot().sync_id:
        cluster.run(0.001)
    cluster.is_delaying = True
    cluster.run(1.0)
    ready = [index for index, event in enumerate(cluster.delayed) if isinstance(event, SnapshotReady)]
    assert len(ready) == 3
    first = cluster.delayed[ready[0]]
    assert isinstance(first, SnapshotReady)
    cluster.deliver(ready[0] + 1)
    cluster.lose(first.node_id)
    # `live_cluster` checks that nobody is told to fetch from the lost node, or the lost node to fetch.
    cluster.deliver()
    cluster.run(1.0)
    assert cluster.cores[0].snapshot().sync_id == "", "over, long before its timeout"
