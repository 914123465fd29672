"""Requests and micro-batches from the ledger to their outcomes."""

import asyncio
import contextlib
import time
from pathlib import Path

import pytest

from lemix.internal.v1 import profile_pb2, scheduler_service_pb2
from lemix.v1 import errors_pb2, types_pb2
from services.ledger import TaskState
from tests.integration.node_agent.harness import (
    TIMEOUT_S,
    Gate,
    cluster,
    expected_tokens,
    inference_item,
    letter,
    training_item,
    write_letters,
)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
async def test_a_request_runs_streams_and_is_finished_in_the_ledger(tmp_path: Path, num_stages: int) -> None:
    async with cluster(tmp_path) as made:
        node = await made.start_node(num_stages=num_stages)
        await made.assign(inference_item("r1", [3, 1, 4], 6, reference_token_ids=[1, 5]))
        tokens, outcome = (await node.stream(("r1", 0)))["r1"]
        assert tokens == expected_tokens([3, 1, 4], 6) == list(outcome.token_ids)
        assert outcome.finish_reason == types_pb2.FINISH_REASON_LENGTH
        assert outcome.prompt_tokens == 3
        assert outcome.report.reference_loss == pytest.approx(4.0)
        assert [version.step for version in outcome.report.weight_versions] == [0]
        assert not outcome.report.HasField("staleness_s"), "never trained"
        assert 0 <= outcome.node_ttft_s <= outcome.node_response_s
        reported = await made.scheduler.outcome("r1")
        assert reported.inference == outcome
        record = await made.ledger.record("r1")
        assert record is not None
        assert record.state is TaskState.DONE
        assert record.outcome == reported
        await made.scheduler.until(lambda: not node.held_by_stages(), "freed KV caches")


@pytest.mark.parametrize("schedule", ["async", "gpipe", "1f1b"])
async def test_every_schedule_trains_cut_microbatches(tmp_path: Path, schedule: str) -> None:
    async with cluster(tmp_path) as made:
        node = await made.start_node(num_stages=2, training_schedule=schedule, max_training_parts=3)
        hello = made.scheduler.hellos[0]
        # A stage has two layers: no more pieces may be expected of one example, although two examples give three.
        assert (hello.training_schedule, hello.max_training_parts) == (schedule, 2)
        for sequence in range(6):
            item = training_item("job", sequence, [[1, 2], [3, 4]], gradient_accumulation_steps=3)
            item.training.parts = sequence
            await made.assign(item)
        steps = [(await made.scheduler.outcome(f"job/{index}")).training.weight_step for index in range(6)]
        assert steps == [1, 1, 1, 2, 2, 2]
        pieces = {(trace.task_ids[0], trace.part, trace.parts) for trace in made.scheduler.traces if trace.task_ids}
        wanted = {f"job/{index}": min(3, max(1, index)) for index in range(6)}
        assert pieces == {(task, part, parts) for task, parts in wanted.items() for part in range(parts)}
        await made.scheduler.until(lambda: not node.held_by_stages(), "freed activations")


async def test_stop_at_the_end_of_sequence_token(tmp_path: Path) -> None:
    end = expected_tokens([7], 4)[2]
    async with cluster(tmp_path) as made:
        (made.model / "config.json").write_text(
            f'{{"vocab_size": 97, "max_position_embeddings": 512, "eos_token_id": {end}}}', encoding="utf-8"
        )
        await made.start_node()
        item = inference_item("r1", [7], 50)
        item.inference.sampling.ignore_eos = False
        await made.assign(item)
        outcome = (await made.scheduler.outcome("r1")).inference
        assert outcome.finish_reason == types_pb2.FINISH_REASON_STOP
        assert list(outcome.token_ids) == expected_tokens([7], 3)


async def test_a_stop_string_ends_the_request_with_the_token_that_completes_it(tmp_path: Path) -> None:
    """Letters stand for tokens; the node needs no gateway to stop and to free the KV cache."""
    async with cluster(tmp_path) as made:
        write_letters(made.model)
        tokens = expected_tokens([7], 12)
        text = "".join(map(letter, tokens))
        node = await made.start_node()
        item = inference_item("r1", [7], 200)
        item.inference.sampling.stop.extend(["never", text[4:7]])
        item.inference.sampling.logprobs = 2
        await made.assign(item)
        outcome = (await made.scheduler.outcome("r1")).inference
        assert outcome.finish_reason == types_pb2.FINISH_REASON_STOP
        assert list(outcome.token_ids) == tokens[:7]
        await made.scheduler.until(lambda: not node.held_by_stages(), "freed KV caches")
        later = inference_item("r2", [7], 200)
        later.inference.sampling.stop.append(text[4:7])
        later.inference.sampling.min_tokens = 7
        later.inference.sampling.max_tokens = 10
        await made.assign(later)
        assert list((await made.scheduler.outcome("r2")).inference.token_ids) == tokens[:10]


async def test_without_a_vocabulary_the_gateway_finds_the_stop_string(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await made.start_node()
        item = inference_item("r1", [7], 5)
        item.inference.sampling.stop.append("a")
        await made.assign(item)
        outcome = (await made.scheduler.outcome("r1")).inference
        assert outcome.finish_reason == types_pb2.FINISH_REASON_LENGTH


async def test_logprobs_come_with_the_tokens_and_with_the_outcome(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        node = await made.start_node()
        item = inference_item("r1", [3, 1, 4], 100)
        item.inference.sampling.logprobs = 3
        await made.assign(item)
        streamed = await node.logprobs("r1")
        outcome = (await made.scheduler.outcome("r1")).inference
        assert list(outcome.logprobs) == streamed
        assert [told.top_token_ids[0] for told in streamed] == expected_tokens([3, 1, 4], 100)
        assert {len(told.top_logprobs) for told in streamed} == {3}


async def test_serving_and_training_share_the_weights(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        node = await made.start_node()
        for sequence in range(6):
            await made.assign(training_item("job", sequence, [[1, 2, 3], [4, 5, 6, 7]]))
        for index in range(8):
            await made.assign(inference_item(f"r{index}", [index + 1] * 4, 12))
        requests = [(await made.scheduler.outcome(f"r{index}")).inference for index in range(8)]
        training = [(await made.scheduler.outcome(f"job/{sequence}")).training for sequence in range(6)]
        for index, outcome in enumerate(requests):
            assert list(outcome.token_ids) == expected_tokens([index + 1] * 4, 12)
        losses = [outcome.loss for outcome in sorted(training, key=lambda outcome: outcome.weight_step)]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0]
        assert sorted(outcome.weight_step for outcome in training) == list(range(1, 7))
        assert {outcome.label_tokens for outcome in training} == {2 + 3}
        await made.scheduler.until(lambda: not node.held_by_stages(), "freed memory")
        assert {worker.stage.version for worker in node.engine.workers} == {6}
        # Both stages clipped by the norm of the whole model: one backward on each of two stages.
        assert {norm for worker in node.engine.workers for norm in worker.stage.clip_norms_sq} == {2.0}
        await made.assign(inference_item("late", [1], 1))
        late = (await made.scheduler.outcome("late")).inference.report
        assert [version.step for version in late.weight_versions] == [6]
        assert 0 <= late.staleness_s < 30


async def test_accumulation_takes_one_step_per_group(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        node = await made.start_node()
        for sequence in range(4):
            await made.assign(training_item("job", sequence, [[1, 2, 3]], gradient_accumulation_steps=2))
        outcomes = [(await made.scheduler.outcome(f"job/{sequence}")).training for sequence in range(4)]
        assert sorted(outcome.weight_step for outcome in outcomes) == [1, 1, 2, 2]
        assert [list(worker.stage.clip_norms_sq) for worker in node.engine.workers] == [[4.0, 4.0], [4.0, 4.0]]


async def test_traces_tell_what_ran(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await made.start_node()
        await made.assign(inference_item("r1", [3, 1, 4], 3))
        await made.assign(training_item("job", 0, [[1, 2, 3]]))
        await made.scheduler.outcome("r1")
        await made.scheduler.outcome("job/0")
        traces = made.scheduler.traces
        # The outcome is sent after the traces of the ops before it.
        assert len([t for t in traces if t.op == profile_pb2.OP_KIND_PREFILL]) == 2
        assert len([t for t in traces if t.op == profile_pb2.OP_KIND_DECODE]) == 2 * 2
        for op in (profile_pb2.OP_KIND_TRAIN_FORWARD, profile_pb2.OP_KIND_TRAIN_BACKWARD):
            assert [list(t.task_ids) for t in traces if t.op == op] == [["job/0"], ["job/0"]]
        assert [list(t.task_ids) for t in traces if t.op == profile_pb2.OP_KIND_OPTIMIZER_STEP] == [[], []]
        first = [t for t in traces if t.first_token]
        assert [(t.stage, list(t.task_ids), t.num_tokens) for t in first] == [(1, ["r1"], 3)]
        assert all(abs(t.begin_monotonic_s - time.monotonic()) < 60 and t.duration_s >= 0 for t in traces)


async def test_hello_and_heartbeats(tmp_path: Path) -> None:
    async with cluster(tmp_path, lease_s=0.02) as made:
        node = await made.start_node(num_stages=2, kv_capacity_tokens=4096, max_inflight_inference=7)
        hello = made.scheduler.hellos[0]
        assert hello.node_id == "node-0"
        assert hello.address == node.agent.address
        assert hello.num_stages == 2
        assert hello.model == "model"
        assert hello.max_inflight_inference == 7
        assert hello.kv_capacity_tokens == 4096
        assert hello.max_batch == 16
        assert hello.max_context_tokens == 512
        assert abs(hello.incarnation - time.time()) < 60
        await made.scheduler.until(lambda: len(made.scheduler.heartbeats) >= 3, "heartbeats")


async def test_a_node_that_drains_says_so_and_finishes_what_it_has(tmp_path: Path) -> None:
    gate = Gate()
    async with cluster(tmp_path) as made:
        node = await made.start_node(gate=gate)
        gate.close()
        await made.assign(inference_item("r1", [1, 2], 3))
        await gate.until_waiting()
        draining = asyncio.create_task(node.agent.drain())
        await made.scheduler.until(
            lambda: any(beat.draining for beat in made.scheduler.heartbeats), "a node that drains"
        )
        assert not draining.done()
        gate.open()
        await asyncio.wait_for(draining, TIMEOUT_S)
        # Nothing is left to be done for it: neither in the ledger nor towards the scheduler.
        assert node.agent._intake.num_tasks == 0
        assert not node.agent._session._reports
        assert len((await made.scheduler.outcome("r1")).inference.token_ids) == 3


async def test_draining_ends_when_its_time_is_up(tmp_path: Path) -> None:
    gate = Gate()
    async with cluster(tmp_path) as made:
        node = await made.start_node(gate=gate, drain_s=0.01)
        gate.close()
        await made.assign(inference_item("r1", [1, 2], 3))
        await gate.until_waiting()
        await asyncio.wait_for(node.agent.drain(), TIMEOUT_S)
        assert not made.scheduler.outcomes
        gate.open()


async def test_draining_ends_when_the_scheduler_goes_away(tmp_path: Path) -> None:
    gate = Gate()
    async with cluster(tmp_path) as made:
        node = await made.start_node(gate=gate, drain_s=3600.0)
        gate.close()
        await made.assign(inference_item("r1", [1, 2], 3))
        await gate.until_waiting()
        draining = asyncio.create_task(node.agent.drain())
        await made.scheduler.until(
            lambda: any(beat.draining for beat in made.scheduler.heartbeats), "a node that drains"
        )
        await made.scheduler.stop()
        await asyncio.wait_for(draining, TIMEOUT_S)
        await asyncio.wait_for(node.agent.drain(), TIMEOUT_S)  # nobody to tell: at once
        gate.open()
        await made.scheduler.start()


async def test_cancelled_request_frees_and_is_finished(tmp_path: Path) -> None:
    gate = Gate()
    async with cluster(tmp_path) as made:
        node = await made.start_node(gate=gate)
        gate.close()
        await made.assign(inference_item("r1", [1, 2], 100))
        await gate.until_waiting()
        made.scheduler.command("node-0", cancel=scheduler_service_pb2.CancelWork(task_id="r1"))
        made.scheduler.command("node-0", cancel=scheduler_service_pb2.CancelWork(task_id="early"))
        await made.assign(inference_item("early", [1, 2], 5))
        early = await made.scheduler.outcome("early")
        assert early.inference.error.code == errors_pb2.ERROR_CODE_CANCELLED
        assert "r1" not in made.scheduler.outcomes, "its op is still running"
        gate.open()
        outcome = (await made.scheduler.outcome("r1")).inference
        assert outcome.finish_reason == types_pb2.FINISH_REASON_CANCELLED
        assert outcome.error.code == errors_pb2.ERROR_CODE_CANCELLED
        await made.scheduler.until(lambda: not node.held_by_stages(), "freed KV caches")
        record = await made.ledger.record("r1")
        assert record is not None
        assert record.state is TaskState.DONE


async def test_cancelled_microbatch_frees_its_activations(tmp_path: Path) -> None:
    gate = Gate()
    async with cluster(tmp_path) as made:
        node = await made.start_node(gate=gate)
        gate.close()
        await made.assign(training_item("job", 0, [[1, 2, 3]]))
        await gate.until_waiting()
        made.scheduler.command("node-0", cancel=scheduler_service_pb2.CancelWork(task_id="job/0"))
        # Commands are followed in order; this one is refused at once and so tells that the cancellation was taken.
        made.scheduler.command("node-0", apply_weights=scheduler_service_pb2.ApplyWeights(sync_id="marker"))
        await made.scheduler.sync_finished(1)
        gate.open()
        outcome = (await made.scheduler.outcome("job/0")).training
        assert outcome.error.code == errors_pb2.ERROR_CODE_CANCELLED
        assert not outcome.HasField("loss")
        await made.scheduler.until(lambda: not node.held_by_stages(), "freed activations")
        assert {worker.stage.version for worker in node.engine.workers} == {0}


@pytest.mark.parametrize(
    ("item", "code"),
    [
        (inference_item("t", [1], 4, deadline_unix_s=1.0), errors_pb2.ERROR_CODE_DEADLINE_EXCEEDED),
        (inference_item("t", [1] * 500, 100), errors_pb2.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED),
        (inference_item("t", [97], 4), errors_pb2.ERROR_CODE_INVALID_REQUEST),
        (inference_item("t", [1] * 60, 60), errors_pb2.ERROR_CODE_RESOURCE_EXHAUSTED),
        (training_item("t", 0, [[1]]), errors_pb2.ERROR_CODE_INVALID_REQUEST),
        (training_item("t", 0, []), errors_pb2.ERROR_CODE_INVALID_REQUEST),
    ],
)
async def test_work_that_cannot_run_ends_with_a_reason(tmp_path: Path, item, code) -> None:
    async with cluster(tmp_path) as made:
        node = await made.start_node(kv_capacity_tokens=100)
        await made.assign(item)
        outcome = await made.scheduler.outcome(item.task_id)
        result = outcome.inference if outcome.HasField("inference") else outcome.training
        assert result.error.code == code
        assert result.error.message
        if outcome.HasField("inference"):
            tokens, streamed = (await node.stream((item.task_id, 0)))[item.task_id]
            assert (tokens, streamed) == ([], outcome.inference)


async def test_what_a_restarted_agent_had_taken_is_run_again(tmp_path: Path) -> None:
    gate = Gate()
    async with cluster(tmp_path) as made:
        async with contextlib.AsyncExitStack() as first_life:
            gate.close()
            await made.start_node(gate=gate, stack=first_life)
            await made.assign(inference_item("r1", [1, 2], 3))
            await gate.until_waiting()
        assert not made.scheduler.outcomes
        record = await made.ledger.record("r1")
        assert record is not None
        assert record.state is TaskState.ASSIGNED, "stopping ends no task"
        await made.start_node()
        outcome = await made.scheduler.outcome("r1")
        assert list(outcome.inference.token_ids) == expected_tokens([1, 2], 3)


async def test_tokens_resume_at_an_offset_on_a_new_stream(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        node = await made.start_node()
        attached_before = asyncio.create_task(node.stream(("r1", 0), ("r2", 2)))
        await made.assign(inference_item("r1", [5], 5))
        await made.assign(inference_item("r2", [6], 5))
        await made.assign(inference_item("r3", [7], 5))
        received = await attached_before
        assert received["r1"][0] == expected_tokens([5], 5)
        assert received["r2"][0] == expected_tokens([6], 5)[2:]
        await made.scheduler.outcome("r3")
        assert (await node.stream(("r3", 4)))["r3"][0] == expected_tokens([7], 5)[4:], "kept until it is fetched"


async def test_the_node_takes_no_more_than_its_bound(tmp_path: Path) -> None:
    gate = Gate()
    async with cluster(tmp_path) as made:
        node = await made.start_node(gate=gate, max_inflight_inference=2, max_queued_training=1)
        gate.close()
        for index in range(6):
            await made.assign(inference_item(f"r{index}", [1], 1))
        await gate.until_waiting()
        assert node.agent._intake.num_tasks <= 3
        gate.open()
        for index in range(6):
            await made.scheduler.outcome(f"r{index}")
        assert made.scheduler.num_outcomes == 6


async def test_the_next_turn_of_a_session_continues_the_kept_kv_cache(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        node = await made.start_node(prefix_cache_tokens=100, epoch_steps=7)
        first = [3, 1, 4]
        await made.assign(inference_item("t0", first, 6, session_id="s"))
        answer = list((await made.scheduler.outcome("t0")).inference.token_ids)
        prompt = [*first, *answer, 9, 9]
        await made.assign(inference_item("t1", prompt, 4, session_id="s"))
        outcome = (await made.scheduler.outcome("t1")).inference
        assert list(outcome.token_ids) == expected_tokens(prompt, 4)
        prefills = [trace for trace in made.scheduler.traces if trace.op == profile_pb2.OP_KIND_PREFILL]
        computed = [(trace.stage, trace.num_tokens, trace.context_tokens) for trace in prefills]
        # Three and six tokens, of which the newest had not been read.
        assert sorted(computed) == [(0, 3, 0), (0, 3, 8), (1, 3, 0), (1, 3, 8)]
        assert set(node.held_by_stages()) == {"t1"}
        (hello,) = made.scheduler.hellos
        assert (hello.prefix_cache_tokens, hello.epoch_steps) == (100, 7)
        assert (hello.max_prefill_tokens, hello.max_inflight_training) == (2048, 2)
        assert (hello.weight_handling, hello.gradient_buffers) == ("drain", 1)
