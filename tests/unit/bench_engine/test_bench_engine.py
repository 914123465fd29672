"""The benchmark of the engine: what its figures decide, and that what it measures is what it says."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.engine import bubble
from bench.engine.__main__ import table
from bench.engine.figures import Figure, quartiles, ratios
from bench.engine.node import Node
from services.node_agent.engine.base import EngineConfig, StageResult
from services.node_agent.engine.emulated.engine import load_emulated_engine
from services.node_agent.engine.emulated.worker import next_token
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.training_ops import OptimizerSpec
from tests.integration.node_agent.harness import write_model


@pytest.mark.parametrize(
    ("samples", "at_least", "met", "verdict"),
    [
        ((2.0, 2.0, 2.0), True, True, "held"),
        ((0.5, 0.6, 0.7), True, False, "missed"),
        ((0.5, 1.1, 1.2), True, True, "unresolved"),
        ((0.5, 0.6, 0.7), False, True, "held"),
        ((3.0,), False, False, "missed"),
    ],
)
def test_a_verdict_needs_the_middle_half_of_the_samples(
    samples: tuple[float, ...], at_least: bool, met: bool, verdict: str
) -> None:
    figure = Figure("x", "us", samples, 1.0, at_least)
    assert (figure.met, figure.verdict) == (met, verdict)
    assert figure.as_json()["verdict"] == verdict
    assert figure.as_row()[-1] == verdict


def test_without_a_target_nothing_is_decided() -> None:
    figure = Figure("x", "", (1.0, 2.0))
    assert (figure.met, figure.verdict, figure.as_row()[-2:]) == (None, "", ("", ""))
    assert table([figure, Figure("y", "s", (1.0,), 2.0)]).row_count == 2


def test_pairs_are_compared_with_each_other() -> None:
    assert ratios((1.0, 4.0), (2.0, 2.0)) == (0.5, 2.0)
    assert quartiles((4.0, 1.0, 2.0, 3.0, 5.0)) == (2.0, 4.0)


@pytest.mark.parametrize("size", [4, 16])
def test_bubbles_are_the_textbook_s(size: int) -> None:
    """A pipeline that empties for every step idles for (S-1)/(M+S-1) of it; one that does not, hardly at all."""
    least = (bubble.STAGES - 1) / (size + bubble.STAGES - 1)
    for schedule in ("gpipe", "1f1b"):
        assert least * 0.98 <= bubble.bubble_rate(schedule, "drain", size) <= least * 1.05
    assert bubble.bubble_rate("async", "stash", size) <= bubble.TARGET


async def test_the_node_trains_generates_and_says_what_failed(tmp_path: Path) -> None:
    def tamper(stage: int, op: StageOp, result: StageResult) -> StageResult:
        return replace(result, error="ValueError: no") if getattr(op, "task_id", "") == "job/3" else result

    config = EngineConfig(model_path=str(write_model(tmp_path / "model")), num_stages=2)
    engine = load_emulated_engine(config, tamper=tamper)
    node = Node(engine.workers)
    await node.train([[(1, 2), (3, 4)], [(5, 6)]], OptimizerSpec())
    assert node.loop.snapshot().versions == (2, 2)
    (tokens,) = await node.generate([(1, 2, 3)], 2)
    first = next_token(3, 3, 97)
    assert tokens == [first, next_token(first, 4, 97)]
    with pytest.raises(RuntimeError, match="job/3 failed: train_forward failed on stage 0: ValueError: no"):
        await node.train([[(1, 2)]], OptimizerSpec())
    await node.close()
    await engine.close()
