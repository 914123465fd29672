"""Settings of the node agent that cannot work together with what its engines can do."""

from pathlib import Path
from typing import Any

import pytest

from services.node_agent.config import NodeAgentSettings, OpLatency
from services.node_agent.core.types import SCHEDULES
from services.node_agent.engine.ops import Measure
from services.node_agent.engine_choice import load
from services.runtime.app import StartupError
from services.runtime.config import ConfigError, validate

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
MODEL = DEPLOY / "models" / "llama-2-7b"
PROFILE = DEPLOY / "profiles" / "a100-llama-2-7b.json"


def test_an_op_holds_more_tokens_than_a_batch_has_requests() -> None:
    with pytest.raises(ConfigError, match="more than max_batch"):
        validate(NodeAgentSettings, {"max_batch": 16, "max_batch_tokens": 16})


async def test_limited_emulated_memory_needs_the_models_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 11}', encoding="utf-8")
    settings = NodeAgentSettings(engine="emulated", model_path=str(tmp_path), stage_memory_bytes=1 << 30)
    with pytest.raises(StartupError, match=r"config\.json.*hidden_size must be a whole number from 1 on, not None"):
        await load(settings)


async def test_an_emulated_node_takes_its_latency_from_a_profile() -> None:
    settings = NodeAgentSettings(
        engine="emulated", model_path=str(MODEL), emulated_profile=str(PROFILE), num_stages=2, time_scale=3.0
    )
    engine, fingerprint = await load(settings)
    slower, other = await load(settings.model_copy(update={"time_scale": 4.0}))
    assert fingerprint != other
    measure = Measure(1, "decode", 16, 1024, 2, 0)
    durations = dict((await engine.workers[1].run(measure)).durations_s)["decode"]
    assert durations[0] != durations[1]  # the profile's spread
    assert durations[0] == pytest.approx(3.0 * 7.5e-3, rel=0.3)
    await engine.close()
    await slower.close()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"emulated_profile": "/nowhere.json"},
            "emulated_profile: /nowhere.json is not a profile: there is no such file",
        ),
        ({"num_stages": 3}, "is of 2 stages, num_stages is 3"),
        ({"emulated_latency": {"decode": OpLatency()}}, "emulated_profile or emulated_latency, not both"),
    ],
)
async def test_a_profile_that_does_not_fit_is_refused(changes: dict[str, Any], complaint: str) -> None:
    given = {"emulated_profile": str(PROFILE), "num_stages": 2, **changes}
    with pytest.raises(StartupError, match=complaint):
        await load(NodeAgentSettings(engine="emulated", model_path=str(MODEL), **given))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_of_the_node_core_can_be_chosen(schedule: str) -> None:
    assert validate(NodeAgentSettings, {"training_schedule": schedule}).training_schedule == schedule


def test_the_defaults_are_what_engines_do() -> None:
    settings = validate(NodeAgentSettings, {"training_schedule": "async", "stage_memory_bytes": 0})
    assert settings == NodeAgentSettings()


def test_the_kv_cache_holds_at_least_a_block() -> None:
    with pytest.raises(ConfigError, match=r"kv_block_tokens \(64\) exceeds kv_capacity_tokens"):
        validate(NodeAgentSettings, {"kv_capacity_tokens": 63})


@pytest.mark.parametrize("node_id", [".", "..", ".hidden", "a/b", "a:b", "node-0\n"])
def test_a_node_id_that_is_no_name_of_a_folder_is_refused(node_id: str) -> None:
    with pytest.raises(ConfigError, match="node_id"):
        validate(NodeAgentSettings, {"node_id": node_id})
