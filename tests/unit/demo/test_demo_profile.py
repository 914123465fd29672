"""Capacity and SLO from a profile, worked out by hand."""

import pytest

from bench.demo.config import DemoError, TrainingConfig
from bench.demo.profile import newest_profile, profile_grid, promise
from lemix.internal.v1 import profile_pb2 as pb
from services.latency import OpKind
from services.profile_artifact import write_artifact
from services.profile_messages import latency_from_profile
from services.profiler.config import GridSettings


def _profile(version=1, created=1.0, stages=2, decode=0.002):
    profile = pb.Profile(
        profile_id=f"f-{version}", fingerprint="f", version=version, created_unix_s=created, num_stages=stages
    )
    for stage in range(stages):
        slower = 1 + stage
        profile.fits.add(
            stage=stage, op=pb.OP_KIND_PREFILL, model="affine", coefficients=[0.001, 1e-4 * slower], chosen=True
        )
        profile.fits.add(stage=stage, op=pb.OP_KIND_PREFILL, model="quadratic", coefficients=[9.0], chosen=False)
        profile.fits.add(stage=stage, op=pb.OP_KIND_DECODE, model="constant", coefficients=[decode], chosen=True)
    return profile


def _promise(profile, **more):
    values = {"mean_prompt": 90.0, "mean_output": 21.0, "reference_tokens": 10, "max_batch": 4, "slo_units": 5.0}
    return promise(profile.profile_id, latency_from_profile(profile), **{**values, **more})


def test_slo_is_five_times_the_mean_request_alone():
    promised = _promise(_profile())
    assert promised.prefill_s == pytest.approx(0.011 + 0.021)  # 100 tokens on both stages
    assert promised.decode_s == pytest.approx(0.004)
    assert promised.slo.ttft_s == pytest.approx(5 * 0.032)
    assert promised.slo.tpot_s == pytest.approx(5 * 0.004)


def test_capacity_is_bounded_by_the_slowest_stage_with_full_batches():
    assert _promise(_profile()).capacity_rps == pytest.approx(1 / (0.021 + 20 * 0.002 / 4))


def test_stages_that_share_cores_halve_capacity_but_not_the_promise():
    alone, shared = _promise(_profile()), _promise(_profile(), core_share=0.5)
    assert shared.capacity_rps == pytest.approx(alone.capacity_rps / 2)
    assert shared.slo == alone.slo


def test_only_chosen_models_predict():
    assert latency_from_profile(_profile()).op_s(0, OpKind.PREFILL, 1, 100) == pytest.approx(0.011)


def test_a_profile_that_predicts_nothing_is_refused():
    with pytest.raises(DemoError, match="f-1 predicts no time"):
        _promise(_profile(decode=0.0))


def test_the_grid_holds_what_the_demo_trains_and_little_more():
    grid = GridSettings.model_validate(profile_grid(TrainingConfig(piece_tokens=128, batch_size=1)))
    assert grid.train.batches == (1, 2)
    assert grid.train.lengths == (16, 51, 128, 256)
    assert grid.prefill == GridSettings().prefill


def _store(directory, profile):
    folder = directory / profile.fingerprint
    folder.mkdir(exist_ok=True)
    (folder / f"{profile.version}.json").write_text(write_artifact(profile))


def test_the_newest_profile_for_the_stages_is_taken(tmp_path):
    for profile in (_profile(1, 5.0), _profile(2, 9.0), _profile(3, 20.0, stages=1)):
        _store(tmp_path, profile)
    assert newest_profile(tmp_path, 2).profile_id == "f-2"


def test_without_a_profile_the_reason_is_told(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "1.json").write_text("not JSON")
    with pytest.raises(DemoError, match=r"no profile for 2 stages.*1\.json"):
        newest_profile(tmp_path, 2)
