"""The same script under accelerate (DDP, FSDP2) and DeepSpeed (stages 1 to 3): the losses of the bare script."""

from pathlib import Path

import frameworks
import pytest
import ranks

import memopt
from memopt.integrations.deepspeed import check_engine

#: Two ranks sum gradients in another order than one; 8-bit codes may round to the other side; DeepSpeed's flat vectors
#: have other blocks.
RTOL, RTOL_8BIT, RTOL_FLAT = 1e-4, 2e-2, 5e-2
TABLE = Path(__file__).parent.parent / "docs" / "compatibility.md"


#: What is run under accelerate: (its kind of process group, spec, what becomes of save_state and load_state).
ACCELERATE = [
    ("ddp", "adamw-8bit", "bit for bit"),
    ("ddp", "adamw-8bit/zero1", "refused with the reason: memopt.save"),
    ("fsdp2", "adamw-8bit/zero3", "bit for bit"),
    ("fsdp2", "adafactor/zero3", "bit for bit"),
]
#: Under DeepSpeed: (spec, stage, offload to the host).
DEEPSPEED = [("adamw", 1, False), ("adamw-8bit", 2, True), ("adamw-8bit", 3, False)]


def table():
    """The rows of docs/compatibility.md: exactly what the tests of this file run."""
    rows = ["| framework | spec | losses of the bare script | save and load in mid-training |", "|---|---|---|---|"]
    rows += [f"| accelerate, {kind} | `{spec}` | yes | {saved} |" for kind, spec, saved in ACCELERATE]
    for spec, stage, offload in DEEPSPEED:
        name = f"DeepSpeed stage {stage}" + ", offload to the host" * offload
        rows.append(f"| {name} | `{spec}` | yes | bit for bit |")
    rows.append("| DeepSpeed | `adafactor` and all that needs shapes | refused with the reason | |")
    return "\n".join(rows) + "\n"


def test_the_table_in_the_docs_is_what_is_run():
    """To write it anew: python -c "import test_frameworks as t; print(t.table())" in this directory."""
    assert table() in TABLE.read_text()


def averaged(results, key):
    return [sum(each) / len(results) for each in zip(*(rank[key] for rank in results), strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "spec"), [case[:2] for case in ACCELERATE if case[2] == "bit for bit"])
def test_accelerate(kind, spec, tmp_path):
    pytest.importorskip("accelerate")
    results = ranks.run(frameworks.under_accelerate, 2, kind, spec, str(tmp_path / "saved"))
    losses = averaged(results, "losses")
    assert losses == pytest.approx(frameworks.bare(spec.partition("/")[0]), rel=RTOL_8BIT)
    for rank in results:
        assert rank["resumed"] == rank["losses"][frameworks.SAVED_AT :]


@pytest.mark.slow
def test_accelerate_does_not_save_one_ranks_rows_for_all(tmp_path):
    pytest.importorskip("accelerate")
    spec = "adamw-8bit/zero1"
    results = ranks.run(frameworks.under_accelerate, 2, "ddp", spec, str(tmp_path / "saved"))
    assert averaged(results, "losses") == pytest.approx(frameworks.bare("adamw-8bit"), rel=RTOL_8BIT)
    assert all("save with memopt.save" in rank["refused"] for rank in results)


@pytest.mark.slow
def test_deepspeed(tmp_path):
    pytest.importorskip("deepspeed")
    results = ranks.run(frameworks.under_deepspeed, 2, str(tmp_path), DEEPSPEED)
    for spec, stage, offload in DEEPSPEED:
        key = f"{spec} {stage}{' offload' * offload}"
        losses = [sum(each) / 2 for each in zip(*(rank[key][0] for rank in results), strict=True)]
        expected = frameworks.bare(key.split()[0], clip=False, accumulate=1)
        assert losses == pytest.approx(expected, rel=RTOL if key == "adamw 1" else RTOL_FLAT)
        for rank in results:
            assert rank[key][1] == rank[key][0][frameworks.SAVED_AT :]
    assert all("use an element-wise rule such as adamw-8bit" in rank["adafactor"] for rank in results)


def test_deepspeeds_configuration_refuses_what_flat_vectors_cannot_hold():
    assert memopt.deepspeed_config("adamw-8bit@device/zero2", offload=True)["zero_optimization"] == {
        "stage": 2, "offload_optimizer": {"device": "cpu"},
    }  # fmt: skip
    for spec in ("adafactor/zero1", "lamb/zero3", "adamw-factored/zero2", "adammini/zero2"):
        with pytest.raises(memopt.SpecError, match="needs the parameters' shapes"):
            memopt.deepspeed_config(spec)
    momentum = memopt.deepspeed_config("sgd-bf16/zero2", hyper={"momentum": 0.9})
    assert momentum["zero_optimization"] == {"stage": 2}
    assert "momentum" not in momentum
    with pytest.raises(memopt.SpecError, match="keeps no state"):
        memopt.deepspeed_config("sgd-bf16/zero2")
    with pytest.raises(memopt.SpecError, match="offload=True needs a stage"):
        memopt.deepspeed_config("adamw", offload=True)


def test_an_optimizer_that_was_replaced_is_noticed():
    import torch

    model = frameworks.net()

    class Engine:
        optimizer = torch.optim.AdamW(model.parameters())

    with pytest.raises(RuntimeError, match=r"runs AdamW in place of the memopt\.Optimizer"):
        check_engine(Engine())
    Engine.optimizer = memopt.create(model, "adamw")
    check_engine(Engine())


def test_state_of_parameters_that_are_gone_is_said():
    import torch

    model = frameworks.net()
    opt = memopt.create(model, "adamw-8bit")
    opt.init_state()
    for group in opt.param_groups:  # what accelerate does under FSDP2
        group["params"] = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="holds state of 6 parameters that it no longer has"):
        opt.step()
