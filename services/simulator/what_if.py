"""The two questions of a planner, asked of simulations with several seeds."""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from services.simulator.cautions import KEPT_UP
from services.simulator.figures import Figures, spread
from services.simulator.plan import Answer, Search, fewest, most
from services.simulator.pool import Simulate
from services.simulator.scenario import Scenario
from services.simulator.setting import Setting
from services.simulator.terminal import shown

OutOfTime = Callable[[], bool]
OnRun = Callable[[str, int], None]
#: Hears a label, what is not good enough (empty: nothing), and the runs.
OnProbe = Callable[[str, str, Sequence[Figures]], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search found. `lines`: in words. `shown`: the figures to print, of the answer or of what came closest."""

    answer: Answer
    lines: list[str]
    shown_title: str
    shown: Sequence[Figures]
    probes: dict[float, tuple[bool, list[Figures]]]
    unit: str

    def to_json(self) -> dict[str, Any]:
        """Plain data; an infinite rate is None with `backlog` true."""

        def place(value: float | None) -> dict[str, Any]:
            return {self.unit: None if value == math.inf else value, "backlog": value == math.inf}

        probes = [
            {**place(value), "passed": passed, "runs": [figures.to_json() for figures in several]}
            for value, (passed, several) in sorted(self.probes.items())
        ]
        answer = place(self.answer.value) | {"monotone": self.answer.monotone, "finished": self.answer.finished}
        return {"answer": answer, "probes": probes}


@dataclass(slots=True)
class _Prober:
    """Simulates a value with every seed."""

    setting: Setting
    simulate: Simulate
    scenario_at: Callable[[float], Scenario]
    label_of: Callable[[float], str]
    #: What is not good enough about a run; empty: nothing.
    flaw_of: Callable[[Figures], str]
    on_run: OnRun
    on_probe: OnProbe
    seen: dict[float, tuple[bool, list[Figures]]] = field(default_factory=dict)

    def look(self, value: float) -> bool:
        """Whether a value is good enough with every seed."""
        label = self.label_of(value)
        figures = self.simulate(self.scenario_at(value), self.setting.seeds, lambda seed: self.on_run(label, seed))
        flaw = next(filter(None, map(self.flaw_of, figures)), "")
        self.seen[value] = (not flaw, figures)
        self.on_probe(label, flaw, figures)
        return not flaw


def fewest_nodes(
    options: argparse.Namespace,
    setting: Setting,
    simulate: Simulate,
    out_of_time: OutOfTime,
    on_run: OnRun,
    on_probe: OnProbe,
) -> Outcome:
    """The fewest nodes that reach the attainment, and train what is asked, with every seed."""
    asked = setting.scenario.training.tokens_per_s
    to_train = KEPT_UP * asked if asked < math.inf else 0.0

    def flaw_of(figures: Figures) -> str:
        if figures.slo_attainment < options.slo_attainment:
            return "attainment"
        return "training does not keep up" if figures.trained_tokens_per_s < to_train else ""

    prober = _Prober(
        setting,
        simulate,
        lambda value: replace(setting.scenario, num_nodes=int(value)),
        nodes,
        flaw_of,
        on_run,
        on_probe,
    )
    search = Search(prober.look, options.max_probes, out_of_time)
    answer = fewest(search, options.max_nodes)
    target = f"attainment {options.slo_attainment:g}" + (f" and {asked:g} trained tokens/s" if to_train else "")
    if answer.value is None:
        lines = [f"answer: none of the numbers looked at, up to {nodes(max(prober.seen, default=0))}, reaches {target}"]
    else:
        lines = [f"answer: {nodes(answer.value)} for {target} with every seed"]
        if answer.next_worse is not None:
            lines.append(f"{nodes(answer.next_worse)}: not enough")
    closest = answer.value if answer.value is not None else max(prober.seen, default=None)
    if answer.value is None and closest is not None:
        lines.append(_missed_by(prober.seen[closest][1], options.slo_attainment, to_train))
    lines += _cautions(answer, "a larger number of nodes that was looked at is not good enough")
    return _outcome(answer, lines, prober, closest, "nodes")


def most_training(
    options: argparse.Namespace,
    setting: Setting,
    simulate: Simulate,
    out_of_time: OutOfTime,
    on_run: OnRun,
    on_probe: OnProbe,
) -> Outcome:
    """The highest training rate with which p99 stays where it is wanted, with every seed."""
    most_tpot_ms = math.inf if options.p99_tpot_ms is None else options.p99_tpot_ms

    def flaw_of(figures: Figures) -> str:
        if figures.ttft_p99_s * 1e3 > options.p99_ttft_ms:
            return "p99 TTFT"
        return "p99 TPOT" if figures.tpot_p99_s * 1e3 > most_tpot_ms else ""

    prober = _Prober(
        setting,
        simulate,
        lambda value: replace(setting.scenario, training=replace(setting.scenario.training, tokens_per_s=value)),
        lambda value: "backlog" if value == math.inf else f"{value:.1f} tokens/s",
        flaw_of,
        on_run,
        on_probe,
    )
    search = Search(prober.look, options.max_probes, out_of_time)

    def highest() -> float:
        return max(figures.trained_tokens_per_s for figures in prober.seen[math.inf][1])

    answer = most(search, highest, tolerance=options.tolerance)
    kept = f"p99 TTFT within {options.p99_ttft_ms:g} ms"
    kept += f" and TPOT within {most_tpot_ms:g} ms" if most_tpot_ms < math.inf else ""
    closest = answer.value if answer.value is not None else min(prober.seen, default=None)
    if answer.value is None or closest is None:
        lines = [f"answer: no training fits; {kept} is not kept even without"]
        if closest is not None:
            ttft_ms = max(figures.ttft_p99_s for figures in prober.seen[closest][1]) * 1e3
            tpot_ms = max(figures.tpot_p99_s for figures in prober.seen[closest][1]) * 1e3
            lines.append(f"without training p99 is up to {ttft_ms:.1f} ms for TTFT, {tpot_ms:.2f} ms for TPOT")
    else:
        trained = shown(spread([figures.trained_tokens_per_s for figures in prober.seen[closest][1]]), ".1f")
        asked = "a backlog that never drains" if answer.value == math.inf else f"{answer.value:.1f} tokens/s asked for"
        lines = [f"answer: {trained} tokens/s are trained with {kept} with every seed ({asked})"]
        if answer.next_worse is not None:
            lines.append(f"{prober.label_of(answer.next_worse)} breaks it")
    lines += _cautions(answer, "a lower rate that was looked at is not good enough")
    return _outcome(answer, lines, prober, closest, "training_tokens_per_s")


def nodes(value: float) -> str:
    """So many nodes, in words."""
    return "1 node" if value == 1 else f"{value:.0f} nodes"


def _missed_by(figures: Sequence[Figures], attainment: float, to_train: float) -> str:
    reached = min(each.slo_attainment for each in figures)
    trained = min(each.trained_tokens_per_s for each in figures)
    missed = [f"attainment by {attainment - reached:.4f}"] if reached < attainment else []
    missed += [f"training by {to_train - trained:.1f} tokens/s"] if trained < to_train else []
    return f"the most nodes looked at miss {' and '.join(missed)}"


def _cautions(answer: Answer, contradiction: str) -> list[str]:
    lines = []
    if not answer.monotone:
        lines.append(f"not monotone: {contradiction}; look at the probes before you rely on the answer")
    if not answer.finished:
        lines.append("stopped early: the budget of probes or time is spent, a better answer may exist")
    return lines


def _outcome(answer: Answer, lines: list[str], prober: _Prober, closest: float | None, unit: str) -> Outcome:
    if closest is None:
        return Outcome(answer, lines, "", (), prober.seen, unit)
    return Outcome(answer, lines, prober.label_of(closest), prober.seen[closest][1], prober.seen, unit)
