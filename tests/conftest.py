"""The project is a flat folder, not a package: put it on the path of every test, on one thread."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"          # real Flickr8k and GPT-2's tables, where they are at hand
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                  # tiny models: a second thread only waits


def random_captioner(n_positions=64):
    """A tiny model with a tokenizer, random everywhere, so that its cross-attention matters; in eval mode."""
    from gpt2 import GPT2Config
    from model import VisionGPT, VisionGPTConfig
    from resampler import ResamplerConfig
    from tokenizer import Tokenizer
    from vit import ViTConfig
    tokenizer = Tokenizer.train(["a dog runs over the grass.", "two men on a bench"] * 9, 280)
    gpt2 = GPT2Config(tokenizer.vocab_size, n_positions, 4, 2, 32)
    config = VisionGPTConfig(ViTConfig(32, 8, 2, 2, 32, 64), gpt2, ResamplerConfig(8, 2, 2, 8, 16))
    model = VisionGPT(config, tokenizer).eval()
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
