"""Rules chosen by parameter: who is stepped by what, and one optimizer through every contract of the others."""

import warnings

import pytest
import torch
from torch import nn

import memopt
from memopt.core.hyperparameters import SpecError
from memopt.core.param_kinds import kind_of_name
from memopt.rules import RULES
from tests.helpers.by_parameter import model, train, weights


def rules_of(opt):
    return {name: opt.spec.rule_of(group) for name, _, group in opt.params.entries()}


def test_a_model_is_shared_out_by_shape_module_and_name():
    opt = memopt.create(model(), "muon-8bit")
    assert str(opt.spec) == "muon-8bit(adamw)"
    assert {name for name, rule in rules_of(opt).items() if rule == "muon"} == {"up.weight", "down.weight"}
    said = opt.explain()
    assert "2 parameters: up.weight, down.weight" in said
    assert "an embedding: embed.weight" in said
    assert "an output head: last.weight" in said
    assert "rule='muon'" in memopt.describe(opt)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "an embedding"),
        ("transformer.wte.weight", "an embedding"),
        ("h.0.attn.relative_attention_bias.weight", "an embedding"),
        ("lm_head.weight", "an output head"),
        ("output.weight", "an output head"),
        ("classifier.dense.weight", "an output head"),
        ("embed_out.weight", "an output head"),
        ("model.layers.0.mlp.gate.weight", "a gate"),
        ("block_sparse_moe.router.weight", "a gate"),
        ("model.layers.0.input_layernorm.weight", "a norm"),
        ("encoder.layer.0.output.dense.weight", ""),
        ("model.layers.0.mlp.gate_proj.weight", ""),
        ("model.layers.0.self_attn.q_proj.weight", ""),
        ("layer1.0.conv1.weight", ""),
        ("fc.weight", "an output head"),
        ("blocks.0.mlp.fc1.weight", ""),
    ],
)
def test_names_as_models_have_them(name, kind):
    assert kind_of_name(name) == kind


def test_overrides_name_rules_formats_and_places():
    opt = memopt.create(
        model(),
        "adamw",
        lr=1e-3,
        overrides={"up.*": "lion-8bit", "down.weight": "muon@host", "embed.weight": "8bit", "last.weight": "sgd"},
        rules={"lion": {"lr": 1e-4}, "sgd": {"momentum": 0.9}},
    )
    found = rules_of(opt)
    assert {found[n] for n in ("up.weight", "up.bias")} == {"lion"}
    assert (found["down.weight"], found["last.weight"], found["norm.weight"]) == ("muon", "sgd", "adamw")
    rates = {group["rule"]: group["lr"] for group in opt.param_groups}
    assert rates == {"adamw": 1e-3, "lion": 1e-4, "muon": 1e-3, "sgd": 1e-3}
    train(model(), opt, 0, 0)
    opt.init_state()
    keys = {name: {k for k in opt.state[p] if k != "step"} for name, p, _ in opt.params.entries()}
    assert keys["up.weight"] == {"exp_avg.codes", "exp_avg.scales"}
    assert keys["embed.weight"] >= {"exp_avg.codes", "exp_avg_sq.codes"}
    assert keys["last.weight"] == keys["down.weight"] == {"momentum_buffer"}


def test_each_parameter_is_stepped_as_by_an_optimizer_of_its_rule():
    net, alone = model(), model()
    opt = memopt.create(net, "lion", lr=1e-3, overrides={"embed.*": "adamw-8bit"}, rules={"adamw": {"lr": 3e-3}})
    embed = memopt.create([("embed.weight", alone.embed.weight)], "adamw-8bit", lr=3e-3, weight_decay=0.0)
    others = [(n, p) for n, p in alone.named_parameters() if n != "embed.weight"]
    rest = memopt.create(others, "lion", lr=1e-3)
    for group in opt.param_groups:
        group["weight_decay"] = 0.0
    for group in rest.param_groups:
        group["weight_decay"] = 0.0
    for step in range(3):
        train(net, opt, step, 1)
        for p, q in zip(net.parameters(), alone.parameters(), strict=True):
            q.grad = p.grad.clone()
        embed.step()
        rest.step()
    for (name, p), q in zip(net.named_parameters(), alone.parameters(), strict=True):
        # Of codes the random bits are by the parameter's place among all, which is another one.
        tolerance = 1e-3 if name == "embed.weight" else 0
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance, msg=name)


def test_one_schedule_one_clip_and_frozen_parameters():
    net = model()
    opt = memopt.create(net, "muon", lr=1e-2, rules={"adamw": {"lr": 1e-3}})
    schedule = memopt.schedule(opt, "linear", total_steps=10)
    train(net, opt, 0, 1)
    schedule.step()
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([9e-3, 9e-4])
    norm = memopt.clip_grad_norm_(opt, 1.0)
    assert norm > 1
    total = sum(p.grad.square().sum() for p in net.parameters()).sqrt()
    assert float(total) == pytest.approx(1.0, rel=1e-3)
    before = net.up.weight.detach().clone()
    net.up.weight.requires_grad_(False)
    net.up.weight.grad = None
    for p in net.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    opt.step()
    assert torch.equal(net.up.weight, before)


def test_released_gradients_step_as_the_plain_step():
    nets = [model(), model()]
    tokens = torch.randint(0, 90, (4, 8), generator=torch.Generator().manual_seed(0))
    for net, released in zip(nets, (False, True), strict=True):
        opt = memopt.create(net, "muon", lr=1e-2, ns_dtype="float32")
        if released:
            opt.release_gradients(net)
        for _ in range(2):
            nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
            opt.step()
            opt.zero_grad()
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), rtol=0, atol=1e-5)


def test_a_group_says_its_rule_and_its_own_rate():
    net = model()
    groups = [
        {"params": [("up.weight", net.up.weight)], "rule": "muon", "lr": 0.5},
        {"params": [("down.weight", net.down.weight), ("down.bias", net.down.bias)], "weight_decay": 0.25},
    ]
    opt = memopt.create(groups, "muon", lr=0.1)
    found = [(g["rule"], g["lr"], g["weight_decay"], len(g["params"])) for g in opt.param_groups]
    assert found == [("muon", 0.5, 0.1, 1), ("muon", 0.1, 0.25, 1), ("adamw", 0.1, 0.25, 1)]
    opt.add_param_group({"params": [("norm.weight", net.norm.weight)]})
    assert opt.param_groups[-1]["rule"] == "adamw"
    with pytest.raises(SpecError, match="of the rule 'sgd'"):
        opt.add_param_group({"params": [("norm.bias", net.norm.bias)], "rule": "sgd"})


def test_a_vector_that_is_moved_to_muons_group_is_refused():
    net = model()
    opt = memopt.create(net, "muon", lr=1e-2)
    train(net, opt, 0, 1)
    matrices, others = opt.param_groups
    others["params"] = [p for p in others["params"] if p is not net.up.bias]
    matrices["params"].append(net.up.bias)
    before = weights(net)
    with pytest.raises(SpecError, match=r"shape \(96,\) stands in a group of muon, which steps matrices"):
        train(net, opt, 1, 1)
    assert torch.equal(weights(net), before)


@pytest.mark.parametrize("spec", ["muon-8bit(adamw)", "muon@host", "adamw", "sinkgd-8bit(adamw)"])
def test_a_matrix_moved_to_a_group_of_another_rule_takes_no_moments_along(spec):
    """They go, those of the new rule begin, counting from 0, and what is the user's own stays; and so on the way back.
    (torch.optim knows no rules by group.)"""
    net = model()
    overrides = {"up.weight": "muon"} if spec == "adamw" else {}
    opt = memopt.create(net, spec, lr=1e-2, overrides=overrides)
    train(net, opt, 0, 2)
    name, p = "up.weight", net.up.weight
    groups = {group["rule"]: group for group in opt.param_groups}
    first = next(rule for rule, group in groups.items() if any(q is p for q in group["params"]))
    other = next(rule for rule in groups if rule != first)
    opt.state[p]["note"] = torch.ones(3)
    for step, rule, before in ((2, other, first), (3, first, other)):
        groups[before]["params"] = [q for q in groups[before]["params"] if q is not p]
        groups[rule]["params"] = [*groups[rule]["params"], p]
        train(net, opt, step, 1)
        kept = {line.moment for line in opt.ledger() if line.parameter == name}
        keeps = {m.name for m in RULES[rule].moments(RULES[rule].hyperparameters, tuple(p.shape))}
        assert kept == keeps | {"step", "note"}
        assert opt.state[p]["step"] == 1
        assert opt.state_dict()


def test_parameters_without_a_shape():
    """A rule is chosen by shape; what says its rule is held against it when it has one."""
    net = nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(64))
    with pytest.raises(SpecError, match=r"parameter 1\.weight is of a lazy module and has no shape yet"):
        memopt.create(net, "muon")
    opt = memopt.create([("first", net[0].weight)], "muon", lr=1e-2)
    opt.param_groups[0]["params"] += [net[1].weight]
    net[0].weight.grad = torch.ones(64, 64)
    opt.step()
    net(torch.ones(2, 64)).sum().backward()
    opt.step()
    assert "momentum_buffer" in opt.state[net[1].weight]
    opt.param_groups[0]["params"] += [nn.UninitializedParameter()]
    opt.step()
    opt.param_groups[0]["params"][-1].materialize((64,))
    opt.param_groups[0]["params"][-1].grad = torch.ones(64)
    before = net[0].weight.clone()
    with pytest.raises(SpecError, match=r"shape \(64,\) stands in a group of muon, which steps matrices"):
        opt.step()
    assert torch.equal(net[0].weight, before)


def of(*shapes):
    return [(f"w{i}", nn.Parameter(torch.zeros(shape))) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: memopt.create(nn.LayerNorm(8), "muon"), "no parameter is a hidden matrix.*use 'adamw'"),
        (lambda: memopt.create(of((4, 4), (4,)), "muon", overrides={"w1": "muon"}), "w1 of shape .4,. is a vector"),
        (lambda: memopt.create(of((4, 4)), "muon", rules={"lion": {}}), "this spec has adamw"),
        (lambda: memopt.create(of((4, 4)), "muon", rules={"adamw": {"momentum": 1}}), "adamw has no hyperparameter"),
        (lambda: memopt.parse("adamw(lion)"), "adamw takes every parameter"),
        (lambda: memopt.parse("muon(muon)"), "does not take every parameter"),
        (lambda: memopt.parse("muon(adamw-9bit)"), "unknown format '9bit'"),
        (lambda: memopt.parse("lookahead(muon)"), "does not take every parameter"),
        (lambda: memopt.parse("adamw", overrides={"*": "lion-factored"}), "no moment of lion has a factored form"),
        (lambda: memopt.parse("muon", engine="bitsandbytes"), "bitsandbytes"),
        (lambda: memopt.create(of((4, 4)), "muon", capturable=True), "parameters of one rule"),
        (
            lambda: memopt.create([{"params": of((4, 4), (4,)), "lr": 1.0}], "muon", rules={"adamw": {"lr": 2.0}}),
            "a rate of its own",
        ),
    ],
)
def test_what_means_nothing_is_one_sentence(make, words):
    with pytest.raises(SpecError, match=words):
        make()


def test_what_may_be_a_mistake_is_said():
    net = model()
    with pytest.warns(UserWarning, match=r"embed\.weight is an embedding"):
        memopt.create(net, "muon", overrides={"embed.weight": "muon"})
    with pytest.warns(UserWarning, match="have no names"):
        memopt.create([p for p in net.parameters() if p.dim() == 2], "muon")
    with pytest.warns(UserWarning, match=r"w0 of shape \(9000, 8\) may be an embedding"):
        memopt.create(of((9000, 8)), "muon")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memopt.create(net, "muon")


LLAMA = {
    "embed_tokens.weight": (128256, 4096),
    **{
        f"layers.{i}.{name}.weight": shape
        for i in range(32)
        for name, shape in {
            "self_attn.q_proj": (4096, 4096),
            "self_attn.k_proj": (1024, 4096),
            "self_attn.v_proj": (1024, 4096),
            "self_attn.o_proj": (4096, 4096),
            "mlp.gate_proj": (14336, 4096),
            "mlp.up_proj": (14336, 4096),
            "mlp.down_proj": (4096, 14336),
            "input_layernorm": (4096,),
            "post_attention_layernorm": (4096,),
        }.items()
    },
    "norm.weight": (4096,),
    "lm_head.weight": (128256, 4096),
}


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        ("muon-8bit", 1.2),
        ("muon-4bit", 0.7),
        ("muon-8bit(adafactor-factored)", 0.9),
        ("sinkgd-8bit", 0.3),
        ("apollo-8bit", 0.75),
    ],
)
def test_bytes_on_llama_3_1_8b(spec, most):
    numel = sum(torch.Size(shape).numel() for shape in LLAMA.values())
    assert numel == 8_030_261_248
    assert memopt.price(LLAMA, spec).nbytes / numel <= most


def test_rules_that_take_everything_have_no_fallback():
    strict = {"muon", "sinkgd", "scale", "scale_head", "scale_embedding", "apollo", "apollomini"}
    assert {name for name, rule in RULES.items() if rule.declines is not None} == strict
    assert {name for name, rule in RULES.items() if rule.fallback} == strict
