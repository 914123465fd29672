"""Wait or offload over real stages: with half of the memory everything completes, with the same results."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lemix.v1 import errors_pb2
from services.node_agent.core.types import MemoryConfig, MemoryCounters
from services.node_agent.engine.inference_ops import Prefill, PrefillSequence, Sampling
from services.node_agent.engine.ops import Offload, Reload, StageOp
from services.node_agent.engine.training_ops import Example, TrainForward
from services.node_agent.tasks import MicrobatchTask, RequestTask
from tests.parity.conftest import MODELS
from tests.parity.pipeline import Pipeline, assert_close
from tests.parity.test_training_parity import OPTIMIZER, batch
from tests.parity.virtual_node import VirtualNode

BLOCK = 8
#: Per token of "llama" on one stage: keys and values of four layers with two heads of eight float64.
KV_BYTES = 2 * 4 * 2 * 8 * 8


@dataclass(frozen=True)
class Run:
    """What came of a run. peaks: most bytes that the stages really held. continued: turns that went on from a kept KV
    cache, the ended requests that they went on from; preemptions: requests computed again."""

    tokens: dict[str, list[int]]
    errors: dict[str, errors_pb2.ErrorDetail]
    weights: dict[str, Tensor]
    peaks: list[int]
    counters: MemoryCounters
    budget: int
    continued: list[tuple[str, str]]
    preemptions: int


def tokens(count: int, seed: int) -> tuple[int, ...]:
    """Random tokens."""
    return tuple(torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def request(name: str, prompt: Sequence[int], count: int) -> RequestTask:
    """A greedy request."""
    return RequestTask(name, 0.0, tuple(prompt), Sampling(ignore_eos=True), count)


def duration_s(stage: int, op: StageOp) -> float:
    """So that training and serving overlap."""
    return 0.01 if isinstance(op, Prefill) else 0.004 + 0.001 * stage


async def run(
    path: Path,
    stages: int,
    peak_bytes: int,
    *,
    extra: Sequence[RequestTask] = (),
    turns: Sequence[tuple[float, RequestTask]] = (),
    cancel: Sequence[str] = (),
    train_tokens: int = 24,
    accumulation: int = 4,
    **core: object,
) -> Run:
    """Requests and micro-batches at once on a node with so much memory per stage. turns: requests that go on from the
    one of their name's first letters, and when; without them no request has a session."""
    pipeline = Pipeline.load(path, stages, kv_block_tokens=BLOCK, can_offload=True)
    memory = _memory(pipeline, peak_bytes)
    settings: dict[str, object] = {
        "kv_block_tokens": BLOCK,
        "max_batch": 4,
        "max_inflight_training": 3,
        "memory": memory,
    }
    node = VirtualNode([executor.run for executor in pipeline.executors], duration_s, **settings | core)
    for index in range(6):
        task = request(f"r{index}", tokens(7 + 9 * index, index), 9)
        node.at(0.015 * index, lambda task=task: node.request(task, task.task_id if turns else ""))
    for time_s, task in turns:
        node.at(time_s, lambda task=task: node.request(task, task.task_id[:2]))
    for task in extra:
        node.at(0.02, lambda task=task: node.request(task))
    for index in range(8):
        examples = (Example(tokens(train_tokens, 50 + index)),)
        task = MicrobatchTask(f"m{index}", "job", index, examples, OPTIMIZER, accumulation=accumulation)
        node.at(0.01, lambda task=task: node.microbatch(task))
    for name in cancel:
        node.at(0.07, lambda name=name: node.loop.cancel(name))
    await node.finish()
    return _look_at(node, pipeline, memory)


def _memory(pipeline: Pipeline, peak_bytes: int) -> MemoryConfig:
    info = pipeline.engine.info
    return MemoryConfig(
        peak_bytes=peak_bytes,
        kv_bytes_per_token=info.kv_bytes_per_token,
        activation_bytes_per_token=info.activation_bytes_per_token,
        kappa=1.0,
        max_wait_s=0.02,
        max_forward_wait_s=0.02,
    )


def _look_at(node: VirtualNode, pipeline: Pipeline, memory: MemoryConfig) -> Run:
    """What a finished run left, and that the account is that of the engine."""
    peaks = [
        max(ran.result.held_bytes for ran in node.ran if ran.stage == stage) for stage in range(len(pipeline.executors))
    ]
    snapshot = node.loop.snapshot()
    counters = snapshot.memory
    assert counters is not None
    assert tuple(executor.held_bytes for executor in pipeline.executors) == counters.used_bytes
    assert all(executor.training.num_in_flight == 0 for executor in pipeline.executors)
    if not snapshot.kv_kept_tokens:
        assert all(len(executor.inference.cache) == 0 for executor in pipeline.executors)
        assert set(counters.used_bytes) == set(counters.host_bytes) == {0}
    moves = [ran.op for ran in node.ran if isinstance(ran.op, Offload | Reload)]
    assert len(moves) == counters.offloads + counters.reloads
    return Run(
        tokens={name: list(found.inference.token_ids) for name, found in node.outcomes.items()},
        errors={
            name: error
            for name, found in node.outcomes.items()
            for error in (found.inference.error, found.training.error)
            if error.message
        },
        weights=pipeline.weights(),
        peaks=peaks,
        counters=counters,
        budget=memory.budget_bytes,
        continued=[
            (sequence.request_id, sequence.continues)
            for ran in node.ran
            if isinstance(ran.op, Prefill) and ran.stage == 0
            for sequence in ran.op.sequences
            if sequence.continues
        ],
        preemptions=snapshot.preemptions,
    )


@pytest.mark.parametrize("budget", [0, 24])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("name", MODELS)
async def test_half_of_the_memory_gives_the_same_results(
    models: dict[str, Path], name: str, stages: int, budget: int
) -> None:
    """gpipe keeps the activations of a whole group; whole prompts and pieces of them."""
    core = {"training_schedule": "gpipe", "max_batch_tokens": budget}
    free = await run(models[name], stages, 1 << 40, **core)
    assert free.counters.offloads == free.counters.waits == 0
    half = await run(models[name], stages, max(free.peaks) // 2, **core)
    assert half.errors == free.errors == {}
    assert half.tokens == free.tokens
    assert half.counters.offloads > 0
    # What is needed no more ends in host memory.
    assert half.counters.offloaded_bytes >= half.counters.reloaded_bytes > 0
    assert max(half.peaks) <= half.budget
    assert_close(half.weights, free.weights, 1e-12)


async def _turns(path: Path) -> list[tuple[float, RequestTask]]:
    """Second and third turns of the sessions that the first three requests of a run began."""
    turns = []
    for index in range(3):
        prompt = tokens(7 + 9 * index, index)
        for turn in range(2):
            output = await Pipeline.load(path, 1).generate(PrefillSequence("r", prompt, Sampling(ignore_eos=True), 9))
            prompt = (*prompt, *output, *tokens(6, 30 + index))
            turns.append((1.5 * (1 + turn) + 0.01 * index, request(f"r{index}.{turn}", prompt, 9)))
    return turns


@pytest.mark.parametrize("budget", [0, 24])
@pytest.mark.parametrize("stages", [1, 2])
async def test_kept_prefixes_and_requests_computed_again_take_no_memory_from_others(
    models: dict[str, Path], stages: int, budget: int
) -> None:
    """The activations of a whole group stay until no request is left: its steps change no answer."""
    path = models["llama"]
    core = {"training_schedule": "gpipe", "max_batch_tokens": budget, "group_timeout_s": 9.0, "accumulation": 9}
    free = await run(path, stages, 1 << 40, extra=[task for _, task in await _turns(path)], **core)
    limits = {"prefix_cache_tokens": 400, "kv_capacity_tokens": 152, "expected_output_tokens": 1}
    half = await run(path, stages, max(free.peaks) // 2, turns=await _turns(path), **limits, **core)
    assert half.errors == free.errors == {}
    assert half.tokens == free.tokens
    assert_close(half.weights, free.weights, 1e-12)
    assert max(half.peaks) <= half.budget
    assert half.counters.offloads > 0
    assert half.preemptions > 0
    assert half.continued == [("r0.1", "r0.0"), ("r1.1", "r1.0"), ("r2.1", "r2.0")]


async def test_an_op_that_can_never_fit_fails_alone_and_with_the_numbers(models: dict[str, Path]) -> None:
    free = await run(models["llama"], 1, 1 << 40, train_tokens=8, training_schedule="gpipe")
    huge = request("huge", tokens(200, 9), 50)
    small = -(-250 // BLOCK) * BLOCK * KV_BYTES - 1
    assert small < max(free.peaks)
    found = await run(models["llama"], 1, small, extra=[huge], train_tokens=8, training_schedule="gpipe")
    assert set(found.errors) == {"huge"}
    assert found.errors["huge"].code == errors_pb2.ERROR_CODE_RESOURCE_EXHAUSTED
    assert found.errors["huge"].message == f"needs {small + 1} bytes on every stage, which may hold {small}"
    assert found.tokens | {"huge": []} == free.tokens | {"huge": []}


@pytest.mark.parametrize("stages", [1, 2])
async def test_cancelled_tasks_free_what_they_hold_wherever_it_is(models: dict[str, Path], stages: int) -> None:
    """`run` checks that nothing is left: blocks, activations, host memory."""
    core = {"training_schedule": "gpipe"}
    free = await run(models["llama"], stages, 1 << 40, **core)
    names = ["r0", "r3", "r5", "m0", "m2"]
    found = await run(models["llama"], stages, max(free.peaks) // 2, cancel=names, **core)
    assert set(found.errors) <= set(names)
    assert {error.code for error in found.errors.values()} == {errors_pb2.ERROR_CODE_CANCELLED}
    for name in ("r1", "r2", "r4"):
        assert len(found.tokens[name]) == 9


async def test_what_is_in_host_memory_cannot_be_used(models: dict[str, Path]) -> None:
    pipeline = Pipeline.load(models["llama"], 1, can_offload=True)
    (executor,) = pipeline.executors
    await pipeline.prefill(PrefillSequence("r", tokens(5, 1), Sampling(), 4, end_token=3))
    await pipeline.run(0, Offload(0, ("r", "unknown")))
    assert executor.held_bytes == 0
    result = executor.run(Prefill(0, 0, (PrefillSequence("r", tokens(5, 1), Sampling(), 4, (), 3),)))
    assert result.error == "ValueError: the KV cache of request r is in host memory"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("parts", "examples"),
    [(1, tuple(batch(1))), (3, tuple(batch(1))), (8, tuple(Example(tokens(40, 10 + index)) for index in range(8)))],
    ids=["whole", "pieces", "equal pieces"],
)
async def test_moved_activations_give_the_same_gradients(
    models: dict[str, Path], parts: int, examples: tuple[Example, ...], checkpointing: bool
) -> None:
    """Also between the pieces of a forward, where equal ones take the memory that those before have left."""

    async def gradients(moves: bool) -> dict[str, Tensor]:
        pipeline = Pipeline.load(models["llama"], 1, can_offload=True, activation_checkpointing=checkpointing)
        (executor,) = pipeline.executors
        for part in range(parts):
            op = TrainForward(0, 0, "m", examples, 1.0, None, part=part, parts=parts)
            result = await pipeline.run(0, op)
            tokens_in = sum(len(example.token_ids) for example in examples)
            assert 0 < result.held_bytes <= tokens_in * pipeline.engine.info.activation_bytes_per_token
            if moves:
                assert (await pipeline.run(0, Offload(0, ("m",)))).held_bytes == 0
                assert (await pipeline.run(0, Reload(0, ("m",)))).held_bytes == result.held_bytes
        await pipeline.backward("m", parts=parts)
        assert executor.held_bytes == 0
        return pipeline.gradients()

    assert_close(await gradients(True), await gradients(False), 0.0)
