"""Settings of the node agent that cannot work together with what its engines can do."""

import pytest

from services.node_agent.config import NodeAgentSettings
from services.node_agent.core.types import SCHEDULES
from services.runtime.config import ConfigError, validate


@pytest.mark.parametrize("engine", ["torch", "emulated"])
@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("stage_memory_bytes", 1 << 30, "no engine offloads"),
    ],
)
def test_what_only_the_simulator_can_do_is_refused_at_start(engine: str, key: str, value: object, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}.*{problem}"):
        validate(NodeAgentSettings, {"engine": engine, key: value})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_of_the_node_core_can_be_chosen(schedule: str) -> None:
    assert validate(NodeAgentSettings, {"training_schedule": schedule}).training_schedule == schedule


def test_the_defaults_are_what_engines_do() -> None:
    settings = validate(NodeAgentSettings, {"training_schedule": "async", "stage_memory_bytes": 0})
    assert settings == NodeAgentSettings()


def test_the_kv_cache_holds_at_least_a_block() -> None:
    with pytest.raises(ConfigError, match=r"kv_block_tokens \(64\) exceeds kv_capacity_tokens"):
        validate(NodeAgentSettings, {"kv_capacity_tokens": 63})
