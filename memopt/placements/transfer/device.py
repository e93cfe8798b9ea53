"""Memory of a card, pinned memory of the host and the streams between them: what is asked of a kind of device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from memopt.placements.transfer.pipeline import Streams

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class DeviceTransfer(Protocol):
    """Between the host and one device. Streams: ``up`` and ``down`` copy, ``step`` computes on the device, ``host`` on
    the host, ``read`` and ``write`` are threads for files."""

    def host(self, nbytes: int) -> Tensor:
        """Zeroed host memory, beginning at a page, that the device can copy from and to by itself, uint8 [nbytes]."""

    def device(self, nbytes: int) -> Tensor:
        """Memory of the device, uint8 [nbytes]."""

    def streams(self) -> Streams:
        """For one step: whatever the device was given before is done before them."""

    def gradient_offload(self) -> Streams:
        """A stream ``down`` of its own, for what the device was given before; nobody calls ``synchronize``."""

    def apart(self) -> Streams:
        """A stream ``apart``: a thread beside the caller's, whose operations may use :meth:`streams` themselves. What
        the device is given meanwhile is none of theirs: they wait for the events they are told of."""


def transfer_of(device: torch.device) -> DeviceTransfer | None:
    """None for a device that steps on host memory as it is."""
    make = TRANSFERS.get(device.type)
    if make is None and device.type != "cpu":
        raise RuntimeError(f"state cannot be streamed to device {device} yet; use the placement 'device'")
    return make(device) if make else None


def _cuda(device: torch.device) -> DeviceTransfer:
    from memopt.placements.transfer.cuda import cuda_transfer

    return cuda_transfer(device)


#: Type of a device -> its device transfer. Tests put a simulated one here.
TRANSFERS: dict[str, Callable[[torch.device], DeviceTransfer]] = {"cuda": _cuda}
