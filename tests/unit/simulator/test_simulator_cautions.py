"""Warnings: what is told about a trace, a profile and a cluster whose figures mislead, and when nothing is."""

import io
import json
import random
from pathlib import Path

import pytest
from rich.console import Console

from services.latency.artifact import document_hash
from services.simulator.__main__ import main
from services.simulator.overload import queue_of
from services.simulator.types import Request, TaskRecord

_OPS = {"PREFILL": 0.1, "DECODE": 0.01, "TRAIN_FORWARD": 0.1, "TRAIN_BACKWARD": 0.2}


class Planner:
    """Simulates a trace; `warnings` are those of the last run, as printed."""

    def __init__(self, directory: Path) -> None:
        self.trace, self.profile, self.summary = (directory / name for name in ("t.csv", "1.json", "out.json"))
        fits = [
            {"op": f"OP_KIND_{op}", "model": "constant", "coefficients": [seconds], "chosen": True}
            for op, seconds in _OPS.items()
        ]
        points = [
            {"op": f"OP_KIND_{op}", "batch": batch, "length": length}
            for op in _OPS
            for batch, length in ((1, 16), (1, 256), (16, 64))
        ]
        artifact = {"model": "tiny", "num_stages": 1, "fits": fits, "measurements": points}
        self.profile.write_text(json.dumps(artifact | {"content_hash": document_hash(artifact)}))
        self.write("0,10,2", "1,20,4")

    def write(self, *rows: str, columns: str = "arrival_s,prompt_tokens,output_tokens") -> None:
        self.trace.write_text("\n".join((columns, *rows, "")))

    def warnings(self, *options: object, traffic: tuple[str, ...] = ()) -> list[str]:
        paths = [*(traffic or ("--trace", str(self.trace))), "--profile", str(self.profile)]
        output = io.StringIO()
        arguments = ["simulate", *paths, "--json", str(self.summary), *map(str, options)]
        assert main(arguments, Console(file=output, width=80)) == 0
        lines = output.getvalue().splitlines()
        told = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
        assert json.loads(self.summary.read_text())["warnings"] == told
        return [line.replace(str(self.trace), "TRACE").replace(str(self.profile), "PROFILE") for line in told]


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    return Planner(tmp_path)


_SESSIONS = "arrival_s,prompt_tokens,output_tokens,session_id"


def test_nothing_is_said_without_a_reason(planner: Planner) -> None:
    assert planner.warnings("--training-tokens-per-s", 100, "--train-length", 64) == []


def test_outputs_beyond_the_limit_are_cut_and_told(planner: Planner) -> None:
    assert planner.warnings("--max-tokens", 3) == [
        "TRACE: line 3: column 'output_tokens': 4 is cut to --max-tokens 3, as 1 of 2 outputs are"
    ]
    assert json.loads(planner.summary.read_text())["traffic"]["mean_output_tokens"] == 2.5


def test_drawn_outputs_are_cut_too(planner: Planner) -> None:
    drawn = ("--prompt-tokens", "9,0", "--output-tokens", "7,0", "--rate", "1", "--duration-s", "9")
    (told,) = planner.warnings("--max-tokens", 3, traffic=drawn)
    assert told.startswith("drawn traffic: output of 7 tokens is cut to --max-tokens 3, as ")


@pytest.mark.parametrize("option", ["--kv-tokens", "--max-context-tokens"])
def test_requests_that_no_node_takes_are_told(planner: Planner, option: str) -> None:
    """By default every request may produce as much as the longest of them: 20 + 4 tokens are too many."""
    assert planner.warnings(option, 20) == [
        f"TRACE: line 3: column 'prompt_tokens': 20 and an output of at most 4 exceed {option} 20: "
        "1 of 2 requests are refused"
    ]


def test_a_prefix_cache_without_sessions_is_told(planner: Planner) -> None:
    assert planner.warnings("--prefix-cache-tokens", 9) == [
        "--prefix-cache-tokens keeps nothing without sessions: TRACE: column 'session_id' names none"
    ]


def test_sessions_without_a_prefix_cache_are_told(planner: Planner) -> None:
    planner.write("0,10,2,a", "1,12,2,a", columns=_SESSIONS)
    assert planner.warnings() == [
        "TRACE: column 'session_id': nothing is kept between turns without --prefix-cache-tokens"
    ]


def test_a_turn_shorter_than_its_history_is_told(planner: Planner) -> None:
    planner.write("0,10,2,a", "1,3,2,", "2,13,2,a", "3,14,1,a", "4,16,1,a", columns=_SESSIONS)
    assert planner.warnings("--prefix-cache-tokens", 99) == [
        "TRACE: line 5: column 'prompt_tokens': 14 is less than the 15 tokens of session 'a' up to line 4; "
        "a prompt holds the turns before it (1 of 5 rows)"
    ]


def test_what_is_beyond_the_measured_grid_is_told_once_per_kind(planner: Planner) -> None:
    planner.write("0,300,2", "1,400,4")
    training = ("--training-tokens-per-s", 900, "--train-batch", 17, "--train-length", 64)
    assert planner.warnings("--max-batch", 17, *training) == [
        "PROFILE: prefill is extrapolated: length measured 16 to 256, wanted 400",
        "PROFILE: decode is extrapolated: batch measured 1 to 16, wanted 17; context measured 16 to 256, wanted 404",
        "PROFILE: training is extrapolated: batch measured 1 to 16, wanted 17; tokens measured 16 to 1024, wanted 1088",
    ]


def test_an_overloaded_cluster_is_told_with_its_numbers(planner: Planner) -> None:
    """A node of one request at a time answers 10 per second; 20 come."""
    planner.write(*(f"{index / 20},10,1" for index in range(400)))
    alone = ("--max-prefill-tokens", 1, "--policy", "least_loaded", "--nodes", 1, "--noise", 0)
    assert planner.warnings(*alone) == [
        "least_loaded is overloaded: in the second half of the traffic 20.05 requests/s arrive and 10.03/s are "
        "answered; 101 wait when it begins, 201 when it ends"
    ]
    assert planner.warnings(*alone[:-3], 3, "--noise", 0) == []


def test_training_that_does_not_keep_up_is_told(planner: Planner) -> None:
    """A micro-batch of 64 tokens takes 0.3 s: 213 tokens/s are the most a node trains."""
    planner.write("0,10,1", "50,10,1")
    training = ("--training-tokens-per-s", 400, "--train-length", 64, "--nodes", 1, "--policy", "least_loaded")
    (told,) = planner.warnings(*training)
    assert told.startswith("least_loaded does not keep up with training: 400 tokens/s asked for, 2")


def test_a_horizon_before_the_last_arrival_is_told(planner: Planner) -> None:
    assert planner.warnings("--horizon-s", 0.5) == [
        "--horizon-s 0.5 ends before 1 of 2 requests arrive; they count as missed"
    ]


def test_times_count_from_the_first_row(planner: Planner) -> None:
    planner.write("1700000000,10,2", "1700000004,10,2")
    assert planner.warnings() == []
    summary = json.loads(planner.summary.read_text())
    assert summary["traffic"]["rate"] == 0.5
    assert summary["policies"]["lemix"][0]["ended_s"] < 5.0


def test_a_plan_warns_as_well(planner: Planner, capsys: pytest.CaptureFixture[str]) -> None:
    planner.write("0,300,2", "1,250,4")
    output = io.StringIO()
    paths = ["--trace", str(planner.trace), "--profile", str(planner.profile)]
    assert main(["plan", "fewest-nodes", *paths], Console(file=output, width=80)) == 0
    assert f"warning: {planner.profile}: prefill is extrapolated" in output.getvalue()


# ----------------------------------------------------------------------------- the queue


def _record(index: int, arrival_s: float, first_s: float | None, outcome: str = "stop", prompt: int = 10) -> TaskRecord:
    request = Request(f"r{index}", arrival_s, prompt, 1, 1)
    return TaskRecord(request, first_token_s=first_s, ended_s=first_s, outcome=outcome if first_s or outcome else "")


def _served(rate: float, capacity: float, seconds: float) -> list[TaskRecord]:
    arrivals = [index / rate for index in range(int(seconds * rate))]
    return [_record(index, at_s, max(at_s, index / capacity) + 0.1) for index, at_s in enumerate(arrivals)]


@pytest.mark.parametrize(("load", "grows"), [(0.5, False), (0.99, False), (1.15, True), (3.0, True)])
def test_a_queue_grows_when_more_is_offered_than_can_be_done(load: float, grows: bool) -> None:
    assert queue_of(_served(10.0 * load, 10.0, 100.0)).grows is grows


def test_a_burst_at_the_end_is_no_overload() -> None:
    calm = _served(1.0, 10.0, 100.0)
    burst = [_record(1000 + index, 99.0, 99.0 + index / 10.0) for index in range(30)]
    assert not queue_of(calm + burst).grows


def test_refused_for_want_of_room_counts_as_waiting_but_what_can_never_run_does_not() -> None:
    """Every other request is answered at once, the others are refused."""
    arrivals = [index / 10.0 for index in range(400)]

    def run(prompt: int) -> bool:
        records = [
            _record(i, at_s, at_s + 0.1) if i % 2 else _record(i, at_s, None, "rejected", prompt)
            for i, at_s in enumerate(arrivals)
        ]
        random.Random(0).shuffle(records)
        return queue_of(records).grows

    assert run(prompt=10)
    assert not run(prompt=11)


def test_a_trace_of_one_moment_has_no_halves() -> None:
    assert not queue_of([_record(index, 0.0, 5.0) for index in range(50)]).grows
