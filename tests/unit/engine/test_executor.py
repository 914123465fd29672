"""Ops on one stage: versions, bad input, measurements, and that a failed op leaves the stage usable."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from services.latency import MOVES, OpKind
from services.node_agent.engine.base import EngineConfig, StageResult
from services.node_agent.engine.handle import Handle
from services.node_agent.engine.inference_ops import Decode, DecodeSequence, Prefill, PrefillSequence, Sampling
from services.node_agent.engine.ops import Forget, Measure, StageOp
from services.node_agent.engine.torch.engine import load_inprocess_engine
from services.node_agent.engine.torch.executor import StageExecutor
from services.node_agent.engine.torch.training import MAX_JOBS
from services.node_agent.engine.training_ops import Example, OptimizerSpec, OptimizerStep, TrainBackward, TrainForward
from services.node_agent.engine.weight_ops import LoadWeights, Snapshot
from tests.parity.tiny import write_tiny_gpt2, write_tiny_llama

EXAMPLE = Example((1, 2, 3, 4))
PROMPT = PrefillSequence("r", (1, 2, 3), Sampling(ignore_eos=True), 4)
SPEC = OptimizerSpec(learning_rate=1e-2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama."""
    return write_tiny_llama(tmp_path_factory.mktemp("model"), layers=2)


def stages(path: Path, count: int = 1, **config: object) -> list[StageExecutor]:
    """Stages in this process."""
    settings = EngineConfig(model_path=str(path), num_stages=count, **config)  # type: ignore[arg-type]
    return [worker.executor for worker in load_inprocess_engine(settings).workers]  # type: ignore[attr-defined]


def ok(executor: StageExecutor, op: StageOp) -> StageResult:
    """Run an op that must succeed."""
    result = executor.run(op)
    assert result.error == ""
    return result


@pytest.mark.parametrize(
    "op",
    [
        Prefill(1, 5, (PROMPT,)),
        Decode(1, 5, (DecodeSequence("r", 1, 3),)),
        TrainForward(1, 5, "m", (EXAMPLE,)),
        OptimizerStep(1, 5, "job", SPEC),
        Snapshot(1, 5, "s"),
        LoadWeights(1, 5, "s", "nowhere", "replace"),
    ],
    ids=lambda op: type(op).__name__,
)
def test_op_of_another_version_is_refused(model: Path, op: StageOp) -> None:
    (stage,) = stages(model)
    ok(stage, Prefill(0, 0, (PROMPT,)))
    result = stage.run(op)
    assert result.error.startswith("VersionMismatch: the op is for weights version 5, stage 0 holds 0")
    assert (result.op_id, result.version) == (1, 0)
    ok(stage, Decode(2, 0, (DecodeSequence("r", 1, 3),)))


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (Prefill(0, 0, (PrefillSequence("x", (), Sampling(), 4),)), "needs a prompt"),
        (Prefill(0, 0, (PrefillSequence("x", (1,), Sampling(), 0),)), "max_tokens of at least 1"),
        (
            Prefill(0, 0, (PrefillSequence("x", (1,) * 250, Sampling(), 7),)),
            "needs 250 \\+ 7 tokens; the context holds 256",
        ),
        (Prefill(0, 0, (PrefillSequence("x", (1,) * 10, Sampling(), 1, (2,) * 247),)), "10 \\+ 247"),
        (Prefill(0, 0, (PrefillSequence("x", (300,), Sampling(), 4),)), "outside the vocabulary of 259"),
        (Prefill(0, 0, (PROMPT, PROMPT)), "appears twice"),
        (Prefill(0, 0, (PrefillSequence("x", (1,) * 100, Sampling(), 1),)), "KvCacheFull: 100 blocks.*3 of 90"),
        (Decode(0, 0, (DecodeSequence("nobody", 1, 3),)), "KeyError: request nobody has no KV cache"),
        (Decode(0, 0, (DecodeSequence("r", 1, 5),)), "position 5, but its cache holds 3"),
        (Decode(0, 0, (DecodeSequence("r", 259, 3),)), "outside the vocabulary"),
        (Decode(0, 0, (DecodeSequence("r", 1, 3),) * 2), "appears twice"),
        (TrainForward(0, 0, "m", (Example((1,)),)), "no label token"),
        (TrainForward(0, 0, "m", (EXAMPLE, Example((1,) * 257))), "257 tokens"),
        (TrainForward(0, 0, "m", (EXAMPLE, Example(()))), "0 tokens"),
        (TrainForward(0, 0, "m", (Example((1, -1)),)), "outside the vocabulary"),
        (TrainForward(0, 0, "held", (EXAMPLE,)), "in flight already"),
        (TrainBackward(0, "unknown"), "KeyError: micro-batch unknown is not in flight"),
        (TrainBackward(0, "held", gradient=Handle(torch.zeros(1))), "every stage but the last"),
        (TrainBackward(0, "held", tied_gradient=Handle(torch.zeros(1))), "tied gradient exactly on stage 0"),
        (OptimizerStep(0, 0, "job", SPEC), "without an accumulated gradient"),
        (Measure(0, "dreaming", 1, 1, 1, 0), "cannot measure 'dreaming'; known: prefill, decode"),
        (Measure(0, "decode", 0, 1, 1, 0), "cannot measure batch 0"),
    ],
)
def test_bad_op_is_an_error_result(model: Path, op: StageOp, message: str) -> None:
    """What ran before stays: the running request decodes on and the micro-batch in flight goes back."""
    (stage,) = stages(model, kv_capacity_tokens=90, kv_block_tokens=1)
    ok(stage, Prefill(0, 0, (PROMPT,)))
    ok(stage, TrainForward(0, 0, "held", (EXAMPLE,)))
    result = stage.run(op)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(result.error)
    assert result.output is None
    if stage.version == 0:
        ok(stage, Forget(0, ("x",)))
        if not isinstance(op, Prefill):
            ok(stage, Decode(0, 0, (DecodeSequence("r", 1, 3),)))
        if not (isinstance(op, TrainBackward) and op.task_id == "held"):
            ok(stage, TrainBackward(0, "held"))


def test_later_stage_needs_hidden_states(model: Path) -> None:
    last = stages(model, 2)[1]
    assert "needs the hidden states" in last.run(Prefill(0, 0, (PROMPT,))).error


def test_failed_prefill_leaves_nothing_reserved(model: Path) -> None:
    (stage,) = stages(model, kv_capacity_tokens=40, kv_block_tokens=8)
    wide = PrefillSequence("b", (1,) * 40, Sampling(), 50)
    assert "KvCacheFull" in stage.run(Prefill(0, 0, (PrefillSequence("a", (1, 2), Sampling(), 20), wide))).error
    assert stage.inference.cache.used_blocks == 0


def test_prefill_again_starts_the_request_anew(model: Path) -> None:
    (stage,) = stages(model, kv_capacity_tokens=8, kv_block_tokens=4)
    first = ok(stage, Prefill(0, 0, (PROMPT,))).tokens
    ok(stage, Decode(0, 0, (DecodeSequence("r", 9, 3),)))
    assert ok(stage, Prefill(0, 0, (PROMPT,))).tokens == first
    assert stage.inference.cache.used_blocks == 1


def test_forget_frees_everything(model: Path) -> None:
    (stage,) = stages(model)
    ok(stage, Prefill(0, 0, (PROMPT,)))
    ok(stage, TrainForward(0, 0, "m", (EXAMPLE,)))
    ok(stage, Forget(0, ("r", "m", "unknown")))
    assert (len(stage.inference.cache), stage.training.num_in_flight) == (0, 0)


@pytest.mark.parametrize("norm_sq", [math.nan, math.inf])
def test_step_with_a_gradient_that_is_not_finite_is_skipped(model: Path, norm_sq: float) -> None:
    """Weights stay, the gradient is dropped, and the version rises so that all stages agree."""
    (stage,) = stages(model)
    before = {name: part.clone() for name, part in stage.stage.weights.named(with_borrowed=True).items()}
    ok(stage, TrainForward(0, 0, "m", (EXAMPLE,)))
    ok(stage, TrainBackward(0, "m"))
    result = stage.run(OptimizerStep(0, 0, "job", SPEC, norm_sq))
    assert "step skipped, weights unchanged" in result.error
    assert result.version == 1
    after = stage.stage.weights.named(with_borrowed=True)
    assert all(torch.equal(after[name], part) for name, part in before.items())
    ok(stage, TrainForward(0, 1, "m", (EXAMPLE,)))
    ok(stage, TrainBackward(0, "m"))
    assert ok(stage, OptimizerStep(0, 1, "job", SPEC)).version == 2


@pytest.mark.parametrize("norm_sq", [math.nan, None])
def test_a_step_drops_the_gradient_of_its_group_alone(model: Path, norm_sq: float | None) -> None:
    (stage,) = stages(model)
    for group in (1, 2):
        ok(stage, TrainForward(0, 0, f"m{group}", (EXAMPLE,)))
        ok(stage, TrainBackward(0, f"m{group}", group=group))
    assert stage.training.gradients.keys() == {1, 2}
    error = stage.run(OptimizerStep(0, 0, "job", SPEC, norm_sq, group=2)).error
    assert ("step skipped" in error) == (norm_sq is not None)
    assert stage.training.gradients.keys() == {1}
    assert "without an accumulated gradient" in stage.run(OptimizerStep(0, 1, "job", SPEC, group=2)).error
    assert ok(stage, OptimizerStep(0, 2, "job", SPEC, group=1)).version == 3


def test_the_norm_is_that_of_the_group(model: Path) -> None:
    (stage,) = stages(model)
    norms = []
    for place, group in enumerate((1, 2, 1)):
        ok(stage, TrainForward(0, 0, f"m{place}", (EXAMPLE,)))
        norms.append(ok(stage, TrainBackward(0, f"m{place}", group=group)).grad_norm_sq)
    assert norms == [norms[0], norms[0], pytest.approx(4.0 * norms[0])]


def test_a_failed_step_keeps_the_weights_of_before_under_both_versions(model: Path) -> None:
    (stage,) = stages(model)
    ok(stage, Prefill(0, 0, (PROMPT,)))
    first = ok(stage, Decode(0, 0, (DecodeSequence("r", 1, 3),))).tokens
    assert stage.run(OptimizerStep(0, 0, "job", SPEC, oldest_version=0)).error
    ok(stage, TrainForward(0, 0, "m", (EXAMPLE,)))
    ok(stage, TrainBackward(0, "m"))
    ok(stage, OptimizerStep(0, 1, "job", SPEC, oldest_version=0))
    assert stage.stage.weights.versions == (0, 1, 2)
    assert all(ok(stage, Decode(0, v, (DecodeSequence("r", 1, 3),))).tokens == first for v in (0, 1))


def test_loss_that_is_not_finite_fails_the_microbatch(model: Path) -> None:
    (stage,) = stages(model)
    with torch.no_grad():
        stage.stage.weights.weights[0].parameter.fill_(math.nan)
    assert stage.run(TrainForward(0, 0, "m", (EXAMPLE,))).error == "ArithmeticError: the loss is nan"
    assert stage.training.num_in_flight == 0


def test_step_without_a_total_clips_by_its_own_norm(model: Path) -> None:
    results = []
    for given in (False, True):
        (stage,) = stages(model)
        ok(stage, TrainForward(0, 0, "m", (EXAMPLE,)))
        norm_sq = ok(stage, TrainBackward(0, "m")).grad_norm_sq
        results.append(ok(stage, OptimizerStep(0, 0, "job", SPEC, norm_sq if given else None)).grad_norm_sq)
    assert results[0] == results[1]


def test_optimizer_of_a_job_is_fixed_until_it_is_forgotten(model: Path) -> None:
    (stage,) = stages(model)

    def step(spec: OptimizerSpec, job: str = "job") -> str:
        ok(stage, TrainForward(0, stage.version, "m", (EXAMPLE,)))
        ok(stage, TrainBackward(0, "m"))
        return stage.run(OptimizerStep(0, stage.version, job, spec)).error

    assert step(SPEC) == ""
    assert "job job changed its optimizer" in step(OptimizerSpec(learning_rate=1.0))
    ok(stage, Forget(0, ("job",)))
    assert step(OptimizerSpec(learning_rate=1e-5)) == ""
    assert "needs the number of steps" in step(OptimizerSpec(lr_schedule="linear"), "endless")
    for number in range(MAX_JOBS - 1):
        assert step(SPEC, f"job{number}") == ""
    assert f"{MAX_JOBS} jobs hold optimizer state" in step(SPEC, "one-too-many")


@pytest.mark.parametrize(
    ("point", "kinds"),
    [
        ({"kind": "prefill", "batch": 2, "length": 3, "cached_tokens": 70}, {"prefill"}),
        ({"kind": "prefill", "batch": 1, "length": 156, "cached_tokens": 100}, {"prefill"}),
        ({"kind": "prefill", "batch": 1, "length": 16, "decodes": 3, "decode_length": 64}, {"prefill"}),
        ({"kind": "offload", "batch": 1, "length": 1, "num_bytes": 100_000}, {"offload", "reload"}),
    ],
)
def test_measure_times_what_serving_does_too(tmp_path: Path, point: dict[str, Any], kinds: set[str]) -> None:
    path = write_tiny_llama(tmp_path, layers=2)
    for stage in stages(path, 2, kv_capacity_tokens=16, kv_block_tokens=16):
        result = ok(stage, Measure(0, repetitions=3, warmup=1, **point))
        assert {name: len(values) for name, values in result.durations_s} == dict.fromkeys(kinds, 3)
        assert result.memory is not None
        per_token = result.memory.kv_bytes_per_token
        assert per_token == stage.ready.kv_bytes_per_token
        # Whole blocks are moved, the nearest number of them.
        assert abs(result.memory.moved_bytes - point.get("num_bytes", 0)) <= 8 * per_token


@pytest.mark.parametrize("kind", sorted(set(OpKind) - MOVES - {OpKind.TRAIN_BACKWARD}))
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_measure_times_every_stage_alone_and_changes_nothing(tmp_path: Path, family: str, kind: OpKind) -> None:
    write = write_tiny_llama if family == "llama" else write_tiny_gpt2
    path = write(tmp_path, layers=2)
    for stage in stages(path, 2, kv_capacity_tokens=16, kv_block_tokens=16):
        before = {name: part.clone() for name, part in stage.stage.weights.named(with_borrowed=True).items()}
        # The whole context at once, and more than the KV cache holds.
        result = ok(stage, Measure(0, kind.value, 2, 256, 3, 1))
        kinds = {kind.value} | ({"train_backward"} if kind is OpKind.TRAIN_FORWARD else set())
        assert {name: len(values) for name, values in result.durations_s} == dict.fromkeys(kinds, 3)
        assert all(value > 0.0 for _, values in result.durations_s for value in values)
        assert result.memory is not None
        assert min(result.memory.resident_bytes, result.memory.peak_bytes) > 1 << 20
        owned = stage.stage.weights.owned
        assert result.memory.weight_bytes == sum(w.parameter.numel() * w.parameter.dtype.itemsize for w in owned)
        after = stage.stage.weights.named(with_borrowed=True)
        assert all(torch.equal(after[name], part) for name, part in before.items())
        assert all(weight.parameter.grad is None for weight in stage.stage.weights.weights)
        assert (result.version, len(stage.inference.cache), stage.training.num_in_flight) == (0, 0, 0)


def test_times_lie_on_the_monotonic_clock_in_order(model: Path) -> None:
    (stage,) = stages(model)
    first, second = ok(stage, Forget(1, ())), ok(stage, Forget(2, ()))
    assert first.begin_s <= first.end_s <= second.begin_s <= second.end_s
    assert (first.op_id, second.op_id) == (1, 2)
