"""Clusters of emulated nodes: all services are real, only the stages take the time that a profile says."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.live.errors import LiveError
from deploy.local.emulated_model import MODEL_NAME, emulated_node, write_emulated_model
from deploy.local.process import ROOT
from deploy.local.settings import LocalClusterConfig
from lemix.internal.v1 import profile_pb2
from services.profile_artifact import ArtifactError, load_artifact, write_artifact

PROFILES = ROOT / "deploy" / "profiles"


@dataclass(frozen=True, slots=True)
class ClockSlip:
    """How late the ends of emulated operations were noticed, as shares of the operations' own times, of all nodes:
    quantiles of the worst node; total: all lateness by all time. wake_priority: what the kernel granted the nodes."""

    ops: int
    p50: float
    p99: float
    worst_s: float
    total: float
    wake_priority: str


def read_profile(path: Path) -> profile_pb2.Profile:
    """An artifact. Raises LiveError when it is none."""
    try:
        return load_artifact(path)
    except ArtifactError as error:
        raise LiveError(str(error)) from error


def scaled_profile(profile: profile_pb2.Profile, factor: float) -> profile_pb2.Profile:
    """What the node of this profile has when everything takes `factor` times as long."""
    scaled = profile_pb2.Profile()
    scaled.CopyFrom(profile)
    scaled.ClearField("content_hash")
    for fit in scaled.fits:
        fit.coefficients[:] = [factor * value for value in fit.coefficients]
        fit.table.durations_s[:] = [factor * value for value in fit.table.durations_s]
        if not fit.table.batches:
            fit.ClearField("table")
    for point in scaled.measurements:
        point.durations_s[:] = [factor * value for value in point.durations_s]
    for link in scaled.host_links:
        link.offload_bytes_per_s /= factor
        link.reload_bytes_per_s /= factor
        link.fixed_s *= factor
    return scaled


def emulated_cluster(
    directory: Path,
    *,
    profiles: tuple[Path, ...],
    time_scale: float,
    policy: str = "lemix",
    core: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    node: Mapping[str, Any] | None = None,
    **settings: Any,
) -> LocalClusterConfig:
    """A cluster with a node per profile, in order. Settings in seconds are the caller's to scale.

    `directory` is emptied and gets the model directory. Nodes of one kind: the scheduler gets their scaled profile and
    nobody is measured. Raises LiveError for a file that is no profile, or profiles of different numbers of stages.
    """
    shutil.rmtree(directory, ignore_errors=True)  # a ledger from an earlier run would still hold its tasks
    directory.mkdir(parents=True)
    found = [read_profile(path) for path in profiles]
    stages = {profile.num_stages for profile in found}
    if len(stages) != 1:
        raise LiveError(f"the profiles of a cluster must have equal numbers of stages, not {sorted(stages)}")
    model = directory / "model"
    write_emulated_model(model)
    common: dict[str, Any] = {}
    if len(set(profiles)) == 1:
        path = directory / "scaled-profile.json"
        path.write_text(write_artifact(scaled_profile(found[0], time_scale)), encoding="utf-8")
        common = {"profile_path": str(path.resolve())}
    return LocalClusterConfig(
        model_path=model,
        directory=directory,
        num_nodes=len(profiles),
        num_stages=stages.pop(),
        policy=policy,
        model_name=MODEL_NAME,
        core=core or {},
        scheduler={**common, **(scheduler or {})},
        node={"log": {"format": "json"}, **(node or {})},
        each_node=[emulated_node(path, time_scale) for path in profiles],
        pin_cpus=False,
        **settings,
    )


def clock_slip(directory: Path) -> ClockSlip:
    """Of a cluster that was stopped, from its nodes' logs. Raises LiveError when a node did not tell."""
    logs = [_Log(path) for path in sorted((directory / "logs").glob("node-*.log"))]
    nodes = [log.newest("clock slip") for log in logs]
    late_s = sum(node["late_s"] for node in nodes)
    busy_s = sum(node["busy_s"] for node in nodes)
    return ClockSlip(
        ops=sum(node["ops"] for node in nodes),
        p50=max((node["p50"] for node in nodes), default=0.0),
        p99=max((node["p99"] for node in nodes), default=0.0),
        worst_s=max((node["worst_s"] for node in nodes), default=0.0),
        total=late_s / busy_s if busy_s else 0.0,
        wake_priority=", ".join(sorted({log.newest("emulated device")["wake_priority"] for log in logs})),
    )


class _Log:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = path.read_text(encoding="utf-8").splitlines()

    def newest(self, event: str) -> dict[str, Any]:
        """The last line of this event."""
        for line in reversed(self._lines):
            if f'"{event}"' in line:
                found: dict[str, Any] = json.loads(line)
                return found
        raise LiveError(f"{self._path} tells no {event}: the node did not stop in order")
