"""Rules of the baselines: separate clusters, random, least loaded, least utilised, queue and work."""

from collections import Counter
from itertools import pairwise

import pytest

from services.latency import OpKind
from services.scheduler.core import policies
from services.scheduler.core.commands import TakeSnapshot
from services.scheduler.core.events import NodeJoined, NodeLost, OpFinished, TaskArrived, TaskEnded, TaskRecovered, Tick
from services.scheduler.core.policies.recent import Recent
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.core.tasks import InferenceTask
from tests.unit.scheduler_core.support import (
    assigned,
    constant_latency,
    core_with,
    microbatch,
    node,
    request,
    step_ended,
)

MAX_NODES = ("least_loaded", "least_utilised", "queue_work", "random", "round_robin")


def roles(core: SchedulerCore) -> dict[str, str]:
    return {status.node_id: status.role.value for status in core.snapshot().nodes}


def place(core: SchedulerCore, now_s: float, task_id: str, *, output: int = 1) -> str:
    """Node a request goes to."""
    ((_, node_id),) = assigned(core.step(now_s, TaskArrived(request(task_id, arrival_s=now_s, output=output))))
    return node_id


def train(core: SchedulerCore, now_s: float, task_id: str) -> str:
    """Node a micro-batch goes to."""
    ((_, node_id),) = assigned(core.step(now_s, TaskArrived(microbatch(task_id))))
    return node_id


def ran(node_id: str, begin_s: float, end_s: float, stage: int = 0) -> OpFinished:
    """An operation of no task in particular."""
    return OpFinished(node_id, stage, OpKind.OPTIMIZER_STEP, begin_s, end_s)


# ----------------------------------------------------------------------------- recent


def test_recent_is_a_mean_at_first_and_forgets_later() -> None:
    recent = Recent(0.0, 10.0)
    assert recent.per_s(0.0) == 0.0
    for second in range(5):
        recent.add(second + 0.5, 2.0)
    assert recent.per_s(5.0) == pytest.approx(2.0, rel=0.01)
    assert recent.per_s(105.0) < 1e-3


def test_recent_takes_late_reports_at_their_own_time() -> None:
    one, two = Recent(0.0, 10.0), Recent(0.0, 10.0)
    for at_s in (1.0, 4.0):
        one.add(at_s, 1.0)
    for at_s in (4.0, 1.0):
        two.add(at_s, 1.0)
    assert one.per_s(6.0) == pytest.approx(two.per_s(6.0))


# ----------------------------------------------------------------------------- max_nodes


@pytest.mark.parametrize("name", MAX_NODES)
def test_max_nodes_uses_the_first_nodes_by_id_alone(name: str) -> None:
    core = core_with(*(node(node_id) for node_id in "cabd"), policy=name, policy_options={"max_nodes": 2})
    assert roles(core) == {"a": "both", "b": "both", "c": "unused", "d": "unused"}
    used = {place(core, 1.0, f"r{index}") for index in range(8)} | {train(core, 1.0, f"m{index}") for index in range(8)}
    assert used <= {"a", "b"}


def test_max_nodes_waits_for_a_used_node_and_replaces_a_lost_one() -> None:
    core = core_with(
        node("a", max_inflight_inference=1), node("b"), policy="round_robin", policy_options={"max_nodes": 1}
    )
    assert place(core, 1.0, "r0") == "a"
    assert assigned(core.step(1.0, TaskArrived(request("r1")))) == []
    assert sorted(assigned(core.step(2.0, NodeLost("a")))) == [("r0", "b"), ("r1", "b")]
    assert roles(core) == {"b": "both"}


def test_an_unused_node_takes_no_part_in_averaging() -> None:
    core = core_with(
        *(node(name) for name in "abc"), policy="random", policy_options={"max_nodes": 2}, sync_every_steps=1
    )
    commands = core.step(1.0, step_ended("a", 1.0))
    assert [command.node_id for command in commands if isinstance(command, TakeSnapshot)] == ["a", "b"]


# ----------------------------------------------------------------------------- separate


@pytest.mark.parametrize(
    ("share", "num_nodes", "serving"),
    [(0.0, 4, 1), (0.25, 4, 1), (0.5, 4, 2), (0.74, 4, 2), (0.75, 4, 3), (1.0, 4, 3), (0.29, 100, 29), (0.5, 3, 1)],
)
def test_separate_share(share: float, num_nodes: int, serving: int) -> None:
    policy = policies.create("separate", {"serving_share": share})
    values = list(policy.roles([f"{index:03d}" for index in range(num_nodes)]).values())
    assert values == ["serve"] * serving + ["train"] * (num_nodes - serving)


def dynamic(num_nodes: int = 4, **options: float) -> SchedulerCore:
    """Nodes whose requests take 0.1 s of their one stage."""
    return core_with(
        *(node(f"n{index}") for index in range(num_nodes)),
        policy="separate_dynamic",
        policy_options={"window_s": 5.0, "dwell_s": 5.0, **options},
    )


def arrive(core: SchedulerCore, from_s: float, to_s: float, per_s: int) -> None:
    """Requests at a steady rate that end at once."""
    for index in range(round((to_s - from_s) * per_s)):
        now_s = from_s + index / per_s
        task_id = f"r{now_s}"
        for _, node_id in assigned(core.step(now_s, TaskArrived(request(task_id, arrival_s=now_s)))):
            core.step(now_s, TaskEnded(task_id, node_id, ok=True, output_tokens=1))


def serving(core: SchedulerCore) -> int:
    return list(roles(core).values()).count("serve")


def test_dynamic_split_follows_the_load() -> None:
    core = dynamic()
    assert serving(core) == 2
    # 12 / s of 0.1 s fill 1.2 nodes: three at a utilisation of 0.5.
    arrive(core, 0.0, 11.0, 12)
    assert roles(core) == {"n0": "serve", "n1": "serve", "n2": "serve", "n3": "train"}
    arrive(core, 11.0, 40.0, 3)
    assert roles(core) == {"n0": "serve", "n1": "train", "n2": "train", "n3": "train"}


def test_dynamic_split_keeps_a_node_on_each_side() -> None:
    core = dynamic()
    arrive(core, 0.0, 11.0, 60)
    assert serving(core) == 3
    core.step(500.0, Tick())
    assert serving(core) == 1
    assert roles(dynamic(1)) == {"n0": "both"}


def test_dynamic_split_changes_no_more_often_than_its_dwell_time() -> None:
    core = dynamic()
    changed_s = []
    before = serving(core)
    for index in range(400):
        now_s = index * 0.1
        # The load jumps every second: without the dwell time the split would too.
        arrive(core, now_s, now_s + 0.1, 10 if index // 10 % 2 else 60)
        if serving(core) != before:
            before = serving(core)
            changed_s.append(now_s)
    assert changed_s
    assert all(later - sooner >= 5.0 - 0.1 for sooner, later in pairwise(changed_s))


def test_a_node_that_changes_its_role_finishes_what_it_holds() -> None:
    core = dynamic(2 + 2, utilisation=1.0)
    held = place(core, 0.0, "held")
    assert place(core, 0.0, "other") == "n1"
    arrive(core, 0.0, 11.0, 2)
    assert held == "n0"
    assert roles(core)["n1"] == "train"
    status = core.snapshot().nodes[1]
    assert status.inflight_inference == 1
    assert train(core, 12.0, "m") == "n1"
    core.step(13.0, TaskEnded("other", "n1", ok=True, output_tokens=1))
    assert core.snapshot().nodes[1].inflight_inference == 0


def test_dynamic_split_refuses_what_no_serving_node_can_run_any_more() -> None:
    nodes = [node("n0", max_context_tokens=200), node("n1", max_inflight_inference=1), node("n2"), node("n3")]
    core = core_with(*nodes, policy="separate_dynamic", policy_options={"window_s": 5.0, "dwell_s": 5.0})
    core.step(0.0, TaskArrived(request("big0", prompt=300)))
    core.step(0.0, TaskArrived(request("big1", prompt=300)))
    assert core.snapshot().waiting_inference == 1
    (rejected,) = core.step(500.0, Tick())
    assert serving(core) == 1
    assert getattr(rejected, "code", "") == "CONTEXT_LENGTH_EXCEEDED"


# ----------------------------------------------------------------------------- random


def test_random_draws_every_node_about_alike_and_again_with_the_same_seed() -> None:
    def draws(seed: int) -> list[str]:
        core = core_with(*(node(name) for name in "abc"), policy="random", policy_options={"seed": seed})
        placed = []
        for index in range(600):
            placed.append(place(core, 1.0, f"r{index}"))
            core.step(1.0, TaskEnded(f"r{index}", placed[-1], ok=True))
        return placed

    counts = Counter(draws(1))
    assert all(150 <= counts[name] <= 250 for name in "abc")
    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


# ----------------------------------------------------------------------------- least loaded, least utilised


def test_least_loaded_counts_requests_and_microbatches() -> None:
    core = core_with(*(node(name) for name in "abc"), policy="least_loaded")
    assert train(core, 1.0, "m0") == "a"
    assert [place(core, 1.0, f"r{index}") for index in range(3)] == ["b", "c", "a"]
    core.step(2.0, TaskEnded("r1", "c", ok=True))
    assert train(core, 2.0, "m1") == "c"


def test_least_utilised_takes_the_lowest_busy_share_of_the_stages() -> None:
    core = core_with(node("a"), node("b", 2), policy="least_utilised")
    core.step(4.0, ran("a", 1.0, 4.0))
    # Four seconds of the two stages are a share of 0.5, three of one stage are 0.75.
    for stage in (0, 1):
        core.step(4.0, ran("b", 2.0, 4.0, stage))
    assert place(core, 4.0, "r0") == "b"
    for stage in (0, 1):
        core.step(6.0, ran("b", 4.0, 6.0, stage))
    assert place(core, 6.0, "r1") == "a"


def test_least_utilised_forgets_what_is_long_past() -> None:
    core = core_with(node("a"), node("b"), policy="least_utilised")
    core.step(50.0, ran("a", 0.0, 50.0))
    assert place(core, 50.0, "r0") == "b"
    core.step(100.0, ran("b", 99.0, 100.0))
    assert place(core, 100.0, "r1") == "a"


def test_least_utilised_knows_nothing_of_a_lost_nodes_past() -> None:
    core = core_with(node("a"), node("b"), policy="least_utilised")
    core.step(5.0, ran("a", 0.0, 5.0))
    core.step(5.0, ran("b", 4.0, 5.0))
    core.step(6.0, NodeLost("a"))
    core.step(6.5, ran("a", 6.0, 6.5))
    core.step(7.0, NodeJoined(node("a")))
    assert place(core, 7.5, "r") == "a"


# ----------------------------------------------------------------------------- queue and work


def test_queue_work_multiplies_tasks_and_work() -> None:
    core = core_with(node("a"), node("b"), policy="queue_work")
    # A micro-batch is 0.2 + 0.4 s of work, a request 0.1 s.
    assert train(core, 1.0, "m") == "a"
    # (1 + 1) * (0.6 + 0.1) on "a" against n * n * 0.1 on "b", which is larger from the fourth on.
    assert [place(core, 1.0, f"r{index}") for index in range(4)] == ["b", "b", "b", "a"]
    (command,) = core.step(1.0, TaskArrived(request("r")))
    assert [terms.score for terms in command.terms] == pytest.approx([-3 * 0.8, -4 * 0.4])  # type: ignore[union-attr]


def test_queue_work_forgets_what_ended_and_what_was_lost() -> None:
    core = core_with(node("a"), node("b"), policy="queue_work")
    assert train(core, 1.0, "m") == "a"
    core.step(2.0, TaskEnded("m", "a", ok=True))
    assert train(core, 2.0, "m1") == "a"
    assert assigned(core.step(3.0, NodeLost("a"))) == [("m1", "b")]
    core.step(3.0, NodeJoined(node("a")))
    assert train(core, 3.0, "m2") == "a"


def test_queue_work_forgets_the_work_of_a_node_that_comes_back_with_other_stages() -> None:
    core = core_with(node("a"), policy="queue_work")
    assert train(core, 1.0, "m") == "a"
    core.step(2.0, TaskRecovered(InferenceTask("r", 0.0, 100, 1), "a"))
    assert sorted(assigned(core.step(2.0, NodeJoined(node("a", 2))))) == [("m", "a"), ("r", "a")]
    core.step(2.0, TaskEnded("m", "a", ok=True))
    core.step(2.0, TaskEnded("r", "a", ok=True))
    (command,) = core.step(3.0, TaskArrived(request("r2")))
    assert command.terms[0].score == pytest.approx(-0.1)  # type: ignore[union-attr]


def test_queue_work_counts_recovered_tasks() -> None:
    core = core_with(node("a"), node("b"), policy="queue_work")
    core.step(0.0, TaskRecovered(microbatch("m"), "a"))
    assert [place(core, 1.0, f"r{index}") for index in range(2)] == ["b", "b"]


def test_queue_work_takes_the_faster_of_two_idle_nodes() -> None:
    slow = node("a", latency=constant_latency(prefill=1.0))
    assert place(core_with(slow, node("b"), policy="queue_work"), 1.0, "r") == "b"


@pytest.mark.parametrize("name", sorted(set(policies.POLICIES) - {"random"}))
def test_of_equal_nodes_the_lowest_id_wins(name: str) -> None:
    core = core_with(node("c"), node("a"), node("b"), policy=name)
    assert place(core, 1.0, "r") == "a"


@pytest.mark.parametrize("name", sorted(set(policies.POLICIES) - {"random", "separate", "separate_dynamic"}))
def test_of_equal_nodes_the_lowest_id_trains_first(name: str) -> None:
    core = core_with(node("c"), node("a"), node("b"), policy=name)
    assert train(core, 1.0, "m") == "a"
