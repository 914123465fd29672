"""Events, commands and configuration survive JSON unchanged."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.latency import (
    FORMS,
    HostLink,
    Interference,
    LatencyModel,
    LatencyTable,
    MixedCost,
    NodeLatency,
    OpKind,
)
from services.scheduler.core import commands, events, tasks
from services.scheduler.core.codec import (
    command_from_json,
    command_to_json,
    config_from_json,
    config_to_json,
    event_from_json,
    event_to_json,
)
from services.scheduler.core.commands import Command
from services.scheduler.core.config import CoreConfig, SyncChoice
from services.scheduler.core.events import Event

number = st.floats(allow_nan=False, allow_infinity=False)
models = st.sampled_from(sorted(FORMS)).flatmap(
    lambda form: st.builds(
        LatencyModel,
        st.just(form),
        st.tuples(*[number] * len(FORMS[form](1.0, 1.0))),
        number,
        number,
    )
)
table = LatencyModel("tabulated", (), 0.1, -0.2, 0.3, LatencyTable((1, 4), (16, 64), (0.1, 0.2, 0.3, 0.5)))
beside = Interference(0, OpKind.DECODE, OpKind.TRAIN_BACKWARD, 0.25, 0.1)
whole = NodeLatency(({OpKind.PREFILL: table},), (beside,), (HostLink(1e9, 2e9, 1e-5),), (MixedCost(1.0, 0.9, 0.5),))
latencies = st.just(whole) | st.builds(
    NodeLatency, st.lists(st.dictionaries(st.sampled_from(OpKind), models, max_size=3), max_size=3).map(tuple)
)
for cls, strategy in ((NodeLatency, latencies), (float, number)):
    st.register_type_strategy(cls, strategy)

EVENTS = [
    events.NodeJoined,
    events.NodeLost,
    events.NodeDraining,
    events.TaskArrived,
    events.TaskRecovered,
    events.TaskCancelled,
    events.JobCancelled,
    events.JobEnded,
    events.JobPaused,
    events.JobResumed,
    events.TrainingHeld,
    events.OpFinished,
    events.TaskEnded,
    events.SnapshotReady,
    events.SyncEnded,
    events.SyncIntervalSet,
    events.WeightsTold,
    events.NodeProfiled,
    events.AdaptersTold,
    events.Tick,
]
COMMANDS = [
    commands.Assign,
    commands.Defer,
    commands.Reject,
    commands.CancelOnNode,
    commands.Drop,
    commands.TakeBack,
    commands.TakeSnapshot,
    commands.ApplyWeights,
    commands.WarnBehind,
    commands.DriftAlarm,
]


def through_json(data: dict[str, Any]) -> dict[str, Any]:
    back: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    return back


@given(st.one_of([st.from_type(cls) for cls in EVENTS]))
def test_events_round_trip(event: Event) -> None:
    assert event_from_json(through_json(event_to_json(event))) == event


@given(st.one_of([st.from_type(cls) for cls in COMMANDS]))
def test_commands_round_trip(command: Command) -> None:
    assert command_from_json(through_json(command_to_json(command))) == command


def test_every_event_and_command_is_covered() -> None:
    assert set(EVENTS) == set(Event.__args__)
    assert set(COMMANDS) == set(Command.__args__)


def test_configuration_round_trips() -> None:
    config = CoreConfig(
        policy="paper_additive",
        policy_options={"tau_s": 0.1, "flag": True, "count": 3, "name": "x"},
        default_slo=tasks.SloTarget(0.3, None),
        sync=SyncChoice.AVERAGE,
        sync_every_steps=5,
    )
    back = config_from_json(through_json(config_to_json(config)))
    assert back == config
    assert back.policy_options["flag"] is True


def test_form_is_readable_and_stable() -> None:
    event = events.TaskArrived(tasks.InferenceTask("r", 0.5, 10, 20, tasks.SloTarget(ttft_s=0.2)))
    assert event_to_json(event) == {
        "type": "TaskArrived",
        "task": {
            "type": "InferenceTask",
            "task_id": "r",
            "arrival_s": 0.5,
            "prompt_tokens": 10,
            "max_tokens": 20,
            "slo": {"ttft_s": 0.2, "tpot_s": None},
            "session_id": "",
            "max_staleness_s": None,
            "adapter_id": "",
            "choice_of": "",
            "fixed_output": False,
        },
    }
    command = commands.ApplyWeights("s", "n", commands.SyncMode.REPLACE, ("m",))
    assert command_to_json(command) == {
        "type": "ApplyWeights",
        "sync_id": "s",
        "node_id": "n",
        "mode": "replace",
        "source_node_ids": ["m"],
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"type": "Nope"}, "unknown type 'Nope'"),
        ({}, "unknown type None"),
        ({"type": "TaskCancelled"}, "TaskCancelled lacks the field 'task_id'"),
        ({"type": "TaskCancelled", "task_id": "a", "x": 1}, "TaskCancelled has no field 'x'"),
        ({"type": "TaskCancelled", "task_id": 7}, "expected"),
        ({"type": "SyncEnded", "sync_id": "s", "node_id": "n", "ok": True, "weight_step": True}, "expected"),
        ({"type": "TaskArrived", "task": {"type": "Tick"}}, "unknown type 'Tick'"),
        ({"type": "OpFinished", "node_id": "n", "stage": 0, "op": "dance", "begin_s": 0, "end_s": 0}, "dance"),
    ],
)
def test_bad_json_is_refused_with_the_reason(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        event_from_json(data)
