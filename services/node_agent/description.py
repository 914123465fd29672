"""What a node tells of itself: when it joins, with its heartbeats, and to whoever asks."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from services.node_agent.checkpoints import Checkpointer
from services.node_agent.config import NodeAgentSettings
from services.node_agent.convert import adapter_to_proto
from services.node_agent.engine.base import Engine
from services.node_agent.loop import AgentLoop
from services.node_agent.session import Vitals
from services.runtime.clock import Clock


class NodeDescription:
    """Facts about one node as they are now. fingerprint: of its latency profile. address: host:port told to others."""

    def __init__(
        self,
        *,
        settings: NodeAgentSettings,
        engine: Engine,
        loop: AgentLoop,
        checkpoints: Checkpointer | None,
        incarnation: int,
        fingerprint: str,
        address: Callable[[], str],
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._loop = loop
        self._checkpoints = checkpoints
        self._incarnation = incarnation
        self._fingerprint = fingerprint
        self._address = address
        self._clock = clock

    @property
    def _model_name(self) -> str:
        return self._settings.model_name or Path(self._settings.model_path).resolve().name

    def hello(self) -> scheduler_pb2.NodeHello:
        """For the scheduler, when the node joins."""
        settings = self._settings
        return scheduler_pb2.NodeHello(
            node_id=settings.node_id,
            address=self._address(),
            num_stages=settings.num_stages,
            model=self._model_name,
            max_inflight_inference=settings.max_inflight_inference,
            incarnation=self._incarnation,
            profile_fingerprint=self._fingerprint,
            sent_monotonic_s=self._clock.monotonic_s(),
            max_context_tokens=self._engine.info.max_context_tokens,
            kv_capacity_tokens=self._loop.snapshot().kv_capacity_tokens,
            max_batch=settings.max_batch,
            prefix_cache_tokens=settings.prefix_cache_tokens,
            epoch_steps=settings.epoch_steps,
            max_prefill_tokens=settings.max_prefill_tokens,
            max_inflight_training=settings.max_inflight_training,
            weight_handling=settings.weight_handling,
            gradient_buffers=settings.gradient_buffers,
            training_schedule=settings.training_schedule,
            # No more than an example can be cut into: who forecasts by it must not wait for pieces that never come.
            max_training_parts=min(
                settings.max_training_parts, max(1, self._engine.info.num_layers // settings.num_stages)
            ),
            keeps_checkpoints=self._checkpoints is not None,
            checkpoints=() if self._checkpoints is None else self._checkpoints.held(),
            restore_note="" if self._checkpoints is None else self._checkpoints.note,
            max_batch_tokens=settings.max_batch_tokens,
            kv_block_tokens=settings.kv_block_tokens,
            projections=self._engine.info.projections,
            adapters=self.held_adapters(),
            weights_changed=self._loop.adapters.weights_changed,
            weights_age_s=self._weights_age_s(),
        )

    def held_adapters(self) -> tuple[scheduler_pb2.HeldAdapter, ...]:
        """The adapters this node holds."""
        return tuple(map(adapter_to_proto, self._loop.adapters.held.values()))

    def vitals(self, *, draining: bool) -> Vitals:
        """What heartbeats tell."""
        return Vitals(
            self._loop.ages.newest_step,
            self._loop.snapshot().kv_used_tokens,
            draining,
            self._weights_age_s(),
            self.held_adapters(),
            self._loop.adapters.weights_changed,
        )

    def _weights_age_s(self) -> float | None:
        ages = self._loop.ages
        trained_unix_s = ages.at(ages.newest_step)
        return None if trained_unix_s is None else max(0.0, self._clock.unix_s() - trained_unix_s)

    def node_info(self) -> node_pb2.GetNodeInfoResponse:
        """For GetNodeInfo."""
        settings, info, slip = self._settings, self._engine.info, self._engine.clock_slip
        return node_pb2.GetNodeInfoResponse(
            node_id=settings.node_id,
            model=self._model_name,
            num_stages=settings.num_stages,
            profile_fingerprint=self._fingerprint,
            max_context_tokens=info.max_context_tokens,
            max_batch=settings.max_batch,
            vocab_size=info.vocab_size,
            worker_pids=[worker.pid for worker in self._engine.workers],
            weight_step=self._loop.ages.newest_step,
            engine=settings.engine,
            device=info.device,
            dtype=settings.dtype,
            threads_per_stage=settings.threads_per_stage,
            kv_bytes_per_token=info.kv_bytes_per_token,
            kv_capacity_tokens=self._loop.snapshot().kv_capacity_tokens,
            clock_slip=None if slip is None else node_pb2.ClockSlip(**asdict(slip)),
        )
