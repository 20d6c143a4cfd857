"""What the scripts alone settle before torch is loaded: how OpenMP's threads wait, and garbage collection."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SETTINGS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
GIVEN = {name: value for name, value in os.environ.items() if name not in SETTINGS}


def settings_at_torch(tmp_path, args, running=1, **environment):
    """What the environment says once torch is imported where /proc/loadavg counts `running` threads."""
    (tmp_path / "sitecustomize.py").write_text(f"""import builtins, io, os
ours, access = open, os.access
os.access = lambda path, mode: path == "/proc/loadavg" or access(path, mode)
loadavg = "0.00 0.01 0.05 {running}/79 4711"
builtins.open = lambda path, *args, **names: (
    io.StringIO(loadavg) if path == "/proc/loadavg" else ours(path, *args, **names))""")
    show = f"import os, sys\nsys.exit(str([os.environ.get(name) for name in {SETTINGS}]))"
    (tmp_path / "torch.py").write_text(show)
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = subprocess.run([sys.executable, *args], env=GIVEN | {"PYTHONPATH": path} | environment,
                          capture_output=True, text=True)
    return done.stderr.strip()


@pytest.mark.parametrize("script", ["sample", "train", "evaluate", "demo", "bench"])
def test_scripts_let_waiting_threads_sleep_beside_other_programs(script, tmp_path):
    args = [str(ROOT / f"{script}.py"), "--help"]
    assert settings_at_torch(tmp_path, args, running=2) == "['passive', None]"
    assert settings_at_torch(tmp_path, args, running=1) == "[None, None]"


def test_your_own_setting_wins_and_a_count_of_zero_does_no_harm(tmp_path):
    args = [str(ROOT / "sample.py"), "--help"]
    assert settings_at_torch(tmp_path, args, running=0) == "[None, None]"       # as sandboxes say
    assert settings_at_torch(tmp_path, args, running=2, OMP_WAIT_POLICY="active") == "['active', None]"
    assert settings_at_torch(tmp_path, args, running=2, GOMP_SPINCOUNT="7") == "[None, '7']"


def test_importing_the_library_or_a_script_settles_nothing(tmp_path):
    for module in ("model", "sample"):
        assert settings_at_torch(tmp_path, ["-c", f"import {module}"], running=2) == "[None, None]"


def test_garbage_is_collected_again_when_a_script_has_started():
    code = "import gc, lib.startup; held = gc.isenabled(); from lib import cli; "
    code += "cli.run(lambda: held + 2 * gc.isenabled())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 2
