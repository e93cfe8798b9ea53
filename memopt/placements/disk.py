"""``disk``: files, streamed through a bounded number of buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from memopt.core.ledger import Line
from memopt.layout.chunks import ChunkedState, StoreOptions, buffers, extents, target_of
from memopt.placements.base import Placement, PlacementStore
from memopt.placements.workspaces import DISK_MOST, DISK_TARGET, buffer_lines, spare_line


@final
class Disk(Placement):
    """State in preallocated files under ``directory``, read and written a few megabytes at a time while other
    megabytes are stepped. ``workspace`` bounds the host memory this takes.

    With a ``directory`` the state survives the process: every step writes beside the state of the step before and then
    commits, so the files are, whatever happens, the state after one whole step, with checksums
    (:mod:`memopt.placements.stores.disk`). That takes the state's size twice on the disk. Without one, the state is in
    a file in the directory for temporary files that has no name, is as large as the state, and ends with the process.
    """

    name = "disk"
    keeps_on_host = True
    summary = "in files, streamed through a bounded number of buffers"

    def location(self, device: str) -> str:
        return "disk"

    def placement_store(self, store_options: StoreOptions) -> PlacementStore:
        from memopt.placements.stores.disk import Files

        return Files(self, store_options)

    def workspace(self, chunked: Sequence[ChunkedState], device: str, options: Mapping[str, Any]) -> list[Line]:
        target = target_of(options["workspace"], DISK_TARGET, DISK_MOST)
        wanted = buffers(extents(chunked, target), target, options["workspace"], DISK_MOST)
        nbytes = sum(line.nbytes for one in chunked for line in one.layout(one.rows))
        return [
            *buffer_lines(wanted, "pinned" if device.startswith("cuda") else "cpu", device),
            *(spare_line(nbytes) if options["directory"] and nbytes else []),
        ]
