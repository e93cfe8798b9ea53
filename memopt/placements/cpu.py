"""``cpu``: state and step in host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from memopt.geometry import Rows
from memopt.ledger import Line, TensorSpec
from memopt.placements.base import Home, Placement
from memopt.placements.disk import buffer_lines
from memopt.placements.leases import Held, Layout, Setting, buffers, divisible, extents, target_of

#: Bytes of a lease and the number of its buffers: one comes down, one is stepped, one goes up.
TARGET, MOST = 64 * 2**20, 4


@final
class Cpu(Placement):
    """State in host memory and the step on the host's processor: the card needs room for neither. Parameters and
    gradients on a card pass through pinned buffers, ``workspace`` at most (written for CUDA, not yet run on a GPU).
    Parameters in host memory are stepped where they are, as with ``device``.

    Source: Ren et al., "ZeRO-Offload", USENIX ATC 2021.
    """

    name = "cpu"
    summary = "in host memory, and the step on the host's processor"

    def location(self, device: str) -> str:
        return "cpu"

    def home(self, setting: Setting) -> Home:
        from memopt.placements.offloaded import Offloaded

        return Offloaded(self, setting)

    def workspace(self, held: Sequence[Held], device: str, options: Mapping[str, Any]) -> list[Line]:
        if device == "cpu":
            return []
        target = target_of(options["workspace"], TARGET, MOST)
        pairs = {id(h): Held(h.rows, pair_layout(h.rows), h.whole or not divisible(h.rows, h.layout)) for h in held}
        wanted = buffers(extents([pairs[id(h)] for h in held], target), target, options["workspace"], MOST)
        return buffer_lines(wanted, "pinned", "cpu")


def pair_layout(rows: Rows) -> Layout:
    """A parameter and its gradient as lines, each with room for 32 bits."""

    def layout(some: Rows) -> list[Line]:
        tensor = TensorSpec("float32", some.local_shape)
        return [Line("", what, "", tensor.dtype, tensor.shape, tensor.nbytes, "") for what in ("p", "g")]

    return layout
