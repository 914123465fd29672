"""Sampling: exact support of top_k and top_p, frequencies, and independence of the batch."""

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare, kstest

from services.node_agent.engine.inference_ops import Sampling
from services.node_agent.engine.torch.sampling import Draw, pick_tokens, uniform

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.5], dtype=torch.float64)


def sample(sampling: Sampling, count: int = 4000) -> Counter[int]:
    """Tokens drawn at positions 0..count."""
    draws = [Draw(sampling, index) for index in range(count)]
    return Counter(pick_tokens(LOGITS.expand(count, -1), draws))


def test_greedy_takes_the_most_likely() -> None:
    assert sample(Sampling(temperature=0.0), 10) == Counter({1: 10})


def test_frequencies_follow_the_tempered_softmax() -> None:
    counts = sample(Sampling(temperature=2.0, seed=5))
    expected = (LOGITS / 2.0).softmax(-1) * 4000
    assert chisquare([counts[token] for token in range(5)], expected.numpy()).pvalue > 1e-4


def test_truncated_frequencies_are_renormalised() -> None:
    counts = sample(Sampling(temperature=1.0, top_k=2, seed=5))
    expected = LOGITS[[1, 2]].softmax(-1) * 4000
    assert set(counts) == {1, 2}
    assert chisquare([counts[1], counts[2]], expected.numpy()).pvalue > 1e-4


@pytest.mark.parametrize(
    ("sampling", "support"),
    [
        (Sampling(temperature=5.0, top_k=1), {1}),
        (Sampling(temperature=5.0, top_k=3), {0, 1, 2}),
        (Sampling(temperature=5.0, top_k=99), {0, 1, 2, 3, 4}),
        (Sampling(temperature=1.0, top_p=1e-9), {1}),
        # Probabilities 0.62, 0.23, 0.08, 0.05, 0.01: the token that crosses top_p stays.
        (Sampling(temperature=1.0, top_p=0.5), {1}),
        (Sampling(temperature=1.0, top_p=0.7), {1, 2}),
        (Sampling(temperature=1.0, top_p=0.9), {0, 1, 2}),
        # top_p counts within what top_k left: 0.73 of {1, 2} reaches 0.7.
        (Sampling(temperature=1.0, top_k=2, top_p=0.7), {1}),
    ],
)
def test_support(sampling: Sampling, support: set[int]) -> None:
    assert set(sample(sampling)) == support


def test_a_draw_does_not_depend_on_its_batch() -> None:
    """Greedy, plain and truncated requests side by side get what they get alone."""
    logits = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    draws = [
        Draw(Sampling(temperature=1.0, seed=3), 7),
        Draw(Sampling(), 2),
        Draw(Sampling(temperature=0.7, top_p=0.8, seed=3), 9),
        Draw(Sampling(temperature=1.0, seed=4), 7),
        Draw(Sampling(temperature=0.7, top_k=5, top_p=0.8, seed=9), 1),
    ]
    alone = [pick_tokens(logits[row : row + 1], [draw])[0] for row, draw in enumerate(draws)]
    assert pick_tokens(logits, draws) == alone


def test_seed_and_position_decide() -> None:
    values = [uniform(seed, index) for seed in (-1, 0, 1, 2**64 - 2, 2**40) for index in range(400)]
    assert len(set(values)) == len(values)
    assert all(0.0 <= value < 1.0 for value in values)
    assert kstest(values, "uniform").pvalue > 1e-3
    assert uniform(1, 1) == uniform(1, 1)


def test_certain_token_is_drawn_whatever_the_number() -> None:
    logits = torch.full((1, 4), float("-inf"))
    logits[0, 2] = 0.0
    for index in range(200):
        for sampling in (Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.5)):
            assert pick_tokens(logits, [Draw(sampling, index)]) == [2]
