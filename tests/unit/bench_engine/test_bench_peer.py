"""vLLM beside the engine: the messages, with a module that stands in for it, and what is said when it fails."""

import sys
from pathlib import Path

import pytest

from bench.engine.peer import PeerFailed, VllmPeer

_STAND_IN = """
import types
__version__ = "9.9"
print("a log line on stdout")

class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos, detokenize):
        assert temperature == 0 and ignore_eos
        self.max_tokens = max_tokens

class LLM:
    def __init__(self, model, **options):
        if model.endswith("broken"):
            raise ValueError("no such model")

    def generate(self, prompts, params, use_tqdm):
        tokens = [[prompt["prompt_token_ids"][-1]] * params.max_tokens for prompt in prompts]
        return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=ids)]) for ids in tokens]
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm.py").write_text(_STAND_IN)
    (tmp_path / "torch.py").write_text("def set_num_threads(threads): pass\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


async def test_it_generates_and_ends(tmp_path: Path) -> None:
    peer = await VllmPeer.start(sys.executable, tmp_path / "model", threads=1)
    try:
        assert peer.version == "9.9"
        for _ in range(2):
            assert await peer.generate([(1, 2), (3,)], 2) == [[2, 2], [3, 3]]
    finally:
        await peer.close()


async def test_one_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(PeerFailed, match="no such model"):
        await VllmPeer.start(sys.executable, tmp_path / "broken", threads=1)
    with pytest.raises(PeerFailed, match="does not run"):
        await VllmPeer.start(str(tmp_path / "nothing"), tmp_path / "model", threads=1)
