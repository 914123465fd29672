"""The published figures, from runs with training on and off, see `DEFINITIONS`. Pure."""

from collections.abc import Sequence
from typing import Any

from bench.colocation.config import CAPACITY_ATTAINMENT, PROMISE_UNITS
from bench.colocation.measure import Measured, pooled

#: Attainment below which serving alone is overload already, so that it cannot tell what training costs.
_LEAST_ATTAINMENT_OFF = 0.95

#: Figure -> what it means.
DEFINITIONS = {
    "promise": f"TTFT and TPOT of {PROMISE_UNITS:g} times what the mean request takes alone on an idle node, from the "
    "profile; the same for all policies",
    "capacity": f"highest rate at which the best of the policies reaches an attainment of {CAPACITY_ATTAINMENT:g} with "
    "training off",
    "slo_attainment": "share of all requests whose TTFT and TPOT were both kept",
    "attainment_kept": "attainment with training on over that with training off, of the same policy on the same "
    f"requests, at most 1; no figure where it is below {_LEAST_ATTAINMENT_OFF:g} with training off",
    "harvest": "trained tokens times what one takes alone, over the stage time that serving alone leaves idle under "
    "the same policy",
    "harvest_of_most_idle": "the same over the idle time of the policy that leaves most at that rate: one that serves "
    "less has more to train in, and it does not gain by it here",
    "safe_harvest": "harvest times attainment_kept; 0 where training off is overload already",
    "training_kept": "trained tokens per second over those of the same cluster with nothing to serve, under the policy "
    "that trains most then",
    "staleness_s": "age of the newest optimizer step in the weights that computed a first token",
}


def attainment(runs: Sequence[Measured]) -> float:
    """Over the requests of all runs."""
    return sum(run.num_kept for run in runs) / sum(run.num_requests for run in runs)


def trained_tokens_per_s(runs: Sequence[Measured]) -> float:
    """Over the time of all runs."""
    return sum(run.trained_tokens for run in runs) / sum(run.seconds for run in runs)


def harvest_of_most_idle(on: Sequence[Measured], off: Sequence[Sequence[Measured]]) -> float:
    """Trained work of a policy over the most stage time that any policy, its runs an item of `off`, left idle."""
    return sum(run.trained_work_s for run in on) / max(sum(run.idle_s for run in runs) for runs in off)


def colocated(on: Sequence[Measured], off: Sequence[Measured], most_trained_per_s: float) -> dict[str, Any]:
    """Figures of a policy at a rate, from the same requests with training on and off. most_trained_per_s: with nothing
    to serve; 0: not measured."""
    with_training, alone = attainment(on), attainment(off)
    kept = min(1.0, with_training / alone) if alone >= _LEAST_ATTAINMENT_OFF else None
    harvest = sum(run.trained_work_s for run in on) / sum(run.idle_s for run in off)
    trained = trained_tokens_per_s(on)
    return {
        "requests": sum(run.num_requests for run in on),
        "slo_attainment": with_training,
        "slo_attainment_off": alone,
        "attainment_kept": kept,
        "harvest": harvest,
        "safe_harvest": 0.0 if kept is None else kept * harvest,
        "training_kept": trained / most_trained_per_s if most_trained_per_s else None,
        "trained_tokens_per_s": trained,
        "idle_share_off": sum(run.idle_s for run in off) / sum(run.stage_s for run in off),
        "busy_share": sum(run.serving_s + run.training_s for run in on) / sum(run.stage_s for run in on),
        "staleness_s": {
            "p50": pooled(run.staleness_p50_s for run in on),
            "p99": pooled(run.staleness_p99_s for run in on),
        },
        "ttft_s": {"p50": pooled(run.ttft_p50_s for run in on), "p99": pooled(run.ttft_p99_s for run in on)},
        "tpot_s": {"p50": pooled(run.tpot_p50_s for run in on), "p99": pooled(run.tpot_p99_s for run in on)},
    }
