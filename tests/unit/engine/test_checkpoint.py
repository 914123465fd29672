"""What the stages write into a checkpoint is all that training needs to go on as if nothing had happened."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.node_agent.checkpoint_manifest import Manifest
from services.node_agent.checkpoint_store import CheckpointStore
from services.node_agent.engine.base import EngineConfig, StageResult
from services.node_agent.engine.handle import Handle
from services.node_agent.engine.inference_ops import Prefill, PrefillSequence, Sampling
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.torch.engine import load_inprocess_engine
from services.node_agent.engine.torch.executor import StageExecutor
from services.node_agent.engine.training_ops import Example, OptimizerSpec, OptimizerStep, TrainBackward, TrainForward
from services.node_agent.engine.weight_ops import RestoreCheckpoint, SaveCheckpoint
from tests.parity.tiny import write_tiny_gpt2, write_tiny_llama

#: A schedule that moves with every step.
SPEC = OptimizerSpec(learning_rate=1e-2, lr_schedule="cosine", warmup_steps=2, total_steps=9, weight_decay=0.1)
OTHER = OptimizerSpec(learning_rate=1e-3, lr_schedule="linear", total_steps=20)


def load(path: Path, num_stages: int, dtype: str = "float64") -> list[StageExecutor]:
    config = EngineConfig(model_path=str(path), num_stages=num_stages, dtype=dtype, kv_capacity_tokens=64)
    return [worker.executor for worker in load_inprocess_engine(config).workers]


def ok(stage: StageExecutor, op: StageOp) -> StageResult:
    result = stage.run(op)
    assert not result.error, result.error
    return result


def train(stages: Sequence[StageExecutor], job_id: str, index: int, spec: OptimizerSpec) -> None:
    """One micro-batch and its step."""
    examples = (Example(tuple((index * 7 + k * k) % 250 for k in range(10))), Example((index, 5, 250 - index, 9)))
    hidden: Handle | None = None
    for stage in stages:
        hidden = ok(stage, TrainForward(0, stage.version, f"m{index}", examples, 1.0, hidden)).output
    gradient, tied, norm_sq = None, None, 0.0
    for stage in reversed(stages):
        result = ok(stage, TrainBackward(0, f"m{index}", gradient, tied if stage is stages[0] else None))
        gradient, tied = result.output, tied or result.tied_gradient
        norm_sq += result.grad_norm_sq or 0.0
    embedding: Handle | None = None
    for stage in stages:
        last = embedding if stage is stages[-1] and len(stages) > 1 else None
        result = ok(stage, OptimizerStep(0, stage.version, job_id, spec, norm_sq, last))
        embedding = embedding or result.output


def weights(stages: Sequence[StageExecutor]) -> dict[str, Tensor]:
    return {
        name: part.clone() for stage in stages for name, part in stage.stage.weights.named(with_borrowed=False).items()
    }


def save(stages: Sequence[StageExecutor], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for stage in stages:
        ok(stage, SaveCheckpoint(0, stage.version, str(folder)))


def restore(stages: Sequence[StageExecutor], folder: Path) -> None:
    for stage in stages:
        before = stage.version
        assert ok(stage, RestoreCheckpoint(0, before, str(folder))).version == before + 1


MODELS = {
    "llama": lambda path: write_tiny_llama(path, layers=3, hidden=16),
    "tied llama": lambda path: write_tiny_llama(path, layers=3, hidden=16, tied=True),
    "gpt2": lambda path: write_tiny_gpt2(path, layers=3, hidden=16),
}


@pytest.mark.parametrize(
    ("family", "saved_by", "restored_by"), [("llama", 1, 1), ("llama", 1, 3), ("tied llama", 2, 2), ("gpt2", 2, 1)]
)
def test_training_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, family: str, saved_by: int, restored_by: int
) -> None:
    model = MODELS[family](tmp_path / "model")
    stages = load(model, saved_by)
    for index in range(4):
        train(stages, "job", index, SPEC)
        train(stages, "other", 20 + index, OTHER)
    save(stages, tmp_path / "checkpoint")
    successor = load(model, restored_by)
    restore(successor, tmp_path / "checkpoint")
    for index in range(4, 9):
        for running in (stages, successor):
            train(running, "job", index, SPEC)
            train(running, "other", 20 + index, OTHER)
    expected, found = weights(stages), weights(successor)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=0.0, atol=1e-12), name


@pytest.mark.parametrize(("saved_in", "restored_in"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_node_of_another_dtype_goes_on(tmp_path: Path, saved_in: str, restored_in: str) -> None:
    model = MODELS["gpt2"](tmp_path / "model")  # some of its weights are stored in parts
    stages = load(model, 1, saved_in)
    train(stages, "job", 0, SPEC)
    save(stages, tmp_path / "checkpoint")
    successor = load(model, 2, restored_in)
    restore(successor, tmp_path / "checkpoint")
    for stage in successor:
        for parameter, state in stage.training.jobs["job"].optimizer.state.items():
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == parameter.dtype
            assert state["step"] == 1.0
            assert state["step"].dtype == torch.float32
    train(successor, "job", 1, SPEC)
    assert {int(state["step"]) for stage in successor for state in _states(stage, "job")} == {2}


def _states(stage: StageExecutor, job_id: str) -> list[dict[str, Tensor]]:
    return list(stage.training.jobs[job_id].optimizer.state.values())


def test_a_restored_node_drops_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    model = MODELS["llama"](tmp_path / "model")
    stages = load(model, 1)
    train(stages, "job", 0, SPEC)
    save(stages, tmp_path / "checkpoint")
    at_checkpoint = weights(stages)
    random_then = torch.rand(4)
    train(stages, "job", 1, SPEC)
    train(stages, "later", 2, OTHER)
    restore(stages, tmp_path / "checkpoint")
    assert all(torch.equal(value, at_checkpoint[name]) for name, value in weights(stages).items())
    assert set(stages[0].training.jobs) == {"job"}
    assert torch.equal(torch.rand(4), random_then)


def test_only_the_current_version_is_saved(tmp_path: Path) -> None:
    (stage,) = load(MODELS["llama"](tmp_path / "model"), 1)
    assert stage.run(SaveCheckpoint(0, 3, str(tmp_path))).error.startswith("VersionMismatch")
    assert list(tmp_path.glob("*.safetensors")) == []


def test_a_checkpoint_with_other_shapes_changes_nothing(tmp_path: Path) -> None:
    wide = load(write_tiny_llama(tmp_path / "wide", layers=3, hidden=32), 1)
    train(wide, "job", 0, SPEC)
    save(wide, tmp_path / "checkpoint")
    stages = load(MODELS["llama"](tmp_path / "model"), 1)
    before = weights(stages)
    result = stages[0].run(RestoreCheckpoint(0, 0, str(tmp_path / "checkpoint")))
    assert "has shape (259, 32), the model's is (259, 16)" in result.error
    assert result.version == 1  # as every op that changes weights, so that stages stay together
    assert all(torch.equal(value, before[name]) for name, value in weights(stages).items())


def test_a_stage_that_cannot_write_says_so(tmp_path: Path) -> None:
    (stage,) = load(MODELS["llama"](tmp_path / "model"), 1)
    assert stage.run(SaveCheckpoint(0, 0, str(tmp_path / "missing"))).error
    ok(stage, Prefill(1, 0, (PrefillSequence("r", (1, 2), Sampling(), 2),)))


@pytest.mark.parametrize("family", MODELS)
def test_an_export_is_a_hugging_face_directory(tmp_path: Path, family: str) -> None:
    model = MODELS[family](tmp_path / "model")
    stages = load(model, 2)
    train(stages, "job", 0, SPEC)
    store = CheckpointStore(tmp_path / "checkpoints", "node-0", model, keep=2)
    store.prepare()
    partial = store.begin()
    save(stages, partial)
    manifest = Manifest(
        node_id="node-0",
        incarnation=7,
        step=1,
        created_unix_s=1.0,
        trained_unix_s=1.0,
        num_stages=2,
        reason="request",
        model=store.model,
    )
    store.commit(partial, manifest)
    path, _ = store.export("node-0:7:1")
    with safe_open(path / "model.safetensors", framework="pt") as stored:
        assert stored.metadata() == {"format": "pt"}
    assert (path / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, local_files_only=True)
    state = loaded.state_dict()
    for name, value in weights(stages).items():
        assert torch.equal(state[name], value), name
