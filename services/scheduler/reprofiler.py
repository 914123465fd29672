"""Measures nodes again whose operations have left their profile, while they have nothing to do."""

import asyncio
from typing import Protocol

import structlog

from lemix.errors import LemixError
from services.latency import NodeLatency
from services.runtime.clock import Clock
from services.scheduler.core.events import NodeProfiled
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.inbox import Inbox, Told

_log = structlog.get_logger()

#: A node is not measured again sooner than this after it was, or was tried to be.
_AGAIN_S = 300.0
#: Looks in the time that a node has to be idle.
_LOOKS = 4


class Measures(Protocol):
    """Who measures nodes."""

    async def measure_again(self, node_id: str, address: str, budget_s: float) -> NodeLatency:
        """New models of a node. Raises LemixError."""
        ...


class Addresses(Protocol):
    """Who knows where nodes are."""

    def address(self, node_id: str) -> str:
        """host:port of a connected node, else empty."""
        ...


class Reprofiler:
    """One node at a time; the others wait for the next look."""

    def __init__(
        self,
        *,
        core: SchedulerCore,
        profiles: Measures,
        nodes: Addresses,
        inbox: Inbox,
        clock: Clock,
        idle_s: float,
        budget_s: float,
    ) -> None:
        self._core = core
        self._profiles = profiles
        self._nodes = nodes
        self._inbox = inbox
        self._clock = clock
        self._idle_s = idle_s
        self._budget_s = budget_s
        #: Since when nodes have been seen without work, and when they were last measured.
        self._idle_since_s: dict[str, float] = {}
        self._measured_s: dict[str, float] = {}

    async def run(self) -> None:
        """Look now and then until cancelled."""
        while True:
            await asyncio.sleep(self._idle_s / _LOOKS)
            await self.look()

    async def look(self) -> None:
        """Measure the node, if there is one, that has waited longest."""
        now_s = self._clock.monotonic_s()
        idle = {
            node.node_id
            for node in self._core.snapshot().nodes
            if not node.inflight_inference and not node.inflight_training
        }
        self._idle_since_s = {node_id: self._idle_since_s.get(node_id, now_s) for node_id in idle}
        for node_id in sorted(idle, key=lambda node_id: (self._idle_since_s[node_id], node_id)):
            if now_s - self._idle_since_s[node_id] >= self._idle_s and self._is_wanted(node_id, now_s):
                await self._measure(node_id)
                # Nobody looked meanwhile: the others may have had work.
                self._idle_since_s.clear()
                return

    def _is_wanted(self, node_id: str, now_s: float) -> bool:
        known_s = self._measured_s.get(node_id)
        if known_s is not None and now_s - known_s < _AGAIN_S:
            return False
        return any(record.drifting for record in self._core.op_records().get(node_id, ()))

    async def _measure(self, node_id: str) -> None:
        address = self._nodes.address(node_id)
        if not address:
            return
        _log.info("measuring a node again: its operations are off their profile", node=node_id)
        try:
            latency = await self._profiles.measure_again(node_id, address, self._budget_s)
        except LemixError as error:
            _log.warning("node not measured again", node=node_id, reason=error.message)
        else:
            await self._inbox.put(Told(NodeProfiled(node_id, latency)))
        self._measured_s[node_id] = self._clock.monotonic_s()
