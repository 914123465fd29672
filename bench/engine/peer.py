"""Another serving engine beside ours: vLLM, run by an interpreter that has it."""

import asyncio
import contextlib
import json
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SCRIPT = Path(__file__).with_name("vllm_peer.py")
#: vLLM compiles the model when it starts.
_START_S = 300.0
_ANSWER_S = 120.0
_CLOSE_S = 20.0
_LINE_BYTES = 1 << 24
_LOG_LINES = 15


class PeerFailed(RuntimeError):
    """It did not start, or gave no answer; the message ends with the last lines of its log."""


class VllmPeer:
    """A running vLLM with one model."""

    def __init__(self, process: Process, log: Path) -> None:
        self._process = process
        self._log = log
        #: What it says of itself.
        self.version = ""

    @classmethod
    async def start(cls, python: str, model: Path, *, threads: int) -> "VllmPeer":
        """Load a model directory. Raises PeerFailed."""
        log = model.with_name("vllm.log")
        with log.open("wb") as stderr:
            try:
                process = await asyncio.create_subprocess_exec(
                    python, "-P", str(_SCRIPT), str(model), str(threads),
                    stdin=PIPE, stdout=PIPE, stderr=stderr, limit=_LINE_BYTES, cwd=model.parent,
                )  # fmt: skip
            except OSError as error:
                raise PeerFailed(f"{python} does not run: {error}") from None
        peer = cls(process, log)
        try:
            peer.version = str((await peer._answer(_START_S))["version"])
        except BaseException:
            await peer.close()
            raise
        return peer

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def generate(self, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> list[list[int]]:
        """Greedy outputs of requests that arrive together. Raises PeerFailed."""
        assert self._process.stdin is not None
        question = json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n"
        self._process.stdin.write(question.encode())
        outputs: list[list[int]] = (await self._answer(_ANSWER_S))["outputs"]
        return outputs

    async def close(self) -> None:
        """End it; one that does not end is killed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _CLOSE_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), timeout_s)
        except TimeoutError:
            line = b""
        if not line:
            newest = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
            raise PeerFailed("\n".join(("vLLM gave no answer:", *newest)))
        answer: dict[str, Any] = json.loads(line)
        return answer
