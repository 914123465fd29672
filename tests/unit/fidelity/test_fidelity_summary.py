"""Summary, verdicts, page and options, from synthetic figures."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from bench.fidelity import __main__ as command
from bench.fidelity import accuracy, compare, ops, report, summary, terminal
from bench.fidelity.config import FidelityConfig
from bench.fidelity.emulated import ARTIFACT, scaled_profile
from bench.fidelity.trace import trace_of
from bench.fidelity.workloads import EMULATED, Lengths, capacity_rps
from bench.live.errors import LiveError
from lemix.internal.v1 import profile_pb2
from services.latency import NodeLatency, OpKind
from services.profile_messages import latency_from_profile
from tests.unit.fidelity import runs

STUDY = {"ops_to_10pct_max": 27, "alarm_after_ops_max": None}


def _repetition(slower=1.0, others=0.0):
    config, steps = runs.steps_of(slower=slower, trains=True)
    samples = ops.samples(config, runs.recorded(steps))
    trace = trace_of(config, steps)
    responses = accuracy.of_responses(trace, 0.0) | {"noise_floor": 0.1}
    points = {"responses": responses.pop("pairs_ms")}
    figures = compare.figures(trace, 1.0, 9.0, runs.SLO)
    entry = {
        "workload": "steady",
        "title": "title",
        **compare.compare(figures, figures._replace(slo_attainment=figures.slo_attainment - 0.03)),
        "live": figures.to_json(),
        "simulated": figures.to_json(),
        "live_spread": {"slo_attainment_points": 4.5, "throughput_pct": 0.0, "ttft_p95_pct": None},
        "cpu_share": {"other_programs": others},
    }
    real = {
        name: {
            "ops": accuracy.of_ops(samples),
            "responses": responses,
            "company": accuracy.by_company(samples),
            "cpu_share": {"other_programs": others},
        }
        for name in ("serving", "training")
    }
    return {
        "prediction": summary.prediction(real),
        "models": [],
        "real": real,
        "simulator_vs_cpu": {"serving": entry},
        "simulator_vs_live": [entry],
        "points": {"serving": points},
    }


def _summary(*repetitions, quick=False):
    facts = {"git_commit": "abc", "started_at": "now", "machine": {"cpu": "a", "cores": 2, "gpu": []}}
    return summary.build(FidelityConfig(quick=quick), facts, repetitions, STUDY, [], 12.0)


def _claims(result):
    return {claim["name"]: claim for claim in result["claims"]}


def test_verdicts_follow_the_figures():
    result = _summary(_repetition())
    verdicts = {claim["name"]: claim["verdict"] for claim in result["claims"]}
    assert verdicts["op_error"] == "held"
    assert verdicts["simulator_attainment"] == "missed"
    assert verdicts["simulator_throughput"] == "held"
    assert (verdicts["calibration"], verdicts["drift_alarm"]) == ("held", "unresolved")
    json.dumps(result)


@pytest.mark.parametrize(("coverage", "verdict"), [(0.80, "missed"), (0.99, "missed"), (0.9, "held")])
def test_intervals_may_be_too_narrow_and_too_wide(coverage, verdict):
    repetition = _repetition()
    repetition["prediction"]["interval_coverage"] = coverage
    claim = _claims(_summary(repetition))["coverage"]
    assert (claim["verdict"], claim["shown"], claim["limit"]) == (verdict, f"{100 * coverage:.1f} %", "85 to 95 %")


@pytest.mark.parametrize(
    ("error", "noise", "verdict"),
    [(0.07, None, "held"), (0.09, 0.04, "missed"), (0.144, 0.153, "held"), (0.19, 0.153, "missed")],
)
def test_operations_may_be_off_by_little_more_than_noise(error, noise, verdict):
    repetition = _repetition()
    repetition["prediction"] |= {"op_mape": error, "noise_floor": noise}
    claim = _claims(_summary(repetition))["op_error"]
    assert (claim["verdict"], claim["shown"]) == (verdict, f"{100 * error:.1f} %")
    assert claim["note"] == ("" if noise is None else f"noise floor {100 * noise:.1f} %")


def test_every_claim_reads_alone():
    result = _summary(_repetition())
    assert all("the same" not in claim["claim"] for claim in result["claims"])
    assert len({claim["claim"] for claim in result["claims"]}) == len(result["claims"])
    assert len({tuple(claim) for claim in result["claims"]}) == 1


def test_a_figure_that_was_not_measured_decides_nothing():
    repetition = _repetition()
    repetition["simulator_vs_live"][0]["ttft_p95_pct"] = None
    claim = _claims(_summary(repetition))["simulator_ttft"]
    assert (claim["verdict"], claim["shown"], claim["reason"]) == ("unresolved", "not measured", "not measured")


def test_repetitions_that_disagree_decide_nothing():
    repetitions = [_repetition(), _repetition()]
    repetitions[1]["prediction"]["interval_coverage"] = 0.99
    repetitions[0]["prediction"]["interval_coverage"] = 0.9
    claim = _claims(_summary(*repetitions))["coverage"]
    assert (claim["verdict"], claim["reason"]) == ("unresolved", "repetitions disagree")


def test_a_machine_that_others_use_decides_nothing():
    result = _summary(_repetition(others=0.5))
    assert {claim["verdict"] for claim in result["claims"] if claim["name"] != "calibration"} == {"unresolved"}
    assert "other programs used up to 50 %" in result["warnings"][0]


def test_a_quick_run_decides_nothing():
    repetition = _repetition(others=0.5)
    result = _summary(repetition, quick=True)
    assert {(claim["verdict"], claim["reason"]) for claim in result["claims"]} == {("unresolved", "a quick run")}
    assert [warning.split()[0] for warning in result["warnings"]] == ["a", "other"]
    assert "unresolved: a quick run" in report.render(result, repetition["points"])
    console = Console(record=True, width=80)
    terminal.print_results(console, result)
    told = console.export_text()
    assert "unresolved" in told
    assert not {"held", "missed"} & set(told.split())


def test_repetitions_are_combined():
    result = _summary(_repetition(), _repetition(slower=2.0))
    assert result["repetitions"] == 2
    assert len(result["simulator_vs_live"]) == 1
    first = next(claim for claim in result["claims"] if claim["name"] == "op_error")
    assert len(first["values"]) == 2


def test_the_page_and_the_tables_show_everything():
    repetition = _repetition()
    result = _summary(repetition)
    page = report.render(result, repetition["points"])
    for expected in ("steady", "prefill", "optimizer_step", "Simulator against the real cluster", "<svg"):
        assert expected in page
    console = Console(record=True, width=120)
    terminal.print_results(console, result)
    assert "attainment in the worst workload" in console.export_text()


def test_one_outlier_does_not_stretch_a_chart():
    repetition = _repetition()
    usual = [[20.0 + index % 7, 21.0 + index % 5] for index in range(60)]
    page = report.render(_summary(repetition), {"serving": {"decode": [*usual, [1840.0, 22.0]], "prefill": usual}})
    assert "serving: decode</b> " in page
    assert "61 points, 1 of them outside (up to 1,840 ms)" in page
    assert "60 points</span>" in page
    assert "1,000</text>" not in page
    assert "1 repetition ·" in page


def test_tables_of_the_terminal_fit_in_80_columns():
    console = Console(record=True, width=80)
    entry = _repetition()["simulator_vs_live"][0] | {"workload": max((w.name for w in EMULATED), key=len)}
    terminal.print_results(console, _summary({**_repetition(), "simulator_vs_live": [entry]}))
    told = console.export_text()
    assert "…" not in told
    for name in (entry["workload"], "CPU: serving", "training: train_backward"):
        assert any(line.strip().startswith(name) for line in told.splitlines())


def test_models_of_a_profile_are_listed():
    profile = profile_pb2.Profile(num_stages=1)
    profile.fits.add(stage=0, op=profile_pb2.OP_KIND_DECODE, model="affine", coefficients=[1, 2], mape=0.1, chosen=True)
    assert summary.models(profile) == [
        {"stage": 0, "op": "decode", "model": "affine", "mape": 0.1, "r2": 0.0, "chosen": True}
    ]


def test_options():
    config, repeat = command.parse(["--workloads", "steady, mixed", "--seed", "3", "--repeat", "2"])
    assert [workload.name for workload in config.workloads] == ["steady", "mixed"]
    assert (config.seed, repeat) == (3, 2)
    quick = command.parse(["--quick"])[0]
    assert quick.quick
    assert quick.real.seconds < FidelityConfig().real.seconds
    with pytest.raises(LiveError, match="unknown workload 'nothing'"):
        command.parse(["--workloads", "nothing"])
    with pytest.raises(LiveError, match="--repeat"):
        command.parse(["--repeat", "0"])
    assert command.main(["--repeat", "0"]) == 2


def test_an_emulated_profile_is_scaled_on_every_stage():
    plain = latency_from_profile(scaled_profile(ARTIFACT, 1.0))
    slow = latency_from_profile(scaled_profile(ARTIFACT, 4.0))
    for stage, models in enumerate(slow.models):
        for op, model in models.items():
            assert model.predict_s(2, 300) == pytest.approx(4.0 * plain.op_s(stage, op, 2, 300))
        moved_s = [latency.host_links[stage].move_s(OpKind.OFFLOAD, 1 << 28) for latency in (plain, slow)]
        assert moved_s[1] == pytest.approx(4.0 * moved_s[0])


def test_capacity_is_bounded_by_the_slowest_stage():
    lengths = [Lengths(100, 5)]
    slow = {
        kind: replace(model, coefficients=tuple(2 * c for c in model.coefficients))
        for kind, model in runs.MODELS.items()
    }
    one = capacity_rps(NodeLatency((runs.MODELS,)), lengths, max_batch=4)
    assert capacity_rps(NodeLatency((runs.MODELS, slow)), lengths, max_batch=4) == pytest.approx(one / 2)
    assert one == pytest.approx(1.0 / (0.024 + 4 * (0.008 + 0.0005 * 4 + 0.000001 * 4 * 102.5) / 4))


def test_every_workload_has_a_name_of_its_own():
    assert len({workload.name for workload in EMULATED}) == len(EMULATED) >= 5


@pytest.mark.parametrize(("key", "limit"), compare.AGREEMENT.items())
def test_runs_agree_within_every_limit(key, limit):
    entry = {name: -bound for name, bound in compare.AGREEMENT.items()}
    assert compare.agrees(entry)
    assert not compare.agrees({**entry, key: 1.01 * limit})
    assert not compare.agrees({**entry, key: None})
