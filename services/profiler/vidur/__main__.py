"""`python -m services.profiler.vidur`: a profile artifact from Vidur's tables, compared with the roofline."""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from services.arguments import parser_class
from services.model_shape import ModelShape
from services.profile_artifact import write_artifact
from services.profiler.fit import FitError
from services.profiler.vidur.artifact import profile_of
from services.profiler.vidur.devices import DEVICES
from services.profiler.vidur.stage_times import StageTimes, Tables
from services.profiler.vidur.tables import TableError, read_attention, read_mlp, read_send_recv

_NAME = "services.profiler.vidur"
_CITED = "Vidur (Agrawal et al., MLSys 2024, MIT licence)"


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = parser_class(_NAME)(prog=f"python -m {_NAME}", description=__doc__)
    parser.add_argument("--mlp", type=Path, required=True, help="Vidur's mlp.csv of the model")
    parser.add_argument("--attention", type=Path, required=True, help="Vidur's attention.csv of the model, on one GPU")
    parser.add_argument("--send-recv", type=Path, required=True, help="Vidur's send_recv.csv of the machine")
    parser.add_argument("--config", type=Path, required=True, help="config.json of the model")
    parser.add_argument("--model", required=True, help="id the model is served under")
    parser.add_argument("--stages", type=int, default=2, help="pipeline stages, a GPU each (default 2)")
    parser.add_argument("--measured-on", choices=sorted(DEVICES), default="a100", help="GPU of the tables")
    parser.add_argument("--device", choices=sorted(DEVICES), default="a100", help="GPU of the profile")
    parser.add_argument("--name", required=True, help="fingerprint of the profile")
    parser.add_argument("--date", type=_date, help="date of the profile (default: today)", metavar="YYYY-MM-DD")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Exit code 0: written; 1: a table or the configuration cannot be used."""
    options = build_parser().parse_args(arguments)
    try:
        stages = _stages(options)
        created = options.date or datetime.now(UTC)
        profile = profile_of(
            stages,
            name=options.name,
            model=options.model,
            source=_source(options),
            created_unix_s=created.timestamp(),
        )
        # On one line: half as large.
        text = json.dumps(json.loads(write_artifact(profile)), separators=(",", ":"))
        options.output.write_text(text + "\n", encoding="utf-8")
    except (TableError, FitError) as error:
        print(f"{_NAME}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{_NAME}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    print(_summary(stages))
    return 0


def _stages(options: argparse.Namespace) -> list[StageTimes]:
    shape = _shape(options.config)
    if not 1 <= options.stages <= shape.num_layers:
        raise TableError(f"--stages must be 1 to {shape.num_layers}, the layers of {options.config}")
    tables = Tables(
        layer=read_mlp(options.mlp, shape.hidden, shape.intermediate),
        attention=read_attention(options.attention, shape.hidden),
        transfer=read_send_recv(options.send_recv),
    )
    source, target = DEVICES[options.measured_on], DEVICES[options.device]
    return [StageTimes(shape, tables, stage, options.stages, source, target) for stage in range(options.stages)]


def _shape(path: Path) -> ModelShape:
    try:
        return ModelShape.from_config(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise TableError(f"{path}: not a model configuration: {error}") from error


def _source(options: argparse.Namespace) -> str:
    source, target = DEVICES[options.measured_on], DEVICES[options.device]
    timed = f"derived from kernel times of {source.name} published with {_CITED}"
    return timed if source is target else f"{timed}, scaled to the published specifications of {target.name}"


def _summary(stages: Sequence[StageTimes]) -> str:
    """Times of a few operations, and the share of the roofline that they reach."""
    attention = stages[0].tables.attention
    lines = [
        f"attention: mean error of the fit {attention.prefill_error:.1%} prefill, {attention.decode_error:.1%} decode"
    ]
    first = stages[0]
    for length in (128, 512, 2048):
        least_s = first.roofline_s(length, 1, length * length / 2, length)
        lines.append(_line(f"prefill of {length}", first.prefill(1, length).median, least_s))
    for batch in (1, 16, 64):
        least_s = first.roofline_s(batch, batch, batch * 1024, batch * 1024)
        lines.append(_line(f"decode of {batch} x 1024", first.decode(batch, 1024).median, least_s))
    lines.append(f"optimizer step {first.optimizer_step_s() * 1e3:.1f} ms, weight sync {first.weight_sync_s():.3f} s")
    return "\n".join(lines)


def _line(what: str, duration_s: float, least_s: float) -> str:
    return f"stage 0, {what}: {duration_s * 1e3:.2f} ms, {least_s / duration_s:.0%} of the roofline"


def _date(text: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be YYYY-MM-DD, not {text!r}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
