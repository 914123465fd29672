"""Prompts in pieces, and caches continued from an earlier turn, give what whole prompts give."""

from pathlib import Path

import pytest
import torch

from services.node_agent.engine.inference_ops import DecodeSequence, Prefill, PrefillSequence, Sampling
from tests.parity.conftest import MODELS
from tests.parity.pipeline import Pipeline, relative_error
from tests.parity.reference import full_logits, load_reference

GREEDY = Sampling(ignore_eos=True)
STAGES = (1, 2)


def tokens(count: int, seed: int) -> tuple[int, ...]:
    """Random tokens."""
    return tuple(torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", MODELS)
async def test_a_prompt_in_pieces_equals_the_whole(models: dict[str, Path], name: str, stages: int) -> None:
    """Pieces end inside blocks and at their ends, beside whole prompts and with a reference behind the last."""
    prompt, reference, other = tokens(50, 1), tokens(6, 2), tokens(9, 3)
    pipeline = Pipeline.load(models[name], stages, kv_block_tokens=16)
    logits = pipeline.record_logits()
    for start, end in ((0, 7), (7, 32), (32, 33)):
        sequence = PrefillSequence("a", prompt, GREEDY, 4, reference, start, "", end)
        result = await pipeline.prefill(sequence)
        assert (result.tokens, result.reference_losses) == ((), ())
    assert logits == []
    last = PrefillSequence("a", prompt, GREEDY, 4, reference, 33)
    result = await pipeline.prefill(PrefillSequence("b", other, GREEDY, 4), last)
    whole = await Pipeline.load(models[name], stages).prefill(PrefillSequence("a", prompt, GREEDY, 4, reference))
    assert result.tokens[1] == whole.tokens[0]
    assert result.reference_losses[0][1] == pytest.approx(whole.reference_losses[0][1], rel=1e-9)
    expected = full_logits(load_reference(models[name]), prompt + reference)
    assert relative_error(logits[0][1:], expected[len(prompt) - 1 : -1]) <= 1e-9
    decoded = [t.token_id for t in result.tokens]
    await pipeline.decode(DecodeSequence("b", decoded[0], 9), DecodeSequence("a", decoded[1], 50))
    expected = full_logits(load_reference(models[name]), (*prompt, decoded[1]))
    assert relative_error(logits[1][1], expected[-1]) <= 1e-9


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("same", [True, False], ids=["same", "another-history"])
async def test_a_turn_that_continues_a_cache_equals_one_that_does_not(
    models: dict[str, Path], stages: int, same: bool
) -> None:
    """Also when the client sent another history than the one that is kept: what differs is computed again."""
    pipeline = Pipeline.load(models["llama"], stages, kv_block_tokens=16)
    logits = pipeline.record_logits()
    first = tokens(21, 1)
    answer = await pipeline.generate(PrefillSequence("t0", first, GREEDY, 5))
    history = (*first, *answer)
    prompt = (*history, *tokens(8, 2)) if same else (*history[:19], *tokens(15, 3))
    logits.clear()
    turn = PrefillSequence("t1", prompt, GREEDY, 6, cached_tokens=25, continues="t0")
    found = await pipeline.generate(turn)
    assert relative_error(logits[0][0], full_logits(load_reference(models["llama"]), prompt)[-1]) <= 1e-9
    assert found == await Pipeline.load(models["llama"], stages).generate(PrefillSequence("t1", prompt, GREEDY, 6))
    for executor in pipeline.executors:
        cache = executor.inference.cache
        assert len(cache) == 1
        assert cache.entry("t1").token_ids == [*prompt, *found[:-1]]


async def test_pieces_out_of_order_are_refused(models: dict[str, Path]) -> None:
    pipeline = Pipeline.load(models["llama"], 1)
    prompt = tokens(20, 1)
    await pipeline.prefill(PrefillSequence("a", prompt, GREEDY, 4, end_token=8))
    for start, end, complaint in ((9, 0, "goes on at 9, its cache holds 8"), (8, 21, "tokens 8 to 21 of 20")):
        bad = PrefillSequence("a" if start == 9 else "b", prompt, GREEDY, 4, cached_tokens=start, end_token=end)
        result = await pipeline.engine.workers[0].run(Prefill(0, 0, (bad,)))
        assert complaint in result.error
    assert len(pipeline.executors[0].inference.cache) == 0


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", MODELS)
async def test_a_mixed_op_equals_separate_ones(models: dict[str, Path], name: str, stages: int) -> None:
    """Two decoding requests, the end of one prompt, a piece of another."""
    first, second, third = tokens(20, 1), tokens(33, 2), tokens(40, 3)
    sequences = [PrefillSequence(n, p, GREEDY, 4) for n, p in (("a", first), ("b", second))]
    apart, mixed = (Pipeline.load(models[name], stages, kv_block_tokens=16) for _ in range(2))
    newest: list[DecodeSequence] = []
    for pipeline in (apart, mixed):
        started = await pipeline.prefill(*sequences)
        newest = [
            DecodeSequence(t.request_id, t.token_id, len(s.token_ids))
            for t, s in zip(started.tokens, sequences, strict=True)
        ]
        await pipeline.prefill(PrefillSequence("c", third, GREEDY, 4, end_token=10))
    expected, found = apart.record_logits(), mixed.record_logits()
    last, piece = PrefillSequence("c", third, GREEDY, 4, (), 10), PrefillSequence("d", first, GREEDY, 4, end_token=7)
    separate = [await apart.prefill(last), await apart.decode(*newest)]
    await apart.prefill(piece)
    together = await mixed.up(lambda hidden: Prefill(0, 0, (last, piece), hidden, tuple(newest)))
    assert together.tokens == tuple(token for result in separate for token in result.tokens)
    assert relative_error(found[0], torch.cat(expected)) <= 1e-9
    for one, other in zip(apart.executors, mixed.executors, strict=True):
        for request in "abcd":
            mine, theirs = one.inference.cache.entry(request), other.inference.cache.entry(request)
            assert mine.token_ids == theirs.token_ids
            pairs = zip(
                one.inference.cache.read(0, mine, mine.used),
                other.inference.cache.read(0, theirs, mine.used),
                strict=True,
            )
            assert all(relative_error(ours, his) <= 1e-9 for ours, his in pairs)
