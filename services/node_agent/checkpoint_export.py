"""Writes what a checkpoint holds in the forms that others load. Everything here blocks; call it in a thread."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from services.node_agent.checkpoint_files import INDEX_FILE, adapter_key, state_files, weights_files
from services.node_agent.combine import Replica, write_copy
from services.node_agent.engine.torch.load import read_model
from services.node_agent.engine.torch.lora_config import lora_arguments
from services.node_agent.engine.training_ops import AdapterSpec
from services.node_agent.tensor_file import TensorFile

#: What is copied from the model directory beside its weights.
_EXPORTED_SUFFIXES = (".json", ".txt", ".model", ".jinja")


def export_model(folder: Path, model_path: Path, target: Path) -> None:
    """Write a checkpoint's model as a Hugging Face directory. Raises OSError."""
    shards = weights_files(folder)
    for path in sorted(model_path.iterdir()):
        is_of_weights = path.name == INDEX_FILE or path.suffix == ".safetensors"
        if not (shards and is_of_weights) and (is_of_weights or path.suffix in _EXPORTED_SUFFIXES):
            shutil.copyfile(path, target / path.name)
    if shards:
        _merge(shards, target / "model.safetensors")


def export_adapter(folder: Path, model_path: Path, spec: AdapterSpec, target: Path) -> None:
    """Write an adapter of a checkpoint as a peft directory. Raises OSError."""
    arguments = lora_arguments(spec, read_model(str(model_path)))
    base = {"peft_type": "LORA", "base_model_name_or_path": str(model_path), "inference_mode": True}
    (target / "adapter_config.json").write_text(json.dumps({**base, **arguments}, indent=2), encoding="utf-8")
    _merge(state_files(folder), target / "adapter_model.safetensors", adapter_key(spec.adapter_id, ""))


def _merge(shards: Sequence[Path], target: Path, prefix: str = "") -> None:
    """Write the tensors of several files whose names begin with `prefix`, without it, into one."""
    files: list[TensorFile] = []
    try:
        for shard in shards:
            files.append(TensorFile.open(shard, prefix))
        write_copy(target, Replica(target.name, files))
    finally:
        for file in files:
            file.close()
