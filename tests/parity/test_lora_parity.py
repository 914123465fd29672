"""LoRA on pipeline stages equals a plain peft model on the unsplit transformers model, in float64."""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from lemix.errors import LemixError
from services.node_agent.checkpoint_files import weights_files
from services.node_agent.checkpoint_manifest import Manifest
from services.node_agent.checkpoint_store import CheckpointStore
from services.node_agent.engine.inference_ops import DecodeSequence, Prefill, PrefillSequence, Sampling
from services.node_agent.engine.ops import Forget
from services.node_agent.engine.torch.adapters import Use
from services.node_agent.engine.torch.lora_config import adapter_shapes, lora_arguments
from services.node_agent.engine.training_ops import AdapterSpec, Example, TrainForward
from services.node_agent.engine.weight_ops import LoadWeights, RestoreCheckpoint, SaveCheckpoint, Snapshot
from tests.parity.pipeline import Pipeline, assert_close
from tests.parity.reference import PlainLoop, example_losses, full_logits, load_reference
from tests.parity.test_training_parity import OPTIMIZER, batch

MODELS = ("llama", "llama-tied", "gpt2")
STAGES = (1, 2, 3)
SPEC = AdapterSpec("job-1", rank=4, alpha=6.0, target_modules=("all-linear",), isolated=True)
ONLINE = replace(SPEC, adapter_id="job-2", rank=3, target_modules=(), isolated=False)


class PeftLoop:
    """Clipping, AdamW and schedule on the adapter of a plain PeftModel, which begins with the stages' values."""

    def __init__(self, path: Path, spec: AdapterSpec, pipeline: Pipeline) -> None:
        model = load_reference(path)
        self.model = get_peft_model(model, LoraConfig(**lora_arguments(spec, pipeline.executors[0].stage.spec)))
        self.named = {
            name.replace(".default.", "."): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        begin = pipeline.adapter(spec.adapter_id)
        assert set(self.named) == set(begin)
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(begin[name])
        self.loop = PlainLoop(_Trainable(self.model), OPTIMIZER)

    def gradient(self, examples: Sequence[Example], scale: float = 1.0) -> dict[str, Tensor]:
        """Of one micro-batch at the current weights, by the stages' names."""
        loss = example_losses(self.model, examples) * scale
        return dict(zip(self.named, torch.autograd.grad(loss, list(self.named.values())), strict=True))

    def apply(self, gradient: dict[str, Tensor]) -> None:
        """One step."""
        names = dict(zip(self.named, dict(self.loop.model.named_parameters()), strict=True))
        self.loop.apply([{names[name]: value for name, value in gradient.items()}])

    def weights(self) -> dict[str, Tensor]:
        """The adapter by the stages' names."""
        return {name: parameter.detach().clone() for name, parameter in self.named.items()}


class _Trainable(torch.nn.Module):
    """A model that shows its trainable parameters only."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.parameters_of_the_adapter = torch.nn.ParameterList(chosen)


def make(pipeline: Pipeline, spec: AdapterSpec, *, seed: int | None = 0) -> None:
    """The adapter on every stage; with a seed its values are random, also those that begin as zeros."""
    generator = torch.Generator().manual_seed(seed or 0)
    for executor in pipeline.executors:
        for weight in executor.training.adapter(spec).weights.owned if seed is not None else ():
            with torch.no_grad():
                weight.parameter.normal_(std=0.2, generator=generator)


async def train(pipeline: Pipeline, spec: AdapterSpec | None, step: int, job_id: str = "") -> None:
    """One micro-batch and its step."""
    await pipeline.forward("m", batch(step), adapter=spec)
    await pipeline.backward("m")
    await pipeline.step(OPTIMIZER, job_id or (spec.adapter_id if spec else "full"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", MODELS)
async def test_gradients(models: dict[str, Path], name: str, stages: int, checkpointing: bool) -> None:
    """Whole, and cut into pieces by examples and layers."""
    pipeline = Pipeline.load(models[name], stages, activation_checkpointing=checkpointing)
    make(pipeline, SPEC)
    expected = PeftLoop(models[name], SPEC, pipeline).gradient(batch(1))
    norm_sq = float(sum(gradient.square().sum() for gradient in expected.values()))
    for group, parts in enumerate((1, 3, 7)):
        await pipeline.forward("m", batch(1), parts=parts, adapter=SPEC)
        await pipeline.backward("m", group, parts=parts)
        assert_close(pipeline.adapter_gradients("job-1", group), expected)
        assert pipeline.grad_norms_sq[group] == pytest.approx(norm_sq, rel=1e-9)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", MODELS)
async def test_ten_steps_leave_the_model_as_it_was(models: dict[str, Path], name: str, stages: int) -> None:
    pipeline = Pipeline.load(models[name], stages)
    before = pipeline.weights()
    make(pipeline, SPEC, seed=None)
    for executor in pipeline.executors:
        executor.training.adapter(SPEC)
    loop = PeftLoop(models[name], SPEC, pipeline)
    begin = pipeline.adapter("job-1")
    for step in range(10):
        await train(pipeline, SPEC, step)
        loop.apply(loop.gradient(batch(step)))
    assert_close(pipeline.adapter("job-1"), loop.weights())
    assert all(not torch.equal(value, begin[key]) for key, value in pipeline.adapter("job-1").items())
    after = pipeline.weights()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(executor.stage.weights.pristine for executor in pipeline.executors)
    assert pipeline.version == 10


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("name", MODELS)
async def test_served_logits(models: dict[str, Path], name: str, stages: int) -> None:
    """One batch holds requests of the model itself and of two adapters; every one gets its own logits."""
    pipeline = Pipeline.load(models[name], stages)
    other = replace(SPEC, adapter_id="job-3", target_modules=())
    make(pipeline, SPEC)
    make(pipeline, other, seed=3)
    source = random.Random(5)
    prompts = [tuple(source.randrange(256) for _ in range(length)) for length in (9, 4, 6, 11)]
    adapters = ("job-1", "", "job-3", "job-1")
    recorded = pipeline.record_logits()
    sequences = [
        PrefillSequence(f"r{index}", prompt, Sampling(), 8, adapter_id=adapters[index])
        for index, prompt in enumerate(prompts)
    ]
    result = await pipeline.prefill(*sequences)
    models_of = {spec.adapter_id: PeftLoop(models[name], spec, pipeline).model for spec in (SPEC, other)} | {
        "": load_reference(models[name])
    }
    for index, (prompt, adapter_id) in enumerate(zip(prompts, adapters, strict=True)):
        expected = full_logits(models_of[adapter_id], prompt)[-1]
        assert_close({"logits": recorded[0][index]}, {"logits": expected})
    # Decoding goes on with the same adapters, also when the requests of one are alone.
    tokens = [token.token_id for token in result.tokens]
    for chosen in ((0, 1, 3), (2,), (1, 2), (0, 3)):
        recorded.clear()
        given = [DecodeSequence(f"r{index}", tokens[index], len(prompts[index])) for index in chosen]
        result = await pipeline.decode(*given)
        for row, index in enumerate(chosen):
            prompts[index] = (*prompts[index], tokens[index])
            tokens[index] = result.tokens[row].token_id
            expected = full_logits(models_of[adapters[index]], prompts[index])[-1]
            assert_close({"logits": recorded[0][row]}, {"logits": expected})


@pytest.mark.parametrize("name", ["llama", "gpt2"])
async def test_an_online_adapter_is_part_of_the_served_model(models: dict[str, Path], name: str) -> None:
    """Requests for the model run with it, those of an isolated adapter without, and later jobs train on top of it."""
    pipeline = Pipeline.load(models[name], 2)
    make(pipeline, ONLINE, seed=1)
    make(pipeline, SPEC)
    online, isolated = (PeftLoop(models[name], spec, pipeline) for spec in (ONLINE, SPEC))
    recorded = pipeline.record_logits()
    prompt = (4, 5, 6, 7)
    await pipeline.prefill(PrefillSequence("a", prompt, Sampling(), 2))
    await pipeline.prefill(
        PrefillSequence("b", prompt, Sampling(), 2), PrefillSequence("c", prompt, Sampling(), 2, adapter_id="job-1")
    )
    expected = full_logits(online.model, prompt)[-1]
    assert_close({"logits": recorded[0][0]}, {"logits": expected})
    assert_close({"logits": recorded[1][0]}, {"logits": expected})
    assert_close({"logits": recorded[1][1]}, {"logits": full_logits(isolated.model, prompt)[-1]})
    result = await pipeline.forward("full", batch(1))
    assert result.loss == pytest.approx(float(example_losses(online.model, batch(1)).detach()), rel=1e-9)
    await pipeline.backward("full")
    base = {n: p for n, p in online.model.named_parameters() if "lora_" not in n}
    for parameter in base.values():
        parameter.requires_grad_()
    gradients = torch.autograd.grad(example_losses(online.model, batch(1)), list(base.values()))
    names = [n.removeprefix("base_model.model.").replace(".base_layer.", ".") for n in base]
    assert_close(pipeline.gradients(), dict(zip(names, gradients, strict=True)))


@pytest.mark.parametrize("delay", [1, 2])
async def test_steps_between_forward_and_backward(models: dict[str, Path], delay: int) -> None:
    """A gradient belongs to the adapter that its forward ran with, and is applied late."""
    pipeline = Pipeline.load(models["llama"], 2)
    make(pipeline, SPEC)
    loop = PeftLoop(models["llama"], SPEC, pipeline)
    late: deque[dict[str, Tensor]] = deque()
    for step in range(6):
        late.append(loop.gradient(batch(step)))
        await pipeline.forward(f"m{step}", batch(step), adapter=SPEC)
        if step >= delay:
            loop.apply(late.popleft())
            await pipeline.backward(f"m{step - delay}")
            await pipeline.step(OPTIMIZER, "job-1")
    assert_close(pipeline.adapter("job-1"), loop.weights())


async def test_a_full_step_does_not_touch_an_adapters_gradient(models: dict[str, Path]) -> None:
    """Both kinds of job in flight at once."""
    pipeline = Pipeline.load(models["llama-tied"], 2)
    make(pipeline, SPEC)
    expected = PeftLoop(models["llama-tied"], SPEC, pipeline).gradient(batch(1))
    await pipeline.forward("adapter", batch(1), adapter=SPEC)
    await train(pipeline, None, 2)
    await pipeline.backward("adapter", 7)
    assert_close(pipeline.adapter_gradients("job-1", 7), expected)
    assert not any(executor.stage.weights.pristine for executor in pipeline.executors)


async def test_an_op_runs_with_the_adapter_of_its_version(models: dict[str, Path]) -> None:
    pipeline = Pipeline.load(models["llama"], 2)
    make(pipeline, SPEC)
    recorded = pipeline.record_logits()
    await train(pipeline, SPEC, 0)  # the schedule's first step has a rate of zero
    await pipeline.forward("m", batch(1), adapter=SPEC)
    await pipeline.backward("m")
    await pipeline.prefill(PrefillSequence("before", (1, 2, 3), Sampling(), 2, adapter_id="job-1"))
    await pipeline.step(OPTIMIZER, "job-1", oldest_version=1)
    await pipeline.prefill(PrefillSequence("after", (1, 2, 3), Sampling(), 2, adapter_id="job-1"))
    pipeline.version = 1
    await pipeline.prefill(PrefillSequence("late", (1, 2, 3), Sampling(), 2, adapter_id="job-1"))
    before, after, late = (logits for logits in recorded if len(logits) == 1)
    assert torch.equal(before, late)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("stages", [1, 2])
async def test_dropout_is_the_same_when_a_forward_is_made_again(models: dict[str, Path], stages: int) -> None:
    spec = replace(SPEC, dropout=0.5)
    gradients = []
    for checkpointing in (False, True):
        pipeline = Pipeline.load(models["llama"], stages, activation_checkpointing=checkpointing)
        make(pipeline, spec)
        await pipeline.forward("m", batch(1), adapter=spec)
        await pipeline.backward("m")
        gradients.append(pipeline.adapter_gradients("job-1"))
    assert_close(gradients[0], gradients[1])
    await pipeline.forward("other", batch(1), adapter=spec)
    await pipeline.backward("other", 1)
    assert any(not torch.equal(a, gradients[0][n]) for n, a in pipeline.adapter_gradients("job-1", 1).items())


async def test_a_measured_loss_is_without_dropout(models: dict[str, Path]) -> None:
    """And measuring makes no adapter: one that is gone must not come back."""
    spec = replace(SPEC, dropout=0.5)
    pipeline = Pipeline.load(models["llama"], 1)
    measure = TrainForward(0, 0, "e", tuple(batch(1)), adapter=spec, measures=True)
    assert (await pipeline.engine.workers[0].run(measure)).error == "KeyError: no adapter job-1 on this stage"
    make(pipeline, spec)
    expected = float(example_losses(PeftLoop(models["llama"], SPEC, pipeline).model, batch(1)).detach())
    assert (await pipeline.run(0, measure)).loss == pytest.approx(expected, rel=1e-9)
    assert (await pipeline.forward("m", batch(1), adapter=spec)).loss != pytest.approx(expected, rel=1e-3)


async def test_a_session_leaves_no_trace_of_its_turns(models: dict[str, Path]) -> None:
    """Which adapter served a turn is forgotten with the turn, also when the next one takes its cache over."""
    pipeline = Pipeline.load(models["llama"], 1)
    make(pipeline, SPEC)
    (executor,) = pipeline.executors
    history = (1, 2, 3, 4)
    await pipeline.prefill(PrefillSequence("turn-0", history, Sampling(), 2, adapter_id="job-1"))
    for turn in range(1, 4):
        cached, history = len(history), (*history, 5, 6)
        continued = PrefillSequence(
            f"turn-{turn}",
            history,
            Sampling(),
            2,
            cached_tokens=cached,
            continues=f"turn-{turn - 1}",
            adapter_id="job-1",
        )
        await pipeline.prefill(continued)
    assert set(executor.inference._adapter_ids) == {"turn-3"}


async def test_dropout_keeps_the_mean(models: dict[str, Path]) -> None:
    """Over many micro-batches of one example the mean output is that without dropout."""
    pipeline = Pipeline.load(models["llama"], 1)
    make(pipeline, replace(SPEC, dropout=0.5))
    (executor,) = pipeline.executors
    adapter = executor.stage.adapters.get("job-1")
    target = adapter.factors[0].target
    rows = torch.randn(4, target.parameter.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    zeros = torch.zeros(4, target.parameter.shape[0], dtype=torch.float64)

    def update(key: str) -> Tensor:
        with executor.stage.adapters.applied(executor.stage.adapters.of(adapter, key)):
            assert target.update is not None
            return target.update(rows, zeros).detach()

    executor.stage.adapters.forget(["job-1"])
    with executor.stage.adapters.applied([Use(adapter)]):
        assert target.update is not None
        expected = target.update(rows, zeros).detach()
    mean = sum(update(f"task-{index}") for index in range(4000)) / 4000
    assert float((mean - expected).norm() / expected.norm()) < 0.05


async def test_replicas_are_averaged_adapter_by_adapter(models: dict[str, Path], tmp_path: Path) -> None:
    """As whole models are, and without touching them."""
    pipelines = [Pipeline.load(models["llama"], stages) for stages in (1, 2)]
    make(pipelines[0], SPEC, seed=None)
    for step in range(2):
        await train(pipelines[0], SPEC, step)
    missing = await pipelines[1].engine.workers[0].run(Snapshot(0, 0, "s", SPEC))
    assert missing.error == "KeyError: no adapter job-1 on this stage"
    for executor in pipelines[1].executors:
        executor.training.adapter(SPEC)
    files = [await pipeline.snapshot("s", SPEC) for pipeline in pipelines]
    stored = [{name: value for file in parts for name, value in load_file(file).items()} for parts in files]
    assert set(stored[0]) == set(stored[1]) == set(adapter_shapes(SPEC, pipelines[0].executors[0].stage.spec))
    begin = stored[0]
    await train(pipelines[0], SPEC, 2)
    late = {name: value - begin[name] for name, value in pipelines[0].adapter("job-1").items()}
    mean = {name: (value + stored[1][name]) / 2 for name, value in begin.items()}
    save_file(mean, tmp_path / "mean.safetensors")
    before = [pipeline.weights() for pipeline in pipelines]
    for pipeline in pipelines:
        await pipeline.load_weights("s", tmp_path / "mean.safetensors", "average", adapter=SPEC)
    assert_close(pipelines[1].adapter("job-1"), mean)
    assert_close(pipelines[0].adapter("job-1"), {name: value + late[name] for name, value in mean.items()})
    for pipeline, weights in zip(pipelines, before, strict=True):
        assert all(torch.equal(value, weights[name]) for name, value in pipeline.weights().items())


async def test_an_unusable_file_changes_no_stage(models: dict[str, Path], tmp_path: Path) -> None:
    pipeline = Pipeline.load(models["llama"], 2)
    make(pipeline, SPEC)
    before = pipeline.adapter("job-1")
    shapes = adapter_shapes(replace(SPEC, rank=5), pipeline.executors[0].stage.spec)
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "other.safetensors")
    for executor in pipeline.executors:
        result = executor.run(LoadWeights(0, 0, "s", str(tmp_path / "other.safetensors"), "replace", adapter=SPEC))
        assert "has shape (5, 64), the model's is (4, 64)" in result.error
        assert result.version == 1
    assert all(torch.equal(value, before[name]) for name, value in pipeline.adapter("job-1").items())


async def test_a_forgotten_adapter_is_gone(models: dict[str, Path]) -> None:
    """With its optimizer; the model and other adapters stay."""
    pipeline = Pipeline.load(models["llama"], 2)
    await train(pipeline, SPEC, 0)
    await train(pipeline, ONLINE, 0)
    for executor in pipeline.executors:
        assert executor.run(Forget(0, (), ("job-1",))).error == ""
        assert executor.stage.adapters.ids == ("job-2",)
        assert set(executor.training.jobs) == {"job-2"}
        result = executor.run(Prefill(0, 2, (PrefillSequence("r", (1,), Sampling(), 2, adapter_id="job-1"),)))
        assert "no adapter job-1" in result.error or "hidden states" in result.error
    make(pipeline, SPEC, seed=None)
    assert set(pipeline.executors[0].training.jobs) == {"job-2"}


async def test_what_does_not_fit_is_refused(models: dict[str, Path]) -> None:
    pipeline = Pipeline.load(models["gpt2"], 1)
    (executor,) = pipeline.executors
    make(pipeline, SPEC)
    for spec, message in (
        (replace(SPEC, adapter_id="j", target_modules=("q_proj",)), "no projection 'q_proj' to adapt; it has c_attn"),
        (replace(SPEC, rank=5), "adapter job-1 changed"),
    ):
        result = executor.run(TrainForward(0, 0, "m", tuple(batch(1)), adapter=spec))
        assert message in result.error
    assert executor.stage.adapters.ids == ("job-1",)


@pytest.mark.parametrize("cut", [(1, 1), (2, 3)])
async def test_a_checkpoint_holds_the_adapter_alone(
    models: dict[str, Path], tmp_path: Path, cut: tuple[int, int]
) -> None:
    """Training goes on from it as if nothing had happened, on any number of stages; the weights are not in it."""
    whole, first = (Pipeline.load(models["llama"], stages) for stages in (1, cut[0]))
    for step in range(4):
        await train(whole, SPEC, step)
    for step in range(2):
        await train(first, SPEC, step)
    for executor in first.executors:
        assert executor.run(SaveCheckpoint(0, 2, str(tmp_path), (SPEC,))).error == ""
    assert weights_files(tmp_path) == []
    second = Pipeline.load(models["llama"], cut[1])
    await train(second, None, 9)  # what it has must go: the checkpoint is of the untrained model
    await train(second, ONLINE, 9)
    for executor in second.executors:
        assert executor.run(RestoreCheckpoint(0, second.version, str(tmp_path))).error == ""
    second.version += 1
    original = whole.weights()
    assert all(torch.equal(value, original[name]) for name, value in second.weights().items())
    assert second.executors[0].stage.adapters.ids == ("job-1",)
    for step in range(2, 4):
        await train(second, SPEC, step)
    assert_close(second.adapter("job-1"), whole.adapter("job-1"), 1e-12)


async def test_a_checkpoint_from_before_an_isolated_adapter_leaves_it(models: dict[str, Path], tmp_path: Path) -> None:
    """With its optimizer: going back is about the served model, and others own the isolated ones."""
    whole, pipeline = (Pipeline.load(models["llama"], 2) for _ in range(2))
    for step in range(4):
        await train(whole, SPEC, step)
    await train(pipeline, SPEC, 0)
    for executor in pipeline.executors:
        assert executor.run(SaveCheckpoint(0, 1, str(tmp_path))).error == ""
    await train(pipeline, SPEC, 1)
    await train(pipeline, ONLINE, 9)
    await train(pipeline, None, 9)
    for executor in pipeline.executors:
        assert executor.run(RestoreCheckpoint(0, pipeline.version, str(tmp_path))).error == ""
        assert executor.stage.adapters.ids == ("job-1",)
        assert set(executor.training.jobs) == {"job-1"}
    pipeline.version += 1
    for step in range(2, 4):
        await train(pipeline, SPEC, step)
    assert_close(pipeline.adapter("job-1"), whole.adapter("job-1"), 1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [("all-linear",), ()])
async def test_an_export_is_a_peft_directory(
    models: dict[str, Path], tmp_path: Path, name: str, targets: tuple[str, ...]
) -> None:
    """It loads on the model directory, without a warning, and gives the logits that are served."""
    spec = replace(SPEC, target_modules=targets)
    pipeline = Pipeline.load(models[name], 2)
    make(pipeline, spec)
    make(pipeline, ONLINE)
    store = CheckpointStore(tmp_path / "checkpoints", "node-0", models[name], keep=2)
    store.prepare()
    partial = store.begin()
    for executor in pipeline.executors:
        assert executor.run(SaveCheckpoint(0, 0, str(partial), (ONLINE, spec))).error == ""
    manifest = Manifest(
        node_id="node-0",
        incarnation=7,
        step=0,
        created_unix_s=1.0,
        trained_unix_s=1.0,
        num_stages=2,
        reason="request",
        model=store.model,
        adapters=[asdict(ONLINE), asdict(spec)],
    )
    assert not store.commit(partial, manifest).holds_weights
    path, _ = store.export("node-0:7:0", "job-1")
    assert {file.name for file in path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(load_reference(models[name]), path)
    recorded = pipeline.record_logits()
    await pipeline.prefill(PrefillSequence("r", (1, 2, 3), Sampling(), 2, adapter_id="job-1"))
    assert_close({"logits": recorded[0][0]}, {"logits": full_logits(loaded, (1, 2, 3))[-1]})
    # The model itself was never trained: its export is the directory it was loaded from.
    whole, _ = store.export("node-0:7:0")
    assert (whole / "model.safetensors").read_bytes() == (models[name] / "model.safetensors").read_bytes()
    with pytest.raises(LemixError, match="holds no adapter of job 'job-9'"):
        store.export("node-0:7:0", "job-9")
