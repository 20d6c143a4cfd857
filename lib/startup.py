"""Imported by the scripts before torch: threads that wait for each other spin only briefly, then sleep.

Where another program keeps one of the cores busy, a spinning thread takes CPU time from the one it waits for,
and captioning becomes several times slower; threads that sleep at once are slow to wake on an idle machine.
GCC's OpenMP, which torch uses on Linux, reads the setting once, when torch is loaded; your own is kept.

Garbage collection is off until `lib.cli.run`: during imports it takes a tenth of a script's start-up.
"""

import gc
import os

gc.disable()
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "4000"            # some ten microseconds
