"""Emulated clusters: the model directory without weights, and what every node and the scheduler are told."""

import json

import pytest
from tokenizers import Tokenizer

from bench.live.emulated import PROFILES, clock_slip, emulated_cluster, read_profile, scaled_profile
from bench.live.errors import LiveError
from deploy.local.emulated_model import write_emulated_model
from deploy.local.settings import Addresses, services_of
from services.latency import OpKind
from services.profile_messages import latency_from_profile

A100, H100 = PROFILES / "a100-llama-2-7b.json", PROFILES / "h100-llama-2-7b.json"
ADDRESSES = Addresses(redis_url="r", scheduler="s", profiler="p", http="h", grpc="g")


def test_every_token_of_an_emulated_model_has_a_text(tmp_path):
    write_emulated_model(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert tokenizer.get_vocab_size() == config["vocab_size"] == 32000
    assert tokenizer.decode([300, 31999]) == " t300 t31999"
    text = "a prompt: é t300"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id("<|end|>") == config["eos_token_id"]


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100, "max_position_embeddings": 16}))
    with pytest.raises(ValueError, match="needs 260 tokens, not 100"):
        write_emulated_model(tmp_path / "model", tmp_path / "config.json")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.json")), ids=lambda path: path.stem)
def test_a_scaled_profile_takes_so_many_times_as_long(path):
    profile = read_profile(path)
    once, thrice = latency_from_profile(profile), latency_from_profile(scaled_profile(profile, 3.0))
    assert once.num_stages == profile.num_stages
    for stage in range(once.num_stages):
        for kind in once.models[stage]:
            assert thrice.op_s(stage, kind, 3, 700) == pytest.approx(3.0 * once.op_s(stage, kind, 3, 700))
        link, slow = once.host_links[stage], thrice.host_links[stage]
        assert slow.move_s(OpKind.OFFLOAD, 5e9) == pytest.approx(3.0 * link.move_s(OpKind.OFFLOAD, 5e9))


def test_nodes_of_one_kind_share_a_profile_that_the_scheduler_knows(tmp_path):
    config = emulated_cluster(tmp_path / "run", profiles=(A100, A100), time_scale=4.0, node={"max_batch": 8})
    settings = {service.name: service.settings for service in services_of(config, ADDRESSES, [])}
    node = settings["node-1"]
    assert (node["engine"], node["emulated_profile"], node["time_scale"]) == ("emulated", str(A100), 4.0)
    assert (node["num_stages"], node["max_batch"]) == (2, 8)
    known = read_profile(tmp_path / "run" / "scaled-profile.json")
    assert settings["scheduler"]["profile_path"].endswith("scaled-profile.json")
    assert list(known.fits) == list(scaled_profile(read_profile(A100), 4.0).fits)


def test_nodes_of_several_kinds_are_measured(tmp_path):
    config = emulated_cluster(tmp_path / "run", profiles=(A100, H100), time_scale=1.0)
    settings = {service.name: service.settings for service in services_of(config, ADDRESSES, [])}
    assert [settings[f"node-{i}"]["emulated_profile"] for i in range(2)] == [str(A100), str(H100)]
    assert "profile_path" not in settings["scheduler"]


def test_profiles_of_different_stages_make_no_cluster(tmp_path):
    with pytest.raises(LiveError, match=r"equal numbers of stages, not \[2, 4\]"):
        emulated_cluster(tmp_path, profiles=(A100, PROFILES / "a100-llama-2-7b-4-stages.json"), time_scale=1.0)
    with pytest.raises(LiveError, match=r"nowhere\.json"):
        emulated_cluster(tmp_path, profiles=(tmp_path / "nowhere.json",), time_scale=1.0)


def test_the_clock_slip_of_a_cluster_is_that_of_its_worst_node(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    for index, (p99, late_s) in enumerate(((0.01, 1.0), (0.03, 2.0))):
        told = {
            "event": "clock slip",
            "ops": 10,
            "p50": 0.001,
            "p99": p99,
            "worst_s": 0.5,
            "late_s": late_s,
            "busy_s": 100.0,
        }
        device = {"event": "emulated device", "wake_priority": "short_slice"}
        lines = ["no json", json.dumps(device), json.dumps(told), json.dumps({"event": "stopped"})]
        (logs / f"node-{index}.log").write_text("\n".join(lines))
    slip = clock_slip(tmp_path)
    assert (slip.ops, slip.p50, slip.p99, slip.worst_s, slip.total) == (20, 0.001, 0.03, 0.5, 0.015)
    assert slip.wake_priority == "short_slice"
    (logs / "node-2.log").write_text("killed\n")
    with pytest.raises(LiveError, match=r"node-2\.log tells no clock slip"):
        clock_slip(tmp_path)
