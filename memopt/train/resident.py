"""Peak resident memory of this process."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_resident() -> int:
    """Bytes. On Linux the kernel's high-water mark of this address space, elsewhere ``ru_maxrss``.

    ``ru_maxrss`` survives ``exec``: on Linux a child begins with the peak of the process that started it, and a small
    run started by a large one would be given the large one's figure.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
