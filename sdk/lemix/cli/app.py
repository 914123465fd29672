"""Commands of the `lemix` tool: thin over the SDK, which does the work."""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lemix.cli import render
from lemix.cli.conversation import Conversation
from lemix.client import DEFAULT_ADDRESS, Client
from lemix.errors import ErrorCode, LemixError
from lemix.types import (
    CheckpointPolicy,
    GenerationChunk,
    GenerationOptions,
    Hyperparameters,
    JobStatus,
    Lora,
    TrainingMode,
)

ClientFactory = Callable[[str], Client]

app = typer.Typer(
    name="lemix",
    help="Generate with, and train, the model a LeMix cluster serves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

#: Most tokens of a reply that names no limit.
_MAX_REPLY_TOKENS = 256
#: Characters of a row; longer cells than that are cut.
_MAX_TABLE_WIDTH = 2000

_MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.", min=1)]
_Temperature = Annotated[float, typer.Option(help="0 is greedy.", min=0.0, max=2.0)]


class _State:
    """What the commands share: how to reach the cluster, where to print."""

    def __init__(self) -> None:
        self.connect: ClientFactory = Client
        self.address = DEFAULT_ADDRESS
        self.out = Console()

    def client(self) -> Client:
        return self.connect(self.address)


_state = _State()


def run(arguments: Sequence[str], *, connect: ClientFactory = Client) -> int:
    """Run one command and return its exit code; failures are one line on stderr. connect: for tests."""
    _state.connect, _state.out = connect, Console()
    try:
        # standalone: typer reports wrong usage itself, in its own words, with exit code 2
        app(list(arguments), standalone_mode=True)
    except LemixError as error:
        _tell(error)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    return 0


@app.callback()
def _main(
    address: Annotated[
        str, typer.Option(envvar="LEMIX_ADDRESS", help="host:port of the gateway's gRPC API.")
    ] = DEFAULT_ADDRESS,
) -> None:
    _state.address = address


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_tokens: _MaxTokens = 64,
    temperature: _Temperature = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End the output here; up to 4 times.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same output.")] = None,
    max_staleness: Annotated[
        float | None, typer.Option(help="Only weights trained within so many seconds will do.", min=0.001)
    ] = None,
    model: Annotated[str, typer.Option(help="Model of an isolated job; default the served model itself.")] = "",
) -> None:
    """Continue a text, printed as it is produced."""
    options: GenerationOptions = {
        "model": model, "max_tokens": max_tokens, "temperature": temperature, "stop": stop or (), "seed": seed,
        "max_staleness_s": max_staleness,
    }  # fmt: skip
    with _state.client() as client:
        _print_stream(client.stream(prompt, **options))


@app.command()
def chat(
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of a reply; default a quarter of the context, 256 at most.", min=1)
    ] = None,
    temperature: _Temperature = 1.0,
    system: Annotated[str, typer.Option(help="System message.")] = "",
) -> None:
    """Talk to the model, one line at a time; end with Ctrl-D. What the context cannot hold any more is dropped."""
    with _state.client() as client:
        if max_tokens is None:
            max_tokens = min([_MAX_REPLY_TOKENS, *(max(1, model.max_context_tokens // 4) for model in client.models())])
        conversation = Conversation(client, system, {"max_tokens": max_tokens, "temperature": temperature})
        while (line := _read_line()) is not None:
            if line.strip():
                _print_reply(conversation, line)


@app.command()
def train(
    file: Annotated[Path, typer.Argument(help="JSONL file of examples.", exists=True, dir_okay=False, readable=True)],
    epochs: Annotated[int, typer.Option(help="Passes over the file.", min=1)] = 1,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate of AdamW.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per micro-batch.", min=1)] = None,
    checkpoint_steps: Annotated[int | None, typer.Option(help="Optimizer steps between checkpoints.", min=1)] = None,
    checkpoint_s: Annotated[float | None, typer.Option(help="Seconds between checkpoints.", min=1)] = None,
    validation: Annotated[
        Path | None, typer.Option(help="JSONL file of held-out examples.", exists=True, dir_okay=False, readable=True)
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train a low-rank adapter instead of all parameters.")] = False,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter; with --lora.", min=1, max=256)] = None,
    isolated: Annotated[bool, typer.Option("--isolated", help="Serve the adapter as a model of its own.")] = False,
    follow: Annotated[bool, typer.Option("--watch/--no-watch", help="Follow the job until it ends.")] = False,
) -> None:
    """Train the served model, or an adapter on top of it, on a file."""
    if rank is not None and not lora:
        raise typer.BadParameter("needs --lora", param_hint="--rank")
    mode = TrainingMode.ISOLATED if isolated else TrainingMode.ONLINE
    values = Hyperparameters(num_epochs=epochs, learning_rate=learning_rate, batch_size=batch_size)
    with _state.client() as client:
        policy = CheckpointPolicy(every_steps=checkpoint_steps, every_s=checkpoint_s)
        heldout = "" if validation is None else client.upload_file(validation).file_id
        stored = client.upload_file(file)
        job = client.create_job(
            stored.file_id,
            hyperparameters=values,
            checkpoint=policy,
            validation_file=heldout,
            lora=Lora(rank=rank) if lora else None,
            mode=mode,
        )
        _state.out.print(f"{job.job_id}: {job.num_examples} examples, {job.total_microbatches} micro-batches")
        if job.served_model:
            _state.out.print(f"served as {job.served_model}")
        if follow:
            _follow(client, job.job_id)


@app.command()
def jobs(limit: Annotated[int, typer.Option(help="How many.", min=1, max=100)] = 20) -> None:
    """List the newest training jobs."""
    with _state.client() as client:
        _print_table(render.job_table(client.list_jobs(limit)))


@app.command()
def delete(model: Annotated[str, typer.Argument(help="Id of an isolated job's model.")]) -> None:
    """Delete the model of an isolated job that has succeeded."""
    with _state.client() as client:
        client.delete_model(model)
    _state.out.print(f"{model}: deleted")


@app.command()
def watch(job: Annotated[str, typer.Argument(help="Id of the job.")]) -> None:
    """Follow a job until it ends."""
    with _state.client() as client:
        _follow(client, job)


@app.command()
def cancel(job: Annotated[str, typer.Argument(help="Id of the job.")]) -> None:
    """Stop a job."""
    with _state.client() as client:
        _state.out.print(f"{job}: {client.cancel_job(job).status.value}")


@app.command()
def pause(job: Annotated[str, typer.Argument(help="Id of the job.")]) -> None:
    """Hold a job until it is resumed; what nodes are training of it finishes."""
    with _state.client() as client:
        _state.out.print(f"{job}: {client.pause_job(job).status.value}")


@app.command()
def resume(job: Annotated[str, typer.Argument(help="Id of the job.")]) -> None:
    """Let a job go on that was paused, cancelled or failed."""
    with _state.client() as client:
        _state.out.print(f"{job}: {client.resume_job(job).status.value}")


@app.command()
def checkpoints(
    job: Annotated[str, typer.Option(help="Only those with micro-batches of this job.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Save one first, on every node that trained --job.")] = False,
) -> None:
    """List checkpoints, the newest first."""
    if save and not job:
        raise LemixError(ErrorCode.INVALID_REQUEST, "--save needs --job", param="job")
    with _state.client() as client:
        if save:
            client.save_checkpoint(job)
        _print_table(render.checkpoint_table(client.list_checkpoints(job)))


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Id of the checkpoint.")],
    job: Annotated[str, typer.Option(help="Write only the adapter of this LoRA job, as a peft directory.")] = "",
) -> None:
    """Write a checkpoint as a Hugging Face directory on its node."""
    with _state.client() as client:
        done = client.export_checkpoint(checkpoint, job)
    _state.out.print(f"{done.node_id}: {done.path}", soft_wrap=True)


@app.command()
def rollback(
    checkpoint: Annotated[str, typer.Argument(help="Id of the checkpoint.")],
    node: Annotated[str, typer.Option(help="Node that is to go on from it; default: the one that saved it.")] = "",
) -> None:
    """Let a node serve and train on from a checkpoint."""
    with _state.client() as client:
        version = client.restore_checkpoint(checkpoint, node_id=node)
    _state.out.print(f"{version.node_id} serves version {version.node_id}:{version.incarnation}:{version.step}")


@app.command()
def publish(
    checkpoint: Annotated[str, typer.Argument(help="Id of the checkpoint.")],
    node: Annotated[list[str] | None, typer.Option(help="Node that takes it over; default: all others.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Whatever its held-out loss.")] = False,
) -> None:
    """Let other nodes take over the weights of a checkpoint."""
    with _state.client() as client:
        versions = client.publish_checkpoint(checkpoint, node_ids=node or (), force=force)
    for version in versions:
        _state.out.print(f"{version.node_id} serves version {version.node_id}:{version.incarnation}:{version.step}")


@app.command()
def feedback(
    text: Annotated[str | None, typer.Argument(help="Text to learn.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Context of the completion.")] = None,
    completion: Annotated[str | None, typer.Option(help="What should follow the prompt.")] = None,
) -> None:
    """Hand over one example to learn from."""
    with _state.client() as client:
        receipt = client.feedback(text, prompt=prompt, completion=completion)
    _state.out.print(f"accepted as example {receipt.sequence} of {receipt.job_id}")


@app.command()
def status() -> None:
    """Show models, nodes and queues. Exit code 1 when the cluster is not ready."""
    with _state.client() as client:
        cluster, models = client.status(), client.models()
    _state.out.print(render.status_lines(cluster, models))
    if cluster.nodes:
        _print_table(render.node_table(cluster))
    if not cluster.ready:
        raise typer.Exit(1)


def _follow(client: Client, job_id: str) -> None:
    for event in client.watch(job_id):
        _state.out.print(render.event_line(event), markup=False, highlight=False, soft_wrap=True)
    job = client.get_job(job_id)
    _state.out.print(f"{job.job_id}: {job.status.value}")
    if job.status is JobStatus.FAILED:
        raise job.error or LemixError(ErrorCode.INTERNAL, "the job failed without a reason")


def _print_table(table: Table) -> None:
    """With whole ids, whatever the terminal's width: they are what the next command needs."""
    Console(width=_MAX_TABLE_WIDTH).print(table)


def _print_stream(chunks: Iterable[GenerationChunk]) -> None:
    for chunk in chunks:
        text = _harmless(chunk.text) if _state.out.is_terminal else chunk.text
        _state.out.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    _state.out.print()


def _harmless(text: str) -> str:
    """Without the control characters by which a model could change the terminal."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) != "Cc" else "\N{REPLACEMENT CHARACTER}" for char in text
    )


def _print_reply(conversation: Conversation, line: str) -> None:
    try:
        _print_stream(conversation.reply(line))
    except LemixError as error:
        if error.code is not ErrorCode.CONTEXT_LENGTH_EXCEEDED:
            raise
        _tell(error)  # this line alone is too long; the talk goes on without it
    if conversation.dropped:
        _state.out.print(f"(the context is full: the {conversation.dropped} oldest messages were dropped)", style="dim")


def _tell(error: LemixError) -> None:
    Console(stderr=True).print(f"lemix: {_explain(error)}", markup=False, highlight=False, soft_wrap=True)


def _read_line() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None


def _explain(error: LemixError) -> str:
    if error.code is ErrorCode.UNAVAILABLE and not error.answered:
        hint = "is the cluster running? set --address"
        return f"[{error.code.value}] no answer from {_state.address}: {error.message} ({hint})"
    return str(error)
