"""vLLM in a process of its own: `PYTHON -P vllm_peer.py MODEL THREADS`, with an interpreter that has vLLM.

Reads one JSON object per line from stdin, {"prompts": [[token ids]], "max_tokens": n}, and answers each with the greedy
outputs, {"outputs": [[token ids]]}. The first line it writes is {"version": ...}. Imports nothing of this repository:
its interpreter has none of the packages that need.
"""

import importlib
import json
import os
import sys
from typing import Any


def main() -> None:
    """Serve until stdin ends."""
    # vLLM writes its log to stdout: the answers keep the pipe for themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    model, threads = sys.argv[1], int(sys.argv[2])
    engine, params, version = _load(model, threads)

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    answer({"version": version})
    for line in sys.stdin:
        question = json.loads(line)
        prompts = [{"prompt_token_ids": prompt} for prompt in question["prompts"]]
        results = engine.generate(prompts, params(question["max_tokens"]), use_tqdm=False)
        answer({"outputs": [list(result.outputs[0].token_ids) for result in results]})


def _load(model: str, threads: int) -> tuple[Any, Any, str]:
    """The engine in this process, on as many cores as `threads`."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS=str(threads),
    )
    torch, vllm = (importlib.import_module(name) for name in ("torch", "vllm"))
    torch.set_num_threads(threads)
    engine = vllm.LLM(
        model=model,
        dtype="float32",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_num_seqs=8,
        kv_cache_memory_bytes=256 << 20,
    )

    def params(max_tokens: int) -> Any:
        return vllm.SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)

    return engine, params, vllm.__version__


if __name__ == "__main__":
    main()
