"""What the scripts alone settle before torch is loaded: how OpenMP's threads wait, and garbage collection."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SETTINGS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
GIVEN = {name: value for name, value in os.environ.items() if name not in SETTINGS}


def settings_when_torch_is_loaded(tmp_path, args, **environment):
    show = f"import os, sys\nsys.exit(str([os.environ.get(name) for name in {SETTINGS}]))"
    (tmp_path / "torch.py").write_text(show)
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    done = subprocess.run([sys.executable, *args], env=GIVEN | {"PYTHONPATH": path} | environment,
                          capture_output=True, text=True)
    return done.stderr.strip()


@pytest.mark.parametrize("script", ["sample", "train", "evaluate", "demo", "bench"])
def test_scripts_let_waiting_threads_sleep_unless_told_otherwise(script, tmp_path):
    args = [str(ROOT / f"{script}.py"), "--help"]
    assert settings_when_torch_is_loaded(tmp_path, args) == "[None, '4000']"
    assert settings_when_torch_is_loaded(tmp_path, args, OMP_WAIT_POLICY="active") == "['active', None]"
    assert settings_when_torch_is_loaded(tmp_path, args, GOMP_SPINCOUNT="7") == "[None, '7']"


def test_importing_the_library_or_a_script_settles_nothing(tmp_path):
    for module in ("model", "sample"):
        assert settings_when_torch_is_loaded(tmp_path, ["-c", f"import {module}"]) == "[None, None]"


def test_garbage_is_collected_again_when_a_script_has_started():
    code = "import gc, lib.startup; held = gc.isenabled(); from lib import cli; "
    code += "cli.run(lambda: held + 2 * gc.isenabled())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 2
