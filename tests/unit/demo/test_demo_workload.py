"""Traffic: seeded, at the rate asked for, denser in the burst, drifting on time; traces scaled and checked."""

import itertools
import random

import pytest

from bench.demo.config import DemoError, TrafficConfig
from bench.demo.corpus import Corpus, Split
from bench.demo.workload import (
    arrivals,
    describe,
    feedback_plan,
    mean_lengths,
    plan,
    read_trace,
    scale_trace,
    warmup_plan,
)

_TEXT = "".join(chr(97 + index % 26) for index in range(4000))
_CORPUS = Corpus(
    docs=Split((), (), (_TEXT.lower(),), ()),
    code=Split((), (), (_TEXT.upper(),), ()),
)
_TRAFFIC = TrafficConfig()


def test_a_plan_is_the_same_for_the_same_seed_only():
    assert plan(_TRAFFIC, _CORPUS, 10.0, 1) == plan(_TRAFFIC, _CORPUS, 10.0, 1)
    assert plan(_TRAFFIC, _CORPUS, 10.0, 1) != plan(_TRAFFIC, _CORPUS, 10.0, 2)


def test_mean_rate_and_burst():
    traffic = TrafficConfig(seconds=2000.0)
    times = arrivals(traffic, 10.0, random.Random(5))
    assert len(times) == pytest.approx(20_000, rel=0.03)
    in_burst = sum(400.0 <= at < 600.0 for at in times) / 200.0
    outside = sum(at < 400.0 or at >= 600.0 for at in times) / 1800.0
    assert in_burst / outside == pytest.approx(2.0, rel=0.1)
    assert times == sorted(times)
    assert times[-1] < 2000.0


def test_prompts_drift_half_way_and_lengths_stay_within_limits():
    requests = plan(_TRAFFIC, _CORPUS, 20.0, 3)
    assert {item.kind for item in requests if item.at_s < 20.0} == {"docs"}
    assert {item.kind for item in requests if item.at_s >= 20.0} == {"code"}
    for item in requests:
        assert 32 <= len(item.prompt) <= 384
        assert 4 <= item.max_tokens <= 64
        assert len(item.reference) == 32
        assert item.prompt.isupper() == (item.kind == "code")
    assert len({item.request_id for item in requests}) == len(requests)


def test_warmup_is_not_the_traffic():
    warm = warmup_plan(_TRAFFIC, _CORPUS, 3)
    assert len(warm) == _TRAFFIC.warmup_requests
    assert {item.at_s for item in warm} == {0.0}
    assert not {item.request_id for item in warm} & {item.request_id for item in plan(_TRAFFIC, _CORPUS, 5.0, 3)}


def test_description_has_the_rates_of_the_plan():
    requests = plan(_TRAFFIC, _CORPUS, 10.0, 1)
    facts = describe(requests, _TRAFFIC)
    assert facts["requests"] == len(requests)
    assert facts["mean_rate_rps"] == len(requests) / 40.0
    assert facts["burst_s"] == [8.0, 12.0]
    assert facts["drift_s"] == 20.0
    assert facts["interarrival_cv"] == pytest.approx(1.0, abs=0.25)


def _write(tmp_path, text):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival_s,prompt,output_tokens\n0,1,1\n", r"trace\.csv: line 1: column 'prompt_tokens' is missing"),
        ("", r"line 1: column 'arrival_s' is missing"),
        ("arrival_s,prompt_tokens,output_tokens\n0,5,5\n1,five,5\n", r"line 3: column 'prompt_tokens' is no number"),
        ("arrival_s,prompt_tokens,output_tokens\n0,5,5\n1,5\n", r"line 3: column 'output_tokens' is no number"),
        ("arrival_s,prompt_tokens,output_tokens\n0,5,0\n1,5,5\n", r"line 2: column 'output_tokens' must be at least 1"),
        ("arrival_s,prompt_tokens,output_tokens\nnan,5,5\n1,5,5\n", r"line 2: column 'arrival_s' must be"),
        ("arrival_s,prompt_tokens,output_tokens\n5,5,5\n1,5,5\n", r"line 3: column 'arrival_s' goes back"),
        ("arrival_s,prompt_tokens,output_tokens\n5,5,5\n", r"holds 1 requests"),
    ],
)
def test_a_bad_trace_names_column_and_line(tmp_path, text, message):
    with pytest.raises(DemoError, match=message):
        read_trace(_write(tmp_path, text))


def test_a_missing_trace_is_named(tmp_path):
    with pytest.raises(DemoError, match="nowhere"):
        read_trace(tmp_path / "nowhere.csv")


def _trace(tmp_path, rows):
    lines = "".join(f"{at},{prompt},{output}\n" for at, prompt, output in rows)
    return read_trace(_write(tmp_path, "arrival_s,prompt_tokens,output_tokens\n" + lines))


def test_a_trace_is_scaled_to_load_and_model(tmp_path):
    rng = random.Random(7)
    rows = [(100.0 + 3.0 * index, rng.randint(500, 2000), rng.randint(50, 300)) for index in range(1000)]
    scaled = scale_trace(_trace(tmp_path, rows), _TRAFFIC, 10.0)
    assert len(scaled) == 400
    assert scaled[0].arrival_s == 0.0
    assert scaled[-1].arrival_s == pytest.approx(40.0 * 399 / 400)
    gaps = {round(b.arrival_s - a.arrival_s, 6) for a, b in itertools.pairwise(scaled)}
    assert gaps == {0.1}
    mean_prompt, mean_output = mean_lengths(_TRAFFIC)
    assert sum(row.prompt_tokens for row in scaled) / 400 == pytest.approx(mean_prompt, rel=0.05)
    assert sum(row.output_tokens for row in scaled) / 400 == pytest.approx(mean_output, rel=0.05)


def test_a_short_trace_keeps_the_rate_and_ends_early(tmp_path):
    scaled = scale_trace(_trace(tmp_path, [(float(index), 100, 10) for index in range(100)]), _TRAFFIC, 10.0)
    assert len(scaled) == 100
    assert scaled[-1].arrival_s == pytest.approx(9.9)


def test_a_trace_without_a_span_is_refused(tmp_path):
    with pytest.raises(DemoError, match="same time"):
        scale_trace(_trace(tmp_path, [(1.0, 10, 10)] * 3), _TRAFFIC, 10.0)


def test_a_plan_from_a_trace_drifts_too(tmp_path):
    lines = "".join(f"{index},100,10\n" for index in range(500))
    path = _write(tmp_path, "arrival_s,prompt_tokens,output_tokens\n" + lines)
    requests = plan(TrafficConfig(trace=str(path)), _CORPUS, 10.0, 0)
    assert [item.kind for item in requests] == ["docs"] * 200 + ["code"] * 200


@pytest.mark.parametrize("share", [0.2, 0.5, 0.75])
def test_feedback_comes_with_the_requests_in_its_share(share):
    requests = plan(_TRAFFIC, _CORPUS, 10.0, 0)
    texts = {"docs": ["d0", "d1", "d2"], "code": ["c0", "c1"]}
    given = feedback_plan(requests, share, texts)
    assert len(given) == pytest.approx(len(requests) * share / (1 - share), abs=1)
    assert {item.at_s for item in given} <= {item.at_s for item in requests}
    assert [item.at_s for item in given] == sorted(item.at_s for item in given)
    drift_s = _TRAFFIC.drift * _TRAFFIC.seconds
    assert all(item.text[0] == ("c" if item.at_s >= drift_s else "d") for item in given)
    assert [item.text for item in given[:4]] == ["d0", "d1", "d2", "d0"]
