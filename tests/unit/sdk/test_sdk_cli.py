"""The `lemix` command over a fake cluster."""

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lemix.cli.app import run
from lemix.client import Client
from lemix.errors import ErrorCode, LemixError
from lemix.testing import FakeLemix
from lemix.types import Lora, TrainingMethod, TrainingMode

Result = tuple[int, str, str]
Run = Callable[..., Result]


@pytest.fixture
def fake() -> FakeLemix:
    return FakeLemix(["hello [bold] world"])


@pytest.fixture
def lemix_command(fake: FakeLemix, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> Result:
        code = run(arguments, connect=lambda _: fake.client())
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_generate_prints_the_text_as_it_is(lemix_command: Run, fake: FakeLemix) -> None:
    code, out, _ = lemix_command("generate", "Hi", "--temperature", "0", "--stop", "x")
    assert (code, out) == (0, "hello [bold] world\n")
    assert fake.prompts == ["Hi"]


@pytest.mark.parametrize(("terminal", "printed"), [(True, "a\ufffd[2Jb\n\tc"), (False, "a\x1b[2Jb\n\tc")])
def test_a_model_cannot_send_control_characters_to_a_terminal(
    terminal: bool, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lemix.cli.app.Console.is_terminal", terminal)
    fake = FakeLemix(["a\x1b[2Jb\n\tc"])
    assert run(["generate", "x"], connect=lambda _: fake.client()) == 0
    assert printed.expandtabs(8) in capsys.readouterr().out.expandtabs(8)


def test_chat_keeps_the_conversation(lemix_command: Run, fake: FakeLemix, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["one", "", "two"])

    def read(_: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(builtins, "input", read)
    code, out, _ = lemix_command("chat", "--system", "be brief")
    assert code == 0
    assert out.count("hello [bold] world") == 2
    reply = ("assistant", "hello [bold] world")
    assert fake.prompts[-1] == [("system", "be brief"), ("user", "one"), reply, ("user", "two")]


_FULL = LemixError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, "the context is full")


def _talk(monkeypatch: pytest.MonkeyPatch, fake: FakeLemix, *lines: tuple[str, int]) -> None:
    """Lines typed into a chat, each with how often the cluster finds the context full before it answers it."""
    typed = iter(lines)

    def read(_: str) -> str:
        line, times = next(typed, (None, 0))
        if line is None:
            raise EOFError
        fake.fail_next(*[_FULL] * times)
        return line

    monkeypatch.setattr(builtins, "input", read)


def test_chat_drops_the_oldest_turns_when_the_context_is_full(
    lemix_command: Run, fake: FakeLemix, monkeypatch: pytest.MonkeyPatch
) -> None:
    _talk(monkeypatch, fake, ("one", 0), ("two", 0), ("three", 1))
    code, out, _ = lemix_command("chat", "--system", "be brief")
    assert code == 0
    assert "(the context is full: the 2 oldest messages were dropped)" in out
    reply = ("assistant", "hello [bold] world")
    assert fake.prompts[-1] == [("system", "be brief"), ("user", "two"), reply, ("user", "three")]


def test_a_line_that_does_not_fit_at_all_is_told_and_forgotten(
    lemix_command: Run, fake: FakeLemix, monkeypatch: pytest.MonkeyPatch
) -> None:
    _talk(monkeypatch, fake, ("one", 0), ("far too long", 3), ("two", 0))
    code, out, err = lemix_command("chat")
    assert (code, err) == (0, "lemix: [context_length_exceeded] the context is full\n")
    assert "dropped" not in out
    assert fake.prompts[-1] == [("user", "one"), ("assistant", "hello [bold] world"), ("user", "two")]


def test_train_watch_jobs_and_cancel(lemix_command: Run, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a"}\n')
    code, out, _ = lemix_command("train", str(file), "--epochs", "2", "--watch")
    assert code == 0
    assert "job-1: 1 examples" in out
    assert "job-1: succeeded" in out
    code, out, _ = lemix_command("jobs")
    assert (code, "job-1" in out) == (0, True)
    code, out, _ = lemix_command("watch", "job-1")
    assert (code, "done" in out) == (0, True)
    assert lemix_command("cancel", "job-1") == (1, "", "lemix: [conflict] the job has ended\n")
    assert lemix_command("pause", "job-1") == (1, "", "lemix: [conflict] the job has ended\n")
    assert lemix_command("resume", "job-1") == (1, "", "lemix: [conflict] the job has succeeded\n")


def test_checkpoints(lemix_command: Run, tmp_path: Path, fake: FakeLemix) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a"}\n')
    code, _, _ = lemix_command("train", str(file), "--checkpoint-steps", "5", "--validation", str(file))
    assert code == 0
    assert fake.calls.count("CreateFile") == 2
    code, out, _ = lemix_command("checkpoints", "--job", "job-1", "--save")
    assert (code, "fake-node:1:1" in out, "job-1 1" in out) == (0, True, True)
    assert lemix_command("checkpoints", "--save")[0] == 1
    assert lemix_command("export", "fake-node:1:1")[1] == "fake-node: /checkpoints/exports/fake-node-1-1\n"
    code, out, _ = lemix_command("rollback", "fake-node:1:1", "--node", "n1")
    assert (code, out) == (0, "n1 serves version n1:1:2\n")
    code, out, _ = lemix_command("publish", "fake-node:1:1", "--node", "n1", "--node", "n2")
    assert (code, out) == (0, "n1 serves version n1:1:1\nn2 serves version n2:1:1\n")
    assert lemix_command("rollback", "other:1:1")[0] == 1


def test_feedback(lemix_command: Run, fake: FakeLemix) -> None:
    code, out, _ = lemix_command("feedback", "--prompt", "q", "--completion", "a")
    assert (code, out) == (0, "accepted as example 1 of feedback\n")
    assert fake.feedback[0].pair.completion == "a"


def test_status(lemix_command: Run) -> None:
    code, out, _ = lemix_command("status")
    assert code == 0
    assert "ready" in out
    assert "fake-node" in out


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (LemixError(ErrorCode.NOT_FOUND, "there is no job x"), "lemix: [not_found] there is no job x\n"),
        (LemixError(ErrorCode.OVERLOADED, "full [b]"), "lemix: [overloaded] full [b]\n"),
    ],
)
def test_failures_are_one_line(lemix_command: Run, fake: FakeLemix, error: LemixError, line: str) -> None:
    fake.fail_next(error)
    assert lemix_command("watch", "x") == (1, "", line)


def test_an_unreachable_cluster_names_the_address(lemix_command: Run, fake: FakeLemix) -> None:
    fake.fail_next(*[LemixError(ErrorCode.UNAVAILABLE, "connection refused")] * 10)
    code, _, err = lemix_command("--address", "10.0.0.1:7", "status")
    assert code == 1
    assert "10.0.0.1:7" in err
    assert err.count("\n") == 1


def test_what_a_cluster_says_is_not_taken_for_silence(lemix_command: Run, fake: FakeLemix) -> None:
    sent = LemixError(ErrorCode.UNAVAILABLE, "node node-9 is not connected").to_proto()
    fake.fail_next(*[LemixError.from_proto(sent)] * 10)
    line = "lemix: [unavailable] node node-9 is not connected\n"
    assert lemix_command("rollback", "node-0:1:2", "--node", "node-9") == (1, "", line)


def test_tables_hold_whole_ids_on_a_narrow_terminal(
    lemix_command: Run, fake: FakeLemix, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    file = tmp_path / "examples.jsonl"
    file.write_text('{"text": "a"}\n')
    lemix_command("train", str(file))
    _, out, _ = lemix_command("checkpoints", "--job", "job-1", "--save")
    row = out.splitlines()[1]
    assert row.startswith("fake-node:1:1 ")
    assert "job-1" in row


@pytest.mark.parametrize(
    "arguments", [("nothing",), ("generate",), ("generate", "x", "--max-tokens", "0"), ("train", "/no/such/file")]
)
def test_wrong_usage_is_exit_code_2(lemix_command: Run, arguments: tuple[str, ...]) -> None:
    assert lemix_command(*arguments)[0] == 2


def test_an_interrupt_is_exit_code_130() -> None:
    def connect(_: str) -> Client:
        raise KeyboardInterrupt

    assert run(["status"], connect=connect) == 130


def test_the_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEMIX_ADDRESS", "host:1")
    seen: list[Any] = []

    def connect(address: str) -> Client:
        seen.append(address)
        return FakeLemix().client()

    assert run(["status"], connect=connect) == 0
    assert seen == ["host:1"]


def test_generate_may_insist_on_fresh_weights(lemix_command: Run, fake: FakeLemix) -> None:
    fake.fail_next(LemixError(ErrorCode.STALE_WEIGHTS, "the freshest are 9 s old"))
    code, _, err = lemix_command("generate", "Hi", "--max-staleness", "5")
    assert (code, err) == (1, "lemix: [stale_weights] the freshest are 9 s old\n")
    assert lemix_command("generate", "Hi", "--max-staleness", "0")[0] == 2


def test_an_adapter_is_trained_served_and_deleted(lemix_command: Run, tmp_path: Path, fake: FakeLemix) -> None:
    file = tmp_path / "examples.jsonl"
    file.write_text('{"text": "a"}\n', encoding="utf-8")
    code, out, _ = lemix_command("train", str(file), "--lora", "--rank", "4", "--isolated")
    assert code == 0
    assert "served as fake:job-1" in out
    with fake.client() as client:
        job = client.get_job("job-1")
        assert (job.method, job.mode, job.served_model) == (TrainingMethod.LORA, TrainingMode.ISOLATED, "fake:job-1")
        assert job.lora == Lora(rank=4, alpha=0.0, dropout=0.0)
        assert [(model.model_id, model.parent) for model in client.models()] == [("fake", ""), ("fake:job-1", "fake")]
        assert client.generate("x", model="fake:job-1").model == "fake:job-1"
    assert lemix_command("generate", "x", "--model", "fake:job-1")[0] == 0
    assert lemix_command("delete", "fake:job-1")[1] == "fake:job-1: deleted\n"
    assert lemix_command("generate", "x", "--model", "fake:job-1")[0] == 1
    assert lemix_command("delete", "fake:job-1")[0] == 1
    assert lemix_command("train", str(file), "--rank", "4")[0] == 2
