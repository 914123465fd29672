"""The files that a checkpoint's stages write. The weights are a sharded Hugging Face checkpoint."""

import os
from pathlib import Path

INDEX_FILE = "model.safetensors.index.json"


def weights_file(stage: int, num_stages: int) -> str:
    """Weights of one stage (from 0) under full-model names."""
    return f"model-{stage + 1:05d}-of-{num_stages:05d}.safetensors"


def state_file(stage: int, num_stages: int) -> str:
    """Optimizer states, schedules and random state of one stage (from 0)."""
    return f"training-{stage + 1:05d}-of-{num_stages:05d}.safetensors"


def weights_files(folder: Path) -> list[Path]:
    """Every stage's weights, stage 0 first."""
    return sorted(folder.glob("model-*-of-*.safetensors"))


def state_files(folder: Path) -> list[Path]:
    """Every stage's training state, stage 0 first."""
    return sorted(folder.glob("training-*-of-*.safetensors"))


def adapter_key(adapter_id: str, name: str) -> str:
    """Name of an adapter's tensor in a state file; `name` is that in an adapter_model.safetensors."""
    return f"{adapter_id}/weight/{name}"


def flush(path: Path) -> None:
    """Let a file, or the names in a folder, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
