"""Settings of the node agent that cannot work together with what its engines can do."""

import pytest

from services.node_agent.config import NodeAgentSettings
from services.runtime.config import ConfigError, validate


@pytest.mark.parametrize("engine", ["torch", "emulated"])
@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("training_schedule", "gpipe", 'no engine runs "gpipe"'),
        ("training_schedule", "1f1b", 'no engine runs "1f1b"'),
        ("stage_memory_bytes", 1 << 30, "no engine offloads"),
    ],
)
def test_what_only_the_simulator_can_do_is_refused_at_start(engine: str, key: str, value: object, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}.*{problem}"):
        validate(NodeAgentSettings, {"engine": engine, key: value})


def test_the_defaults_are_what_engines_do() -> None:
    settings = validate(NodeAgentSettings, {"training_schedule": "async", "stage_memory_bytes": 0})
    assert settings == NodeAgentSettings()


def test_the_kv_cache_holds_at_least_a_block() -> None:
    with pytest.raises(ConfigError, match=r"kv_block_tokens \(64\) exceeds kv_capacity_tokens"):
        validate(NodeAgentSettings, {"kv_capacity_tokens": 63})
