"""The scheduler's event log becomes operations and task spans."""

import json

import pytest

from bench.demo.event_log import read_event_log
from bench.demo.records import OpRecord, TaskSpan
from services.latency import OpKind
from services.scheduler.core import codec
from services.scheduler.core.commands import Assign
from services.scheduler.core.events import NodeLost, OpFinished, TaskArrived, TaskEnded, Tick
from services.scheduler.core.tasks import InferenceTask, TrainingTask


@pytest.fixture
def read(tmp_path):
    def read_lines(lines, start_s=100.0):
        path = tmp_path / "events.jsonl"
        entries = [{"config": {}}]
        entries += [
            {
                "now_s": now_s,
                "event": codec.event_to_json(event),
                "commands": [codec.command_to_json(command) for command in commands],
            }
            for now_s, event, commands in lines
        ]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return read_event_log(path, start_s)

    return read_lines


def _inference(task_id):
    return TaskArrived(InferenceTask(task_id, 100.0, 10, 5))


def _training(task_id):
    return TaskArrived(TrainingTask(task_id, 100.0, "job", 1, 128))


def test_spans_run_from_assignment_to_end(read):
    log = read(
        [
            (101.0, _inference("r"), [Assign("r", "a")]),
            (102.0, _training("job/0"), []),
            (103.0, Tick(), [Assign("job/0", "b")]),
            (104.0, TaskEnded("r", "a", True, 5), []),
            (105.0, TaskEnded("job/0", "b", True, loss=2.5), []),
        ]
    )
    assert log.spans == [TaskSpan("r", "a", False, 1.0, 4.0, True), TaskSpan("job/0", "b", True, 3.0, 5.0, True)]
    assert log.training_loss == [(5.0, 2.5)]


def test_a_task_without_an_end_stays_open(read):
    assert read([(101.0, _inference("r"), [Assign("r", "a")])]).spans == [TaskSpan("r", "a", False, 1.0, None)]


def test_a_second_assignment_ends_the_first_span(read):
    log = read(
        [
            (101.0, _inference("r"), [Assign("r", "a")]),
            (102.0, NodeLost("a", "heartbeats stopped"), [Assign("r", "b")]),
            (103.0, TaskEnded("r", "b", True), []),
        ]
    )
    assert log.spans == [TaskSpan("r", "a", False, 1.0, 2.0, False), TaskSpan("r", "b", False, 2.0, 3.0, True)]
    assert log.lost_nodes == [(2.0, "a was lost at 2.0 s: heartbeats stopped")]


def test_failed_training_has_no_loss(read):
    log = read([(101.0, _training("j/0"), [Assign("j/0", "a")]), (102.0, TaskEnded("j/0", "a", False, loss=9.0), [])])
    assert log.training_loss == []
    assert not log.spans[0].ok


def test_operations(read):
    event = OpFinished("a", 1, OpKind.TRAIN_BACKWARD, 101.0, 101.5, ("j/0",), num_tokens=128)
    assert read([(102.0, event, [])]).ops == [OpRecord("a", 1, OpKind.TRAIN_BACKWARD, 1.0, 1.5, 128)]


def test_an_end_nobody_assigned_is_no_span(read):
    assert read([(101.0, TaskEnded("ghost", "a", True), [])]).spans == []


def test_entries_left_out_are_counted(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"config": {}}\n{"dropped": 3}\n{"dropped": 4}\n')
    assert read_event_log(path, 0.0).dropped == 7
