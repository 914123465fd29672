"""How long prompts, outputs and training examples are.

The parameters are fits (mean and standard deviation of the logarithm) to published data, so that the repository needs
none of it: the Azure LLM inference traces of 2023 (conversation and code; CC-BY-4.0, Splitwise, ISCA'24), ShareGPT
conversations cut at 8k tokens (Sarathi-Serve), and the prompts of HH-RLHF (words, taken as 1.3 tokens each).

LMSYS-Chat-1M is moments only: 69.5 tokens per prompt and 214.5 per response (arXiv 2309.11998, table 1). Their spread
is that of a whole turn, 260.37 +- 346.97 tokens (Magpie, arXiv 2406.08464, table 1), taken for each of the two. Prompts
are single turns: what a conversation sends again with every turn is not in them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Lognormal lengths in tokens, cut to [shortest, longest] by clamping."""

    mu: float
    sigma: float
    shortest: int = 1
    longest: int = 8192

    @classmethod
    def of(cls, mean: float, std: float, *, shortest: int = 1, longest: int = 8192) -> "LogNormal":
        """With this mean and standard deviation before the cut. Raises ValueError when they make no sense."""
        if not (0.0 < mean < math.inf and 0.0 <= std < math.inf):
            raise ValueError(f"lengths need a positive mean and a std that is not negative, got {mean} and {std}")
        variance = 2.0 * math.log(math.hypot(1.0, std / mean))
        return cls(math.log(mean) - variance / 2, math.sqrt(variance), shortest, longest)

    def draw(self, random: Random) -> int:
        """One length."""
        return min(self.longest, max(self.shortest, round(random.lognormvariate(self.mu, self.sigma))))

    @property
    def mean_square(self) -> float:
        """E[l^2] before the cut: what a quadratic latency model multiplies."""
        return math.exp(2.0 * self.mu + 2.0 * self.sigma**2)


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths of the requests of one kind of traffic."""

    prompt: LogNormal
    output: LogNormal


#: Standard deviation over mean of the tokens of a turn in LMSYS-Chat-1M.
_LMSYS_CV = 346.97 / 260.37

#: Fits to published data, by name.
SHAPES = {
    "conversation": Shape(LogNormal(6.633, 0.985, longest=4096), LogNormal(5.019, 0.859, longest=1024)),
    "code": Shape(LogNormal(6.999, 1.360, longest=7437), LogNormal(2.788, 0.847, longest=1024)),
    "chat": Shape(LogNormal(7.007, 1.626, longest=7434), LogNormal(5.769, 1.001, longest=1024)),
    "lmsys_chat": Shape(
        LogNormal.of(69.5, 69.5 * _LMSYS_CV, longest=4096), LogNormal.of(214.5, 214.5 * _LMSYS_CV, longest=2048)
    ),
    "hh_rlhf": Shape(LogNormal(3.881, 1.108, longest=2048), LogNormal(3.329, 0.967, longest=512)),
}

ORDERS = ("random", "ascending", "descending", "bursty")
#: Tasks of similar length that follow each other in the order "bursty".
_RUN = 25


def ordered(lengths: Sequence[int], order: str, random: Random) -> list[int]:
    """The same lengths in another order: as drawn, sorted, or in runs of similar length. Raises ValueError."""
    if order == "random":
        return list(lengths)
    if order == "ascending":
        return sorted(lengths)
    if order == "descending":
        return sorted(lengths, reverse=True)
    if order == "bursty":
        rising = sorted(lengths)
        runs = [rising[start : start + _RUN] for start in range(0, len(rising), _RUN)]
        random.shuffle(runs)
        return [length for run in runs for length in run]
    raise ValueError(f"unknown order of lengths {order!r}; known: {', '.join(ORDERS)}")
