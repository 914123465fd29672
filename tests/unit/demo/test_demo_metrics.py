"""Figures on inputs small enough to work out by hand."""

import pytest

from bench.demo import metrics
from bench.demo.records import OpRecord, RunRecord, Slo, TaskSpan
from bench.live.requests import RequestRecord, Status
from services.latency import OpKind

_SLO = Slo(ttft_s=0.1, tpot_s=0.01)


def _request(at_s=0.0, *, first=None, last=None, tokens=11, status=Status.OK, loss=None, staleness=None, node="a"):
    return RequestRecord(
        "r", "docs", at_s, at_s + 0.001, status, first, last, tokens, node, (), staleness, loss, ""
    )  # fmt: skip


def _run(requests=(), ops=(), spans=(), wall_s=30.0, **more):
    values = {
        "policy": "lemix", "planned_s": 30.0, "wall_s": wall_s, "drift_s": 15.0, "requests": requests, "ops": ops,
        "spans": spans, "trained_tokens": 3000, "cpu_s": {"gateway": 6.0}, "cores": 2,
    }  # fmt: skip
    return RunRecord(**{**values, **more})


def test_response_times_count_from_the_planned_moment():
    request = _request(2.0, first=2.05, last=2.15)
    assert request.ttft_s == pytest.approx(0.05)
    assert request.tpot_s == pytest.approx(0.01)
    assert _request(2.0, first=2.05, last=2.05, tokens=1).tpot_s is None


@pytest.mark.parametrize(
    ("request_", "kept"),
    [
        (_request(first=0.1, last=0.2), True),
        (_request(first=0.11, last=0.2), False),
        (_request(first=0.1, last=0.21), False),
        (_request(first=0.1, last=0.1, tokens=1), True),
        (_request(first=0.05, last=0.06, status=Status.FAILED), False),
        (_request(status=Status.REJECTED), False),
        (_request(status=Status.UNFINISHED, first=0.01), False),
    ],
)
def test_a_promise_is_kept_only_whole(request_, kept):
    assert metrics.kept(request_, _SLO) is kept


def test_attainment_counts_every_request_sent():
    good, bad = _request(first=0.05, last=0.1), _request(status=Status.REJECTED)
    assert metrics.attainment([good, good, good, bad], _SLO) == 0.75
    assert metrics.attainment([], _SLO) == 0.0


def test_requests_by_end():
    ends = (Status.OK, Status.OK, Status.REJECTED, Status.FAILED, Status.UNFINISHED)
    assert metrics.count_requests([_request(status=status) for status in ends]) == {
        "sent": 5, "ok": 2, "failed": 2, "rejected": 1,
    }  # fmt: skip


def test_loss_by_thirds_and_after_the_drift():
    losses = [(1.0, 2.0), (9.0, 4.0), (12.0, 1.0), (16.0, 3.0), (25.0, 5.0)]
    run = _run([_request(at, loss=loss) for at, loss in losses] + [_request(2.0)])
    assert metrics.inference_loss(run) == {
        "first_third": 3.0, "middle_third": 2.0, "last_third": 5.0, "after_drift": 4.0,
    }  # fmt: skip


def test_a_third_without_a_loss_is_none():
    assert metrics.inference_loss(_run([_request(1.0, loss=2.0)]))["last_third"] is None


def test_weights_never_trained_are_as_old_as_the_run():
    run = _run([_request(1.0, first=1.5, staleness=None), _request(2.0, first=2.5, staleness=0.25)])
    assert metrics.staleness(run) == [1.5, 0.25]


def test_a_node_is_held_until_idle_for_the_hold_time():
    spans = [
        TaskSpan("1", "a", False, 0.0, 1.0, True),
        TaskSpan("2", "a", False, 5.0, 6.0, True),  # within the hold of the first: one stretch, 0 to 16
        TaskSpan("3", "a", True, 20.0, 22.0, True),  # 20 to 30, cut at the end of the run
        TaskSpan("4", "b", False, -5.0, 2.0, True),  # before the run: 0 to 12
        TaskSpan("5", "c", True, 28.0, None),  # never ended: 28 to 30
        TaskSpan("6", "d", False, -5.0, -4.0, True),  # the warm-up is no part of the run
    ]
    assert metrics.held_node_s(spans, 30.0, 10.0) == {"a": 26.0, "b": 12.0, "c": 2.0}


def test_utilisation_is_busy_time_within_the_span_of_a_node():
    ops = [
        OpRecord("a", 0, OpKind.PREFILL, 0.0, 2.0),
        OpRecord("a", 1, OpKind.PREFILL, 2.0, 4.0),
        OpRecord("a", 0, OpKind.DECODE, 6.0, 8.0),
        OpRecord("a", 1, OpKind.DECODE, 8.0, 10.0),
    ]
    assert metrics.stage_utilisation(ops, 30.0) == {("a", 0): 0.4, ("a", 1): 0.4}
    assert metrics.utilisation(ops, 30.0) == pytest.approx(0.4)
    assert metrics.utilisation([], 30.0) == 0.0


def test_operations_are_cut_to_the_run():
    ops = [OpRecord("a", 0, OpKind.TRAIN_BACKWARD, -1.0, 1.0), OpRecord("a", 0, OpKind.DECODE, 9.0, 12.0)]
    assert metrics.busy_shares(ops, 10.0) == {"a/0": {"train_backward": 0.1, "decode": 0.1}}


def test_steps_are_counted_once_per_node():
    ops = [OpRecord("a", stage, OpKind.OPTIMIZER_STEP, 1.0, 1.1) for stage in (0, 1)]
    ops.append(OpRecord("a", 0, OpKind.OPTIMIZER_STEP, 40.0, 40.1))
    spans = [TaskSpan("1", "b", False, 0.0, 1.0, True)]
    assert metrics.steps_per_replica(ops, spans, 30.0) == {"a": 1, "b": 0}


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 2.5), (1.0, 4.0), (0.25, 1.75)])
def test_quantiles(share, expected):
    assert metrics.quantile([4.0, 1.0, 3.0, 2.0], share) == expected


def test_quantile_of_nothing():
    assert metrics.quantile([], 0.5) is None


def test_the_entry_of_a_policy():
    requests = [_request(1.0, first=1.05, last=1.15, loss=2.0, staleness=0.5), _request(2.0, status=Status.FAILED)]
    spans = [
        TaskSpan("r", "a", False, 1.0, 1.2, True),
        TaskSpan("j/0", "a", True, 0.0, 20.0, True),
        TaskSpan("j/1", "a", True, 20.0, 31.0, True),  # ended after the run
        TaskSpan("j/2", "a", True, 20.0, 21.0, False),
    ]
    ops = [OpRecord("a", 0, OpKind.OPTIMIZER_STEP, 19.0, 20.0)]
    entry = metrics.policy_metrics(_run(requests, ops, spans), _SLO, 10.0)
    assert entry["tasks_per_s"] == pytest.approx(2 / 30)
    assert entry["tasks_per_held_node_s"] == pytest.approx(2 / 30)
    assert entry["slo_attainment"] == 0.5
    assert entry["ttft_ms"]["p50"] == pytest.approx(50.0)
    assert entry["tpot_ms"]["p99"] == pytest.approx(10.0)
    assert entry["trained_tokens"] == 3000
    assert entry["trained_tokens_per_s"] == 100.0
    assert entry["steps_per_replica"] == {"a": 1}
    assert entry["staleness_s"] == {"p50": 0.5, "p99": 0.5}
    assert entry["requests"] == {"sent": 2, "ok": 1, "failed": 1, "rejected": 0}
    assert entry["utilisation"] == 1.0
    assert entry["cpu_share"] == {"gateway": 0.1}
    assert entry["details"]["tasks"] == {"inference": 1, "training": 1}
    assert entry["details"]["served_by"] == {"a": 1}


def test_keys_are_the_published_ones():
    assert set(metrics.policy_metrics(_run(), _SLO, 10.0)) == {
        "tasks_per_s", "tasks_per_held_node_s", "slo_attainment", "ttft_ms", "tpot_ms", "inference_loss",
        "trained_tokens", "trained_tokens_per_s", "steps_per_replica", "staleness_s", "requests", "utilisation",
        "cpu_share", "details",
    }  # fmt: skip
