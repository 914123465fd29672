"""One mixed scenario on two stages, op by op. LEMIX_REWRITE_GOLDEN=1 writes the transcript again."""

import os
from pathlib import Path

import pytest

from services.node_agent.core.types import Cancelled, QueueOrder
from tests.unit.node_core.driver import Driver, microbatch, request, sync

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("order", list(QueueOrder))
def test_mixed_scenario_matches_its_golden_transcript(order: QueueOrder) -> None:
    driver = Driver(num_stages=2, queue_order=order, max_batch=4, kv_capacity_tokens=120, stop_after={"c": 3})
    driver.at(0.0, request("a", prompt=20, max_tokens=6), *[microbatch(f"m{i}", accumulation=2) for i in range(3)])
    driver.at(0.25, request("b", prompt=40, max_tokens=5, arrival_s=0.25))
    driver.at(0.3, request("large", prompt=90, max_tokens=5, arrival_s=0.3), request("c", max_tokens=9, arrival_s=0.3))
    driver.at(0.5, sync("average", False)).at(0.9, sync("average", True))
    driver.at(1.1, request("d", max_tokens=8, arrival_s=1.1), microbatch("m3", accumulation=2))
    driver.at(1.4, Cancelled("d"), microbatch("n0", job="other", last=True))
    driver.run()
    path = GOLDEN / f"mixed_two_stages_{order}.txt"
    transcript = "\n".join(driver.log) + "\n"
    if os.environ.get("LEMIX_REWRITE_GOLDEN") == "1":
        path.write_text(transcript)
    assert transcript == path.read_text()
