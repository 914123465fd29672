"""Reading event logs: what is there, and one line about what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.core.codec import event_from_json
from services.scheduler.core.commands import Assign, NodeTerms
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import TaskArrived, Tick
from services.scheduler.core.tasks import InferenceTask
from services.scheduler.event_log import EventLog
from services.scheduler.explain.log_file import Dropped, LogError, RunBegan, Step, read_log

EVENT = TaskArrived(InferenceTask("r", 0.5, 10, 20))
COMMANDS = [Assign("r", "n0", (NodeTerms("n0", 0.0, 0.1, 0.0, 0.0, 1.0),))]


def written(path: Path) -> Path:
    """A log of one run: a request, and nothing more."""
    log = EventLog(path, CoreConfig(policy="separate"))
    log.add(1.0, EVENT, COMMANDS)
    log.add(2.5, Tick(), [])
    log.close()
    return path


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written(tmp_path / "whole").read_text("utf-8").splitlines()]


def error(path: Path) -> str:
    with pytest.raises(LogError) as caught:
        list(read_log(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    entries = list(read_log(written(tmp_path / "log")))
    assert entries == [
        RunBegan(1, CoreConfig(policy="separate")),
        Step(2, 1.0, EVENT, COMMANDS),
        Step(3, 2.5, Tick(), []),
    ]


def test_a_restart_appends_another_run(tmp_path: Path) -> None:
    path = written(written(tmp_path / "log"))
    assert [entry.line for entry in read_log(path) if isinstance(entry, RunBegan)] == [1, 4]


def test_left_out_steps_are_told(tmp_path: Path) -> None:
    path = written(tmp_path / "log")
    with path.open("a") as file:
        file.write('{"dropped":7}\n')
    assert list(read_log(path))[-1] == Dropped(4, 7)


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "log")
    whole = list(read_log(path))
    with path.open("a") as file:
        file.write('{"now_s": 3.0, "event": {"ty')
    assert list(read_log(path)) == whole


def test_a_log_without_a_version_is_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('{"config":{"policy":"lemix"}}\n')
    assert list(read_log(path)) == [RunBegan(1, CoreConfig(policy="lemix"))]


@pytest.mark.parametrize(
    ("line", "changes", "message"),
    [
        (1, {"version": 2}, "field 'version' is 2; this program reads version 1"),
        (1, {"version": None}, "field 'version' is None"),
        (1, {"config": []}, "field 'config': expected an object, got []"),
        (1, {"config": {"policy": 3}}, "field 'config': policy: expected str, got 3"),
        (1, {"config": {"hold": 3}}, "field 'config': CoreConfig has no field 'hold'"),
        (1, {"config": {"hold_s": -1.0}}, "field 'config': hold_s must not be negative"),
        (2, {"now_s": "soon"}, "field 'now_s': expected a time in seconds, got 'soon'"),
        (2, {"now_s": True}, "field 'now_s': expected a time"),
        (2, {"now_s": float("nan")}, "field 'now_s': expected a time"),
        (2, {"now_s": 10**400}, "field 'now_s': expected a time"),
        (2, {"event": None}, "field 'event': expected an object, got None"),
        (2, {"event": {"type": []}}, "field 'event': unknown type []"),
        (2, {"event": {"type": "NodeLost"}}, "field 'event': NodeLost lacks the field 'node_id'"),
        (2, {"event": {"type": "NodeLost", "node_id": 1.5}}, "field 'event': node_id: expected str, got 1.5"),
        (2, {"commands": {}}, "field 'commands': expected a list, got {}"),
        (2, {"commands": [None]}, "field 'commands': expected an object, got None"),
        (2, {"commands": [{"type": "Drop"}]}, "field 'commands': Drop lacks the field 'task_id'"),
        (3, {"dropped": "many"}, "field 'dropped': expected a number of steps, got 'many'"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: int, changes: dict[str, Any], message: str) -> None:
    data = lines(tmp_path)
    data[line - 1] |= changes
    path = tmp_path / "log"
    path.write_text("".join(json.dumps(item) + "\n" for item in data))
    assert error(path).startswith(f"{path}: line {line}: {message}")


@pytest.mark.parametrize("name", ["now_s", "event", "commands"])
def test_a_missing_field_is_named(tmp_path: Path, name: str) -> None:
    data = lines(tmp_path)
    del data[1][name]
    path = tmp_path / "log"
    path.write_text("".join(json.dumps(item) + "\n" for item in data))
    assert error(path) == f"{path}: line 2: field {name!r} is missing"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1: nothing there"),
        (b"{}", "line 1: nothing there"),
        (b"\n", "line 1: not JSON"),
        (b"\xff\n", "line 1: not JSON"),
        (b"[" * 100_000 + b"\n", "line 1: not JSON"),
        (b"[1]\n", "line 1: expected an object"),
        (b'{"dropped":1}\n', "line 1: field 'config' is missing: not the start of an event log"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "log"
    path.write_bytes(content)
    assert error(path).startswith(f"{path}: {message}")


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    assert error(tmp_path / "none") == f"{tmp_path / 'none'}: No such file or directory"
    assert error(tmp_path) == f"{tmp_path}: Is a directory"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Replaces one value of a good log, however deep, by anything."""
    folder = tmp_path_factory.mktemp("log")
    changed = lines(folder)
    target: Any = changed[data.draw(st.integers(0, len(changed) - 1))]
    while True:
        key = data.draw(st.sampled_from(sorted(target) if isinstance(target, dict) else range(len(target))))
        if not target[key] or not isinstance(target[key], dict | list) or data.draw(st.booleans()):
            break
        target = target[key]
    target[key] = data.draw(JSON)
    path = folder / "changed"
    path.write_text("".join(json.dumps(item) + "\n" for item in changed))
    assert read_or_refused(path) in (len(changed), f"{path}: line ")


def read_or_refused(path: Path) -> int | str:
    """Number of entries, or the begin of the refusal."""
    try:
        return len(list(read_log(path)))
    except LogError as refused:
        return str(refused)[: len(f"{path}: line ")]


def test_a_wrong_value_deep_inside_is_named_by_its_fields() -> None:
    task = {"type": "InferenceTask", "task_id": "r", "arrival_s": 0.0, "prompt_tokens": 1, "max_tokens": 1}
    with pytest.raises(ValueError, match=r"^task: slo: ttft_s: expected float or int, got 'x'$"):
        event_from_json({"type": "TaskArrived", "task": {**task, "slo": {"ttft_s": "x"}}})
