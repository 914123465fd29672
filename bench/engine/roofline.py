"""Op times against the roofline of a device: `python -m bench.engine.roofline --device cuda:0 --dtype bfloat16`.

The roofline is what the device itself does in the same type: its fastest matrix product, and its fastest copy. The
least time of an op is the longer of two: its floating point operations at the one speed, and reading its weights once
(a backward twice) at the other. Attention and activations are left out. Writes `out/bench/roofline.json`.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.report.summary import run_facts, write_summary
from deploy.local.tiny_model import write_tiny_model
from services.arguments import parser_class
from services.latency import OpKind
from services.node_agent.engine.base import EngineConfig
from services.node_agent.engine.ops import Measure
from services.node_agent.engine.torch.engine import load_inprocess_engine
from services.node_agent.engine.torch.linear import linear
from services.node_agent.engine.torch.stage import parse_dtype

#: Operation, batch, length (of the context for decode).
POINTS = (
    (OpKind.PREFILL, 1, 128),
    (OpKind.PREFILL, 8, 128),
    (OpKind.DECODE, 8, 128),
    (OpKind.TRAIN_FORWARD, 1, 128),
    (OpKind.TRAIN_FORWARD, 8, 128),
)
_PRODUCT, _COPY_BYTES = 2048, 256 << 20


@dataclass(frozen=True, slots=True)
class Roofline:
    """Measured on the device."""

    flops_per_s: float
    bytes_per_s: float

    def least_s(self, flops: float, num_bytes: float) -> float:
        """No op can be faster."""
        return max(flops / self.flops_per_s, num_bytes / self.bytes_per_s)


@dataclass(frozen=True, slots=True)
class Row:
    """One operation. `share`: of the roofline's speed."""

    op: str
    batch: int
    length: int
    median_s: float
    least_s: float

    @property
    def share(self) -> float:
        """1: as fast as the device can."""
        return self.least_s / self.median_s


@torch.inference_mode()
def measure_device(device: torch.device, dtype: torch.dtype, repetitions: int) -> Roofline:
    """The best of so many products and copies."""
    left, right = (torch.randn(_PRODUCT, _PRODUCT, device=device, dtype=dtype) for _ in range(2))
    products: tuple[Callable[[], Tensor], ...] = (lambda: torch.mm(left, right), lambda: linear(left, right))
    product_s = min(_fastest(product, device, repetitions) for product in products)
    source = torch.ones(_COPY_BYTES // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy_s = _fastest(lambda: target.copy_(source), device, repetitions)
    return Roofline(2 * _PRODUCT**3 / product_s, 2 * _COPY_BYTES / copy_s)


def work(kind: str, batch: int, length: int, num_parameters: int, item_bytes: int) -> tuple[float, float]:
    """Floating point operations and bytes of an op of the whole model."""
    tokens = batch * (1 if kind == OpKind.DECODE else length)
    passes = 2 if kind == OpKind.TRAIN_BACKWARD else 1
    return 2.0 * passes * tokens * num_parameters, float(passes * num_parameters * item_bytes)


async def measure(
    device: str, dtype: str, hidden: int, layers: int, repetitions: int
) -> tuple[Roofline, list[Row], int]:
    """The device, every op, and the number of parameters."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_tiny_model(path, hidden=hidden, layers=layers, max_context_tokens=1024)
        engine = load_inprocess_engine(EngineConfig(model_path=str(path), devices=(device,), dtype=dtype))
        try:
            kind = parse_dtype(dtype)
            roofline = measure_device(torch.device(device), kind, repetitions)
            num_parameters = engine.info.num_parameters
            rows = []
            for op, batch, length in POINTS:
                result = await engine.workers[0].run(Measure(0, op.value, batch, length, repetitions, 2))
                if result.error:
                    raise RuntimeError(result.error)
                for name, durations in result.durations_s:
                    least_s = roofline.least_s(*work(name, batch, length, num_parameters, kind.itemsize))
                    rows.append(Row(name, batch, length, statistics.median(durations), least_s))
        finally:
            await engine.close()
    return roofline, rows, num_parameters


def _fastest(run: Callable[[], object], device: torch.device, repetitions: int) -> float:
    durations = []
    for _ in range(repetitions + 1):
        begin_s = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - begin_s)
    return min(durations[1:])


def main() -> None:
    """Measure, print, write."""
    parser = parser_class("roofline")(prog="python -m bench.engine.roofline", description="Op times and the roofline.")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:0")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16")
    parser.add_argument("--hidden", type=int, default=384, help="width of the Llama, a multiple of 32")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("out/bench/roofline.json"))
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: no CUDA device on this machine")
    torch.set_num_threads(1)
    facts = run_facts()
    roofline, rows, num_parameters = asyncio.run(
        measure(args.device, args.dtype, args.hidden, args.layers, args.repetitions)
    )
    print(_title(args, roofline, num_parameters))
    print(f"{'op':<16}{'batch':>6}{'length':>8}{'median ms':>11}{'least ms':>10}{'share':>7}")
    for row in rows:
        times = f"{1e3 * row.median_s:>11.3f}{1e3 * row.least_s:>10.3f}{row.share:>7.2f}"
        print(f"{row.op:<16}{row.batch:>6}{row.length:>8}{times}")
    report: dict[str, Any] = {
        "config": {key: value for key, value in vars(args).items() if key != "out"},
        "num_parameters": num_parameters,
        "roofline": asdict(roofline),
        "ops": [asdict(row) | {"share": row.share} for row in rows],
    }
    write_summary(args.out, facts | report)


def _title(args: argparse.Namespace, roofline: Roofline, num_parameters: int) -> str:
    name = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "CPU, 1 thread"
    return (
        f"{name}, {args.dtype}, {num_parameters / 1e6:.1f} M parameters: {roofline.flops_per_s / 1e9:,.0f} GFLOP/s, "
        f"{roofline.bytes_per_s / 1e9:,.1f} GB/s"
    )


if __name__ == "__main__":
    main()
