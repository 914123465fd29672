"""The blocking client."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from lemix import _calls, types
from lemix._convert import Messages
from lemix._retry import pause_s
from lemix._transport import GrpcTransport, Transport
from lemix.errors import LemixError

__all__ = ["Client"]

T = TypeVar("T")

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 300.0
DEFAULT_WATCH_TIMEOUT_S = 3600.0


class Client:
    """Talks to a LeMix gateway; a context manager, usable from several threads.

    Every call has a deadline and fails with LemixError only. A call that found no server is tried again a few times
    where repeating is safe, and request ids make it so.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        transport: Transport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """address: host:port of the gateway's gRPC API. timeout_s: deadline of each call that names none.

        transport: replaces the connection, for tests. sleep: how pauses between tries are made.
        """
        self._transport = transport if transport is not None else GrpcTransport(address)
        self._timeout_s = timeout_s
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the connection."""
        self._transport.close()

    def generate(
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, **options: Unpack[types.GenerationOptions]
    ) -> types.Generation:
        """Continue a text or a list of token ids.

        Raises LemixError INVALID_REQUEST, MODEL_NOT_FOUND, CONTEXT_LENGTH_EXCEEDED, OVERLOADED, DEADLINE_EXCEEDED, ...
        """
        return self._unary(_calls.generate(_calls.spec(prompt, None, **options)), timeout_s)

    def stream(
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, **options: Unpack[types.GenerationOptions]
    ) -> Generator[types.GenerationChunk]:
        """Like `generate`, in pieces as they are produced. Closing the iterator cancels the request."""
        return self._stream(_calls.generate_stream(_calls.spec(prompt, None, **options)), timeout_s)

    def chat(
        self, messages: Messages, *, timeout_s: float | None = None, **options: Unpack[types.GenerationOptions]
    ) -> types.Generation:
        """Answer a conversation of Message or (role, content), rendered with the model's chat template."""
        return self._unary(_calls.generate(_calls.spec(None, messages, **options)), timeout_s)

    def stream_chat(
        self, messages: Messages, *, timeout_s: float | None = None, **options: Unpack[types.GenerationOptions]
    ) -> Generator[types.GenerationChunk]:
        """Like `chat`, in pieces as they are produced."""
        return self._stream(_calls.generate_stream(_calls.spec(None, messages, **options)), timeout_s)

    def upload_file(
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
        return self._unary(_calls.create_file(file, filename, on_bad_line, on_long_line), timeout_s)

    def create_job(
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
        return self._unary(
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

    def submit_training(
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
        stored = self.upload_file(file, timeout_s=timeout_s)
        return self.create_job(
            stored.file_id,
            model=model,
            hyperparameters=hyperparameters,
            checkpoint=checkpoint,
            lora=lora,
            mode=mode,
            timeout_s=timeout_s,
        )

    def get_job(self, job_id: str, *, timeout_s: float | None = None) -> types.TrainingJob:
        """Raises LemixError NOT_FOUND."""
        return self._unary(_calls.get_job(job_id), timeout_s)

    def list_jobs(self, limit: int = 20, *, timeout_s: float | None = None) -> list[types.TrainingJob]:
        """Newest first; limit 1 to 100."""
        return self._unary(_calls.list_jobs(limit), timeout_s)

    def delete_model(self, model: str, *, timeout_s: float | None = None) -> None:
        """Delete the model of an isolated job that has succeeded. Raises LemixError MODEL_NOT_FOUND, CONFLICT."""
        self._unary(_calls.delete_model(model), timeout_s)

    def cancel_job(self, job_id: str, *, timeout_s: float | None = None) -> types.TrainingJob:
        """Stop a job. Raises LemixError NOT_FOUND, CONFLICT (it has ended otherwise)."""
        return self._unary(_calls.cancel_job(job_id), timeout_s)

    def pause_job(self, job_id: str, *, timeout_s: float | None = None) -> types.TrainingJob:
        """Hold a job until it is resumed. Raises LemixError NOT_FOUND, CONFLICT (it has ended), OVERLOADED."""
        return self._unary(_calls.pause_job(job_id), timeout_s)

    def resume_job(self, job_id: str, *, timeout_s: float | None = None) -> types.TrainingJob:
        """Let a job go on that was paused, cancelled or failed. Raises LemixError NOT_FOUND, OVERLOADED, CONFLICT (it
        has succeeded, or its adapter was freed)."""
        return self._unary(_calls.resume_job(job_id), timeout_s)

    def watch(
        self, job_id: str, *, after_sequence: int = 0, timeout_s: float | None = None
    ) -> Generator[types.JobEvent]:
        """Events of a job from `after_sequence` on, until it ends. timeout_s: an hour when None."""
        return self._stream(_calls.watch_job(job_id, after_sequence), timeout_s or DEFAULT_WATCH_TIMEOUT_S)

    def save_checkpoint(self, job_id: str, *, timeout_s: float | None = None) -> list[types.Checkpoint]:
        """Save a checkpoint on every node that trained the job; returns when they are on disk.

        Raises LemixError NOT_FOUND, CONFLICT (no node keeps checkpoints), RESOURCE_EXHAUSTED (disk full).
        """
        return self._unary(_calls.save_checkpoint(job_id), timeout_s)

    def list_checkpoints(self, job_id: str = "", *, timeout_s: float | None = None) -> list[types.Checkpoint]:
        """The newest first; job_id: only those that contain micro-batches of this job."""
        return self._unary(_calls.list_checkpoints(job_id), timeout_s)

    def export_checkpoint(
        self, checkpoint_id: str, job_id: str = "", *, timeout_s: float | None = None
    ) -> types.ExportedCheckpoint:
        """Let its node write a checkpoint's model as a Hugging Face directory, or the adapter of a LoRA job as a peft
        directory. Raises LemixError NOT_FOUND, CONFLICT."""
        return self._unary(_calls.export_checkpoint(checkpoint_id, job_id), timeout_s)

    def restore_checkpoint(
        self, checkpoint_id: str, *, node_id: str = "", timeout_s: float | None = None
    ) -> types.WeightVersion:
        """Let a node (by default the one that saved it) go on from a checkpoint; returns the version that serves then.

        Raises LemixError NOT_FOUND, CONFLICT (another model, or corrupted).
        """
        return self._unary(_calls.restore_checkpoint(checkpoint_id, node_id), timeout_s)

    def publish_checkpoint(
        self, checkpoint_id: str, *, node_ids: Sequence[str] = (), force: bool = False, timeout_s: float | None = None
    ) -> list[types.WeightVersion]:
        """Let other nodes (none named: all) take over the weights of a checkpoint; returns their versions.

        Raises LemixError NOT_FOUND, CONFLICT (its held-out loss is bad, unless forced), UNAVAILABLE (a node is away).
        """
        return self._unary(_calls.publish_checkpoint(checkpoint_id, node_ids, force), timeout_s)

    def feedback(
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
        return self._unary(call, timeout_s)

    def models(self, *, timeout_s: float | None = None) -> list[types.Model]:
        """The models served."""
        return self._unary(_calls.list_models(), timeout_s)

    def status(self, *, timeout_s: float | None = None) -> types.ClusterStatus:
        """Nodes, queues, policy."""
        return self._unary(_calls.get_status(), timeout_s)

    def _unary(self, call: _calls.Call[T], timeout_s: float | None) -> T:
        deadline_s = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        tries = 0
        while True:
            tries += 1
            try:
                return call.read(self._transport.unary(call, max(0.0, deadline_s - time.monotonic())))
            except LemixError as error:
                self._pause_or_raise(call, error, tries, deadline_s)

    def _stream(self, call: _calls.Call[T], timeout_s: float | None) -> Generator[T]:
        deadline_s = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        tries = 0
        while True:
            tries += 1
            received = False
            try:
                messages = self._transport.stream(call, max(0.0, deadline_s - time.monotonic()))
                with closing(messages):
                    for message in messages:
                        received = True
                        yield call.read(message)
                return
            except LemixError as error:
                if received:
                    raise
                self._pause_or_raise(call, error, tries, deadline_s)

    def _pause_or_raise(self, call: _calls.Call[Any], error: LemixError, tries: int, deadline_s: float) -> None:
        pause = pause_s(call, error, tries, deadline_s - time.monotonic())
        if pause is None:
            raise error
        self._sleep(pause)
