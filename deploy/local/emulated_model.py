"""What emulated nodes are given: their settings, and a model directory with the shape of a real model and a tokenizer,
without weights."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from deploy.local.process import ROOT
from deploy.local.tiny_model import write_tokenizer

#: config.json of Llama-2-7B, the model of the profiles in `deploy/profiles`.
LLAMA_2_7B = ROOT / "deploy" / "models" / "llama-2-7b" / "config.json"
#: Id that it is served under, as those profiles have it.
MODEL_NAME = "llama-2-7b"


def emulated_node(profile: Path, time_scale: float) -> dict[str, Any]:
    """Settings of a node agent that takes the time of a profile, `time_scale` times as long."""
    return {"engine": "emulated", "emulated_profile": str(profile.resolve()), "time_scale": time_scale}


def write_emulated_model(path: Path, config_path: Path = LLAMA_2_7B) -> None:
    """Write config.json, tokenizer.json and tokenizer_config.json; an existing directory is replaced.

    Every token id of the model has a text: the bytes, the special tokens, and " t<id>" for what an emulated node makes
    up. Raises ValueError when the configuration has too few tokens for the bytes, OSError.
    """
    config: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        temporary.chmod(0o755)
        write_tokenizer(temporary, int(config["max_position_embeddings"]), vocab_size=int(config["vocab_size"]))
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if path.exists():
            shutil.rmtree(path)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
