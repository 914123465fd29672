"""Artifacts on disk: versions, atomicity, corrupted files."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from structlog.testing import capture_logs

from lemix.internal.v1 import profile_pb2
from services.profiler.store import CorruptProfile, ProfileStore, load_profile


@pytest.fixture
def store(tmp_path):
    return ProfileStore(tmp_path)


def profile(fingerprint="abc", node_id="node-0"):
    fit = profile_pb2.LatencyFit(
        op=profile_pb2.OP_KIND_PREFILL, model="affine", coefficients=[1e-3, 2e-5], mape=0.04, chosen=True
    )
    return profile_pb2.Profile(fingerprint=fingerprint, node_id=node_id, num_stages=1, fits=[fit])


def test_versions_rise_and_the_newest_comes_back(store, tmp_path):
    first = store.save(profile(node_id="old"))
    second = store.save(profile(node_id="new"))
    assert (first.version, first.profile_id) == (1, "abc-1")
    assert (second.version, second.profile_id) == (2, "abc-2")
    assert store.newest("abc") == second
    assert sorted(path.name for path in (tmp_path / "abc").iterdir()) == ["1.json", "2.json"]


def test_ten_comes_after_nine(store):
    for _ in range(10):
        store.save(profile())
    assert store.newest("abc").version == 10


def test_profiles_saved_at_the_same_time_get_versions_of_their_own(store):
    names = [f"node-{index}" for index in range(16)]
    with ThreadPoolExecutor(len(names)) as pool:
        saved = list(pool.map(lambda name: store.save(profile(node_id=name)), names))
    assert sorted(item.version for item in saved) == list(range(1, 17))
    assert {item.node_id for item in store.all()[0]} == set(names)


def test_the_caller_s_message_is_left_alone(store):
    mine = profile()
    store.save(mine)
    assert mine == profile()


def test_fingerprints_do_not_mix(store):
    store.save(profile("abc"))
    assert store.newest("abd") is None
    assert store.save(profile("abd")).version == 1


def test_a_new_process_goes_on_where_the_last_one_stopped(store, tmp_path):
    store.save(profile())
    assert ProfileStore(tmp_path).save(profile()).version == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text(""),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
        lambda path: path.write_text('{"version": 2, "fingerprint": "abc", "nonsense": 1}'),
        lambda path: path.write_text('{"version": 2, "fingerprint": "abc"}'),
        lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "version": 7})),
    ],
    ids=["truncated", "empty", "not text", "unknown field", "no fits", "another version"],
)
def test_a_corrupted_file_is_named_and_the_version_before_is_used(store, tmp_path, damage):
    first = store.save(profile(node_id="good"))
    store.save(profile(node_id="bad"))
    path = tmp_path / "abc" / "2.json"
    damage(path)
    with pytest.raises(CorruptProfile, match=str(path)):
        load_profile(path)
    with capture_logs() as logs:
        assert store.newest("abc") == first
    assert [str(path) in entry["error"] for entry in logs] == [True]
    assert store.save(profile()).version == 3


def test_a_write_that_fails_leaves_no_trace(store, tmp_path, monkeypatch):
    store.save(profile())

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("services.profiler.store.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        store.save(profile())
    assert [path.name for path in (tmp_path / "abc").iterdir()] == ["1.json"]


def test_other_files_are_ignored(store, tmp_path):
    store.save(profile())
    for name in ("notes.json", "02.json", "0.json", ".3-x.tmp"):
        (tmp_path / "abc" / name).write_text("{}")
    assert store.newest("abc").version == 1


@pytest.mark.parametrize("fingerprint", ["", "../x", "a/b", ".", "..", ".hidden", "a" * 129, "a\n"])
def test_a_fingerprint_cannot_leave_the_directory(store, fingerprint):
    with pytest.raises(ValueError, match="not a fingerprint"):
        store.newest(fingerprint)
    with pytest.raises(ValueError, match="not a fingerprint"):
        store.save(profile(fingerprint))
