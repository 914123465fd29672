"""Loads the engine that the settings name."""

from pathlib import Path

from services.latency import LatencyModel, NodeLatency, OpKind
from services.node_agent.config import NodeAgentSettings
from services.node_agent.engine.base import Engine, EngineConfig, WorkerDied
from services.node_agent.engine.emulated.engine import emulated_fingerprint, load_emulated_engine
from services.node_agent.engine.emulated.timing import EmulatedTiming
from services.profile_artifact import ArtifactError, load_artifact
from services.profile_messages import latency_from_profile
from services.runtime.app import StartupError


async def load(settings: NodeAgentSettings) -> tuple[Engine, str]:
    """The engine with its workers running, and the fingerprint of its profile.

    Raises StartupError with one line on a model directory or a setting it cannot use; nothing is left running then.
    """
    if not settings.model_path:
        raise StartupError("model_path is not set: name a Hugging Face model directory")
    config = _engine_config(settings)
    try:
        if settings.engine == "emulated":
            timing = EmulatedTiming(_emulated_latency(settings), settings.time_scale)
            seed = f"{settings.seed}/{settings.node_id}" if settings.emulated_noise else None
            return load_emulated_engine(config, timing, noise_seed=seed), emulated_fingerprint(config, timing)
        # Imported here so that emulated nodes run without torch.
        from services.node_agent.engine.torch.engine import load_engine, profile_fingerprint

        engine = await load_engine(config)
        return engine, profile_fingerprint(config, engine.info)
    except (ValueError, OSError, WorkerDied, TimeoutError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StartupError(f"cannot load the model {settings.model_path}: {reason}") from error


def _engine_config(settings: NodeAgentSettings) -> EngineConfig:
    return EngineConfig(
        model_path=settings.model_path,
        num_stages=settings.num_stages,
        devices=settings.devices,
        dtype=settings.dtype,
        training_dtype=settings.training_dtype,
        activation_checkpointing=settings.activation_checkpointing,
        threads_per_stage=settings.threads_per_stage,
        nice=settings.nice,
        cpus=settings.cpus,
        kv_capacity_tokens=settings.kv_capacity_tokens,
        kv_block_tokens=settings.kv_block_tokens,
        can_offload=settings.stage_memory_bytes > 0,
        max_context_tokens=settings.max_context_tokens,
        seed=settings.seed,
    )


def _emulated_latency(settings: NodeAgentSettings) -> NodeLatency:
    """Raises StartupError for a profile that cannot be used, ValueError for an unknown kind or form."""
    if not settings.emulated_profile:
        models = {
            OpKind(kind): LatencyModel(latency.form, latency.coefficients)
            for kind, latency in settings.emulated_latency.items()
        }
        return NodeLatency((models,) * settings.num_stages)
    if settings.emulated_latency:
        raise StartupError("set emulated_profile or emulated_latency, not both")
    path = Path(settings.emulated_profile)
    try:
        latency = latency_from_profile(load_artifact(path))
    except ArtifactError as error:
        raise StartupError(f"emulated_profile: {error}") from error
    except ValueError as error:
        raise StartupError(f"emulated_profile: {path}: {error}") from error
    if latency.num_stages != settings.num_stages:
        message = f"{path} is of {latency.num_stages} stages, num_stages is {settings.num_stages}"
        raise StartupError(f"emulated_profile: {message}")
    return latency
