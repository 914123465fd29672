"""Stage workers as real processes: same results as in one process, and a clean end in every case."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file

from services.node_agent.engine.base import EngineConfig, WorkerDied
from services.node_agent.engine.inference_ops import Decode, DecodeSequence, PrefillSequence, Sampling
from services.node_agent.engine.ops import Forget
from services.node_agent.engine.torch import process
from services.node_agent.engine.torch.arena import create_arena
from services.node_agent.engine.torch.device_sharing import share_device_memory
from services.node_agent.engine.torch.engine import TorchEngine, load_engine
from services.node_agent.engine.torch.load import ModelDirectoryError, read_model
from services.node_agent.engine.torch.process import ProcessStageWorker
from services.node_agent.engine.torch.wire import Place, WorkerSetup
from services.node_agent.engine.training_ops import Example, OptimizerSpec, TrainForward
from services.node_agent.scratch import ScratchFolder
from tests.parity.pipeline import Pipeline
from tests.parity.test_training_parity import batch
from tests.parity.test_weights_parity import existing
from tests.parity.tiny import write_tiny_llama

pytestmark = pytest.mark.asyncio(loop_scope="module")

SPEC = OptimizerSpec(learning_rate=1e-3)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engine(models: dict[str, Path]) -> AsyncIterator[TorchEngine]:
    """Two stages of the tied model, niced and pinned. The tests leave weights and requests behind."""
    cpu = min(os.sched_getaffinity(0))
    loaded = await load_engine(
        EngineConfig(model_path=str(models["llama-tied"]), num_stages=2, dtype="float64", nice=3, cpus=(cpu, cpu))
    )
    yield loaded
    await loaded.close()


async def serve_and_train(pipeline: Pipeline) -> tuple[list[object], dict[str, object]]:
    """Tokens, losses and snapshot of a short life, whichever way the stages run."""
    seen: list[object] = []
    sampling = Sampling(temperature=1.0, seed=1, ignore_eos=True)
    request = PrefillSequence("r", tuple(range(30)), sampling, 8, (1, 2, 3))
    other = PrefillSequence("o", (4, 5), Sampling(), 8)
    result = await pipeline.prefill(request, other)
    seen.append(result.reference_losses)
    for step in range(3):
        seen.append((await pipeline.forward(f"m{step}", batch(step))).loss)
        if step:
            await pipeline.backward(f"m{step - 1}")
            await pipeline.step(SPEC)
        newest = [token.token_id for token in result.tokens]
        seen.append(newest)
        rows = [DecodeSequence("r", newest[0], 30 + step), DecodeSequence("o", newest[1], 2 + step)]
        result = await pipeline.decode(*rows)
    await pipeline.forget("r", "o", "m2")
    files = await pipeline.snapshot("s")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return seen, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


async def test_processes_compute_what_one_process_computes(engine: TorchEngine, models: dict[str, Path]) -> None:
    """Bit for bit: same code, same order, one thread each."""
    found = await serve_and_train(Pipeline(engine))
    assert found == await serve_and_train(Pipeline.load(models["llama-tied"], 2))


async def test_outputs_that_stay_on_devices(models: dict[str, Path], tmp_path: Path) -> None:
    """The way that outputs take between GPUs, with files for their memory: bit for bit the same again."""
    config = EngineConfig(model_path=str(models["llama-tied"]), num_stages=2, dtype="float64")
    spec = read_model(config.model_path)
    fds = [create_arena() for _ in range(2)]
    setups = [WorkerSetup(config, spec, stage, fds, tmp_path / "engine" / f"stage-{stage}") for stage in range(2)]
    starting = [ProcessStageWorker.start(setup, fds, module="tests.parity.file_memory_worker") for setup in setups]
    workers = await asyncio.gather(*starting)
    for fd in fds:
        os.close(fd)
    engine = TorchEngine(spec.info(0), workers, ScratchFolder("engine"))
    try:
        assert await share_device_memory(workers) == ""
        found = await serve_and_train(Pipeline(engine))
        assert found == await serve_and_train(Pipeline.load(models["llama-tied"], 2))
        output = (await Pipeline(engine, version=2).run(0, TrainForward(1, 2, "m", (Example((1, 2)),)))).output
        assert output is not None
        assert isinstance(output.token, Place)
        assert output.token.on_device
    finally:
        await engine.close()


async def test_workers_are_niced_pinned_and_ignore_interrupts(engine: TorchEngine) -> None:
    for worker in engine.workers:
        found = psutil.Process(worker.pid)
        assert found.nice() == psutil.Process().nice() + 3
        assert found.cpu_affinity() == [min(os.sched_getaffinity(0))]
        found.send_signal(signal.SIGINT)
        assert (await worker.run(Forget(7, ()))).op_id == 7


async def test_ops_sent_together_are_answered_in_order(engine: TorchEngine) -> None:
    results = await asyncio.gather(*(engine.workers[0].run(Forget(number, ())) for number in range(20)))
    assert [result.op_id for result in results] == list(range(20))


async def test_a_caller_that_gives_up_does_not_shift_the_answers(engine: TorchEngine) -> None:
    worker = engine.workers[0]
    given_up = worker.run(Forget(1, ()))
    await asyncio.sleep(0)
    given_up.cancel()
    assert (await worker.run(Forget(2, ()))).op_id == 2


async def test_failed_op_leaves_the_worker_usable(engine: TorchEngine) -> None:
    worker = engine.workers[0]
    assert "VersionMismatch" in (await worker.run(TrainForward(1, 99, "m", ()))).error
    assert "VersionMismatch" in (await worker.run(Decode(1, 99, ()))).error
    assert (await worker.run(Forget(2, ()))).error == ""


async def test_dead_worker_is_reported_and_nothing_is_left(models: dict[str, Path]) -> None:
    """A crash in the middle of an op names the stage, the exit code and where it was; the rest closes cleanly."""
    engine = await load_engine(EngineConfig(model_path=str(models["llama"]), num_stages=2))
    pids = [worker.pid for worker in engine.workers]
    assert shared_memory_files(pids) == {"/memfd:lemix-arena"}, "memory with a name could be left behind"
    snapshots = await Pipeline(engine).snapshot("s")
    assert existing(snapshots) == snapshots
    os.kill(pids[1], signal.SIGSTOP)
    waiting = engine.workers[1].run(Forget(1, ()))
    await asyncio.sleep(0)
    os.kill(pids[1], signal.SIGSEGV)
    os.kill(pids[1], signal.SIGCONT)
    with pytest.raises(WorkerDied, match=r"stage 1 worker \(pid \d+\) ended with exit code -11: Fatal Python error"):
        await waiting
    with pytest.raises(WorkerDied, match="stage 1"):
        await engine.workers[1].run(Forget(2, ()))
    assert (await engine.workers[0].run(Forget(3, ()))).error == ""
    await engine.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert existing([str(Path(snapshot).parents[1]) for snapshot in snapshots]) == []


def shared_memory_files(pids: list[int]) -> set[str]:
    """What these processes share in memory. /dev/shm itself tells nothing: other programs come and go there."""
    paths = {mapping.path for pid in pids for mapping in psutil.Process(pid).memory_maps()}
    return {path for path in paths if path.startswith(("/memfd:", "/dev/shm/"))}


async def test_worker_that_does_not_end_is_killed(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_CLOSE_S", 0.2)
    engine = await load_engine(EngineConfig(model_path=str(models["llama"])))
    pid = engine.workers[0].pid
    os.kill(pid, signal.SIGSTOP)
    await engine.close()
    assert not psutil.pid_exists(pid)


async def test_start_error_of_one_stage_arrives_as_it_was(tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children()}
    path = write_tiny_llama(tmp_path, layers=2)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelDirectoryError, match=f"{path} lack the tensor model.layers.1.mlp.down_proj.weight"):
        await load_engine(EngineConfig(model_path=str(path), num_stages=2))
    assert {child.pid for child in psutil.Process().children()} <= before


async def test_start_timeout_leaves_no_process(models: dict[str, Path]) -> None:
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(TimeoutError):
        await load_engine(EngineConfig(model_path=str(models["llama"]), num_stages=2), start_timeout_s=0.05)
    assert {child.pid for child in psutil.Process().children()} <= before


async def test_workers_end_when_their_parent_is_killed(models: dict[str, Path]) -> None:
    script = (
        "import asyncio, os, signal, sys\n"
        "from services.node_agent.engine.base import EngineConfig\n"
        "from services.node_agent.engine.weight_ops import Snapshot\n"
        "from services.node_agent.engine.torch.engine import load_engine\n"
        "async def main():\n"
        "    engine = await load_engine(EngineConfig(model_path=sys.argv[1], num_stages=2))\n"
        "    results = [await worker.run(Snapshot(1, 0, 's')) for worker in engine.workers]\n"
        "    print(*(w.pid for w in engine.workers), *(r.weights_path for r in results), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        script,
        str(models["llama"]),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": "."},
    )
    output, _ = await asyncio.wait_for(parent.communicate(), 60)
    assert parent.returncode == -signal.SIGKILL
    *pids, first, second = output.decode().split()
    processes = [psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))]
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, 10)
    assert alive == []
    assert existing([str(Path(snapshot).parents[1]) for snapshot in (first, second)]) == []
