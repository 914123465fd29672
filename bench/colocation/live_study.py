"""Half of capacity on an emulated cluster with all services, beside the same runs in the simulator."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from bench.colocation.config import HALF, ColocationConfig
from bench.colocation.figures import attainment, colocated
from bench.colocation.live_run import LiveRun, measure_live
from bench.colocation.measure import Measured
from bench.colocation.scenario import Run, as_emulated, profile, run_of
from bench.colocation.study import Say, Simulate
from bench.fidelity.clock import LIMIT, Choice, smallest_time_scale

OnProgress = Callable[[float], None]

#: Time scales to choose from.
_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
#: Share of the limit of the clock slip that a short run may take: a long one meets more.
_MARGIN = 0.75


async def live_study(
    config: ColocationConfig, capacity_rps: float, simulate: Simulate, say: Say, on_progress: OnProgress
) -> dict[str, Any]:
    """Every policy with training on and off, and a larger cluster. Raises LiveError, ClusterError."""
    live = config.live
    rate = HALF * capacity_rps
    clock = await _clock(config, rate, say, on_progress)
    time_scale = clock.time_scale or _SCALES[-1]
    found: dict[str, Any] = {
        "time_scale": time_scale,
        "clock_slip_by_scale": {f"{scale:g}": slip for scale, slip in clock.tried.items()},
        "rate": rate,
        "seconds": live.real_seconds / time_scale,
        "policies": {},
        "problems": [],
    }
    runs: list[LiveRun] = []
    for policy in live.policies:
        pairs: dict[bool, tuple[LiveRun, Measured]] = {}
        for trains in (False, True):
            run = replace(run_of(config, policy, rate, config.seeds[0], trains=trains), seconds=found["seconds"])
            name = f"{policy}-{'on' if trains else 'off'}"
            pairs[trains] = await _both(config, name, as_emulated(run), time_scale, simulate, on_progress)
            runs.append(pairs[trains][0])
            say(_line(name, *pairs[trains]))
        found["policies"][policy] = {
            "live": colocated([pairs[True][0].measured], [pairs[False][0].measured], 0.0),
            "simulated": colocated([pairs[True][1]], [pairs[False][1]], 0.0),
            "clock_slip_p99_frac": max(pair[0].clock_slip_p99 for pair in pairs.values()),
            "cpu_share": pairs[True][0].cpu_share,
        }
    found["clock_slip_p99_frac"] = max(run.clock_slip_p99 for run in runs)
    found["wake_priority"] = runs[0].wake_priority
    found["problems"] = [problem for run in runs for problem in run.problems]
    found["large"] = await _large(config, rate / config.nodes, simulate, say, on_progress)
    return found


async def _clock(config: ColocationConfig, rate: float, say: Say, on_progress: OnProgress) -> Choice:
    """The smallest time scale that keeps time at this rate with training, if none is given."""
    live = config.live
    if live.time_scale is not None:
        return Choice(live.time_scale, {})
    run = as_emulated(run_of(config, live.policies[0], rate, config.seeds[0], trains=True))

    async def p99_slip(time_scale: float) -> float:
        short = replace(run, seconds=live.clock_real_seconds / time_scale)
        # How the answers end is not asked for.
        done = await measure_live(short, config.out / "runs" / "clock", time_scale, on_progress, drain_s=0.0)
        say(f"live, {time_scale:g} times as slow: clock slip p99 {100.0 * done.clock_slip_p99:.1f} %")
        return done.clock_slip_p99

    return await smallest_time_scale(p99_slip, _SCALES, _MARGIN * LIMIT)


async def _large(
    config: ColocationConfig, rate_per_node: float, simulate: Simulate, say: Say, on_progress: OnProgress
) -> dict[str, Any]:
    live = config.live
    run = replace(
        run_of(config, live.policies[0], rate_per_node * live.large_nodes, config.seeds[0], trains=True),
        profiles=(live.large_profile,) * live.large_nodes,
        seconds=live.large_real_seconds / live.large_time_scale,
    )
    done, simulated = await _both(config, "large", as_emulated(run), live.large_time_scale, simulate, on_progress)
    say(_line(f"{live.large_nodes} nodes", done, simulated))
    return {
        "nodes": live.large_nodes,
        "stages": profile(live.large_profile).latency.num_stages,
        "policy": run.policy,
        "rate": run.rate,
        "time_scale": live.large_time_scale,
        "clock_slip_p99_frac": done.clock_slip_p99,
        "slo_attainment": attainment([done.measured]),
        "trained_tokens_per_s": done.measured.trained_tokens / run.seconds,
        "simulated": {
            "slo_attainment": attainment([simulated]),
            "trained_tokens_per_s": simulated.trained_tokens / run.seconds,
        },
        "cpu_share": done.cpu_share,
        "problems": done.problems,
    }


async def _both(
    config: ColocationConfig,
    name: str,
    run: Run,
    time_scale: float,
    simulate: Simulate,
    on_progress: OnProgress,
) -> tuple[LiveRun, Measured]:
    done = await measure_live(run, config.out / "runs" / name, time_scale, on_progress)
    runs: Sequence[Run] = [run]
    return done, (await asyncio.to_thread(simulate, runs))[0]


def _line(name: str, live: LiveRun, simulated: Measured) -> str:
    both = (live.measured, simulated)
    kept = " / ".join(f"{attainment([one]):.4f}" for one in both)
    work = " / ".join(f"{one.trained_work_s / one.stage_s:.3f}" for one in both)
    return (
        f"live / simulated, {name}: attainment {kept}, training work {work} of all stage time, "
        f"clock slip p99 {100.0 * live.clock_slip_p99:.1f} %"
    )
