"""The asyncio client."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from lemix import _calls, types
from lemix._convert import Messages
from lemix._retry import pause_s
from lemix._transport import AioGrpcTransport, AsyncTransport
from lemix.client import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, DEFAULT_WATCH_TIMEOUT_S
from lemix.errors import LemixError

__all__ = ["Client"]

T = TypeVar("T")


class Client:
    """Talks to a LeMix gateway; an async context manager. Make it inside a running event loop.

    Every call has a deadline and fails with LemixError only. A call that found no server is tried again a few times
    where repeating is safe, and request ids make it so.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        transport: AsyncTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """address: host:port of the gateway's gRPC API. timeout_s: deadline of each call that names none.

        transport: replaces the connection, for tests. sleep: how pauses between tries are made.
        """
        self._transport = transport if transport is not None else AioGrpcTransport(address)
        self._timeout_s = timeout_s
        self._sleep = sleep

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Release the connection."""
        await self._transport.close()

    async def generate(
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, **options: Unpack[types.GenerationOptions]
    ) -> types.Generation:
        """Continue a text or a list of token ids.

        Raises LemixError INVALID_REQUEST, MODEL_NOT_FOUND, CONTEXT_LENGTH_EXCEEDED, OVERLOADED, DEADLINE_EXCEEDED, ...
        """
        return await self._unary(_calls.generate(_calls.spec(prompt, None, **options)), timeout_s)

    def stream(
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, **options: Unpack[types.GenerationOptions]
    ) -> AsyncGenerator[types.GenerationChunk]:
        """Like `generate`, in pieces as they are produced. Closing the iterator cancels the request."""
        return self._stream(_calls.generate_stream(_calls.spec(prompt, None, **options)), timeout_s)

    async def chat(
        self, messages: Messages, *, timeout_s: float | None = None, **options: Unpack[types.GenerationOptions]
    ) -> types.Generation:
        """Answer a conversation of Message or (role, content), rendered with the model's chat template."""
        return await self._unary(_calls.generate(_calls.spec(None, messages, **options)), timeout_s)

    def stream_chat(
        self, messages: Messages, *, timeout_s: float | None = None, **options: Unpack[types.GenerationOptions]
    ) -> AsyncGenerator[types.GenerationChunk]:
        """Like `chat`, in pieces as they are produced."""
        return self._stream(_calls.generate_stream(_calls.spec(None, messages, **options)), timeout_s)

    async def upload_file(
        self,
        file: str | Path | bytes,
        *,
        filename: str = "",
        on_bad_line: str = "reject",
        on_long_line: str = "reject",
        timeout_s: float | None = None,
    ) -> types.TrainingFile:
        """Store a JSONL file of training examples, given by its path or its content (under 16 MiB).

        on_bad_line: "reject" the file or "skip" a line that cannot be used. on_long_line: "reject" an example longer
        than the model's context as a bad line, or "truncate" it. What was left out or cut is counted.

        Raises LemixError INVALID_TRAINING_FILE naming the line, OVERLOADED, NOT_FOUND (the path).
        """
        call = await asyncio.to_thread(_calls.create_file, file, filename, on_bad_line, on_long_line)
        return await self._unary(call, timeout_s)

    async def create_job(
        self,
        training_file: str,
        *,
        model: str = "",
        hyperparameters: types.Hyperparameters | None = None,
        checkpoint: types.CheckpointPolicy | None = None,
        validation_file: str = "",
        quality_gate: types.QualityGate | None = None,
        lora: types.Lora | None = None,
        mode: types.TrainingMode = types.TrainingMode.ONLINE,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> types.TrainingJob:
        """Start training the served model, or a LoRA adapter on top of it, on a stored file. Returns when the job is
        durable.

        validation_file: examples whose loss is measured for every checkpoint, for the quality gate. mode ISOLATED: the
        adapter serves requests for `TrainingJob.served_model`, the model stays as it is.
        """
        return await self._unary(
            _calls.create_job(
                training_file,
                model,
                hyperparameters,
                request_id,
                checkpoint,
                validation_file,
                quality_gate,
                lora,
                mode,
            ),
            timeout_s,
        )

    async def submit_training(
        self,
        file: str | Path | bytes,
        *,
        model: str = "",
        hyperparameters: types.Hyperparameters | None = None,
        checkpoint: types.CheckpointPolicy | None = None,
        lora: types.Lora | None = None,
        mode: types.TrainingMode = types.TrainingMode.ONLINE,
        timeout_s: float | None = None,
    ) -> types.TrainingJob:
        """`upload_file`, then `create_job`."""
        stored = await self.upload_file(file, timeout_s=timeout_s)
        return await self.create_job(
            stored.file_id,
            model=model,
            hyperparameters=hyperparameters,
            checkpoint=checkpoint,
            lora=lora,
            mode=mode,
            timeout_s=timeout_s,
        )

    async def get_job(self, job_id: str, *, timeout_s: float | None = None) -> types.TrainingJob:
        """Raises LemixError NOT_FOUND."""
        return await self._unary(_calls.get_job(job_id), timeout_s)

    async def list_jobs(self, limit: int = 20, *, timeout_s: float | None = None) -> list[types.TrainingJob]:
        """Newest first; limit 1 to 100."""
        return await self._unary(_calls.list_jobs(limit), timeout_s)

    async def delete_model(self, model: str, *, timeout_s: float | None = None) -> None:
        """Delete the model of an isolated job that has succeeded. Raises LemixError MODEL_NOT_FOUND, CONFLICT."""
        await self._unary(_calls.delete_model(model), timeout_s)

    async def cancel_job(self, job_id: str, *, timeout_s: float | None = None) -> types.TrainingJob:
        """Stop a job. Raises LemixError NOT_FOUND, CONFLICT (it has ended otherwise)."""
        return await self._unary(_calls.cancel_job(job_id), timeout_s)

    async def pause_job(self, job_id: str, *, timeout_s: float | None = None) -> types.TrainingJob:
        """Hold a job until it is resumed. Raises LemixError NOT_FOUND, CONFLICT (it has ended), OVERLOADED."""
        return await self._unary(_calls.pause_job(job_id), timeout_s)

    async def resume_job(self, job_id: str, *, timeout_s: float | None = None) -> types.TrainingJob:
        """Let a job go on that was paused, cancelled or failed. Raises LemixError NOT_FOUND, OVERLOADED, CONFLICT (it
        has succeeded, or its adapter was freed)."""
        return await self._unary(_calls.resume_job(job_id), timeout_s)

    def watch(
        self, job_id: str, *, after_sequence: int = 0, timeout_s: float | None = None
    ) -> AsyncGenerator[types.JobEvent]:
        """Events of a job from `after_sequence` on, until it ends. timeout_s: an hour when None."""
        return self._stream(_calls.watch_job(job_id, after_sequence), timeout_s or DEFAULT_WATCH_TIMEOUT_S)

    async def save_checkpoint(self, job_id: str, *, timeout_s: float | None = None) -> list[types.Checkpoint]:
        """Save a checkpoint on every node that trained the job; returns when they are on disk.

        Raises LemixError NOT_FOUND, CONFLICT (no node keeps checkpoints), RESOURCE_EXHAUSTED (disk full).
        """
        return await self._unary(_calls.save_checkpoint(job_id), timeout_s)

    async def list_checkpoints(self, job_id: str = "", *, timeout_s: float | None = None) -> list[types.Checkpoint]:
        """The newest first; job_id: only those that contain micro-batches of this job."""
        return await self._unary(_calls.list_checkpoints(job_id), timeout_s)

    async def export_checkpoint(
        self, checkpoint_id: str, job_id: str = "", *, timeout_s: float | None = None
    ) -> types.ExportedCheckpoint:
        """Let its node write a checkpoint's model as a Hugging Face directory, or the adapter of a LoRA job as a peft
        directory. Raises LemixError NOT_FOUND, CONFLICT."""
        return await self._unary(_calls.export_checkpoint(checkpoint_id, job_id), timeout_s)

    async def restore_checkpoint(
        self, checkpoint_id: str, *, node_id: str = "", timeout_s: float | None = None
    ) -> types.WeightVersion:
        """Let a node (by default the one that saved it) go on from a checkpoint; returns the version that serves then.

        Raises LemixError NOT_FOUND, CONFLICT (another model, or corrupted).
        """
        return await self._unary(_calls.restore_checkpoint(checkpoint_id, node_id), timeout_s)

    async def publish_checkpoint(
        self, checkpoint_id: str, *, node_ids: Sequence[str] = (), force: bool = False, timeout_s: float | None = None
    ) -> list[types.WeightVersion]:
        """Let other nodes (none named: all) take over the weights of a checkpoint; returns their versions.

        Raises LemixError NOT_FOUND, CONFLICT (its held-out loss is bad, unless forced), UNAVAILABLE (a node is away).
        """
        return await self._unary(_calls.publish_checkpoint(checkpoint_id, node_ids, force), timeout_s)

    async def feedback(
        self,
        text: str | None = None,
        *,
        prompt: str | None = None,
        completion: str | None = None,
        messages: Messages | None = None,
        model: str = "",
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> types.FeedbackReceipt:
        """Hand over one example to learn from: `text`, or `prompt` and `completion`, or `messages`."""
        call = _calls.feedback(text, prompt, completion, messages, model=model, request_id=request_id)
        return await self._unary(call, timeout_s)

    async def models(self, *, timeout_s: float | None = None) -> list[types.Model]:
        """The models served."""
        return await self._unary(_calls.list_models(), timeout_s)

    async def status(self, *, timeout_s: float | None = None) -> types.ClusterStatus:
        """Nodes, queues, policy."""
        return await self._unary(_calls.get_status(), timeout_s)

    async def _unary(self, call: _calls.Call[T], timeout_s: float | None) -> T:
        deadline_s = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        tries = 0
        while True:
            tries += 1
            try:
                return call.read(await self._transport.unary(call, max(0.0, deadline_s - time.monotonic())))
            except LemixError as error:
                await self._pause_or_raise(call, error, tries, deadline_s)

    async def _stream(self, call: _calls.Call[T], timeout_s: float | None) -> AsyncGenerator[T]:
        deadline_s = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        tries = 0
        while True:
            tries += 1
            received = False
            try:
                messages = self._transport.stream(call, max(0.0, deadline_s - time.monotonic()))
                async with aclosing(messages):
                    async for message in messages:
                        received = True
                        yield call.read(message)
                return
            except LemixError as error:
                if received:
                    raise
                await self._pause_or_raise(call, error, tries, deadline_s)

    async def _pause_or_raise(self, call: _calls.Call[Any], error: LemixError, tries: int, deadline_s: float) -> None:
        pause = pause_s(call, error, tries, deadline_s - time.monotonic())
        if pause is None:
            raise error
        await self._sleep(pause)
