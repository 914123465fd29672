"""The emulated engine keeps the books of a real one."""

import asyncio
import functools
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from services.latency import HostLink, Interference, LatencyModel, MixedCost, NodeLatency, OpKind
from services.node_agent.engine.base import EngineConfig, StageResult
from services.node_agent.engine.emulated.device_timer import LoopTimer, PreciseTimer, Timer
from services.node_agent.engine.emulated.engine import EmulatedEngine, emulated_fingerprint, load_emulated_engine
from services.node_agent.engine.emulated.timing import EmulatedTiming
from services.node_agent.engine.emulated.worker import next_token
from services.node_agent.engine.handle import Handle
from services.node_agent.engine.inference_ops import Decode, DecodeSequence, Prefill, PrefillSequence, Sampling
from services.node_agent.engine.ops import Forget, Measure, Offload, Reload, StageOp
from services.node_agent.engine.training_ops import Example, OptimizerSpec, OptimizerStep, TrainBackward, TrainForward
from services.node_agent.engine.weight_ops import LoadWeights, Snapshot
from services.runtime.clock import FakeClock


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 11, "eos_token_id": [3]}), encoding="utf-8")
    return tmp_path


def _engine(model: Path, num_stages: int = 1, **config: int) -> EmulatedEngine:
    return load_emulated_engine(EngineConfig(model_path=str(model), num_stages=num_stages, **config))


def _prefill(version: int = 0, tokens: tuple[int, ...] = (1, 2), hidden: Handle | None = None) -> Prefill:
    return Prefill(1, version, (PrefillSequence("r", tokens, Sampling(), 4),), hidden)


async def _run(engine: EmulatedEngine, stage: int, op: StageOp) -> StageResult:
    result = await engine.workers[stage].run(op)
    assert result.error == "", result.error
    return result


async def _error(engine: EmulatedEngine, stage: int, op: StageOp) -> str:
    return (await engine.workers[stage].run(op)).error


class FakeTimer:
    """Ends ops at once, `late_s` after their time on the fake clock."""

    def __init__(self, clock: FakeClock, late_s: float = 0.0) -> None:
        self.clock = clock
        self.late_s = late_s

    def call_at(self, time_s: float, call: Callable[[], None]) -> None:
        def due() -> None:
            self.clock.advance(time_s + self.late_s - self.clock.monotonic_s())
            call()

        asyncio.get_running_loop().call_soon(due)

    def close(self) -> None:
        pass


async def test_tokens_are_a_function_of_the_newest_token_and_its_place(model: Path) -> None:
    engine = _engine(model)
    first = (await _run(engine, 0, _prefill())).tokens[0]
    assert first.token_id == next_token(2, 2, 11)
    second = (await _run(engine, 0, Decode(2, 0, (DecodeSequence("r", first.token_id, 2),)))).tokens[0]
    assert second.token_id == next_token(first.token_id, 3, 11)
    assert second.is_end == (second.token_id == 3)


@pytest.mark.parametrize(
    ("stage", "op", "complaint"),
    [
        (0, _prefill(version=1), "has the versions (0,), the op wants 1"),
        (0, OptimizerStep(1, 1, "job", OptimizerSpec()), "at version 0, the op wants 1"),
        (0, _prefill(hidden=Handle(1.0)), "activations come from the previous stage"),
        (1, _prefill(), "activations come from the previous stage"),
        (0, _prefill(tokens=(1,) * 99), "KV cache of 8 tokens is full"),
        (0, Decode(1, 0, (DecodeSequence("r", 1, 2),)), "holds None tokens, position 2"),
        (0, TrainBackward(1, "t", Handle("g")), "no saved activations"),
        (0, TrainBackward(1, "t"), "a gradient comes from the next stage"),
        (0, LoadWeights(1, 0, "s", "/nowhere", "replace"), "No such file"),
        (0, Measure(1, "dance", 1, 1, 1, 0), "dance"),
    ],
)
async def test_mistakes_are_errors(model: Path, stage: int, op: StageOp, complaint: str) -> None:
    assert complaint in await _error(_engine(model, 2, kv_capacity_tokens=8), stage, op)


async def test_positions_and_double_prefills_are_checked(model: Path) -> None:
    engine = _engine(model)
    await _run(engine, 0, _prefill())
    assert "in the KV cache already" in await _error(engine, 0, _prefill())
    assert "holds 2 tokens, position 3" in await _error(engine, 0, Decode(2, 0, (DecodeSequence("r", 1, 3),)))
    await _run(engine, 0, Forget(3, ("r", "unknown")))
    await _run(engine, 0, _prefill())


def _continued(cached_tokens: int, continues: str = "r") -> Prefill:
    sequence = PrefillSequence("next", (1, 2, 3, 4, 5), Sampling(), 4, (), cached_tokens, continues)
    return Prefill(2, 0, (sequence,))


async def test_a_turn_takes_over_the_kv_cache_of_the_one_before(model: Path) -> None:
    engine = _engine(model, kv_capacity_tokens=6)
    await _run(engine, 0, _prefill())
    await _run(engine, 0, _continued(2))
    assert engine.workers[0].stage.kv_tokens == {"next": 5}


@pytest.mark.parametrize(("cached_tokens", "continues"), [(3, "r"), (1, "other")])
async def test_a_turn_cannot_take_over_what_is_not_there(model: Path, cached_tokens: int, continues: str) -> None:
    engine = _engine(model)
    await _run(engine, 0, _prefill())
    assert f"not {cached_tokens}" in await _error(engine, 0, _continued(cached_tokens, continues))


def test_cached_tokens_take_no_time() -> None:
    timing = EmulatedTiming.alike({OpKind.PREFILL: LatencyModel("full", (1.0, 0.1, 0.01))})
    # Three new tokens after two: their share of what grows with the square is 5 * 5 - 2 * 2.
    assert timing.op_s(0, _continued(2)) == pytest.approx(1.0 + 0.1 * 3 + 0.01 * 21)


async def test_one_op_at_a_time(model: Path) -> None:
    engine = _engine(model)
    first = engine.workers[0].run(_prefill())
    with pytest.raises(RuntimeError, match="while another op is running"):
        await engine.workers[0].run(Forget(2, ()))
    await first


async def test_training_lowers_the_loss_and_raises_the_version(model: Path) -> None:
    engine = _engine(model, 2)
    losses = []
    for version in range(2):
        forward = TrainForward(1, version, "t", (Example((1, 2, 3)), Example((1, 2), 1)))
        hidden = (await _run(engine, 0, forward)).output
        last = await _run(engine, 1, TrainForward(1, version, "t", forward.examples, hidden=hidden))
        losses.append(last.loss)
        assert last.label_tokens == 3
        gradient = (await _run(engine, 1, TrainBackward(2, "t"))).output
        assert (await _run(engine, 0, TrainBackward(2, "t", gradient))).grad_norm_sq == 1.0
        for stage in (0, 1):
            step = OptimizerStep(3, version, "job", OptimizerSpec(learning_rate=1e-3), 2.0)
            assert (await _run(engine, stage, step)).version == version + 1
    assert losses == pytest.approx([4.0, 3.6])


async def test_snapshots_and_loads(model: Path) -> None:
    engine = _engine(model)
    path = (await _run(engine, 0, Snapshot(1, 0, "s"))).weights_path
    await _run(engine, 0, OptimizerStep(2, 0, "job", OptimizerSpec(learning_rate=5e-3)))
    assert (await _run(engine, 0, LoadWeights(3, 1, "s", path, "average"))).version == 2
    assert engine.workers[0].stage.weight == 2.0, "the mean equals the snapshot: the step made since is kept"
    await _run(engine, 0, LoadWeights(4, 2, "s", path, "replace"))
    assert engine.workers[0].stage.weight == 4.0
    failed = await engine.workers[0].run(LoadWeights(5, 3, "unknown", path, "average"))
    assert failed.error
    assert failed.version == 4, "stages stay in step"
    await engine.close()
    with pytest.raises(FileNotFoundError):
        os.stat(path)


async def test_older_versions_are_kept_as_long_as_ops_need_them(model: Path) -> None:
    engine = _engine(model, 2)
    hidden = Handle(2.0)
    halve = OptimizerSpec(learning_rate=5e-3)
    for version, oldest in enumerate((0, 1, 1)):
        await _run(engine, 1, OptimizerStep(1, version, "job", halve, oldest_version=oldest))
    stage = engine.workers[1].stage
    assert stage.versions == (1, 2, 3)
    examples = (Example((1, 2)),)
    losses = [
        (await _run(engine, 1, TrainForward(2, version, f"m{version}", examples, hidden=hidden))).loss
        for version in stage.versions
    ]
    assert losses == [3.0, 2.5, 2.25]
    assert "has the versions (1, 2, 3), the op wants 0" in await _error(engine, 1, _prefill(0, hidden=hidden))
    path = (await _run(engine, 1, Snapshot(3, 1, "s"))).weights_path
    assert (await engine.workers[1].run(LoadWeights(4, 3, "x", "/nowhere", "replace", 3))).error
    assert stage.versions == (3, 4)
    await _run(engine, 1, LoadWeights(5, 4, "s", path, "replace"))
    assert (stage.versions, stage.weight) == ((5,), 2.0)
    await engine.close()


async def test_gradients_are_kept_apart_by_group(model: Path) -> None:
    engine = _engine(model)
    for place, group in enumerate((1, 2, 2)):
        await _run(engine, 0, TrainForward(1, 0, f"m{place}", (Example((1, 2)),)))
        await _run(engine, 0, TrainBackward(2, f"m{place}", group=group))
    assert (await _run(engine, 0, OptimizerStep(3, 0, "job", OptimizerSpec(), group=2))).grad_norm_sq == 2.0
    assert engine.workers[0].stage.grad_norms_sq == {1: 1.0}


async def test_measurements_tell_the_model(model: Path) -> None:
    timing = EmulatedTiming.alike({OpKind.TRAIN_BACKWARD: LatencyModel("affine", (0.0, 2.0))})
    engine = load_emulated_engine(EngineConfig(model_path=str(model)), timing)
    durations = dict((await _run(engine, 0, Measure(1, "train_forward", 2, 3, 2, 1))).durations_s)
    assert durations == {"train_forward": (1e-6, 1e-6), "train_backward": (12.0, 12.0)}


async def test_ops_take_the_time_of_their_model(model: Path) -> None:
    clock = FakeClock()
    timing = EmulatedTiming.alike(
        {
            OpKind.PREFILL: LatencyModel("affine", (1.0, 0.5)),
            OpKind.TRAIN_FORWARD: LatencyModel("affine", (0.0, 1.0)),
            OpKind.TRAIN_BACKWARD: LatencyModel("affine", (0.0, 2.0)),
        }
    )
    engine = load_emulated_engine(
        EngineConfig(model_path=str(model)), timing, clock=clock, timer=lambda: FakeTimer(clock)
    )
    results = [
        await _run(engine, 0, op)
        for op in (
            _prefill(),
            TrainForward(2, 0, "t", (Example((1, 2, 3)), Example((1, 2)))),
            TrainBackward(3, "t"),
            Forget(4, ("t",)),
        )
    ]
    assert [result.end_s - result.begin_s for result in results] == [2.0, 6.0, 12.0, 0.0]


@pytest.mark.parametrize("content", [None, "no json", "[]", "{}", '{"vocab_size": "many"}'])
def test_unusable_model_directories_are_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json: not a model configuration"):
        _engine(tmp_path)


def test_the_fingerprint_depends_on_what_durations_depend_on() -> None:
    config = EngineConfig(model_path="x")
    slow = EmulatedTiming.alike({OpKind.DECODE: LatencyModel("constant", (1.0,))})
    free = EmulatedTiming.alike({})
    prints = {
        emulated_fingerprint(config, free),
        emulated_fingerprint(config, replace(slow, time_scale=2.0)),
        emulated_fingerprint(config, slow),
        emulated_fingerprint(EngineConfig(model_path="x", num_stages=2), slow),
    }
    assert len(prints) == 4
    assert emulated_fingerprint(EngineConfig(model_path="y"), slow) in prints


MEMORY = {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 3}


async def test_what_is_offloaded_takes_the_host_links_time_and_must_come_back(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MEMORY), encoding="utf-8")
    clock = FakeClock()
    timing = EmulatedTiming(NodeLatency(({}, {}), host_links=(HostLink(100.0, 50.0, 1.0),) * 2), time_scale=2.0)
    config = EngineConfig(model_path=str(tmp_path), num_stages=2, kv_block_tokens=4, can_offload=True)
    engine = load_emulated_engine(config, timing, clock=clock, timer=lambda: FakeTimer(clock))
    # Two layers of keys and values of 8 numbers in two bytes each, for a block of four tokens.
    assert engine.info.kv_bytes_per_token == 2 * 2 * 8 * 2
    assert (await _run(engine, 0, _prefill())).held_bytes == 4 * 64
    forward = TrainForward(2, 0, "t", (Example((1, 2, 3)), Example((1, 2))))
    activations = 2 * 3 * engine.info.activation_bytes_per_token
    assert (await _run(engine, 0, forward)).held_bytes == 256 + activations

    away = await _run(engine, 0, Offload(3, ("r", "unknown")))
    assert (away.held_bytes, away.end_s - away.begin_s) == (activations, pytest.approx(2.0 * (1.0 + 2.56)))
    decode = Decode(4, 0, (DecodeSequence("r", 1, 2),))
    assert "r is in host memory" in await _error(engine, 0, decode)
    again = await _run(engine, 0, Offload(5, ("r",)))
    assert again.end_s - again.begin_s == pytest.approx(2.0)
    back = await _run(engine, 0, Reload(6, ("r",)))
    assert (back.held_bytes, back.end_s - back.begin_s) == (256 + activations, pytest.approx(2.0 * (1.0 + 5.12)))
    assert await _run(engine, 0, decode)
    await _run(engine, 0, Offload(7, ("t",)))
    assert "t is in host memory" in await _error(engine, 0, TrainBackward(8, "t", Handle("gradient")))
    assert "t is in host memory" in await _error(engine, 0, replace(forward, part=1, parts=2))
    await _run(engine, 0, Forget(9, ("r", "t")))
    assert (await _run(engine, 0, Reload(10, ("t",)))).held_bytes == 0
    await engine.close()


def test_stages_have_models_of_their_own_and_mixed_ops_share_work() -> None:
    models = {OpKind.PREFILL: LatencyModel("affine", (1.0, 1.0)), OpKind.DECODE: LatencyModel("constant", (2.0,))}
    slow = {OpKind.PREFILL: LatencyModel("constant", (9.0,))}
    latency = NodeLatency((models, slow), mixed=(MixedCost(shared=0.5), MixedCost()))
    timing = EmulatedTiming(latency, time_scale=10.0)
    mixed = replace(_prefill(), decodes=(DecodeSequence("d", 1, 4),))
    assert timing.op_s(0, _prefill()) == 30.0
    assert timing.op_s(0, mixed) == 10.0 * (3.0 + 2.0 - 0.5 * 2.0)
    assert timing.op_s(1, mixed) == 90.0


async def test_ops_beside_a_busy_stage_take_what_interference_says(model: Path) -> None:
    clock = FakeClock()
    models = {OpKind.PREFILL: LatencyModel("constant", (1.0,)), OpKind.DECODE: LatencyModel("constant", (1.0,))}
    slowed = Interference(0, OpKind.PREFILL, OpKind.DECODE, 0.5)
    timing = EmulatedTiming(NodeLatency((models, models), interference=(slowed,)))
    config = EngineConfig(model_path=str(model), num_stages=2)
    engine = load_emulated_engine(config, timing, clock=clock, timer=lambda: FakeTimer(clock))
    alone = await _run(engine, 0, _prefill())
    await _run(engine, 1, _prefill(hidden=alone.output))
    busy = engine.workers[1].run(Decode(2, 0, (DecodeSequence("r", 1, 2),), Handle("4.0")))
    beside = await engine.workers[0].run(_prefill())
    assert (alone.end_s - alone.begin_s, beside.end_s - beside.begin_s) == (1.0, 1.5)
    await busy


async def test_durations_spread_as_the_profile_says_and_by_the_seed(model: Path) -> None:
    timing = EmulatedTiming.alike({OpKind.DECODE: LatencyModel("constant", (1.0,), 0.0, -0.1645, 0.1645)})
    measure = Measure(1, "decode", 1, 1, 2000, 0)

    async def measured(seed: str | None) -> list[float]:
        engine = load_emulated_engine(EngineConfig(model_path=str(model)), timing, noise_seed=seed)
        return list(dict((await _run(engine, 0, measure)).durations_s)["decode"])

    spread = await measured("0/node-0")
    assert statistics.stdev(spread) == pytest.approx(0.1, rel=0.1)
    assert statistics.mean(spread) == pytest.approx(1.0, rel=0.01)
    assert spread == await measured("0/node-0") != await measured("0/node-1")
    assert set(await measured(None)) == {1.0}


async def test_what_the_agent_needs_between_ops_does_not_add_up(model: Path) -> None:
    """Ends are noticed 0.25 s late; what starts upon an end begins on the device when that was."""
    clock = FakeClock()
    timing = EmulatedTiming.alike({OpKind.OPTIMIZER_STEP: LatencyModel("constant", (1.0,))}, 2)
    config = EngineConfig(model_path=str(model), num_stages=2)
    engine = load_emulated_engine(config, timing, clock=clock, timer=lambda: FakeTimer(clock, late_s=0.25))
    results: list[StageResult] = []
    ended = asyncio.Event()

    def step(stage: int, version: int) -> None:
        future = engine.workers[stage].run(OptimizerStep(1, version, "job", OptimizerSpec()))
        future.add_done_callback(lambda answer: follow(stage, version, answer.result()))

    def follow(stage: int, version: int, result: StageResult) -> None:
        results.append(result)
        if stage == 0:
            step(1, version)
        elif version < 2:
            step(0, version + 1)
        else:
            ended.set()

    step(0, 0)
    await ended.wait()
    assert [result.end_s for result in results] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    figures = engine.clock_slip
    assert (figures.ops, figures.worst_s, figures.late_s, figures.busy_s) == (6, 0.25, 1.5, 6.0)
    assert 0.25 <= figures.p50 <= figures.p99 <= 0.25 * 1.125

    # What starts for another reason begins when it does, and not before the stage is free.
    clock.advance(10.0)
    later = await _run(engine, 0, OptimizerStep(1, 3, "job", OptimizerSpec()))
    assert later.begin_s == clock.monotonic_s() - 1.25
    await engine.close()


async def test_a_cancelled_op_ends_without_a_word(model: Path) -> None:
    clock = FakeClock()
    timing = EmulatedTiming.alike({OpKind.PREFILL: LatencyModel("constant", (1.0,))})
    engine = load_emulated_engine(
        EngineConfig(model_path=str(model)), timing, clock=clock, timer=lambda: FakeTimer(clock)
    )
    engine.workers[0].run(_prefill()).cancel()
    clock.advance(5.0)
    result = await _run(engine, 0, Forget(2, ("r",)))
    assert (result.begin_s, engine.workers[0].stage.kv_tokens) == (5.0, {})


@pytest.mark.parametrize("make", [PreciseTimer, LoopTimer])
async def test_timers_call_in_the_order_of_their_times_and_never_early(make: Callable[[], Timer]) -> None:
    timer = make()
    loop = asyncio.get_running_loop()
    now_s = loop.time()
    times_s = [now_s + 0.02, now_s + 0.005, now_s + 0.01, now_s - 1.0]
    called: list[tuple[float, bool]] = []
    ended = asyncio.Event()

    def due(time_s: float) -> None:
        called.append((time_s, loop.time() >= time_s))
        if len(called) == len(times_s):
            ended.set()

    for time_s in times_s:
        timer.call_at(time_s, functools.partial(due, time_s))
    await asyncio.wait_for(ended.wait(), 10.0)
    assert called == [(time_s, True) for time_s in sorted(times_s)]
    timer.call_at(now_s, called.clear)
    timer.close()
    for _ in range(5):  # passes of the loop, each of which would find that it is due
        await asyncio.sleep(0)
    assert len(called) == len(times_s)
