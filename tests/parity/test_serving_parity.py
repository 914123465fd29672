"""Serving through pipeline stages equals the unsplit transformers model, in float64."""

import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from services.node_agent.engine.inference_ops import DecodeSequence, PrefillSequence, Sampling
from tests.parity.conftest import MODELS
from tests.parity.pipeline import Pipeline, relative_error
from tests.parity.reference import full_logits, load_reference, original_norms
from tests.parity.tiny import EOS_ID, write_tiny_gpt2, write_tiny_llama

GREEDY = Sampling(ignore_eos=True)


def tokens(length: int, seed: int) -> tuple[int, ...]:
    """Random bytes."""
    source = random.Random(seed)
    return tuple(source.randrange(256) for _ in range(length))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
async def test_ragged_prefill_and_decode_logits(models: dict[str, Path], name: str, stages: int) -> None:
    """Requests of very different lengths join and leave; every logit row equals a full forward of its sequence."""
    model = load_reference(models[name])
    pipeline = Pipeline.load(models[name], stages)
    logits = pipeline.record_logits()
    texts = {"a": tokens(5, 1), "b": tokens(70, 2), "c": tokens(1, 3), "d": tokens(5, 4)}

    async def prefill(*names: str) -> None:
        result = await pipeline.prefill(*(PrefillSequence(n, texts[n], GREEDY, 9) for n in names))
        check(result, names)

    async def decode(*names: str) -> None:
        result = await pipeline.decode(*(DecodeSequence(n, texts[n][-1], len(texts[n]) - 1) for n in names))
        check(result, names)

    def check(result: object, names: tuple[str, ...]) -> None:
        for row, (n, token) in enumerate(zip(names, result.tokens, strict=True)):  # type: ignore[attr-defined]
            expected = full_logits(model, texts[n])[-1]
            assert relative_error(logits[-1][row], expected) <= 1e-9
            assert (token.request_id, token.token_id) == (n, int(expected.argmax()))
            texts[n] += (token.token_id,)

    await prefill("a", "b")
    await decode("b", "a")
    await prefill("c", "d")
    await decode("d", "a", "c", "b")
    await decode("a", "d")
    await pipeline.forget("a")
    await decode("b", "c", "d")
    await pipeline.forget("b", "d")
    await decode("c")


@pytest.mark.parametrize("name", MODELS)
async def test_greedy_output_equals_generate(models: dict[str, Path], name: str) -> None:
    model = load_reference(models[name])
    pipeline = Pipeline.load(models[name], 2)
    for seed in range(3):
        prompt = tokens(3 + 4 * seed, seed)
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        found = await pipeline.generate(PrefillSequence(f"r{seed}", prompt, Sampling(), 16))
        assert found == expected[0, len(prompt) :].tolist()


async def test_generation_ends_at_eos_unless_ignored(models: dict[str, Path]) -> None:
    pipeline = Pipeline.load(models["llama"], 2)
    stage = pipeline.executors[-1].stage
    head = next(weight for weight in stage.weights.weights if weight.names == ("lm_head.weight",))
    norm = next(weight for weight in stage.weights.weights if weight.names == ("model.norm.weight",))
    with torch.no_grad():
        norm.parameter.abs_()
        head.parameter[EOS_ID] = 0.0
    first = await pipeline.prefill(PrefillSequence("a", (1, 2, 3), Sampling(), 4))
    assert not first.tokens[0].is_end
    # A row of logits has a positive and a negative maximum; an all-zero row is beaten, a scaled winner always wins.
    with torch.no_grad():
        head.parameter[EOS_ID] = 2.0 * head.parameter[first.tokens[0].token_id]
    ended = await pipeline.prefill(PrefillSequence("b", (1, 2, 3), Sampling(), 4))
    ignored = await pipeline.prefill(PrefillSequence("c", (1, 2, 3), Sampling(ignore_eos=True), 4))
    assert [(t.token_id, t.is_end) for t in (*ended.tokens, *ignored.tokens)] == [(EOS_ID, True), (EOS_ID, False)]


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
async def test_reference_loss_equals_teacher_forcing(models: dict[str, Path], name: str, stages: int) -> None:
    """The loss is that of the continuation alone, and the request then decodes as if it had not been measured."""
    model = load_reference(models[name])
    pipeline = Pipeline.load(models[name], stages)
    prompts = {"a": (tokens(9, 1), tokens(6, 2)), "b": (tokens(4, 3), ()), "c": (tokens(1, 4), tokens(1, 5))}
    result = await pipeline.prefill(
        *(PrefillSequence(n, prompt, GREEDY, 8, continuation) for n, (prompt, continuation) in prompts.items())
    )
    losses = dict(result.reference_losses)
    assert set(losses) == {"a", "c"}
    for n, loss in losses.items():
        prompt, continuation = prompts[n]
        rows = full_logits(model, prompt + continuation)[len(prompt) - 1 : -1]
        assert loss == pytest.approx(float(functional.cross_entropy(rows, torch.tensor(continuation))), rel=1e-9)
    clean = Pipeline.load(models[name], stages)
    for row, (n, (prompt, _)) in enumerate(prompts.items()):
        expected = await clean.generate(PrefillSequence(n, prompt, GREEDY, 3))
        found = [result.tokens[row].token_id]
        for step in range(2):
            decoded = await pipeline.decode(DecodeSequence(n, found[-1], len(prompt) + step))
            found.append(decoded.tokens[0].token_id)
        assert found == expected


async def test_reference_leaves_only_the_prompt_in_the_cache(models: dict[str, Path]) -> None:
    """Also when it is longer than what the request may generate."""
    pipeline = Pipeline.load(models["llama"], 2)
    await pipeline.prefill(
        PrefillSequence("a", tokens(5, 1), GREEDY, 2, tokens(90, 2)), PrefillSequence("b", tokens(7, 3), GREEDY, 2)
    )
    for executor in pipeline.executors:
        for name, prompt in (("a", 5), ("b", 7)):
            cache = executor.inference.cache
            (block,) = cache.entry(name).blocks
            for pool in (*cache.keys, *cache.values):
                filled = pool[block].abs().amax(dim=(0, 2)) > 0.0
                assert filled.tolist() == [True] * prompt + [False] * (cache.shape.block_tokens - prompt)
        assert cache.used_blocks == 2


async def test_seeded_request_is_independent_of_its_batch(models: dict[str, Path]) -> None:
    """Alone, in a batch, and continued elsewhere from a delivered prefix."""
    sampling = Sampling(temperature=1.3, top_p=0.9, top_k=50, seed=7, ignore_eos=True)
    wanted = PrefillSequence("wanted", tokens(6, 1), sampling, 8)
    alone = await Pipeline.load(models["llama"], 1).generate(wanted)

    pipeline = Pipeline.load(models["llama"], 2)
    others = [PrefillSequence(f"o{n}", tokens(3 * n + 1, n), Sampling(temperature=0.7, seed=n), 8) for n in range(3)]
    result = await pipeline.prefill(others[0], wanted, *others[1:])
    batched = [result.tokens[1].token_id]
    newest = {token.request_id: token.token_id for token in result.tokens}
    for step in range(7):
        rows = [DecodeSequence(o.request_id, newest[o.request_id], len(o.token_ids) + step) for o in others]
        rows.insert(step % 4, DecodeSequence("wanted", batched[-1], 6 + step))
        result = await pipeline.decode(*rows)
        newest = {token.request_id: token.token_id for token in result.tokens}
        batched.append(newest["wanted"])
    assert batched == alone

    delivered = wanted.token_ids + tuple(alone[:3])
    continued = await Pipeline.load(models["llama"], 4).generate(PrefillSequence("again", delivered, sampling, 5))
    assert continued == alone[3:]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float32", 1e-5), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
async def test_unchanged_transformers_model(models: dict[str, Path], name: str, dtype: str, tolerance: float) -> None:
    """Against the class as it is, whose norm computes in float32, and in the precisions models are served in."""
    model = load_reference(models[name], getattr(torch, dtype))
    pipeline = Pipeline.load(models[name], 2, dtype=dtype)
    logits = pipeline.record_logits()
    prompt = tokens(40, 1)
    with original_norms():
        expected = full_logits(model, prompt)[-1].double()
    await pipeline.prefill(PrefillSequence("a", prompt, GREEDY, 4))
    assert relative_error(logits[0][0].double(), expected) <= tolerance


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=["biases", "theta", "linear", "llama3"],
)
async def test_llama_options(tmp_path: Path, options: dict[str, object]) -> None:
    path = write_tiny_llama(tmp_path, layers=2, **options)  # type: ignore[arg-type]
    await _assert_prompt_parity(path)


@pytest.mark.parametrize(
    "options",
    [
        {"scale_attn_by_inverse_layer_idx": True, "n_inner": 48},
        {"scale_attn_weights": False, "activation_function": "relu"},
    ],
    ids=["inverse", "unscaled"],
)
async def test_gpt2_options(tmp_path: Path, options: dict[str, object]) -> None:
    path = write_tiny_gpt2(tmp_path, layers=2, **options)  # type: ignore[arg-type]
    await _assert_prompt_parity(path)


async def test_sharded_weights(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path, layers=2, shard_bytes=40_000)
    assert len(list(path.glob("*.safetensors"))) > 1
    await _assert_prompt_parity(path)


async def _assert_prompt_parity(path: Path) -> None:
    pipeline = Pipeline.load(path, 2)
    logits = pipeline.record_logits()
    prompt = tokens(100, 1)
    await pipeline.prefill(PrefillSequence("a", prompt, GREEDY, 4))
    assert relative_error(logits[0][0], full_logits(load_reference(path), prompt)[-1]) <= 1e-9


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("name", MODELS)
async def test_logprobs_equal_log_softmax(models: dict[str, Path], name: str, stages: int) -> None:
    """Of the first token and of later ones, alone and in a batch, sampled and biased."""
    model = load_reference(models[name])
    pipeline = Pipeline.load(models[name], stages)
    texts = {"a": tokens(6, 1), "b": tokens(40, 2)}
    samplings = {
        "a": Sampling(temperature=1.0, seed=7, ignore_eos=True, frequency_penalty=0.5, logprobs=5),
        "b": Sampling(ignore_eos=True, logit_bias=((65, 3.0),), logprobs=0),
    }
    result = await pipeline.prefill(*(PrefillSequence(n, texts[n], samplings[n], 8) for n in texts))
    for _ in range(6):
        for token in result.tokens:
            expected = full_logits(model, texts[token.request_id])[-1].double().log_softmax(-1)
            assert token.logprobs is not None
            assert abs(token.logprobs.logprob - float(expected[token.token_id])) <= 1e-9
            best = expected.topk(samplings[token.request_id].logprobs or 0)
            assert [top for top, _ in token.logprobs.top] == best.indices.tolist()
            assert all(abs(p - q) <= 1e-9 for (_, p), q in zip(token.logprobs.top, best.values.tolist(), strict=True))
            texts[token.request_id] += (token.token_id,)
        result = await pipeline.decode(*(DecodeSequence(n, texts[n][-1], len(texts[n]) - 1) for n in texts))


async def test_min_tokens_ban_the_end_token(models: dict[str, Path]) -> None:
    pipeline = Pipeline.load(models["llama"], 2)
    always_end = Sampling(logit_bias=((EOS_ID, 100.0),), min_tokens=3)
    found = await pipeline.generate(PrefillSequence("r", tokens(5, 1), always_end, 16))
    assert len(found) == 4
    assert found.index(EOS_ID) == 3
