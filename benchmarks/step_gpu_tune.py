"""What a program of the Triton kernels should be on this card: its warps, and the elements that it takes.

    python benchmarks/step_gpu_tune.py [--numel 400000000]

Times a step in each way and prints its fraction of the bandwidth of a large copy, the best of each row marked. The
numbers chosen are ``WARPS`` and ``PROGRAM`` of ``memopt/kernels/triton/tables.py``. Nothing is written.

Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import step_gpu
import torch

from memopt.kernels.triton import cached_step, tables
from memopt.kernels.triton.launchers import Launchers

SPECS = ("adamw", "adamw-8bit", "adamw-4bit", "adafactor")
WARPS, PROGRAMS = (1, 2, 4, 8), (4096, 8192, 32768)


def fraction(spec: str, dtype: str, numel: int, copied: float) -> float:
    """Of the copy's bytes per second."""
    shapes = step_gpu.llama(numel)
    cached_step._LAUNCHERS = Launchers(2**25)
    found = step_gpu.measure(lambda p: step_gpu.ours(spec, "propagate", p), shapes, step_gpu.DTYPES[dtype], 20, 0.5)
    numel = sum(torch.Size(s).numel() for s in shapes)
    nbytes = step_gpu.moved(spec, shapes, step_gpu.DTYPES[dtype], "propagate") * numel
    return nbytes / (found["ms"] / 1e3) / copied


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=400_000_000, help="parameters, about")
    parser.add_argument("--copied", type=int, default=1 << 28, help="fp32 numbers of the copy that measures bandwidth")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks/step_gpu_tune.py needs a CUDA device", file=sys.stderr)
        return 1
    copied = step_gpu.copy_bandwidth(args.copied)
    ways = list(itertools.product(WARPS, PROGRAMS))
    print(f"{torch.cuda.get_device_name()}, copy {copied / 1e9:.0f} GB/s; warps × elements of a program")
    print(f"{'':18}" + "".join(f"{f'{w} × {n}':>11}" for w, n in ways))
    for spec, dtype in itertools.product(SPECS, step_gpu.DTYPES):
        row = []
        for tables.WARPS, tables.PROGRAM in ways:
            row.append(fraction(spec, dtype, args.numel, copied))
        cells = [f"{'*' if x == max(row) else '':>6}{x:5.0%}" for x in row]
        print(f"{f'{spec} {dtype}':18}" + "".join(cells), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
