"""``--hyper`` on the command line: what a rule is given is priced, trained with and emitted."""

import json

import pytest
import torch

import memopt
from estimators.models.resolve import resolve
from memopt.train.job import Job


def state(form, spec):
    (column,) = (c for c in form["specs"] if c["spec"] == spec)
    return sum(row["nbytes"] for row in column["rows"] if row["what"] == "state")


@pytest.mark.parametrize(
    ("specs", "texts", "hyper"),
    [
        (["sgd-8bit", "adamw"], ["momentum=0.9"], {"sgd-8bit": {"momentum": 0.9}, "adamw": {}}),
        (["adamw", "adam-4bit"], ["amsgrad=true"], {"adamw": {"amsgrad": True}, "adam-4bit": {"amsgrad": True}}),
        (["rmsprop"], ["momentum=0.9", "centered=true"], {"rmsprop": {"momentum": 0.9, "centered": True}}),
        (
            ["adafactor"],
            ["beta1=0.9", "convention=transformers"],
            {"adafactor": {"beta1": 0.9, "convention": "transformers"}},
        ),
    ],
)
def test_each_rule_is_priced_with_those_it_has(run, specs, texts, hyper):
    code, out, err = run("estimate", "gpt2", "--json", "--optim", *specs, "--hyper", *texts)
    assert (code, err) == (0, "")
    form = json.loads(out)
    shapes = dict(resolve("gpt2").shapes)
    for spec in specs:
        assert state(form, spec) == memopt.price(shapes, spec, device="cuda", **hyper[spec]).nbytes
        assert next(c["hyper"] for c in form["specs"] if c["spec"] == spec) == hyper[spec]


@pytest.mark.parametrize("kind", ["python", "transformers", "accelerate", "deepspeed"])
def test_what_is_emitted_says_them_and_is_read_back(run, tmp_path, kind):
    spec = ["sgd-8bit/zero2", "--world", "2"] if kind == "deepspeed" else ["sgd-8bit"]
    flags = ["--optim", *spec, "--hyper", "momentum=0.9", "nesterov=true", "lr=0.5"]
    _, text, _ = run("estimate", "gpt2", *flags, "--emit", kind)
    assert ('"momentum": 0.9, "nesterov": True' if kind == "transformers" else "momentum=0.9, nesterov=True") in text
    assert text.count("lr") - text.count("lr=0.5") == (1 if kind == "transformers" else 0)  # "lr": 0.5, and once
    file = tmp_path / "emitted"
    file.write_text(text)
    (_, again, err), (_, first, _) = (run("estimate", *a, "--json") for a in (["--from", str(file)], ["gpt2", *flags]))
    assert err == ""
    assert [c["hyper"] for c in json.loads(again)["specs"]] == [{"momentum": 0.9, "nesterov": True, "lr": 0.5}]
    if kind != "deepspeed":  # whose figures are DeepSpeed's
        assert json.loads(again)["specs"] == json.loads(first)["specs"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["adamw", "--hyper", "momentum=0.9"], "--hyper momentum is for sgd, rmsprop, muon, and none of the specs is"),
        (["adamw", "--hyper", "width=3"], "--hyper width is not allowed; no rule has it"),
        (["sgd", "--hyper", "momentum"], "--hyper 'momentum' is not allowed; it is NAME=VALUE, such as momentum=0.9"),
        (["sgd", "--hyper", "momentum=-1"], "momentum=-1 is not allowed"),
    ],
)
@pytest.mark.parametrize("verb", [["estimate", "gpt2"], ["train"], ["lr-find"]], ids=lambda v: v[0])
def test_bad_input(run, verb, flags, sentence):
    code, _, err = run(*verb, "--optim", *flags)
    assert code == 2
    assert sentence in err


def test_a_run_trains_with_them():
    """The run itself is a process of its own, which makes its optimizer of ``parsed``."""
    job = Job(spec="sgd-8bit", lr=0.1, hyper={"momentum": 0.9})
    opt = memopt.create([torch.nn.Parameter(torch.zeros(64, 64))], job.parsed, lr=job.lr)
    assert opt.param_groups[0]["momentum"] == 0.9
