"""Measures nodes, and shows, compares, reports and deletes their profiles.

Exit codes: 0 done, 1 not found or refused, 2 wrong usage or a file that cannot be used, 130 interrupted.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import grpc

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import profile_pb2, work_pb2
from lemix.internal.v1 import profiler_service_pb2 as profiler_pb2
from lemix.internal.v1 import profiler_service_pb2_grpc as profiler_grpc
from services.arguments import parser_class
from services.profile_artifact import ArtifactError, load_artifact
from services.profiler.compare import compare
from services.profiler.config import ProfilerSettings
from services.profiler.profiles import render
from services.profiler.report.page import report
from services.profiler.store import is_profile_id
from services.runtime.grpc_server import MAX_MESSAGE_BYTES

_NAME = "profiles"
_NAMED = "its id (asked of the profiler), or a file"
_TIMEOUT_S = 30.0
#: Longest measurement that is waited for.
_RUN_TIMEOUT_S = 86_400.0


class FileError(ValueError):
    """A file that is no profile or cannot be written, or a name of no file and no profile; the message has it."""


def build_parser() -> argparse.ArgumentParser:
    """The sub-commands."""
    parser = parser_class(_NAME)(prog="python -m services.profiler.profiles", description=__doc__.splitlines()[0])
    address: str = ProfilerSettings.model_fields["listen"].default
    told = f"host:port of the profiler (default {address}); files need none"
    parser.add_argument("--address", default=address, help=told)
    # After the sub-command, too; without a default there, which would win over the one named before it.
    shared = parser_class(_NAME)(add_help=False)
    shared.add_argument("--address", default=argparse.SUPPRESS, help=told)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", parents=[shared], help="measure a node now")
    run.add_argument("node", type=_host_port, help="host:port of the node agent")
    run.add_argument("--budget-s", type=_seconds, default=0.0, help="longest time (default: as the profiler is set)")
    run.add_argument("--samples", type=Path, help="JSON lines of examples, each a list of token ids: their losses")
    run.add_argument("--allow-busy", action="store_true", help="measure between the operations of a node with work")
    listed = commands.add_parser("list", parents=[shared], help="the stored profiles, newest first")
    listed.add_argument("--fingerprint", default="", help="only those of this kind of node")
    show = commands.add_parser("show", parents=[shared], help="what a profile is and predicts with")
    show.add_argument("profile", help=_NAMED)
    diff = commands.add_parser("diff", parents=[shared], help="what two profiles predict differently")
    diff.add_argument("base", help=f"the one that is compared with: {_NAMED}")
    diff.add_argument("other", help=f"the other one: {_NAMED}")
    delete = commands.add_parser("delete", parents=[shared], help="delete profiles for ever")
    delete.add_argument("profile", nargs="+", help="their ids")
    page = commands.add_parser("report", parents=[shared], help="a page with points, fits, interference and memory")
    page.add_argument("profile", help=_NAMED)
    page.add_argument("--output", type=Path, help="file to write (default: out/<id>.html)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; failures are one line on stderr."""
    options = build_parser().parse_args(arguments)
    try:
        match options.command:
            case "run":
                _run(options)
            case "list":
                _list(options.address, options.fingerprint)
            case "show":
                _say(render.details(_profile(options.address, options.profile)))
            case "diff":
                _diff(_profile(options.address, options.base), _profile(options.address, options.other))
            case "delete":
                _delete(options.address, options.profile)
            case "report":
                _report(_profile(options.address, options.profile), options.output)
    except FileError as error:
        return _fail(str(error), 2)
    except LemixError as error:
        return _fail(error.message, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # Whoever reads has seen enough; what is left must not be flushed at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"{_NAME}: {message}\n")
    return code


# ------------------------------------------------------------------------- commands


def _run(options: argparse.Namespace) -> None:
    request = profiler_pb2.ProfileNodeRequest(
        node_address=options.node,
        budget_s=options.budget_s,
        allow_busy=options.allow_busy,
        samples=[] if options.samples is None else _samples(options.samples),
    )
    profile: profile_pb2.Profile | None = None
    with _asking(options.address) as stub:
        for response in stub.ProfileNode(request, timeout=_RUN_TIMEOUT_S):
            if response.HasField("profile"):
                profile = response.profile
            else:
                _show_progress(response.progress)
    if profile is None:
        raise LemixError(ErrorCode.INTERNAL, "the profiler sent no profile")
    _say(render.details(profile))


def _show_progress(progress: profiler_pb2.ProfileProgress) -> None:
    """One line that is written over; for a file a line per tenth."""
    done, total = progress.points_done, progress.points_total
    line = f"{done}/{total} points, {render.kind(progress.op)}, {progress.seconds_left:.0f} s left"
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}" + ("\n" if done == total else ""))
        sys.stderr.flush()
    elif done == total or done % max(1, total // 10) == 0:
        sys.stderr.write(line + "\n")


def _list(address: str, fingerprint: str) -> None:
    with _asking(address) as stub:
        listed = stub.ListProfiles(profiler_pb2.ListProfilesRequest(fingerprint=fingerprint), timeout=_TIMEOUT_S)
    _say(render.listing(listed))


def _diff(base: profile_pb2.Profile, other: profile_pb2.Profile) -> None:
    try:
        found = compare(base, other)
    except ValueError as error:
        raise FileError(f"cannot be compared: {error}") from error
    _say(render.difference(found))


def _delete(address: str, profile_ids: Sequence[str]) -> None:
    for profile_id in profile_ids:
        if not is_profile_id(profile_id):
            raise FileError(f"{profile_id!r} is not a profile's id, <fingerprint>-<version>: nothing was deleted")
    with _asking(address) as stub:
        for profile_id in profile_ids:
            stub.DeleteProfile(profiler_pb2.DeleteProfileRequest(profile_id=profile_id), timeout=_TIMEOUT_S)
            _say([f"deleted {profile_id}"])


def _report(profile: profile_pb2.Profile, output: Path | None) -> None:
    # The id in somebody's file may have a folder in it.
    path = output or Path("out") / f"{Path(profile.profile_id).name or 'profile'}.html"
    try:
        page = report(profile)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except ValueError as error:
        raise FileError(str(error)) from error
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from error
    _say([f"wrote {path}"])


# ------------------------------------------------------------------------- where profiles come from


def _profile(address: str, named: str) -> profile_pb2.Profile:
    """The profile of an id, or in a file. Raises FileError, LemixError."""
    path = Path(named)
    if path.is_file() or not is_profile_id(named):
        if not path.exists() and path.suffix != ".json":
            raise FileError(f"{named!r} is neither a file nor a profile's id, <fingerprint>-<version>")
        try:
            return load_artifact(path)
        except ArtifactError as error:
            raise FileError(str(error)) from error
    with _asking(address, "; an id needs a running profiler, a file does not") as stub:
        return stub.GetProfile(profiler_pb2.GetProfileRequest(profile_id=named), timeout=_TIMEOUT_S).profile


def _samples(path: Path) -> list[work_pb2.TrainingExample]:
    """Raises FileError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: {error}") from error
    samples = []
    for number, line in enumerate(lines, start=1):
        try:
            samples.append(work_pb2.TrainingExample(token_ids=json.loads(line)))
        except (ValueError, TypeError) as error:
            raise FileError(f"{path}: line {number}: not a list of token ids: {error}") from error
    return samples


@contextlib.contextmanager
def _asking(address: str, hint: str = "") -> "Iterator[profiler_grpc.ProfilerServiceStub]":
    """A profiler to ask. Raises LemixError for what it, or the way to it, answers."""
    limits = [(f"grpc.max_{way}_message_length", MAX_MESSAGE_BYTES) for way in ("receive", "send")]
    with grpc.insecure_channel(address, options=limits) as channel:
        try:
            yield profiler_grpc.ProfilerServiceStub(channel)
        except grpc.RpcError as error:
            reason = LemixError.from_rpc(error)
            if not reason.answered:
                message = f"no answer from a profiler at {address}: {reason.message} (--address names another{hint})"
                raise LemixError(reason.code, message) from error
            raise reason from error


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _host_port(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise argparse.ArgumentTypeError(f"must be host:port of a node agent, not {text!r}")
    return text


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= _RUN_TIMEOUT_S:
        raise argparse.ArgumentTypeError(f"must be a number of seconds up to {_RUN_TIMEOUT_S:g}, not {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
