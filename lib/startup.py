"""Imported by the scripts before torch: threads that wait for each other soon sleep, and do not spin on.

Where another program has one of the cores, a spinning thread takes the time that its partner needs, and
captioning becomes several times slower; threads that sleep at once are slow to wake on an idle machine.
GCC's OpenMP, which torch uses on Linux, reads the setting once, when torch is loaded; yours stays.

Nor is garbage looked for among what is imported, a tenth of a script's start, until `lib.cli.run`.
"""

import gc
import os

gc.disable()
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "4000"            # some ten microseconds
