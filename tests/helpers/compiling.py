"""A GPU that compiles kernels and does not run them: ``python compiling.py TARGET ["SPEC DTYPE" ...]``, a process of
its own without TRITON_INTERPRET, which Triton looks at when it is imported.

memopt steps parameters in host memory, and all that it launches is compiled for TARGET by what a launch on that device
goes through; only the launch itself does nothing. Prints a line of JSON for each kernel that is compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

import memopt
from memopt.kernels import loader
from memopt.kernels.triton import available

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Rows of whole blocks and others, of vectors and others; a stack of matrices; what stays in 32 bits.
SHAPES = [(64, 512), (20, 770), (5000,), (64,), (2, 64, 96)]


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        """Module, function, registers, spills and, from 3.4 on, threads."""
        return (1, 1, 32, 0, 1024) if hasattr(triton, "knobs") else (1, 1, 32, 0)

    def unload_module(self, module: int) -> None:
        pass


class _Driver:
    utils = _Utils()

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        return lambda *_: None


def told(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout


def spilled(cubin: bytes) -> int:
    """Bytes of a thread's registers that are kept in memory."""
    return int(told(cubin, "-res-usage").split("LOCAL:")[1].split()[0])


def looped(cubin: bytes) -> int:
    """Instructions of the longest loop."""
    jumps = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?BRA\S*\s.*?0x([0-9a-f]+)", told(cubin, "-sass"))
    return max((int(at, 16) - int(to, 16) for at, to in jumps), default=0) // 16 + 1


def describe(kernel: CompiledKernel) -> dict[str, Any]:
    names = kernel.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items()}
    assembly = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    wide = ("global_load_dwordx4", "buffer_load_dwordx4")
    vectors = [
        line
        for line in assembly.splitlines()
        if ("ld.global" in line and ".v4" in line) or any(name in line for name in wide)
    ]
    found = {"kernel": kernel.name, "aligned": constants.get("ALIGN", 1) > 1, "vectors": len(vectors)}
    if "cubin" not in kernel.asm:
        return {**found, "spilled": 0}
    found["spilled"] = spilled(kernel.asm["cubin"])
    if kernel.name == "step_kernel":
        elements = constants["TILE"] * constants["WIDTH"] / (32 * kernel.metadata.num_warps)  # of a thread
        found["instructions"] = looped(kernel.asm["cubin"]) / elements
    return found


def parameters(shapes: list[tuple[int, ...]], dtype: str) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.zeros(shape, dtype=DTYPES[dtype])) for shape in shapes]
    for p in made:
        p.grad = torch.zeros_like(p)
    return made


def step(which: str) -> None:
    """``"SPEC DTYPE"``: two steps, without a plan and with one, then two more of other rates, shapes and numbers of
    tensors. ``"again"`` in what is printed: whether a kernel was compiled for those."""
    spec, dtype = which.split()
    hyper = {"momentum": 0.9} if "sgd" in spec else {"lookahead_steps": 2} if "lookahead" in spec else {}
    for again in (False, True):
        shapes = [*((3 * s[0], *s[1:]) for s in SHAPES), (64,)] if again else SHAPES
        opt = memopt.create(parameters(shapes, dtype), spec, lr=1e-3 if not again else 1.0, **hyper)
        for _ in range(2):
            opt.step()
        assert type(opt.stepper.plan).__module__ == "memopt.kernels.triton.cached_step", opt.explain()
        for found in COMPILED:
            print(json.dumps({"spec": which, "again": again, **found}), flush=True)
        COMPILED.clear()


COMPILED: list[dict[str, Any]] = []
_load = CompiledKernel._init_handles


def _loaded(kernel: CompiledKernel) -> None:
    if kernel.module is None:
        COMPILED.append(describe(kernel))
    _load(kernel)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    CompiledKernel._init_handles = _loaded
    driver.set_active(_Driver(GPUTarget(*json.loads(sys.argv[1]))))
    available.DEVICES = {"cpu"}
    loader._loaded = loader.Missing("a test of the Triton kernels")
    for which in sys.argv[2:]:
        step(which)
