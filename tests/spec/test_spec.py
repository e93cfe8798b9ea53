"""The grammar, the aliases, the refusals."""

import pickle
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memopt
from memopt.core.hyperparameters import SpecError
from memopt.rules import RULES
from memopt.spec.aliases import ALIASES
from tests.helpers.cases import SPECS


def test_every_spec_round_trips():
    for spec in memopt.specs()[::3]:  # of four partitions each: all of them are met
        text = str(spec)
        assert memopt.parse(text) == spec
        assert str(memopt.parse(text)) == text
        assert pickle.loads(pickle.dumps(spec)) == spec


def test_the_axes_of_a_spec():
    spec = memopt.parse(" AdamW-8bit@paged/zero1 ")
    assert (spec.rule, spec.format, spec.placement, spec.partition) == ("adamw", "8bit", "paged", "zero1")
    assert (spec.master, spec.engine) == ("none", "native")
    assert memopt.parse("adafactor").format == "factored"
    assert str(memopt.parse("adafactor-factored")) == "adafactor"


@pytest.mark.parametrize(("alias", "text"), ALIASES.items())
def test_aliases_mean_a_valid_spec(alias, text):
    assert str(memopt.parse(alias)) == str(memopt.parse(text))
    assert str(memopt.parse(alias + "/zero1")) == str(memopt.parse(text + "/zero1"))


@pytest.mark.parametrize("alias", ["AdamW8bit", "PagedAdamW32bit", "adamw_torch_fused", "adamw_bnb_8bit"])
def test_aliases_are_found_without_regard_to_case(alias):
    assert memopt.parse(alias) == memopt.parse(alias.lower())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("adamx", ["unknown rule 'adamx'", "did you mean 'adam", "allowed: adamw, adam, adafactor"]),
        ("adamw-9bit", ["unknown format '9bit'", "32bit, bf16, 8bit"]),
        ("adamw@moon", ["unknown placement 'moon'", "device, paged"]),
        ("adamw/zero9", ["unknown partition 'zero9'", "none, zero1"]),
        ("adamw+fp16", ["unknown master 'fp16'", "none, fp32, kahan, stochastic, split, split16"]),
        ("lion-factored", ["no moment of lion has a factored form", "nearest: lion, lion-8bit"]),
        ("sgd-factored", ["no moment of sgd has a factored form"]),
        ("", ["cannot read the spec ''", "RULE[-FORMAT[.FORMAT]]"]),
        ("adamw-8bit.", ["cannot read the spec 'adamw-8bit.'"]),
        ("adamw-8bit.4bit.bf16", ["cannot read the spec"]),
        ("adamw-8bit.9bit", ["unknown format '9bit'"]),
        ("adamw-factored.8bit", ["a signed moment has no factored form", "nearest: adamw-8bit"]),
        ("lion-8bit.4bit", ["no two kinds of moments", "only signed ones", "nearest: lion-8bit"]),
        ("lion-8bit.factored", ["no moment of lion has a factored form", "nearest: lion, lion-8bit"]),
        ("adammini-8bit.4bit", ["only signed ones", "nearest: adammini-8bit"]),
        ("adamw--8bit", ["cannot read the spec 'adamw--8bit'"]),
        ("adamw@paged-8bit", ["cannot read the spec"]),
        ("adamw/zero1@paged", ["cannot read the spec"]),
        (8, ["a spec is a string", "int"]),
    ],
)
def test_refusals_name_the_value_and_what_is_allowed(text, words):
    with pytest.raises(SpecError) as error:
        memopt.parse(text)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


LIKE_A_SPEC = r"[a-z]{1,9}(-[a-z0-9]{1,6}(\.[a-z0-9]{1,8})?)?(\+[a-z0-9]{1,7})?(@[a-z]{1,7})?(/[a-z0-9]{1,6})?"


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # a busy machine draws text slowly
@given(st.text(max_size=40) | st.from_regex(LIKE_A_SPEC, fullmatch=True))
def test_any_text_is_a_spec_or_one_sentence(text):
    try:
        spec = memopt.parse(text)
    except SpecError as error:
        sentence = str(error)
    else:
        sentence = "a valid spec"
        assert memopt.parse(str(spec)) == spec
    assert 10 < len(sentence) < 400


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("lookahead(adamw)", "lookahead(adamw)"),
        ("lookahead(adamw-8bit)@paged", "lookahead(adamw)-8bit@paged"),
        ("lookahead(paged_adamw_8bit)/zero1", "lookahead(adamw)-8bit@paged/zero1"),
        ("Lookahead(Adam-mini)", "lookahead(adammini)"),
    ],
)
def test_a_wrapper_around_a_rule(text, spec):
    assert str(memopt.parse(text)) == spec
    assert memopt.parse(spec) == memopt.parse(text)
    inner = memopt.price([(256, 256)], spec.replace("lookahead(", "").replace(")", ""))
    assert memopt.price([(256, 256)], spec).nbytes == inner.nbytes + 4 * 256 * 256


@pytest.mark.parametrize("text", ["lookahead(magic)", "lookahead()", "lookahead(lookahead(adamw))", "ahead(adamw)"])
def test_a_wrapper_that_means_nothing(text):
    with pytest.raises(SpecError, match=r"unknown rule|cannot read the spec"):
        memopt.parse(text)


def test_specs_lists_what_can_be_made_and_nothing_else():
    made = {str(spec) for spec in memopt.specs()}
    assert len(made) == len(memopt.specs())
    assert made >= set(SPECS)
    assert "lion-factored" not in made
    assert {"adamw", "adamw-8bit@paged/zero1", "came", "radam-fp8", "adamw-8bit+split16@paged/zero1"} <= made
    assert {memopt.parse(s).rule for s in made} == {name for name in RULES if not RULES[name].part_of}
    every = memopt.specs(pairs=True)
    assert every[: len(made)] == memopt.specs()
    pairs = {f"{s.rule}-{s.format}" for s in every[len(made) :]}
    assert all("." in pair for pair in pairs)
    assert {"adamw-8bit.factored", "ademamix-4bit.8bit", "came-fp8.factored", "adafactor-4bit.8bit"} <= pairs
    assert not {"lion-8bit.4bit", "adamw-factored.8bit", "adammini-8bit.4bit", "adamw-32bit.factored"} & pairs
    assert {str(s) for s in memopt.specs("bitsandbytes")} == {
        f"{rule}{fmt}{place}"
        for rule in ("adamw", "adam", "lion", "rmsprop", "sgd")
        for fmt in ("", "-8bit")
        for place in ("", "@paged")
    }


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"x": "7bit"}, "unknown format '7bit'"),
        ({"x": "8bit@moon"}, "unknown placement 'moon'"),
        ({"x": ""}, "is not FORMAT"),
        ({"x": 8}, "is not FORMAT"),
    ],
)
def test_overrides_are_checked_when_the_spec_is_made(overrides, words):
    with pytest.raises(SpecError, match=words):
        memopt.parse("adamw", overrides=overrides)


#: A format for each kind of moment -> how it is written.
PAIRS = {
    "adamw-8bit.factored": "adamw-8bit.factored",
    "adamw-4bit.factored@host/zero1": "adamw-4bit.factored@host/zero1",
    "adamw-bf16.8bit+split": "adamw-bf16.8bit+split",
    "lookahead(adamw-8bit.factored)@paged": "lookahead(adamw)-8bit.factored@paged",
    "ademamix-4bit.8bit": "ademamix-4bit.8bit",
    "adamw-8bit.8bit": "adamw-8bit",
    "adamw-32bit.factored": "adamw-factored",
    "adafactor-32bit.factored": "adafactor",
    "came-32bit.factored": "came",
}


@pytest.mark.parametrize(("text", "written"), PAIRS.items())
def test_a_format_for_each_kind_of_moment(text, written):
    spec = memopt.parse(text)
    assert str(spec) == written
    assert memopt.parse(written) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_two_formats_are_resolved_moment_by_moment():
    shapes = {"a": (256, 512), "b": (256,)}
    ledger = memopt.price(shapes, "adamw-8bit.factored", overrides={"b": "bf16.8bit"})
    assert ledger.by("parameter", "moment", "part") == {
        ("a", "step", ""): 4,
        ("a", "exp_avg", "codes"): 256 * 512,
        ("a", "exp_avg", "scales"): 4 * 256 * 2,
        ("a", "exp_avg_sq", "row"): 4 * 256,
        ("a", "exp_avg_sq", "col"): 4 * 512,
        ("b", "step", ""): 4,
        ("b", "exp_avg", ""): 4 * 256,  # fewer than 4096 elements
        ("b", "exp_avg_sq", ""): 4 * 256,
    }


@pytest.mark.parametrize(
    ("spec", "hyper", "words"),
    [
        ("scale-8bit.4bit", {}, "scale has no two kinds"),
        ("rmsprop-8bit.factored", {}, "only non-negative ones; nearest: rmsprop-factored"),
        ("adafactor-8bit.factored", {}, "only non-negative ones; nearest: adafactor"),
        ("adamw", {"overrides": {"0": "8bit.factored"}, "amsgrad": True}, "amsgrad needs the largest value"),
        ("rmsprop-8bit.32bit", {"centered": True, "momentum": 0.9}, "centered=True subtracts"),
    ],
)
def test_two_formats_for_one_kind_are_refused(spec, hyper, words):
    with pytest.raises(SpecError, match=words):
        memopt.price([(64, 64)], spec, **hyper)


def test_the_first_matching_override_wins_and_an_idle_one_is_an_error():
    shapes = {"a.weight": (100, 100), "b.weight": (100, 100)}
    ledger = memopt.price(shapes, "adamw", overrides={"a.*": "8bit", "*.weight": "bf16"})
    assert ledger.by("parameter", "dtype")["b.weight", "bfloat16"] == 40000
    assert ledger.by("parameter", "dtype")["a.weight", "int8"] == 10000
    with pytest.raises(
        SpecError, match=r"'c\.\*' is the first match of no parameter; the names are a.weight, b.weight"
    ):
        memopt.price(shapes, "adamw", overrides={"c.*": "8bit"})
    with pytest.raises(SpecError, match=r"'a\.\*' is the first match of no parameter"):
        memopt.price(shapes, "adamw", overrides={"*": "8bit", "a.*": "bf16"})


@pytest.mark.parametrize(
    "call",
    [
        "import memopt, estimators",
        "import memopt; memopt.price({'w': (4096, 4096)}, 'adamw-8bit'); memopt.specs()",
        "import memopt.cli; memopt.cli.main(['estimate', '8B'])",
    ],
)
def test_torch_is_not_imported(call):
    code = f"import sys; {call}; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_every_axis_names_its_values_as_they_name_themselves():
    from memopt.engines import ENGINES
    from memopt.formats import ALL_FORMATS, FORMATS
    from memopt.masters import MASTERS
    from memopt.partitions import PARTITIONS
    from memopt.placements import PLACEMENTS
    from memopt.rules import RULES

    for axis in (RULES, FORMATS, ALL_FORMATS, MASTERS, PLACEMENTS, PARTITIONS, ENGINES):
        assert {name: value.name for name, value in axis.items()} == {name: name for name in axis}
        assert len(axis) == len(list(axis))
        assert "nothing" not in axis
    assert all(ALL_FORMATS[name] is FORMATS[name] for name in FORMATS)


def test_a_value_is_imported_when_it_is_asked_for():
    code = "import sys; from memopt import parse; parse('adamw'); print('memopt.rules.lamb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_keywords_are_added_to_what_a_spec_says():
    """A spec made with steps=3 has them whatever else is given beside it."""
    import torch

    ahead = memopt.lookahead("adamw@host", steps=3).replace(options={"workspace": "1MiB"})
    opt = memopt.create([torch.nn.Parameter(torch.zeros(4))], ahead, lr=0.25, lookahead_rate=0.75)
    group = opt.param_groups[0]
    assert (group["lookahead_steps"], group["lookahead_rate"], group["lr"]) == (3, 0.75, 0.25)
    assert opt.spec.options["workspace"] == 2**20
    with_momentum = memopt.parse("sgd", hyper={"momentum": 0.9})
    assert memopt.price([(64, 64)], with_momentum, lr=0.1) == memopt.price([(64, 64)], "sgd", momentum=0.9)
    assert memopt.parse(with_momentum, hyper={"momentum": 0.0}).hyper["momentum"] == 0.0
