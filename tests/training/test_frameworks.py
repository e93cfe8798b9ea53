"""The same script under accelerate (DDP, FSDP2) and DeepSpeed (stages 1 to 3): the losses of the bare script."""

from pathlib import Path

import pytest

import memopt
from memopt.integrations.deepspeed import check_engine
from tests.helpers import frameworks, loops

TABLE = Path(__file__).parents[2] / "docs" / "compatibility.md"
NEEDS = {
    "under_accelerate": "accelerate",
    "under_trainer": "transformers",
    "under_lightning": "lightning",
    "under_deepspeed": "deepspeed",
}


def test_the_table_in_the_docs_is_what_is_run():
    """To write it anew: python -c "import frameworks; print(frameworks.table())" in this directory."""
    assert frameworks.table() in TABLE.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("case", frameworks.CASES, ids=lambda case: f"{case.framework} {case.ranks} {case.spec}")
def test_the_losses_of_the_bare_script_and_on_from_a_checkpoint(case, tmp_path):
    pytest.importorskip(NEEDS[case.function.__name__])
    if "deepspeed" in case.arguments:
        pytest.importorskip("deepspeed")
    found = case.run(str(tmp_path))
    assert all(case.refused in reason for reason in found["refused"][:1])
    if "difference" in found:
        assert found["difference"] <= case.rtol
    if case.refused:
        assert found["refused"][0]
    else:
        assert not any(found["refused"])
        assert found["resumed"]


def test_deepspeeds_configuration():
    assert memopt.deepspeed_config("adamw-8bit@device/zero2", offload=True)["zero_optimization"] == {
        "stage": 2,
        "offload_optimizer": {"device": "cpu"},
    }
    assert memopt.deepspeed_config("adafactor/zero1")["zero_optimization"] == {"stage": 1}
    momentum = memopt.deepspeed_config("sgd-bf16/zero2", hyper={"momentum": 0.9})
    assert momentum["zero_optimization"] == {"stage": 2}
    assert "momentum" not in momentum
    with pytest.raises(memopt.SpecError, match="keeps no state"):
        memopt.deepspeed_config("sgd-bf16/zero2")
    with pytest.raises(memopt.SpecError, match="offload=True needs a stage"):
        memopt.deepspeed_config("adamw", offload=True)


def test_an_optimizer_that_was_replaced_is_noticed():
    import torch

    model = loops.net()

    class Engine:
        optimizer = torch.optim.AdamW(model.parameters())

    with pytest.raises(RuntimeError, match=r"runs AdamW in place of the memopt\.Optimizer"):
        check_engine(Engine())
    Engine.optimizer = memopt.create(model, "adamw")
    check_engine(Engine())


def test_state_of_parameters_that_are_gone_is_said():
    import torch

    model = loops.net()
    opt = memopt.create(model, "adamw-8bit")
    opt.init_state()
    for group in opt.param_groups:  # what accelerate does under FSDP2
        group["params"] = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="holds state of 6 parameters that it no longer has"):
        opt.step()
