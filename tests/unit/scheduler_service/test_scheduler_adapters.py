"""Adapters of the nodes: served while their jobs want it, freed otherwise, and part of rounds of synchronisation."""

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.v1 import types_pb2
from services.scheduler.adapters import AdapterDesk

WANTED = types_pb2.TrainingJob(job_id="job-1", served_model="m:job-1", created_unix_s=5.0)
UNWANTED = types_pb2.TrainingJob(job_id="job-2")


class Made:
    def __init__(self) -> None:
        self.desk = AdapterDesk()
        self.freed: list[tuple[str, str]] = []
        self.asked: list[str] = []
        self.away = False
        self.desk.send = self._send
        self.desk.find_job = self._find
        for name in ("a", "b", "c"):
            self.desk.joined(name, "m")

    def _send(self, node_id: str, message: pb.NodeSessionResponse) -> bool:
        self.freed.append((node_id, message.forget_adapter.adapter_id))
        return True

    async def _find(self, job_id: str) -> types_pb2.TrainingJob | None:
        self.asked.append(job_id)
        if self.away:
            raise LemixError(ErrorCode.UNAVAILABLE, "the store is away")
        return {"job-1": WANTED, "job-2": UNWANTED}.get(job_id)


def held(adapter_id: str, *, isolated: bool = True) -> pb.HeldAdapter:
    return pb.HeldAdapter(adapter_id=adapter_id, lora=types_pb2.Lora(rank=4), isolated=isolated)


async def test_only_news_is_told_and_jobs_are_asked_once() -> None:
    made = Made()
    assert await made.desk.told("a", []) == ()
    assert await made.desk.told("a", []) is None
    assert await made.desk.told("a", [held("job-1"), held("online", isolated=False)]) == ("job-1",)
    assert await made.desk.told("a", [held("job-1")]) is None
    assert await made.desk.told("b", [held("job-1")]) == ("job-1",)
    assert made.asked == ["job-1"]
    (model,) = made.desk.models()
    assert (model.id, model.parent, model.created_unix_s) == ("m:job-1", "m", 5.0)
    assert made.freed == []
    made.desk.left("a")
    made.desk.left("b")
    assert made.desk.models() == []


async def test_what_nobody_wants_is_freed() -> None:
    made = Made()
    assert await made.desk.told("a", [held("job-2")]) == ()
    assert made.freed == [("a", "job-2")]
    await made.desk.told("a", [held("job-1")])
    made.freed.clear()
    made.desk.free("job-1")
    assert made.freed == [("a", "job-1"), ("b", "job-1"), ("c", "job-1")]


async def test_without_the_store_nothing_is_freed_and_it_is_asked_again() -> None:
    made = Made()
    made.away = True
    assert await made.desk.told("a", [held("job-2")]) == ("job-2",)
    made.away = False
    assert await made.desk.told("a", [held("job-2")]) == ()
    assert made.freed == [("a", "job-2")]


async def test_a_model_that_is_deleted_while_its_job_is_looked_up_is_not_taken_for_wanted() -> None:
    made = Made()

    async def find(job_id: str) -> types_pb2.TrainingJob | None:
        made.desk.free(job_id)
        return WANTED  # as it was when it was read

    made.desk.find_job = find
    await made.desk.told("a", [held("job-1")])
    made.freed.clear()
    made.desk.find_job = made._find
    made.desk.joined("b", "m")
    assert (await made.desk.told("b", [held("job-1")]), made.asked) == (("job-1",), ["job-1"])


async def test_a_node_that_leaves_while_its_adapters_are_looked_up_holds_none() -> None:
    made = Made()

    async def find(job_id: str) -> types_pb2.TrainingJob | None:
        made.desk.left("a")
        return WANTED

    made.desk.find_job = find
    assert await made.desk.told("a", [held("job-1")], weights_changed=True) is None
    assert made.desk.models() == []
    await made.desk.told("b", [held("online", isolated=False)])
    assert made.desk.snapshot("s", "b").skip_weights


async def test_a_job_that_has_expired_keeps_its_model() -> None:
    made = Made()
    assert await made.desk.told("a", [held("old")]) == ("old",)


async def test_a_round_averages_who_holds_an_adapter_and_copies_it_to_the_others() -> None:
    made = Made()
    for name in ("a", "b"):
        await made.desk.told(name, [held("job-1")])
    taken = {name: made.desk.snapshot("s", name) for name in ("a", "b", "c")}
    assert [[item.adapter_id for item in taken[name].adapters] for name in taken] == [["job-1"], ["job-1"], []]
    assert all(message.skip_weights for message in taken.values())
    # What changes meanwhile is of the next round.
    await made.desk.told("c", [held("online", isolated=False)], weights_changed=True)
    found = {}
    addresses = {"a": "a:1", "b": "b:1", "c": "c:1"}
    for name in addresses:
        message = pb.ApplyWeights(sync_id="s", mode=pb.SYNC_MODE_AVERAGE)
        made.desk.apply(message, name, {peer: address for peer, address in addresses.items() if peer != name})
        assert message.skip_weights
        (item,) = message.adapters
        found[name] = item.mode, list(item.source_addresses)
    assert found == {
        "a": (pb.SYNC_MODE_AVERAGE, ["b:1"]),
        "b": (pb.SYNC_MODE_AVERAGE, ["a:1"]),
        "c": (pb.SYNC_MODE_REPLACE, ["a:1"]),
    }
    assert not made.desk.snapshot("t", "c").skip_weights


async def test_a_copy_goes_from_the_source_that_holds_it() -> None:
    made = Made()
    await made.desk.told("a", [held("job-1")], weights_changed=True)
    made.desk.snapshot("s", "a")
    for target, sources, expected in (("b", {"a": "a:1"}, ["a:1"]), ("a", {"b": "b:1"}, [])):
        message = pb.ApplyWeights(sync_id="s", mode=pb.SYNC_MODE_REPLACE)
        made.desk.apply(message, target, sources)
        assert not message.skip_weights
        assert [address for item in message.adapters for address in item.source_addresses] == expected


async def test_without_adapters_rounds_are_about_the_weights() -> None:
    made = Made()
    assert made.desk.snapshot("s", "a") == pb.TakeSnapshot(sync_id="s")
    message = pb.ApplyWeights(sync_id="unknown", mode=pb.SYNC_MODE_AVERAGE)
    made.desk.apply(message, "a", {"b": "b:1"})
    assert message == pb.ApplyWeights(sync_id="unknown", mode=pb.SYNC_MODE_AVERAGE)
