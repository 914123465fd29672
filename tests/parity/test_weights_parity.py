"""Serving while the weights change, and moving weights between replicas."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.node_agent.engine.inference_ops import DecodeSequence, PrefillSequence, Sampling
from services.node_agent.engine.training_ops import OptimizerSpec
from services.node_agent.engine.weight_ops import LoadWeights
from tests.parity.conftest import MODELS
from tests.parity.pipeline import Pipeline, assert_close
from tests.parity.reference import PlainLoop, load_reference, named_weights
from tests.parity.test_training_parity import batch

OPTIMIZER = OptimizerSpec(learning_rate=3e-3, eps=1e-6)


async def train(pipeline: Pipeline, seed: int) -> None:
    """One optimizer step."""
    await pipeline.forward("m", batch(seed))
    await pipeline.backward("m")
    await pipeline.step(OPTIMIZER)


def existing(files: list[str]) -> list[str]:
    """Those that exist."""
    return [file for file in files if Path(file).exists()]


async def merged_snapshot(pipeline: Pipeline, sync_id: str, path: Path) -> Path:
    """Snapshot of all stages in one file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in await pipeline.snapshot(sync_id):
        stage = load_file(file)
        assert not set(stage) & set(tensors)
        tensors |= stage
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
async def test_decoding_amid_training_equals_decoding_at_the_same_versions(
    models: dict[str, Path], name: str, tmp_path: Path
) -> None:
    """A request decoded while steps run between its iterations (one micro-batch in flight throughout) equals one whose
    weights are set to the same versions by hand, without any training."""
    sampling = Sampling(temperature=0.8, seed=3, ignore_eos=True)
    request = PrefillSequence("r", tuple(range(40, 52)), sampling, 10)
    live = Pipeline.load(models[name], 2)
    live_logits = live.record_logits()
    versions = []
    tokens = [(await live.prefill(request)).tokens[0].token_id]
    await live.forward("m0", batch(0))
    for step in range(9):
        if step % 3 != 2:
            await live.forward(f"m{step + 1}", batch(step + 1))
            await live.backward(f"m{step}")
            await live.step(OPTIMIZER)
        else:
            await live.forward(f"m{step + 1}", batch(step + 1))
            await live.forget(f"m{step}")
        file = await merged_snapshot(live, f"s{step}", tmp_path / f"{step}.safetensors")
        result = await live.decode(DecodeSequence("r", tokens[-1], 12 + step))
        tokens.append(result.tokens[0].token_id)
        versions.append(file)
    served = [rows for rows in live_logits if len(rows) == 1]

    replay = Pipeline.load(models[name], 3)
    replay_logits = replay.record_logits()
    repeated = [(await replay.prefill(request)).tokens[0].token_id]
    for step, file in enumerate(versions):
        await replay.load_weights("", file, "replace")
        result = await replay.decode(DecodeSequence("r", repeated[-1], 12 + step))
        repeated.append(result.tokens[0].token_id)
    assert repeated == tokens
    for found, expected in zip(served, replay_logits, strict=True):
        assert float((found - expected).norm() / expected.norm()) <= 1e-9
    assert not torch.allclose(served[-1], served[0])


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("name", MODELS)
async def test_snapshot_holds_the_whole_model(models: dict[str, Path], name: str, stages: int, tmp_path: Path) -> None:
    loop = PlainLoop(load_reference(models[name]), OPTIMIZER)
    pipeline = Pipeline.load(models[name], stages)
    for seed in range(2):
        loop.apply([loop.gradient(batch(seed))])
        await train(pipeline, seed)
    file = await merged_snapshot(pipeline, "s", tmp_path / "all.safetensors")
    assert_close(load_file(file), named_weights(loop.model))


async def test_replace_takes_over_a_replica_of_another_cut(models: dict[str, Path], tmp_path: Path) -> None:
    for name in ("llama", "llama-tied"):
        source, target = Pipeline.load(models[name], 3), Pipeline.load(models[name], 2)
        await train(source, 1)
        file = await merged_snapshot(source, "s", tmp_path / f"{name}.safetensors")
        await target.load_weights("s", file, "replace")
        assert_close(target.weights(), source.weights(), 0.0)
        request = PrefillSequence("r", (1, 2, 3, 4), Sampling(ignore_eos=True), 8)
        assert await target.generate(request) == await source.generate(request)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
async def test_average_keeps_steps_made_meanwhile(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    """weights += mean of all snapshots - own snapshot; the tied copy on the last stage follows exactly."""
    replicas = [Pipeline.load(models[name], 2), Pipeline.load(models[name], 3)]
    for place, replica in enumerate(replicas):
        await train(replica, place)
    snapshots = [replica.weights() for replica in replicas]
    files = [load_file(await merged_snapshot(r, "s", tmp_path / f"{i}.safetensors")) for i, r in enumerate(replicas)]
    mean = {key: (files[0][key] + files[1][key]) / 2 for key in files[0]}
    save_file(mean, tmp_path / "mean.safetensors")
    for place, replica in enumerate(replicas):
        await train(replica, 10 + place)
        before = replica.weights()
        await replica.load_weights("s", tmp_path / "mean.safetensors", "average")
        expected = {key: before[key] + mean[key] - snapshots[place][key] for key in mean}
        assert_close(replica.weights(), expected, 1e-14)
        borrowed = replica.executors[-1].stage.weights.borrowed
        if borrowed is not None:
            assert torch.equal(borrowed.parameter, replica.executors[0].stage.weights.weights[0].parameter)


async def test_weights_arriving_amid_a_microbatch_do_not_touch_its_graph(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """The gradient is that of the weights the forward ran with, applied to the new ones."""
    loop = PlainLoop(load_reference(models["llama"]), OPTIMIZER)
    expected = loop.gradient(batch(5))
    source, target = Pipeline.load(models["llama"]), Pipeline.load(models["llama"], 2)
    await train(source, 1)
    file = await merged_snapshot(source, "s", tmp_path / "s.safetensors")
    await target.forward("m", batch(5))
    await target.load_weights("s", file, "replace")
    await target.backward("m")
    assert_close(target.gradients(), expected)
    assert_close(target.weights(), source.weights(), 0.0)


@pytest.mark.parametrize("damage", ["missing", "shape", "mode", "snapshot", "file"])
async def test_unusable_weights_are_refused_by_every_stage(
    models: dict[str, Path], damage: str, tmp_path: Path
) -> None:
    """The old weights stay, on every stage; the versions rise together."""
    pipeline = Pipeline.load(models["llama"], 2)
    path = await merged_snapshot(pipeline, "s", tmp_path / "s.safetensors")
    before = pipeline.weights()
    tensors = load_file(path)
    # Only the last stage's tensor is damaged: the first stage must refuse as well.
    if damage == "missing":
        del tensors["lm_head.weight"]
    if damage == "shape":
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file({key: value + 1 for key, value in tensors.items()}, path)
    if damage == "file":
        path = tmp_path / "absent.safetensors"
    mode = {"mode": "blend", "snapshot": "average"}.get(damage, "replace")
    sync_id = "unknown" if damage == "snapshot" else "s"
    for worker in pipeline.engine.workers:
        result = await worker.run(LoadWeights(0, 0, sync_id, str(path), mode))
        wanted = {
            "missing": "lm_head.weight",
            "shape": "shape",
            "mode": "blend",
            "snapshot": "unknown",
            "file": "exist",
        }
        assert wanted[damage] in result.error
        assert result.version == 1
    assert_close(pipeline.weights(), before, 0.0)


async def test_only_the_newest_snapshots_are_kept(models: dict[str, Path]) -> None:
    pipeline = Pipeline.load(models["llama-tied"], 2)
    files = [await pipeline.snapshot(f"s{number}") for number in range(3)]
    assert [existing(stages) for stages in files] == [[], files[1], files[2]]
    await pipeline.engine.close()
    assert existing(files[2]) == []
