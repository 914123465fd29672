"""The whole node over real stages: however prompts are cut, mixed and continued, requests get their own tokens."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from services.node_agent.engine.inference_ops import Decode, Prefill, PrefillSequence, Sampling
from services.node_agent.engine.ops import StageOp
from services.node_agent.tasks import MicrobatchTask, RequestTask
from tests.parity.pipeline import Pipeline
from tests.parity.test_training_parity import OPTIMIZER, batch
from tests.parity.virtual_node import VirtualNode

#: Prompt lengths: a session's first turn, and unrelated prompts.
PROMPTS = (21, 3, 40, 17, 60)


def tokens(count: int, seed: int) -> tuple[int, ...]:
    """Random tokens."""
    return tuple(torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def request(index: int, prompt: Sequence[int], count: int = 6) -> RequestTask:
    """A request that samples with its own seed."""
    sampling = Sampling(temperature=0.8, seed=index, ignore_eos=True)
    return RequestTask(f"r{index}", 0.0, tuple(prompt), sampling, count)


async def alone(path: Path, task: RequestTask) -> list[int]:
    """What a request gets when nothing else runs."""
    sequence = PrefillSequence(task.task_id, task.prompt_ids, task.sampling, task.max_tokens)
    return await Pipeline.load(path, 1).generate(sequence)


def duration_s(stage: int, op: StageOp) -> float:
    """Odd, so that ops of different stages overlap."""
    return 0.013 if isinstance(op, Prefill) else 0.005 + 0.001 * stage


def virtual_node(path: Path, stages: int, **config: object) -> VirtualNode:
    """A node over real stages."""
    pipeline = Pipeline.load(path, stages, kv_block_tokens=16)
    return VirtualNode([executor.run for executor in pipeline.executors], duration_s, kv_block_tokens=16, **config)


@pytest.mark.parametrize("budget", [0, 7, 24])
@pytest.mark.parametrize("stages", [1, 2])
async def test_pieces_mixed_ops_and_sessions_give_every_request_its_own_tokens(
    models: dict[str, Path], stages: int, budget: int
) -> None:
    path = models["llama"]
    node = virtual_node(path, stages, max_batch=4, max_batch_tokens=budget, prefix_cache_tokens=200)
    tasks = [request(index, tokens(length, index)) for index, length in enumerate(PROMPTS)]
    for index, task in enumerate(tasks):
        node.at(0.004 * index, lambda task=task, index=index: node.request(task, "s" if index == 0 else ""))
    first = await alone(path, tasks[0])
    second = request(9, (*tasks[0].prompt_ids, *first, *tokens(30, 9)))
    node.at(2.0, lambda: node.request(second, "s"))
    await node.finish()
    for task in (*tasks, second):
        outcome = node.outcomes[task.task_id].inference
        assert list(outcome.token_ids) == await alone(path, task)
        assert [version.step for version in outcome.report.weight_versions] == [0]
    prefills = [ran.op for ran in node.ran if isinstance(ran.op, Prefill) and ran.stage == 0]
    assert sum(any(sequence.continues for sequence in op.sequences) for op in prefills) == 1
    assert any(op.decodes for op in prefills) == bool(budget)
    assert any(sequence.end_token for op in prefills for sequence in op.sequences) == bool(budget)


async def test_the_versions_of_all_keys_and_values_are_listed(models: dict[str, Path]) -> None:
    """A step between two pieces, and one between two turns of a session."""
    node = virtual_node(
        models["llama"], 1, max_batch=4, max_batch_tokens=16, prefix_cache_tokens=200, max_training_wait_s=0.0
    )

    def step(sequence: int) -> None:
        node.microbatch(MicrobatchTask(f"m{sequence}", "job", sequence, batch(sequence), OPTIMIZER))

    node.at(0.0, lambda: node.request(request(0, tokens(40, 0), 2), "s"))
    node.at(0.0, lambda: step(0))
    node.at(9.0, lambda: step(1))
    node.at(19.0, lambda: node.request(request(1, tokens(40, 0) + tokens(20, 1), 2), "s"))
    await node.finish()
    first, second = (node.outcomes[f"r{index}"].inference.report.weight_versions for index in (0, 1))
    assert [version.step for version in first] == [0, 1]
    assert [version.step for version in second] == [0, 1, 2]
    stamps = [ran.op.version for ran in node.ran if isinstance(ran.op, Prefill | Decode)]
    assert sorted(set(stamps)) == [0, 1, 2]


@pytest.mark.parametrize("budget", [0, 24])
@pytest.mark.parametrize("stages", [1, 2])
async def test_a_request_that_is_computed_again_goes_on_where_it_was(
    models: dict[str, Path], stages: int, budget: int
) -> None:
    """Samplings depend on the place of a token and, with penalties, on the output before it."""
    path = models["llama"]
    pipeline = Pipeline.load(path, stages, kv_block_tokens=4, kv_capacity_tokens=96)
    node = VirtualNode(
        [executor.run for executor in pipeline.executors],
        duration_s,
        kv_block_tokens=4,
        kv_capacity_tokens=96,
        expected_output_tokens=2,
        max_batch=4,
        max_batch_tokens=budget,
    )
    sampling = Sampling(temperature=0.8, seed=3, min_tokens=20, presence_penalty=0.7, frequency_penalty=0.2)
    tasks = [RequestTask(f"r{i}", 0.0, tokens(9 + i, i), replace(sampling, seed=i), 24) for i in range(5)]
    for task in tasks:
        node.at(0.0, lambda task=task: node.request(task))
    await node.finish()
    assert node.loop.snapshot().preemptions > 0
    for task in tasks:
        assert list(node.outcomes[task.task_id].inference.token_ids) == await alone(path, task)
    assert all(executor.inference.cache.used_blocks == 0 for executor in pipeline.executors)


@pytest.mark.parametrize("budget", [0, 24])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
async def test_choices_that_share_a_prompt_get_their_own_tokens(
    models: dict[str, Path], name: str, stages: int, budget: int
) -> None:
    """With log-probabilities, penalties, a reference of the first one, and another request in the same ops."""
    path = models[name]
    node = virtual_node(path, stages, max_batch=8, max_batch_tokens=budget)
    prompt = tokens(37, 5)
    other = request(9, tokens(11, 9))
    choices = [request(index, prompt) for index in range(4)]
    for task in choices:
        task.sampling = replace(task.sampling, presence_penalty=0.5, logprobs=2)
    choices[0].reference_ids = tokens(5, 6)
    node.at(0.0, lambda: node.request(other))
    for index, task in enumerate(choices):
        node.at(0.001, lambda task=task, index=index: node.request(task, choice_of="r0" if index else ""))
    await node.finish()
    for task in (other, *choices):
        assert list(node.outcomes[task.task_id].inference.token_ids) == await alone(path, task)
    assert len({tuple(node.outcomes[task.task_id].inference.token_ids) for task in choices}) > 1
    likeliest = [list(node.outcomes[task.task_id].inference.logprobs[0].top_logprobs) for task in choices]
    assert likeliest == [likeliest[0]] * 4
    assert len(likeliest[0]) == 2
    prefills = [ran.op for ran in node.ran if isinstance(ran.op, Prefill) and ran.stage == 0]
    shared = [(s.request_id, s.shares) for op in prefills for s in op.sequences if s.shares]
    assert shared == [("r1", "r0"), ("r2", "r0"), ("r3", "r0")]
    assert [version.step for version in node.outcomes["r1"].inference.report.weight_versions] == [0]
