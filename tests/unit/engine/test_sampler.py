"""What changes the logits of a request, and what is reported of its tokens."""

import math
from collections import Counter

import pytest
import torch

from services.node_agent.engine.inference_ops import Logprobs, SampledToken, Sampling
from services.node_agent.engine.torch.sampler import Sampler

END = 4
LOGITS = torch.tensor([[1.0, 3.0, 2.0, -1.0, 4.0]], dtype=torch.float64)


def run(sampling: Sampling, count: int, logits: torch.Tensor = LOGITS) -> list[SampledToken]:
    """So many tokens of one request with a prompt of three, from the same logits every time."""
    sampler = Sampler([END])
    sampler.begin("r", sampling, 3)
    before = logits.clone()
    tokens = [sampler.sample(logits, [("r", 3 + index)])[0] for index in range(count)]
    assert torch.equal(logits, before), "the logits belong to the caller"
    return tokens


def ids(tokens: list[SampledToken]) -> list[int]:
    return [token.token_id for token in tokens]


def test_no_end_among_the_first_tokens() -> None:
    tokens = run(Sampling(min_tokens=2), 3)
    assert ids(tokens) == [1, 1, END]
    assert [token.is_end for token in tokens] == [False, False, True]
    assert ids(run(Sampling(min_tokens=2, logit_bias=((END, 100.0),)), 3)) == [1, 1, END]
    assert ids(run(Sampling(min_tokens=2, ignore_eos=True), 3)) == [1, 1, END]


def test_bias_is_added_to_the_logit() -> None:
    assert ids(run(Sampling(logit_bias=((3, 5.5),)), 1)) == [3]
    assert ids(run(Sampling(logit_bias=((3, 4.5),)), 1)) == [END]
    counts = Counter(ids(run(Sampling(temperature=1.0, seed=3, logit_bias=((1, -100.0), (END, -100.0))), 300)))
    assert set(counts) == {0, 2, 3}


def test_presence_penalty_counts_once_and_frequency_penalty_every_time() -> None:
    # Logits 4 3 2 1 -1 for tokens 4 1 2 0 3.
    assert ids(run(Sampling(presence_penalty=1.5, ignore_eos=True), 4)) == [4, 1, 4, 4]
    assert ids(run(Sampling(frequency_penalty=0.75, ignore_eos=True), 5)) == [4, 4, 1, 4, 1]
    assert ids(run(Sampling(frequency_penalty=-2.0, logit_bias=((END, -100.0),)), 3)) == [1, 1, 1]


def test_penalties_forget_a_request_that_starts_anew() -> None:
    sampler = Sampler([END])
    sampling = Sampling(presence_penalty=2.0, ignore_eos=True)
    for _ in range(2):
        sampler.begin("r", sampling, 1)
        assert [sampler.sample(LOGITS, [("r", 1 + i)])[0].token_id for i in range(2)] == [4, 1]
    for request_id in ("r", "unknown"):
        sampler.forget(request_id)
    with pytest.raises(KeyError):
        sampler.sample(LOGITS, [("r", 1)])


def test_a_token_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(4, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    samplings = [
        Sampling(temperature=1.0, seed=1, presence_penalty=1.0, logprobs=3),
        Sampling(temperature=0.0, logit_bias=((5, 3.0),)),
        Sampling(temperature=0.7, seed=2, top_k=9, min_tokens=3, logprobs=0),
        Sampling(temperature=1.3, seed=3),
    ]
    together, alone = Sampler([END]), Sampler([END])
    for row, sampling in enumerate(samplings):
        together.begin(str(row), sampling, 1)
        alone.begin(str(row), sampling, 1)
    for index in range(1, 6):
        found = together.sample(logits, [(str(row), index) for row in range(4)])
        expected = [alone.sample(logits[row : row + 1], [(str(row), index)])[0] for row in range(4)]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours[:3] == theirs[:3]
            assert (ours.logprobs is None) == (theirs.logprobs is None)
            if ours.logprobs and theirs.logprobs:
                assert ours.logprobs.logprob == pytest.approx(theirs.logprobs.logprob, abs=1e-12)


def test_logprobs_are_the_models_own() -> None:
    expected = LOGITS[0].log_softmax(-1).tolist()
    changed = Sampling(temperature=0.5, logit_bias=((3, 100.0),), presence_penalty=2.0, logprobs=2)
    (token,) = run(changed, 1)
    assert token.token_id == 3
    assert token.logprobs == Logprobs(pytest.approx(expected[3]), token.logprobs.top if token.logprobs else ())
    assert token.logprobs is not None
    assert [top[0] for top in token.logprobs.top] == [4, 1]
    assert [top[1] for top in token.logprobs.top] == pytest.approx([expected[4], expected[1]])
    assert run(Sampling(), 1)[0].logprobs is None
    assert run(Sampling(logprobs=0), 1)[0].logprobs == Logprobs(pytest.approx(expected[4]), ())
    whole = run(Sampling(logprobs=20), 1)[0].logprobs
    assert whole is not None
    assert math.fsum(math.exp(logprob) for _, logprob in whole.top) == pytest.approx(1.0)
