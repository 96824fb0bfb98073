"""The process that holds codecarbon's tracker: reads "start NAME" and "stop NAME", answers with a line of JSON each.

`python -m dyno.measure.codecarbon_child PARENT COUNTRY_ISO [REGION]`
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from dyno.measure.carbon import JOULES_PER_KWH
from dyno.processes import die_with_parent


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    country, region = sys.argv[2], (sys.argv[3] if len(sys.argv) > 3 else "") or None
    replies, sys.stdout = sys.stdout, sys.stderr  # codecarbon prints; only answers go to the parent
    os.chdir("/")  # no configuration file of the user's directory changes the figures

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=replies, flush=True)

    try:
        from codecarbon import OfflineEmissionsTracker
    except ImportError:
        answer(error="codecarbon is not installed")
        return
    tracker = OfflineEmissionsTracker(
        country_iso_code=country, region=region, output_methods=[], log_level="critical", allow_multiple_runs=True
    )
    tracker.start_task("detect")  # looks for the hardware, which takes seconds; no window pays for it
    tracker.stop_task("detect")
    modes = [mode for part in getattr(tracker, "_hardware", []) if (mode := getattr(part, "_mode", None))]
    cpu_mode = modes[0] if modes else "unknown"
    answer(ready=True)
    for line in sys.stdin:
        verb, _, name = line.strip().partition(" ")
        if verb == "start":
            tracker.start_task(name)
            answer(started=name)
            continue
        data = tracker.stop_task(name)
        answer(
            cpu_energy_j=data.cpu_energy * JOULES_PER_KWH,
            ram_energy_j=data.ram_energy * JOULES_PER_KWH,
            gpu_energy_j=data.gpu_energy * JOULES_PER_KWH,
            emissions_g=data.emissions * 1e3,
            duration_s=data.duration,
            country=country,
            region=region,
            cpu_mode=cpu_mode,
            source="rapl" if "rapl" in cpu_mode else "estimate",
        )


if __name__ == "__main__":
    main()
