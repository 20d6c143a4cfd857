"""The linter has nothing to say."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_ruff_finds_nothing():
    pytest.importorskip("ruff", reason="pip install -r requirements-dev.txt")
    command = [sys.executable, "-m", "ruff", "check", "--no-cache"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
