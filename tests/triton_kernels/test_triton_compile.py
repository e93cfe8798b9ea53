"""The Triton kernels compiled for GPUs that need not be here: what the interpreter cannot show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import memopt
from estimators.memory.state import NO_TRITON
from memopt.masters import MASTERS
from memopt.rules import RULES
from memopt.spec import pairs_of

pytest.importorskip("triton", minversion="3.3")

H100, A100, T4, MI300 = ("cuda", 90, 32), ("cuda", 80, 32), ("cuda", 75, 32), ("hip", "gfx942", 64)
#: Every format, a master with dither, row means and slow weights, factored moments of two rules, sums over a tensor.
SOME = [
    "adamw fp32",
    "adamw-8bit+split bf16",
    "adamw-4bit bf16",
    "adamw-fp8 fp16",
    "lookahead(adammini-bf16) bf16",
    "came+split bf16",
    "lamb-8bit fp32",
    "adamw-8bit.factored bf16",
    "ademamix-4bit.8bit bf16",
]
HAVE_KERNELS = [name for name, rule in RULES.items() if rule.declines is None and name not in NO_TRITON]
ALL = [
    f"{s} {dtype}"
    for s in memopt.specs()
    if (s.placement, s.partition, s.master) == ("device", "none", "none") and s.rule in HAVE_KERNELS
    for dtype in ("fp32", "bf16")
]
KEPT = [
    f"{rule}+{master} {dtype}"
    for rule in ("adamw-8bit", "adafactor", "sgd")
    for master in MASTERS
    for dtype in ("bf16", "fp16")
    if master != "none"
] + [f"{s} bf16" for s in [s for s in pairs_of() if s.rule in HAVE_KERNELS][::5]]
#: An H100 issues 132 × 128 instructions of a thread in a cycle, at 1.755 GHz, while its memory moves 85 % of 3 TB/s: so
#: many for each byte, were all else free.
PER_BYTE = 132 * 128 * 1.755e9 / (0.85 * 3e12)
#: "spec dtype" and the bytes of a step, without the look at the gradients.
MOVED = {"adamw fp32": 28, "adamw-8bit fp32": 16, "adamw-8bit bf16": 10, "adamw-4bit fp32": 14, "adamw-4bit bf16": 8}
#: What reads parameters and gradients; other kernels read gradients, and parameters where a rule asks for it.
READS_BOTH = ("step_kernel", "renew_kernel", "apply_kernel")
CASES = [
    pytest.param(H100, ["adamw-8bit+split bf16", "adafactor bf16"], id="H100"),
    pytest.param(H100, SOME, id="H100-some", marks=pytest.mark.slow),
    pytest.param(H100, [*ALL, *KEPT], id="H100-all", marks=pytest.mark.slow),
    *(
        pytest.param(target, [*SOME, *KEPT], id=name, marks=pytest.mark.slow)
        for name, target in {"A100": A100, "T4": T4, "MI300": MI300}.items()
    ),
]


def compiled(target: tuple[str, int | str, int], specs: list[str], cache: Path) -> list[dict]:
    """What :mod:`compiling` says."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    script = str(Path(__file__).parents[1] / "helpers" / "compiling.py")
    done = subprocess.run(
        [sys.executable, script, json.dumps(target), *specs],
        capture_output=True,
        text=True,
        timeout=1800,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("target", "specs"), CASES)
def test_all_that_is_launched_compiles_once_without_spills_and_with_vector_loads(target, specs, tmp_path) -> None:
    found = compiled(target, specs, tmp_path)
    assert {one["kernel"] for one in found} >= {"prepare_kernel", "step_kernel", "finite_kernel", "apply_kernel"}
    for one in found:
        assert not one["again"], f"compiled again for other rates, shapes or numbers of tensors: {one}"
        assert one["spilled"] == 0, one
        if one["aligned"] and target[0] == "cuda":
            least = 2 if one["kernel"] in READS_BOTH else 1
            assert one["vectors"] >= least, f"parameters and gradients are not loaded 16 bytes at a time: {one}"


@pytest.mark.slow
def test_a_step_does_not_take_more_instructions_than_its_bytes_leave_time_for(tmp_path) -> None:
    steps = [one for one in compiled(H100, list(MOVED), tmp_path) if one["kernel"] == "step_kernel" and one["aligned"]]
    assert {one["spec"] for one in steps} == set(MOVED)
    for one in steps:
        allowed = 0.8 * PER_BYTE * MOVED[one["spec"]]
        assert 10 < one["instructions"] < allowed, (one, allowed)
