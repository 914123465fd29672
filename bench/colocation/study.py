"""Which simulations are run, in which order, and what they say together."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from bench.colocation.capacity import Capacity, find_capacity
from bench.colocation.config import CAPACITY_ATTAINMENT, HALF, SUBJECT, ColocationConfig
from bench.colocation.figures import attainment, colocated, trained_tokens_per_s
from bench.colocation.measure import Measured
from bench.colocation.scenario import Run, run_of, with_options

#: Simulates runs, on all cores, and brings their figures in the same order.
Simulate = Callable[[Sequence[Run]], list[Measured]]
Say = Callable[[str], None]


class Study:
    """All parts of the benchmark. `say` hears what was found as soon as it is."""

    def __init__(self, config: ColocationConfig, simulate: Simulate, say: Say) -> None:
        self._config = config
        self._simulate = simulate
        self._say = say

    def run(self) -> dict[str, Any]:
        """Plain data for the summary."""
        capacities = {policy: self._capacity(policy) for policy in self._config.policies}
        capacity_rps = max(found.rate for found in capacities.values())
        best = max(capacities, key=lambda policy: capacities[policy].rate)
        self._say(f"capacity {capacity_rps:.2f} requests/s (of {best})")
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
            "heterogeneous": self._heterogeneous(),
        }

    # ------------------------------------------------------------- nodes alike

    def _capacity(self, policy: str) -> Capacity:
        config = self._config

        def attainment_at(rate: float) -> float:
            runs = [run_of(config, policy, rate, seed, trains=False) for seed in config.seeds]
            found = attainment(self._simulate(runs))
            self._say(f"{policy}, no training, {rate:.2f} requests/s: attainment {found:.4f}")
            return found

        return find_capacity(attainment_at, CAPACITY_ATTAINMENT, config.tolerance)

    def _rates(self, capacity_rps: float) -> list[dict[str, Any]]:
        config = self._config
        alone = {policy: self._measure(policy, 0.0, trains=True) for policy in config.policies}
        most_trained = max(trained_tokens_per_s(runs) for runs in alone.values())
        found = []
        for share in config.shares:
            rate = share * capacity_rps
            for policy in config.policies:
                off, on = self._measure(policy, rate, trains=False), self._measure(policy, rate, trains=True)
                row = {"share": share, "rate": rate, "policy": policy, **colocated(on, off, most_trained)}
                self._say(
                    f"{policy}, {rate:.2f} requests/s: attainment {row['slo_attainment']:.4f} "
                    f"({row['slo_attainment_off']:.4f} without training), harvest {row['harvest']:.3f}"
                )
                found.append(row)
        return found

    def _measure(self, policy: str, rate: float, *, trains: bool) -> list[Measured]:
        return self._simulate([run_of(self._config, policy, rate, s, trains=trains) for s in self._config.seeds])

    # ------------------------------------------------------------- two speeds

    def _heterogeneous(self) -> dict[str, Any]:
        """Half of the nodes are fast; the promise is that of the slow ones. At their capacity with training off, with
        the coefficients of every node and with one mean set for all."""
        config = self._config

        def runs(rate: float, *, trains: bool, per_node: bool) -> Iterable[Run]:
            slow = config.nodes // 2
            profiles = (config.profile,) * slow + (config.fast_profile,) * (config.nodes - slow)
            for seed in config.seeds:
                run = replace(run_of(config, SUBJECT, rate, seed, trains=trains), profiles=profiles)
                yield with_options(run, per_node=per_node)

        def attained(rate: float, *, trains: bool, per_node: bool) -> float:
            return attainment(self._simulate(list(runs(rate, trains=trains, per_node=per_node))))

        capacity = find_capacity(
            lambda rate: attained(rate, trains=False, per_node=True), CAPACITY_ATTAINMENT, config.tolerance
        )
        found: dict[str, Any] = {"capacity_rps": capacity.rate, "rates": []}
        for share in config.shares:
            for trains in (False, True):
                rate = share * capacity.rate
                row = {
                    "share": share,
                    "rate": rate,
                    "trains": trains,
                    "per_node": attained(rate, trains=trains, per_node=True),
                    "averaged": attained(rate, trains=trains, per_node=False),
                }
                self._say(
                    f"two speeds, {rate:.2f} requests/s, {'with' if trains else 'no'} training: attainment "
                    f"{row['per_node']:.4f} by node, {row['averaged']:.4f} averaged"
                )
                found["rates"].append(row)
        fullest = max(found["rates"], key=lambda row: (row["share"], row["trains"]))
        return {**found, "per_node": fullest["per_node"], "averaged": fullest["averaged"]}
