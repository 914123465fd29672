"""Speed of the engine and of the runtime around it, against plain PyTorch and transformers."""
