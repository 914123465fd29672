"""Who may go on from whose checkpoint: nothing trained may get lost, and what was not seen counts as trained."""

from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.v1 import types_pb2
from services.scheduler.lineage import Lineage

REPLACE, AVERAGE = pb.SYNC_MODE_REPLACE, pb.SYNC_MODE_AVERAGE


class Nodes:
    """Nodes a, b and c, and what they tell."""

    def __init__(self) -> None:
        self.lineage = Lineage()
        for name in ("a", "b", "c"):
            self.joins(name)

    def joins(self, name: str, *, incarnation: int = 1, changed: bool = False, held: str = "") -> None:
        checkpoints = [types_pb2.Checkpoint(checkpoint_id=held)] if held else []
        self.lineage.joined(
            pb.NodeHello(
                node_id=name,
                address=f"{name}:1",
                incarnation=incarnation,
                weights_changed=changed,
                checkpoints=checkpoints,
            )
        )

    def trains(self, name: str) -> None:
        self.lineage.trained(name)

    def saves(self, name: str, checkpoint_id: str, reason: str = "interval") -> None:
        checkpoint = types_pb2.Checkpoint(checkpoint_id=checkpoint_id, reason=reason)
        self.lineage.saved(name, pb.CheckpointReport(checkpoint=checkpoint))

    def asks_to_restore(self, name: str, checkpoint_id: str) -> None:
        command = pb.CheckpointCommand(restore=checkpoint_id)
        self.lineage.sent(name, pb.NodeSessionResponse(checkpoint=command))

    def snapshots(self, name: str, sync_id: str) -> None:
        self.lineage.sent(name, pb.NodeSessionResponse(take_snapshot=pb.TakeSnapshot(sync_id=sync_id)))
        self.lineage.finished(name, pb.SyncFinished(sync_id=sync_id, snapshot_only=True))

    def asks_to_apply(self, name: str, sync_id: str, mode: pb.SyncMode, *sources: str) -> None:
        command = pb.ApplyWeights(sync_id=sync_id, mode=mode, source_addresses=[f"{source}:1" for source in sources])
        self.lineage.sent(name, pb.NodeSessionResponse(apply_weights=command))

    def applied(self, name: str, sync_id: str) -> None:
        self.lineage.finished(name, pb.SyncFinished(sync_id=sync_id))

    def averages(self, sync_id: str, *names: str) -> None:
        for name in names:
            self.snapshots(name, sync_id)
        for name in names:
            self.asks_to_apply(name, sync_id, AVERAGE, *names)
            self.applied(name, sync_id)

    def copies(self, sync_id: str, source: str, target: str) -> None:
        self.snapshots(source, sync_id)
        self.asks_to_apply(target, sync_id, REPLACE, source)
        self.applied(target, sync_id)

    def may_go_on(self, name: str, checkpoint_id: str) -> bool:
        return not self.lineage.obstacle(name, checkpoint_id)


def test_a_node_as_the_model_directory_may_go_on_from_anything() -> None:
    nodes = Nodes()
    nodes.trains("a")
    nodes.saves("a", "a:1:1")
    assert nodes.may_go_on("b", "a:1:1")
    assert nodes.may_go_on("b", "of an earlier scheduler")
    nodes.trains("b")
    assert not nodes.may_go_on("b", "a:1:1")
    nodes.joins("c", incarnation=2, changed=True)
    assert not nodes.may_go_on("c", "a:1:1"), "what it holds was not seen"
    assert not nodes.may_go_on("unknown", "a:1:1")


def test_a_copy_may_go_on_from_what_its_source_saved_later() -> None:
    nodes = Nodes()
    nodes.trains("a")
    nodes.saves("a", "before")
    nodes.copies("s1", "a", "b")
    assert not nodes.may_go_on("b", "before"), "it holds more than that"
    assert nodes.lineage.taker("a", "before") == "b"
    nodes.trains("a")
    nodes.saves("a", "after")
    assert nodes.may_go_on("b", "after")
    assert nodes.lineage.taker("a", "after") == ""
    nodes.copies("s2", "b", "c")
    assert not nodes.may_go_on("c", "after"), "from a round that this checkpoint knows nothing of"


def test_replicas_have_their_average_in_common() -> None:
    nodes = Nodes()
    nodes.trains("a")
    nodes.trains("b")
    nodes.averages("s1", "a", "b")
    nodes.trains("a")
    nodes.saves("a", "a:1:2")
    assert nodes.may_go_on("b", "a:1:2")
    nodes.averages("s2", "a", "b")
    assert nodes.lineage.taker("a", "a:1:2") == "b"
    assert not nodes.may_go_on("b", "a:1:2")


def test_who_took_from_a_node_that_did_not_see_the_end_of_the_round() -> None:
    nodes = Nodes()
    nodes.trains("a")
    nodes.saves("a", "a:1:1")
    for name in ("a", "b"):
        nodes.snapshots(name, "s1")
    nodes.asks_to_apply("b", "s1", AVERAGE, "a", "b")
    nodes.applied("b", "s1")
    assert nodes.lineage.taker("a", "a:1:1") == "b"


def test_steps_during_a_round_are_kept_and_count() -> None:
    nodes = Nodes()
    nodes.snapshots("a", "s1")
    nodes.snapshots("b", "s1")
    nodes.trains("b")
    for name in ("a", "b"):
        nodes.asks_to_apply(name, "s1", AVERAGE, "a", "b")
        nodes.applied(name, "s1")
    nodes.saves("a", "a:1:1")
    assert nodes.may_go_on("c", "a:1:1")
    assert not nodes.may_go_on("b", "a:1:1")


def test_what_was_restored_or_published_is_a_common_version() -> None:
    nodes = Nodes()
    nodes.trains("a")
    nodes.saves("a", "a:1:1")
    nodes.trains("b")
    nodes.asks_to_restore("b", "a:1:1")
    nodes.saves("b", "b:1:2", "rollback")
    nodes.asks_to_apply("c", "checkpoint/a:1:1", REPLACE, "a")
    nodes.applied("c", "checkpoint/a:1:1")
    nodes.trains("a")
    nodes.saves("a", "a:1:2")
    assert nodes.may_go_on("b", "a:1:2")
    assert nodes.may_go_on("c", "a:1:2")
    assert nodes.may_go_on("c", "b:1:2"), "it descends from the same checkpoint"
    nodes.trains("b")
    assert not nodes.may_go_on("b", "a:1:2")


def test_a_restore_that_was_not_saved_counts_as_training() -> None:
    nodes = Nodes()
    nodes.saves("a", "a:1:1")
    nodes.asks_to_restore("b", "a:1:1")
    nodes.lineage.saved("b", pb.CheckpointReport(error={"message": "the disk is full"}))
    assert not nodes.may_go_on("b", "a:1:1")


def test_a_node_that_started_anew_holds_its_newest_checkpoint() -> None:
    nodes = Nodes()
    nodes.trains("a")
    nodes.saves("a", "a:1:1")
    nodes.copies("s1", "a", "b")
    nodes.trains("b")
    nodes.joins("b", incarnation=2, changed=True, held="a:1:1")
    assert nodes.may_go_on("b", "a:1:1")
    nodes.trains("b")
    nodes.joins("b", incarnation=2, changed=True, held="a:1:1")
    assert not nodes.may_go_on("b", "a:1:1"), "only its session is new"
