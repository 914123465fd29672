"""Profiles as the profiler stores them, good and bad."""

import json
from pathlib import Path
from typing import Any

import pytest

from services.latency import OpKind
from services.latency.artifact import document_hash
from services.simulator.profile_file import ProfileError, read_profile

_CHANGED = "the file was changed after it was written; make it again, or take the original"


def artifact(**changes: Any) -> dict[str, Any]:
    """As protobuf's JSON has it: what is 0 or false is left out."""
    fits = [
        {
            "op": "OP_KIND_PREFILL",
            "model": "affine",
            "coefficients": [0.01, 0.0001],
            "residual_p5": -0.1,
            "residual_p95": 0.1,
            "chosen": True,
        },
        {"op": "OP_KIND_PREFILL", "model": "quadratic", "coefficients": [1e-7], "residual_p95": 9.0},
        {"op": "OP_KIND_DECODE", "model": "full_decode", "coefficients": [0.005, 0.0, 1e-6], "chosen": True},
        {
            "op": "OP_KIND_OPTIMIZER_STEP",
            "model": "constant",
            "coefficients": [0.02],
            "residual_p95": 5,
            "chosen": True,
        },
        {"op": "OP_KIND_LATER", "model": "cubic", "coefficients": [1.0], "chosen": True},
    ]
    whole = {"profile_id": "abc-1", "fingerprint": "abc", "version": 1, "num_stages": 1, "model": "tiny", "fits": fits}
    return whole | changes


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "1.json"
    if not isinstance(content, str):
        content = json.dumps({"content_hash": document_hash(content)} | content, indent=2)
    path.write_text(content)
    return path


def test_the_chosen_fits_are_read(tmp_path: Path) -> None:
    profile = read_profile(write(tmp_path, artifact()), model="tiny", num_stages=1)
    assert (profile.profile_id, profile.model) == ("abc-1", "tiny")
    assert profile.latency.op_s(0, OpKind.PREFILL, 1, 100) == pytest.approx(0.02)
    assert profile.latency.op_s(0, OpKind.DECODE, 4, 100) == pytest.approx(0.0054)
    assert set(profile.latency.models[0]) == {OpKind.PREFILL, OpKind.DECODE, OpKind.OPTIMIZER_STEP}


def test_the_noise_is_the_spread_of_what_depends_on_a_length(tmp_path: Path) -> None:
    assert read_profile(write(tmp_path, artifact())).noise == pytest.approx((0.1 + 0.0) / 2 / 1.645)


def test_an_interval_that_says_nothing_gives_bounded_noise(tmp_path: Path) -> None:
    content = artifact()
    content["fits"][0]["residual_p95"] = 40.0
    assert 0.0 <= read_profile(write(tmp_path, content)).noise <= 0.5


@pytest.mark.parametrize("interval", ["NaN", "Infinity"])
def test_an_interval_that_is_no_number_is_refused_by_its_field(tmp_path: Path, interval: str) -> None:
    content = artifact()
    content["fits"][0]["residual_p95"] = interval
    with pytest.raises(ProfileError, match=r"field 'fits\[0\]\.residual_p95'"):
        read_profile(write(tmp_path, content))


def _fit(**changes: Any) -> dict[str, Any]:
    content = artifact()
    content["fits"][0] |= changes
    return content


BAD = [
    ("{,}", r"is not a profile: it is not JSON: .* at line 1 column 2"),
    ("[]", r"is not a profile: it is JSON, but not an object"),
    (artifact(num_stages=0), r"line 6: field 'num_stages': .* got 0"),
    (artifact(fits=[]), r"is not a profile: it holds no latency models"),
    (artifact(num_stages=2), r"no fit is chosen for OP_KIND_PREFILL on stage 1"),
    (_fit(stage=3), r"line \d+: field 'fits\[0\].stage': is 3, of 1 stages"),
    (_fit(stage=-1), r"field 'fits\[0\].stage'"),
    (_fit(model="cubic"), r"line 11: field 'fits\[0\].model': unknown latency form 'cubic'"),
    (_fit(coefficients=[1.0]), r"field 'fits\[0\].model': form affine takes 2 coefficients, got 1"),
    (_fit(coefficients=[1.0, "x"]), r"line 14: field 'fits\[0\].coefficients\[1\]': .* got 'x'"),
    (_fit(coefficients=[1.0, "NaN"]), r"field 'fits\[0\].coefficients\[1\]'"),
    (_fit(coefficients=[1.0, -1.0]), r"field 'fits\[0\].coefficients': must not be negative"),
    (_fit(op="OP_KIND_DECODE"), r"field 'fits\[2\].chosen': a second fit is chosen for OP_KIND_DECODE on stage 0"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_a_bad_profile_is_one_line_naming_the_place(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ProfileError, match=message) as caught:
        read_profile(path)
    assert str(caught.value).startswith((f"{path}: ", f"{path} is not a profile: "))
    assert "\n" not in str(caught.value)


def test_a_profile_of_another_model_or_cut_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, artifact())
    with pytest.raises(ProfileError, match=r"line 7: field 'model': is 'tiny', asked for is 'large'"):
        read_profile(path, model="large")
    with pytest.raises(ProfileError, match=r"line 6: field 'num_stages': is 1, asked for are 4 stages"):
        read_profile(path, num_stages=4)


def test_a_field_is_named_without_its_line_where_yaml_cannot_read_the_json(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(artifact(model="tiny\x7f", num_stages=0), ensure_ascii=False))
    with pytest.raises(ProfileError, match=r"json: field 'num_stages'"):
        read_profile(path)


def test_a_missing_profile_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"nowhere\.json is not a profile: there is no such file"):
        read_profile(tmp_path / "nowhere.json")


def test_an_artifact_that_was_changed_after_it_was_measured_is_refused(tmp_path: Path) -> None:
    whole = artifact()
    whole["content_hash"] = document_hash(whole)
    read_profile(write(tmp_path, whole))
    whole["fits"][0]["coefficients"] = [0.01, 0.0002]
    with pytest.raises(ProfileError, match=f"does not match content_hash .*: {_CHANGED}"):
        read_profile(write(tmp_path, whole))


def test_an_artifact_without_a_hash_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="has no content_hash"):
        read_profile(write(tmp_path, json.dumps(artifact())))
