"""``disk``: files, streamed through a bounded number of buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from memopt.ledger import Line
from memopt.placements.base import Home, Placement
from memopt.placements.leases import Buffers, Held, Setting, buffers, extents, target_of

#: Bytes of a lease and the number of its buffers: enough that reading, stepping and writing never wait for each other.
TARGET, MOST = 16 * 2**20, 6


@final
class Disk(Placement):
    """State in preallocated files under ``directory``, read and written a few megabytes at a time while other
    megabytes are stepped. ``workspace`` bounds the host memory this takes.

    With a ``directory`` the state survives the process: every step writes beside the state of the step before and
    then commits, so the files are, whatever happens, the state after one whole step, with checksums
    (:mod:`memopt.placements.files`). That takes the state's size twice on the disk. Without one, the state is in a
    file in the directory for temporary files that has no name, is as large as the state, and ends with the process.
    """

    name = "disk"
    keeps_on_host = True
    summary = "in files, streamed through a bounded number of buffers"

    def location(self, device: str) -> str:
        return "disk"

    def home(self, setting: Setting) -> Home:
        from memopt.placements.files import Files

        return Files(self, setting)

    def workspace(self, held: Sequence[Held], device: str, options: Mapping[str, Any]) -> list[Line]:
        target = target_of(options["workspace"], TARGET, MOST)
        wanted = buffers(extents(held, target), target, options["workspace"], MOST)
        nbytes = sum(line.nbytes for one in held for line in one.layout(one.rows))
        return [
            *buffer_lines(wanted, "pinned" if device.startswith("cuda") else "cpu", device),
            *(spare_line(nbytes) if options["directory"] and nbytes else []),
        ]


def buffer_lines(found: Buffers, host: str | None, device: str) -> list[Line]:
    """The buffers in host memory, and those on the device where there is one."""
    nbytes = found.number * found.nbytes
    places = [*([host] if host else []), *([device] if device != "cpu" else [])] if nbytes else []
    shape = found.number, found.nbytes
    return [Line("", "buffers", "", "uint8", shape, nbytes, place, "workspace") for place in places]


def spare_line(nbytes: int) -> list[Line]:
    """The second copy, into which the next step writes."""
    return [Line("", "spare", "", "uint8", (nbytes,), nbytes, "disk", "workspace")]
