"""Held-out losses measured by a running node."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from lemix.internal.v1 import work_pb2
from lemix.v1 import errors_pb2
from tests.integration.node_agent.checkpoint_life import after_steps, life, train, trained
from tests.integration.node_agent.harness import (
    Cluster,
    cluster,
)


async def evaluated(made: Cluster, examples: Sequence[list[int]]) -> scheduler_pb2.EvaluationReport:
    items = [work_pb2.TrainingExample(token_ids=example) for example in examples]
    command = scheduler_pb2.EvaluateCommand(request_id="e", examples=items)
    made.scheduler.command("node-0", evaluate=command)
    await made.scheduler.until(lambda: made.scheduler.evaluations, "a held-out loss")
    return made.scheduler.evaluations[-1]


async def test_a_heldout_loss_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved") as node:
        await train(made, [0])
        await trained(made, 1)
        report = await evaluated(made, [[1, 2, 3], [4, 5]])
        assert not report.HasField("error")
        assert report.label_tokens == 3
        assert report.loss == pytest.approx(after_steps(1))
        assert node.held_by_stages() == []
        await train(made, [1])
        await trained(made, 2)


@pytest.mark.parametrize("examples", [[], [[1]], [[1, 1000]]])
async def test_bad_heldout_examples_are_refused(tmp_path: Path, examples: list[list[int]]) -> None:
    async with cluster(tmp_path) as made, life(made, tmp_path / "saved"):
        assert (await evaluated(made, examples)).error.code == errors_pb2.ERROR_CODE_INVALID_REQUEST
