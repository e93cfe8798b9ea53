"""What placements allocate besides the state: how much is brought to the step at once, and the lines of the ledger."""

from collections.abc import Mapping
from typing import Any

from memopt.core.ledger import Line, TensorSpec
from memopt.core.rows import Rows
from memopt.layout.chunks import Buffers, ChunkedState, divisible
from memopt.spec.placement_options import PREFETCH

#: Bytes of a chunk and the number of its buffers: enough that reading, stepping and writing never wait for each other.
DISK_TARGET, DISK_MOST = 16 * 2**20, 6
#: Bytes of a chunk and the number of its buffers: one is filled, one stepped, one emptied; the fourth evens them out.
HOST_TARGET, HOST_MOST = 64 * 2**20, 4
#: Bytes of a chunk and the number of its buffers: one comes down, one is stepped, one goes up.
CPU_TARGET, CPU_MOST = 64 * 2**20, 4
#: Elements of a gradient that have a constant each when its bits are looked at, and elements that are at once.
WIDTH, AT_ONCE = 2**16, 2**20
#: Bytes of state in unified memory that are fetched to the card at once: in bulk, before kernels would fault on them
#: page by page. With no more state than this nothing is asked for, and the whole step is one launch.
AHEAD = 256 * 2**20


def buffer_lines(found: Buffers, host: str | None, device: str) -> list[Line]:
    """The buffers in host memory, and those on the device where there is one."""
    nbytes = found.number * found.nbytes
    places = [*([host] if host else []), *([device] if device != "cpu" else [])] if nbytes else []
    shape = found.number, found.nbytes
    return [Line("", "buffers", "", "uint8", shape, nbytes, place, "workspace") for place in places]


def spare_line(nbytes: int) -> list[Line]:
    """The second copy, into which the next step writes."""
    return [Line("", "spare", "", "uint8", (nbytes,), nbytes, "disk", "workspace")]


def most_of(options: Mapping[str, Any]) -> int:
    """The largest number of buffers: what a step needs, or more where gradients come down before it and there is a
    workspace for them."""
    return max(CPU_MOST, options["workspace"] // CPU_TARGET) if options["offload_gradients"] else CPU_MOST


def staging(chunked: ChunkedState, gradient_is_there: bool) -> ChunkedState:
    """How a parameter and its gradient, unless that is in host memory, are cut: each with room for 32 bits."""
    what = ("p",) if gradient_is_there else ("p", "g")

    def layout(some: Rows) -> list[Line]:
        tensor = TensorSpec("float32", some.local_shape)
        return [Line("", one, "", tensor.dtype, tensor.shape, tensor.nbytes, "") for one in what]

    return ChunkedState(
        chunked.rows, layout, chunked.whole or not divisible(chunked.rows, chunked.layout), chunked.dtype
    )


def looking(numel: int, options: Mapping[str, Any]) -> int:
    """Bytes of the card that it takes for a moment to look at the bits of a gradient of so many elements."""
    return 16 * min(numel, AT_ONCE) + 8 * min(numel, WIDTH) if options["offload_gradients"] == PREFETCH else 0


def gradient_line(nbytes: int) -> list[Line]:
    """Gradients in host memory, where they are kept there."""
    return [Line("", "gradients", "", "uint8", (nbytes,), nbytes, "pinned", "workspace")] if nbytes else []


def window(resident: int) -> int:
    """Of so many bytes that may be resident, those of the buffers through which the rest is streamed."""
    return min(resident, DISK_TARGET * DISK_MOST)
