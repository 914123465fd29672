"""What is kept of decisions, how it is joined with what happened, and that it stays bounded."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.latency import LatencyModel, NodeLatency, OpKind
from services.scheduler.core.commands import Assign, CancelOnNode, Command, Defer, Drop, NodeTerms, Reject
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import (
    Event,
    NodeJoined,
    NodeLost,
    OpFinished,
    TaskArrived,
    TaskCancelled,
    TaskEnded,
    TaskRecovered,
    Tick,
)
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.core.policies import POLICIES
from services.scheduler.core.tasks import InferenceTask, Task, TrainingTask
from services.scheduler.explain.decisions import Decisions
from services.scheduler.explain.live import LiveTasks
from services.scheduler.explain.types import Decision, Fate, Meaning, meaning
from tests.simulation.harness import SYNC_PHASE_S, Simulation, microbatches, output_lengths, requests, spec

STAGES = 2


class Store(Decisions):
    """Decisions with the tasks that feed them."""

    def __init__(self, policy: str, capacity: int = 4096) -> None:
        self.tasks = LiveTasks()
        super().__init__(self.tasks, policy, capacity)

    def add(self, now_s: float, event: Event, commands: Sequence[Command]) -> None:
        self.tasks.add(now_s, event, commands)

    @property
    def num_live(self) -> int:
        return len(self.tasks)


LATENCY = NodeLatency(({OpKind.PREFILL: LatencyModel("constant", (0.1,))},) * STAGES)
REQUEST = InferenceTask("r", 1.0, 30, 20)
MICROBATCH = TrainingTask("m", 1.0, "job", 1, 64)


def node(node_id: str, kv_capacity_tokens: int = 100, num_stages: int = STAGES) -> NodeJoined:
    latency = NodeLatency(LATENCY.models[:1] * num_stages)
    return NodeJoined(NodeSpec(node_id, num_stages, latency, kv_capacity_tokens=kv_capacity_tokens))


def terms(response_s: float, *node_ids: str) -> tuple[NodeTerms, ...]:
    return tuple(NodeTerms(node_id, 0.1, response_s + index, -0.2, 0.5, 1.0) for index, node_id in enumerate(node_ids))


def op(kind: OpKind, stage: int, begin_s: float, end_s: float, *task_ids: str, **fields: object) -> OpFinished:
    return OpFinished("n0", stage, kind, begin_s, end_s, task_ids, **fields)  # type: ignore[arg-type]


def placed(policy: str, task: Task = REQUEST, response_s: float = 0.4) -> Store:
    """A store that saw a task arrive and go to n0, of two nodes, at 1.25 s."""
    decisions = Store(policy)
    decisions.add(0.0, node("n0"), [])
    decisions.add(0.0, node("n1"), [])
    decisions.add(1.25, TaskArrived(task), [Assign(task.task_id, "n0", terms(response_s, "n0", "n1"))])
    return decisions


def only(decisions: Store, task_id: str = "r") -> Decision:
    (decision,) = decisions.of_task(task_id)
    return decision


def test_a_decision_keeps_what_led_to_it() -> None:
    decision = only(placed("lemix"))
    assert (decision.sequence, decision.at_s, decision.policy, decision.node_id) == (1, 1.25, "lemix", "n0")
    assert decision.task == REQUEST
    assert [item.node_id for item in decision.terms] == ["n0", "n1"]
    assert decision.kv_shares == (0.0, 0.0)
    assert decision.outcome.fate is Fate.UNFINISHED
    assert decision.predicted_s == 0.4
    assert (decision.actual_s, decision.error_s) == (None, None)


def test_micro_batches_that_wait_for_their_node_are_not_live_until_it_is_back() -> None:
    decisions = placed("lemix", MICROBATCH)
    first = only(decisions, "m")
    decisions.add(1.3, TaskArrived(REQUEST), [Assign("r", "n0")])
    decisions.add(2.0, NodeLost("n0", "test", keeps_training=True), [])
    assert first.outcome.fate is Fate.NODE_LOST
    assert [live.task.task_id for live in decisions.tasks] == ["r"], "requests wait in the core"
    decisions.add(3.0, node("n0"), [])
    decisions.add(3.0, TaskRecovered(MICROBATCH, "n0"), [])
    live = decisions.tasks.get("m")
    assert live is not None
    assert live.node_id == "n0"
    decisions.add(4.0, TaskEnded("m", "n0", ok=True), [])
    assert decisions.tasks.get("m") is None


def test_lemix_predicts_the_first_token_of_a_request() -> None:
    decisions = placed("lemix")
    decisions.add(1.4, op(OpKind.PREFILL, 0, 1.3, 1.4, "r"), [])
    decisions.add(1.6, op(OpKind.PREFILL, 1, 1.4, 1.55, "r", first_token=True), [])
    decisions.add(1.8, op(OpKind.DECODE, 1, 1.7, 1.8, "r"), [])
    decision = only(decisions)
    assert decision.outcome.first_op_s == 1.3
    assert decision.outcome.first_token_s == 1.55
    assert decision.actual_s == pytest.approx(0.55)
    assert decision.error_s == pytest.approx(0.15)
    decisions.add(2.0, TaskEnded("r", "n0", ok=True, output_tokens=2), [])
    assert (decision.outcome.fate, decision.outcome.ended_s, decision.outcome.output_tokens) == (Fate.OK, 2.0, 2)
    assert decisions.num_live == 0


def test_the_papers_response_is_the_end_of_the_last_forward_on_the_last_stage() -> None:
    decisions = placed("paper_additive")
    decisions.add(1.6, op(OpKind.PREFILL, 1, 1.4, 1.55, "r", first_token=True), [])
    decisions.add(1.8, op(OpKind.DECODE, 1, 1.7, 1.8, "r"), [])
    decisions.add(1.9, op(OpKind.DECODE, 0, 1.8, 1.9, "r"), [])
    decision = only(decisions)
    assert decision.actual_s is None, "there may be another iteration"
    decisions.add(2.0, TaskEnded("r", "n0", ok=True, output_tokens=2), [])
    assert decision.actual_s == pytest.approx(0.8)
    assert decision.error_s == pytest.approx(0.4)


def test_a_microbatch_is_released_when_it_is_placed_and_ends_with_its_last_piece() -> None:
    decisions = placed("paper_ratio", MICROBATCH)
    decisions.add(1.5, op(OpKind.TRAIN_FORWARD, 1, 1.4, 1.5, "m", part=0, parts=2), [])
    decision = only(decisions, "m")
    assert decision.actual_s is None
    decisions.add(1.7, op(OpKind.TRAIN_FORWARD, 1, 1.6, 1.75, "m", part=1, parts=2), [])
    decisions.add(2.0, op(OpKind.TRAIN_BACKWARD, 1, 1.8, 2.0, "m"), [])
    assert decision.actual_s == pytest.approx(0.5)
    assert decision.error_s == pytest.approx(0.1)


@pytest.mark.parametrize("policy", ["lemix", "separate", "a policy of one's own"])
def test_what_is_not_predicted_has_no_error(policy: str) -> None:
    decisions = placed(policy, MICROBATCH, response_s=0.0)
    decisions.add(1.5, op(OpKind.TRAIN_FORWARD, 1, 1.4, 1.5, "m"), [])
    decision = only(decisions, "m")
    assert (decision.meaning, decision.predicted_s, decision.actual_s) == (Meaning.NOTHING, None, None)


def test_reports_of_other_nodes_change_nothing() -> None:
    decisions = placed("lemix")
    decisions.add(1.6, OpFinished("n1", 1, OpKind.PREFILL, 1.4, 1.5, ("r",), first_token=True), [])
    decisions.add(1.6, OpFinished("unknown", 1, OpKind.PREFILL, 1.4, 1.5, ("r",), first_token=True), [])
    decisions.add(1.7, op(OpKind.PREFILL, 1, 1.4, 1.5, "unknown", first_token=True), [])
    decisions.add(1.8, TaskEnded("r", "n1", ok=True), [])
    outcome = only(decisions).outcome
    assert (outcome.fate, outcome.first_op_s, outcome.first_token_s) == (Fate.UNFINISHED, None, None)


def test_a_lost_node_leads_to_a_second_decision() -> None:
    decisions = placed("lemix")
    decisions.add(1.5, NodeLost("n0"), [Defer("r", "inflight_limit")])
    assert decisions.waits("r") == {"inflight_limit": 1.5}
    decisions.add(1.7, Tick(), [Assign("r", "n1", terms(0.9, "n1"))])
    assert decisions.waits("r") == {}
    decisions.add(2.0, OpFinished("n1", 1, OpKind.PREFILL, 1.8, 2.0, ("r",), first_token=True), [])
    decisions.add(2.1, TaskEnded("r", "n1", ok=True, output_tokens=1), [])
    first, second = decisions.of_task("r")
    assert (first.outcome.fate, first.outcome.ended_s) == (Fate.NODE_LOST, 1.5)
    assert (second.node_id, second.waits, second.actual_s) == ("n1", {"inflight_limit": 1.5}, 1.0)


def test_a_node_that_returns_with_other_stages_was_lost() -> None:
    decisions = placed("lemix")
    decisions.add(1.5, node("n0", num_stages=STAGES), [])
    assert only(decisions).outcome.fate is Fate.UNFINISHED
    decisions.add(1.6, node("n0", num_stages=1), [])
    assert only(decisions).outcome.fate is Fate.NODE_LOST


def test_a_refusal_is_a_decision() -> None:
    decisions = Store("lemix")
    decisions.add(1.0, TaskArrived(REQUEST), [Defer("r", "no_node")])
    decisions.add(2.0, node("n0", 10), [Reject("r", "RESOURCE_EXHAUSTED", "too long")])
    decision = only(decisions)
    assert (decision.node_id, decision.refusal) == ("", "RESOURCE_EXHAUSTED: too long")
    assert (decision.outcome.fate, decision.waits) == (Fate.REFUSED, {"no_node": 1.0})
    assert decisions.num_live == 0


def test_the_newest_reason_to_wait_is_told_with_the_time_it_was_first_given() -> None:
    decisions = Store("lemix")
    decisions.add(1.0, TaskArrived(MICROBATCH), [Defer("m", "held_back")])
    for now_s, reason in ((2.0, "inflight_limit"), (3.0, "held_back"), (4.0, "inflight_limit")):
        decisions.add(now_s, Tick(), [Defer("m", reason)])
    assert decisions.waits("m") == {"inflight_limit": 2.0}


@pytest.mark.parametrize(("ok", "fate"), [(False, Fate.CANCELLED), (True, Fate.OK)])
def test_a_cancelled_task_is_not_a_failed_one(ok: bool, fate: Fate) -> None:
    decisions = placed("lemix")
    decisions.add(1.5, TaskCancelled("r"), [CancelOnNode("r", "n0")])
    decisions.add(1.6, TaskEnded("r", "n0", ok=ok), [])
    assert only(decisions).outcome.fate is fate


def test_nothing_is_kept_of_a_task_dropped_while_it_waits() -> None:
    decisions = Store("lemix")
    decisions.add(1.0, TaskArrived(REQUEST), [Defer("r", "no_node")])
    decisions.add(1.1, TaskCancelled("r"), [Drop("r")])
    assert (decisions.of_task("r"), decisions.num_live, decisions.is_live("r")) == ([], 0, False)


def test_the_kv_cache_promised_to_requests_is_remembered_and_given_back() -> None:
    decisions = placed("lemix")
    decisions.add(1.3, TaskRecovered(InferenceTask("back", 0.5, 10, 5), "n1"), [])
    again = terms(0.1, "n0", "n1")

    def shares(task_id: str) -> tuple[float, ...]:
        decisions.add(2.0, TaskArrived(InferenceTask(task_id, 2.0, 1, 0)), [Assign(task_id, "n1", again)])
        return only(decisions, task_id).kv_shares

    assert shares("a") == (0.5, 0.15)
    decisions.add(2.1, TaskEnded("r", "n0", ok=True), [])
    decisions.add(2.1, TaskEnded("back", "n1", ok=True), [])
    assert shares("b") == (0.0, 0.01)


def test_the_store_wants_room_for_one() -> None:
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        Store("lemix", 0)


# --------------------------------------------------------------------------- over whole runs


def simulation(policy: str, *, seed: int = 0, lost_s: float = 9.0, num_stages: int = 1) -> Simulation:
    """Requests, a job, a cancelled request, a lost and a returning node."""
    tasks = requests(20, 20.0, seed=seed)
    made = Simulation(CoreConfig(policy=policy, max_inflight_training=2), output_lengths(tasks, seed=seed))
    for index in range(3):
        made.at(0.0, NodeJoined(spec(f"n{index}", num_stages)))
    made.offer(tasks)
    made.offer(microbatches(10))
    made.at(tasks[7].arrival_s + 0.01, TaskCancelled("r7"))
    made.at(lost_s, NodeLost("n1", "test"))
    made.at(lost_s + 10 * SYNC_PHASE_S, NodeJoined(spec("n1", num_stages)))
    return made


class Watched:
    """A simulation whose core tells stores of every step, and what the core itself holds afterwards."""

    def __init__(self, made: Simulation, *stores: Store) -> None:
        core_step = made.core.step
        self.num_live: list[tuple[int, int]] = []

        def step(now_s: float, event: object) -> object:
            commands = core_step(now_s, event)  # type: ignore[arg-type]
            for store in stores:
                store.add(now_s, event, commands)  # type: ignore[arg-type]
            self.num_live.append((stores[0].num_live, len(made.core._cluster.tasks)))
            return commands

        made.core.step = step  # type: ignore[assignment,method-assign]
        made.run()


@settings(max_examples=40, deadline=None)
@given(
    policy=st.sampled_from(sorted(POLICIES)),
    capacity=st.integers(1, 40),
    seed=st.integers(0, 50),
    lost_s=st.floats(0.0, 2.0),
)
def test_the_store_is_bounded_and_keeps_the_newest(policy: str, capacity: int, seed: int, lost_s: float) -> None:
    bounded, unbounded = Store(policy, capacity), Store(policy, 10_000)
    watched = Watched(simulation(policy, seed=seed, lost_s=lost_s), bounded, unbounded)
    assert len(bounded) == min(capacity, len(unbounded))
    kept = bounded.newest(capacity)
    expected = unbounded.newest(capacity)
    assert [(decision.sequence, decision.outcome) for decision in kept] == [
        (decision.sequence, decision.outcome) for decision in expected
    ]
    assert all(ours == cores for ours, cores in watched.num_live), "live work is what the core holds"
    assert all(decision.outcome.fate is not Fate.UNFINISHED for decision in unbounded.newest(10_000))


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_what_r_means_is_known_for_every_policy(policy: str) -> None:
    store = Store(policy)
    Watched(simulation(policy, num_stages=2), store)
    kinds: dict[type, set[bool]] = {}
    for decision in store.newest(1000):
        if decision.node_id:
            predicts = any(item.response_s != 0.0 for item in decision.terms)
            kinds.setdefault(type(decision.task), set()).add(predicts)
    expected = {type(task): {meaning(policy, task) is not Meaning.NOTHING} for task in (REQUEST, MICROBATCH)}
    assert kinds == expected


@pytest.mark.parametrize("policy", ["lemix", "paper_additive", "paper_ratio", "paper_released"])
def test_predictions_that_came_true_are_found(policy: str) -> None:
    """A request alone on an idle cluster runs as the profile says."""
    made = Simulation(CoreConfig(policy=policy, initial_output_tokens=1), {"r": 1})
    made.at(0.0, NodeJoined(spec("n0", 1)))
    made.offer([InferenceTask("r", 1.0, 100, 1)])
    store = Store(policy)
    Watched(made, store)
    decision = only(store)
    assert decision.predicted_s == pytest.approx(0.012)
    assert decision.error_s == pytest.approx(0.0, abs=1e-9)
