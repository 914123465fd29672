"""Any schedule with stashed weights: every op finds the weights it was stamped with, and groups do not mix."""

import asyncio
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from services.node_agent.config import NodeAgentSettings
from services.node_agent.engine.base import EngineConfig, StageResult
from services.node_agent.engine.emulated.engine import EmulatedEngine, load_emulated_engine
from services.node_agent.engine.emulated.worker import EmulatedStage
from services.node_agent.engine.inference_ops import Prefill, Sampling
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.training_ops import Example, OptimizerSpec, OptimizerStep, TrainForward
from services.node_agent.engine.weight_ops import LoadWeights, Snapshot
from services.node_agent.tasks import MicrobatchTask, RequestTask
from services.node_agent.weight_ops import WeightOp
from services.runtime.config import ConfigError, validate
from tests.parity.virtual_node import VirtualNode

SPEC = OptimizerSpec(learning_rate=1e-3)


class Watched:
    """A stage, its weight at every version, and the most it held at once."""

    def __init__(self, stage: EmulatedStage) -> None:
        self.stage = stage
        self.weights = [stage.weight]
        self.most_groups = 0
        self.most_versions = 1

    def run(self, op: StageOp) -> StageResult:
        """What a node calls to run an op."""
        result = self.stage.perform(op, 0.0, 0.0)
        if isinstance(op, OptimizerStep | LoadWeights):
            self.weights.append(self.stage.weight)
        self.most_groups = max(self.most_groups, len(self.stage.grad_norms_sq))
        self.most_versions = max(self.most_versions, len(self.stage.versions))
        return result


def load(folder: str, num_stages: int) -> EmulatedEngine:
    """Emulated stages whose snapshots lie in `folder`."""
    (Path(folder) / "config.json").write_text(json.dumps({"vocab_size": 11}), encoding="utf-8")
    return load_emulated_engine(EngineConfig(model_path=folder, num_stages=num_stages))


def add_work(node: VirtualNode, source: random.Random, file: Path) -> None:
    """Micro-batches of two jobs, requests, cancellations, snapshots, and changes of weights (one of them fails)."""
    for index in range(10):
        job, sequence = f"job{index % 2}", index // 2
        task = MicrobatchTask(f"{job}/{sequence}", job, sequence, (Example((1, 2, 3)),), SPEC, 1 + index % 2)
        task.last = sequence == 4
        node.at(source.uniform(0.0, 3.0), lambda task=task: node.microbatch(task))
        if source.random() < 0.3:
            node.at(source.uniform(1.0, 6.0), lambda task=task: node.loop.cancel(task.task_id))
    for index in range(8):
        request = RequestTask(f"r{index}", 0.0, (1, 2), Sampling(ignore_eos=True), 3, reference_ids=(1,))
        node.at(source.uniform(0.0, 6.0), lambda request=request: node.request(request))
    for index, path in enumerate((file, Path("/nowhere"), file)):
        snapshot = WeightOp(False, lambda op, index=index: Snapshot(op.op_id, op.version, f"s{index}"))
        change = WeightOp(
            True,
            lambda op, path=path: LoadWeights(op.op_id, op.version, "", str(path), "replace", op.oldest_version),
        )
        for name, weight_op in ((f"s{index}", snapshot), (f"c{index}", change)):
            node.at(source.uniform(0.0, 6.0), lambda name=name, weight_op=weight_op: node.weight_op(name, weight_op))


def durations(source: random.Random) -> Callable[[int, StageOp], float]:
    """Short and long ones by chance."""
    return lambda stage, op: source.choice((0.01, 0.1, 0.6))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_stages=st.integers(1, 4),
    buffers=st.integers(1, 3),
    inflight=st.integers(1, 6),
    handling=st.sampled_from(["stash", "stash", "drain"]),
)
def test_no_schedule_breaks_the_books(seed: int, num_stages: int, buffers: int, inflight: int, handling: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_check(folder, seed, num_stages, buffers, inflight, handling))


async def _check(folder: str, seed: int, num_stages: int, buffers: int, inflight: int, handling: str) -> None:
    engine = load(folder, num_stages)
    watched = [Watched(worker.stage) for worker in engine.workers]
    source = random.Random(seed)
    node = VirtualNode(
        [stage.run for stage in watched],
        durations(source),
        weight_handling=handling,
        gradient_buffers=buffers,
        max_inflight_training=inflight,
        max_batch=2,
        max_training_wait_s=0.3,
        group_timeout_s=0.0,
    )
    file = Path(folder) / "weights.safetensors"
    weight = np.full(4, 3.0, dtype=np.float32)
    save_file({f"layers.{stage}.weight": weight for stage in range(num_stages)}, file)
    add_work(node, source, file)
    await node.finish()
    for weight_op in node.weight_ops:
        for stage, result in zip(watched, weight_op.results, strict=True):
            if result.weights_path:
                (written,) = load_file(result.weights_path).values()
                assert float(written.mean()) == stage.weights[weight_op.version]
    await engine.close()
    assert (len(node.outcomes), len(node.weight_ops)) == (18, 6)
    errors = {ran.result.error for ran in node.ran if not isinstance(ran.op, LoadWeights)}
    assert not [error for error in errors if error and not error.startswith("ArithmeticError")]
    for stage in watched:
        assert stage.stage.grad_norms_sq == {}
        assert stage.most_groups <= (buffers if handling == "stash" else 1)
        if handling == "drain" or num_stages == 1:
            assert stage.most_versions == 1
    for ran in node.ran:
        if isinstance(ran.op, Prefill | TrainForward) and ran.stage == num_stages - 1:
            losses = [loss for _, loss in ran.result.reference_losses] or [ran.result.loss]
            expected = sum(stage.weights[ran.op.version] for stage in watched) / num_stages
            assert losses == pytest.approx([expected] * len(losses), rel=1e-6)


def test_a_node_without_gradient_buffers_does_not_start() -> None:
    assert validate(NodeAgentSettings, {}).gradient_buffers == 1
    for wrong in (0, 65, "many"):
        with pytest.raises(ConfigError, match="gradient_buffers"):
            validate(NodeAgentSettings, {"gradient_buffers": wrong})
