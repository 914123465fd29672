"""The study of latency forms: what it fits, what it shows, and that its models are what they are called."""

import json

import pytest
import torch

from bench.fidelity.forms_model import INT8, Int8Linear, Variant, load
from bench.fidelity.forms_page import HEAD, page, rows, section
from bench.fidelity.forms_study import RANGES, FormsConfig, Series, measure, noise, study
from services.profiler.fit import Timing

LENGTHS = (4, 8, 16, 32, 64, 96, 128, 192, 256, 512)
SERIES = Series(Variant("sdpa", "float32"), "prefill")


def timings(law):
    return {
        SERIES: [
            Timing(batch, length, tuple(law(batch, length) * factor for factor in (0.9, 1.0, 1.1)))
            for batch in (1, 2)
            for length in LENGTHS
        ]
    }


def memory_bound(batch, length):
    return 1e-3 + 1e-5 * batch * length


def test_the_papers_form_fails_where_operations_have_a_fixed_part():
    entries = {entry["range"]: entry for entry in study(timings(memory_bound))}
    assert set(entries) == set(RANGES)
    for entry in entries.values():
        assert entry["chosen"] == "affine"
        assert entry["forms"]["affine"]["mape"] < 1e-6
        assert entry["forms"]["quadratic"]["mape"] > 0.3
        assert entry["noise"] == pytest.approx(0.2 / 3)
    assert (entries["short"]["shortest"], entries["short"]["longest"]) == (4, 64)
    assert (entries["long"]["shortest"], entries["all"]["longest"]) == (96, 512)
    assert entries["all"]["forms"]["quadratic"]["error_by_length"][4] == pytest.approx(-1.0, abs=1e-2)


def test_the_papers_form_is_chosen_where_it_holds():
    entries = study(timings(lambda batch, length: 1e-6 * batch * length * length))
    assert {entry["chosen"] for entry in entries} == {"quadratic"}


def test_noise_is_what_one_repetition_differs_by():
    assert noise([Timing(1, 4, (0.8, 1.0, 1.2)), Timing(1, 8, (2.0, 2.0, 2.0))]) == pytest.approx(0.4 / 6)


def test_table_and_page_show_every_form_and_the_choice():
    entries = study(timings(memory_bound))
    shown = rows(entries)
    assert all(len(row) == len(HEAD) for row in shown)
    assert shown[0][:3] == ["sdpa float32", "prefill", "4-64"]
    assert [cell.endswith("*") for cell in shown[0]].index(True) == HEAD.index("affine")
    summary = {"machine": {}, "git_commit": "abc", "started_at": "now", "forms": entries, "config": {"layers": 2}}
    text = page(json.loads(json.dumps(summary)))
    assert section(entries) in text
    assert text.count("<svg") == 1


def test_eight_bit_weights_are_the_weights_rounded():
    torch.manual_seed(1)
    linear = torch.nn.Linear(16, 8, bias=False)
    rounded = Int8Linear(linear)
    assert rounded.weight.dtype is torch.int8
    error = rounded.weight * rounded.scale[:, None] - linear.weight
    assert bool((error.abs() <= rounded.scale[:, None] / 2 + 1e-6).all())
    ones = torch.eye(16)
    torch.testing.assert_close(rounded(ones), (rounded.weight * rounded.scale[:, None]).t(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_models_differ_in_nothing_but_what_they_are_called(attention):
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        plain, half, eight = (
            load(Variant(attention, weights), hidden=32, layers=1, max_length=16)(input_ids=tokens).logits.float()
            for weights in ("float32", "bfloat16", INT8)
        )
    torch.testing.assert_close(half, plain, atol=0.05, rtol=0.05)
    torch.testing.assert_close(eight, plain, atol=0.05, rtol=0.05)
    assert not torch.equal(eight, plain)


def test_every_series_is_timed_at_every_point_of_its_size():
    config = FormsConfig(hidden=16, layers=1, lengths=(2, 4, 8), most_tokens=8, rounds=3, deadline_s=0.0)
    seen = []
    found = measure(config, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(found) == 6 + 4
    assert [(p.batch, p.length) for p in found[SERIES]] == [(1, 2), (1, 4), (1, 8), (2, 2), (2, 4)]
    assert [(p.batch, p.length) for p in found[SERIES._replace(op="train")]] == [(1, 2), (1, 4), (2, 2)]
    assert all(len(point.durations_s) == 3 for points in found.values() for point in points)
