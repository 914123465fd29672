"""A real scheduler in this process, with fake peers on real gRPC."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.integration.scheduler.cluster import Cluster


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """Nothing started yet."""
    async with AsyncExitStack() as stack:
        cluster = Cluster(stack, tmp_path)
        stack.push_async_callback(cluster.close)
        yield cluster
