"""Random work, durations, cancellations and failures: the promises of the core hold, whatever happens."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.latency import OpKind
from services.node_agent.core.node import NodeCore
from services.node_agent.core.types import (
    SCHEDULES,
    Cancelled,
    Event,
    MemoryConfig,
    NodeCoreConfig,
    Op,
    OpDone,
    QueueOrder,
)
from tests.unit.node_core.checker import TRAINING
from tests.unit.node_core.driver import Driver, microbatch, request, sync

memories = st.builds(
    MemoryConfig,
    peak_bytes=st.integers(20, 300),
    kv_bytes_per_token=st.sampled_from([1, 2]),
    activation_bytes_per_token=st.sampled_from([1, 3, 6]),
    kappa=st.sampled_from([0.5, 1.0]),
    max_wait_s=st.sampled_from([0.0, 0.1, 1.0]),
    max_forward_wait_s=st.sampled_from([0.0, 0.1, 3.0]),
    wait_or_offload=st.sampled_from([True, True, False]),
)
plain_configs = st.builds(
    NodeCoreConfig,
    num_stages=st.integers(1, 4),
    queue_order=st.sampled_from(QueueOrder),
    max_batch=st.integers(1, 4),
    max_prefill_tokens=st.sampled_from([8, 32, 256]),
    kv_capacity_tokens=st.integers(20, 120),
    kv_block_tokens=st.sampled_from([1, 1, 7, 16]),
    max_batch_tokens=st.sampled_from([0, 0, 5, 9, 40]),
    max_inflight_training=st.integers(1, 4),
    weight_handling=st.sampled_from(["drain", "stash"]),
    training_schedule=st.sampled_from(SCHEDULES),
    gradient_buffers=st.integers(1, 3),
    max_training_wait_s=st.sampled_from([0.0, 0.3, 2.0]),
    group_timeout_s=st.sampled_from([0.0, 1.0]),
    max_bypass=st.integers(0, 3),
    max_demotion_s=st.sampled_from([0.0, 1.0]),
)
configs = st.one_of(
    plain_configs,
    st.builds(
        replace,
        plain_configs,
        expected_output_tokens=st.sampled_from([1, 4]),
        max_preemptions=st.integers(0, 2),
        prefix_cache_tokens=st.sampled_from([0, 30]),
    ),
    st.builds(replace, plain_configs, memory=memories),
    st.builds(
        replace,
        plain_configs,
        memory=memories,
        expected_output_tokens=st.sampled_from([0, 1, 4]),
        prefix_cache_tokens=st.sampled_from([0, 30, 200]),
        epoch_steps=st.sampled_from([1, 3, 100]),
    ),
    st.builds(
        replace,
        plain_configs,
        prefix_cache_tokens=st.sampled_from([30, 200]),
        epoch_steps=st.sampled_from([1, 3, 100]),
    ),
)
times = st.integers(0, 60).map(lambda tick: tick * 0.05)
tasks = st.integers(0, 11)


def _request(number: int, prompt: int, max_tokens: int, slack_s: float | None, time_s: float) -> Event:
    deadline = {} if slack_s is None else {"deadline_s": time_s + slack_s}
    session_id = ("", "one", "two")[number % 3]
    return request(
        f"r{number}", prompt=prompt, max_tokens=max_tokens, arrival_s=time_s, session_id=session_id, **deadline
    )


@st.composite
def scheduled_events(draw: st.DrawFn) -> tuple[float, Event]:
    time_s = draw(times)
    number = draw(tasks)
    kind = draw(st.sampled_from(["request", "request", "request", "microbatch", "microbatch", "sync", "cancel"]))
    if kind == "request":
        slack_s = draw(st.sampled_from([None, 0.1, 1.0]))
        if draw(st.sampled_from([False, False, True])):
            # Of one prompt, whoever comes first.
            return time_s, request(f"r{number}", prompt=17, max_tokens=1 + number, arrival_s=time_s, choice_of="c")
        return time_s, _request(number, draw(st.integers(1, 60)), draw(st.integers(1, 12)), slack_s, time_s)
    if kind == "microbatch":
        job = "ab"[number % 2]
        last = draw(st.sampled_from([False, False, False, True]))
        parts = draw(st.sampled_from([1, 1, 2, 3]))
        return time_s, microbatch(f"{job}{number}", job=job, accumulation=1 + number % 3, last=last, parts=parts)
    if kind == "sync":
        if draw(st.sampled_from([False, False, True])):
            return time_s, sync(f"restore{number}", True, settles=True)
        return time_s, sync(f"s{number}", draw(st.booleans()))
    return time_s, Cancelled(draw(st.sampled_from([f"r{number}", f"{'ab'[number % 2]}{number}"])))


def _unique(events: list[tuple[float, Event]]) -> list[tuple[float, Event]]:
    """One arrival per task id: a second life of an ended task would be another task."""
    seen: set[str] = set()
    kept = []
    for time_s, event in events:
        task = getattr(event, "request", None) or getattr(event, "microbatch", None)
        if task is not None and task.task_id in seen:
            continue
        if task is not None:
            seen.add(task.task_id)
        kept.append((time_s, event))
    return kept


workloads = st.lists(scheduled_events(), max_size=40).map(_unique)


def _varied(seed: int) -> Callable[[int, Op], float]:
    """A duration per (stage, op) that depends on nothing but its arguments."""
    return lambda stage, op: 0.01 * (1 + (op.op_id * 7919 + stage * 104729 + seed) % 23)


def _sometimes(seed: int, one_in: int) -> Callable[[int, Op], bool]:
    return lambda stage, op: one_in > 0 and (op.op_id * 31 + stage * 17 + seed) % one_in == 0


def _driver(config: NodeCoreConfig, events: list[tuple[float, Event]], seed: int, fail_one_in: int) -> Driver:
    driver = Driver(core=NodeCore(config), durations=_varied(seed), fail=_sometimes(seed, fail_one_in))
    driver._stop_after = {f"r{number}": 1 + number for number in range(0, 12, 3)}
    for time_s, event in events:
        driver.at(time_s, event)
    return driver


@settings(max_examples=150, deadline=None)
@given(configs, workloads, st.integers(0, 1000), st.sampled_from([0, 0, 5, 11]))
def test_every_task_ends_once_and_nothing_is_left(
    config: NodeCoreConfig, events: list[tuple[float, Event]], seed: int, fail_one_in: int
) -> None:
    driver = _driver(config, events, seed, fail_one_in).run()
    assert not driver.checker.live
    assert not driver.checker.running
    assert driver.core.tasks() == ()
    snapshot = driver.core.snapshot()
    assert snapshot.kv_used_tokens == 0
    assert snapshot.kv_kept_tokens == driver.checker.kept_tokens
    assert snapshot.pending_syncs == 0
    assert set(snapshot.queue_lengths) == {0}
    assert len(set(snapshot.versions)) == 1
    if snapshot.memory is not None:
        memory = driver.checker.memory
        assert memory is not None
        assert snapshot.memory.used_bytes == tuple(sum(device.values()) for device in memory.device)
        assert snapshot.memory.host_bytes == tuple(sum(host.values()) for host in memory.host)
        assert all(device.keys() | host.keys() == driver.checker.kept.keys() for device, host in memory.stages())
    changes = sum(op.changes_weights for _, stage, op in driver.runs if stage == 0)
    assert snapshot.versions[0] == changes


def _run_ahead(core: NodeCore) -> None:
    """What a forecast does with a fork, and more: cancel every other task, end whatever runs until nothing does."""
    now_s = 1.0
    for task_id in core.tasks()[::2]:
        core.step(now_s, Cancelled(task_id))
    while running := [(stage, op) for stage, op in enumerate(core.snapshot().running_ops) if op is not None]:
        now_s += 0.1
        core.step(now_s, OpDone(running[0][0], running[0][1].op_id))


@settings(max_examples=100, deadline=None)
@given(configs, workloads, st.integers(0, 1000))
def test_the_same_events_give_the_same_commands_and_a_fork_is_independent(
    config: NodeCoreConfig, events: list[tuple[float, Event]], seed: int
) -> None:
    whole = _driver(config, events, seed, 7).run()
    half = _driver(config, events, seed, 7).run(until_s=1.0)
    _run_ahead(half.core.fork())
    half.run()
    assert half.log == whole.log


_TIGHT = MemoryConfig(peak_bytes=60, kv_bytes_per_token=1, activation_bytes_per_token=2)


@pytest.mark.parametrize("memory", [None, _TIGHT])
def test_a_fork_of_a_busy_core_leaves_it_untouched_at_every_moment(memory: MemoryConfig | None) -> None:
    def busy() -> Driver:
        driver = Driver(num_stages=3, weight_handling="stash", max_batch=2, max_inflight_training=3, memory=memory)
        driver.at(0.0, *[request(f"r{i}", max_tokens=3 + i) for i in range(8)], sync("s", True))
        return driver.at(0.0, *[microbatch(f"m{i}", accumulation=2) for i in range(6)])

    undisturbed = busy().run()
    driver = busy()
    while driver._events:
        driver.run(until_s=driver._events[0][0])
        _run_ahead(driver.core.fork())
    driver.run()
    assert driver.log == undisturbed.log
    assert driver.core.snapshot() == undisturbed.core.snapshot()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.sampled_from(["drain", "stash"]), st.sampled_from([0.2, 1.0]), st.integers(0, 99))
def test_a_ready_training_op_gets_its_turn_under_continuous_inference(
    num_stages: int, weight_handling: str, wait_s: float, seed: int
) -> None:
    config = NodeCoreConfig(
        num_stages=num_stages, max_batch=2, weight_handling=weight_handling, max_training_wait_s=wait_s
    )
    events = [(i * 0.03, _request(i, 5, 6, 0.5, i * 0.03)) for i in range(400)]
    driver = _driver(config, [(0.0, microbatch(f"m{i}", accumulation=2)) for i in range(40)] + events, seed, 0)
    driver.run(until_s=11.0)
    longest_s = 0.23
    for stage in range(num_stages):
        turns = [time_s for time_s, where, op in driver.runs if where == stage and op.kind in TRAINING]
        others = sum(where == stage and op.kind not in TRAINING for _, where, op in driver.runs)
        assert others > 20
        # A turn may have to wait for the op to come from the stages before it, each at its own turn.
        bound_s = 2 * num_stages * (wait_s + 2 * longest_s)
        assert all(b - a <= bound_s for a, b in zip([0.0, *turns], [*turns, 11.0], strict=True))
    assert any(op.kind is OpKind.OPTIMIZER_STEP for _, _, op in driver.runs)
