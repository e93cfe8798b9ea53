"""Save and load: bit-exact, whole or not there, and damage is named."""

import errno
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASE_IDS, CASES, assert_same_bits, odd_model, train

import memopt

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import checkpoint_sweep

from memopt.checkpoint import DamagedFile, folder, manifest
from memopt.checkpoint.tensorfile import TensorFile

#: The full sweeps are run by hand: benchmarks/checkpoint_sweep.py.
KILLS, FLIPS, FULL = 20, 100, 10
MIB = 2**20


@pytest.fixture(autouse=True)
def _an_impatient_disk(monkeypatch):
    """A process that is killed loses nothing that it has written: waiting for the platters shows nothing here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def build(spec, hyper, **keywords):
    model = odd_model()
    return model, memopt.create(model, spec, **hyper, **keywords)


def assert_same_state(a, b):
    for x, y in zip(a.state.values(), b.state.values(), strict=True):
        assert x.keys() == y.keys()
        for key, value in x.items():
            assert_same_bits(value, y[key], key)


def assert_same_model(a, b):
    for name, value in a.state_dict().items():
        assert_same_bits(value, b.state_dict()[name], name)


@pytest.mark.parametrize(("spec", "hyper"), CASES, ids=CASE_IDS)
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
    names = []
    for step in range(4):
        train(model, opt, step, 1)
        names.append(memopt.save(tmp_path, optimizer=opt, keep=2).path.name)
    assert sorted(os.listdir(tmp_path)) == names[2:] == ["00000003-step3", "00000004-step4"]
    assert memopt.load(tmp_path).step == 4
    assert memopt.load(tmp_path / names[2]).step == 3
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


@pytest.mark.parametrize("victim", ["model.safetensors", "state-00000-of-00001.safetensors"])
def test_a_file_that_the_disk_does_not_take_in_the_end_is_named(tmp_path, monkeypatch, victim):
    """Errors of a disk often come with the fsync, when the next file is being written already."""
    model, opt = build("adamw", {})
    opt.init_state()
    memopt.save(tmp_path, model=model, optimizer=opt)

    def broken(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith(victim):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=rf"{victim} could not be written \(Input/output error\)"):
        memopt.save(tmp_path, model=model, optimizer=opt)
    assert os.listdir(tmp_path) == ["00000001-step0"]


def test_what_went_wrong_in_the_background_is_raised_at_the_next_save(tmp_path, monkeypatch):
    _, opt = build("adamw", {})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["memopt.checkpoint.saving"], "write_file", full)
        saving = memopt.save(tmp_path, optimizer=opt, asynchronous=True)
        saving._thread.join()
    with pytest.raises(OSError, match="No space left"):
        memopt.save(tmp_path, optimizer=opt)
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("saved")
    model, opt = build("adamw-8bit", {})
    train(model, opt, 0, 1)
    return memopt.save(path, model=model, optimizer=opt).path, model, opt


def test_flipped_bits_and_lost_bytes_are_named(tmp_path):
    assert sum(checkpoint_sweep.damage_sweep(tmp_path, FLIPS).values()) == FLIPS


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}',
        b'{"a": {"dtype": "F32", "shape": [99999999999], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
    ],
)
def test_headers_that_cannot_be_true_are_refused(header, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(DamagedFile, match=r"x\.safetensors is not a safetensors file"):
        TensorFile(path)


def test_a_manifest_of_another_schema_says_so(saved, tmp_path):
    path, _, _ = saved
    body = json.loads((path / "manifest.json").read_text())
    del body["sha256"]
    (tmp_path / "manifest.json").write_bytes(manifest.dump({**body, "schema": "memopt.checkpoint/9"}))
    with pytest.raises(ValueError, match="this version of memopt reads"):
        memopt.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"model": torch.nn.Linear(2, 2)}, "'vector'"),
        (lambda: {"optimizer": memopt.create(torch.nn.Linear(2, 2), "adamw")}, "has no parameter 'weight'"),
        (lambda: {"optimizer": memopt.create(list(torch.nn.Linear(2, 2).parameters()), "adamw")}, "here there are 2"),
        (lambda: {"scheduler": object()}, "holds no scheduler"),
        (lambda: {"optimizer": memopt.create(odd_model(), "came")}, "came"),
        (lambda: {"model": odd_model(torch.bfloat16)}, "was saved"),
    ],
)
def test_what_does_not_fit_is_said(saved, change, message):
    with pytest.raises(ValueError, match=message):
        memopt.load(saved[0], **change())


def test_other_groups_are_refused_unless_they_are_to_be_kept(saved):
    model = odd_model()
    names = dict(model.named_parameters())
    groups = [{"params": [("vector", names.pop("vector"))], "lr": 0.5}, {"params": list(names.items())}]
    opt = memopt.create(groups, "adamw-8bit")
    with pytest.raises(ValueError, match="param groups differ"):
        memopt.load(saved[0], optimizer=opt)
    memopt.load(saved[0], optimizer=opt, hyper=False)
    assert opt.param_groups[0]["lr"] == 0.5
    assert_same_bits(opt.state[model.vector]["exp_avg.codes"], saved[2].state[saved[1].vector]["exp_avg.codes"])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"extra": {"f": print}}, r"extra\['f'\] is a builtin_function_or_method"),
        ({"keep": 0}, "keep=0 is not allowed"),
    ],
)
def test_what_cannot_be_saved_is_said(keywords, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        memopt.save(tmp_path, **keywords)
    assert os.listdir(tmp_path) == []


def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path):
    assert sum(checkpoint_sweep.kill_sweep(tmp_path, KILLS)["outcomes"].values()) == KILLS


def test_a_full_disk_is_said_and_the_old_checkpoint_stays(tmp_path):
    assert sum(checkpoint_sweep.full_sweep(tmp_path, FULL).values()) == FULL


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 4 MiB, where this process may mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_real_disk_that_is_full_is_said_and_the_old_checkpoint_stays(small_disk):
    model = torch.nn.Linear(256, 256)  # 772 KiB with its state, in two files
    opt = memopt.create(model, "adamw")
    opt.init_state()
    folder, ballast = small_disk / "run", small_disk / "ballast"
    memopt.save(folder, model=model, optimizer=opt, extra={"step": 1}, keep=1)
    room = shutil.disk_usage(small_disk).free
    refused = set()
    for left in range(0, 760 * 1024, 40 * 1024):
        ballast.write_bytes(b"x" * (room - left))
        with pytest.raises(OSError, match="No space left on device") as error:
            memopt.save(folder, model=model, optimizer=opt, extra={"step": 2}, keep=1)
        refused.add(str(error.value).partition(" could not be written")[0].rpartition("/")[2])
        assert memopt.load(folder, model=model, optimizer=opt).extra == {"step": 1}
        assert [p.name for p in folder.iterdir()] == ["00000001-step0"]
    assert {"model.safetensors", "state-00000-of-00001.safetensors"} <= refused
    ballast.unlink()
    memopt.save(folder, model=model, optimizer=opt, extra={"step": 2}, keep=1)
    assert memopt.load(folder, model=model, optimizer=opt).extra == {"step": 2}


def test_a_state_dict_of_another_spec_names_what_converts_it():
    model, opt = build("adamw-8bit", {})
    train(model, opt, 0, 1)
    _, other = build("adamw", {})
    with pytest.raises(ValueError, match=r"saved by 'adamw-8bit', this is 'adamw': .* opt.convert_\('adamw'\), or"):
        other.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match=r"is of an optimizer of memopt's: .* opt.convert_"):
        memopt.load(opt.state_dict(), optimizer=other)
    theirs = torch.optim.SGD(model.parameters(), momentum=0.9)
    theirs.step()
    with pytest.raises(ValueError, match=r"memopt.load\(state_dict, optimizer=...\) reads and converts"):
        other.load_state_dict({**other.state_dict(), "state": theirs.state_dict()["state"], "memopt": {}})


def test_what_a_killed_save_left_is_swept_up(tmp_path):
    (tmp_path / (folder.WRITING + "00000001-step9")).mkdir()
    (tmp_path / (folder.REMOVING + "00000000-step1")).mkdir()
    memopt.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["00000001-step0"]


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


def test_the_command_line_converts_and_inspects(tmp_path, capsys):
    from memopt.cli import main

    model, opt = build("adamw", {})
    train(model, opt, 0, 2)
    memopt.save(tmp_path / "a", model=model, optimizer=opt)
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "adamw-8bit", "--dry-run"]) == 0
    assert not (tmp_path / "b").exists()
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "adamw-8bit"]) == 0
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "c.pt"), "--to", "torch"]) == 0
    assert main(["convert", str(tmp_path / "c.pt"), str(tmp_path / "d"), "--to", "lion"]) == 0
    assert "exp_avg_sq: not kept by the new spec, dropped" in capsys.readouterr().out
    other, converted = build("adamw-8bit", {})
    memopt.load(tmp_path / "b", model=other, optimizer=converted)
    opt.convert_("adamw-8bit")
    assert_same_state(opt, converted)
    assert main(["inspect", str(tmp_path / "b")]) == 0
    assert "exp_avg (8bit): 110,322 elements in 5 tensors" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "memopt.inspect/1"
    opt.state[model.vector]["exp_avg.scales"][0] = float("nan")
    memopt.save(tmp_path / "sick", optimizer=opt)
    assert main(["inspect", str(tmp_path / "sick")]) == 1
    assert "not finite in: vector" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "nothing")]) == 2


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    from memopt.cli.convert import bar

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with bar("converting", 2000) as progress:
        progress(1000)
        progress(1000)
    assert "converting" in sys.stderr.getvalue()
    assert "2.0/2.0 kB" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with bar("converting", 2000) as progress:
        progress(2000)
    assert not sys.stderr.getvalue()
