"""Dependent requests: conversations, whose prompts grow with every turn, and chains of agent steps.

The next request of a session arrives some time after the end of the one before it, and its prompt is everything said so
far plus what is new.

*chat*: what is new in a turn and its answer are as long as in LMSYS-Chat-1M (see `lengths.py`); 5.75 turns is the mean
of the ShareGPT conversations in CachedAttention (arXiv 2403.19708). No source tells how long people think: 20 s, with a
standard deviation as large, is assumed. *agent*: a chain of steps that follow each other at once. Its numbers are
assumed as well: a task description of 600 tokens, answers (calls of tools) of 100 and what the tools return of 400, in
8 steps.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random

from services.scheduler.core.tasks import SloTarget
from services.simulator.arrivals import poisson
from services.simulator.lengths import SHAPES, LogNormal
from services.simulator.types import Request


@dataclass(frozen=True, slots=True)
class Conversation:
    """What sessions of one kind are like: first prompt, new tokens of every further turn, and outputs; tokens.

    The number of turns is geometric. think_s: mean and standard deviation of the time from an answer to the next turn,
    lognormal, seconds. A session ends early when its context would grow beyond `longest_tokens`.
    """

    first: LogNormal
    new: LogNormal
    output: LogNormal
    mean_turns: float
    think_s: tuple[float, float] = (0.0, 0.0)
    longest_tokens: int = 8192


CONVERSATIONS: Mapping[str, Conversation] = {
    "chat": Conversation(
        SHAPES["lmsys_chat"].prompt,
        SHAPES["lmsys_chat"].prompt,
        SHAPES["lmsys_chat"].output,
        mean_turns=5.75,
        think_s=(20.0, 20.0),
    ),
    "agent": Conversation(
        LogNormal.of(600, 300, longest=4096),
        LogNormal.of(400, 400, longest=4096),
        LogNormal.of(100, 100, longest=1024),
        mean_turns=8.0,
    ),
}


def draw(
    kind: Conversation, seed: str, *, sessions_per_s: float, num_sessions: int, slo: SloTarget, prefix: str = "s"
) -> list[Request]:
    """Sessions that begin as a Poisson process, turn by turn; ids are "<prefix><session>.<turn>".

    Raises ValueError for a mean of less than one turn.
    """
    if kind.mean_turns < 1.0:
        raise ValueError(f"mean_turns must be at least 1, got {kind.mean_turns}")
    begins = poisson(Random(f"{seed}/sessions"), sessions_per_s)
    requests: list[Request] = []
    for index in range(num_sessions):
        requests += _session(kind, Random(f"{seed}/session/{index}"), next(begins), f"{prefix}{index}", slo)
    return requests


def _session(kind: Conversation, random: Random, begin_s: float, session_id: str, slo: SloTarget) -> Iterator[Request]:
    prompt_tokens, turn, after = kind.first.draw(random), 0, ""
    think_s = 0.0
    while True:
        output_tokens = kind.output.draw(random)
        task_id = f"{session_id}.{turn}"
        yield Request(
            task_id, begin_s, prompt_tokens, output_tokens, kind.output.longest, slo, session_id, after, think_s
        )
        prompt_tokens += output_tokens + kind.new.draw(random)
        if random.random() < 1.0 / kind.mean_turns or prompt_tokens + kind.output.longest > kind.longest_tokens:
            return
        think_s = _think_s(kind, random)
        turn, after = turn + 1, task_id


def _think_s(kind: Conversation, random: Random) -> float:
    mean_s, std_s = kind.think_s
    if not mean_s:
        return 0.0
    shape = LogNormal.of(mean_s, std_s)
    return random.lognormvariate(shape.mu, shape.sigma)
