"""What ``help()``, editors and type checkers show of the public functions is what they take."""

import inspect
import re

import pytest
from torch import nn

import estimators
import memopt
from memopt import keywords
from memopt.rules import RULES
from memopt.spec import FIELDS
from memopt.spec.placement_options import OPTIONS

#: name -> rule -> default, of every rule, plain and wrapped.
HYPER: dict[str, dict[str, object]] = {}
for _rule in (name for name in RULES if not RULES[name].part_of):
    for _name, _default in RULES[_rule].hyperparameters.items():
        HYPER.setdefault(_name, {})[_rule] = _default
for _wrapper in RULES.wrappers:  # what a wrapper adds to the rule within it
    for _name, _default in RULES[f"{_wrapper}(sgd)"].hyperparameters.items():
        if _name not in RULES["sgd"].hyperparameters:
            HYPER[_name] = {_wrapper: _default}

#: Of :class:`memopt.Optimizer` itself.
OWN = [n for n, p in inspect.signature(memopt.Optimizer).parameters.items() if p.kind is p.KEYWORD_ONLY]


def spelt_out():
    """The keywords of ``memopt.create``, in order."""
    return {n: p for n, p in inspect.signature(memopt.create).parameters.items() if p.kind is p.KEYWORD_ONLY}


def names(typed):
    return set(typed.__annotations__)


def test_no_keyword_is_missing_and_none_is_extra():
    groups = [set(HYPER), set(OPTIONS), set(FIELDS), set(OWN)]
    typed = [names(keywords.Hyperparameters), names(keywords.PlacementOptions)]
    assert typed == groups[:2]
    assert names(keywords.SpecKeywords) == set.union(*groups[:3])
    assert names(keywords.OptimizerKeywords) == set.union(*groups)
    assert set(spelt_out()) == set.union(*groups)


def test_the_same_type_is_written_in_both_places():
    written = {n: str(p.annotation).replace(" | Unset", "") for n, p in spelt_out().items()}
    typed = {n: t.__forward_arg__ for n, t in all_types().items()}
    assert written == typed


def all_types():
    found = {}
    for kind in (keywords.Hyperparameters, keywords.PlacementOptions, keywords.SpecKeywords):
        found |= kind.__annotations__
    return found | keywords.OptimizerKeywords.__annotations__


def test_what_is_not_given_says_what_holds_then():
    shown = str(inspect.signature(memopt.create))
    assert "= <the rule's default>" in shown
    assert "object at 0x" not in shown
    defaults = {n: p.default for n, p in spelt_out().items()}
    assert all(defaults[n] is keywords.RULE_DEFAULT for n in HYPER)
    own = inspect.signature(memopt.Optimizer).parameters
    assert {n: defaults[n] for n in OWN} == {n: own[n].default for n in OWN}


def entry(name):
    """What the docstring of ``memopt.create`` says of a keyword."""
    args = inspect.getdoc(memopt.create).split("Args:\n")[1].split("Returns:")[0]
    return re.search(rf"^    (?:\w+, )*{name}(?:, \w+)*: (.*?)(?=^    \w|\Z)", args, re.M | re.S)[1]


@pytest.mark.parametrize("name", HYPER)
def test_documented_defaults_are_those_of_the_rules(name):
    """``Default X; rule, rule Y; rule Z.``: X is that of every rule that has the name and is not listed."""
    first, *others = re.search(r"Default (.*)\.\s*\Z", entry(name), re.S)[1].replace("\n", " ").split(";")
    documented = dict.fromkeys(HYPER[name], eval(first))
    for text in others:
        rules, value = re.fullmatch(r"\s*((?:[a-z]+,? )+)(.*)", re.sub(r"\s+", " ", text)).groups()
        documented |= dict.fromkeys(re.findall(r"[a-z]+", rules), eval(value))
    assert documented == HYPER[name]


@pytest.mark.parametrize("name", sorted({*FIELDS, *OPTIONS, *OWN}))
def test_every_other_keyword_is_documented(name):
    assert len(entry(name)) > 10


@pytest.mark.parametrize(
    ("spec", "given", "message"),
    [
        ("lion", {"eps": 1e-8}, "lion has no hyperparameter 'eps'; it has lr, betas"),
        ("adamw", {"workspace": "1GiB"}, "workspace='1GiB' is for @host or @cpu or @disk"),
        ("adamw", {"foreach": True}, "adamw has no hyperparameter 'foreach' (memopt chooses its kernel itself"),
        ("adamw", {"learning_rate": 1}, "adamw has no hyperparameter 'learning_rate'"),
        ("adamw-8bit", {"format": "4bit"}, "format='4bit' is given beside 'adamw-8bit', which says format '8bit'"),
        ("adamw", {"rule": "lion"}, "rule='lion' is given beside 'adamw'"),
    ],
)
def test_a_keyword_that_the_spec_has_not_is_one_clear_error(spec, given, message):
    for make in (lambda: memopt.create(nn.Linear(2, 2), spec, **given), lambda: memopt.price([(2, 2)], spec, **given)):
        with pytest.raises(memopt.SpecError) as error:
            make()
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_fields_of_a_spec_can_be_given_by_name():
    opt = memopt.create(nn.Linear(2, 2), "adamw", format="8bit", master="fp32", hyper={"lr": 0.5})
    assert str(opt.spec) == "adamw-8bit+fp32"
    assert opt.param_groups[0]["lr"] == 0.5


def test_an_editor_completes_the_keywords():
    jedi = pytest.importorskip("jedi")
    source = 'import memopt\nmemopt.create(model, "adamw-8bit", '
    found = {c.name.removesuffix("=") for c in jedi.Script(source).complete() if c.name.endswith("=")}
    assert set(spelt_out()) <= found
    shown = jedi.Script(source + "lr=1e-3, betas").complete()
    assert [c.name for c in shown] == ["betas="]


def test_a_type_checker_knows_the_keywords(tmp_path):
    """As users get them: ``py.typed`` says that the package has types."""
    api = pytest.importorskip("mypy.api")
    code = {
        'memopt.create(model, "adamw-8bit", lr=1e-3, betas=(0.9, 0.95), workspace="1GiB", seed=1)': "",
        'memopt.price(model, "adamw", lr=1e-3, overrides={"bias": "32bit"})': "",
        'estimators.estimate("8B", "adamw-8bit", betas=(0.9, 0.95))': "",
        'memopt.create(model, "adamw-8bit", lrr=1e-3)': '"lrr"',
        'memopt.create(model, "adamw-8bit", amsgrad="yes")': '"amsgrad"',
        'memopt.create(model, "adamw-8bit", nonfinite="ignore")': '"nonfinite"',
        'memopt.price(model, "adamw", lrr=1e-3)': '"lrr"',
        'memopt.price(model, "adamw", betas=0.9)': '"betas"',
        'memopt.fit(model, "1GiB", "adamw", offload_gradients="late")': '"offload_gradients"',
        'memopt.balance(model, "adamw", world_size=2, foreach=True)': '"foreach"',
        'estimators.estimate("8B", "adamw-8bit", lrr=1e-3)': '"lrr"',
    }
    first = "import estimators, memopt, torch\nmodel = torch.nn.Linear(2, 2)\n"
    (tmp_path / "script.py").write_text(first + "\n".join(code) + "\n")
    others = "".join(
        f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in ("torch", "numpy", "rich")
    )  # it is quicker
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nfollow_imports = silent\nignore_missing_imports = true\n{others}")
    options = [f"--config-file={tmp_path / 'mypy.ini'}", f"--cache-dir={tmp_path / 'cache'}"]
    out, err, _ = api.run([str(tmp_path / "script.py"), *options])
    assert not err, err
    said = {int(m[1]): m[2] for m in re.finditer(r"script\.py:(\d+): error: (.*)", out)}
    for line, (call, named) in enumerate(code.items(), start=3):
        assert (named in said.get(line, "")) if named else line not in said, (call, out)


PUBLIC = [getattr(package, name) for package in (memopt, estimators) for name in package.__all__]
ROUTINES = [found for found in PUBLIC if inspect.isroutine(found)]


@pytest.mark.parametrize("function", ROUTINES, ids=lambda function: function.__name__)
def test_every_public_function_says_what_it_takes_returns_and_raises(function):
    doc = inspect.getdoc(function)
    signature = inspect.signature(function)
    assert ">>> " in doc, "an example that the suite runs"
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    for parameter in signature.parameters.keys() - {"unknown"}:
        assert re.search(rf"^    (?:\w+, )*{parameter}(?:, \w+)*: \S", doc, re.M), parameter
    assert "\nReturns:\n" in doc or str(signature.return_annotation) == "None"
    assert "\nRaises:\n" in doc or not signature.parameters
