"""Rounds of weight synchronisation: who takes part, in which order, and how a round ends."""

import pytest

from services.scheduler.core.commands import ApplyWeights, Command, Defer, SyncMode, TakeSnapshot, WarnBehind
from services.scheduler.core.config import SyncChoice
from services.scheduler.core.events import (
    NodeDraining,
    NodeJoined,
    NodeLost,
    SnapshotReady,
    SyncEnded,
    SyncIntervalSet,
    TaskArrived,
    Tick,
    WeightsTold,
)
from services.scheduler.core.node_spec import NodeRole
from services.scheduler.core.scheduler import SchedulerCore
from tests.unit.scheduler_core.support import assigned, core_with, microbatch, node, request, step_ended


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
    assert core.snapshot().sync_id != sync_id, "although nobody trains any more"
    sync_id = core.snapshot().sync_id
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
    assert core.step(1.6, NodeJoined(node("b", incarnation=2, trained_s=0.8))) == []
    assert [command.node_id for command in start_round(core, "a", steps=1)] == ["a", "b"]


def test_a_checkpoint_from_before_the_last_round_of_its_node_is_behind() -> None:
    """All that it holds was passed on then; what was trained here since is lost with the copy."""
    core = averaging("a", "b", "c")
    finish_round(core, start_round(core, "a", now_s=2.0)[0].sync_id, "a", "b", "c")
    core.step(3.0, NodeLost("b"))
    core.step(3.0, NodeLost("c"))
    assert core.step(4.0, NodeJoined(node("b", incarnation=2, trained_s=2.5))) == [], "it trained since that round"
    (first, *_) = core.step(4.0, NodeJoined(node("c", incarnation=2, trained_s=1.5)))
    assert isinstance(first, TakeSnapshot)
    assert finish_round(core, first.sync_id, "a", "b")[-1].mode is SyncMode.REPLACE


def test_a_checkpoint_of_an_unknown_node_is_behind_when_others_went_on() -> None:
    core = averaging("a", "b")
    finish_round(core, start_round(core, "a", now_s=2.0)[0].sync_id, "a", "b")
    assert core.step(3.0, NodeJoined(node("d", incarnation=5, trained_s=1.0))) != []
    assert roles(core)["d"] is NodeRole.UNUSED


def test_the_same_process_with_a_new_stream_keeps_what_it_trained() -> None:
    specs = [node(name, incarnation=7) for name in "ab"]
    core = core_with(*specs, policy="round_robin", sync_every_steps=3)
    start_round(core, "a", steps=1)
    start_round(core, "b", steps=2)
    core.step(1.5, NodeLost("b"))
    assert core.step(1.6, NodeJoined(specs[1])) == []
    assert roles(core) == {"a": NodeRole.BOTH, "b": NodeRole.BOTH}
    snapshots = start_round(core, "b", steps=1)
    assert [command.node_id for command in snapshots] == ["a", "b"], "its steps still count"


def test_another_process_that_takes_the_stream_over_has_other_weights() -> None:
    core = core_with(*(node(name, incarnation=7) for name in "ab"), policy="round_robin", sync_every_steps=9)
    start_round(core, "a", steps=1)
    (snapshot,) = core.step(1.6, NodeJoined(node("b", incarnation=8)))
    assert isinstance(snapshot, TakeSnapshot)
    assert roles(core) == {"a": NodeRole.BOTH, "b": NodeRole.UNUSED}


@pytest.mark.parametrize("names", ["ac", "ca"])
def test_a_new_scheduler_learns_from_the_nodes_who_was_trained(names: str) -> None:
    specs = {"a": node("a", incarnation=7, trained_s=-50.0), "c": node("c", incarnation=9)}
    core = core_with(*(specs[name] for name in names), policy="round_robin", sync_every_steps=100)
    assert roles(core) == {"a": NodeRole.BOTH, "c": NodeRole.UNUSED}
    applied = finish_round(core, core.snapshot().sync_id, "a")
    assert applied == [ApplyWeights(applied[0].sync_id, "c", SyncMode.REPLACE, ("a",))]
    assert roles(core) == {"a": NodeRole.BOTH, "c": NodeRole.BOTH}


def test_who_tells_that_its_weights_were_trained_is_ahead_of_a_new_node() -> None:
    core = averaging("a")
    core.step(1.0, WeightsTold("a", 3, 0.5))
    assert isinstance(core.step(2.0, NodeJoined(node("b")))[0], TakeSnapshot)


def test_a_node_that_is_behind_gets_no_work_until_it_holds_what_others_trained() -> None:
    core = averaging("a", every=100)
    start_round(core, "a", steps=1)
    core.step(1.0, NodeJoined(node("b")))
    given = [core.step(1.1, TaskArrived(request(f"r{index}"))) for index in range(4)]
    assert [assigned(commands) for commands in given] == [[(f"r{index}", "a")] for index in range(4)]
    assert assigned(core.step(1.2, TaskArrived(microbatch("m")))) == [("m", "a")]
    finish_round(core, core.snapshot().sync_id, "a")
    later = [assigned(core.step(3.0, TaskArrived(request(f"s{index}")))) for index in range(2)]
    assert {node_id for ((_, node_id),) in later} == {"a", "b"}


def test_what_only_a_node_that_is_behind_could_run_waits_for_it() -> None:
    core = core_with(node("a", max_context_tokens=50), policy="round_robin", sync_every_steps=100)
    start_round(core, "a", steps=1)
    core.step(1.0, NodeJoined(node("b")))
    assert core.step(1.1, TaskArrived(request("r"))) == [Defer("r", "inflight_limit")]
    core.step(2.0, SnapshotReady(core.snapshot().sync_id, "a"))
    ended = core.step(2.1, SyncEnded(core.snapshot().sync_id, "b", ok=True))
    assert assigned(ended) == [("r", "b")]


def test_without_rounds_nobody_waits_for_one() -> None:
    core = averaging("a", every=0)
    start_round(core, "a", steps=1)
    core.step(1.0, NodeJoined(node("b")))
    assert roles(core)["b"] is NodeRole.BOTH
    assert core.step(1.1, SyncIntervalSet(5)) == [TakeSnapshot(core.snapshot().sync_id, "a")]
    assert roles(core)["b"] is NodeRole.UNUSED
    core.step(1.2, SyncIntervalSet(0))
    assert roles(core)["b"] is NodeRole.BOTH


def test_when_all_are_behind_they_are_used() -> None:
    core = averaging("a", every=100)
    start_round(core, "a", steps=1)
    core.step(1.0, NodeJoined(node("b")))
    core.step(1.1, NodeLost("a"))
    assert roles(core) == {"b": NodeRole.BOTH}
    assert core.next_wakeup_s() is None
    start_round(core, "b", steps=1)
    assert roles(core) == {"b": NodeRole.BOTH}
    core.step(2.0, NodeJoined(node("c")))
    assert roles(core) == {"b": NodeRole.BOTH, "c": NodeRole.UNUSED}, "training goes on from there"


def test_a_node_that_got_no_role_before_is_behind_when_it_gets_one() -> None:
    core = core_with(
        *(node(name) for name in "abc"), policy="round_robin", policy_options={"max_nodes": 2}, sync_every_steps=100
    )
    start_round(core, "a", steps=1)
    commands = core.step(1.0, NodeLost("b"))
    assert [command.node_id for command in commands if isinstance(command, TakeSnapshot)] == ["a"]
    assert roles(core) == {"a": NodeRole.BOTH, "c": NodeRole.UNUSED}
    finish_round(core, core.snapshot().sync_id, "a")
    assert roles(core) == {"a": NodeRole.BOTH, "c": NodeRole.BOTH}


@pytest.mark.parametrize("how", ["failed", "expired", "source"])
def test_a_failed_round_for_a_late_node_is_tried_again_after_a_pause_but_not_for_ever(how: str) -> None:
    core = averaging("a", every=100, sync_timeout_s=2.0)
    start_round(core, "a", steps=1)
    now_s, warned = 2.0, []
    core.step(now_s, NodeJoined(node("b")))
    for turn in range(3):
        assert roles(core)["b"] is NodeRole.UNUSED
        sync_id = core.snapshot().sync_id
        assert sync_id != ""
        if how == "failed":
            core.step(now_s, SnapshotReady(sync_id, "a"))
            warned = core.step(now_s, SyncEnded(sync_id, "b", ok=False))
        elif how == "source":
            warned = core.step(now_s, SyncEnded(sync_id, "a", ok=False))
        else:
            now_s = core.next_wakeup_s() or 0.0
            warned = core.step(now_s, Tick())
        assert core.snapshot().sync_id == ""
        if turn < 2:
            assert core.next_wakeup_s() == now_s + 5.0
            assert core.step(now_s + 4.9, Tick()) == []
            now_s += 5.0
            assert core.step(now_s, Tick()) == [TakeSnapshot(core.snapshot().sync_id, "a")]
    assert warned == [WarnBehind("b", 3)]
    assert roles(core) == {"a": NodeRole.BOTH, "b": NodeRole.SERVE}
    assert core.next_wakeup_s() is None
    finish_round(core, start_round(core, "a", now_s=now_s, steps=100)[0].sync_id, "a")
    assert roles(core)["b"] is NodeRole.BOTH, "the next round that is due anyway mends it"


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
    assert roles(core) == {"a": NodeRole.UNUSED, "b": NodeRole.BOTH, "c": NodeRole.SERVE}
    core.step(3.1, NodeLost("b"))
    assert roles(core) == {"a": NodeRole.UNUSED, "c": NodeRole.BOTH}, "not the new one, which holds untrained weights"
