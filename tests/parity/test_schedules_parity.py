"""Every schedule of the node, on real stages: the same gradients, losses and tokens as a plain loop, in float64."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.node_agent.core.types import SCHEDULES
from services.node_agent.engine.base import StageResult
from services.node_agent.engine.inference_ops import Decode, Prefill, PrefillSequence, Sampling
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.training_ops import Example, OptimizerStep, TrainBackward, TrainForward
from services.node_agent.tasks import MicrobatchTask
from tests.parity.pipeline import Pipeline, assert_close, relative_error
from tests.parity.reference import PlainLoop, example_losses, load_reference, named_weights
from tests.parity.test_stash_parity import add_work, durations, replay_request, replay_training, served_rows
from tests.parity.test_training_parity import MODELS, OPTIMIZER, assert_tied_copy_is_equal, batch
from tests.parity.virtual_node import VirtualNode

PRODUCT = [(schedule, stages, size) for schedule in SCHEDULES for stages in (1, 2, 3, 4) for size in (1, 2, 4)]


class TrainedNode:
    """A node that trains groups of `size` micro-batches; keeps the gradient of every step."""

    def __init__(self, path: Path, schedule: str, stages: int, **config: object) -> None:
        self.pipeline = Pipeline.load(path, stages)
        self.gradients: list[dict[str, Tensor]] = []
        self.node = VirtualNode(
            [self._run(stage) for stage in range(stages)],
            durations(stages),
            training_schedule=schedule,
            max_training_wait_s=0.2,
            **config,
        )

    def _run(self, stage: int) -> Callable[[StageOp], StageResult]:
        def run(op: StageOp) -> StageResult:
            if isinstance(op, OptimizerStep) and stage == 0:
                self.gradients.append({})
            if isinstance(op, OptimizerStep):
                executor = self.pipeline.executors[stage]
                held = zip(executor.stage.weights.owned, executor.training.gradients[op.group], strict=True)
                parts = (part for weight, gradient in held for part in weight.parts(gradient.clone()))
                self.gradients[op.version] |= dict(parts)
            result = self.pipeline.executors[stage].run(op)
            assert result.error == "", result.error
            return result

        return run

    async def train(self, steps: int, size: int, parts: Callable[[int], int]) -> None:
        """Groups that arrive faster than they are trained."""
        for index in range(steps * size):
            task = MicrobatchTask(f"job/{index}", "job", index, tuple(batch(index)), OPTIMIZER, accumulation=size)
            self.node.at(0.1 * index, partial(self.node.microbatch, task, parts(index)))
        await self.node.finish()
        assert [outcome.training.HasField("error") for outcome in self.node.outcomes.values()] == [False] * steps * size

    def loss(self, index: int) -> float:
        """Of a micro-batch."""
        return self.node.outcomes[f"job/{index}"].training.loss


async def check_curve(path: Path, schedule: str, stages: int, size: int, steps: int) -> None:
    """Gradients of every step, losses of every micro-batch and the weights at the end equal a plain loop's."""
    trained = TrainedNode(path, schedule, stages)
    await trained.train(steps, size, lambda index: 1 + index % 7)
    loop = PlainLoop(load_reference(path), OPTIMIZER)
    for step in range(steps):
        members = range(step * size, (step + 1) * size)
        for index in members:
            with torch.no_grad():
                expected = float(example_losses(loop.model, batch(index)))
            assert trained.loss(index) == pytest.approx(expected, rel=1e-9)
        gradients = [loop.gradient(batch(index), 1 / size) for index in members]
        total = {name: sum(gradient[name] for gradient in gradients) for name in gradients[0]}
        assert_close(trained.gradients[step], total)
        loop.apply(gradients)
    assert_close(trained.pipeline.weights(), named_weights(loop.model))
    assert_tied_copy_is_equal(trained.pipeline)


@pytest.mark.parametrize(("schedule", "stages", "size"), PRODUCT)
async def test_gradients_and_losses(models: dict[str, Path], schedule: str, stages: int, size: int) -> None:
    """Three steps; micro-batches are whole or cut, by examples and by layers."""
    name = ("llama", "llama-tied", "gpt2")[(stages + size) % 3]
    await check_curve(models[name], schedule, stages, size, 3)


@pytest.mark.parametrize("schedule", SCHEDULES)
async def test_fifty_steps(models: dict[str, Path], schedule: str) -> None:
    await check_curve(models["llama"], schedule, 2, 1, 50)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("schedule", "stages", "size"), PRODUCT)
async def test_fifty_steps_of_everything(
    models: dict[str, Path], name: str, schedule: str, stages: int, size: int
) -> None:
    await check_curve(models[name], schedule, stages, size, 50)


@pytest.mark.parametrize("weight_handling", ["drain", "stash"])
@pytest.mark.parametrize("schedule", SCHEDULES)
async def test_serving_meanwhile(models: dict[str, Path], schedule: str, weight_handling: str) -> None:
    """Requests run between any two training ops; every token is what its version gives with training paused."""
    name, stages = "llama-tied", 3
    trained = TrainedNode(models[name], schedule, stages, weight_handling=weight_handling, max_batch=2)
    logits = trained.pipeline.record_logits()
    requests = add_work(trained.node, lambda index: 1 + index % 5)
    await trained.node.finish()
    assert len(trained.node.outcomes) == 18
    by_version, _ = replay_training(trained.node, PlainLoop(load_reference(models[name]), OPTIMIZER))
    assert_close(trained.pipeline.weights(), by_version[-1])
    assert interleavings(trained.node) >= {(TrainForward, TrainForward), (TrainBackward, TrainBackward)}
    served = served_rows(trained.node, stages - 1, [rows for rows in logits if not rows.requires_grad])
    for request in requests:
        replay_request(models[name], request, served[request.task_id], by_version)
        reported = [v.step for v in trained.node.outcomes[request.task_id].inference.report.weight_versions]
        assert reported == sorted({version for version, _, _ in served[request.task_id]})


def interleavings(node: VirtualNode) -> set[tuple[type, type]]:
    """Kinds of training ops of one micro-batch with an inference op between them on some stage."""
    found = set()
    for stage in {ran.stage for ran in node.ran}:
        ops = [ran.op for ran in node.ran if ran.stage == stage]
        for before, op, after in zip(ops, ops[1:], ops[2:], strict=False):
            is_between = isinstance(op, Prefill | Decode) and isinstance(before, TrainForward | TrainBackward)
            if is_between and getattr(after, "task_id", "") == before.task_id:
                found.add((type(before), type(after)))
    return found


@pytest.mark.parametrize("parts", [2, 3, 4, 6, 40])
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
async def test_a_cut_microbatch(models: dict[str, Path], name: str, stages: int, parts: int) -> None:
    """By examples, by layers, and into more pieces than there is work; with and without activation checkpointing."""
    expected = PlainLoop(load_reference(models[name]), OPTIMIZER).gradient(batch(1))
    for checkpointing in (False, True):
        pipeline = Pipeline.load(models[name], stages, activation_checkpointing=checkpointing)
        whole = await pipeline.forward("whole", batch(1))
        cut = await pipeline.forward("cut", batch(1), parts=parts)
        assert cut.loss == pytest.approx(whole.loss, rel=1e-12)
        assert cut.label_tokens == whole.label_tokens
        await pipeline.backward("cut", parts=parts)
        assert_close(pipeline.gradients(), expected)
        norm_sq = float(sum(gradient.square().sum() for gradient in expected.values()))
        assert pipeline.grad_norms_sq[0] == pytest.approx(norm_sq, rel=1e-9)
        assert [executor.training.num_in_flight for executor in pipeline.executors] == [1] * stages


@pytest.mark.parametrize("stages", [1, 2])
async def test_one_example_is_cut_by_layers(models: dict[str, Path], stages: int) -> None:
    examples = [Example(tuple(range(20)))]
    pipeline = Pipeline.load(models["llama"], stages)
    await pipeline.forward("m", examples, parts=2)
    await pipeline.backward("m", parts=2)
    assert_close(pipeline.gradients(), PlainLoop(load_reference(models["llama"]), OPTIMIZER).gradient(examples))


async def test_checkpointing_computes_again_with_the_weights_of_the_forward(models: dict[str, Path]) -> None:
    """A step comes between forward and backward (weight stashing)."""
    loop = PlainLoop(load_reference(models["llama"]), OPTIMIZER)
    expected = loop.gradient(batch(5))
    pipeline = Pipeline.load(models["llama"], 2, activation_checkpointing=True)
    await pipeline.forward("late", batch(5))
    await pipeline.forward("m", batch(0))
    await pipeline.backward("m", group=1)
    await pipeline.step(OPTIMIZER, group=1)
    await pipeline.backward("late", group=2)
    assert_close(pipeline.gradients(2), expected)


async def test_checkpointing_keeps_less(models: dict[str, Path]) -> None:
    """Bytes of everything a backward needs, the weights not counted."""

    async def kept(checkpointing: bool) -> int:
        pipeline = Pipeline.load(models["llama"], 1, activation_checkpointing=checkpointing)
        saved: dict[int, int] = {}
        weights = {parameter.data_ptr() for parameter in pipeline.executors[0].stage.weights.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in weights:
                saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            await pipeline.forward("m", [Example(tuple(range(100)))])
        return sum(saved.values())

    assert await kept(True) == 0
    assert await kept(False) > 0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
async def test_mixed_precision(models: dict[str, Path], name: str) -> None:
    """Near the exact gradient, but not at it; what it changes stays in float32, and serving does not change at all."""
    exact = Pipeline.load(models[name], 2, dtype="float32")
    mixed = Pipeline.load(models[name], 2, dtype="float32", training_dtype="bfloat16")
    for pipeline in (exact, mixed):
        await pipeline.forward("m", batch(1))
        await pipeline.backward("m")
    expected = exact.gradients()
    whole = torch.cat([expected[key].flatten() for key in sorted(expected)])
    found = torch.cat([mixed.gradients()[key].flatten() for key in sorted(expected)])
    assert 1e-4 < relative_error(found, whole) < 0.05
    assert {value.dtype for value in mixed.gradients().values()} == {torch.float32}
    request = PrefillSequence("r", tuple(range(9)), Sampling(ignore_eos=True), 4, (1, 2, 3))
    losses = [(await pipeline.prefill(request)).reference_losses for pipeline in (exact, mixed)]
    assert losses[0] == losses[1]
    await mixed.step(OPTIMIZER)
    assert {value.dtype for value in mixed.weights().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "training_dtype"), [("float64", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")]
)
def test_other_mixtures_are_refused(models: dict[str, Path], dtype: str, training_dtype: str) -> None:
    with pytest.raises(ValueError, match='mixed precision is "bfloat16" with "float32"'):
        Pipeline.load(models["llama"], 1, dtype=dtype, training_dtype=training_dtype)
