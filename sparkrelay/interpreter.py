"""Two settings of Python itself that decide how long a round takes when many sessions share a process.

The garbage collector: nothing on the path of a round makes cycles, so counting references frees it all. But the collector
starts by counting what was made: hundreds of sessions make thousands of objects a step, and each time it walks through what is
alive, with everything stopped. With 256 sessions that was a third of a step, and pauses of a hundred milliseconds.

The switch interval: an engine's thread that wants to go on waits for the event loop's thread to let go of the interpreter, and by
default it is asked to after 5 ms: longer than a whole round.
"""

from __future__ import annotations

import gc
import sys

# Containers made and not yet freed before the young ones are looked at (Python's own 700 is less than one step makes), young
# collections before a middle one, middle ones before a full one. What makes cycles here are errors and the ends of streams.
THRESHOLDS = (50_000, 20, 50)
SWITCH_INTERVAL_S = 0.0005


def spare_rounds() -> None:
    """To be called once all is loaded: what is there now stays for the life of the process and is never walked again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
