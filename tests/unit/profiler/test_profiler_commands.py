"""The operator's command line: files, usage, and the page it writes. With a running service: integration tests."""

import re
from pathlib import Path

import pytest

from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import profile_pb2
from lemix.internal.v1 import profiler_service_pb2 as profiler_pb2
from services.latency.model import FORMS
from services.profile_artifact import load_artifact, read_artifact, write_artifact
from services.profiler.compare import compare
from services.profiler.config import GridSettings
from services.profiler.grid import Limits, grid_points
from services.profiler.measured import Measured
from services.profiler.profiles import render
from services.profiler.profiles.__main__ import main
from services.profiler.report.page import report
from tests.unit.pages import assert_self_contained, charts

INFO = node_pb2.GetNodeInfoResponse(
    node_id="node-0",
    model="tiny",
    num_stages=2,
    profile_fingerprint="f00d",
    max_context_tokens=512,
    max_batch=8,
    device="cpu test",
)
KINDS = {
    profile_pb2.OP_KIND_TRAIN_FORWARD: profile_pb2.OP_KIND_TRAIN_BACKWARD,
    profile_pb2.OP_KIND_OFFLOAD: profile_pb2.OP_KIND_RELOAD,
}


def seconds(point, repetition):
    if point.num_bytes:
        return 1e-4 + point.num_bytes / 1e9
    own_s = 1e-3 + 1e-5 * point.batch * point.length * (1.0 + 0.01 * repetition)
    return own_s + 1e-4 * point.decodes + (5e-4 if point.busy else 0.0)


def answer(index, point):
    kinds = [point.op, *([KINDS[point.op]] if point.op in KINDS else [])]
    shared = {name: getattr(point, name) for name in ("batch", "length", "cached_tokens", "decodes", "decode_length")}
    measurements = [
        profile_pb2.Measurement(
            stage=stage,
            op=op,
            busy=point.busy,
            num_bytes=point.num_bytes,
            durations_s=[seconds(point, repetition) for repetition in range(4)],
            peak_bytes=10**8 + 1000 * point.batch * point.length,
            **shared,
        )
        for op in kinds
        for stage in (0, 1)
    ]
    return node_pb2.MeasureOpsResponse(point=index, measurements=measurements)


def profile(left_out=0):
    points = grid_points(GridSettings(), Limits(8, 512, 2, 1 << 22, 512))
    measured = Measured(INFO, points)
    for index, point in enumerate(points[: len(points) - left_out]):
        measured.add(answer(index, point))
    memory = [profile_pb2.StageMemory(stage=stage, weight_bytes=1 << 20, kv_bytes_per_token=64) for stage in (0, 1)]
    measured.add(node_pb2.MeasureOpsResponse(peak_memory_bytes=[1, 2], memory=memory))
    made = measured.profile((), now_unix_s=1e9)
    made.profile_id = "f00d-1"
    return made


@pytest.fixture(scope="module")
def whole():
    return profile()


def test_the_page_shows_everything_and_loads_nothing(whole):
    page = report(whole)
    assert_self_contained(page)
    # Durations and residuals of prefill, decode, forward and backward on two stages, and the memory of both.
    assert len(charts(page)) == 2 * 4 * 2 + 2
    for heading in ("Operations alone", "Prefills behind cached tokens", "Interference", "Host link", "Memory"):
        assert heading in page
    for fit in whole.fits:
        assert fit.model in page
    assert "Incomplete" not in page


def test_the_page_of_an_incomplete_profile_says_so_first():
    page = report(profile(left_out=30))
    assert "<b>Incomplete:</b>" in page
    assert "the budget was spent: 30 of" in page
    assert_self_contained(page)


def test_a_derived_profile_says_so_and_claims_no_measurement(whole):
    derived = profile_pb2.Profile()
    derived.CopyFrom(whole)
    derived.source = "derived from <tables>"
    page = report(derived)
    assert "Derived from published tables, not measured." in page
    assert "Source: derived from &lt;tables&gt;" in page
    assert "repetitions" not in page
    assert "measured, ms" not in page
    assert "measured /" not in page
    assert "Derived from published tables" not in report(whole)
    constants = re.findall(r"<tr><td><b>constant</b></td>.*?</tr>", page)
    assert constants
    assert all(row.count("<td>-</td>") == 3 for row in constants)


def test_what_was_not_measured_is_not_described_as_if_it_were(whole):
    bare = profile_pb2.Profile()
    bare.CopyFrom(whole)
    del bare.interference[:]
    for item in bare.measurements:
        item.peak_bytes = 0
    page = report(bare)
    assert "Not measured: an operation is taken" in page
    assert "Peak memory was not measured." in page
    assert "Dots are the largest memory" not in page
    assert "Dots are the largest memory" in report(whole)
    assert "ot measured" not in report(whole)


def test_an_error_beyond_all_measure_is_told_as_such(whole):
    wide = profile_pb2.Profile()
    wide.CopyFrom(whole)
    wide.fits[0].residual_p5, wide.fits[0].residual_p95 = -0.337, 10999.6
    assert "-33.7 % to &gt; +1,000 %" in report(wide)


def test_names_in_the_page_are_escaped(whole):
    evil = profile_pb2.Profile()
    evil.CopyFrom(whole)
    evil.model = evil.device = evil.profile_id = "<script>alert(1)</script>"
    assert_self_contained(report(evil))


def test_a_page_is_written_from_a_file_without_any_service(whole, tmp_path, capsys):
    source, target = tmp_path / "p.json", tmp_path / "p.html"
    source.write_text(write_artifact(whole))
    assert main(["report", str(source), "--output", str(target)]) == 0
    assert target.read_text() == report(read_artifact(source.read_text()))
    assert main(["show", str(source)]) == 0
    shown = capsys.readouterr().out
    assert "f00d-1" in shown
    assert "decode" in shown
    assert "beside train_forward" in shown


def test_two_files_are_compared_without_any_service(whole, tmp_path, capsys):
    slow = profile_pb2.Profile()
    slow.CopyFrom(whole)
    slow.device = "cpu slow"
    for name, made in (("a.json", whole), ("b.json", slow)):
        (tmp_path / name).write_text(write_artifact(made))
    assert main(["--address", "127.0.0.1:1", "diff", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert capsys.readouterr().out.splitlines() == list(render.difference(compare(whole, slow)))


def test_a_file_is_compared_with_an_id(whole, tmp_path, capsys):
    (tmp_path / "a.json").write_text(write_artifact(whole))
    for pair in ([str(tmp_path / "a.json"), "f00d-1"], ["f00d-1", str(tmp_path / "a.json")]):
        assert main(["--address", "127.0.0.1:1", "diff", *pair]) == 1
        assert "no answer from a profiler" in capsys.readouterr().err


def test_the_id_in_a_file_does_not_say_where_the_page_goes(whole, tmp_path, monkeypatch):
    evil = profile_pb2.Profile()
    evil.CopyFrom(whole)
    evil.profile_id = "../evil"
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "p.json").write_text(write_artifact(evil))
    assert main(["report", "p.json"]) == 0
    assert (here / "out" / "evil.html").is_file()


def test_points_left_out_and_points_that_the_budget_did_not_reach_are_told_apart():
    points = grid_points(GridSettings(), Limits(8, 512, 2, 1 << 22, 512))
    measured = Measured(INFO, points)
    for index, point in enumerate(points[:-1]):
        measured.add(answer(index, point))
    # It was timed in the first round.
    measured.add(node_pb2.MeasureOpsResponse(point=0, left_out_reason="OutOfMemoryError"))
    reason = measured.profile((), now_unix_s=1e9).incomplete_reason
    assert reason.startswith(f"the budget was spent: 1 of {len(points)} points were not measured")
    assert "OutOfMemoryError" not in reason


@pytest.mark.parametrize("content", ["{", "", '{"fits": 7}'])
def test_a_file_that_is_no_profile_is_told_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "p.json"
    path.write_text(content)
    for command in ("show", "report"):
        code = main([command, str(path)])
        told = capsys.readouterr().err
        assert (code, told.count("\n"), "p.json" in told) == (2, 1, True)
    assert main(["show", str(tmp_path / "none.json")]) == 2


@pytest.mark.parametrize("arguments", [[], ["run"], ["run", "h:1", "--budget-s", "-1"], ["diff", "a-1"], ["delete"]])
def test_wrong_usage_is_one_line(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("line", ["{", "7", '["a"]', "[-1]"])
def test_a_sample_that_is_no_list_of_tokens_is_named(tmp_path, capsys, line):
    path = tmp_path / "samples.jsonl"
    path.write_text(f"[1, 2]\n{line}\n")
    assert main(["run", "127.0.0.1:1", "--samples", str(path)]) == 2
    assert "samples.jsonl: line 2: not a list of token ids" in capsys.readouterr().err


def test_a_profiler_that_is_not_there_is_named(capsys):
    assert main(["--address", "127.0.0.1:1", "list"]) == 1
    assert "no answer from a profiler at 127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--address", "127.0.0.1:1", "list"], ["list", "--address", "127.0.0.1:1"]])
def test_the_address_goes_before_and_after_the_command(capsys, arguments):
    assert main(arguments) == 1
    assert "no answer from a profiler at 127.0.0.1:1" in capsys.readouterr().err


def test_where_no_profiler_answers_files_are_hinted_at_for_an_id(capsys):
    assert main(["show", "f00d-1", "--address", "127.0.0.1:1"]) == 1
    assert "an id needs a running profiler, a file does not" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["show", "nonsense"], ["report", "nonsense"], ["diff", "nonsense", "f00d-1"], ["delete", "f00d-1", "nonsense"]],
)
def test_what_is_neither_a_file_nor_an_id_is_told_before_a_profiler_is_asked(capsys, arguments):
    assert main(["--address", "127.0.0.1:1", *arguments]) == 2
    assert "'nonsense' is n" in capsys.readouterr().err


def test_a_directory_is_no_profile(tmp_path, capsys):
    assert main(["show", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"profiles: {tmp_path} is not a profile: it is a directory\n"


@pytest.mark.parametrize("node", ["nonsense", ":1", "h:", "h:0", "h:70000", "h:x"])
def test_a_node_that_is_no_address_is_named(capsys, node):
    with pytest.raises(SystemExit):
        main(["run", node])
    assert f"must be host:port of a node agent, not {node!r}" in capsys.readouterr().err


def test_a_measured_profile_is_shown_as_one(whole):
    shown = "\n".join(render.details(whole))
    assert "\nmeasured      2001-09-09 01:46\nnode          node-0\n" in shown
    assert "derived" not in shown
    assert "held-out error" in shown


def test_a_derived_profile_is_not_shown_as_a_measured_one():
    path = Path(__file__).parents[3] / "deploy" / "profiles" / "h100-llama-2-7b.json"
    shown = "\n".join(render.details(load_artifact(path)))
    assert re.search(r"^derived +\d{4}-\d\d-\d\d \d\d:\d\d from kernel times of A100", shown, re.MULTILINE)
    for absent in ("measured", "threads per stage", "none"):
        assert absent not in shown


def test_numbers_of_things_and_units_are_written_out():
    fits = [
        profile_pb2.LatencyFit(op=1, model="full", coefficients=[0.5, 0.25, 0.125], chosen=True),
        profile_pb2.LatencyFit(op=2, model="full_decode", coefficients=[0.5, 0.25, 0.125], chosen=True),
    ]
    one = profile_pb2.Profile(num_stages=1, threads_per_stage=1, model="m", device="cpu", dtype="float32", fits=fits)
    shown = "\n".join(render.details(one))
    for told in ("m, 1 stage, float32", "cpu, 1 thread per stage"):
        assert told in shown
    assert "0.5 s, 0.25 s per token, 0.125 s per token^2" in shown
    assert "0.5 s, 0.25 s per sequence, 0.125 s per token" in shown


def test_every_form_has_a_unit_for_each_coefficient():
    assert {form: len(units) for form, units in render.UNITS.items()} == {
        form: len(features(1.0, 1.0)) for form, features in FORMS.items()
    }


def test_a_slower_node_shows_in_the_difference(whole):
    slow = profile_pb2.Profile()
    slow.CopyFrom(whole)
    for fit in slow.fits:
        fit.coefficients[:] = [2.0 * value for value in fit.coefficients]
        if fit.HasField("table"):
            fit.table.durations_s[:] = [2.0 * value for value in fit.table.durations_s]
    del slow.fits[-1]
    slow.device = "cpu slow"
    found = compare(whole, slow)
    ratios = [ratio for op in found.ops if op.points for ratio in (op.ratio_min, op.ratio_p50, op.ratio_max)]
    assert ratios == [pytest.approx(2.0)] * len(ratios)
    assert len([op for op in found.ops if not op.HasField("other")]) == 1
    lines = list(render.difference(found))
    assert lines[0] == "different device: 'cpu test' and 'cpu slow'"
    assert any("none" in line for line in lines)


def test_the_listing_names_what_is_incomplete_and_what_is_broken():
    listed = profiler_pb2.ListProfilesResponse(
        profiles=[
            profiler_pb2.ProfileSummary(profile_id="f-2", incomplete_reason="the node died", mape=0.05),
            profiler_pb2.ProfileSummary(profile_id="f-1", mape=0.1),
        ],
        problems=["x/1.json: damaged"],
    )
    lines = list(render.listing(listed))
    assert [line.split()[0] for line in lines] == ["profile", "f-2", "f-1", "cannot"]
    assert "incomplete: the node died" in lines[1]
