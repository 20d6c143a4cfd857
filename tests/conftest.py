"""The project is a flat folder, not a package: put it on the path of every test, on one thread."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"          # real Flickr8k and GPT-2's tables, where they are at hand
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                  # tiny models: a second thread only waits


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
