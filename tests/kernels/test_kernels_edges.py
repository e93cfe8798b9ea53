"""What surrounds the loops: threads, processes, memory that is not as one would like it, NaN, turning them off."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

import memopt
from memopt import kernels
from memopt.placements.gradients.checks import non_finite

pytestmark = pytest.mark.skipif(kernels.library() is None, reason=f"no kernels here: {kernels.missing()}")

SPECS = [
    "adamw",
    "adamw-bf16",
    "adamw-8bit",
    "lion-fp8",
    "adam-4bit",
    "adafactor",
    "came",
    "came-8bit",
    "lamb-8bit",
    "stableadamw",
    "stableadamw-factored",
    "adammini",
    "adammini-4bit",
    "ademamix-8bit",
    "lookahead(adamw)-8bit",
]
SHAPES = [(700, 800), (3, 257, 65), (4097,), (7,), (1400, 3)]


def train(spec: str, threads: int = 1, steps: int = 3) -> list[torch.Tensor]:
    """Parameters and state after some steps; the same for the same arguments."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    opt = memopt.create(params, spec)
    opt.init_state()
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape)
        torch.set_num_threads(threads)  # for the step alone: torch's own pool does not survive a fork
        opt.step()
        torch.set_num_threads(1)
    return [p.detach() for p in params] + [t for p in params for t in opt.state[p].values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(
        torch.equal(x.view(torch.uint8) if x.dim() else x, y.view(torch.uint8) if y.dim() else y)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("spec", SPECS)
def test_same_bits_with_any_number_of_threads(spec) -> None:
    one = train(spec, 1)
    assert same(one, train(spec, 2))
    assert same(one, train(spec, 4))


def child(spec: str, queue) -> None:
    queue.put([t.clone().view(torch.uint8).flatten().tolist()[:100] for t in train(spec, 2)[:2]])


@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_can_step() -> None:
    ours = train("adamw-8bit", 2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=("adamw-8bit", queue))
    process.start()
    try:
        theirs = queue.get(timeout=30)
    finally:
        process.join(1)
        process.kill()
    assert theirs == [t.clone().view(torch.uint8).flatten().tolist()[:100] for t in ours[:2]]
    assert same(ours, train("adamw-8bit", 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_place_of_a_gradient_is_looked_at(value, dtype) -> None:
    for n in (1, 31, 255, 1000, 140_000):
        for where in {0, n // 2, n - 1}:
            g = torch.randn(n).to(dtype)
            assert non_finite([("a", g)]) == []
            g[where] = value
            assert non_finite([("fine", torch.randn(9).to(dtype)), ("a", g), ("half", torch.ones(3).half())]) == ["a"]
    assert non_finite([("empty", torch.empty(0)), ("double", torch.ones(2).double() / 0)]) == ["double"]
    assert non_finite([("largest", torch.full((40,), torch.finfo(dtype).max, dtype=dtype))]) == []


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_propagated_values_stay_in_their_block_and_nothing_crashes(spec, value) -> None:
    p = torch.nn.Parameter(torch.randn(40, 512))
    opt = memopt.create([p], spec, nonfinite="propagate")
    for _ in range(2):
        p.grad = torch.randn(40, 512)
        p.grad[3, 7] = value
        opt.step()
    spoiled = ~p.detach().isfinite()
    if spec.startswith(("adafactor", "came", "stableadamw")):
        return  # a clipped update spreads it over the whole tensor, as in the plain path
    assert not spoiled[:3].any()
    assert not spoiled[4:].any()
    assert spec.startswith("adammini") or not spoiled[3, 256:].any()  # a row has one second moment


def test_propagated_nan_reaches_the_parameter() -> None:
    for spec in ("adamw", "adamw-8bit", "adam-4bit", "adamw-fp8"):
        p = torch.nn.Parameter(torch.randn(40, 512))
        opt = memopt.create([p], spec, nonfinite="propagate")
        p.grad = torch.randn(40, 512)
        p.grad[3, 7] = float("nan")
        opt.step()
        assert p[3, 7].isnan()
        assert int(p.isnan().sum()) == 1
        opt.step()
        assert p[3, 7].isnan()


def test_a_plan_notices_what_changes() -> None:
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.randn(20, 300)) for _ in range(2))
    opt = memopt.create([a, b], "adamw-8bit", lr=0.1)

    def step(*params: torch.nn.Parameter) -> None:
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        opt.zero_grad()

    step(a, b)
    step(a, b)
    assert opt.stepper.plan is not None
    frozen = b.detach().clone()
    step(a)  # b has no gradient
    assert torch.equal(b, frozen)
    assert (float(opt.state[a]["step"]), float(opt.state[b]["step"])) == (3, 2)
    step(a, b)
    a.data = torch.zeros(20, 300)  # other memory
    step(a, b)
    assert (a != 0).all()
    opt.param_groups[0]["lr"] = 0.0  # a rate is not part of the plan
    before = a.detach().clone()
    opt.param_groups[0]["weight_decay"] = 0.0
    step(a, b)
    assert torch.equal(a, before)
    opt.load_state_dict(opt.state_dict())
    step(a, b)
    assert float(opt.state[a]["step"]) == 7
    opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], "lr": 1.0})
    new = opt.param_groups[1]["params"][0]
    step(a, b, new)
    assert (new != 0).all()


def test_fp64_and_small_mixtures_take_the_plain_path() -> None:
    params = [torch.nn.Parameter(torch.zeros(5, dtype=torch.float64)), torch.nn.Parameter(torch.zeros(5))]
    opt = memopt.create(params, "adamw")
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
    assert torch.allclose(params[0], params[1].double(), rtol=1e-6)


#: For each spec one step, and the system's high-water mark of resident memory set back just before it. Prints the rises
#: in KiB.
PEAK = """
import sys, torch, memopt

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

specs, shapes = eval(sys.argv[1])
turned = len(sys.argv) > 2
torch.set_num_threads(2)
for spec in specs:
    made = [torch.ones(shape[::-1] if turned else shape) for shape in shapes]
    params = [torch.nn.Parameter(x.permute(*reversed(range(x.dim()))) if turned else x) for x in made]
    for p in params:
        p.grad = torch.ones_like(p)
        assert p.is_contiguous() != turned or p.dim() < 2
    opt = memopt.create(params, spec)
    opt.init_state(); opt.step(); opt.step()
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    opt.step()
    print(status("VmHWM") - before)
"""


#: What is freed goes back to the system at once and is not kept for the next allocation, which would hide it.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def peaks_kib(specs: list[str], shapes: list[tuple[int, ...]], *more: str, **environment: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, repr((specs, shapes)), *more],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **GIVE_BACK, **environment},
    )
    if "clear_refs" in done.stderr:
        pytest.skip("this system does not let a process set back its high-water mark")
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize(
    "shape",
    [
        (1024, 2048),
        (48, 40_000),
        pytest.param((90_000, 48), marks=pytest.mark.slow),
        pytest.param((3, 700, 700), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_no_memory_to_speak_of(shape) -> None:
    """Under 1 MiB per thread, whatever the shape."""
    specs = ["adamw-8bit", "adamw-4bit", "adafactor", "came", "rmsprop-factored", "lamb-8bit", "adammini"]
    assert max(peaks_kib(specs, [shape, (5000,), (64, 64)])) <= 2 * 1024


def test_no_copies_of_what_is_not_contiguous() -> None:
    """Transposed parameters and gradients of 8 MiB are brought together a chunk at a time."""
    specs = ["adamw", "adamw-8bit", "adafactor"]
    assert max(peaks_kib(specs, [(1024, 2048), (3, 70, 90)], "turned")) <= 2 * 1024


@pytest.mark.slow
def test_the_memory_test_can_fail() -> None:
    """The plain path has fp32 copies of whole tensors, and they are seen."""
    assert peaks_kib(["adamw-8bit"], [(1024, 2048)], MEMOPT_KERNELS="off")[0] >= 8 * 1024


def test_they_can_be_turned_off_and_say_so() -> None:
    code = "import memopt.kernels as k; print(k.library(), k.status())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={"MEMOPT_KERNELS": "off", "PATH": ""},
    )
    assert "None the plain torch path" in done.stdout
    assert "MEMOPT_KERNELS" in done.stdout


def test_without_a_compiler_the_reason_names_the_remedy(tmp_path) -> None:
    code = "import memopt.kernels.loader as l; l.INSTALLED = l.INSTALLED / 'no'; print(l.missing())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": str(tmp_path), "MEMOPT_CACHE": str(tmp_path)},
    )
    assert "apt install g++" in done.stdout, done.stderr


def test_a_nan_with_all_bits_set_stays_one_in_16_bits():
    """As CUDA writes it: a random number added to its bits would make -0 of it."""
    p = torch.nn.Parameter(torch.zeros(40))
    p.grad = torch.full((40,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    opt = memopt.create([p], "sgd-bf16", momentum=0.9, nonfinite="propagate")
    opt.step()
    assert opt.state[p]["momentum_buffer"].isnan().all()
