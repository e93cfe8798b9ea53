"""What a conversion needs beyond the state itself: peaks of the resident set."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
#: Temporaries of decoding and encoding a quarter of a million elements (measured: 12 to 18 MiB).
WORKSPACE = 24 * MIB

MEASURE = """
import os, sys, torch, memopt
torch.set_num_threads(1)

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

def peak_of(work):
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM begins anew
    work()
    return status("VmHWM") - before

def in_child(work):
    sys.stdout.flush()
    if os.fork() == 0:
        code = 1
        try:
            work()
            sys.stdout.flush()
            code = 0
        finally:
            os._exit(code)
    assert os.wait()[1] == 0
"""

#: 16 MiB in fp32, of a width that no block divides.
IN_PLACE = (
    MEASURE
    + """
def build(shape, spec, engine):
    model = torch.nn.ParameterList([torch.randn(shape)])
    opt = memopt.create(model, spec, engine=engine)
    opt.init_state()
    for state in opt.state.values():
        for key, tensor in state.items():
            tensor.fill_(3 if tensor.dtype in (torch.int8, torch.uint8) else 0.5)  # every page is there
    return model, opt

def measure(before, engine, after, new_engine):
    build((96, 64), before, engine)[1].convert_(after, engine=new_engine)  # code is loaded
    model, opt = build((999, 4196), before, engine)
    peak = peak_of(lambda: opt.convert_(after, engine=new_engine))
    print(peak, sum(t.nbytes for s in opt.state.values() for t in s.values()))

if "bitsandbytes" in " ".join(sys.argv):
    import bitsandbytes
for line in sys.argv[1:]:
    in_child(lambda: measure(*line.split()))
"""
)

CASES = [
    "adamw native adamw-4bit native",
    "adamw-8bit native adamw-factored native",
    "adamw-factored native adamw-8bit native",
    "adamw-8bit native adamw-8bit bitsandbytes",
    "adamw-8bit bitsandbytes adamw native",
]


def measured(code, *arguments):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the kernel does not record the peak of a stretch of work")
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]


def test_in_place_a_parameter_needs_its_new_state_and_a_small_workspace():
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        cases = [case for case in CASES if "bitsandbytes" not in case]
    else:
        cases = CASES
    found = measured(IN_PLACE, *cases)
    assert len(found) == len(cases)
    for case, (peak, new) in zip(cases, found, strict=True):
        assert peak <= new + WORKSPACE, f"{case}: {peak / MIB:.0f} MiB beside {new / MIB:.0f} MiB of new state"


#: Eight parameters of 8 MiB in fp32: 128 MiB of state.
STREAMED = (
    MEASURE
    + """
import threading, time
from memopt.cli import main

def peak_of(work):  # of what is not a file's: --to torch keeps its tensors in one
    before, peak, going = status("RssAnon"), [0], [True]
    def watch():
        while going[0]:
            peak[0] = max(peak[0], status("RssAnon"))
            time.sleep(0.001)
    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    going[0] = False
    watcher.join()
    return peak[0] - before

model = torch.nn.ModuleList(torch.nn.Linear(2048, 1024, bias=False) for _ in range(8))
opt = memopt.create(model, "adamw")
opt.init_state()
for state in opt.state.values():
    for tensor in state.values():
        tensor.fill_(0.5)
run = sys.argv[1]
memopt.save(run + "/whole", optimizer=opt)
memopt.save(run + "/deepspeed", model=model, optimizer=opt)  # which wants the weights
small = torch.nn.Linear(8, 8)
memopt.save(run + "/small", model=small, optimizer=memopt.create(small, "adamw"))
del model, opt, state, tensor

def convert(source, to, out):
    assert main(["convert", run + "/" + source, run + "/" + out, "--to", to]) == 0

def measure(to, out):
    convert("small", to, "first-" + out)  # code is loaded
    peak = peak_of(lambda: convert(to if to == "deepspeed" else "whole", to, out))
    print("peak", peak)

for i, to in enumerate(sys.argv[2:]):
    in_child(lambda: measure(to, str(i)))
"""
)


def test_a_file_is_converted_a_parameter_at_a_time(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("the kernel does not say what is resident")
    specs = ["adamw-8bit", "adamw-factored", "torch", "flashoptim", "deepspeed"]
    specs += ["torchao-4bit"] * (importlib.util.find_spec("torchao") is not None)
    arguments = [sys.executable, "-c", STREAMED, str(tmp_path), *specs]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak")]
    assert len(peaks) == len(specs)
    for spec, peak in zip(specs, peaks, strict=True):
        parameter = (3 if spec == "deepspeed" else 2) * 8 * MIB  # moments, and weights: read and written
        assert peak <= 2 * parameter + WORKSPACE, f"{spec}: {peak / MIB:.0f} MiB of 128 MiB of state"
