"""State of the optimizers that have Muon and another rule in one, the original's, DeepSpeed's, dion's: in, out."""

import pytest
import torch
from torch import nn

import memopt
from memopt.checkpoint import export, source_of


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24), nn.LayerNorm(24))


def filled(net):
    g = torch.Generator().manual_seed(1)
    return [torch.rand(p.shape, generator=g) for p in net.parameters()]


def original(net):
    """A state_dict of MuonWithAuxAdam after three steps."""
    m, *rest = filled(net)
    group = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01, "use_muon": True, "params": [0]}
    other = {
        "lr": 3e-4,
        "betas": (0.8, 0.95),
        "eps": 1e-10,
        "weight_decay": 0.0,
        "use_muon": False,
        "params": [1, 2, 3],
    }
    state = {i + 1: {"exp_avg": x, "exp_avg_sq": x * x, "step": 3} for i, x in enumerate(rest)}
    return {"state": {0: {"momentum_buffer": m}, **state}, "param_groups": [group, other]}


def dion(net, **more):
    m, *rest = filled(net)
    both = {"lr": 0.01, "mu": 0.9, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1, "step": 3, "epsilon": 1e-8}
    both |= {"nesterov": True, "flatten": False, "adjust_lr": "spectral_norm", **more}
    state = {i + 1: {"momentum": x, "variance": x * x} for i, x in enumerate(rest)}
    rows = {"variance_neuron": torch.full((24, 1), 0.5)} if "muon_beta2" in more else {}
    algorithm = "normuon" if rows else "muon"
    return {
        "state": {0: {"momentum": m, **rows}, **state},
        "param_groups": [{**both, "algorithm": algorithm, "params": [0]},
                         {**both, "algorithm": "adamw", "params": [1, 2, 3]}],
    }  # fmt: skip


@pytest.mark.parametrize("format", ["32bit", "8bit"])
def test_the_originals_state_goes_in_and_out(format):
    net = model()
    opt = memopt.create(net, f"muon-{format}")
    memopt.load(original(net), optimizer=opt)
    assert [(g["rule"], g["lr"], g["weight_decay"]) for g in opt.param_groups] == [
        ("muon", 0.02, 0.01),
        ("adamw", 3e-4, 0.0),
    ]
    assert (opt.param_groups[0]["momentum"], opt.param_groups[0]["adjust_lr_fn"]) == (0.9, "original")
    assert (opt.param_groups[1]["betas"], opt.param_groups[1]["eps"]) == ((0.8, 0.95), 1e-10)
    assert [int(opt.state[p]["step"]) for p in net.parameters()] == [1, 3, 3, 3]
    back = export(source_of(opt), "muon")
    assert back["param_groups"] == original(net)["param_groups"]
    for i, x in enumerate(filled(net)):
        key = "momentum_buffer" if i == 0 else "exp_avg"
        torch.testing.assert_close(back["state"][i][key], x, rtol=0, atol=0 if format == "32bit" or i else 0.01)
        if i:
            assert type(back["state"][i]["step"]) is int


def test_deepspeeds_optimizer_loads_what_is_written():
    muon = pytest.importorskip("deepspeed.runtime.zero.muon.original_muon", exc_type=ImportError)
    net = model()
    opt = memopt.create(net, "muon", lr=0.02, adjust_lr_fn="original", rules={"adamw": {"lr": 3e-4}})
    opt.init_state()
    first, *rest = net.parameters()
    theirs = muon.MuonWithAuxAdam([{"params": [first], "use_muon": True}, {"params": rest, "use_muon": False}])
    theirs.load_state_dict(export(source_of(opt), "muon"))
    assert theirs.param_groups[0]["lr"] == 0.02
    assert set(theirs.state[first]) == {"momentum_buffer"}
    assert set(theirs.state[rest[0]]) == {"exp_avg", "exp_avg_sq", "step"}


def test_the_originals_muon_alone_is_known_by_what_it_lacks():
    p = nn.Parameter(torch.ones(24, 40))
    opt = memopt.create([("w", p)], "muon", lr=0.5)
    group = {"lr": 0.02, "weight_decay": 0, "momentum": 0.95, "params": [0]}
    memopt.load({"state": {0: {"momentum_buffer": torch.full((24, 40), 2.0)}}, "param_groups": [group]}, optimizer=opt)
    assert (opt.state[p]["momentum_buffer"] == 2).all()
    assert opt.param_groups[0]["lr"] == 0.02


def test_dions_momentum_is_a_sum():
    net = model()
    opt = memopt.create(net, "muon")
    memopt.load(dion(net), optimizer=opt)
    m, first, *_ = filled(net)
    torch.testing.assert_close(opt.state[net[0].weight]["momentum_buffer"], m * 0.1)
    assert torch.equal(opt.state[net[0].bias]["exp_avg_sq"], first * first)
    assert [int(opt.state[p]["step"]) for p in net.parameters()] == [3, 3, 3, 3]
    assert opt.param_groups[0]["adjust_lr_fn"] == "spectral_norm"
    assert opt.param_groups[1]["betas"] == (0.8, 0.95)
    nor = memopt.create(model(), "muon", beta2=0.9)
    memopt.load(dion(net, muon_beta2=0.9), optimizer=nor)
    assert (nor.state[nor.param_groups[0]["params"][0]]["row_sq"] == 0.5).all()


@pytest.mark.parametrize(
    ("hyper", "words"),
    [
        ({}, "cannot be told adjust_lr_fn='match_rms_adamw'"),
        ({"adjust_lr_fn": "original", "nesterov": False}, "nesterov=False"),
        ({"adjust_lr_fn": "original", "maximize": True}, "neither maximize nor amsgrad"),
    ],
)
def test_what_the_original_does_not_have_is_refused(hyper, words):
    opt = memopt.create(model(), "muon", **hyper)
    opt.init_state()
    with pytest.raises(ValueError, match=words):
        export(source_of(opt), "muon")
    lion = source_of(memopt.create(model(), "muon(lion)", adjust_lr_fn="original"))
    with pytest.raises(ValueError, match=r"has muon and adamw, and this state is of lion"):
        export(lion, "muon")


def test_a_zero_checkpoint_of_deepspeeds_muon(tmp_path):
    """Stage 3 of two ranks: every parameter cut in two, one flat vector for each group."""
    net = model()
    names = [[["0.weight"], ["0.bias", "1.weight", "1.bias"]][i] for i in (0, 1)]
    values = dict(zip((n for group in names for n in group), filled(net), strict=True))
    shapes = [{n: values[n].shape for n in group} for group in names]
    torch.save({"param_shapes": shapes, "module": {}}, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for rank in range(2):
        flats = [torch.cat([values[n].flatten().chunk(2)[rank] for n in group]) for group in names]
        state = {0: {"momentum_buffer": flats[0]}, 1: {"exp_avg": flats[1], "exp_avg_sq": flats[1] ** 2, "step": 3}}
        groups = [{k: v for k, v in group.items() if k != "params"} for group in original(net)["param_groups"]]
        content = {"partition_count": 2, "fp32_flat_groups": flats}
        content |= {"optimizer_state_dict": {"state": state, "param_groups": groups}}
        file = tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": content}, file)
    opt = memopt.create(net, "muon")
    memopt.load(tmp_path, optimizer=opt)
    for name, p in net.named_parameters():
        key = "momentum_buffer" if name == "0.weight" else "exp_avg"
        assert torch.equal(opt.state[p][key], values[name]), name
    assert [(g["rule"], g["lr"]) for g in opt.param_groups] == [("muon", 0.02), ("adamw", 3e-4)]
