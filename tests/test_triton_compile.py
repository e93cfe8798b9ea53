"""The Triton kernels compiled for GPUs that need not be here: what the interpreter cannot show."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

#: Kernels are functions of (what they are compiled for); made in a process of its own, because the interpreter's
#: decorator is chosen when Triton is imported.
CODE = """
import os, sys, warnings
os.environ.pop("TRITON_INTERPRET", None)
warnings.filterwarnings("ignore")
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from memopt.kernels.triton import codes, elementwise, finite, masters, means, row_means, rules, scalars

POINTERS = {"table": "*i64", "gradients": "*i64", "numels": "*i64", "skipped": "*i64", "hyper": "*fp64",
            "steps": "*fp64", "sums": "*fp64", "map": "*i32", "flags": "*i32", "which": "*i32"}
NUMBERS = {"run": "i32", "last": "i32"}
target = GPUTarget(*eval(sys.argv[1]))

def build(name, kernel, warps=4, **constants):
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in NUMBERS:
            signature[argument] = NUMBERS[argument]
        else:
            signature[argument] = POINTERS.get(argument, "*fp32")
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": False})
    assembly = made.asm.get("ptx") or made.asm["amdgcn"]
    print(name, max(len(made.asm.get("cubin", b"")), 1), len([l for l in assembly.split("\\n") if "ld.global.v4" in l or
          ("ld.global" in l and ".v4." in l) or "global_load_dwordx4" in l or "buffer_load_dwordx4" in l]), flush=True)

NONE = {"MASTER": masters.NONE.value, "K_TYPE": tl.int8}

def step(rule, fmt, p, align=16, whole=True, M=True, V=True, X=False, master="none", rows=row_means.NONE, ahead=False):
    kind = codes.KINDS[fmt]
    width = 128 if fmt == "4bit" else 256
    build(f"step:{rule}-{fmt}-{p}-{align}", elementwise.step_kernel, RULE=rules.STEPS[rule], P_TYPE=p, G_TYPE=p,
          KIND=kind.value, V=V, M=M, X=X, X_SIGNED=rule == "ademamix",
          ROW_MEANS=rows.value, LOOKAHEAD=ahead, WIDTH=width, TILE=1024 // width, ALIGN=align, WHOLE=whole,
          PRECISE=fmt in ("32bit", "bf16"), MASTER=masters.KINDS[master].value,
          K_TYPE=p if master == "kahan" else masters.TYPES[master])

for which in sys.argv[2:]:
    if which == "steps":
        step("adamw", "32bit", tl.float32)
        step("adamw", "8bit", tl.bfloat16)
        step("adamw", "8bit", tl.bfloat16, align=1, whole=False)
        step("adamw", "4bit", tl.bfloat16)
        step("adamw", "fp8", tl.float16)
        step("lion", "bf16", tl.float32, V=False)
        step("adamw", "8bit", tl.bfloat16, master="split")
        step("ademamix", "8bit", tl.bfloat16, X=True)
        step("adammini", "8bit", tl.bfloat16, V=False, rows=row_means.ONE, ahead=True)
    if which == "masters":
        for master in masters.KINDS:
            for p in (tl.bfloat16, tl.float16):
                step("adamw", "8bit", p, master=master)
    if which == "rules":
        for rule in ("adam", "radam", "sgd", "rmsprop", "adafactor", "came", "adabound", "ademamix", "lamb"):
            step(rule, "8bit", tl.float32, V=rule != "sgd", X=rule in ("came", "ademamix"))
            build(f"prepare:{rule}", scalars.prepare_kernel, 1, RULE=scalars.NUMBER[rule].value)
        step("adammini", "32bit", tl.float32, V=False, rows=row_means.SEVERAL)
        for rule, (of, takes_m) in rules.SUMS.items():
            build(f"sums:{rule}", elementwise.sums_kernel, SUM=of, M=takes_m, P_TYPE=tl.bfloat16, G_TYPE=tl.bfloat16,
                  KIND=2, WIDTH=256, TILE=4, ALIGN=16, WHOLE=True, PRECISE=False, **NONE)
            build(f"totals:{rule}", scalars.totals_kernel, RULE=scalars.NUMBER[rule].value, SPAN=256)
        build("row means", row_means.row_means_kernel, KIND=row_means.ONE.value, ROWS=4, G_TYPE=tl.bfloat16, ALIGN=16)
    if which == "means":
        size = {"WIDTH": 512, "TILE": 4, "ALIGN": 16}
        t = tl.bfloat16
        build("mean", means.mean_kernel, SLOT=0, FLOOR=True, SPAN=256)
        build("gather", means.gather_kernel, SLOT=0, WIDTH=512, SPAN=256)
        build("renew", means.renew_kernel, 8, RENEW=rules.RENEWALS["adafactor"], P_TYPE=t, G_TYPE=t, **NONE, **size)
        of, takes_m = rules.SUMS["lamb"]
        build("updates", means.updates_kernel, 8, SUM=of, M=takes_m, P_TYPE=t, G_TYPE=t, INVERSE=False, **NONE, **size)
        build("residual", means.residual_kernel, 8, G_TYPE=t, **size)
        build("apply", means.apply_kernel, 8, RULE=rules.STEPS["came"], P_TYPE=t, G_TYPE=t, M=True, X=True,
              LOOKAHEAD=False, INVERSE=True, RESIDUAL=True, MASTER=masters.SPLIT8.value, K_TYPE=tl.int8, **size)
    if which == "finite":
        build("finite", finite.finite_kernel, G_TYPE=tl.bfloat16, TILE=2048, ALIGN=16)
"""

#: (kernels, target): what is compiled in the ordinary suite, and what takes longer.
H100, A100, MI300 = ("cuda", 90, 32), ("cuda", 80, 32), ("hip", "gfx942", 64)
CASES = [
    pytest.param(H100, ["steps", "means", "finite"], id="H100"),
    pytest.param(H100, ["rules", "masters"], id="H100-rules", marks=pytest.mark.slow),
    pytest.param(A100, ["steps", "rules", "masters", "means", "finite"], id="A100", marks=pytest.mark.slow),
    pytest.param(MI300, ["steps", "rules", "masters", "means", "finite"], id="MI300", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("target", "which"), CASES)
def test_compiles_to_machine_code_with_vector_loads(target, which, tmp_path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CODE, repr(target), *which], capture_output=True, text=True,
                          timeout=600, env=environment)  # fmt: skip
    if "no supported" in done.stderr or "is not a valid" in done.stderr:
        pytest.skip(f"this Triton does not compile for {target}")
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: (int(size), int(vectors)) for name, size, vectors in
             (re.split(r" (?=\d+ \d+$)| (?=\d+$)", line) for line in done.stdout.splitlines())}  # fmt: skip
    assert found
    for name, (size, vectors) in found.items():
        assert size > 0, name
        aligned = name == "finite" or (name.startswith("step:") and not name.endswith("-1"))
        if aligned and target[0] == "cuda":
            assert vectors >= 2, f"{name}: parameters and gradients are not loaded 16 bytes at a time"
