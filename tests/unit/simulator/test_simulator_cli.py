"""`python -m services.simulator`: what it prints, what it writes, what it says about bad input."""

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from services.latency.artifact import document_hash
from services.simulator.__main__ import main

_GOLDEN = Path(__file__).parent / "golden" / "simulate.txt"
_OPS = {"PREFILL": 1.0, "DECODE": 0.1, "TRAIN_FORWARD": 1.0, "TRAIN_BACKWARD": 2.0, "OPTIMIZER_STEP": 0.5}
_TRACE = "arrival_s,prompt_tokens,output_tokens\n0,10,1\n0,12,3\n4.5,8,5\n20,10,1\n"


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "1.json"
    fits = [
        {"op": f"OP_KIND_{op}", "model": "constant", "coefficients": [seconds], "chosen": True}
        for op, seconds in _OPS.items()
    ]
    whole = {"profile_id": "abc-1", "model": "tiny", "num_stages": 1, "fits": fits}
    path.write_text(json.dumps(whole | {"content_hash": document_hash(whole)}))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(_TRACE)
    return path


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and what was printed, as on a wide page."""
    output = io.StringIO()
    code = main([str(argument) for argument in arguments], Console(file=output, width=100))
    return code, "".join(f"{line.rstrip()}\n" for line in output.getvalue().splitlines())


def test_a_small_run_prints_what_it_printed_before(profile: Path, trace: Path, tmp_path: Path) -> None:
    """To take over a wanted change: LEMIX_REWRITE_GOLDEN=1, then read the difference."""
    paths = ("--trace", trace, "--profile", profile, "--json", tmp_path / "out" / "summary.json")
    code, text = run("simulate", *paths, "--policy", "least_loaded", "--compare", "separate", "--training-backlog")
    assert code == 0
    if os.environ.get("LEMIX_REWRITE_GOLDEN"):
        _GOLDEN.parent.mkdir(exist_ok=True)
        _GOLDEN.write_text(text)
    assert text == _GOLDEN.read_text()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["policies"]) == {"least_loaded", "separate"}
    assert summary["nodes"] == 2
    assert summary["slo"] == {"ttft_ms": 5000.0, "tpot_ms": pytest.approx(500.0)}
    assert summary["traffic"]["num_requests"] == 4


def plan(tmp_path: Path, *arguments: object) -> tuple[int, str, dict[str, Any]]:
    path = tmp_path / "plan.json"
    code, text = run("plan", *arguments, "--json", path)
    return code, text, json.loads(path.read_text())


@pytest.fixture
def crowd(tmp_path: Path) -> Path:
    """Six requests at once."""
    path = tmp_path / "crowd.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "0,10,1\n" * 6)
    return path


def test_the_fewest_nodes_are_found_and_every_probe_is_shown(profile: Path, crowd: Path, tmp_path: Path) -> None:
    """A node serves two of the six in time: three nodes."""
    code, text, summary = plan(
        tmp_path, "fewest-nodes", "--trace", crowd, "--profile", profile, "--slo-ttft-ms", 2000,
        "--max-prefill-tokens", 1, "--policy", "least_loaded",
    )  # fmt: skip
    assert code == 0
    assert "answer: 3 nodes for attainment 0.99 with every seed\n2 nodes: not enough\n" in text
    assert summary["answer"] == {"nodes": 3, "backlog": False, "monotone": True, "finished": True}
    assert [(probe["nodes"], probe["passed"]) for probe in summary["probes"]] == [
        (1, False),
        (2, False),
        (3, True),
        (4, True),
    ]
    assert all(f"{nodes} node" in text for nodes in (1, 2, 3, 4))


def test_too_few_nodes_are_told_with_what_they_miss(profile: Path, crowd: Path, tmp_path: Path) -> None:
    code, text, summary = plan(
        tmp_path, "fewest-nodes", "--trace", crowd, "--profile", profile, "--slo-ttft-ms", 2000,
        "--max-prefill-tokens", 1, "--policy", "least_loaded", "--max-nodes", 2, "--slo-attainment", 1,
    )  # fmt: skip
    assert code == 1
    assert "up to 2 nodes, reaches attainment 1\nthe most nodes looked at miss attainment by 0.3333\n" in text
    assert summary["answer"]["nodes"] is None


def test_nodes_that_do_not_train_enough_are_too_few(profile: Path, trace: Path, tmp_path: Path) -> None:
    """Serving needs one node, training 70 tokens/s at 36.6 per node and second needs two more than half of one."""
    code, text, summary = plan(
        tmp_path, "fewest-nodes", "--workload", "hh-rlhf", "--rate", 0.02, "--profile", profile, "--slo-ttft-ms", 9e9,
        "--training-tokens-per-s", 70, "--policy", "round_robin", "--seed", 0, "--duration-s", 2000,
    )  # fmt: skip
    assert code == 0
    assert "fails: training does not keep up" in text
    assert summary["answer"]["nodes"] in (2, 3)


def test_a_backlog_that_breaks_nothing_fits_whole(profile: Path, trace: Path, tmp_path: Path) -> None:
    code, text, summary = plan(
        tmp_path, "most-training", "--trace", trace, "--profile", profile, "--p99-ttft-ms", 5000, "--nodes", 2,
        "--policy", "separate", "--seed", 3,
    )  # fmt: skip
    assert code == 0
    assert "a backlog that never drains" in text
    assert summary["answer"] == {"training_tokens_per_s": None, "backlog": True, "monotone": True, "finished": True}


def test_the_most_training_keeps_p99_and_the_next_rate_breaks_it(profile: Path, tmp_path: Path) -> None:
    code, text, summary = plan(
        tmp_path, "most-training", "--workload", "hh-rlhf", "--rate", 0.03, "--duration-s", 1000, "--profile", profile,
        "--p99-ttft-ms", 2500, "--nodes", 1, "--policy", "round_robin", "--max-probes", 9, "--seeds", "0,1",
    )  # fmt: skip
    assert code == 0
    runs = {probe["training_tokens_per_s"] or math.inf * probe["backlog"]: probe for probe in summary["probes"]}
    for probe in runs.values():
        kept = all((figures["ttft_p99_s"] or math.inf) <= 2.5 for figures in probe["runs"])
        assert probe["passed"] == kept
    assert runs[summary["answer"]["training_tokens_per_s"]]["passed"]
    assert "breaks it" in text


def test_p99_per_token_can_be_kept_too(profile: Path, trace: Path, tmp_path: Path) -> None:
    """Training between two iterations makes a token take a second and more, whatever TTFT allows."""
    question = (
        "most-training",
        "--trace",
        trace,
        "--profile",
        profile,
        "--p99-ttft-ms",
        9e6,
        "--policy",
        "round_robin",
    )
    assert plan(tmp_path, *question)[2]["answer"]["backlog"]
    code, text, summary = plan(tmp_path, *question, "--p99-tpot-ms", 150)
    assert code == 0
    assert not summary["answer"]["backlog"]
    assert "fails: p99 TPOT" in text


def test_no_training_fits_where_serving_alone_is_too_slow(profile: Path, trace: Path, tmp_path: Path) -> None:
    code, text, summary = plan(
        tmp_path, "most-training", "--trace", trace, "--profile", profile, "--p99-ttft-ms", 900
    )  # fmt: skip
    assert code == 1
    assert "no training fits; p99 TTFT within 900 ms is not kept even without\n" in text
    # Without training, and with all there is: nodes that train serve too.
    assert [probe["passed"] for probe in summary["probes"]] == [False, False]


def test_a_spent_budget_is_told(profile: Path, crowd: Path, tmp_path: Path) -> None:
    code, text, _ = plan(
        tmp_path, "fewest-nodes", "--trace", crowd, "--profile", profile, "--slo-ttft-ms", 1500, "--max-probes", 1
    )
    assert code == 1
    assert "stopped early" in text


def code_of(arguments: list[str]) -> int | str | None:
    """Exit code, whether returned or raised by the parser."""
    try:
        return main(arguments, Console(file=io.StringIO()))
    except SystemExit as stop:
        return stop.code


def test_an_interrupt_is_told(
    profile: Path, trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("services.simulator.pool.simulate", interrupt)
    assert code_of(["simulate", "--trace", str(trace), "--profile", str(profile)]) == 130
    assert capsys.readouterr().err == "simulate: interrupted\n"


GOOD = ("simulate", "--trace", "TRACE", "--profile", "PROFILE")
BAD: list[tuple[tuple[str, ...], str]] = [
    (("simulate",), "name one of --trace FILE, --workload NAME, or --prompt-tokens with --output-tokens"),
    (("simulate", "--trace", "TRACE", "--workload", "hh-rlhf"), "name one of"),
    (("simulate", "--trace", "TRACE"), "--profile is missing: name a profile the profiler stored"),
    (("simulate", "--trace", "no.csv", "--profile", "PROFILE"), "simulate: no.csv: No such file or directory\n"),
    (
        ("simulate", "--trace", "TRACE", "--profile", "no.json"),
        "simulate: no.json is not a profile: there is no such",
    ),
    (("simulate", "--trace", "PROFILE", "--profile", "PROFILE"), "line 1: column 'arrival_s' is missing"),
    (("simulate", "--trace", "TRACE", "--profile", "TRACE"), "is not a profile: it is not JSON"),
    ((*GOOD, "--model", "large"), "field 'model': is 'tiny', asked for is 'large'"),
    ((*GOOD, "--stages", "2"), "field 'num_stages': is 1, asked for are 2 stages"),
    ((*GOOD, "--nodes", "0"), "argument --nodes: must be at least 1 and at most 1024, got 0"),
    ((*GOOD, "--nodes", "many"), "argument --nodes: 'many' is no whole number"),
    ((*GOOD, "--policy", "best"), "argument --policy: invalid choice: 'best'"),
    ((*GOOD, "--compare", "lemix,best"), "unknown policy 'best'"),
    ((*GOOD, "--compare", "separate,separate"), "argument --compare: names a policy twice: separate,separate"),
    ((*GOOD, "--compare", "separate,lemix"), "--compare names lemix although it is --policy already"),
    ((*GOOD, "--policy-option", "cut=1", "--policy-option", "cut=2"), "--policy-option names cut twice"),
    (
        (*GOOD, "--kv-tokens", "99", "--prefix-cache-tokens", "100"),
        "--prefix-cache-tokens 100 is more than --kv-tokens",
    ),
    ((*GOOD, "--duration-s", "3"), "--duration-s does not go with --trace; --limit takes its first requests"),
    (("simulate", "--workload", "azure-code", "--limit", "3"), "--limit goes with --trace alone"),
    (("simulate", "--workload", "azure-code", "--speed", "3"), "--speed goes with --trace alone"),
    ((*GOOD, "--policy-option", "x"), "must be NAME=VALUE, got 'x'"),
    ((*GOOD, "--policy-option", "speed=1"), "policy 'lemix' has no option 'speed'"),
    (
        (*GOOD, "--kv-tokens", "9"),
        "trace.csv: line 4: no request fits into kv_tokens 9, not even a prompt of 8 ",
    ),
    ((*GOOD, "--rate", "3"), "--rate does not go with --trace"),
    ((*GOOD, "--seed", "1", "--seeds", "1,2"), "--seed and --seeds exclude each other"),
    ((*GOOD, "--seeds", "1,1"), "names a seed twice"),
    ((*GOOD, "--noise", "nan"), "argument --noise: must be at least 0, got nan"),
    ((*GOOD, "--slo-ttft-ms", "0"), "argument --slo-ttft-ms: must be above 0, got 0"),
    ((*GOOD, "--training-tokens-per-s", "5", "--training-backlog"), "not allowed with argument"),
    ((*GOOD, "--training-backlog", "--train-length", "64", "--max-context-tokens", "20"), "train_length: 64 tokens"),
    ((*GOOD, "--json", "TRACE/x.json"), "TRACE"),
    (("simulate", "--workload", "hh-rlhf", "--profile", "PROFILE"), "--rate is missing"),
    (("simulate", "--prompt-tokens", "10", "--output-tokens", "1,1", "--rate", "1"), "must be MEAN,STD, got '10'"),
    (("simulate", "--prompt-tokens", "10,1", "--rate", "1"), "--prompt-tokens and --output-tokens go together"),
    (("plan",), "arguments are required: question"),
    (("plan", "most-training", *GOOD[1:]), "arguments are required: --p99-ttft-ms"),
    (("plan", "fewest-nodes", *GOOD[1:], "--slo-attainment", "99"), "must be above 0 and at most 1, got 99"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], message: str, profile: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"TRACE": str(trace), "PROFILE": str(profile), "TRACE/x.json": f"{trace}/x.json"}
    given = [paths.get(argument, argument) for argument in arguments]
    code = code_of(given)
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("simulate: ")
    assert paths.get(message, message) in error
    assert error.count("\n") == 1


def test_a_profile_beyond_reason_is_refused(profile: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = json.loads(profile.read_text().replace("[1.0]", "[1e300]", 1))
    profile.write_text(json.dumps(changed | {"content_hash": document_hash(changed)}))
    assert code_of(["simulate", "--trace", str(trace), "--profile", str(profile)]) == 2
    told = "prefill of 12 tokens on stage 0 takes 1e+300 s, which is no time of an operation"
    assert capsys.readouterr().err == f"simulate: {profile}: {told}\n"


@pytest.mark.parametrize("command", [["simulate"], ["plan", "fewest-nodes"], ["plan", "most-training"]])
def test_the_help_begins_with_what_is_needed(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of([*command, "--help"]) == 0
    usage = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert usage[0] == f"usage: python -m services.simulator {' '.join(command)}"
    assert usage[1].startswith("  --profile FILE ")
    assert max(map(len, usage)) <= 80


def test_many_policies_stand_in_tables_that_fit_the_terminal(profile: Path, trace: Path) -> None:
    output = io.StringIO()
    others = ("separate", "round_robin", "least_loaded", "least_utilised", "queue_work", "paper_additive")
    options = ("--compare", ",".join(others), "--seeds", "0,1", "--noise", "0.1")
    arguments = ["simulate", "--trace", str(trace), "--profile", str(profile), *options]
    assert main(arguments, Console(file=output, width=80)) == 0
    lines = output.getvalue().splitlines()
    headings = [line.split() for line in lines if line.split() and set(line.split()) <= {"lemix", *others}]
    assert [name for heading in headings for name in heading] == ["lemix", *others]
    assert len(headings) > 1
    assert sum(line.startswith(" SLO attainment") for line in lines) == len(headings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("nan,1,1", "line 3: column 'arrival_s' must be at least 0, got nan"),
        ("-1,1,1", "line 3: column 'arrival_s' must be at least 0, got -1"),
        ("0,1,1", "line 3: column 'arrival_s' goes back in time (0 after 1)"),
        ("2,,1", "line 3: column 'prompt_tokens' is no number: ''"),
    ],
)
def test_a_bad_row_is_named(
    row: str, message: str, profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(f"arrival_s,prompt_tokens,output_tokens\n1,1,1\n{row}\n")
    assert main(["simulate", "--trace", str(path), "--profile", str(profile)], Console(file=io.StringIO())) == 2
    assert capsys.readouterr().err == f"simulate: {path}: {message}\n"
