"""What the core knows of sessions, and what lemix makes of it."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.latency import LatencyModel, NodeLatency, OpKind
from services.scheduler.core.commands import Assign
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import Event, NodeJoined, NodeLost, OpFinished, TaskArrived, TaskEnded
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.core.tasks import InferenceTask, SloTarget
from tests.unit.scheduler_core.support import assigned, core_with

#: A prefill takes 1 ms per token, a decode iteration 1 ms.
_MODELS = {OpKind.PREFILL: LatencyModel("affine", (0.0, 0.001)), OpKind.DECODE: LatencyModel("constant", (0.001,))}
#: Prefills make iterations wait here far beyond any usual promise; only the first token is to count.
_SLO = SloTarget(ttft_s=1.0, tpot_s=100.0)


def _node(name: str, **bounds: int) -> NodeSpec:
    return NodeSpec(name, 1, NodeLatency((_MODELS,)), **{"prefix_cache_tokens": 10_000, **bounds})


def _core(*nodes: NodeSpec, **config: object) -> SchedulerCore:
    return core_with(*(nodes or (_node("a"), _node("b"))), default_slo=_SLO, **{"policy": "lemix", **config})


def _arrive(core: SchedulerCore, now_s: float, task_id: str, prompt: int, session: str = "s") -> Assign:
    task = InferenceTask(task_id, now_s, prompt, 100, session_id=session)
    (assign,) = [c for c in core.step(now_s, TaskArrived(task)) if isinstance(c, Assign)]
    return assign


def _response_s(assign: Assign) -> float:
    return next(terms.response_s for terms in assign.terms if terms.node_id == assign.node_id)


def _prefilled(core: SchedulerCore, now_s: float, task_id: str, node_id: str = "a", *, step: int = 0) -> None:
    core.step(
        now_s, OpFinished(node_id, 0, OpKind.PREFILL, now_s, now_s, (task_id,), first_token=True, weight_step=step)
    )


def _serve(
    core: SchedulerCore, now_s: float, task_id: str, prompt: int, session: str = "s", *, output: int = 1, step: int = 0
) -> Assign:
    """A turn from arrival to end."""
    assign = _arrive(core, now_s, task_id, prompt, session)
    _prefilled(core, now_s, task_id, assign.node_id, step=step)
    core.step(now_s, TaskEnded(task_id, assign.node_id, ok=True, output_tokens=output))
    return assign


def test_the_next_turn_is_predicted_without_what_the_node_keeps() -> None:
    core = _core()
    assert _response_s(_serve(core, 0.0, "t0", 400, output=51)) == pytest.approx(0.4)
    # 400 prompt tokens and 51 new ones, of which no operation has read the newest.
    turn = _arrive(core, 1.0, "t1", 500)
    assert _response_s(turn) == pytest.approx(0.05)
    assert [terms.cached_tokens for terms in turn.terms] == [450]


def test_at_least_one_token_is_computed() -> None:
    core = _core()
    _serve(core, 0.0, "t0", 400)
    assert _response_s(_arrive(core, 1.0, "t1", 300)) == pytest.approx(0.001)


def test_the_saved_prefill_counts_for_those_that_wait_behind_it() -> None:
    core = _core(_node("a"))
    _serve(core, 0.0, "t0", 400)
    _arrive(core, 1.0, "t1", 500)
    assert _response_s(_arrive(core, 1.0, "other", 200, session="")) == pytest.approx(0.1 + 0.2)


def test_a_stage_that_is_done_with_the_rest_of_a_prompt_takes_its_part_off() -> None:
    core = _core(NodeSpec("a", 2, NodeLatency((_MODELS,) * 2), prefix_cache_tokens=10_000))
    _serve(core, 0.0, "t0", 400)
    _arrive(core, 1.0, "t1", 500)
    node = core._cluster.nodes["a"]
    assert node.prefilling_s == pytest.approx(0.2)
    core.step(1.1, OpFinished("a", 0, OpKind.PREFILL, 1.0, 1.1, ("t1",), 100, 400))
    assert node.prefilling_s == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("options", "bounds"),
    [({"sessions": False}, {}), ({}, {"prefix_cache_tokens": 0}), ({}, {"prefix_cache_tokens": 9})],
)
def test_nothing_is_saved_without_knowledge_or_without_a_cache(
    options: dict[str, bool], bounds: dict[str, int]
) -> None:
    core = _core(_node("a", **bounds), policy_options=options)
    _serve(core, 0.0, "t0", 400)
    turn = _arrive(core, 1.0, "t1", 500)
    assert _response_s(turn) == pytest.approx(0.5)
    assert {terms.cached_tokens for terms in turn.terms} == {0}


def test_a_turn_that_failed_leaves_nothing() -> None:
    core = _core()
    assign = _arrive(core, 0.0, "t0", 400)
    _prefilled(core, 0.4, "t0")
    core.step(0.5, TaskEnded("t0", assign.node_id, ok=False))
    assert _response_s(_arrive(core, 1.0, "t1", 500)) == pytest.approx(0.5)


def test_a_turn_that_comes_before_the_report_of_the_end_finds_its_cache_too() -> None:
    core = _core(_node("a"))
    _arrive(core, 0.0, "t0", 400)
    _prefilled(core, 0.4, "t0")
    # One decode iteration may be running.
    assert _response_s(_arrive(core, 1.0, "t1", 500)) == pytest.approx(0.1 + 0.001)


def test_weights_of_another_epoch_keep_nothing() -> None:
    core = _core(_node("a", epoch_steps=10))
    _serve(core, 0.0, "t0", 400, step=8)
    core.step(0.5, OpFinished("a", 0, OpKind.OPTIMIZER_STEP, 0.5, 0.5, weight_step=8))
    assert _response_s(_serve(core, 1.0, "t1", 500, step=9)) == pytest.approx(0.1)
    core.step(1.5, OpFinished("a", 0, OpKind.OPTIMIZER_STEP, 1.5, 1.5, weight_step=9))
    assert _response_s(_arrive(core, 2.0, "t2", 600)) == pytest.approx(0.6)


def test_a_lost_node_kept_nothing() -> None:
    core = _core(_node("a"))
    _serve(core, 0.0, "t0", 400)
    core.step(0.5, NodeLost("a"))
    core.step(0.6, NodeJoined(_node("a")))
    assert _response_s(_arrive(core, 1.0, "t1", 500)) == pytest.approx(0.5)


def test_a_turn_whose_node_is_lost_finds_nothing_on_the_next_one() -> None:
    core = _core()
    _arrive(core, 0.0, "t0", 400)
    _prefilled(core, 0.4, "t0")
    commands = core.step(0.5, NodeLost("a"))
    assert [command.node_id for command in commands if isinstance(command, Assign)] == ["b"]
    assert len(core._cluster.sessions) == 1
    core.step(0.6, NodeLost("b"))
    assert len(core._cluster.sessions) == 0


def test_the_number_of_sessions_is_bounded() -> None:
    core = _core(_node("a"), max_sessions=2)
    for name in ("x", "y", "z"):
        _serve(core, 0.0, f"{name}0", 400, session=name)
    assert len(core._cluster.sessions) == 2
    assert _response_s(_arrive(core, 1.0, "z1", 500, session="z")) == pytest.approx(0.1)
    assert _response_s(_arrive(core, 2.0, "x1", 500, session="x")) == pytest.approx(0.1 + 0.5)


def test_a_node_is_believed_to_let_go_of_what_it_used_longest_ago() -> None:
    core = _core(_node("a", prefix_cache_tokens=900))
    for name in ("x", "y", "x", "z"):
        _serve(core, 0.0, f"{name}{core._num_accepted}", 400, session=name)
    assert _response_s(_serve(core, 1.0, "x", 500, session="x")) == pytest.approx(0.1)
    assert _response_s(_serve(core, 2.0, "y", 500, session="y")) == pytest.approx(0.5)


def test_requests_make_a_node_let_go_of_what_it_keeps() -> None:
    core = _core(_node("a", kv_capacity_tokens=1000))
    _serve(core, 0.0, "t0", 400)
    _serve(core, 0.5, "big", 600, session="")
    assert _response_s(_arrive(core, 1.0, "t1", 500)) == pytest.approx(0.5)


# ------------------------------------------------------------------------- where the next turn goes


def _spread(core: SchedulerCore) -> None:
    """Load "a" until "b" is opened; then session "s" has its first turn on "b"."""
    for index in range(3):
        assert _arrive(core, 0.0, f"load{index}", 400, session="").node_id == ("b" if index == 2 else "a")
    assert _serve(core, 0.1, "t0", 200).node_id == "b"


def _ended(core: SchedulerCore, now_s: float, *task_ids: str) -> None:
    for task_id in task_ids:
        core.step(now_s, TaskEnded(task_id, "b" if task_id == "load2" else "a", ok=True, output_tokens=1))


def test_the_next_turn_prefers_the_open_node_that_saves_most_of_its_prefill() -> None:
    core = _core()
    _spread(core)
    _ended(core, 0.2, "load0", "load1", "load2")
    assert _arrive(core, 0.3, "new", 200, session="").node_id == "a"
    _ended(core, 0.4, "new")
    assert _arrive(core, 0.5, "t1", 250).node_id == "b"


def test_without_sessions_it_goes_to_the_first_node() -> None:
    core = _core(policy_options={"sessions": False})
    _spread(core)
    _ended(core, 0.2, "load0", "load1", "load2")
    assert _arrive(core, 0.5, "t1", 250).node_id == "a"


def test_a_node_that_saves_little_does_not_draw_it_away_from_the_first() -> None:
    core = _core()
    _spread(core)
    _ended(core, 0.2, "load0", "load1", "load2")
    assert _arrive(core, 0.5, "t1", 450).node_id == "a"


@pytest.mark.parametrize(("has_work", "chosen"), [(True, "b"), (False, "a")])
def test_a_closed_node_is_looked_at_only_when_it_is_held_anyway(has_work: bool, chosen: str) -> None:
    core = _core()
    _spread(core)
    _ended(core, 0.2, "load0", "load1")
    _prefilled(core, 0.2, "load2", "b")
    if not has_work:
        _ended(core, 0.3, "load2")
    # "a" alone is enough after the dwell time, so "b" closes.
    _serve(core, 2.0, "closes", 100, session="")
    assert core._policy._num_open == 1  # type: ignore[attr-defined]
    assert _arrive(core, 2.1, "t1", 250).node_id == chosen


def test_a_turn_moves_on_when_its_node_is_overloaded() -> None:
    core = _core()
    _serve(core, 0.0, "t0", 200)
    loads = [_arrive(core, 1.0, f"load{index}", 900, session="") for index in range(3)]
    assert [load.node_id for load in loads] == ["a", "b", "a"]
    assert _arrive(core, 1.0, "t1", 250).node_id == "b"


def test_a_turn_that_has_to_wait_blocks_nobody() -> None:
    core = _core(_node("a", max_inflight_inference=1), _node("b", max_inflight_inference=1, max_context_tokens=200))
    _serve(core, 0.0, "t0", 300)
    _arrive(core, 1.0, "other", 300, session="")
    waiting = InferenceTask("t1", 1.0, 400, 100, session_id="s")
    assert not [c for c in core.step(1.0, TaskArrived(waiting)) if isinstance(c, Assign)]
    assert _arrive(core, 1.1, "short", 50, session="").node_id == "b"
    assert [c.task_id for c in core.step(1.2, TaskEnded("other", "a", ok=True)) if isinstance(c, Assign)] == ["t1"]


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded", "paper_additive", "separate"])
def test_other_policies_serve_sessions_as_requests(policy: str) -> None:
    core = _core(policy=policy)
    for index in range(4):
        _serve(core, float(index), f"t{index}", 100 * (index + 1))
    assert core.snapshot().waiting_inference == 0


def test_calibration_is_not_misled_by_prefills_that_compute_little() -> None:
    """A prefill of 100 tokens after 900 takes what the profile says, so no ratio moves."""
    latency = NodeLatency(({**_MODELS, OpKind.PREFILL: LatencyModel("full", (0.01, 0.001, 1e-6))},))
    core = _core(replace(_node("a"), latency=latency))
    costs = core._cluster.nodes["a"].costs
    before_s = costs.node_s(OpKind.PREFILL, 1, 500)
    real_s = 0.01 + 100 * 0.001 + 1e-6 * (1000**2 - 900**2)
    assert costs.stage_s(0, OpKind.PREFILL, 1, 100, 900) == pytest.approx(real_s)
    for index in range(20):
        core.step(index, OpFinished("a", 0, OpKind.PREFILL, index, index + real_s, ("x",), 100, 900))
    assert costs.node_s(OpKind.PREFILL, 1, 500) == pytest.approx(before_s)


def test_the_bound_on_sessions_is_checked() -> None:
    with pytest.raises(ValueError, match="max_sessions"):
        CoreConfig(max_sessions=0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["arrive", "arrive", "end", "end", "fail", "lose"]),
            st.integers(0, 30),
            st.integers(1, 400),
            st.sampled_from(["", "x", "y", "z", "w"]),
        ),
        max_size=40,
    )
)
def test_what_is_believed_stays_within_bounds(steps: list[tuple[str, int, int, str]]) -> None:
    core = _core(_node("a", prefix_cache_tokens=500, kv_capacity_tokens=1200), _node("b"), max_sessions=3)
    where: dict[str, str] = {}
    for number, (action, pick, tokens, session) in enumerate(steps):
        events: list[Event] = []
        if action == "arrive":
            events = [TaskArrived(InferenceTask(f"r{number}", float(number), tokens, 50, session_id=session))]
        elif action == "lose":
            name = "ab"[pick % 2]
            events = [NodeLost(name), NodeJoined(_node(name, prefix_cache_tokens=500))]
        elif where:
            task_id = sorted(where)[pick % len(where)]
            events = [TaskEnded(task_id, where.pop(task_id), ok=action == "end", output_tokens=1 + pick)]
        for event in events:
            where.update(assigned(core.step(float(number), event)))
            _check_bounds(core)


def _check_bounds(core: SchedulerCore) -> None:
    sessions, nodes = core._cluster.sessions, core._cluster.nodes
    assert len(sessions) <= 3
    for node_id, node in nodes.items():
        kept = [item.tokens for item in sessions._sessions.values() if item.node is node and item.live is None]
        assert sum(kept) == sessions._kept_tokens.get(node_id, 0) <= node.spec.prefix_cache_tokens
        assert len(kept) == len(sessions._by_node.get(node_id, ()))
    for item in sessions._sessions.values():
        assert item.node is nodes[item.node.node_id]
        assert item.live is None or item.live.node is item.node
