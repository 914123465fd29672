"""Settings of the node agent (`LEMIX_NODE_AGENT_...`)."""

from typing import Literal

from pydantic import Field, model_validator

from services.runtime.config import ServiceSettings, Settings


class OpLatency(Settings):
    """Latency of one kind of emulated op: `form` and coefficients of `services.latency`."""

    form: str = "constant"
    coefficients: tuple[float, ...] = (0.0,)


class NodeAgentSettings(ServiceSettings):
    """Everything an operator can set on a node."""

    #: host:port told to the scheduler, gateways and peers. Empty: the listen address.
    advertise: str = ""
    #: Stable over restarts; unique in the cluster. It names the folder of its checkpoints: no dot at its beginning.
    node_id: str = Field("node-0", min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")
    redis_url: str = "redis://127.0.0.1:6379/0"
    scheduler_address: str = "127.0.0.1:50051"

    #: Hugging Face model directory. The engine reads local files only.
    model_path: str = ""
    #: Id the model is served under. Empty: the directory's name.
    model_name: str = ""
    #: "torch": the real pipeline. "emulated": no neural network, chosen latencies.
    engine: Literal["torch", "emulated"] = "torch"
    #: Latency by op kind ("prefill", "decode", "train_forward", ...), the same on every stage. Missing kinds: no time.
    emulated_latency: dict[str, OpLatency] = Field(default_factory=dict)
    #: Profile artifact whose latencies the emulated engine has, stage by stage, instead of `emulated_latency`.
    emulated_profile: str = ""
    #: Whether emulated durations spread as the profile says, or are exactly as predicted.
    emulated_noise: bool = True
    #: How many times as long emulated operations take. Promises and arrivals must be scaled by whoever makes them.
    time_scale: float = Field(1.0, gt=0.0, le=1000.0)
    num_stages: int = Field(1, ge=1, le=64)
    #: One device per stage, or one for all.
    devices: tuple[str, ...] = ("cpu",)
    dtype: str = "float32"
    threads_per_stage: int = Field(1, ge=1)
    #: Added to the niceness of the stage workers.
    nice: int = Field(0, ge=0, le=19)
    #: CPU core of each stage worker. Empty: not pinned.
    cpus: tuple[int, ...] = ()
    #: Cut the model's context to this many tokens. 0: the model's own.
    max_context_tokens: int = Field(0, ge=0)
    seed: int = 0

    kv_capacity_tokens: int = Field(65536, ge=1)
    #: Tokens of a block, the unit in which the KV cache is given out; small ones waste less, large ones are faster.
    kv_block_tokens: int = Field(64, ge=1)
    #: Output that a request is admitted for, tokens. When one needs more and no block is left, the request admitted
    #: last is computed again later, prompt and output so far. 0: max_tokens, so that nobody is.
    expected_output_tokens: int = Field(0, ge=0)
    #: Tokens of it kept for sessions between their turns, as far as requests leave room. 0: none.
    prefix_cache_tokens: int = Field(0, ge=0)
    #: A kept KV cache serves until the weights have changed this often, counted in epochs: weights step // epoch_steps.
    epoch_steps: int = Field(64, ge=1)
    #: Most requests decoded in one op.
    max_batch: int = Field(16, ge=1)
    #: Most new tokens of one prefill op.
    max_prefill_tokens: int = Field(2048, ge=1)
    #: Most new tokens of one inference op: one for every decoding request, the rest for prompts, in pieces if need be.
    #: So a long prompt holds nobody up for long. More than max_batch. 0: prompts are computed whole and apart.
    max_batch_tokens: int = Field(0, ge=0)
    #: Most requests taken from the ledger and not finished there.
    max_inflight_inference: int = Field(64, ge=1)
    #: Micro-batches between forward and backward.
    max_inflight_training: int = Field(2, ge=1)
    #: Most micro-batches taken from the ledger and not finished there.
    max_queued_training: int = Field(16, ge=1)
    #: Jobs whose optimizer state a stage keeps (two more copies of its weights each). At least as many as train at
    #: once: a job crowded out by others starts its moments and its schedule anew when it comes back.
    max_optimizer_states: int = Field(8, ge=1, le=8)
    #: LoRA adapters on this node; a job that needs one more fails.
    max_adapters: int = Field(16, ge=1, le=64)
    #: "drain": micro-batches in flight finish before the weights change. "stash": the weights change at once; what is
    #: on its way goes on with those it started with, and a stage keeps one copy per version for it.
    weight_handling: Literal["drain", "stash"] = "drain"
    #: "stash": accumulation groups whose gradients a stage holds at once, one copy of its weights each. With one per
    #: stage no backward waits for a step. No effect with "drain".
    gradient_buffers: int = Field(1, ge=1, le=64)
    #: "async" (A-PP): micro-batches follow each other without end. "gpipe", "1f1b" (S-PP): those of an optimizer step
    #: run together, and the next ones after it; gpipe all forwards first, 1f1b as few in flight as there are stages.
    training_schedule: Literal["async", "gpipe", "1f1b"] = "async"
    #: Most pieces a micro-batch's forward and backward are cut into, each an op of its own, so that requests get in
    #: between. The scheduler chooses how many, up to this; 1: never cut.
    max_training_parts: int = Field(8, ge=1, le=64)
    #: "bfloat16": training computes its matrix products so, with weights, gradients and optimizer state in float32
    #: (mixed precision; `dtype` must be float32). Empty: everything in `dtype`.
    training_dtype: Literal["", "bfloat16"] = ""
    #: Keep only what enters each layer between forward and backward and compute the rest again: the forward runs
    #: twice for a fraction of the memory.
    activation_checkpointing: bool = False
    #: M_peak: memory of a stage for KV caches and saved activations, bytes, beside its weights, gradients and optimizer
    #: state. What does not fit waits for room, then goes to host memory and comes back before it is used. 0: no limit.
    stage_memory_bytes: int = Field(0, ge=0)
    #: Share of it that may be used.
    memory_kappa: float = Field(0.9, gt=0.0, le=1.0)
    #: T_max: longest wait for room before data of other tasks goes to host memory, seconds; and that of training
    #: forwards, for which nobody waits.
    memory_max_wait_s: float = Field(0.05, ge=0.0)
    memory_max_forward_wait_s: float = Field(5.0, ge=0.0)

    #: Seconds that the node core counts by, see NodeCoreConfig. A scheduler that runs nodes ahead (`forecast:
    #: fast_forward`) takes these values for granted; whoever emulates with a `time_scale` scales them too.
    max_training_wait_s: float = Field(1.0, ge=0.0)
    group_timeout_s: float = Field(1.0, gt=0.0)
    max_demotion_s: float = Field(10.0, ge=0.0)

    #: Folder of checkpoints, one folder per node in it; may be shared by all nodes. Empty: none are saved, and what was
    #: trained on a node that dies is lost.
    checkpoint_directory: str = ""
    #: Checkpoints that stay, the newest.
    checkpoint_keep: int = Field(2, ge=1, le=100)
    #: Optimizer steps of a job between two checkpoints, unless the job says otherwise. 0: no limit.
    checkpoint_every_steps: int = Field(100, ge=0)
    #: Longest time that a step is in no checkpoint, seconds, unless the job says otherwise. 0: no limit.
    checkpoint_every_s: float = Field(60.0, ge=0.0)
    #: Micro-batches that may be in no checkpoint; with so many a checkpoint is due and no further one is started.
    max_unsaved_microbatches: int = Field(512, ge=1, le=100_000)
    #: When checkpoints have failed for so long (disk full), seconds, training goes on without: what is in none would be
    #: lost with the node.
    checkpoint_give_up_s: float = Field(60.0, ge=0.0)

    #: A stage worker that does not answer an op (or one measurement) for this long is given up, and the node with it.
    op_timeout_s: float = Field(600.0, gt=0.0)
    #: Longest time a trace waits for others before it is sent, seconds.
    trace_flush_s: float = Field(0.05, ge=0.0, le=1.0)
    #: Least time between two messages of a gateway's token stream, seconds; first tokens and ends never wait. 0: every
    #: decode iteration is a message of its own.
    token_flush_s: float = Field(0.02, ge=0.0, le=1.0)
    #: Tokens of a finished request are kept this long for a gateway that has not fetched them, seconds.
    token_ttl_s: float = Field(60.0, gt=0.0)
    #: Longest time to fetch and combine the peers' weights, seconds.
    sync_timeout_s: float = Field(30.0, gt=0.0)
    #: A node that is told to stop finishes what it holds, for at most this long, seconds; the rest goes to other nodes.
    #: 0: it leaves at once.
    drain_s: float = Field(8.0, ge=0.0, le=3600.0)
    #: Longest wait for the scheduler's welcome (it may profile the node first), seconds.
    welcome_timeout_s: float = Field(900.0, gt=0.0)

    @model_validator(mode="after")
    def _fits_together(self) -> "NodeAgentSettings":
        if self.kv_block_tokens > self.kv_capacity_tokens:
            raise ValueError(f"kv_block_tokens ({self.kv_block_tokens}) exceeds kv_capacity_tokens")
        if self.max_batch_tokens and self.max_batch_tokens <= self.max_batch:
            raise ValueError(f"max_batch_tokens must be 0 or more than max_batch ({self.max_batch})")
        return self
