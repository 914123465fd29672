"""Settings of the node agent that cannot work together with what its engines can do."""

import pytest

from services.node_agent.config import NodeAgentSettings
from services.node_agent.core.types import SCHEDULES
from services.node_agent.engine_choice import load
from services.runtime.app import StartupError
from services.runtime.config import ConfigError, validate


def test_an_op_holds_more_tokens_than_a_batch_has_requests() -> None:
    with pytest.raises(ConfigError, match="more than max_batch"):
        validate(NodeAgentSettings, {"max_batch": 16, "max_batch_tokens": 16})


async def test_the_emulated_engine_has_no_memory_to_limit() -> None:
    settings = NodeAgentSettings(engine="emulated", model_path="anywhere", stage_memory_bytes=1 << 30)
    with pytest.raises(StartupError, match="stage_memory_bytes must be 0: the emulated engine holds no tensors"):
        await load(settings)


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
