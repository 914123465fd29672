"""Artifacts and their hash."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemix.internal.v1 import profile_pb2
from services.latency.artifact import document_hash
from services.profile_artifact import ArtifactError, content_hash, load_artifact, read_artifact, write_artifact
from services.profile_messages import latency_from_profile

FINITE = st.floats(0.0, 1e12, allow_nan=False)


def profile(**fields):
    fit = profile_pb2.LatencyFit(op=1, model="affine", coefficients=[1e-3, 2e-5], chosen=True)
    return profile_pb2.Profile(fingerprint="abc", num_stages=2, fits=[fit], **fields)


@given(created=FINITE, durations=st.lists(FINITE, max_size=5), peak=st.integers(0, 2**63))
def test_what_is_written_is_read_again(created, durations, peak):
    measured = profile_pb2.Measurement(op=1, durations_s=durations, peak_bytes=peak)
    before = profile(created_unix_s=created, measurements=[measured])
    after = read_artifact(write_artifact(before))
    assert after.content_hash == content_hash(before) == content_hash(after)
    after.content_hash = ""
    assert after == before


def test_the_hash_is_of_what_was_measured_not_of_its_name():
    assert content_hash(profile(version=1, profile_id="abc-1")) == content_hash(profile(version=2))
    assert content_hash(profile(node_id="a")) != content_hash(profile(node_id="b"))


def test_layout_and_the_way_of_writing_numbers_do_not_matter():
    text = write_artifact(profile(created_unix_s=5.0))
    document = json.loads(text)
    shuffled = dict(reversed(document.items()))
    shuffled["created_unix_s"] = 5
    assert read_artifact(json.dumps(shuffled)).content_hash == document["content_hash"] == document_hash(shuffled)


def test_a_changed_artifact_is_refused():
    text = write_artifact(profile(node_id="node-0"))
    with pytest.raises(
        ArtifactError, match=r"does not match content_hash .*: the file was changed after it was written; "
    ):
        read_artifact(text.replace("node-0", "node-1"))


def test_an_artifact_without_a_hash_is_refused():
    document = json.loads(write_artifact(profile()))
    del document["content_hash"]
    with pytest.raises(ArtifactError, match="has no content_hash"):
        read_artifact(json.dumps(document))


NO_PROFILES = [
    ("", "it is not JSON: Expecting value at line 1 column 1"),
    ("[" * 100_000, "it is not JSON that can be read"),
    ("[]", "it is JSON, but not an object"),
    ('{"unknown": 1}', "it holds no latency models ('fits')"),
    ('{"fits": [{"x": 1}]}', 'has no field named "x" at "Profile.fits[0]"'),
    ('{"fits": 7}', "Failed to parse fits field"),
]


@pytest.mark.parametrize(("text", "reason"), NO_PROFILES)
def test_what_is_no_profile_is_refused_in_one_line(tmp_path, text, reason):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ArtifactError) as refused:
        load_artifact(path)
    told = str(refused.value)
    assert told.startswith(f"{path} is not a profile: ")
    assert reason in told
    assert "\n" not in told
    assert "Available" not in told


def test_what_is_no_file_of_text_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff")
    for name, reason in (("", "it is a directory"), ("none", "there is no such file"), ("binary", "it is not text")):
        with pytest.raises(ArtifactError) as refused:
            load_artifact(tmp_path / name)
        assert str(refused.value) == f"{tmp_path / name} is not a profile: {reason}"


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[3] / "deploy" / "profiles").glob("*.json")), ids=str)
def test_the_artifacts_of_the_repository_have_the_hash_of_their_content(path):
    profile = read_artifact(path.read_text(encoding="utf-8"))
    assert profile.content_hash
    assert latency_from_profile(profile).num_stages == profile.num_stages
