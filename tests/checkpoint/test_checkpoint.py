"""Save and load: bit-exact, and training goes on."""

import random
import subprocess
import sys

import pytest
import torch

import memopt
from tests.helpers.cases import CASE_IDS, CASES, assert_same_bits, odd_model, thinned, train
from tests.helpers.saved import assert_same_model, assert_same_state, build, names

pytestmark = pytest.mark.usefixtures("impatient_disk")

MIB = 2**20


@pytest.mark.parametrize(("spec", "hyper"), thinned(CASES, 3), ids=CASE_IDS)
def test_a_round_trip_is_bit_exact_and_training_goes_on_bit_for_bit(spec, hyper, tmp_path):
    model, opt = build(spec, hyper)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2) if opt.param_groups[0]["lr"] is not None else None
    train(model, opt, 0, 2)
    memopt.save(tmp_path, model=model, optimizer=opt, scheduler=scheduler, extra={"epoch": 3})
    other, twin = build(spec, hyper)
    twin_scheduler = torch.optim.lr_scheduler.StepLR(twin, 2) if scheduler else None
    loaded = memopt.load(tmp_path, model=other, optimizer=twin, scheduler=twin_scheduler)
    assert loaded.extra == {"epoch": 3}
    assert loaded.step == 2
    assert not any(loss.encoded for loss in loaded.conversion.losses.values())
    assert_same_state(opt, twin)
    for m, o in ((model, opt), (other, twin)):
        train(m, o, 2, 2)
    assert_same_model(model, other)
    assert_same_state(opt, twin)


def test_random_numbers_go_on(tmp_path):
    numpy = pytest.importorskip("numpy")
    random.gauss(0, 1)
    numpy.random.randn()
    memopt.save(tmp_path)

    def draw():
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.randn()

    expected = draw()
    draw()
    memopt.load(tmp_path)
    assert draw() == expected


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
        lambda opt: torch.optim.lr_scheduler.MultiStepLR(opt, [1, 2, 2]),
        lambda opt: torch.optim.lr_scheduler.ReduceLROnPlateau(opt),
        lambda opt: torch.optim.lr_scheduler.SequentialLR(
            opt, [torch.optim.lr_scheduler.LinearLR(opt), torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)], [2]
        ),
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, 10),
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    ],
)
def test_schedulers_of_torch_go_on(scheduler, tmp_path):
    rates = []
    for resumed in (False, True):
        model, opt = build("sgd", {"momentum": 0.9, "lr": 0.1})
        schedule = scheduler(opt)
        for step in range(6):
            if step == 3 and resumed:
                memopt.save(tmp_path, optimizer=opt, scheduler=schedule)
                model, opt = build("sgd", {"momentum": 0.9, "lr": 0.1})
                schedule = scheduler(opt)
                memopt.load(tmp_path, optimizer=opt, scheduler=schedule)
            train(model, opt, step, 1)
            schedule.step(*([1.0] if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
            rates.append(opt.param_groups[0]["lr"])
    assert rates[:6] == rates[6:]


@pytest.mark.parametrize("after", ["adamw", "adamw-8bit", "adamw-4bit@paged", "adamw-factored", "lion-8bit"])
@pytest.mark.parametrize("before", ["adamw", "adamw-8bit", "adamw-fp8@paged"])
def test_loading_converts_as_convert_does(before, after, tmp_path):
    model, opt = build(before, {})
    train(model, opt, 0, 2)
    memopt.save(tmp_path, model=model, optimizer=opt)
    _, other = build(after, {})
    report = memopt.load(tmp_path, optimizer=other).conversion
    expected = opt.convert_(after)
    assert report.relative_error == expected.relative_error
    assert_same_state(opt, other)


def test_files_are_safetensors_that_other_tools_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, opt = build("adamw-fp8", {})
    train(model, opt, 0, 1)
    path = memopt.save(tmp_path, model=model, optimizer=opt).path
    state = safetensors.load_file(path / "state-00000-of-00001.safetensors")
    assert_same_bits(state["vector/exp_avg.codes"], opt.state[model.vector]["exp_avg.codes"])
    weights = safetensors.load_file(path / "model.safetensors")
    assert "head.weight" not in weights  # tied: it is there once
    assert_same_bits(weights["embedding.weight"], model.embedding.weight)


def test_the_newest_of_those_kept_is_loaded(tmp_path):
    model, opt = build("adamw", {})
    saved = []
    for step in range(4):
        train(model, opt, step, 1)
        saved.append(memopt.save(tmp_path, optimizer=opt, keep=2).path.name)
    assert names(tmp_path) == saved[2:] == ["00000003-step3", "00000004-step4"]
    assert memopt.load(tmp_path).step == 4
    assert memopt.load(tmp_path / saved[2]).step == 3
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        memopt.load(tmp_path / "other")


def test_saving_in_the_background_keeps_what_was_there_when_it_began(tmp_path):
    model, opt = build("adamw-8bit", {})
    train(model, opt, 0, 1)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    saving = memopt.save(tmp_path, model=model, optimizer=opt, asynchronous=True)
    train(model, opt, 1, 1)
    assert saving.wait() == saving.path
    assert saving.done
    other = odd_model()
    assert memopt.load(tmp_path, model=other).step == 1
    for name, value in other.state_dict().items():
        assert_same_bits(value, expected[name])


def test_saving_and_loading_take_no_memory(tmp_path):
    code = """
import sys, threading, time, psutil, torch, memopt
torch.set_num_threads(1)
model = torch.nn.ModuleList(torch.nn.Linear(2048, 2048, bias=False) for _ in range(8))
opt = memopt.create(model, "adamw")
opt.init_state()
for s in opt.state.values():
    for t in s.values(): t.add_(1)
memopt.save(sys.argv[1] + "/small", model=torch.nn.Linear(4, 4))
memopt.load(sys.argv[1] + "/small", model=torch.nn.Linear(4, 4))
process, peak, going = psutil.Process(), [0], [True]
def watch():
    while going[0]:
        peak[0] = max(peak[0], process.memory_info().rss)
        time.sleep(0.002)
def measured(work):
    before = process.memory_info().rss
    peak[0] = 0
    going[0] = True
    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    going[0] = False
    watcher.join()
    print(peak[0] - before)
measured(lambda: memopt.save(sys.argv[1], model=model, optimizer=opt))
measured(lambda: memopt.load(sys.argv[1], model=model, optimizer=opt))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    save, load = map(int, done.stdout.split())
    assert save < 64 * MIB
    assert load < 64 * MIB
