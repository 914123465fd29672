"""Steps of a run as records, and its simulation."""

import json

import pytest

from bench.fidelity import compare, delays, log
from bench.fidelity.delays import Delays
from bench.fidelity.simulated import Truth, simulate
from bench.live.errors import LiveError
from services.scheduler.core.codec import command_to_json, config_to_json, event_to_json
from services.scheduler.event_log import VERSION
from services.simulator.types import Request
from tests.unit.fidelity import runs

NO_DELAYS = Delays(0.0, 0.0, 0.0, 0.0)


def test_a_request_alone_takes_what_its_operations_take():
    trace = runs.trace(work=[Request("r0", 1.0, 100, 3, 16, runs.SLO)])
    request = trace.requests["r0"]
    prefill_s = 2 * (0.004 + 0.0002 * 100)
    assert request.ok
    assert request.node_id == "node-0"
    assert request.ttft_s == pytest.approx(prefill_s)
    assert request.predicted_s == pytest.approx(prefill_s)
    # The contexts of the two further tokens are 100 and 101, or one more.
    assert request.tpot_s == pytest.approx(2 * (0.008 + 0.0005 + 0.000001 * 101), abs=3e-6)
    assert request.output_tokens == 3


def test_a_request_refused_has_no_times():
    trace = runs.trace(work=[Request("r0", 1.0, 100, 3, 1 << 31, runs.SLO)])
    assert not trace.requests["r0"].ok
    assert trace.requests["r0"].ttft_s == float("inf")


def test_the_simulation_of_a_simulated_run_is_that_run():
    live = runs.trace(trains=True)
    again = simulate(live, 1000.0, NO_DELAYS, Truth())
    assert len(again.ops) == len(live.ops)
    for task_id, request in live.requests.items():
        assert again.requests[task_id].ttft_s == pytest.approx(request.ttft_s)
    both = [compare.figures(trace, 1.0, 9.0, runs.SLO) for trace in (live, again)]
    assert all(value == pytest.approx(0.0, abs=1e-6) for value in compare.compare(*both).values())


def test_delays_of_a_run_are_found_and_given_to_its_simulation():
    given = Delays(dispatch_s=0.003, handover_s=0.001, report_s=0.02, outcome_s=0.002)
    live = runs.trace(**given._asdict())
    found = delays.measure(live, 0.0)
    assert found == pytest.approx(given)
    again = simulate(live, 1000.0, found, Truth())
    assert again.requests["r7"].ttft_s == pytest.approx(live.requests["r7"].ttft_s)


def test_the_spread_of_runs_is_from_the_lowest_to_the_highest():
    middle = compare.figures(runs.trace(), 1.0, 9.0, runs.SLO)
    low = middle._replace(slo_attainment=0.5, ttft_p95_s=0.1, tokens_per_s=10.0)
    high = middle._replace(slo_attainment=0.7, ttft_p95_s=0.15, tokens_per_s=12.0)
    assert compare.spread([low, high]) == pytest.approx(
        {"slo_attainment_points": 20.0, "throughput_pct": 20.0, "ttft_p95_pct": 50.0}
    )


def test_a_run_without_anything_has_no_delays():
    assert delays.measure(runs.trace(work=[]), 0.0) == NO_DELAYS


def test_figures_count_what_arrived_and_ran_between_two_times():
    live = runs.trace(trains=True)
    found = compare.figures(live, 1.0, 9.0, runs.SLO)
    prompts = sum(request.task.prompt_tokens for request in live.requests.values())
    assert found.requests == 40
    assert found.slo_attainment == 1.0
    assert found.prompt_tokens_per_s == pytest.approx(prompts / 8.0, rel=0.02)
    assert found.trained_tokens_per_s > 0.0
    assert 0.5 < found.utilisation <= 1.0
    assert compare.figures(live, 100.0, 101.0, runs.SLO).requests == 0


def test_operations_slower_than_the_profile_show():
    slip = compare.op_slip(runs.trace(slower=1.3, trains=True), 0.0, 1000.0)
    assert set(slip) >= {"prefill", "decode", "train_forward", "train_backward", "optimizer_step"}
    assert all(value == pytest.approx(0.3, abs=1e-9) for value in slip.values())


def test_a_log_is_read_as_its_run(tmp_path):
    config, steps = runs.steps_of()
    lines = [{"version": VERSION, "config": config_to_json(config)}]
    lines += [
        {"now_s": now_s, "event": event_to_json(event), "commands": [command_to_json(item) for item in commands]}
        for now_s, event, commands in steps
    ]
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trace, read_steps = log.read(path)
    assert len(read_steps) == len(steps)
    assert trace.requests["r3"].ttft_s == runs.trace().requests["r3"].ttft_s
    path.write_text(path.read_text() + json.dumps({"dropped": 3}) + "\n")
    with pytest.raises(LiveError, match="left 3 steps out"):
        log.read(path)
    with pytest.raises(LiveError, match=r"nothing\.jsonl"):
        log.read(tmp_path / "nothing.jsonl")
