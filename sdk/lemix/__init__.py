"""Client SDK of LeMix: generate, chat, train and watch over gRPC.

`Client` blocks, `lemix.aio.Client` is for asyncio, `lemix.testing` replaces the server in tests. Every failure is a
`LemixError` with a stable `ErrorCode`.
"""

from lemix.client import Client
from lemix.errors import ErrorCode, LemixError
from lemix.types import (
    Checkpoint,
    CheckpointPolicy,
    Choice,
    ClusterStatus,
    ExportedCheckpoint,
    FeedbackReceipt,
    FinishReason,
    Generation,
    GenerationChunk,
    GenerationOptions,
    Hyperparameters,
    JobEvent,
    JobStatus,
    Message,
    Model,
    NodeStatus,
    OutputLogprob,
    QualityGate,
    ServingReport,
    Slo,
    TokenLogprob,
    TrainingFile,
    TrainingJob,
    Usage,
    WeightVersion,
)

__all__ = [
    "Checkpoint",
    "CheckpointPolicy",
    "Choice",
    "Client",
    "ClusterStatus",
    "ErrorCode",
    "ExportedCheckpoint",
    "FeedbackReceipt",
    "FinishReason",
    "Generation",
    "GenerationChunk",
    "GenerationOptions",
    "Hyperparameters",
    "JobEvent",
    "JobStatus",
    "LemixError",
    "Message",
    "Model",
    "NodeStatus",
    "OutputLogprob",
    "QualityGate",
    "ServingReport",
    "Slo",
    "TokenLogprob",
    "TrainingFile",
    "TrainingJob",
    "Usage",
    "WeightVersion",
]
