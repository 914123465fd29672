"""Rounds of weight synchronisation: who takes part, in which order, and how a round ends."""

from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.core.types import (
    ApplyWeights,
    Command,
    NodeDraining,
    NodeJoined,
    NodeLost,
    NodeRole,
    SnapshotReady,
    SyncChoice,
    SyncEnded,
    SyncIntervalSet,
    SyncMode,
    TakeSnapshot,
    TaskArrived,
    Tick,
)
from tests.unit.scheduler_core.support import assigned, core_with, microbatch, node, step_ended


def averaging(*node_ids: str, every: int = 2, **config: object) -> SchedulerCore:
    return core_with(*(node(node_id) for node_id in node_ids), policy="round_robin", sync_every_steps=every, **config)


def start_round(core: SchedulerCore, node_id: str, *, now_s: float = 1.0, steps: int = 2) -> list[TakeSnapshot]:
    commands = [command for _ in range(steps) for command in core.step(now_s, step_ended(node_id))]
    snapshots = [command for command in commands if isinstance(command, TakeSnapshot)]
    assert len(snapshots) == len(commands)
    return snapshots


def test_average_round_takes_all_snapshots_before_anyone_applies() -> None:
    core = averaging("a", "b", "c")
    snapshots = start_round(core, "b")
    assert [command.node_id for command in snapshots] == ["a", "b", "c"]
    sync_id = snapshots[0].sync_id
    assert core.snapshot().sync_id == sync_id
    assert core.step(1.1, SnapshotReady(sync_id, "c")) == []
    assert core.step(1.1, SnapshotReady(sync_id, "a")) == []
    assert core.step(1.2, SnapshotReady(sync_id, "b")) == [
        ApplyWeights(sync_id, "a", SyncMode.AVERAGE, ("b", "c")),
        ApplyWeights(sync_id, "b", SyncMode.AVERAGE, ("a", "c")),
        ApplyWeights(sync_id, "c", SyncMode.AVERAGE, ("a", "b")),
    ]
    for node_id in ("a", "b", "c"):
        core.step(1.3, SyncEnded(sync_id, node_id, ok=True, weight_step=7))
    assert core.snapshot().sync_id == ""
    assert [status.weight_step for status in core.snapshot().nodes] == [7, 7, 7]


def test_replace_round_copies_from_the_trainer_with_most_steps() -> None:
    core = core_with(*(node(name) for name in "abcd"), policy="separate", sync_every_steps=3)
    # "a" and "b" serve; "d" is ahead of "c".
    start_round(core, "c", steps=1)
    snapshots = start_round(core, "d", steps=3)
    assert [command.node_id for command in snapshots] == ["d"]
    assert core.step(1.1, SnapshotReady(snapshots[0].sync_id, "d")) == [
        ApplyWeights(snapshots[0].sync_id, "a", SyncMode.REPLACE, ("d",)),
        ApplyWeights(snapshots[0].sync_id, "b", SyncMode.REPLACE, ("d",)),
    ]


def test_only_steps_that_left_the_last_stage_count() -> None:
    core = core_with(node("a", 2), node("b", 2), policy="round_robin", sync_every_steps=1)
    assert core.step(1.0, step_ended("a", stage=0)) == []
    assert len(core.step(1.0, step_ended("a", stage=1))) == 2


def test_no_round_without_k_or_without_a_peer() -> None:
    assert start_round(averaging("a", "b", every=0), "a", steps=10) == []
    assert start_round(averaging("a"), "a", steps=10) == []


def test_interval_can_be_set_while_running() -> None:
    core = averaging("a", "b", every=0)
    assert start_round(core, "a", steps=3) == []
    assert core.step(1.0, SyncIntervalSet(4)) == []
    assert len(start_round(core, "a", steps=1)) == 2
    core.step(1.0, SyncIntervalSet(0))
    assert core.snapshot().sync_id != ""  # a running round goes on
    core.step(1.0, NodeLost("b"))
    assert start_round(core, "a", steps=10) == []


def test_one_round_at_a_time_and_the_next_after_its_end() -> None:
    core = averaging("a", "b")
    sync_id = start_round(core, "a")[0].sync_id
    assert start_round(core, "a", steps=5) == []
    for node_id in ("a", "b"):
        core.step(2.0, SnapshotReady(sync_id, node_id))
    for node_id in ("a", "b"):
        core.step(2.0, SyncEnded(sync_id, node_id, ok=True))
    following = start_round(core, "a", steps=1)
    assert len(following) == 2
    assert following[0].sync_id != sync_id


def test_timeout_abandons_the_round_and_late_answers_are_ignored() -> None:
    core = averaging("a", "b", sync_timeout_s=5.0)
    sync_id = start_round(core, "a", now_s=1.0)[0].sync_id
    assert core.next_wakeup_s() == 6.0
    core.step(5.9, Tick())
    assert core.snapshot().sync_id == sync_id
    core.step(6.0, Tick())
    assert core.snapshot().sync_id == ""
    assert core.next_wakeup_s() is None
    assert core.step(6.1, SnapshotReady(sync_id, "a")) == []
    assert core.step(6.1, SnapshotReady(sync_id, "b")) == []


def test_lost_node_leaves_and_the_others_go_on() -> None:
    core = averaging("a", "b", "c")
    sync_id = start_round(core, "a")[0].sync_id
    core.step(1.1, SnapshotReady(sync_id, "a"))
    core.step(1.1, SnapshotReady(sync_id, "b"))
    assert core.step(1.2, NodeLost("c")) == [
        ApplyWeights(sync_id, "a", SyncMode.AVERAGE, ("b",)),
        ApplyWeights(sync_id, "b", SyncMode.AVERAGE, ("a",)),
    ]
    core.step(1.3, SyncEnded(sync_id, "a", ok=True))
    core.step(1.3, NodeLost("b"))
    assert core.snapshot().sync_id == ""


def test_round_of_two_ends_with_the_loss_of_one() -> None:
    core = averaging("a", "b")
    start_round(core, "a")
    assert core.step(1.2, NodeLost("b")) == []
    assert core.snapshot().sync_id == ""


def test_failed_snapshot_takes_the_node_out_of_the_round() -> None:
    core = averaging("a", "b", "c")
    sync_id = start_round(core, "a")[0].sync_id
    assert core.step(1.1, SyncEnded(sync_id, "c", ok=False)) == []
    core.step(1.1, SnapshotReady(sync_id, "a"))
    commands = core.step(1.2, SnapshotReady(sync_id, "b"))
    assert [command.node_id for command in commands if isinstance(command, ApplyWeights)] == ["a", "b"]


def test_failed_source_of_a_replace_round_ends_it() -> None:
    core = core_with(node("a"), node("b"), policy="separate", sync_every_steps=1)
    sync_id = start_round(core, "b", steps=1)[0].sync_id
    assert core.step(1.1, SyncEnded(sync_id, "b", ok=False)) == []
    assert core.snapshot().sync_id == ""


def finish_round(core: SchedulerCore, sync_id: str, *node_ids: str, ok: bool = True) -> list[Command]:
    """Both phases on the given nodes; what the core asked for in the second."""
    applied = [command for node_id in node_ids for command in core.step(2.0, SnapshotReady(sync_id, node_id))]
    for command in applied:
        assert isinstance(command, ApplyWeights)
        core.step(2.1, SyncEnded(sync_id, command.node_id, ok=ok))
    return applied


def test_node_that_joins_during_a_round_catches_up_in_the_next() -> None:
    core = averaging("a", "b")
    sync_id = start_round(core, "a")[0].sync_id
    core.step(1.1, NodeJoined(node("c")))
    assert [command.node_id for command in finish_round(core, sync_id, "a", "b")] == ["a", "b"]
    snapshots = start_round(core, "c", steps=1)
    assert [command.node_id for command in snapshots] == ["a", "b"], "untrained weights would spoil the mean"
    sync_id = snapshots[0].sync_id
    assert finish_round(core, sync_id, "a", "b") == [
        ApplyWeights(sync_id, "a", SyncMode.AVERAGE, ("b",)),
        ApplyWeights(sync_id, "b", SyncMode.AVERAGE, ("a",)),
        ApplyWeights(sync_id, "c", SyncMode.REPLACE, ("a",)),
    ]
    assert [command.node_id for command in start_round(core, "c")] == ["a", "b", "c"]


def test_node_that_joins_after_training_began_catches_up_at_once() -> None:
    core = averaging("a", "b", every=100)
    start_round(core, "b", steps=3)
    snapshots = core.step(1.5, NodeJoined(node("c")))
    assert [command.node_id for command in snapshots if isinstance(command, TakeSnapshot)] == ["a", "b"]
    applied = finish_round(core, core.snapshot().sync_id, "a", "b")
    assert applied[-1] == ApplyWeights(applied[-1].sync_id, "c", SyncMode.REPLACE, ("b",)), "of whom trained most"


def test_node_that_failed_to_catch_up_waits_for_the_next_round_and_is_still_no_source() -> None:
    core = averaging("a", "b", every=3)
    start_round(core, "a", steps=1)
    core.step(1.5, NodeJoined(node("c")))
    finish_round(core, core.snapshot().sync_id, "a", "b", ok=False)
    assert core.snapshot().sync_id == ""
    assert start_round(core, "a", steps=2) == [], "no round after every step for a node that cannot"
    assert [command.node_id for command in start_round(core, "a", steps=1)] == ["a", "b"]


def test_one_node_alone_gives_its_weights_to_a_new_one_and_keeps_its_own() -> None:
    core = averaging("a", every=100)
    start_round(core, "a", steps=1)
    (snapshot,) = core.step(1.5, NodeJoined(node("b")))
    assert isinstance(snapshot, TakeSnapshot)
    assert finish_round(core, snapshot.sync_id, "a") == [ApplyWeights(snapshot.sync_id, "b", SyncMode.REPLACE, ("a",))]
    assert core.snapshot().sync_id == ""


def test_a_new_node_is_a_source_when_all_who_knew_more_are_gone() -> None:
    core = averaging("a", every=2)
    start_round(core, "a", steps=1)
    core.step(1.5, NodeJoined(node("b")))
    core.step(1.6, NodeLost("a"))
    assert core.snapshot().sync_id == ""
    core.step(1.7, NodeJoined(node("c")))
    assert [command.node_id for command in start_round(core, "b")] == ["b", "c"]


def test_a_node_that_comes_back_from_a_checkpoint_is_a_source_at_once() -> None:
    core = averaging("a", "b")
    start_round(core, "a", steps=1)
    core.step(1.5, NodeLost("b"))
    assert core.step(1.6, NodeJoined(node("b", is_restored=True))) == []
    assert [command.node_id for command in start_round(core, "a", steps=1)] == ["a", "b"]


def test_nodes_that_join_before_anybody_trained_are_equals() -> None:
    core = averaging("a", "b")
    assert core.step(1.0, NodeJoined(node("c"))) == []
    assert [command.node_id for command in start_round(core, "a")] == ["a", "b", "c"]


def test_a_new_trainer_of_separate_clusters_gets_the_weights_first() -> None:
    core = core_with(node("a"), node("b"), policy="separate", sync_every_steps=1)
    finish_round(core, start_round(core, "b", steps=1)[0].sync_id, "b")
    core.step(3.0, NodeLost("b"))
    (snapshot,) = core.step(3.1, NodeJoined(node("c")))
    assert snapshot == TakeSnapshot(snapshot.sync_id, "a"), "the node that serves holds what was trained"
    assert finish_round(core, snapshot.sync_id, "a") == [ApplyWeights(snapshot.sync_id, "c", SyncMode.REPLACE, ("a",))]
    assert [command.node_id for command in start_round(core, "c", now_s=4.0, steps=1)] == ["c"]


def test_a_draining_node_gets_nothing_more_and_its_loss_ends_no_round_of_others() -> None:
    core = averaging("a", "b", "c")
    core.step(0.5, NodeDraining("c"))
    snapshots = start_round(core, "a")
    assert [command.node_id for command in snapshots] == ["a", "b"]
    core.step(1.1, NodeLost("c"))
    assert [command.node_id for command in finish_round(core, snapshots[0].sync_id, "a", "b")] == ["a", "b"]


def test_drain_during_a_round_ends_it_for_nobody() -> None:
    core = averaging("a", "b", "c")
    sync_id = start_round(core, "a")[0].sync_id
    core.step(1.1, NodeDraining("b"))
    assert [command.node_id for command in finish_round(core, sync_id, "a", "b", "c")] == ["a", "b", "c"]
    assert core.snapshot().sync_id == ""
    assert [command.node_id for command in start_round(core, "a")] == ["a", "c"]


def test_no_synchronisation_whatever_the_policy_and_the_interval() -> None:
    core = averaging("a", "b", every=0, sync=SyncChoice.NONE)
    core.step(0.5, SyncIntervalSet(1))
    assert start_round(core, "a", steps=5) == []
    assert core.step(1.0, NodeJoined(node("c"))) == []


def test_average_can_be_asked_of_separate_clusters() -> None:
    core = core_with(node("a"), node("b"), policy="separate", sync_every_steps=1, sync=SyncChoice.AVERAGE)
    assert [command.node_id for command in start_round(core, "b", steps=1)] == ["a", "b"]


def checkpointing(*node_ids: str) -> SchedulerCore:
    specs = [node(node_id) for node_id in node_ids]
    return core_with(*specs, policy="lemix", sync_every_steps=2, sync=SyncChoice.CHECKPOINT)


def roles(core: SchedulerCore) -> dict[str, NodeRole]:
    return {status.node_id: status.role for status in core.snapshot().nodes}


def test_with_checkpoints_one_node_trains_for_all() -> None:
    core = checkpointing("a", "b", "c")
    assert roles(core) == {"a": NodeRole.BOTH, "b": NodeRole.SERVE, "c": NodeRole.SERVE}
    sync_id = start_round(core, "a")[0].sync_id
    assert finish_round(core, sync_id, "a") == [
        ApplyWeights(sync_id, "b", SyncMode.REPLACE, ("a",)),
        ApplyWeights(sync_id, "c", SyncMode.REPLACE, ("a",)),
    ]


def test_with_checkpoints_micro_batches_go_to_the_trainer() -> None:
    core = checkpointing("a", "b")
    assert assigned(core.step(0.1, TaskArrived(microbatch("m1")))) == [("m1", "a")]
    assert assigned(core.step(0.1, TaskArrived(microbatch("m2")))) == [("m2", "a")]


def test_the_trainer_stays_when_a_node_joins_and_a_current_one_follows_it() -> None:
    core = checkpointing("b", "c")
    finish_round(core, start_round(core, "b")[0].sync_id, "b")
    core.step(3.0, NodeJoined(node("a")))
    assert roles(core) == {"a": NodeRole.SERVE, "b": NodeRole.BOTH, "c": NodeRole.SERVE}
    core.step(3.1, NodeLost("b"))
    assert roles(core) == {"a": NodeRole.SERVE, "c": NodeRole.BOTH}, "not the new one, which holds untrained weights"
