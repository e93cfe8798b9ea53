"""What a placement is told, on the command line: the figures are those of the optimizer that is told the same."""

import json
from collections import Counter

import pytest
import torch

import memopt
from memopt.placements.transfer import device
from tests.helpers import simulated
from tests.helpers.cases import live_nbytes, odd_model, train
from tests.helpers.offloading import EVEN

TOLD = [
    ("adamw@cpu", ["--workspace", "2MiB"], {"workspace": "2MiB"}),
    ("adamw@cpu", ["--offload-gradients", "true"], {"offload_gradients": True}),
    (
        "adamw@cpu",
        ["--offload-gradients", "true", "--workspace", "1MiB"],
        {"offload_gradients": True, "workspace": "1MiB"},
    ),
    ("adamw-8bit@cpu", ["--offload-gradients", "early"], {"offload_gradients": "early"}),
    ("adamw-8bit@cpu", ["--offload-gradients", "False"], {"offload_gradients": False}),
    ("adamw@host", ["--workspace", "1MiB"], {"workspace": "1MiB"}),
    ("adafactor@disk", ["--workspace", "1MiB"], {"workspace": "1MiB"}),
    ("adamw-8bit@disk", ["--directory", "DIR"], {"directory": "DIR"}),
]


@pytest.fixture
def on_disk(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    tensors = {name: p.detach().contiguous() for name, p in odd_model().named_parameters()}
    save_file(tensors, str(path))
    return str(path)


def by_moment(form, spec):
    (column,) = (c for c in form["specs"] if c["spec"] == spec)
    found = Counter()
    for row in column["rows"]:
        if row["what"] == "state":
            found[row["detail"]] += row["nbytes"]
    return found


@pytest.mark.parametrize(("spec", "flags", "options"), TOLD)
def test_figures_are_the_live_ledger(run, monkeypatch, tmp_path, on_disk, spec, flags, options):
    flags = [text.replace("DIR", str(tmp_path / "d")) for text in flags]
    options = {k: str(tmp_path / "d") if v == "DIR" else v for k, v in options.items()}
    code, out, err = run("estimate", on_disk, "--json", "--optim", "adamw-4bit", spec, *flags)
    assert (code, err) == (0, "")
    form = json.loads(out)
    made = simulated.DeviceTransfer(torch.device("cpu"), clock=simulated.Streams(EVEN))
    monkeypatch.setitem(device.TRANSFERS, "cpu", lambda where: made)
    model = odd_model()
    opt = memopt.create(model, spec, **options)
    train(model, opt, 0, 2)
    found, live = by_moment(form, spec), opt.ledger().by("moment")
    spare = live.get("spare", 0)  # in the file, and no tensor
    assert found.get("spare", 0) == spare
    assert bool(spare) == ("directory" in options)
    assert found.total() - spare == live_nbytes(opt)
    assert {k: n for k, n in found.items() if k != "buffers"} == {k: n for k, n in live.items() if k != "buffers"}
    (told,) = (c["options"] for c in form["specs"] if c["spec"] == spec)
    assert told == dict(opt.spec.options)
    assert form["specs"][0]["options"] == {}  # the other spec has no such option
    opt.close()


def test_the_flags_change_what_is_estimated(run):
    def held(*flags):
        return by_moment(json.loads(run("estimate", "gpt2", "--json", "--optim", "adamw@cpu", *flags)[1]), "adamw@cpu")

    assert held("--workspace", "8MiB")["buffers"] <= 2**23 < held()["buffers"] <= 2**28
    assert held("--workspace", "512MiB") == held()  # four buffers are what the step needs
    early = held("--workspace", "512MiB", "--offload-gradients", "early")
    assert 2**28 < early["buffers"] <= 2**29  # gradients come down into it
    assert "gradients" not in held()
    assert held("--offload-gradients", "true")["gradients"] == 2 * 124_439_808


@pytest.mark.parametrize("kind", ["python", "transformers", "accelerate"])
def test_what_is_emitted_says_it_and_is_read_back(run, tmp_path, on_disk, kind):
    flags = ["--optim", "adamw@cpu", "--workspace", "2MiB", "--offload-gradients", "true"]
    code, out, _ = run("estimate", on_disk, "--emit", kind, *flags)
    assert code == 0
    body = out.split("\n", 1)[1]
    assert (
        '"workspace": 2097152, "offload_gradients": True'
        if kind == "transformers"
        else "workspace=2097152, offload_gradients=True"
    ) in body
    file = tmp_path / "emitted"
    file.write_text(out)
    again = json.loads(run("estimate", on_disk, "--json", "--from", str(file))[1])
    assert again["specs"] == json.loads(run("estimate", on_disk, "--json", *flags)[1])["specs"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--workspace", "1GiB"), ("--workspace is for @host or @cpu or @disk, and none of the specs is",)),
        (("--optim", "adamw@host", "--offload-gradients", "true"), ("--offload-gradients is for @cpu", "none")),
        (("--optim", "adamw@cpu", "--offload-gradients", "never"), ("'never'", "True, False or 'early'")),
        (("--optim", "adamw@cpu", "--workspace", "1KiB"), ("workspace='1KiB'", "at least")),
        (("--optim", "adamw@cpu/zero1", "--offload-gradients", "true"), ("is not for /zero1",)),
        (("--optim", "adamw@cpu/zero2", "--deepspeed", "--workspace", "1GiB"), ("--workspace", "DeepSpeed")),
    ],
)
def test_what_would_be_ignored_is_refused(run, argv, words):
    code, out, err = run("estimate", "8B", *argv)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


def test_fit_takes_them_too():
    shapes = {"a.weight": (512, 512), "b.weight": (512, 512)}
    spec = memopt.fit(shapes, "3MiB", "adamw@cpu", workspace="1MiB", offload_gradients=True)
    assert dict(spec.options) == {"workspace": 2**20, "offload_gradients": True}
    assert memopt.price(shapes, spec).by("lifetime")["persistent"] <= 3 * 2**20
