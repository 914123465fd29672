"""What the charts of a profile's page show of their points."""

import re

from lemix.internal.v1 import profile_pb2
from services.profiler.report.charts import durations, residuals
from services.profiler.report.forms import choice, passed_over


def fit(model, *coefficients):
    return profile_pb2.LatencyFit(
        op=profile_pb2.OP_KIND_DECODE,
        model=model,
        coefficients=coefficients,
        chosen=True,
        residual_p5=-0.1,
        residual_p95=0.1,
    )


def point(batch, length, *durations_s):
    return profile_pb2.Measurement(
        op=profile_pb2.OP_KIND_DECODE, batch=batch, length=length, durations_s=durations_s or [0.01]
    )


def test_no_two_batches_of_a_chart_look_alike():
    points = [point(batch, length) for batch in range(1, 30) for length in (16, 64)]
    figure = durations(points, fit("affine", 0.001, 1e-5), "decode")
    lines = re.findall(r'<polyline class="line" style="([^"]*)"( stroke-dasharray="[^"]*")?', figure)
    keys = re.findall(r'<i style="([^"]*)"', figure)
    assert len(lines) == len(keys) == 29
    assert len(set(lines)) == len(set(keys)) == 29


def test_predictions_above_every_measurement_stay_inside_the_chart():
    figure = durations([point(1, 16, 0.001), point(1, 64, 0.001)], fit("affine", 0.0, 1e-3), "decode")
    heights = [float(pair.split(",")[1]) for pair in re.findall(r'points="([^"]*)"', figure)[0].split()]
    assert len(set(heights)) == len(heights)


def test_residuals_beyond_the_edge_are_marked_and_counted():
    points = [point(1, 16, 0.016, 0.05, 0.07), point(1, 64, 0.064)]
    figure = residuals(points, [fit("affine", 0.0, 1e-3)], "decode", "measured")
    assert "beyond 100 % (affine 2 of 4)" in figure
    assert re.findall(r'class="beyond"[^>]* d="([^"]*)"', figure)[0].count("M") == 2
    assert re.findall(r'class="dots"[^>]* d="([^"]*)"', figure)[0].count("M") == 2


def test_a_chart_that_holds_every_residual_speaks_of_no_triangles():
    figure = residuals([point(1, 16, 0.016), point(1, 64, 0.064)], [fit("affine", 0.0, 1e-3)], "decode", "measured")
    assert "Triangles" not in figure
    assert "beyond" not in figure


def test_a_form_of_smaller_error_that_is_not_chosen_is_explained():
    used = profile_pb2.LatencyFit(model="full", mape=0.075, chosen=True)
    table = profile_pb2.LatencyFit(model="tabulated", mape=0.064)
    worse = profile_pb2.LatencyFit(model="quadratic", mape=0.7)
    assert "error: tabulated. The gain over full" in passed_over([worse, used, table])
    assert not passed_over([worse, used])


def test_every_form_in_use_is_explained_and_no_other():
    forms = {"quadratic", "affine", "full", "full_decode", "constant", "tabulated"}
    for form in forms:
        explained = set(re.findall(r"<dt>(.*?)</dt>", choice([profile_pb2.LatencyFit(model=form)])))
        assert explained == {form}


def test_the_length_of_a_decode_is_called_its_context():
    used = fit("affine", 0.0, 1e-3)
    assert "context, tokens per sequence" in durations([point(1, 16), point(1, 64)], used, "decode")
    used.op = profile_pb2.OP_KIND_PREFILL
    assert "context" not in durations([point(1, 16), point(1, 64)], used, "prefill")
