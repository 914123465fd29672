"""What an engine cannot do is refused at start-up."""

from pathlib import Path

import pytest

from services.node_agent.config import NodeAgentSettings
from services.node_agent.engine_choice import load
from services.runtime.app import StartupError


async def test_the_torch_engine_refuses_to_keep_kv_caches(tmp_path: Path) -> None:
    settings = NodeAgentSettings(model_path=str(tmp_path), engine="torch", prefix_cache_tokens=1)
    with pytest.raises(StartupError, match="prefix_cache_tokens must be 0: the torch engine"):
        await load(settings)
