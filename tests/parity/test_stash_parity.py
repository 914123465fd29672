"""Weight stashing: several versions and several groups of gradients on a stage at once, in float64."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.node_agent.engine.base import StageResult
from services.node_agent.engine.inference_ops import Decode, DecodeSequence, Prefill, PrefillSequence, Sampling
from services.node_agent.engine.ops import StageOp
from services.node_agent.engine.training_ops import OptimizerStep, TrainBackward, TrainForward
from services.node_agent.engine.weight_ops import Snapshot
from services.node_agent.tasks import MicrobatchTask, RequestTask
from services.node_agent.weight_ops import WeightOp
from tests.parity.pipeline import Pipeline, assert_close, relative_error
from tests.parity.reference import PlainLoop, load_reference, named_weights
from tests.parity.test_training_parity import OPTIMIZER, assert_tied_copy_is_equal, batch
from tests.parity.test_weights_parity import merged_snapshot
from tests.parity.virtual_node import VirtualNode

CUT_MODELS = ("llama", "llama-tied", "gpt2")
SAMPLING = Sampling(ignore_eos=True)


async def train(pipeline: Pipeline, seed: int, *, oldest_version: int | None) -> None:
    """One optimizer step that keeps the weights from `oldest_version` on."""
    await pipeline.forward("m", batch(seed))
    await pipeline.backward("m")
    await pipeline.step(OPTIMIZER, oldest_version=oldest_version)


# --------------------------------------------------------------------------- ops of an older version


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", CUT_MODELS)
async def test_overtaken_serving_ops_give_exactly_what_they_would_have_given(
    models: dict[str, Path], name: str, steps: int
) -> None:
    """A prefill and a decode that reach stage 1 after steps equal those that reached it before."""

    async def serve(overtake: bool) -> list[Tensor]:
        pipeline = Pipeline.load(models[name], 2)
        logits = pipeline.record_logits()
        await train(pipeline, 0, oldest_version=None)
        await pipeline.prefill(PrefillSequence("r", tuple(range(20)), SAMPLING, 4))
        prompt = (PrefillSequence("late", tuple(range(30, 45)), SAMPLING, 4),)
        newest = (DecodeSequence("r", 7, 20),)
        hidden = (await pipeline.run(0, Prefill(0, 1, prompt))).output
        decoded = (await pipeline.run(0, Decode(0, 1, newest))).output
        for seed in range(steps if overtake else 0):
            await train(pipeline, seed + 1, oldest_version=1)
        result = await pipeline.run(1, Prefill(0, 1, prompt, hidden))
        assert result.version == pipeline.version
        await pipeline.run(1, Decode(0, 1, newest, decoded))
        served = logits[-2:]
        if overtake:
            await pipeline.decode(DecodeSequence("r", 7, 20))
            assert not torch.equal(logits[-1], served[1]), "the newest weights are others"
        return served

    for found, expected in zip(await serve(True), await serve(False), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CUT_MODELS)
async def test_an_overtaken_forward_is_differentiated_at_its_own_weights(models: dict[str, Path], name: str) -> None:
    loop = PlainLoop(load_reference(models[name]), OPTIMIZER)
    expected = loop.gradient(batch(5))
    pipeline = Pipeline.load(models[name], 2)
    examples = tuple(batch(5))
    hidden = (await pipeline.run(0, TrainForward(0, 0, "late", examples))).output
    for seed in range(2):
        await train(pipeline, seed, oldest_version=0)
    await pipeline.run(1, TrainForward(0, 0, "late", examples, hidden=hidden))
    await train(pipeline, 2, oldest_version=None)
    await pipeline.backward("late", group=9)
    assert_close(pipeline.gradients(9), expected)


@pytest.mark.parametrize("name", CUT_MODELS)
async def test_a_snapshot_of_an_older_version_holds_that_version(
    models: dict[str, Path], name: str, tmp_path: Path
) -> None:
    """And averaging later starts from it, on the tied copy as well."""
    pipeline = Pipeline.load(models[name], 2)
    await train(pipeline, 0, oldest_version=None)
    taken = pipeline.weights()
    await train(pipeline, 1, oldest_version=1)
    files = [(await pipeline.run(stage, Snapshot(0, 1, "s"))).weights_path for stage in range(2)]
    snapshot = {key: value for file in files for key, value in load_file(file).items()}
    assert_close(snapshot, taken, 0.0)
    mean = {key: value + 0.5 for key, value in snapshot.items()}
    save_file(mean, tmp_path / "mean.safetensors")
    before = pipeline.weights()
    await pipeline.load_weights("s", tmp_path / "mean.safetensors", "average")
    assert_close(pipeline.weights(), {key: value + 0.5 for key, value in before.items()}, 1e-14)
    assert_tied_copy_is_equal(pipeline)


async def test_old_versions_go_when_nothing_needs_them(models: dict[str, Path], tmp_path: Path) -> None:
    pipeline = Pipeline.load(models["llama-tied"], 2)
    file = await merged_snapshot(pipeline, "s", tmp_path / "s.safetensors")

    def held() -> tuple[int, ...]:
        versions = {executor.stage.weights.versions for executor in pipeline.executors}
        assert len(versions) == 1
        return versions.pop()

    for oldest, expected in ((0, (0, 1)), (0, (0, 1, 2)), (1, (1, 2, 3)), (3, (3, 4)), (5, (5,))):
        await train(pipeline, 1, oldest_version=oldest)
        assert held() == expected
    await pipeline.load_weights("s", file, "replace", oldest_version=5)
    assert held() == (5, 6)
    result = await pipeline.engine.workers[0].run(Snapshot(0, 4, "x"))
    assert result.error == "VersionMismatch: the op is for weights version 4, stage 0 holds 5, 6"
    result = await pipeline.engine.workers[0].run(OptimizerStep(0, 5, "job", OPTIMIZER))
    assert result.error == "VersionMismatch: the op is for weights version 5, stage 0 holds 6"
    await train(pipeline, 1, oldest_version=None)
    assert held() == (7,)


# --------------------------------------------------------------------------- groups of gradients


@pytest.mark.parametrize("name", CUT_MODELS)
async def test_groups_do_not_mix_whatever_the_order_of_their_steps(models: dict[str, Path], name: str) -> None:
    """Backwards of two groups alternate; the group opened second steps first."""
    loop = PlainLoop(load_reference(models[name]), OPTIMIZER)
    pipeline = Pipeline.load(models[name], 3)
    gradients = [loop.gradient(batch(seed), 0.5) for seed in range(4)]
    for place in range(4):
        await pipeline.forward(f"m{place}", batch(place), 0.5)
    for place in (0, 2, 1, 3):
        await pipeline.backward(f"m{place}", group=place // 2)
    for group in (1, 0):
        members = gradients[2 * group : 2 * group + 2]
        assert_close(pipeline.gradients(group), {key: members[0][key] + members[1][key] for key in members[0]})
        loop.apply(members)
        await pipeline.step(OPTIMIZER, group=group)
        assert_close(pipeline.weights(), named_weights(loop.model))
        assert_tied_copy_is_equal(pipeline)
    assert [dict(executor.training.gradients) for executor in pipeline.executors] == [{}, {}, {}]


# --------------------------------------------------------------------------- a whole node


class Watched:
    """The stages of a node, and what they held while it ran."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.most_groups = 0
        self.most_versions = 0
        #: Kinds of ops that ran with other weights than the stage's newest.
        self.overtaken: set[type] = set()

    def run(self, stage: int) -> Callable[[StageOp], StageResult]:
        """What a node calls to run an op on a stage."""

        def run(op: StageOp) -> StageResult:
            executor = self.pipeline.executors[stage]
            if isinstance(op, Prefill | Decode | TrainForward | Snapshot) and op.version < executor.version:
                self.overtaken.add(type(op))
            result = executor.run(op)
            self.most_groups = max(self.most_groups, len(executor.training.gradients))
            self.most_versions = max(self.most_versions, len(executor.stage.weights.versions))
            assert result.error == "", result.error
            return result

        return run


def add_work(node: VirtualNode, parts: Callable[[int], int] = lambda index: 1) -> list[RequestTask]:
    """Two jobs of micro-batches in `parts` pieces, requests that arrive meanwhile, and two snapshots."""
    for index in range(12):
        job, sequence = f"job{index % 2}", index // 2
        task = MicrobatchTask(
            f"{job}/{sequence}",
            job,
            sequence,
            tuple(batch(index)),
            OPTIMIZER,
            accumulation=1 + index % 2,
            last=sequence == 5,
        )
        node.at(0.3 * index, partial(node.microbatch, task, parts(index)))
    source = random.Random(1)
    requests = []
    for index in range(6):
        prompt = tuple(source.randrange(256) for _ in range(source.randrange(3, 20)))
        sampling = Sampling(temperature=0.9, seed=index, ignore_eos=True)
        requests.append(RequestTask(f"r{index}", 0.0, prompt, sampling, 7))
        node.at(0.7 * index, lambda task=requests[-1]: node.request(task))
    for index in range(2):
        snapshot = WeightOp(False, lambda op, index=index: Snapshot(op.op_id, op.version, f"s{index}"))
        node.at(2.0 + 1.5 * index, lambda index=index, snapshot=snapshot: node.weight_op(f"s{index}", snapshot))
    return requests


def durations(seed: int) -> Callable[[int, StageOp], float]:
    """Uneven ones, each way the slower the later, so that versions meet on the later stages and groups on all."""
    source = random.Random(seed)
    slowness = {Prefill: 0.4, Decode: 0.2, TrainForward: 0.4, TrainBackward: 0.6, OptimizerStep: 0.05, Snapshot: 0.05}

    def duration_s(stage: int, op: StageOp) -> float:
        is_late = (stage == 0) == isinstance(op, TrainBackward)
        return source.choice((0.1, 0.3, 1.0)) * slowness[type(op)] * (2.0 if is_late else 1.0)

    return duration_s


@pytest.mark.parametrize("buffers", [1, 2])
@pytest.mark.parametrize(("name", "stages"), [("llama", 1), ("llama", 2), ("llama-tied", 2), ("gpt2", 3)])
async def test_a_node_trains_like_a_plain_loop_and_serves_every_token_at_its_version(
    models: dict[str, Path], name: str, stages: int, buffers: int
) -> None:
    watched = Watched(Pipeline.load(models[name], stages))
    pipeline = watched.pipeline
    logits = pipeline.record_logits()
    node = VirtualNode(
        [watched.run(stage) for stage in range(stages)],
        durations(stages),
        weight_handling="stash",
        gradient_buffers=buffers,
        max_inflight_training=6,
        max_batch=2,
        max_training_wait_s=0.2,
    )
    requests = add_work(node)
    await node.finish()

    assert len(node.outcomes) == 18
    assert watched.most_groups == (buffers if stages > 1 else 1)
    assert watched.overtaken >= ({Prefill, Decode, TrainForward} if stages > 1 else set())
    assert (watched.most_versions > 1) == (stages > 1)
    by_version, delay = replay_training(node, PlainLoop(load_reference(models[name]), OPTIMIZER))
    assert (delay > 0) == (stages > 1)
    assert_close(pipeline.weights(), by_version[-1])
    assert_tied_copy_is_equal(pipeline)
    for weight_op in node.weight_ops:
        written = {key: value for result in weight_op.results for key, value in load_file(result.weights_path).items()}
        assert_close(written, by_version[weight_op.version])
    served = served_rows(node, stages - 1, [rows for rows in logits if not rows.requires_grad])
    for request in requests:
        replay_request(models[name], request, served[request.task_id], by_version)
        reported = [v.step for v in node.outcomes[request.task_id].inference.report.weight_versions]
        assert reported == sorted({version for version, _, _ in served[request.task_id]})


def replay_training(node: VirtualNode, loop: PlainLoop) -> tuple[list[dict[str, Tensor]], int]:
    """Every micro-batch's gradient at the weights its forward was stamped with, applied in the order of the steps.

    Returns the weights of every version, and how many steps a gradient was late at most.
    """
    ops = [ran.op for ran in node.ran if ran.stage == 0]
    forwards = [op for op in ops if isinstance(op, TrainForward) and op.part == 0]
    backwards = [op for op in ops if isinstance(op, TrainBackward) and op.part == 0]
    steps = sorted((op for op in ops if isinstance(op, OptimizerStep)), key=lambda op: op.version)
    assert [step.version for step in steps] == list(range(len(steps)))
    gradients: dict[str, dict[str, Tensor]] = {}
    weights = [named_weights(loop.model)]
    delays = []
    jobs = {job_id: PlainLoop(loop.model, OPTIMIZER) for job_id in {step.job_id for step in steps}}
    for step in steps:
        for op in forwards:
            if op.version == step.version:
                gradients[op.task_id] = loop.gradient(op.examples, op.loss_scale)
        members = [op.task_id for op in backwards if op.group == step.group]
        delays += [step.version - op.version for op in forwards if op.task_id in members]
        jobs[step.job_id].apply([gradients[member] for member in members])
        weights.append(named_weights(loop.model))
    assert len(delays) == 12
    return weights, max(delays)


Served = dict[str, list[tuple[int, PrefillSequence | DecodeSequence, Tensor]]]


def served_rows(node: VirtualNode, last: int, logits: list[Tensor]) -> Served:
    """Version, input and logits of every token, by request."""
    ops = [ran.op for ran in node.ran if ran.stage == last and isinstance(ran.op, Prefill | Decode)]
    served: Served = {}
    for op, rows in zip(ops, logits, strict=True):
        for sequence, row in zip(op.sequences, rows, strict=True):
            served.setdefault(sequence.request_id, []).append((op.version, sequence, row))
    return served


def replay_request(
    path: Path,
    request: RequestTask,
    served: list[tuple[int, PrefillSequence | DecodeSequence, Tensor]],
    by_version: list[dict[str, Tensor]],
) -> None:
    """Serve the request alone, its weights set by hand to the version of each token."""
    (executor,) = Pipeline.load(path, 1).executors
    recorded: list[Tensor] = []
    project = executor.stage.logits
    executor.stage.logits = lambda rows: recorded.append(project(rows)) or recorded[-1]  # type: ignore[method-assign, func-returns-value]
    tokens = []
    for version, sequence, row in served:
        weights = by_version[version]
        with torch.no_grad():
            executor.stage.weights.apply(lambda name, current, weights=weights: weights[name])
        op: StageOp = Prefill(0, 0, (sequence,)) if isinstance(sequence, PrefillSequence) else Decode(0, 0, (sequence,))
        result = executor.run(op)
        assert result.error == ""
        tokens.append(result.tokens[0].token_id)
        assert relative_error(row, recorded[-1][0]) <= 1e-8
    assert tokens == request.generated_ids
