"""Lets another node go on from the newest checkpoint of a node that does not come back.

Chosen when the node is lost: a node that keeps checkpoints in the same directory, has nothing to train, and holds no
training that the checkpoint lacks. It gets no micro-batches until the lost node is back, or it has restored.
"""

import asyncio

import structlog

from lemix.errors import LemixError
from services.scheduler.checkpoints import CheckpointDesk

_log = structlog.get_logger()


class Failover:
    """Nothing happens unless it is `on`. At most one node stands by for each lost one."""

    def __init__(self, desk: CheckpointDesk, *, on: bool) -> None:
        self._desk = desk
        self._on = on
        #: By lost node: who stands by, and its restore.
        self._standby: dict[str, str] = {}
        self._restores: dict[str, asyncio.Task[str]] = {}
        #: What the owners of jobs are told of it.
        self._outcomes: dict[str, str] = {}

    async def close(self) -> None:
        """Give up what is under way."""
        for restore in self._restores.values():
            restore.cancel()
        await asyncio.gather(*self._restores.values(), return_exceptions=True)

    def reserve(self, lost_id: str, busy: set[str]) -> str:
        """Choose who stands by for a lost node, none of those that train; empty: nobody can."""
        if not self._on:
            return ""
        for node_id, lost_for in [(node_id, lost) for lost, node_id in self._standby.items()]:
            if node_id == lost_id:  # lost too
                self._drop(lost_for, f"{node_id} was to go on from its checkpoint, and was lost as well")
        checkpoint_id = self._desk.newest_of_lost(lost_id)
        obstacles = []
        for node_id in self._desk.peers_of_lost(lost_id):
            obstacle = f"{node_id} is training" if node_id in busy else self._obstacle(lost_id, node_id, checkpoint_id)
            if node_id in self._standby.values():
                obstacle = f"{node_id} stands by for another node"
            if not obstacle:
                self._standby[lost_id] = node_id
                return node_id
            obstacles.append(obstacle)
        why = "; ".join(obstacles) or "no other node of its model keeps checkpoints"
        if checkpoint_id:
            self._outcomes[lost_id] = f"nobody goes on from its checkpoint {checkpoint_id}: {why}"
        return ""

    def _obstacle(self, lost_id: str, node_id: str, checkpoint_id: str) -> str:
        if not checkpoint_id:
            return "it held no checkpoint"
        taker = self._desk.lineage.taker(lost_id, checkpoint_id)
        if taker:
            return f"{taker} holds what it trained after that"
        return self._desk.lineage.obstacle(node_id, checkpoint_id)

    def release(self, lost_id: str) -> str:
        """It is back, or is given up: who stood by for it; empty: nobody."""
        restore = self._restores.pop(lost_id, None)
        if restore is not None:
            restore.cancel()
        self._outcomes.pop(lost_id, None)
        return self._standby.pop(lost_id, "")

    def is_under_way(self, lost_id: str) -> bool:
        """Let who stands by for it restore its checkpoint. False when that is over, or nobody does."""
        node_id = self._standby.get(lost_id)
        if node_id is None:
            return False
        restore = self._restores.get(lost_id)
        if restore is None:
            restore = self._restores[lost_id] = asyncio.create_task(self._restore(lost_id, node_id))
        if not restore.done():
            return True
        self._outcomes[lost_id] = restore.result()
        return False

    def outcome(self, lost_id: str) -> str:
        """What became of its checkpoint; empty: nothing was tried."""
        return self._outcomes.get(lost_id, "")

    async def _restore(self, lost_id: str, node_id: str) -> str:
        checkpoint_id = self._desk.newest_of_lost(lost_id)
        why = self._obstacle(lost_id, node_id, checkpoint_id)
        if not why:
            try:
                await self._desk.ask(node_id, "restore", checkpoint_id)
            except LemixError as error:
                why = error.message
            else:
                _log.warning("checkpoint moved", lost=lost_id, node=node_id, checkpoint=checkpoint_id)
                return f"{node_id} goes on from its checkpoint {checkpoint_id}"
        return f"{node_id} could not go on from its checkpoint {checkpoint_id}: {why}"

    def _drop(self, lost_id: str, outcome: str) -> None:
        self.release(lost_id)
        self._outcomes[lost_id] = outcome
