"""Which simulations are run, in which order, and what they say together."""

import random
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from bench.colocation.capacity import Capacity
from bench.colocation.config import HALF, SPEED_SHARES, SUBJECT, ColocationConfig
from bench.colocation.figures import attainment, colocated, harvest_of_most_idle, trained_tokens_per_s
from bench.colocation.measure import Measured
from bench.colocation.probes import capacity_of
from bench.colocation.scenario import Run, run_of, with_options

#: Simulates runs, on all cores, and brings their figures in the same order. Several threads may ask.
Simulate = Callable[[Sequence[Run]], list[Measured]]
Say = Callable[[str], None]
_Kind = TypeVar("_Kind", bound=Hashable)


class Study:
    """All parts of the benchmark. `say` hears what was found as soon as it is."""

    def __init__(self, config: ColocationConfig, simulate: Simulate, say: Say) -> None:
        self._config = config
        self._simulate = simulate
        self._say = say

    def run(self) -> dict[str, Any]:
        """Plain data for the summary."""
        policies = self._config.policies
        # A search is a chain of runs; side by side they keep all cores busy.
        with ThreadPoolExecutor(len(policies) + 1) as threads:
            two_speeds = threads.submit(self._capacity_of_two_speeds)
            capacities = dict(zip(policies, threads.map(self._capacity, policies), strict=True))
            speeds_rps = two_speeds.result().rate
        capacity_rps = max(found.rate for found in capacities.values())
        best = max(capacities, key=lambda policy: capacities[policy].rate)
        self._say(f"capacity {capacity_rps:.2f} requests/s (of {best}); of the cluster of two speeds {speeds_rps:.2f}")
        rates = self._rates(capacity_rps)
        half = {row["policy"]: row for row in rates if row["share"] == HALF}
        return {
            "capacity_rps": capacity_rps,
            "capacities": {
                policy: {"rate": found.rate, "probes": [list(probe) for probe in found.probes]}
                for policy, found in capacities.items()
            },
            "rates": rates,
            "at_half_capacity": {policy: row["safe_harvest"] for policy, row in half.items()},
            "heterogeneous": self._heterogeneous(speeds_rps),
        }

    # ------------------------------------------------------------- nodes alike

    def _capacity(self, policy: str) -> Capacity:
        config = self._config
        return capacity_of(
            config,
            lambda rate, seed: run_of(config, policy, rate, seed, trains=False),
            self._one,
            lambda rate, found: self._say(f"{policy}, no training, {rate:.2f} requests/s: attainment {found:.4f}"),
        )

    def _one(self, run: Run) -> Measured:
        return self._simulate([run])[0]

    def _by_kind(self, kinds: Sequence[_Kind], runs: Sequence[Run]) -> dict[_Kind, list[Measured]]:
        """Figures of runs that are given kind by kind, each with all seeds."""
        measured, count = self._simulate(runs), len(self._config.seeds)
        return {kind: measured[count * index : count * (index + 1)] for index, kind in enumerate(kinds)}

    def _rates(self, capacity_rps: float) -> list[dict[str, Any]]:
        config = self._config
        kinds = [(policy, 0.0, True) for policy in config.policies]
        for share in config.shares:
            for trains in (False, True):
                kinds += [(policy, share * capacity_rps, trains) for policy in config.policies]
        runs = [run_of(config, *kind[:2], seed, trains=kind[2]) for kind in kinds for seed in config.seeds]
        found = self._by_kind(kinds, runs)
        most_trained = max(trained_tokens_per_s(found[policy, 0.0, True]) for policy in config.policies)
        rows = []
        for share in config.shares:
            rate = share * capacity_rps
            off = {policy: found[policy, rate, False] for policy in config.policies}
            for policy in config.policies:
                on = found[policy, rate, True]
                row = {"share": share, "rate": rate, "policy": policy, **colocated(on, off[policy], most_trained)}
                row["harvest_of_most_idle"] = harvest_of_most_idle(on, list(off.values()))
                self._say(
                    f"{policy}, {rate:.2f} requests/s: attainment {row['slo_attainment']:.4f} "
                    f"({row['slo_attainment_off']:.4f} without training), harvest {row['harvest']:.3f}"
                )
                rows.append(row)
        return rows

    # ------------------------------------------------------------- two speeds

    def _capacity_of_two_speeds(self) -> Capacity:
        return capacity_of(
            self._config,
            lambda rate, seed: self._of_two_speeds(rate, seed, trains=False, per_node=True),
            self._one,
            lambda rate, found: self._say(f"two speeds, no training, {rate:.2f} requests/s: attainment {found:.4f}"),
        )

    def _of_two_speeds(self, rate: float, seed: int, *, trains: bool, per_node: bool) -> Run:
        """Half of the nodes are fast; the promise is that of the slow ones. Who is which changes with the seed: nodes
        that are taken for alike are filled in the order of their ids."""
        config = self._config
        slow = config.nodes // 2
        profiles = [config.profile] * slow + [config.fast_profile] * (config.nodes - slow)
        random.Random(f"{seed}/nodes").shuffle(profiles)
        run = replace(run_of(config, SUBJECT, rate, seed, trains=trains), profiles=tuple(profiles))
        return with_options(run, per_node=per_node)

    def _heterogeneous(self, capacity_rps: float) -> dict[str, Any]:
        """At shares of its capacity with training off: with the coefficients of every node, and with one mean set."""
        config = self._config
        kinds = [
            (share, trains, per_node)
            for share in SPEED_SHARES
            for trains in (False, True)
            for per_node in (True, False)
        ]
        runs = [
            self._of_two_speeds(share * capacity_rps, seed, trains=trains, per_node=per_node)
            for share, trains, per_node in kinds
            for seed in config.seeds
        ]
        found = self._by_kind(kinds, runs)
        rows = []
        for share in SPEED_SHARES:
            for trains in (False, True):
                own, mean = found[share, trains, True], found[share, trains, False]
                row = {
                    "share": share,
                    "rate": share * capacity_rps,
                    "trains": trains,
                    "per_node": attainment(own),
                    "averaged": attainment(mean),
                    "gains": [attainment([a]) - attainment([b]) for a, b in zip(own, mean, strict=True)],
                }
                self._say(
                    f"two speeds, {row['rate']:.2f} requests/s, {'with' if trains else 'no'} training: attainment "
                    f"{row['per_node']:.4f} by node, {row['averaged']:.4f} averaged"
                )
                rows.append(row)
        fullest = rows[-1]
        judged = {name: fullest[name] for name in ("per_node", "averaged", "gains")}
        return {"capacity_rps": capacity_rps, "rates": rows, **judged}
