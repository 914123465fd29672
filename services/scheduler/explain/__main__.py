"""Why a task went where it went, and what another policy would have done.

Exit codes: 0 done, 1 not found or not equal, 2 wrong usage or a log that cannot be used, 130 interrupted.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
from rich.console import Console

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import scheduler_service_pb2_grpc as pb_grpc
from services.arguments import parser_class
from services.scheduler.config import SchedulerSettings
from services.scheduler.core.policies import POLICIES
from services.scheduler.explain import render
from services.scheduler.explain.convert import decision_to_proto
from services.scheduler.explain.counterfactual import compare
from services.scheduler.explain.log_file import Dropped, Entry, LogError, read_log
from services.scheduler.explain.recording import recordings
from services.scheduler.explain.replay import replay

_TIMEOUT_S = 5.0

Option = tuple[str, float | int | str | bool]


def build_parser() -> argparse.ArgumentParser:
    """The sub-commands."""
    parser = parser_class("explain")(prog="python -m services.scheduler.explain", description=_first_line())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    address: str = SchedulerSettings.model_fields["listen"].default
    explain = commands.add_parser("explain", help="the decisions about one task, their terms, and what came of them")
    explain.add_argument("task_id", help="a request's id, or <job>/<sequence> of a micro-batch")
    source = explain.add_mutually_exclusive_group()
    source.add_argument("--address", default=address, help=f"host:port of the scheduler (default {address})")
    source.add_argument("--log", type=Path, help="an event log instead of a scheduler")
    newest = commands.add_parser("newest", help="the newest decisions of a scheduler")
    newest.add_argument("--address", default=address, help=f"host:port of the scheduler (default {address})")
    newest.add_argument("--limit", type=_limit, default=20, help="how many, 1 to 1000 (default 20)")
    played = commands.add_parser(
        "replay", help="play an event log into a fresh core: the same commands? With --policy: what if?"
    )
    played.add_argument("--log", type=Path, required=True, help="the event log (event_log_path of the scheduler)")
    played.add_argument("--policy", choices=sorted(POLICIES), metavar="NAME", help="simulate this policy on it instead")
    played.add_argument(
        "--option", type=_option, action="append", default=[], metavar="NAME=VALUE", help="an option of that policy"
    )
    return parser


def main(arguments: Sequence[str], console: Console | None = None) -> int:
    """Run one command and return its exit code; failures are one line on stderr."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    console = Console() if console is None else console
    try:
        if options.command == "newest":
            return _newest(console, options.address, options.limit)
        if options.command == "explain":
            if options.log is not None:
                return _explain_log(console, options.log, options.task_id)
            return _explain_live(console, options.address, options.task_id)
        if options.policy is None and options.option:
            parser.error("--option needs --policy")
        names = [name for name, _ in options.option]
        if len(set(names)) < len(names):
            parser.error(f"--option names {max(names, key=names.count)} twice")
        if options.policy is None:
            return _replay(console, options.log)
        return _what_if(console, options.log, options.policy, options.option)
    except LogError as error:
        return _fail(str(error), 2)
    except LemixError as error:
        return _fail(error.message, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(message: str, code: int) -> int:
    print(f"explain: {message}", file=sys.stderr)  # noqa: T201
    return code


# ------------------------------------------------------------------------- commands


@contextlib.contextmanager
def _asking(address: str) -> "Iterator[pb_grpc.SchedulerServiceStub]":
    """A scheduler to ask. Raises LemixError for what it, or the way to it, answers."""
    with grpc.insecure_channel(address) as channel:
        try:
            yield pb_grpc.SchedulerServiceStub(channel)
        except grpc.RpcError as error:
            raise _told(error, address) from error


def _explain_live(console: Console, address: str, task_id: str) -> int:
    with _asking(address) as stub:
        found = stub.ExplainTask(pb.ExplainTaskRequest(task_id=task_id), timeout=_TIMEOUT_S)
    render.print_answer(console, task_id, found)
    return 0


def _explain_log(console: Console, path: Path, task_id: str) -> int:
    runs = recordings(_whole(path))
    decisions = [decision for run in runs for decision in run.decisions.get(task_id, ())]
    for decision in decisions:
        render.print_decision(console, decision_to_proto(decision))
    if not decisions:
        arrived = any(task_id in run.tasks for run in runs)
        return _fail(f"{path}: no {'decision about' if arrived else 'task'} {task_id!r}", 1)
    return 0


def _whole(path: Path) -> Iterator[Entry]:
    """The entries of a log. Raises LogError for one that lacks steps: what is worked out from it would be wrong."""
    for entry in read_log(path):
        if isinstance(entry, Dropped):
            raise LogError(f"{path}: line {entry.line}: field 'dropped': {entry.count} steps are missing")
        yield entry


def _newest(console: Console, address: str, limit: int) -> int:
    with _asking(address) as stub:
        found = stub.ListDecisions(pb.ListDecisionsRequest(limit=limit), timeout=_TIMEOUT_S)
    render.print_newest(console, found.decisions, found.now_monotonic_s)
    return 0


def _replay(console: Console, path: Path) -> int:
    runs = replay(path, read_log(path))
    for run in runs:
        render.print_replay(console, str(path), run)
    return int(any(run.difference is not None for run in runs))


def _what_if(console: Console, path: Path, policy: str, options: Sequence[Option]) -> int:
    for recording in recordings(_whole(path)):
        try:
            comparison = compare(recording, policy, dict(options))
        except ValueError as error:
            return _fail(str(error), 2)
        render.print_comparison(console, comparison)
    return 0


def _told(error: grpc.RpcError, address: str) -> LemixError:
    told = LemixError.from_rpc(error)
    if told.code is ErrorCode.NOT_FOUND:
        return told
    return LemixError(told.code, f"no answer from a scheduler at {address}: {told.message} (--address names another)")


# ------------------------------------------------------------------------- arguments


def _option(text: str) -> Option:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        parsed = json.loads(value)
    except ValueError:
        return name, value
    return name, parsed if isinstance(parsed, float | int | bool) else value


def _limit(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 1000, got {text!r}")
    return int(text)


def _first_line() -> str:
    return (__doc__ or "").splitlines()[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
