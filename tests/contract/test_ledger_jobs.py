"""What every ledger promises about files, feedback and jobs."""

import asyncio
import functools

from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.ledger import Ledger
from services.ledger.types import MAX_JOB_EVENTS
from tests.contract.items import example, job
from tests.contract.stores import Store, gone


async def test_a_file_grows_by_batches(ledger: Ledger) -> None:
    record = work_pb2.FileRecord(file_id="f", filename="a.jsonl", size_bytes=10, num_examples=2)
    await ledger.put_file(record, [example(0), example(1)])
    record.num_examples = 3
    await ledger.put_file(record, [example(2)])
    assert await ledger.get_file("f") == record
    assert await ledger.read_examples("f", [2, 0]) == [example(2), example(0)]
    assert await ledger.read_examples("f", range(1, 9)) == [example(1), example(2)]
    assert await ledger.read_examples("f", []) == []


async def test_an_unknown_file(ledger: Ledger) -> None:
    assert await ledger.get_file("none") is None
    assert await ledger.read_examples("none", [0]) == []


async def test_a_deleted_file_is_gone(ledger):
    await ledger.put_file(work_pb2.FileRecord(file_id="f"), [example(0)])
    await ledger.put_file(work_pb2.FileRecord(file_id="other"), [example(1)])
    await ledger.delete_file("f")
    assert await ledger.get_file("f") is None
    assert await ledger.read_examples("f", [0]) == []
    assert await ledger.read_examples("other", [0]) == [example(1)]
    await ledger.delete_file("f")  # again, and unknown: no error


async def test_feedback_positions_are_dense_and_idempotent(ledger: Ledger) -> None:
    await ledger.put_file(work_pb2.FileRecord(file_id="f"), [])
    assert await ledger.append_feedback("f", example(0), "r0") == 1
    assert await ledger.append_feedback("f", example(1), "") == 2
    assert await ledger.append_feedback("f", example(9), "r0") == 1
    assert await ledger.append_feedback("f", example(2), "") == 3
    assert await ledger.read_examples("f", range(5)) == [example(0), example(1), example(2)]
    stored = await ledger.get_file("f")
    assert stored is not None
    assert stored.num_examples == 3


async def test_concurrent_feedback_of_one_request_is_stored_once(ledger: Ledger) -> None:
    positions = await asyncio.gather(*(ledger.append_feedback("f", example(0), "r") for _ in range(10)))
    assert set(positions) == {1}
    assert len(await ledger.read_examples("f", range(5))) == 1


async def test_jobs_are_listed_oldest_first_and_overwritten(ledger: Ledger) -> None:
    await ledger.put_job(job("b", created_unix_s=2.0))
    await ledger.put_job(job("a", created_unix_s=3.0))
    await ledger.put_job(job("c", created_unix_s=1.0))
    changed = job("b", created_unix_s=2.0, trained=5)
    assert await ledger.put_job(changed) == changed
    assert [record.job.job_id for record in await ledger.list_jobs()] == ["c", "b", "a"]
    assert await ledger.get_job("b") == changed
    assert await ledger.get_job("z") is None


async def test_the_newest_jobs_come_first_and_no_more_than_asked(ledger: Ledger) -> None:
    assert await ledger.newest_jobs(3) == []
    for job_id, created_unix_s in (("b", 2.0), ("a", 3.0), ("c", 1.0)):
        await ledger.put_job(job(job_id, created_unix_s=created_unix_s))
    assert [record.job.job_id for record in await ledger.newest_jobs(2)] == ["a", "b"]
    assert [record.job.job_id for record in await ledger.newest_jobs(9)] == ["a", "b", "c"]


async def test_expired_jobs_take_no_place_among_the_newest(store: Store) -> None:
    ledger = await store.open(retention_s=0.03)
    await ledger.put_job(job("running", created_unix_s=1.0))
    for job_id in "abc":
        ended = job(job_id, created_unix_s=2.0)
        ended.job.status = types_pb2.JOB_STATUS_SUCCEEDED
        await ledger.put_job(ended)
        await gone(functools.partial(ledger.get_job, job_id))
    assert [record.job.job_id for record in await ledger.newest_jobs(1)] == ["running"]


async def test_a_repeated_job_request_returns_the_first_job(ledger: Ledger) -> None:
    first = job("a", request_id="r")
    assert await ledger.put_job(first) == first
    assert await ledger.put_job(job("b", request_id="r")) == first
    assert await ledger.get_job("b") is None
    update = job("a", request_id="r", trained=3)
    assert await ledger.put_job(update) == update


async def test_ended_jobs_expire_and_running_ones_do_not(store: Store) -> None:
    ledger = await store.open(retention_s=0.03)
    ended = job("ended", request_id="r")
    ended.job.status = types_pb2.JOB_STATUS_SUCCEEDED
    await ledger.put_job(job("running"))
    await ledger.put_job(ended)
    await gone(lambda: ledger.get_job("ended"))
    assert [record.job.job_id for record in await ledger.list_jobs()] == ["running"]
    again = job("again", request_id="r")
    assert await ledger.put_job(again) == again


async def test_the_history_of_a_job_keeps_its_newest_events(ledger: Ledger) -> None:
    assert await ledger.read_job_events("a") == []
    events = [types_pb2.JobEvent(sequence=number) for number in range(1, MAX_JOB_EVENTS + 6)]
    await ledger.append_job_events("a", events[:3])
    await ledger.append_job_events("a", [])
    await ledger.append_job_events("a", events[3:])
    assert await ledger.read_job_events("a") == events[5:]
