"""``cpu``: state and step in host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from memopt.geometry import Rows
from memopt.ledger import Line, TensorSpec
from memopt.placements.base import Home, Placement
from memopt.placements.disk import buffer_lines
from memopt.placements.leases import Held, Setting, buffers, divisible, extents, target_of
from memopt.placements.options import EARLY

#: Bytes of a lease and the number of its buffers: one comes down, one is stepped, one goes up.
TARGET, MOST = 64 * 2**20, 4
#: Elements of a gradient that have a constant each when its bits are looked at, and elements that are at once.
WIDTH, AT_ONCE = 2**16, 2**20


@final
class Cpu(Placement):
    """State in host memory and the step on the host's processor: the card needs room for neither. Parameters and
    gradients on a card pass through pinned buffers, ``workspace`` at most (written for CUDA, not yet run on a GPU).
    Parameters in host memory are stepped where they are, as with ``device``.

    Gradients are copied to the host in the step. With ``offload_gradients="early"`` as many as the buffers hold are
    copied in ``backward()``, each when it is ready, and the copy is used if nothing has changed the gradient by then;
    whether that is faster has not been measured on a card, so it is not the default. With ``True`` gradients leave the
    card in ``backward()`` and have memory of their own on the host, pinned, as much as they take on the card.

    Source: Ren et al., "ZeRO-Offload", USENIX ATC 2021.
    """

    name = "cpu"
    keeps_on_host = True
    steps_on_host = True
    summary = "in host memory, and the step on the host's processor"

    def location(self, device: str) -> str:
        return "cpu"

    def home(self, setting: Setting) -> Home:
        from memopt.placements.offloaded import Offloaded

        return Offloaded(self, setting)

    def workspace(self, held: Sequence[Held], device: str, options: Mapping[str, Any]) -> list[Line]:
        if device == "cpu":
            return []
        most = most_of(options)
        target = target_of(options["workspace"], TARGET, most)
        kept = options["offload_gradients"] is True
        staged = {id(h): staging(h, kept) for h in held}
        wanted = buffers(extents([staged[id(h)] for h in held], target), target, options["workspace"], most)
        nbytes = sum(TensorSpec(h.dtype, h.rows.local_shape).nbytes for h in held)
        return [*buffer_lines(wanted, "pinned", "cpu"), *(gradient_line(nbytes) if kept else [])]


def most_of(options: Mapping[str, Any]) -> int:
    """The largest number of buffers: what a step needs, or more where gradients come down before it and there is a
    workspace for them."""
    return max(MOST, options["workspace"] // TARGET) if options["offload_gradients"] else MOST


def staging(held: Held, gradient_is_there: bool) -> Held:
    """How a parameter and its gradient, unless that is in host memory, are cut: each with room for 32 bits."""
    what = ("p",) if gradient_is_there else ("p", "g")

    def layout(some: Rows) -> list[Line]:
        tensor = TensorSpec("float32", some.local_shape)
        return [Line("", one, "", tensor.dtype, tensor.shape, tensor.nbytes, "") for one in what]

    return Held(held.rows, layout, held.whole or not divisible(held.rows, held.layout), held.dtype)


def looking(numel: int, options: Mapping[str, Any]) -> int:
    """Bytes of the card that it takes for a moment to look at the bits of a gradient of so many elements."""
    return 16 * min(numel, AT_ONCE) + 8 * min(numel, WIDTH) if options["offload_gradients"] == EARLY else 0


def gradient_line(nbytes: int) -> list[Line]:
    """Gradients in host memory, where they are kept there."""
    return [Line("", "gradients", "", "uint8", (nbytes,), nbytes, "pinned", "workspace")] if nbytes else []
