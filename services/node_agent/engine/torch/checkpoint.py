"""What a stage writes into a checkpoint, and takes over from one.

Moments are stored by job and full-model parameter name, so that a checkpoint fits any cut into stages.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from services.node_agent.checkpoint_files import adapter_key, state_file, state_files, weights_file, weights_files
from services.node_agent.engine.torch.adapters import Adapter
from services.node_agent.engine.torch.stage import Stage
from services.node_agent.engine.torch.training import Training, make_job
from services.node_agent.engine.torch.weights import WeightSet
from services.node_agent.engine.training_ops import AdapterSpec, OptimizerSpec

_RANDOM_STATE = "random_state"
_JOBS = "jobs"
_ADAPTERS = "adapters"


def save(folder: Path, stage: Stage, training: Training, adapters: Sequence[AdapterSpec]) -> None:
    """Write this stage's files, with these adapters. Raises OSError or SafetensorError when they cannot be written,
    KeyError for an adapter that is not there."""
    kept = [stage.adapters.get(spec.adapter_id) for spec in adapters]
    if not stage.weights.pristine:
        weights = {name: part.contiguous() for name, part in stage.weights.named(with_borrowed=False).items()}
        save_file(weights, folder / weights_file(stage.index, stage.num_stages), metadata={"format": "pt"})
    tensors: dict[str, Tensor] = {_RANDOM_STATE: torch.get_rng_state()}
    for adapter in kept:
        named = adapter.weights.named(with_borrowed=False).items()
        tensors.update((adapter_key(adapter.spec.adapter_id, name), part.contiguous()) for name, part in named)
    schedules = {}
    saved = [stage.weights, *(adapter.weights for adapter in kept)]
    for job_id, job in training.jobs.items():
        if not any(job.weights is weights for weights in saved):
            continue  # its adapter is not on all stages yet
        schedules[job_id] = {"spec": asdict(job.spec), "steps": job.scheduler.last_epoch}
        tensors.update(_moments(job_id, job.weights, job.optimizer.state))
    metadata = {_JOBS: json.dumps(schedules), _ADAPTERS: json.dumps([asdict(spec) for spec in adapters])}
    save_file(tensors, folder / state_file(stage.index, stage.num_stages), metadata=metadata)


def _moments(job_id: str, weights: WeightSet, state: Any) -> Iterator[tuple[str, Tensor]]:
    for weight in weights.owned:
        for kind, value in state.get(weight.parameter, {}).items():
            if value.dim() == 0:
                # Each part gets one of its own: they may belong to different parameters when they are read.
                yield from ((f"{job_id}/{kind}/{name}", value.clone()) for name in weight.names)
            else:
                yield from ((f"{job_id}/{kind}/{name}", part.contiguous()) for name, part in weight.parts(value))


def restore(folder: Path, stage: Stage, training: Training) -> None:
    """Take over weights, adapters, optimizers, schedules and random state; a job that the checkpoint does not know is
    forgotten, and so is its adapter, unless that is isolated: it is no part of what goes back.

    Raises ValueError for a checkpoint that lacks tensors, before anything has changed.
    """
    files = state_files(folder)
    is_pristine = not weights_files(folder)
    wanted = stage.weights.named(with_borrowed=True)
    weights = stage.original_weights() if is_pristine else _read(weights_files(folder), set(wanted))
    _check_shapes(folder, wanted, weights)
    random_state = _read([files[min(stage.index, len(files) - 1)]], {_RANDOM_STATE})[_RANDOM_STATE]
    adapters = _read_adapters(folder, files, stage, training)
    if not (is_pristine and stage.weights.pristine):
        training.before_change(stage.weights)
        with torch.no_grad():
            stage.weights.apply(partial(_value_of, weights))
    stage.weights.pristine = is_pristine
    for adapter, values in adapters:
        training.before_change(adapter.weights)
        with torch.no_grad():
            adapter.weights.apply(partial(_value_of, values))
    restored = {adapter.spec.adapter_id for adapter, _ in adapters}
    others = [adapter for adapter in stage.adapters if adapter.spec.adapter_id not in restored]
    stage.adapters.forget([adapter.spec.adapter_id for adapter in others if not adapter.spec.isolated])
    of_others = [adapter.weights for adapter in others if adapter.spec.isolated]
    jobs = {key: job for key, job in training.jobs.items() if any(job.weights is weights for weights in of_others)}
    training.adopt({**jobs, **_read_jobs(files, stage)})
    torch.set_rng_state(random_state)


def _value_of(values: Mapping[str, Tensor], name: str, current: Tensor) -> Tensor:
    del current
    return values[name]


def _read_adapters(
    folder: Path, files: Sequence[Path], stage: Stage, training: Training
) -> list[tuple[Adapter, dict[str, Tensor]]]:
    """This stage's adapters with the values they had."""
    with safe_open(files[0], framework="pt") as stored:
        specs = [AdapterSpec.from_stored(item) for item in json.loads((stored.metadata() or {}).get(_ADAPTERS, "[]"))]
    found = []
    for spec in specs:
        adapter = training.adapter(spec)
        current = adapter.weights.named(with_borrowed=False)
        keys = {adapter_key(spec.adapter_id, name): name for name in current}
        values = {keys[key]: value for key, value in _read(files, set(keys)).items()}
        _check_shapes(folder, current, values)
        found.append((adapter, values))
    return found


def _check_shapes(folder: Path, current: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, part in current.items():
        if tuple(weights[name].shape) != tuple(part.shape):
            shapes = f"shape {tuple(weights[name].shape)}, the model's is {tuple(part.shape)}"
            raise ValueError(f"{name} in the checkpoint {folder.name} has {shapes}")


def _read_jobs(files: Sequence[Path], stage: Stage) -> dict[str, Any]:
    """Jobs with optimizers over this stage's parameters, not in use yet."""
    jobs: dict[str, Any] = {}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            schedules = json.loads((stored.metadata() or {}).get(_JOBS, "{}"))
            names = set(stored.keys())
        for job_id, schedule in schedules.items():
            if job_id not in jobs:
                spec = schedule["spec"]
                spec = OptimizerSpec(**{**spec, "betas": tuple(spec["betas"])})
                jobs[job_id] = make_job(stage.weights_of(job_id), spec)
                _set_schedule(jobs[job_id], schedule["steps"])
        _fill_moments(file, names, jobs)
    return jobs


def _fill_moments(file: Path, names: set[str], jobs: dict[str, Any]) -> None:
    with safe_open(file, framework="pt") as stored:
        for job_id, job in jobs.items():
            for weight in job.weights.owned:
                for kind in ("step", "exp_avg", "exp_avg_sq"):
                    keys = [f"{job_id}/{kind}/{name}" for name in weight.names]
                    if not names.issuperset(keys):
                        continue
                    parts = [stored.get_tensor(key) for key in keys]
                    if kind == "step":  # counted in a dtype of its own
                        value = parts[0].to(weight.parameter.device)
                    else:  # a step takes moments of the parameter's dtype alone, which need not be the one saved
                        value = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(weight.parameter)
                    job.optimizer.state[weight.parameter][kind] = value


def _set_schedule(job: Any, steps: int) -> None:
    """A new schedule as it is after so many steps."""
    scheduler = job.scheduler
    scheduler.last_epoch = steps
    scheduler._step_count = steps + 1
    rates = [base * factor(steps) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler._last_lr = rates
    for group, rate in zip(job.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _read(files: Sequence[Path], wanted: set[str]) -> dict[str, Tensor]:
    """Tensors by name. Raises ValueError naming one that is in no file."""
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for name in wanted.intersection(stored.keys()):
                found[name] = stored.get_tensor(name)
    missing = sorted(wanted.difference(found))
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors, first {missing[0]}")
    return found
