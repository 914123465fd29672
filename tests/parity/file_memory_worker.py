"""A stage worker that shares memory as those on a GPU do: `python -m tests.parity.file_memory_worker FD`."""

from functools import partial

from services.node_agent.engine.torch.worker import load, serve
from tests.unit.engine.file_memory import FileMemories

if __name__ == "__main__":
    serve(partial(load, memories=FileMemories()))
