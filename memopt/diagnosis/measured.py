"""Memory of a training script by phase, as it runs: loading, forward, backward, step.

On CUDA what torch's allocator says (``max_memory_allocated``, ``max_memory_reserved``) and what the process holds on
the card; on a CPU resident memory, sampled. Phases begin by hooks of torch: every module's forward, every optimizer's
step, and the gradient of what the outermost module returned. Hooks are removed at the end; nothing is patched. On CUDA
the allocator's peaks are reset at each phase, so the script's own readings of them are those of one phase.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

SCHEMA = "memopt.measure/1"
PHASES = ("load", "forward", "backward", "step")
#: Seconds between two looks at resident memory.
INTERVAL = 0.002


class measure:
    """Record the memory of what runs inside.

    Args:
        command: what is written down as the command; by default this process's own.

    Attributes:
        row: the measurement as one JSON object (``docs/estimates.md``), from the end of the block on.

    Raises:
        ImportError: without torch.

    >>> import torch
    >>> model = torch.nn.Linear(8, 8)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with measure() as m:
    ...     model(torch.ones(2, 8)).sum().backward()
    ...     optimizer.step()
    >>> sorted(m.row["phases"]), m.row["steps"]
    (['backward', 'forward', 'load', 'step'], 1)
    """

    def __init__(self, command: str = "") -> None:
        self.command = command or " ".join(sys.argv)
        self.row: dict[str, Any] = {}
        self._phase = "load"
        self._peaks: dict[str, dict[str, int]] = {}
        self._handles: list[Any] = []
        self._outputs: list[Any] = []
        self._depth = self._steps = 0
        self._root: object | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()

    def __enter__(self) -> measure:
        import torch
        from torch.nn.modules import module as modules
        from torch.optim import optimizer as optimizers

        self._cuda = torch.cuda.is_available()
        self._base = _resident()
        self._started = time.time()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        self._handles = [
            modules.register_module_forward_pre_hook(self._before_forward),
            modules.register_module_forward_hook(self._after_forward, always_call=True),
            optimizers.register_optimizer_step_pre_hook(lambda *_: self._enter("step")),
            optimizers.register_optimizer_step_post_hook(lambda *_: self._after_step()),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._look()
        for handle in (*self._handles, *self._outputs):
            handle.remove()
        self._done.set()
        if not self._cuda:
            self._sampler.join()
        self.row = self._row(error)

    # Phases ----------------------------------------------------------------------------------------------------

    def _before_forward(self, module: Any, args: Any) -> None:
        """The outermost module's forward begins a phase; what runs again in the backward pass is of that."""
        if not self._depth and self._phase != "backward" and (self._root is None or module is self._root):
            self._root = module
            self._enter("forward")
        self._depth += 1

    def _after_forward(self, module: Any, args: Any, output: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if module is not self._root or self._depth or self._phase != "forward":
            return
        for handle in self._outputs:
            handle.remove()
        self._outputs = [t.register_hook(self._in_backward) for t in _tensors(output) if t.requires_grad]

    def _in_backward(self, gradient: Any) -> None:
        if self._phase == "forward":
            self._enter("backward")

    def _after_step(self) -> None:
        self._steps += 1
        self._enter("after the step")
        self._root = None

    def _enter(self, phase: str) -> None:
        self._look()
        self._phase = phase
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()

    # Figures ---------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """What the phase had at most, up to now."""
        if self._cuda:
            import torch

            reserved = torch.cuda.max_memory_reserved()
            self._note(allocated=torch.cuda.max_memory_allocated(), reserved=reserved)
        else:
            self._note(process=_resident())

    def _note(self, **figures: int) -> None:
        phase = "step" if self._phase == "after the step" else self._phase
        with self._lock:
            peaks = self._peaks.setdefault(phase, {})
            for name, nbytes in figures.items():
                peaks[name] = max(peaks.get(name, 0), nbytes)

    def _sample(self) -> None:
        while not self._done.wait(INTERVAL):
            self._note(process=_resident())

    def _row(self, error: BaseException | None) -> dict[str, Any]:
        import torch

        context = None
        device, total = platform.processor() or platform.machine(), None
        if self._cuda:
            card = torch.cuda.get_device_properties(torch.cuda.current_device())
            device, total, context = card.name, card.total_memory, context_nbytes()
            for figures in self._peaks.values():
                figures["process"] = figures["reserved"] + (context or 0)
        names = ("allocated", "reserved", "process")
        phases = {
            phase: {n: self._peaks.get(phase, {}).get(n) for n in names} for phase in PHASES if phase in self._peaks
        }
        found = {n: max((v for p in phases.values() if (v := p[n]) is not None), default=None) for n in names}
        return {
            "schema": SCHEMA,
            "command": self.command,
            "device": "cuda" if self._cuda else "cpu",
            "name": device,
            "total_nbytes": total,
            "context_nbytes": context,
            "base_nbytes": None if self._cuda else self._base,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "alloc_conf": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "",
            "steps": self._steps,
            "seconds": round(time.time() - self._started, 3),
            "failed": None if error is None else f"{type(error).__name__}: {error}"[:300],
            "peak": found,
            "phases": phases,
        }


def context_nbytes() -> int | None:
    """Bytes of this process's CUDA context on the current card: what the driver says that the process holds, less what
    torch has reserved. Where the driver does not tell processes apart, all that is in use on the card, which is right
    if no other process is there; None without a card."""
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.init()
    own = _held_by_this_process()
    if own is None:
        free, total = torch.cuda.mem_get_info()
        own = total - free
    return max(0, own - int(torch.cuda.memory_reserved()))


def _held_by_this_process() -> int | None:
    try:
        import pynvml  # type: ignore[import-untyped,import-not-found,unused-ignore]
        import torch

        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        used = {p.pid: p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(card)}
        return used.get(os.getpid())
    except Exception:  # it is only a better source: without it, or with an old one, the card's own figure is taken
        return None


def _resident() -> int:
    """Bytes of resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _tensors(value: Any) -> Iterator[Any]:
    """Tensors in what a module returned: in lists, mappings and objects that are mappings."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict) or hasattr(value, "values"):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
