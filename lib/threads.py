"""Imported by the scripts before torch: threads that wait sleep, and do not spin.

Where another program has one of the cores, a spinning thread takes the time that its partner needs, and
captioning becomes many times slower. OpenMP reads the setting once, when torch is loaded; yours stays.
"""

import os

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "passive"
