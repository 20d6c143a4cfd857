"""The linter has nothing to say."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_ruff_finds_nothing():
    pytest.importorskip("ruff", reason="pip install -r requirements-dev.txt")
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache"], cwd=root,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
