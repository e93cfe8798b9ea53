import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

# Without a GPU Triton's kernels run in its interpreter; that has to be known before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    """The tensors are small: a second thread only waits for a core that another test uses."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def impatient_disk(monkeypatch):
    """A process that is killed loses nothing that it has written: waiting for the platters shows nothing here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def uncompiled(monkeypatch):
    """torchao compiles its step; the plain function computes the same."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.fixture
def run(capsys):
    """The command line: ``run("estimate", "8B")`` is (exit code, what it printed, what it said on stderr)."""
    from memopt.cli import main

    def call(*argv):
        try:
            code = main(list(argv))
        except SystemExit as exit_:  # argparse's own errors
            code = exit_.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def interpreted(monkeypatch):
    """On the CPU these tests mean Triton's interpreter, not the C++ kernels. Larger tiles: it is slow per tile."""
    from memopt.kernels import loader
    from tests.helpers.interpreting import DEVICE

    monkeypatch.setattr(loader, "_loaded", loader.Missing("a test of the Triton kernels"))
    if DEVICE == "cpu":
        from memopt.kernels.triton import tables

        monkeypatch.setattr(tables, "WARPS", 64)
        monkeypatch.setattr(tables, "WIDE", (512, 128))
        monkeypatch.setattr(tables, "NARROW", (64, 128))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
        yield


@pytest.fixture
def on(monkeypatch, interpreted):
    """``on(True)`` turns the Triton kernels on for the device of these tests, ``on(False)`` off."""
    from memopt.kernels.triton import available
    from tests.helpers.interpreting import DEVICE

    return lambda yes: monkeypatch.setattr(available, "DEVICES", {DEVICE} if yes else set())


@pytest.fixture
def device(monkeypatch):
    """Memory of the CPU counts as a device's, whose backward pass takes a second for each gradient."""
    from memopt.placements.transfer import device
    from tests.helpers import simulated
    from tests.helpers.offloading import EVEN

    made = simulated.DeviceTransfer(torch.device("cpu"), clock=simulated.Streams(EVEN))
    monkeypatch.setitem(device.TRANSFERS, "cpu", lambda where: made)
    return made


@pytest.fixture(params=["clock", "threads"])
def either(monkeypatch, request):
    """The same, or a device whose copies are made by threads, as late as they like."""
    from memopt.placements.transfer import device
    from tests.helpers import simulated
    from tests.helpers.offloading import EVEN

    made = (
        simulated.DeviceTransfer(torch.device("cpu"), clock=simulated.Streams(EVEN))
        if request.param == "clock"
        else simulated.ThreadedBus()
    )
    monkeypatch.setitem(device.TRANSFERS, "cpu", lambda where: made)
    return made


@pytest.fixture
def write(tmp_path):
    """Writes a configuration, text or what becomes JSON, and returns its path."""

    def made(content, name="config"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return made
