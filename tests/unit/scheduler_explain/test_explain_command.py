"""The command: what it prints, and how it ends."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from services.latency import OpKind
from services.scheduler.core.commands import Assign, Defer, NodeTerms, Reject
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import NodeJoined, OpFinished, TaskArrived, TaskEnded, Tick
from services.scheduler.core.tasks import InferenceTask, SloTarget, TrainingTask
from services.scheduler.event_log import EventLog
from services.scheduler.explain.__main__ import main
from tests.simulation.harness import Simulation, microbatches, output_lengths, requests, spec
from tests.simulation.recorded import recorded


class Command:
    """Runs the command; `out` is what the last run printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = ""
        self.error = ""

    def __call__(self, *arguments: object) -> int:
        console = Console(file=StringIO(), width=120)
        try:
            return main([str(argument) for argument in arguments], console)
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            self.out = console.file.getvalue()  # type: ignore[attr-defined]
            self.error = self._capsys.readouterr().err

    def row(self, start: str) -> list[str]:
        """Cells of the only line that starts so."""
        (line,) = [line for line in self.out.splitlines() if line.strip().startswith(start)]
        return line.split()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def explained(tmp_path: Path) -> Path:
    """A log of a request that was placed, one that was refused, one that waits, and a micro-batch."""
    log = EventLog(tmp_path / "log", CoreConfig(policy="lemix"))
    for node_id in ("n0", "n1"):
        log.add(0.0, NodeJoined(spec(node_id, kv_capacity_tokens=1000)), [])
    terms = (
        NodeTerms("n0", 0.0, 0.9, 0.0, 0.0, -2.0),
        NodeTerms("n1", 0.125, 0.25, -0.2, 0.75, 1.0),
    )
    log.add(1.0, TaskArrived(InferenceTask("[b]r[/b]", 0.75, 100, 50)), [Defer("[b]r[/b]", "inflight_limit")])
    log.add(1.25, Tick(), [Assign("[b]r[/b]", "n1", terms)])
    log.add(1.75, OpFinished("n1", 0, OpKind.PREFILL, 1.5, 1.75, ("[b]r[/b]",), 100, first_token=True), [])
    log.add(2.0, TaskEnded("[b]r[/b]", "n1", ok=True, output_tokens=7), [])
    log.add(3.0, TaskArrived(InferenceTask("long", 3.0, 9000, 50)), [Reject("long", "OVERLOADED", "too many")])
    log.add(3.0, TaskArrived(InferenceTask("waits", 3.0, 9000, 50)), [Defer("waits", "inflight_limit")])
    microbatch = TrainingTask("job/0", 4.0, "job", 2, 64)
    log.add(4.0, TaskArrived(microbatch), [Assign("job/0", "n0", (NodeTerms("n0", 0.0, 0.0, 0.0, 0.0, 0.0),), 4)])
    turn = NodeTerms("n1", 0.0, 0.1, 0.0, 0.0, 1.5, cached_tokens=80)
    log.add(5.0, TaskArrived(InferenceTask("turn", 5.0, 90, 5, session_id="s")), [Assign("turn", "n1", (turn,))])
    log.close()
    return tmp_path / "log"


def test_a_request_is_explained(command: Command, explained: Path) -> None:
    assert command("explain", "--log", explained, "[b]r[/b]") == 0
    assert "[b]r[/b]: request, 100 + at most 50 tokens; policy lemix, decision 1" in command.out
    assert command.row("n0") == ["n0", "0.0000", "0.9000", "0.0000", "0.0000", "0.0%", "-2.0000"]
    assert command.row("->") == ["->", "n1", "0.1250", "0.2500", "-0.2000", "0.7500", "0.0%", "1.0000"]
    happened = [line.split() for line in command.out.splitlines() if line.strip().startswith("+")]
    assert happened == [
        ["+0.250", "s", "waits:", "inflight_limit"],
        ["+0.500", "s", "goes", "to", "n1"],
        ["+0.750", "s", "first", "operation"],
        ["+1.000", "s", "first", "token"],
        ["+1.250", "s", "ok,", "7", "tokens"],
    ]
    assert "predicted time to first token 0.250 s, real 1.000 s, error +0.750 s" in command.out


def test_a_turn_of_a_session_tells_what_the_nodes_keep(command: Command, explained: Path) -> None:
    assert command("explain", "--log", explained, "turn") == 0
    assert "turn: request, 90 + at most 5 tokens, session s; policy lemix" in command.out
    assert command.row("node")[-4:] == ["KV", "cache", "kept", "score"]
    assert command.row("->") == ["->", "n1", "0.0000", "0.1000", "0.0000", "0.0000", "0.0%", "80", "1.5000"]
    assert command("explain", "--log", explained, "[b]r[/b]") == 0
    assert "kept" not in command.out, "it is in no session"


def test_a_narrow_terminal_cuts_no_number_and_no_name(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log", CoreConfig(policy="paper_additive"))
    names = ("a-rather-long-name-of-a-node-agent-0", "a-rather-long-name-of-a-node-agent-1")
    terms = tuple(NodeTerms(name, 12.3456, 7.8912, -3.4567, 0.1234, -45.6789, 4321) for name in names)
    for name in names:
        log.add(0.0, NodeJoined(spec(name, kv_capacity_tokens=1000)), [])
    log.add(5.0, TaskArrived(InferenceTask("turn", 5.0, 90, 5, session_id="s")), [Assign("turn", names[1], terms)])
    log.close()
    console = Console(file=StringIO(), width=80)
    assert main(["explain", "turn", "--log", str(tmp_path / "log")], console) == 0
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    for number in ("12.3456", "7.8912", "-3.4567", "0.1234", "4321", "-45.6789"):
        assert text.count(number) >= 2


def test_a_refusal_is_explained(command: Command, explained: Path) -> None:
    assert command("explain", "--log", explained, "long") == 0
    assert "refused: OVERLOADED: too many" in command.out


def test_a_microbatch_is_explained(command: Command, explained: Path) -> None:
    assert command("explain", "--log", explained, "job/0") == 0
    assert "job/0: micro-batch, 2 x 64 tokens in 4 parts" in command.out
    assert "predicted" not in command.out


@pytest.mark.parametrize(("task_id", "message"), [("waits", "no decision about 'waits'"), ("never", "no task 'never'")])
def test_what_is_not_there_is_one_line_and_1(command: Command, explained: Path, task_id: str, message: str) -> None:
    assert command("explain", "--log", explained, task_id) == 1
    assert command.error == f"explain: {explained}: {message}\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of a run."""
    tasks = requests(20, 20.0, seed=1)
    config = CoreConfig(policy="round_robin", default_slo=SloTarget(0.2, 0.03))
    simulation = Simulation(config, output_lengths(tasks, seed=1))
    log, simulation.core.step = recorded(tmp_path / "run", config, simulation.core.step)  # type: ignore[method-assign]
    for node_id in ("n0", "n1"):
        simulation.at(0.0, NodeJoined(spec(node_id)))
    simulation.offer(tasks)
    simulation.offer(microbatches(10))
    simulation.run()
    log.close()
    return tmp_path / "run"


def test_an_equal_replay_is_0(command: Command, log: Path) -> None:
    num_events = len(log.read_text("utf-8").splitlines()) - 1
    assert command("replay", "--log", log) == 0
    assert command.out.startswith(f"{log}: line 1: policy round_robin: equal: {num_events} events, ")


def test_a_replay_that_differs_is_1_and_tells_where(command: Command, log: Path) -> None:
    lines = log.read_text("utf-8").splitlines()
    number = next(number for number, line in enumerate(lines) if '"Assign"' in line)
    log.write_text("\n".join([*lines[:number], lines[number].replace('"node_id":"n0"', '"node_id":"n7"', 1), ""]))
    assert command("replay", "--log", log) == 1
    assert f"{log}: line {number + 1}: first difference" in command.out
    assert "'node_id': 'n7'" in next(line for line in command.out.splitlines() if "recorded" in line)
    assert "'node_id': 'n0'" in next(line for line in command.out.splitlines() if "replayed" in line)


def test_another_policy_is_compared(command: Command, log: Path) -> None:
    assert command("replay", "--log", log, "--policy", "lemix", "--option", "slo_fraction=0.5") == 0
    assert command.row("round_robin") == ["round_robin", "round_robin", "lemix", "slo_fraction=0.5"]
    assert command.row("as it happened") == ["as", "it", "happened", "simulated", "simulated"]
    assert command.row("requests ended well") == ["requests", "ended", "well", "20", "20", "20"]
    assert command.row("SLO attainment")[2].endswith("%")
    for title in ("tasks per held node-second", "mean response, s"):
        assert all(float(cell) > 0.0 for cell in command.row(title)[-3:])
    assert "simulated: virtual time" in command.out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("magic=1", "policy 'lemix' has no option 'magic'"),
        ("slo_fraction=much", "option 'slo_fraction' of policy 'lemix' must be a number >= 0, got 'much'"),
        ("slo_fraction", "expected NAME=VALUE, got 'slo_fraction'"),
    ],
)
def test_a_wrong_option_is_2(command: Command, log: Path, option: str, message: str) -> None:
    assert command("replay", "--log", log, "--policy", "lemix", "--option", option) == 2
    assert message in command.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["replay"], "--log"),
        (["replay", "--log", "LOG", "--policy", "magic"], "--policy"),
        (["replay", "--log", "LOG", "--option", "slo_fraction=1"], "--option needs --policy"),
        (["replay", "--log", "LOG", "--policy", "lemix", "--option", "cut=1", "--option", "cut=2"], "names cut twice"),
        (["newest", "--limit", "0"], "expected a number from 1 to 1000, got '0'"),
        (["explain", "r", "--log", "LOG", "--address", "h:1"], "not allowed with"),
        ([], "COMMAND"),
    ],
)
def test_wrong_usage_is_2(command: Command, log: Path, arguments: list[str], message: str) -> None:
    assert command(*(str(log) if argument == "LOG" else argument for argument in arguments)) == 2
    assert message in command.error
    assert command.error.startswith("explain: ")
    assert command.error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["explain", "r"], ["replay"], ["replay", "--policy", "lemix"]], ids=lambda arguments: arguments[0]
)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"version": 9, "config": {}}, "line 1: field 'version' is 9"),
        ({"now_s": 1.0, "event": {"type": "Tick"}, "commands": []}, "line 1: field 'config' is missing"),
        (None, "No such file or directory"),
    ],
)
def test_a_log_that_cannot_be_used_is_one_line_and_2(
    command: Command, tmp_path: Path, line: dict[str, object] | None, message: str, arguments: list[str]
) -> None:
    path = tmp_path / "bad"
    if line is not None:
        path.write_text(json.dumps(line) + "\n")
    assert command(*arguments, "--log", path) == 2
    assert command.error.startswith(f"explain: {path}: {message}")
    assert command.error.count("\n") == 1


def test_no_scheduler_is_one_line_and_1(command: Command) -> None:
    for arguments in (["newest"], ["explain", "r"]):
        assert command(*arguments, "--address", "127.0.0.1:1") == 1
        assert command.error.startswith("explain: no answer from a scheduler at 127.0.0.1:1: ")
        assert command.error.count("\n") == 1
