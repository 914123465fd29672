"""LeMix's own policy: which nodes are open, which one a request gets, where training runs and in how many pieces."""

import pytest

from services.latency import LatencyModel, NodeLatency, OpKind
from services.scheduler.core.commands import Assign, NodeTerms
from services.scheduler.core.events import NodeJoined, NodeLost, NodeProfiled, OpFinished, TaskArrived, TaskEnded
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.core.tasks import SloTarget
from tests.unit.scheduler_core.support import assigned, constant_latency, core_with, microbatch, node, request


def place(core: SchedulerCore, now_s: float, task_id: str, **kwargs: object) -> str:
    """Node a request goes to."""
    task = request(task_id, arrival_s=now_s, **kwargs)  # type: ignore[arg-type]
    placed = dict(assigned(core.step(now_s, TaskArrived(task))))
    return placed[task_id]


TTFT_S = 0.5


def lemix_core(*names: str, **config: object) -> SchedulerCore:
    """Prefills of 0.1 s, a promise of 0.5 s: the fifth request on a node keeps it, the sixth does not."""
    return core_with(
        *(node(name) for name in names),
        policy="lemix",
        **{"default_slo": SloTarget(ttft_s=TTFT_S, tpot_s=0.1), **config},
    )


def placements(core: SchedulerCore, count: int, now_s: float = 1.0, name: str = "r") -> str:
    return "".join(place(core, now_s, f"{name}{index}") for index in range(count))


def test_lemix_opens_a_node_when_the_open_ones_would_break_the_promise() -> None:
    assert placements(lemix_core("a", "b", "c"), 6) == "aaaaab"


def test_lemix_spreads_requests_over_the_open_nodes() -> None:
    # "b" is open from the sixth on; then the least stressed node is next.
    assert placements(lemix_core("a", "b", "c"), 10) == "aaaaabbbbb"


def test_lemix_lets_the_node_it_opened_last_help_first() -> None:
    # All come in the same moment: the third node waits for the dwell time, or for a stress of twice the promise.
    assert placements(lemix_core("a", "b", "c"), 21) == "aaaaabbbbb" + "ab" * 5 + "c"


def test_lemix_opens_the_next_node_after_the_dwell_time() -> None:
    core = lemix_core("a", "b", "c")
    placements(core, 12)
    assert place(core, 1.9, "soon") == "a"
    assert place(core, 2.1, "later") == "c"


def test_lemix_closes_a_node_the_requests_can_do_without() -> None:
    core = lemix_core("a", "b")
    placements(core, 6)
    for index in range(4):
        core.step(1.5, TaskEnded(f"r{index}", "a", ok=True, output_tokens=1))
    assert placements(core, 3, now_s=1.6, name="s") == "aba"
    # "a" uses more than half of the promise, so "b" would be next, but alone it is enough.
    assert placements(core, 2, now_s=2.1, name="t") == "aa"


def test_lemix_opens_a_node_for_a_hopeless_promise_only_when_an_idle_one_would_halve_the_response() -> None:
    core = lemix_core("a", "b", default_slo=SloTarget(ttft_s=0.09))
    assert placements(core, 4) == "aabb"


def test_lemix_opens_no_node_for_a_token_promise_that_no_node_can_keep() -> None:
    latency = constant_latency(decode=0.02)
    specs = [node(name, latency=latency) for name in ("a", "b", "c")]
    core = core_with(*specs, policy="lemix", default_slo=SloTarget(ttft_s=10.0, tpot_s=0.015))
    for index in range(8):
        now_s = 10.0 * index
        assert place(core, now_s, f"r{index}", output=2) == "a"
        core.step(now_s + 1.0, TaskEnded(f"r{index}", "a", ok=True, output_tokens=2))


def test_lemix_without_hold_back_still_trains_on_what_the_backlog_is_worth() -> None:
    core = lemix_core("a", "b", "c", max_hold_back_s=0.0)
    placed = [pair for index in range(4) for pair in assigned(core.step(0.0, TaskArrived(microbatch(f"m{index}"))))]
    assert {node_id for _, node_id in placed} == {"a"}


def test_lemix_goes_back_to_the_first_node_when_it_has_room_again() -> None:
    core = lemix_core("a", "b")
    for index in range(6):
        place(core, 1.0, f"r{index}")
    for index in range(3):
        core.step(1.3, TaskEnded(f"r{index}", "a", ok=True, output_tokens=1))
    core.step(1.3, OpFinished("a", 0, OpKind.PREFILL, 1.2, 1.3, ("r3",), 100, first_token=True))
    assert place(core, 1.3, "next") == "a"


def training_everywhere(**options: float) -> SchedulerCore:
    """Two nodes with short training operations and more training than the core can see: both are open."""
    latency = constant_latency(train_forward=0.001, train_backward=0.001, optimizer_step=0.001)
    core = core_with(
        *(node(name, latency=latency) for name in ("a", "b")),
        policy="lemix",
        policy_options=options,
        default_slo=SloTarget(ttft_s=1.0, tpot_s=0.1),
        max_inflight_training=1,
        max_waiting_training=2,
    )
    for index in range(4):
        core.step(0.0, TaskArrived(microbatch(f"m{index}")))
    return core


def test_lemix_smaller_fraction_spreads_earlier_over_open_nodes() -> None:
    assert placements(training_everywhere(slo_fraction=1.0), 4) == "aaaa"
    assert placements(training_everywhere(slo_fraction=0.15), 4) == "abab"


def test_lemix_length_consistency_gathers_alike_lengths() -> None:
    def lengths_apart(consistency: float) -> str:
        core = training_everywhere(consistency=consistency)
        for index, prompt in enumerate([10, 12, 1000, 1010]):
            other = "b" if index < 2 else "a"
            core.step(0.0, NodeLost(other))
            place(core, 0.0, f"h{index}", prompt=prompt)
            core.step(0.0, NodeJoined(node(other)))
        return placements(core, 1)

    assert lengths_apart(0.0) == "a"


def test_lemix_counts_the_training_operation_that_may_hold_the_stage() -> None:
    core = lemix_core("a", "b", max_inflight_training=1, policy_options={"open_at": 0.7})
    core.step(0.0, TaskArrived(microbatch("m")))
    # "a" may be in a backward of 0.4 s: 0.4 + 0.1 > 0.7 * 0.5, while "b" is free.
    assert place(core, 0.1, "r") == "b"


def test_lemix_opens_a_node_when_decoding_together_would_break_the_token_promise() -> None:
    spec = node("a", latency=constant_latency(decode=0.11)), node("b")
    core = core_with(*spec, policy="lemix", default_slo=SloTarget(ttft_s=10.0, tpot_s=0.1))
    assert place(core, 1.0, "r", output=32) == "b"


def test_lemix_without_any_promise_uses_the_response_on_an_idle_node() -> None:
    core = core_with(node("a"), node("b"), policy="lemix")
    # 5 units of 0.1 s: the same promise of 0.5 s as above.
    assert placements(core, 6) == "aaaaab"


def test_lemix_opens_a_node_when_all_places_of_the_batch_are_taken() -> None:
    specs = [node(name, max_batch=2) for name in ("a", "b")]
    core = core_with(*specs, policy="lemix", default_slo=SloTarget(ttft_s=0.5, tpot_s=0.1))
    assert [place(core, 1.0, f"r{index}", output=200) for index in range(3)] == ["a", "a", "b"]


def test_lemix_opens_a_node_when_the_kv_cache_is_promised_away() -> None:
    specs = [node(name, kv_capacity_tokens=1000) for name in ("a", "b")]
    core = core_with(*specs, policy="lemix", default_slo=SloTarget(ttft_s=0.5, tpot_s=0.1))
    assert [place(core, 1.0, f"r{index}", prompt=200, output=200) for index in range(3)] == ["a", "a", "b"]


def test_lemix_trains_on_one_node_while_the_backlog_is_small() -> None:
    core = lemix_core("a", "b", max_inflight_training=2)
    placed = [pair for index in range(4) for pair in assigned(core.step(0.0, TaskArrived(microbatch(f"m{index}"))))]
    assert placed == [("m0", "a"), ("m1", "a")]


def test_lemix_trains_on_one_node_more_per_share_of_the_backlog() -> None:
    # A micro-batch keeps a stage busy for 0.6 s.
    core = lemix_core("a", "b", "c", max_inflight_training=1, policy_options={"backlog_s": 1.0})
    placed = [pair for index in range(4) for pair in assigned(core.step(0.0, TaskArrived(microbatch(f"m{index}"))))]
    assert placed == [("m0", "a"), ("m1", "b"), ("m2", "c")]


def test_lemix_trains_on_all_nodes_when_there_is_more_than_it_can_see() -> None:
    core = lemix_core("a", "b", "c", max_inflight_training=2, max_waiting_training=8)
    placed = [pair for index in range(8) for pair in assigned(core.step(0.0, TaskArrived(microbatch(f"m{index}"))))]
    assert [node_id for _, node_id in placed] == ["a", "a", "b", "c", "b", "c"]


def test_lemix_cuts_training_the_finer_the_less_an_iteration_may_lose() -> None:
    def parts(decoding: int, tpot_s: float) -> int:
        """Pieces beside so many requests that decode, in iterations of 1 ms and another 1 ms per request."""
        latency = constant_latency()
        models = {**latency.models[0], OpKind.DECODE: LatencyModel("full_decode", (1e-3, 1e-3, 0.0))}
        core = lemix_core(default_slo=SloTarget(ttft_s=10.0, tpot_s=tpot_s), initial_output_tokens=100)
        core.step(0.0, NodeJoined(node("a", latency=NodeLatency((models,)), max_training_parts=64)))
        for index in range(decoding):
            now_s = 100.0 * index
            core.step(now_s, TaskArrived(request(f"r{index}", arrival_s=now_s, output=100)))
            core.step(now_s + 0.1, OpFinished("a", 0, OpKind.PREFILL, now_s, now_s + 0.1, (f"r{index}",), 100, 0, True))
        (command,) = core.step(100.0 * decoding, TaskArrived(microbatch("m")))
        assert isinstance(command, Assign)
        return command.parts

    # A backward takes 0.4 s. Half of a prefill is 50 ms; of a promise of 42 ms one request leaves 40 ms.
    assert parts(1, tpot_s=1.0) == 8
    assert parts(1, tpot_s=0.042) == 10
    assert parts(9, tpot_s=0.042) == 13
    # Nothing is left.
    assert parts(1, tpot_s=0.001) == 64


def test_lemix_without_coefficients_per_node_takes_all_nodes_for_alike() -> None:
    def first(**options: object) -> str:
        slow, fast = constant_latency(prefill=0.3), constant_latency(prefill=0.1)
        nodes = (node("a", latency=slow), node("b", latency=fast))
        core = core_with(*nodes, policy="lemix", policy_options=options, default_slo=SloTarget(ttft_s=1.0, tpot_s=0.1))
        return place(core, 1.0, "r")

    assert first() == "b"
    assert first(per_node=False) == "a"


def test_lemix_without_coefficients_per_node_shares_what_it_learns_and_new_profiles() -> None:
    slow, fast = constant_latency(prefill=0.3), constant_latency(prefill=0.1)
    nodes = (node("a", latency=slow), node("b", latency=slow))
    core = core_with(*nodes, policy="lemix", policy_options={"per_node": False}, default_slo=SloTarget(1.0, 0.1))
    core.step(0.5, NodeProfiled("b", fast))
    predicted_s = [core.costs(node_id).node_s(OpKind.PREFILL, 1, 100) for node_id in ("a", "b")]
    assert predicted_s[0] == predicted_s[1] == pytest.approx((slow.node_s(OpKind.PREFILL, 1, 100) + 0.1) / 2)
    core.step(2.0, OpFinished("b", 0, OpKind.PREFILL, 1.0, 2.0, ("r",), 100, 0, True))
    assert core.costs("a").node_s(OpKind.PREFILL, 1, 100) > predicted_s[0]


def test_lemix_cuts_training_operations_where_the_runtime_can() -> None:
    def parts(most: int, **options: float) -> int:
        core = core_with(
            node("a", max_training_parts=most),
            policy="lemix",
            policy_options=options,
            default_slo=SloTarget(ttft_s=0.5),
        )
        place(core, 0.0, "r")
        (command,) = core.step(0.0, TaskArrived(microbatch("m")))
        assert isinstance(command, Assign)
        return command.parts

    # A backward of 0.4 s in pieces of half a prefill of 0.1 s.
    assert parts(64) == 8
    assert parts(64, cut=1.0) == 4
    assert parts(3) == 3
    assert parts(1) == parts(64, cut=0.0) == 1


def test_lemix_opens_the_fastest_nodes_first() -> None:
    fast, slow = constant_latency(prefill=0.05), constant_latency(prefill=0.2)
    specs = [node("a", latency=slow), node("b", latency=fast), node("c", latency=fast), node("d")]
    core = core_with(*specs, policy="lemix", default_slo=SloTarget(ttft_s=TTFT_S, tpot_s=0.1))
    # The promise is kept by ten requests on "b"; "c" is as fast, "d" the next, "a" the last.
    assert placements(core, 11) == "b" * 10 + "c"
    assert [terms.node_id for terms in _terms_of_all(core, 40)] == ["b", "c", "d", "a"]


def test_lemix_sorts_its_nodes_again_when_one_got_a_new_profile() -> None:
    core = lemix_core("a", "b")
    core.step(0.5, NodeJoined(node("b", latency=constant_latency(prefill=0.05))))
    assert place(core, 1.0, "r") == "b"


def test_lemix_trains_on_the_fastest_nodes() -> None:
    specs = [node("a", latency=constant_latency(prefill=0.2, train_forward=0.4, train_backward=0.8)), node("b")]
    core = core_with(*specs, policy="lemix")
    assert assigned(core.step(0.0, TaskArrived(microbatch("m0")))) == [("m0", "b")]


def _terms_of_all(core: SchedulerCore, count: int) -> tuple[NodeTerms, ...]:
    """Terms of the last of `count` requests that come in one moment: a burst that opens every node."""
    terms: tuple[NodeTerms, ...] = ()
    for index in range(count):
        for command in core.step(2.0, TaskArrived(request(f"burst{index}", arrival_s=2.0))):
            if isinstance(command, Assign):
                terms = command.terms
    return terms


# ----------------------------------------------------------------------------- demotion


def demoted(core: SchedulerCore, count: int, **kwargs: object) -> list[float | None]:
    """What requests that come in one moment are queued by."""
    found = []
    for index in range(count):
        commands = core.step(1.0, TaskArrived(request(f"q{index}", arrival_s=1.0, **kwargs)))  # type: ignore[arg-type]
        found += [command.queue_ttft_s for command in commands if isinstance(command, Assign)]
    return found


def test_a_request_that_breaks_its_promise_anyway_lets_others_pass() -> None:
    # Five fit into 0.5 s. Each later one would be the sixth, for those before it in the queue were put off.
    assert demoted(lemix_core("a"), 8) == [TTFT_S] * 5 + [12.0 * TTFT_S] * 3


def test_nobody_is_demoted_when_told_so() -> None:
    assert demoted(lemix_core("a", policy_options={"demotion": 0.0}), 8) == [TTFT_S] * 8


def test_demoted_requests_are_no_load_for_one_that_keeps_its_promise() -> None:
    per_square = {OpKind.PREFILL: LatencyModel("quadratic", (1e-6,))}
    specs = [node(name, latency=NodeLatency(({**constant_latency().models[0], **per_square},))) for name in "ab"]
    core = core_with(*specs, policy="lemix", default_slo=SloTarget(ttft_s=1.0, tpot_s=0.1))
    # 1.44 s of prefill break the promise of 1 s on any node. The third would wait for both on "a".
    assert demoted(core, 3, prompt=1200) == [12.0, 12.0, 12.0]
    commands = core.step(1.0, TaskArrived(request("short", arrival_s=1.0, prompt=100)))
    (assign,) = (command for command in commands if isinstance(command, Assign))
    # One of the two on "a" may be running; the other one comes later.
    assert {t.node_id: t.response_s for t in assign.terms} == {"a": pytest.approx(1.45), "b": pytest.approx(1.45)}
    assert assign.queue_ttft_s == 12.0


def test_a_request_that_lacks_a_place_in_the_batches_is_not_demoted() -> None:
    core = core_with(node("a", max_batch=1), policy="lemix", default_slo=SloTarget(ttft_s=TTFT_S, tpot_s=0.1))
    # 100 tokens of 0.01 s each pass before the second one has a place.
    assert demoted(core, 2, output=100) == [TTFT_S, TTFT_S]


def test_who_has_a_promise_of_its_own_is_queued_by_it() -> None:
    assert demoted(lemix_core("a"), 2, ttft_s=0.3) == [None, None]


def test_a_request_of_a_lost_node_is_queued_anew() -> None:
    core = lemix_core("a")
    demoted(core, 6)
    core.step(1.1, NodeLost("a"))
    commands = core.step(1.2, NodeJoined(node("a", latency=constant_latency(prefill=0.01))))
    assert [c.queue_ttft_s for c in commands if isinstance(c, Assign)] == [TTFT_S] * 6
