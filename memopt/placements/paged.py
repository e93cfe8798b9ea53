"""``paged``: memory that can be paged out under pressure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from memopt.core.ledger import Line
from memopt.layout.chunks import ChunkedState, StoreOptions, buffers, extents, target_of
from memopt.placements.base import Placement, PlacementStore
from memopt.placements.workspaces import DISK_MOST, DISK_TARGET, buffer_lines, window


@final
class Paged(Placement):
    """On a CPU: a file mapped into memory and already unlinked, in the directory for temporary files (``TMPDIR``). The
    operating system writes pages back to it when memory is short and reads them again when a step touches them;
    anonymous memory could only go to swap, which most machines do not have. ``resident`` bounds the state's resident
    memory whether or not memory is short. On CUDA: unified memory from bitsandbytes' allocator, which the driver
    moves to the host when the card is full, and a prefetch of what is stepped next (written for CUDA, not yet run on a
    GPU); there the driver decides, and ``resident`` is refused. The allocator frees at the end of the process alone.

    All parts are paged, scales included, whatever their size (bitsandbytes pages buffers from 1e5 elements on, and
    never its absmax). Where ``TMPDIR`` is a file system in memory nothing can be written back: that is an error, not
    a silent fallback.
    """

    name = "paged"
    summary = "paged out under pressure: unified memory on CUDA, a mapped file on the CPU"

    def location(self, device: str) -> str:
        return f"paged:{device}"

    def placement_store(self, store_options: StoreOptions) -> PlacementStore:
        from memopt.placements.stores.paged import Mapped

        return Mapped(self, store_options)

    def workspace(self, chunked: Sequence[ChunkedState], device: str, options: Mapping[str, Any]) -> list[Line]:
        if options["resident"] is None or device != "cpu":
            return []
        nbytes = window(options["resident"])
        target = target_of(nbytes, DISK_TARGET, DISK_MOST)
        return buffer_lines(buffers(extents(chunked, target), target, nbytes, DISK_MOST), "cpu", device)
