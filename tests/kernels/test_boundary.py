"""Nothing reaches memory that is not its own: parameter, gradient, master and state are held against the layout."""

import copy
import warnings

import pytest
import torch
from torch import nn

import memopt
from memopt.kernels import loader, signature
from memopt.rules import RULES
from tests.helpers.cases import HYPER, thinned

SPECS = ["adamw", "adamw-8bit", "adam-bf16", "lion-4bit", "sgd-fp8", "rmsprop-factored", "came", "adamw-8bit+split"]
ENDINGS = ["", "@paged", "@host", "@cpu", "@disk", "/zero1"]
#: What is done to the parameter ``w`` after two steps; each is refused, with a sentence that names it.
DAMAGES = {
    "parameter grown": lambda opt, p: _data(p, torch.zeros(97, 96)),
    "parameter pruned": lambda opt, p: _data(p, p.data[:48].clone()),
    "parameter pruned in place": lambda opt, p: _data(p, p.data[:48]),
    "parameter turned": lambda opt, p: _data(p, torch.zeros(128, 72)),
    "gradient of the old shape": lambda opt, p: _swap(p, torch.zeros(97, 96)),
    "state of another dtype": lambda opt, p: _replace(opt, p, lambda x: x.to(torch.complex64)),
    "state of another dtype in place": lambda opt, p: _alter(opt, p, lambda x: x.to(torch.complex64)),
    "state too small": lambda opt, p: _replace(opt, p, lambda x: x[:-1].clone()),
    "state too small in place": lambda opt, p: _alter(opt, p, lambda x: x[:-1]),
    "state too large": lambda opt, p: _replace(opt, p, lambda x: torch.cat([x, x])),
    "state elsewhere": lambda opt, p: _replace(opt, p, lambda x: x.to("meta")),
    "half of a code": lambda opt, p: _halve(opt, p),
    "state a number": lambda opt, p: opt.state[p].update({_key(opt, p): 0.0}),
    "step of two": lambda opt, p: opt.state[p].update(step=torch.zeros(2)),
    "step a word": lambda opt, p: opt.state[p].update(step="3"),
}


def _data(p, x):
    p.data = x.to(p.dtype)
    p.grad = torch.zeros_like(p)


def _swap(p, x):
    p.data = x.to(p.dtype)


def _key(opt, p):
    """That of the largest part of its state."""
    return max((k for k in opt.state[p] if k != "step"), key=lambda k: opt.state[p][k].nbytes)


def _replace(opt, p, change):
    key = _key(opt, p)
    opt.state[p][key] = change(opt.state[p][key])


def _halve(opt, p):
    """Codes without scales; of a moment that is kept as it is, a code of it in its place."""
    key = _key(opt, p)
    value = opt.state[p].pop(key)
    if "." not in key:
        opt.state[p][f"{key}.codes"] = value


def _alter(opt, p, change):
    """The same tensor object, with other memory behind it or less of it."""
    x = opt.state[p][_key(opt, p)]
    x.data = change(x.data)


def _made(spec, **options):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if "+" in spec else torch.float32
    model = nn.ParameterDict({"a": torch.randn(70, 96), "w": torch.randn(96, 96), "z": torch.randn(5)}).to(dtype)
    return model, memopt.create(model, spec, **HYPER.get(memopt.parse(spec).rule, {}), **options)


def _steps(model, opt, count):
    for seed in range(count):
        g = torch.Generator().manual_seed(seed)
        for p in model.values():
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        opt.step()


def _snapshot(model, opt):
    return copy.deepcopy(
        [(p.detach(), [t for t in opt.state[p].values() if torch.is_tensor(t)]) for p in model.values()]
    )


def _same(a, b):
    return all(
        torch.equal(p, q) and all(x.is_meta or torch.equal(_bits(x), _bits(y)) for x, y in zip(s, t, strict=True))
        for (p, s), (q, t) in zip(a, b, strict=True)
    )


def _bits(x):
    return x.contiguous().reshape(-1).view(torch.uint8)


def refuse(spec, damage, planned=True, **options):
    model, opt = _made(spec, **options)
    _steps(model, opt, 2)
    if not planned:
        opt.param_groups = [dict(group) for group in opt.param_groups]
    for p in model.values():
        p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's of a storage that is resized
        DAMAGES[damage](opt, model["w"])
    before = _snapshot(model, opt)
    with pytest.raises(RuntimeError, match="nothing was stepped") as refused:
        opt.step()
    assert str(refused.value).startswith("w ") or str(refused.value).startswith("w:")
    assert "\n" not in str(refused.value)
    assert _same(before, _snapshot(model, opt))
    opt.close()


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused(damage):
    for i, spec in enumerate(SPECS):
        refuse(spec + ENDINGS[i % len(ENDINGS)] if "+" not in spec else spec, damage, planned=i % 2 == 0)
        refuse(spec, damage)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused_everywhere(damage, ending, monkeypatch):
    for spec in SPECS:
        for planned in (True, False):
            refuse(str(memopt.parse(spec + ending)), damage, planned)
    monkeypatch.setattr(loader, "_loaded", loader.Missing("turned off"))
    for spec in SPECS:
        refuse(str(memopt.parse(spec + ending)), damage)


@pytest.mark.parametrize("damage", DAMAGES)
def test_on_the_reference_path(damage, monkeypatch):
    monkeypatch.setattr(loader, "_loaded", loader.Missing("turned off"))
    refuse("adamw-8bit", damage)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("ending", ["@host", "@cpu", "@disk"])
def test_where_state_is_streamed(damage, ending, device):
    refuse("adamw-8bit" + ending, damage)


@pytest.mark.parametrize("damage", thinned(DAMAGES, 3))
def test_in_triton(damage, on):
    on(True)
    for spec in ("adamw", "adamw-8bit", "came"):
        refuse(spec, damage)


@pytest.mark.parametrize("damage", DAMAGES)
def test_in_bitsandbytes(damage):
    pytest.importorskip("bitsandbytes")
    refuse("adamw-8bit", damage, engine="bitsandbytes")


@pytest.mark.parametrize("damage", [d for d in DAMAGES if "gradient" not in d])
def test_where_gradients_are_released(damage):
    model, opt = _made("adamw-8bit")
    _steps(model, opt, 2)
    opt.release_gradients(model)
    DAMAGES[damage](opt, model["w"])
    model["w"].grad = None
    before = _snapshot(model, opt)
    with pytest.raises(RuntimeError, match="nothing was stepped"):
        model["w"].sum().backward()
    assert _same(before, _snapshot(model, opt))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_what_fits_goes_on(spec, fast, monkeypatch):
    """Other memory with the same in it, also with gaps, entries of the user's own, steps that are numbers."""
    if not fast:
        monkeypatch.setattr(signature, "_GUARDS", None)
    (model, opt), (twin, same) = _made(spec), _made(spec)
    _steps(model, opt, 2)
    _steps(twin, same, 2)
    changes = [
        lambda: setattr(model["w"], "data", model["w"].data.clone()),
        lambda: _replace(opt, model["w"], torch.clone),
        lambda: _alter(opt, model["w"], torch.clone),
        lambda: _replace(opt, model["w"], lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]]),
        lambda: opt.state[model["w"]].update(mine=5),
        lambda: opt.state[model["w"]].update(mine=6),
        lambda: opt.state[model["w"]].update(step=int(opt.state[model["w"]]["step"])),
        lambda: opt.state.update({model["w"]: dict(opt.state[model["w"]])}),
    ]
    for change in changes:
        change()
        for m, o in ((model, opt), (twin, same)):
            _steps(m, o, 2)
        assert all(torch.equal(a, b) for a, b in zip(model.values(), twin.values(), strict=True))
        assert float(opt.state[model["w"]]["step"]) == float(same.state[twin["w"]]["step"])
    assert opt.state[model["w"]]["mine"] == 6


@pytest.mark.parametrize("ending", ["", "@paged", "@disk", "/zero1"])
def test_a_parameter_is_resolved_once(ending, monkeypatch):
    """In the first step, and never in a later one, with a plan and without."""
    from memopt.layout import param

    counted, real = [], param.resolve_layout
    monkeypatch.setattr(param, "resolve_layout", lambda *a: (counted.append(a[2]), real(*a))[1])
    for planned in (True, False):
        model, opt = _made("adamw-8bit" + ending)
        counted.clear()
        _steps(model, opt, 1)
        assert sorted(counted) == ["a", "w", "z"]
        counted.clear()
        for _ in range(3):
            if not planned:
                opt.param_groups = [dict(group) for group in opt.param_groups]
            _steps(model, opt, 1)
        assert not counted
        opt.close()


class _Watched(dict):
    """Hyperparameters that know which were asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = set()

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)


@pytest.mark.parametrize("name", [*RULES, "lookahead(adamw)"])
def test_moments_depend_on_what_the_rule_says(name):
    """And on nothing else: layouts are kept for as long as that is the same."""
    rule = RULES[name]
    for values in ({}, dict.fromkeys(rule.moments_by, 0.5)):
        h = _Watched({**rule.hyperparameters, **values})
        for shape in ((), (7,), (5000,), (70, 80), (3, 70, 80)):
            rule.moments(h, shape)
        assert h.asked <= {*rule.moments_by, *rule.sizes_by}
