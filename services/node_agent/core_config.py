"""The node core's configuration, from the settings and what the engine found in the model."""

from services.node_agent.config import NodeAgentSettings
from services.node_agent.core.types import MemoryConfig, NodeCoreConfig
from services.node_agent.engine.base import ModelInfo


def core_config(settings: NodeAgentSettings, info: ModelInfo) -> NodeCoreConfig:
    """The core's share of the settings. With limited memory, tokens weigh what they weigh in this model."""
    memory = None
    if settings.stage_memory_bytes:
        memory = MemoryConfig(
            peak_bytes=settings.stage_memory_bytes,
            kv_bytes_per_token=info.kv_bytes_per_token,
            activation_bytes_per_token=info.activation_bytes_per_token,
            kappa=settings.memory_kappa,
            max_wait_s=settings.memory_max_wait_s,
            max_forward_wait_s=settings.memory_max_forward_wait_s,
        )
    return NodeCoreConfig(
        num_stages=settings.num_stages,
        max_batch=settings.max_batch,
        max_prefill_tokens=settings.max_prefill_tokens,
        kv_capacity_tokens=settings.kv_capacity_tokens,
        kv_block_tokens=settings.kv_block_tokens,
        max_batch_tokens=settings.max_batch_tokens,
        expected_output_tokens=settings.expected_output_tokens,
        memory=memory,
        prefix_cache_tokens=settings.prefix_cache_tokens,
        epoch_steps=settings.epoch_steps,
        max_inflight_training=settings.max_inflight_training,
        weight_handling=settings.weight_handling,
        gradient_buffers=settings.gradient_buffers,
        training_schedule=settings.training_schedule,
        max_training_wait_s=settings.max_training_wait_s,
        group_timeout_s=settings.group_timeout_s,
        max_demotion_s=settings.max_demotion_s,
    )
