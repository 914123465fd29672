"""Requests that depend on others: when they arrive, what becomes of them, and what sessions save."""

import math
import statistics
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.latency import LatencyModel, NodeLatency, OpKind
from services.node_agent.core.types import NodeCoreConfig
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.tasks import SloTarget
from services.simulator.cluster import Simulation
from services.simulator.conversations import CONVERSATIONS, Conversation, draw
from services.simulator.lengths import LogNormal
from services.simulator.scenario import Node, Scenario
from services.simulator.trace_file import TraceRow, read_trace
from services.simulator.traffic import RecordedTraffic
from services.simulator.types import Request, SimulationConfig, SimulationResult, VirtualNode

#: A prefill takes 10 ms per token and stage, a decode iteration 0.1 s.
_MODELS = {OpKind.PREFILL: LatencyModel("affine", (0.0, 0.01)), OpKind.DECODE: LatencyModel("constant", (0.1,))}
_LATENCY = NodeLatency((_MODELS,))


def _run(
    work: list[Request], *, nodes: int = 1, prefix_cache_tokens: int = 0, lost_s: float = math.inf, **config: float
) -> SimulationResult:
    core = NodeCoreConfig(num_stages=1, kv_capacity_tokens=2000, prefix_cache_tokens=prefix_cache_tokens)
    members = [
        VirtualNode(node_id=f"node-{index}", latency=_LATENCY, core=core, lost_s=math.inf if index else lost_s)
        for index in range(nodes)
    ]
    options = CoreConfig(policy=str(config.pop("policy", "lemix")), default_slo=SloTarget(ttft_s=2.0, tpot_s=1.0))
    return Simulation(SimulationConfig(core=options, **config), members, work).run()  # type: ignore[arg-type]


def _chain(*thinks_s: float, prompt: int = 100, output: int = 11) -> list[Request]:
    """Turns of one session: each prompt is everything before it and 20 tokens more."""
    work = [Request("t0", 1.0, prompt, output, 100, session_id="s")]
    for index, think_s in enumerate(thinks_s, start=1):
        before = work[-1]
        prompt_tokens = before.prompt_tokens + output + 20
        work.append(Request(f"t{index}", 0.0, prompt_tokens, output, 100, NONE, "s", before.task_id, think_s))
    return work


NONE = SloTarget()


def test_a_request_arrives_after_the_end_of_the_one_before_and_the_time_to_think() -> None:
    result = _run(_chain(3.0, 0.0))
    ends = [result.tasks[name].ended_s for name in ("t0", "t1", "t2")]
    arrivals = [result.tasks[name].work.arrival_s for name in ("t0", "t1", "t2")]
    assert ends[0] == pytest.approx(1.0 + 1.0 + 10 * 0.1)
    assert arrivals == pytest.approx([1.0, ends[0] + 3.0, ends[1]])
    assert ends[1] == pytest.approx(arrivals[1] + 1.31 + 1.0)


def test_a_request_does_not_arrive_before_its_own_time() -> None:
    work = [Request("t0", 0.0, 100, 1, 1), Request("t1", 50.0, 100, 1, 1, NONE, after="t0", think_s=1.0)]
    assert _run(work).tasks["t1"].work.arrival_s == 50.0


def test_several_may_depend_on_one() -> None:
    work = [Request("t0", 0.0, 100, 1, 1)]
    work += [Request(f"t{index}", 0.0, 100, 1, 1, NONE, after="t0", think_s=float(index)) for index in (1, 2)]
    result = _run(work)
    assert [result.tasks[f"t{index}"].work.arrival_s for index in (1, 2)] == pytest.approx([2.0, 3.0])


def test_what_depends_on_a_failed_request_is_cancelled() -> None:
    work = _chain(1.0, 1.0, prompt=5000)
    work.append(Request("free", 0.0, 100, 1, 1))
    result = _run(work)
    outcomes = {name: record.outcome for name, record in result.tasks.items()}
    assert outcomes == {"t0": "rejected", "t1": "cancelled", "t2": "cancelled", "free": "stop"}
    assert result.tasks["t1"].response_s == math.inf


@pytest.mark.parametrize("after", ["nobody", "t1"])
def test_a_request_that_depends_on_nothing_known_is_refused(after: str) -> None:
    work = [Request("t0", 0.0, 100, 1, 1, NONE, after=after), Request("t1", 0.0, 100, 1, 1)]
    with pytest.raises(ValueError, match=f"t0 comes after {after}"):
        _run(work)


def test_a_turn_computes_what_its_node_does_not_keep() -> None:
    result = _run(_chain(3.0, 0.0), prefix_cache_tokens=1000)
    assert [result.tasks[f"t{index}"].cached_tokens for index in range(3)] == [0, 110, 141]
    record = result.tasks["t1"]
    assert record.first_token_s == pytest.approx(record.work.arrival_s + 0.21)


def test_a_report_that_is_late_does_not_hide_the_cache() -> None:
    """The next turn follows at once; the scheduler still believes that the one before it runs."""
    result = _run(_chain(0.0, 0.0), nodes=2, prefix_cache_tokens=1000, report_s=0.05)
    assert [result.tasks[f"t{index}"].cached_tokens for index in range(3)] == [0, 110, 141]
    assert {result.tasks[f"t{index}"].node_id for index in range(3)} == {"node-0"}


def test_a_session_survives_the_loss_of_its_node() -> None:
    result = _run(_chain(3.0, 0.0), nodes=2, prefix_cache_tokens=1000, lost_s=4.0)
    assert all(record.ok for record in result.tasks.values())
    assert result.tasks["t1"].node_id == "node-1"
    assert [result.tasks[f"t{index}"].cached_tokens for index in range(3)] == [0, 0, 141]


def test_a_prediction_is_exact_when_nothing_else_runs() -> None:
    result = _run(_chain(3.0, 2.0, 1.0), prefix_cache_tokens=1000)
    for decision in result.decisions:
        record = result.tasks[decision.task_id]
        assert record.first_token_s is not None
        assert decision.terms[0].response_s == pytest.approx(record.first_token_s - record.work.arrival_s)


_KIND = Conversation(
    LogNormal.of(60, 40), LogNormal.of(30, 20), LogNormal.of(10, 6, longest=40), mean_turns=4.0, think_s=(2.0, 1.0),
    longest_tokens=600,
)  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["lemix", "round_robin", "least_loaded"]), st.integers(0, 1500))
def test_every_turn_ends_after_the_one_before_whatever_is_kept(seed: int, policy: str, kept: int) -> None:
    work = draw(_KIND, str(seed), sessions_per_s=2.0, num_sessions=12, slo=NONE)
    result = _run(work, nodes=2, prefix_cache_tokens=kept, policy=policy, noise=0.1, seed=seed)  # type: ignore[arg-type]
    for request in work:
        record = result.tasks[request.task_id]
        assert record.ok
        assert 0 <= record.cached_tokens < request.prompt_tokens
        if request.after:
            before = result.tasks[request.after]
            assert isinstance(before.work, Request)
            assert before.ended_s is not None
            assert record.work.arrival_s == pytest.approx(before.ended_s + request.think_s)
            assert record.cached_tokens <= before.work.prompt_tokens + before.work.output_tokens - 1


# ------------------------------------------------------------------------- what is drawn


def test_conversations_have_the_shape_asked_for() -> None:
    work = draw(CONVERSATIONS["chat"], "7", sessions_per_s=3.0, num_sessions=2000, slo=NONE)
    first = [request for request in work if not request.after]
    later = [request for request in work if request.after]
    assert len(work) / len(first) == pytest.approx(5.75, rel=0.1)
    assert statistics.fmean(request.think_s for request in later) == pytest.approx(20.0, rel=0.1)
    assert first[-1].arrival_s == pytest.approx(2000 / 3.0, rel=0.1)
    assert statistics.fmean(request.output_tokens for request in work) == pytest.approx(214.5, rel=0.1)


@pytest.mark.parametrize("kind", sorted(CONVERSATIONS))
def test_a_prompt_is_everything_before_it_and_more(kind: str) -> None:
    work = draw(CONVERSATIONS[kind], "1", sessions_per_s=1.0, num_sessions=200, slo=NONE)
    by_id = {request.task_id: request for request in work}
    for request in work:
        assert request.prompt_tokens + request.max_tokens <= CONVERSATIONS[kind].longest_tokens
        if request.after:
            before = by_id[request.after]
            assert before.session_id == request.session_id
            assert request.prompt_tokens > before.prompt_tokens + before.output_tokens
            assert (request.think_s > 0.0) == (kind == "chat")


def test_a_session_does_not_depend_on_how_many_there_are() -> None:
    few, many = (draw(_KIND, "1", sessions_per_s=1.0, num_sessions=count, slo=NONE) for count in (3, 9))
    assert few == many[: len(few)]


def test_less_than_a_turn_is_refused() -> None:
    kind = Conversation(_KIND.first, _KIND.new, _KIND.output, mean_turns=0.5)
    with pytest.raises(ValueError, match="mean_turns"):
        draw(kind, "1", sessions_per_s=1.0, num_sessions=1, slo=NONE)


# ------------------------------------------------------------------------- traces


def test_a_trace_may_name_sessions(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens,session_id\n0,10,2,a\n1,20,2,\n2,30,2,a\n", encoding="utf-8")
    assert read_trace(path) == [TraceRow(0, 10, 2, "a", 2), TraceRow(1, 20, 2, "", 3), TraceRow(2, 30, 2, "a", 4)]


def test_turns_of_a_trace_follow_each_other() -> None:
    random = Random(3)
    rows = [TraceRow(float(index), 50, 5, random.choice(["", "a", "b"])) for index in range(30)]
    scenario = Scenario(num_nodes=1, node=Node(latency=_LATENCY), traffic=RecordedTraffic(rows), slo=NONE)
    newest: dict[str, str] = {}
    for row, request in zip(rows, scenario.work(rows), strict=True):
        assert (request.session_id, request.after) == (row.session_id, newest.get(row.session_id, ""))
        if row.session_id:
            newest[row.session_id] = request.task_id
