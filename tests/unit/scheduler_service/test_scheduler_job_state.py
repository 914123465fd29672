"""Progress of one job, without I/O."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.ledger.types import MAX_JOB_EVENTS
from services.runtime.clock import FakeClock
from services.scheduler.feeder import shuffled
from services.scheduler.hyperparameters import resolve
from services.scheduler.job_state import JobState
from services.scheduler.microbatches import WINDOW


def state(total: int, *, next_sequence: int = 0, resumed: bool = False, file: str = "f") -> JobState:
    job = types_pb2.TrainingJob(
        job_id="j",
        training_file=file,
        total_microbatches=total,
        trained_microbatches=next_sequence,
        status=types_pb2.JOB_STATUS_QUEUED,
    )
    return JobState(work_pb2.JobRecord(job=job, next_sequence=next_sequence), FakeClock(), resumed=resumed)


def outcome(sequence: int, *, node: str = "n", step: int = 1, loss: float = 1.0) -> work_pb2.WorkOutcome:
    training = work_pb2.TrainingOutcome(job_id="j", sequence=sequence, loss=loss, label_tokens=10, weight_step=step)
    return work_pb2.WorkOutcome(task_id=f"j/{sequence}", node_id=node, training=training)


def skip(sequence: int) -> work_pb2.WorkOutcome:
    training = work_pb2.TrainingOutcome(job_id="j", sequence=sequence, skipped=True)
    training.error.message = "the loss is nan"
    return work_pb2.WorkOutcome(task_id=f"j/{sequence}", node_id="n", training=training)


def test_skipped_microbatches_count_as_done_but_not_as_trained() -> None:
    job = state(4)
    assert job.skipped(skip(1))
    assert not job.skipped(skip(1)), "known"
    assert (job.num_trained, job.microbatches.num_skipped, job.backlog) == (0, 1, 3)
    assert job.trained(outcome(0))
    assert (job.num_trained, job.microbatches.num_skipped, job.view().skipped_microbatches) == (1, 1, 1)
    assert job.durable_record().next_sequence == 2
    assert not job.skipped(skip(1)), "stored"
    job.trained(outcome(2))
    assert not job.complete
    job.skipped(skip(3))
    assert job.complete


def test_skips_in_a_row_survive_a_restart_and_end_with_a_trained_one() -> None:
    job = state(9)
    job._record.job.hyperparameters.CopyFrom(resolve(types_pb2.Hyperparameters(max_skipped_in_row=3)))
    job.skipped(skip(0))
    job.skipped(skip(1))
    again = JobState(job.durable_record(), FakeClock(), resumed=True)
    assert not again.skipped_too_often
    again.skipped(skip(2))
    assert again.skipped_too_often
    again.trained(outcome(3))
    assert not again.skipped_too_often


def offers(job: JobState) -> list[int]:
    found = []
    while (sequence := job.take_offer()) is not None:
        found.append(sequence)
    return found


def test_everything_is_offered_once_and_what_comes_back_again() -> None:
    job = state(4)
    assert offers(job) == [0, 1, 2, 3]
    for sequence in range(4):
        job.held(sequence, waiting=True)
    job.microbatches.release(2)
    job.microbatches.release(1)
    assert offers(job) == [1, 2]


def test_offers_stay_within_a_window_of_the_first_untrained() -> None:
    job = state(3 * WINDOW)
    assert len(offers(job)) == WINDOW
    for sequence in range(1, 10):
        job.trained(outcome(sequence))
    assert offers(job) == []  # 0 holds the window
    job.trained(outcome(0))
    assert offers(job) == list(range(WINDOW, WINDOW + 10))


@given(st.permutations(range(12)), st.integers(0, 12))
def test_what_is_stored_at_any_time_is_a_prefix_and_the_view_is_everything(order: list[int], cut: int) -> None:
    job = state(12)
    for sequence in order[:cut]:
        assert job.trained(outcome(sequence))
        assert not job.trained(outcome(sequence))
    stored = job.durable_record()
    trained = set(order[:cut])
    prefix = next(number for number in range(13) if number not in trained)
    assert stored.next_sequence == stored.job.trained_microbatches == prefix
    assert stored.job.trained_tokens == 10 * prefix
    assert (job.view().trained_microbatches, job.view().trained_tokens) == (cut, 10 * cut)
    assert job.complete == (cut == 12)
    successor = JobState(stored, FakeClock(), resumed=True)
    for sequence in order[:cut]:
        successor.trained(outcome(sequence))
    assert successor.num_trained == cut
    assert sorted(offers(successor)) == sorted(set(range(12)) - trained)


def test_after_a_restart_the_ledger_is_asked_about_what_may_have_run() -> None:
    assert not state(5).microbatches.may_have_run(0)
    job = state(5000, next_sequence=3, resumed=True)
    assert job.microbatches.may_have_run(3)
    assert not job.microbatches.may_have_run(3 + WINDOW)


def test_steps_are_counted_per_node() -> None:
    job = state(6)
    for sequence, (node, step) in enumerate([("a", 1), ("a", 1), ("b", 1), ("a", 2), ("b", 1), ("b", 5)]):
        job.trained(outcome(sequence, node=node, step=step))
    assert dict(job.view().steps_per_node) == {"a": 2, "b": 2}


def test_the_newest_loss_is_the_one_that_came_last() -> None:
    job = state(3)
    job.trained(outcome(2, loss=5.0))
    job.trained(outcome(0, loss=7.0))
    assert job.view().last_loss == 7.0


def test_feedback_grows_the_job() -> None:
    job = state(0, file="")
    assert job.endless
    assert offers(job) == []
    job.grow(2)
    assert offers(job) == [0, 1]
    job.trained(outcome(0))
    assert (job.backlog, job.complete) == (1, False)
    job.grow(1)  # an older count that came late
    assert job.num_examples == 2


def test_a_job_is_queued_until_a_node_has_a_microbatch() -> None:
    job = state(2)
    job.held(0, waiting=True)
    assert job.status == types_pb2.JOB_STATUS_QUEUED
    job.held(0, waiting=False)
    assert job.status == types_pb2.JOB_STATUS_RUNNING
    assert job.microbatches.waiting == set()


def test_an_ended_job_offers_nothing_and_stores_all_its_progress() -> None:
    job = state(5)
    job.trained(outcome(3))
    job.set_error(LemixError(ErrorCode.INTERNAL, "x"))
    job.end(types_pb2.JOB_STATUS_FAILED, "error", "x")
    assert offers(job) == []
    assert job.durable_record().job.trained_microbatches == 1
    assert job.view().HasField("finished_unix_s")


async def test_watchers_wake_and_history_is_bounded() -> None:
    job = state(1)
    before = job.events.changed
    for number in range(MAX_JOB_EVENTS + 5):
        job.add_event("info", str(number))
    assert before.is_set()
    kept = job.events.after(0)
    assert len(kept) == MAX_JOB_EVENTS
    assert [event.sequence for event in kept] == list(range(6, MAX_JOB_EVENTS + 6))
    unsaved = job.events.unsaved()
    job.add_event("info", "during the save")
    job.events.saved(len(unsaved) - 1)  # the bound has dropped one meanwhile
    assert job.events.unsaved()[-1].message == "during the save"


def test_replays_agree_on_the_order_of_an_epoch() -> None:
    first = shuffled("job-1", 0, 100)
    assert first == shuffled("job-1", 0, 100)
    assert sorted(first) == list(range(100))
    assert first != shuffled("job-1", 1, 100)
    assert first != shuffled("job-2", 0, 100)


def test_defaults_are_filled_in() -> None:
    resolved = resolve(types_pb2.Hyperparameters(batch_size=4))
    assert (resolved.batch_size, resolved.num_epochs, resolved.gradient_accumulation_steps) == (4, 1, 1)
    assert (resolved.lr_schedule, resolved.warmup_steps, resolved.weight_decay) == ("constant", 0, 0.0)
    assert (resolved.learning_rate, resolved.max_grad_norm) == (1e-4, 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_epochs", 0),
        ("num_epochs", 1001),
        ("batch_size", 257),
        ("gradient_accumulation_steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("max_grad_norm", -1.0),
        ("weight_decay", -0.1),
        ("weight_decay", math.inf),
        ("lr_schedule", "exponential"),
    ],
)
def test_a_hyperparameter_out_of_range_is_named(field: str, value: float | str) -> None:
    given_values = types_pb2.Hyperparameters()
    setattr(given_values, field, value)
    with pytest.raises(LemixError, match=field) as caught:
        resolve(given_values)
    assert caught.value.param == f"hyperparameters.{field}"


def test_a_history_that_was_stored_twice_is_told_once() -> None:
    job = state(4)
    events = [types_pb2.JobEvent(sequence=number) for number in (1, 2, 1, 2, 3)]
    job.events.restore(events)
    assert [event.sequence for event in job.events.after(0)] == [1, 2, 3]
    job.add_event("info", "next")
    assert [event.sequence for event in job.events.after(2)] == [3, 4]
    assert job.events.after(4) == []


def test_what_is_in_no_checkpoint_counts_as_trained_and_may_come_back() -> None:
    job = state(4)
    assert offers(job) == [0, 1, 2, 3]
    for sequence in range(4):
        job.held(sequence, waiting=False)
        assert job.trained_unsaved(outcome(sequence, step=1 + sequence // 2))
    assert not job.trained_unsaved(outcome(3))  # told again on a new stream
    assert (job.num_trained, job.view().unsaved_microbatches) == (4, 4)
    assert job.view().steps_per_node == {"n": 2}
    assert job.only_to_save
    assert not job.complete
    assert job.microbatches.unsaved_nodes == {"n"}
    job.held(3, waiting=True)  # its node did not come back
    assert (job.num_trained, job.only_to_save) == (3, False)
    assert offers(job) == []
    for sequence in range(4):
        assert job.trained(outcome(sequence, step=1 + sequence // 2))
    assert job.complete
    assert job.view().steps_per_node == {"n": 2}
    assert job.durable_record().next_sequence == 4


def test_what_is_in_no_checkpoint_is_not_stored_as_trained() -> None:
    job = state(3)
    job.trained(outcome(0))
    job.trained_unsaved(outcome(1, step=2))
    assert job.durable_record().next_sequence == 1
    assert job.durable_record().job.trained_microbatches == 1
    assert job.view().trained_microbatches == 2
    assert [event.message for event in job.events.after(0)] == [
        "trained 1 of 3 micro-batches",
        "trained 2 of 3 micro-batches",
    ]
    job.trained(outcome(1, step=2))
    assert len(job.events.after(0)) == 2  # saving it is no news of its own


def test_the_loss_of_a_node_is_told_with_what_it_took_along() -> None:
    job = state(3)
    job.trained_unsaved(outcome(0))
    job.node_away("n", 30.0)
    job.node_away("n", 0.0, "n:1:5")
    told = [(event.level, event.message) for event in job.events.after(1)]
    assert [level for level, _ in told] == ["warn", "error"]
    assert told[0][1].startswith("n was lost: 1 micro-batches since its newest checkpoint are trained again")
    assert told[1][1].startswith("n did not come back: other nodes train 1 micro-batches again")
    assert "n:1:5" in told[1][1]


def test_a_full_window_waits_for_the_checkpoint_of_the_node_that_has_its_first() -> None:
    job = state(3 * WINDOW)
    assert len(offers(job)) == WINDOW
    for sequence in range(WINDOW):
        assert job.microbatches.node_to_save() is None, "there is room, or the first is not trained"
        job.trained_unsaved(outcome(sequence, node="a" if sequence < 2 else "b"))
    assert offers(job) == []
    assert job.microbatches.node_to_save() == "a"
    assert job.microbatches.node_to_save() is None, "asked already"
    job.trained(outcome(0, node="a"))
    job.trained(outcome(1, node="a"))
    assert job.microbatches.node_to_save() is None
    for sequence in offers(job):
        job.trained_unsaved(outcome(sequence, node="a"))
    assert job.microbatches.node_to_save() == "b"
    job.held(2, waiting=True)  # its node was lost
    assert job.microbatches.node_to_save() is None
    job.trained_unsaved(outcome(2, node="c"))
    assert job.microbatches.node_to_save() == "c"


def gated(tolerance: float = 0.1, max_bad: int = 2) -> JobState:
    job = state(3)
    job.quality_gate.tolerance, job.quality_gate.max_bad_evaluations = tolerance, max_bad
    return job


def test_the_gate_lets_small_losses_pass_and_remembers_the_best() -> None:
    job = gated()
    verdicts = [
        job.heldout.judge("n", f"c{number}", loss) for number, loss in enumerate([3.0, 2.0, 2.05, 2.2, math.inf, 1.9])
    ]
    assert verdicts == ["best", "best", "good", "bad", "bad", "best"]
    view = job.view()
    assert (view.heldout_loss, view.best_heldout_loss, view.best_checkpoint_id) == (1.9, 1.9, "c5")
    assert [name for name in ("c0", "c1", "c2", "c3", "c4", "c5", "unknown") if job.heldout.is_bad(name)] == [
        "c0",
        "c2",
        "c3",
        "c4",
    ]
    assert job.heldout.best_of(["c0", "c1", "unknown"]) == "c1"
    assert job.heldout.best_of(["unknown"]) is None
    assert job.durable_record().heldout_losses["c1"] == 2.0


def test_only_several_bad_losses_in_a_row_bring_a_node_back() -> None:
    job = gated()
    for name, loss, expected in (("a", 1.0, False), ("b", 2.0, False), ("c", 1.0, False), ("d", 2.0, False)):
        job.heldout.judge("n", name, loss)
        assert job.heldout.is_to_go_back("n") is expected
    job.heldout.judge("n", "e", 2.0)
    assert job.heldout.is_to_go_back("n")
    job.heldout.went_back("n")
    assert not job.heldout.is_to_go_back("n")
    never = gated(max_bad=0)
    for number in range(5):
        never.heldout.judge("n", str(number), float(number))
    assert not never.heldout.is_to_go_back("n")


def test_bad_losses_are_counted_for_each_node() -> None:
    job = gated()
    job.heldout.judge("a", "a1", 1.0)
    for node_id in ("a", "b", "c"):
        job.heldout.judge(node_id, f"{node_id}2", 2.0)
        assert not job.heldout.is_to_go_back(node_id), "its first bad one"
    job.heldout.judge("a", "a3", 1.0)
    job.heldout.judge("b", "b3", 2.0)
    job.heldout.judge("c", "c3", 2.0)
    again = JobState(job.durable_record(), FakeClock(), resumed=True)
    assert [node_id for node_id in "abc" if again.heldout.is_to_go_back(node_id)] == ["b", "c"]
    again.heldout.went_back("b")
    assert [node_id for node_id in "abc" if again.heldout.is_to_go_back(node_id)] == ["c"]


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_bad_even_when_there_is_no_better_one(loss: float) -> None:
    job = gated()
    assert job.heldout.judge("n", "c0", loss) == "bad"
    assert job.heldout.is_bad("c0")
    assert job.heldout.best_of(["c0"]) is None
    assert job.heldout.judge("n", "c1", 3.0) == "best"
    assert job.heldout.best_of(["c0", "c1"]) == "c1"


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=300))
def test_the_losses_remembered_are_bounded_and_keep_the_best(losses: list[float]) -> None:
    job = gated()
    for number, loss in enumerate(losses):
        job.heldout.judge("n", str(number), loss)
    kept = job.durable_record().heldout_losses
    assert len(kept) <= 100
    assert min(kept.values()) == min(losses)
    assert job.view().best_heldout_loss == min(losses)


def test_a_paused_job_offers_nothing_and_goes_on_with_what_was_taken_back() -> None:
    job = state(4)
    assert offers(job) == [0, 1, 2, 3]
    job.held(0, waiting=False)
    job.pause()
    for sequence in (1, 2, 3):
        job.microbatches.release(sequence)
    assert offers(job) == []
    job.trained(outcome(0))
    assert (job.paused, job.ended, job.view().trained_microbatches) == (True, False, 1)
    again = JobState(job.durable_record(), FakeClock(), resumed=True)
    assert again.paused
    for either in (job, again):
        either.go_on()
        assert either.status == types_pb2.JOB_STATUS_RUNNING
        assert either.task_id(1) == "j/1", "nothing of it is remembered as ended"
        assert offers(either) == [1, 2, 3]
    assert job.events.after(0)[-1].message == "the job was paused; it goes on with micro-batch 1"


def test_the_nodes_of_a_paused_job_save_once_when_nothing_is_under_way() -> None:
    job = state(4)
    for sequence in range(2):
        job.held(sequence, waiting=False)
    job.trained_unsaved(outcome(0))
    job.pause()
    assert job.nodes_to_save_paused() == set()
    job.trained_unsaved(outcome(1, node="m"))
    assert job.nodes_to_save_paused() == {"m", "n"}
    assert job.nodes_to_save_paused() == set()


@pytest.mark.parametrize("from_ledger", [False, True])
def test_a_job_goes_on_after_its_end_and_counts_nothing_twice(from_ledger: bool) -> None:
    job = state(5)
    assert offers(job) == [0, 1, 2, 3, 4]
    for sequence in range(5):
        job.held(sequence, waiting=False)
    job.trained(outcome(0))
    job.trained(outcome(2))
    job.trained_unsaved(outcome(3))
    job.skipped(skip(4))
    job.set_error(LemixError(ErrorCode.INTERNAL, "no"))
    job.end(types_pb2.JOB_STATUS_FAILED, "error", "the job failed: no")
    if from_ledger:
        job = JobState(job.durable_record(), FakeClock())
    job.go_on()
    view = job.view()
    assert (view.status, view.trained_microbatches, view.skipped_microbatches) == (types_pb2.JOB_STATUS_RUNNING, 3, 1)
    assert not view.HasField("error")
    assert not view.HasField("finished_unix_s")
    assert job.durable_record().skipped_in_row == 0
    assert offers(job) == [1]
    assert job.task_id(1) == "j/1/1"
    assert not job.trained(outcome(3)), "its checkpoint follows"
    assert job.is_wanted("j/3", 3), "if it comes back with a lost node, other weights lack it"
    assert not job.is_wanted("j/1", 1)
    assert job.is_wanted("j/1/1", 1)
    restarted = JobState(job.durable_record(), FakeClock(), resumed=True)
    for either in (job, restarted):
        assert not either.complete
        assert either.trained(outcome(1))
        assert (either.complete, either.num_trained, either.microbatches.num_skipped) == (True, 4, 1)
        assert either.durable_record().next_sequence == 5
        assert not either.durable_record().done_ahead


def test_the_owner_hears_of_a_node_that_no_longer_had_the_optimizer_state() -> None:
    job = state(9)

    def fresh(sequence: int, node: str) -> work_pb2.WorkOutcome:
        made = outcome(sequence, node=node)
        made.training.fresh_optimizer = True
        return made

    def warnings() -> list[str]:
        return [event.message.partition(" ")[0] for event in job.events.after(0) if event.level == "warn"]

    job.trained(fresh(0, "n"))
    job.trained_unsaved(fresh(1, "m"))
    job.trained(fresh(1, "m"))
    assert warnings() == [], "it never had one"
    job.trained(outcome(2, node="n"))
    job.trained_unsaved(fresh(3, "n"))
    job.trained(fresh(3, "n"))
    job.trained(fresh(4, "m"))
    assert warnings() == ["n", "m"]
