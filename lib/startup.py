"""Imported by the scripts before torch: where other programs run, threads that wait for each other sleep.

Beside a busy core, a thread that spins takes CPU time from the one it waits for, and captioning becomes
several times slower; on an idle machine, threads that sleep are slow to wake. GCC's OpenMP, which torch uses
on Linux, reads the setting once, when torch is loaded; your own is kept.

Garbage collection is off until `lib.cli.run`: during imports it takes a tenth of a script's start-up.
"""

import gc
import os
import time

LOAD = "/proc/loadavg"


def others_running() -> float:
    """Threads of other programs that want a core, on average over 10 ms; 0 where Linux does not tell."""
    running, samples = 0, 10
    for _ in range(samples if os.access(LOAD, os.R_OK) else 0):
        with open(LOAD) as file:
            running += int(file.read().split()[3].split("/")[0]) - 1        # "2/79": two, this one too, of 79
        time.sleep(0.001)
    return running / samples


gc.disable()
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() and others_running() > 0.5:
    os.environ["OMP_WAIT_POLICY"] = "passive"
