"""CUDA: pinned memory, and copies on side streams. Not yet run on a GPU."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, final

import torch
from torch import Tensor

from memopt.placements.transfer.pipeline import Streams
from memopt.placements.transfer.streams import Threads

#: Threads that read and write files.
WORKERS = {"read": 2, "write": 2}


class _Done:
    """A CUDA event with the methods of a Future."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def result(self) -> None:
        self.event.synchronize()

    def done(self) -> bool:
        return bool(self.event.query())


@final
class CudaStreams:
    """Side streams for ``up`` and ``down``, the current stream for ``step``, this thread for ``host``."""

    def __init__(self, device: torch.device, sides: dict[str, torch.cuda.Stream], threads: Threads) -> None:
        self._device = device
        self._current = torch.cuda.current_stream(device)
        self._streams = {**sides, "step": self._current}
        self._sides = sides
        self._threads = threads
        for side in sides.values():
            side.wait_stream(self._current)

    def submit(self, stream: str, run: Callable[[], None], after: Sequence[Any], nbytes: int) -> Any:
        if stream in WORKERS or stream == "host":
            return self._threads.submit(stream, run, after, nbytes)
        side = self._streams[stream]
        for event in after:
            if isinstance(event, _Done):
                side.wait_event(event.event)
            else:
                event.result()  # a thread's: the stream cannot wait for it
        with torch.cuda.device(self._device), torch.cuda.stream(side):
            run()
            done = torch.cuda.Event()
            done.record(side)
        return _Done(done)

    def synchronize(self) -> None:
        """The state is in host memory, which anyone may read without asking the card: wait until it is there."""
        try:
            self._threads.synchronize()
        finally:
            for side in self._sides.values():
                side.synchronize()
                self._current.wait_stream(side)


@final
class CudaApart:
    """A thread with a current stream of its own, on which nothing is ever queued that those of
    :meth:`CudaTransfer.streams` would wait for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._thread = Threads({"apart": 1})

    def submit(self, stream: str, run: Callable[[], None], after: Sequence[Any], nbytes: int) -> Any:
        def inside() -> None:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                run()

        return self._thread.submit("apart", inside, after, nbytes)

    def synchronize(self) -> None:
        self._thread.synchronize()


@final
class CudaTransfer:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._sides = {"up": torch.cuda.Stream(device), "down": torch.cuda.Stream(device)}
            self._arriving = {"down": torch.cuda.Stream(device)}
        self._threads = Threads(WORKERS)

    def host(self, nbytes: int) -> Tensor:
        """torch's own pinned memory comes in powers of two, up to twice what is asked for; this is to the page."""
        try:
            memory = mmap.mmap(-1, max(nbytes, 1))
        except OSError as error:
            raise _cannot_pin(nbytes, str(error)) from error
        tensor = torch.frombuffer(memory, dtype=torch.uint8, count=max(nbytes, 1))[:nbytes]
        runtime = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            code = runtime.cudaHostRegister(tensor.data_ptr(), max(nbytes, 1), 0)
        if int(code):
            raise _cannot_pin(nbytes, f"CUDA error {int(code)}")
        weakref.finalize(memory, runtime.cudaHostUnregister, tensor.data_ptr()).atexit = False
        return tensor

    def device(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def streams(self) -> Streams:
        return CudaStreams(self._device, self._sides, self._threads)

    def gradient_offload(self) -> Streams:
        return CudaStreams(self._device, self._arriving, self._threads)

    def apart(self) -> Streams:
        return CudaApart(self._device)


def _cannot_pin(nbytes: int, why: str) -> RuntimeError:
    return RuntimeError(
        f"cannot pin {nbytes:,} bytes of host memory ({why}), and nothing was changed; `memopt doctor` "
        "says what limits it. A smaller workspace=, or @cpu without offload_gradients, needs less of "
        "it; @disk and @device need little or none"
    )


@lru_cache
def cuda_transfer(device: torch.device) -> CudaTransfer:
    """One for each device: streams are shared by its optimizers."""
    return CudaTransfer(device)
