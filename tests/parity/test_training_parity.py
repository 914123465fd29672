"""Training through pipeline stages equals a plain torch loop on the unsplit transformers model, in float64."""

import random
from collections import deque
from pathlib import Path

import pytest
import torch

from services.node_agent.engine.training_ops import Example, OptimizerSpec
from tests.parity.conftest import MODELS
from tests.parity.pipeline import Pipeline, assert_close
from tests.parity.reference import PlainLoop, load_reference, named_weights

STAGES = (1, 2, 3, 4)
#: eps is large enough that Adam does not blow up the rounding noise of gradients that are nearly zero.
OPTIMIZER = OptimizerSpec(
    learning_rate=3e-3,
    lr_schedule="cosine",
    warmup_steps=3,
    total_steps=10,
    weight_decay=0.01,
    max_grad_norm=0.5,
    betas=(0.9, 0.95),
    eps=1e-6,
)


def batch(seed: int) -> list[Example]:
    """Ragged examples, some with context tokens that are no labels."""
    source = random.Random(seed)
    lengths = [source.randrange(2, 24) for _ in range(3)]
    texts = [tuple(source.randrange(256) for _ in range(length)) for length in (*lengths, lengths[-1])]
    return [Example(text, source.randrange(len(text))) for text in texts]


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", MODELS)
async def test_loss_and_gradients(models: dict[str, Path], name: str, stages: int) -> None:
    loop = PlainLoop(load_reference(models[name]), OPTIMIZER)
    pipeline = Pipeline.load(models[name], stages)
    examples = batch(1)
    result = await pipeline.forward("m", examples)
    await pipeline.backward("m")
    expected = loop.gradient(examples)
    assert result.label_tokens == sum(len(e.token_ids) - max(1, e.num_context_tokens) for e in examples)
    assert_close(pipeline.gradients(), expected)
    norm_sq = float(sum(gradient.square().sum() for gradient in expected.values()))
    assert pipeline.grad_norms_sq[0] == pytest.approx(norm_sq, rel=1e-9)


async def test_loss_is_the_mean_over_label_tokens(models: dict[str, Path]) -> None:
    """An example without labels adds nothing, and padding would change nothing: lengths do not matter."""
    pipeline = Pipeline.load(models["llama"], 2)
    labelled = Example((5, 6, 7, 8), 2)
    alone = await pipeline.forward("a", [labelled])
    beside = await pipeline.forward("b", [Example((1, 2, 3), 3), labelled, Example((9,))])
    twice = await pipeline.forward("c", [labelled, labelled])
    assert (alone.label_tokens, beside.label_tokens, twice.label_tokens) == (2, 2, 4)
    assert beside.loss == pytest.approx(alone.loss, rel=1e-12)
    assert twice.loss == pytest.approx(alone.loss, rel=1e-12)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", MODELS)
async def test_ten_steps(models: dict[str, Path], name: str, stages: int) -> None:
    """Schedule with warm-up, clipping by the whole model's norm, weight decay."""
    loop = PlainLoop(load_reference(models[name]), OPTIMIZER)
    pipeline = Pipeline.load(models[name], stages)
    clipped = 0
    for step in range(10):
        loop.apply([loop.gradient(batch(step))])
        await pipeline.forward("m", batch(step))
        await pipeline.backward("m")
        clipped += pipeline.grad_norms_sq[0] > OPTIMIZER.max_grad_norm**2
        await pipeline.step(OPTIMIZER)
    assert clipped > 0
    assert_close(pipeline.weights(), named_weights(loop.model))
    assert_tied_copy_is_equal(pipeline)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
async def test_accumulation_with_drain(models: dict[str, Path], name: str) -> None:
    """Three micro-batches per step, two of them in flight at once, all drained before the step."""
    loop = PlainLoop(load_reference(models[name]), OPTIMIZER)
    pipeline = Pipeline.load(models[name], 3)
    for step in range(4):
        batches = [batch(10 * step + place) for place in range(3)]
        loop.apply([loop.gradient(examples, 1 / 3) for examples in batches])
        await pipeline.forward("m0", batches[0], 1 / 3)
        await pipeline.forward("m1", batches[1], 1 / 3)
        await pipeline.backward("m0")
        await pipeline.forward("m2", batches[2], 1 / 3)
        await pipeline.backward("m1")
        await pipeline.backward("m2")
        await pipeline.step(OPTIMIZER)
    assert_close(pipeline.weights(), named_weights(loop.model))


@pytest.mark.parametrize("delay", [1, 2])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
async def test_stashed_weights_equal_delayed_gradients(models: dict[str, Path], name: str, delay: int) -> None:
    """Micro-batch k runs forward at weights v_k; its gradient is applied `delay` steps late."""
    loop = PlainLoop(load_reference(models[name]), OPTIMIZER)
    pipeline = Pipeline.load(models[name], 2)
    late: deque[dict[str, torch.Tensor]] = deque()
    for step in range(8):
        late.append(loop.gradient(batch(step)))
        await pipeline.forward(f"m{step}", batch(step))
        if step >= delay:
            loop.apply([late.popleft()])
            await pipeline.backward(f"m{step - delay}")
            await pipeline.step(OPTIMIZER)
    assert pipeline.version == 8 - delay
    assert_close(pipeline.weights(), named_weights(loop.model))
    assert_tied_copy_is_equal(pipeline)


async def test_step_in_place_when_nothing_is_in_flight(models: dict[str, Path]) -> None:
    """No copy of the weights is made unless a graph still needs the old ones."""
    pipeline = Pipeline.load(models["llama"], 1)
    weights = pipeline.executors[0].stage.weights
    before = weights.parameters()
    await pipeline.forward("a", batch(1))
    await pipeline.backward("a")
    await pipeline.step(OPTIMIZER)
    assert all(new is old for new, old in zip(weights.parameters(), before, strict=True))
    await pipeline.forward("b", batch(2))
    await pipeline.backward("b")
    await pipeline.forward("c", batch(3))
    await pipeline.step(OPTIMIZER)
    assert all(new is not old for new, old in zip(weights.parameters(), before, strict=True))


async def test_forgotten_microbatch_leaves_no_gradient(models: dict[str, Path]) -> None:
    loop = PlainLoop(load_reference(models["llama"]), OPTIMIZER)
    pipeline = Pipeline.load(models["llama"], 2)
    await pipeline.forward("dropped", batch(1))
    await pipeline.forward("kept", batch(2))
    await pipeline.forget("dropped")
    await pipeline.backward("kept")
    assert_close(pipeline.gradients(), loop.gradient(batch(2)))
    assert [executor.training.num_in_flight for executor in pipeline.executors] == [0, 0]


def assert_tied_copy_is_equal(pipeline: Pipeline) -> None:
    """The last stage's copy of a tied embedding equals stage 0's."""
    borrowed = pipeline.executors[-1].stage.weights.borrowed
    if borrowed is not None:
        assert torch.equal(borrowed.parameter, pipeline.executors[0].stage.weights.weights[0].parameter)
