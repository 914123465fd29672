"""The claims of the paper (LeMix, RTSS 2025), one test each, which names the equation, algorithm or part it is about.

Where the paper's form does not do what the paper says of it, the test asserts what it does, and says so. Clusters are
small, nothing is random but seeded arrivals, margins are explained where they are used.
"""

from collections.abc import Sequence
from math import exp

import pytest

from services.latency import LatencyModel, NodeLatency, OpKind
from services.node_agent.core.types import NodeCoreConfig
from services.scheduler.core.commands import Assign, Command, Defer, NodeTerms, Reject
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import NodeJoined, OpFinished, TaskArrived, TaskEnded, Tick
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.core.tasks import InferenceTask, SloTarget, TrainingTask
from services.simulator.cluster import Simulation
from services.simulator.metrics import measure
from services.simulator.types import Microbatch, Request, SimulationConfig, SimulationResult, VirtualNode, Work
from tests.simulation.harness import Simulation as Harness
from tests.simulation.harness import microbatches as harness_microbatches
from tests.simulation.harness import requests, spec

PAPER_FORMS = ("paper_additive", "paper_ratio")
#: The paper's worked numbers: a forward of 1 s and a backward of 2 s per stage, two stages.
F, B = 1.0, 2.0


def constant(num_stages: int, **seconds: float) -> NodeLatency:
    """Durations that depend on nothing."""
    models = {OpKind(kind): LatencyModel("constant", (value,)) for kind, value in seconds.items()}
    return NodeLatency((models,) * num_stages)


def paper_node(node_id: str = "a", num_stages: int = 2) -> NodeSpec:
    return NodeSpec(node_id, num_stages, constant(num_stages, prefill=F, train_forward=F, train_backward=B))


def core_with(policy: str, *nodes: NodeSpec, **config: object) -> SchedulerCore:
    core = SchedulerCore(CoreConfig(policy=policy, **config))  # type: ignore[arg-type]
    for node in nodes:
        core.step(0.0, NodeJoined(node))
    return core


def request(core: SchedulerCore, task_id: str, at_s: float, prompt: int = 100) -> list[Command]:
    """A request of one token arrives: one forward, as in the paper."""
    return core.step(at_s, TaskArrived(InferenceTask(task_id, at_s, prompt, 1)))


def train(core: SchedulerCore, task_id: str, at_s: float = 0.0, length: int = 100) -> list[Command]:
    return core.step(at_s, TaskArrived(TrainingTask(task_id, at_s, "j", 1, length)))


def terms_of(commands: Sequence[Command]) -> tuple[NodeTerms, ...]:
    (assign,) = (command for command in commands if isinstance(command, Assign))
    return assign.terms


def chosen(commands: Sequence[Command]) -> str:
    (assign,) = (command for command in commands if isinstance(command, Assign))
    return assign.node_id


# ----------------------------------------------------------------------------- section 4: prediction


@pytest.mark.parametrize("length", [10, 100, 1000])
def test_section_4_latency_is_quadratic_in_the_length(length: int) -> None:
    """Section 4, latency model: F = eta_F * C * l^2 and B = eta_B * C * l^2 per stage, with coefficients per node."""
    eta = {OpKind.TRAIN_FORWARD: 1e-6, OpKind.TRAIN_BACKWARD: 2e-6}
    models = {kind: LatencyModel("quadratic", (value,)) for kind, value in eta.items()}
    node = NodeLatency((models, models))
    for kind, value in eta.items():
        assert node.op_s(0, kind, 4, length) == pytest.approx(value * 4 * length**2)
        assert node.op_s(1, kind, 1, 2 * length) == pytest.approx(4 * node.op_s(1, kind, 1, length))


@pytest.mark.parametrize("policy", PAPER_FORMS)
@pytest.mark.parametrize(
    ("release_s", "idleness_s", "response_s"),
    [
        # Stage 0 runs 1-2, before the backward at 4; on stage 1 it collides with the backward 2-4: that is work.
        (0.5, 0.0, 4.5),
        # Stage 0 idles 1-2.5; on stage 1 3.5-4.5 collides, so 4-5.
        (2.5, 1.5, 2.5),
    ],
)
def test_algorithm_1_idleness_and_response(policy: str, release_s: float, idleness_s: float, response_s: float) -> None:
    """Algorithm 1 (COMPUTE_IDLENESS), near and far dependency: the two worked examples."""
    core = core_with(policy, paper_node())
    train(core, "t")
    (terms,) = terms_of(request(core, "r", release_s))
    assert (terms.idleness_s, terms.response_s) == (idleness_s, response_s)


@pytest.mark.parametrize("policy", PAPER_FORMS)
def test_algorithm_1_real_traces_shift_what_follows(policy: str) -> None:
    """Algorithm 1, runtime correction: a forward that took longer than predicted delays everything behind it."""
    core = core_with(policy, paper_node())
    train(core, "t")
    core.step(1.5, OpFinished("a", 0, OpKind.TRAIN_FORWARD, 0.0, 1.5, ("t",)))
    (terms,) = terms_of(request(core, "r", 1.5))
    # Forward of t on stage 1 is now 1.5-2.5, its backward 2.5-4.5; r runs 1.5-2.5 on stage 0 and 4.5-5.5 on stage 1.
    assert terms.response_s == pytest.approx(4.0)
    assert terms.idleness_s == 0.0


# ----------------------------------------------------------------------------- task-level and queue-level allocation


@pytest.mark.parametrize("policy", PAPER_FORMS)
def test_eq_3_idleness_profit_and_the_role_of_tau(policy: str) -> None:
    """Eq. 3, idleness profit: IP = -max(II / S - gap, tau); idleness up to tau costs nothing."""
    for tau_s, idleness_s, gap_s in ((0.2, 1.5, 2.5), (0.0, 1.5, 2.5), (3.0, 1.5, 2.5)):
        core = core_with(policy, paper_node(), policy_options={"tau_s": tau_s})
        train(core, "t")
        (terms,) = terms_of(request(core, "r", 2.5))
        assert terms.idleness_profit == -max(idleness_s / 2 - gap_s, tau_s)


@pytest.mark.parametrize("policy", PAPER_FORMS)
def test_eq_3_tau_is_nearly_inert(policy: str) -> None:
    """Eq. 3, tau: II / S - gap is within it nearly always, so IP is -tau for all and another tau changes little. In the
    ratio, which packs one node, it changes nothing: identical transcripts."""
    assigned = [command for entry in mixed_run(policy).log for command in entry.commands if command["type"] == "Assign"]
    profits = [terms["idleness_profit"] for command in assigned for terms in command["terms"]]
    assert profits.count(-0.2) >= 0.9 * len(profits)
    if policy == "paper_ratio":
        assert all(decisions(policy, tau_s=tau_s) == decisions(policy) for tau_s in (0.1, 0.4, 1.6))


@pytest.mark.parametrize("policy", PAPER_FORMS)
def test_eq_3_length_consistency_prefers_the_node_with_like_lengths(policy: str) -> None:
    """Eq. 3, LC: density of the length under the lengths sent to a node; here exp(-z^2 / 2), in 0-1."""
    core = core_with(policy, paper_node("a"))
    for index, prompt in enumerate((90, 110, 100)):
        request(core, f"r{index}", float(10 * index), prompt)
    mean, std = 100.0, 10.0
    for index, prompt in enumerate((100, 115)):
        (terms,) = terms_of(request(core, f"s{index}", 100.0 + 10 * index, prompt))
        assert terms.length_consistency == pytest.approx(exp(-(((prompt - mean) / std) ** 2) / 2))
        std = (10.0**2 * 2 / 3) ** 0.5  # with the length 100 taken in


@pytest.mark.parametrize("policy", PAPER_FORMS)
def test_eq_3_lambda_2_decides_between_nodes_that_are_alike_otherwise(policy: str) -> None:
    """Eq. 3: lambda_2 weighs LC. Without it the lowest id of equals wins; with it, the like lengths."""

    def place(lambda_2: float) -> str:
        core = core_with(policy, paper_node("a"), paper_node("b"), policy_options={"lambda_2": lambda_2})
        for index, (node_id, prompt) in enumerate((("a", 100), ("a", 110), ("b", 500), ("b", 510))):
            core._cluster.nodes[node_id].lengths.observe(prompt + index)
        return chosen(request(core, "r", 0.0, prompt=505))

    assert (place(0.0), place(0.05)) == ("a", "b")


def mixed_run(policy: str, **options: float) -> Harness:
    """Requests and a job on three nodes of two stages."""
    simulation = Harness(CoreConfig(policy=policy, policy_options=dict(options), max_hold_back_s=0.0), {})
    for node_id in "abc":
        simulation.at(0.0, NodeJoined(spec(node_id, 2)))
    simulation.offer(requests(60, 40.0, seed=7))
    simulation.offer(harness_microbatches(30))
    simulation.run()
    return simulation


def decisions(policy: str, **options: float) -> list[tuple[float, str, str]]:
    """Every assignment of the mixed run."""
    placed = mixed_run(policy, **options).assignments
    return sorted((at_s, task_id, where) for task_id, stays in placed.items() for at_s, where in stays)


@pytest.mark.parametrize("policy", ["paper_ratio", "paper_released"])
@pytest.mark.parametrize("lambda_1", [0.01, 1.0, 50.0])
def test_eq_3_lambda_1_is_inert_in_the_ratio(policy: str, lambda_1: float) -> None:
    """Eq. 3 as released, (IP + lambda_2 LC) / (lambda_1 R): lambda_1 scales every score alike. The paper
    names it the weight of the response; transcripts are identical whatever its value."""
    assert decisions(policy, lambda_1=lambda_1) == decisions(policy)


def test_eq_3_lambda_1_weighs_the_response_in_the_sum() -> None:
    """Eq. 3 in the additive form: what the paper says of lambda_1 holds. Without it the load is more skewed."""

    def largest_share(lambda_1: float) -> float:
        nodes = [where for _, _, where in decisions("paper_additive", lambda_1=lambda_1)]
        return max(nodes.count(node_id) for node_id in "abc") / len(nodes)

    assert largest_share(0.0) > 1.3 * largest_share(0.15)
    assert largest_share(0.15) < 0.5


def test_eq_3_the_ratio_prefers_the_slower_of_equals() -> None:
    """Eq. 3 as released: IP is negative, so a larger R makes the quotient larger. A flaw of the form, kept."""
    core = core_with("paper_ratio", paper_node("a"), paper_node("b"))
    request(core, "first", 0.0)
    terms = {term.node_id: term for term in terms_of(request(core, "second", 0.0))}
    assert terms["a"].response_s > terms["b"].response_s
    assert terms["a"].idleness_profit == terms["b"].idleness_profit
    assert terms["a"].score > terms["b"].score


@pytest.mark.parametrize(
    ("policy", "response_s"), [("paper_additive", 3.0), ("paper_ratio", 3.0), ("paper_released", 2.0)]
)
@pytest.mark.parametrize(("units", "is_held"), [(5.1, True), (4.9, False)])
def test_eq_4_training_is_held_back_beyond_five_units(
    policy: str, response_s: float, units: float, is_held: bool
) -> None:
    """Eq. 4: a training task whose own predicted response exceeds 5 SLO units is deferred while requests arrive. Behind
    one request it responds after 3 s; in the released code, where no stage waits for the one before, after 2 s."""
    core = core_with(policy, paper_node(), slo_unit_s=response_s / units)
    request(core, "r", 0.0)
    assert (train(core, "t") == [Defer("t", "held_back")]) is is_held


def test_eq_4_deferred_training_is_tried_again_and_runs_when_the_requests_are_gone() -> None:
    """Eq. 4, the deferred queue: held while a request is there, released by its end."""
    core = core_with("paper_additive", paper_node(), slo_unit_s=0.5)
    request(core, "r", 0.0)
    assert train(core, "t") == [Defer("t", "held_back")]
    assert core.step(0.1, Tick()) == []
    assert chosen(core.step(3.0, TaskEnded("r", "a", ok=True, output_tokens=1))) == "a"


@pytest.mark.parametrize(("op_s", "is_held"), [(0.45, True), (0.3, False)])
def test_eq_4_lemix_holds_back_what_would_break_a_promise(op_s: float, is_held: bool) -> None:
    """Eq. 4 in LeMix's form: the overrun that one more operation causes to a request (needs 0.1 s, due in 0.5)."""
    node = NodeSpec("a", 1, constant(1, prefill=0.1, decode=0.01, train_forward=op_s, train_backward=op_s))
    core = core_with("lemix", node, default_slo=SloTarget(ttft_s=0.5))
    request(core, "r", 0.0)
    assert (train(core, "t") == [Defer("t", "held_back")]) is is_held


# ----------------------------------------------------------------------------- runtime: A-PP and memory


@pytest.mark.parametrize("num_nodes", [2, 3])
def test_a_pp_the_next_microbatch_follows_the_first_stages_forward(num_nodes: int) -> None:
    """Asynchronous pipeline (A-PP), one stream for the cluster as in the released code: the next micro-batch leaves
    when the forward of the one before ended on its first stage, whatever backwards are to come."""
    nodes = [paper_node(node_id) for node_id in "abc"[:num_nodes]]
    core = core_with("separate", *nodes, policy_options={"one_stream": True}, max_inflight_training=4)
    placed = train(core, "m0")
    for index in range(1, 4):
        train(core, f"m{index}")
    for index in range(3):
        where = chosen(placed)
        at_s = 1.0 + index
        upper = OpFinished(where, 1, OpKind.TRAIN_FORWARD, at_s - 0.5, at_s, (f"m{index}",))
        assert not any(isinstance(command, Assign) for command in core.step(at_s, upper))
        placed = core.step(at_s, OpFinished(where, 0, OpKind.TRAIN_FORWARD, at_s - F, at_s, (f"m{index}",)))
        assert [command.task_id for command in placed if isinstance(command, Assign)] == [f"m{index + 1}"]


@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_pp_every_node_has_a_stream_with_a_bounded_window(window: int) -> None:
    """A-PP as LeMix runs it: per node at most `window` micro-batches have their backward to come; the end of one on the
    first stage releases the next of that node's stream."""
    core = core_with("round_robin", paper_node("a"), paper_node("b"), max_inflight_training=window)
    commands = [command for index in range(2 * window + 2) for command in train(core, f"m{index}")]
    assert sum(isinstance(command, Assign) for command in commands) == 2 * window
    ended = core.step(6.0, OpFinished("b", 0, OpKind.TRAIN_BACKWARD, 4.0, 6.0, ("m1",)))
    assert chosen(ended) == "b"


def test_algorithm_2_memory_is_checked_before_a_request_starts_and_nothing_is_dropped() -> None:
    """Algorithm 2, the check before the forward: a request whose KV cache does not fit waits until it does, where the
    released code drops it. Nothing is offloaded, so the wait has no end of its own."""
    core = NodeCoreConfig(num_stages=1, kv_capacity_tokens=100)
    node = VirtualNode(node_id="a", latency=constant(1, prefill=0.1, decode=0.01), core=core)
    work: list[Work] = [Request(f"r{index}", 0.0, 50, 11, 40) for index in range(4)]
    result = Simulation(SimulationConfig(core=CoreConfig(policy="round_robin")), [node], work).run()
    first_s = sorted(record.first_token_s or 0.0 for record in result.requests())
    # Prefill 0.1 s and ten iterations of 0.01 s each, one request after the other.
    assert first_s == pytest.approx([0.1, 0.3, 0.5, 0.7])
    assert {record.outcome for record in result.requests()} == {"stop"}


def test_algorithm_2_what_can_never_fit_is_refused_with_the_numbers() -> None:
    """Algorithm 2: a request that no wait can help is refused at once and says why."""
    node = NodeSpec("a", 1, constant(1, prefill=0.1), kv_capacity_tokens=100)
    (refusal,) = request(core_with("lemix", node), "r", 0.0, prompt=100)
    assert isinstance(refusal, Reject)
    assert refusal.code == "RESOURCE_EXHAUSTED"
    assert "101" in refusal.message
    assert "100" in refusal.message


# ----------------------------------------------------------------------------- evaluation


def simulate(policy: str, work: list[Work], *, num_nodes: int = 4, **options: float | bool) -> SimulationResult:
    """`num_nodes` of two stages; every op of a request takes 30 ms per stage, a micro-batch 30 and 60 ms."""
    latency = constant(2, prefill=0.03, train_forward=0.03, train_backward=0.06)
    core = NodeCoreConfig(
        num_stages=2,
        max_batch=1,
        max_prefill_tokens=1,
        weight_handling="stash",
        gradient_buffers=2,
        max_inflight_training=8,
    )
    nodes = [
        VirtualNode(node_id=f"n{index}", latency=latency, core=core, max_training_parts=64)
        for index in range(num_nodes)
    ]
    config = CoreConfig(
        policy=policy,
        policy_options=dict(options),
        default_slo=SLO,
        max_waiting_training=1024,
        max_inflight_training=8,
    )
    return Simulation(SimulationConfig(core=config), nodes, work).run()


#: Five units: the forward time of a request, 60 ms.
SLO = SloTarget(ttft_s=0.3)


def arrivals(num: int, rate: float, *, start_s: float = 0.0) -> list[Work]:
    """Poisson arrivals, one token each."""
    tasks = requests(num, rate, seed=3, start_s=start_s)
    return [Request(f"{start_s}-{task.task_id}", task.arrival_s, 100, 1, 1, SLO) for task in tasks]


def job(num: int, *, every_s: float = 0.0) -> list[Work]:
    return [Microbatch(f"m{index}", index * every_s, "job", 1, 100) for index in range(num)]


def test_throughput_at_light_load_comes_from_packing() -> None:
    """Evaluation, throughput per node-second over separate clusters (up to 3.53x in the paper): largest at light to
    moderate rates, where the work fits on few nodes. A margin of 1.3 is what has to be reached at every load."""
    work = [*arrivals(150, 5.0), *job(150, every_s=0.2)]
    lemix, separate = (measure(simulate(policy, work), slo_s=0.3, hold_s=10.0) for policy in ("lemix", "separate"))
    assert lemix.nodes_used < separate.nodes_used == 4
    assert lemix.tasks_per_held_node_s > 1.3 * separate.tasks_per_held_node_s
    assert lemix.slo_attainment >= separate.slo_attainment - 0.02


def test_attainment_in_a_burst_where_separate_has_too_few_serving_nodes() -> None:
    """Evaluation, SLO attainment over separate clusters (up to 2.12x): largest when many nodes train. Two nodes serve
    66 requests/s; a burst of 100/s overwhelms them, while four nodes that also train keep up, requests first."""
    work = [*arrivals(50, 10.0), *arrivals(400, 100.0, start_s=5.0), *job(600)]
    lemix, separate = (measure(simulate(policy, work), slo_s=0.3, hold_s=10.0) for policy in ("lemix", "separate"))
    assert separate.slo_attainment < 0.6
    assert lemix.slo_attainment > 0.95
    assert lemix.trained_tasks == separate.trained_tasks == 600


def steps_between_copies(every_steps: int) -> list[int]:
    """Optimizer steps of the trainer from one copy of its weights to the next, under `separate`."""
    simulation = Harness(CoreConfig(policy="separate", sync_every_steps=every_steps, max_inflight_training=1), {})
    for node_id in "ab":
        simulation.at(0.0, NodeJoined(spec(node_id)))
    simulation.offer(harness_microbatches(40))
    simulation.run()
    steps, between = 0, []
    for entry in simulation.log:
        steps += entry.event["type"] == "OpFinished" and entry.event["op"] == "optimizer_step"
        if any(command["type"] == "TakeSnapshot" for command in entry.commands):
            between.append(steps)
            steps = 0
    return between


@pytest.mark.parametrize("every_steps", [4, 10])
def test_separate_serves_weights_that_are_k_steps_old(every_steps: int) -> None:
    """Baselines, Separate: the checkpoint is copied every k steps (k longer than a copy takes), so just before one the
    served weights are k steps old."""
    between = steps_between_copies(every_steps)
    assert len(between) == 40 // every_steps
    assert set(between) == {every_steps}


def test_mixed_nodes_serve_the_weights_they_have_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation, inference loss: a node that trains serves its newest weights. Every prefill is stamped with as many
    steps as its node had made when it began."""
    traces: list[OpFinished] = []
    step = SchedulerCore.step

    def noted(core: SchedulerCore, now_s: float, event: object) -> list[Command]:
        if isinstance(event, OpFinished):
            traces.append(event)
        return step(core, now_s, event)  # type: ignore[arg-type]

    monkeypatch.setattr(SchedulerCore, "step", noted)
    simulate("lemix", [*arrivals(60, 10.0), *job(40)], num_nodes=2)
    prefills = [trace for trace in traces if trace.op is OpKind.PREFILL and trace.stage == 0]
    for prefill in prefills:
        made = [
            trace
            for trace in traces
            if trace.op is OpKind.OPTIMIZER_STEP
            and (trace.node_id, trace.stage) == (prefill.node_id, 0)
            and trace.end_s <= prefill.begin_s
        ]
        assert prefill.weight_step == len(made)
    assert len({prefill.weight_step for prefill in prefills}) > 5


def test_training_fills_the_time_that_serving_leaves() -> None:
    """Motivation: serving nodes idle between requests and training pipelines in bubbles; sharing uses both. As many
    tasks on half the nodes, and the stages that are in use are busier."""
    work = [*arrivals(200, 10.0), *job(200, every_s=0.1)]
    mixed = measure(simulate("lemix", work, num_nodes=2), slo_s=0.3, hold_s=10.0)
    separate = measure(simulate("separate", work, num_nodes=4), slo_s=0.3, hold_s=10.0)
    assert mixed.num_ok == separate.num_ok == 400
    assert mixed.utilisation > 1.5 * separate.utilisation
    assert mixed.slo_attainment >= 0.95
