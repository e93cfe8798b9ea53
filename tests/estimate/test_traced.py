"""Models without a formula: transformers' types by their modules, and steps traced on fake tensors beside real ones."""

import json
import subprocess
import sys

import pytest

from estimators import InputError, estimate

torch = pytest.importorskip("torch")

from estimators.activations.recorded import Recorded  # noqa: E402
from estimators.measure import saved, traced  # noqa: E402
from estimators.traced.repeats import stacks  # noqa: E402


class Block(torch.nn.Module):
    def __init__(self, width, kind="plain"):
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)
        self.kind = kind

    def forward(self, x):
        h = self.up(x)
        return x + self.down(h.tanh() if self.kind == "plain" else torch.nn.functional.gelu(h))


class Double(torch.autograd.Function):
    """Keeps its input as an attribute, where no hook of saved tensors sees it."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2 + ctx.x * 0


class Net(torch.nn.Module):
    """Layers of two kinds, checkpointed or not, a function of autograd's and a loss."""

    def __init__(self, layers=3, width=32, checkpoint=False, kinds=("plain",)):
        super().__init__()
        self.layers = torch.nn.ModuleList(Block(width, kinds[i % len(kinds)]) for i in range(layers))
        self.head = torch.nn.Linear(width, 100)
        self.checkpoint = checkpoint

    def forward(self, x, labels):
        for layer in self.layers:
            if self.checkpoint:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return torch.nn.functional.cross_entropy(self.head(Double.apply(x)).flatten(0, 1), labels.flatten())


def batch():
    return {"x": torch.zeros(4, 16, 32), "labels": torch.zeros(4, 16, dtype=torch.long)}


def measured(module, given):
    """Saved bytes, and the peaks of forward and backward of a real step."""
    box = {}

    def forward():
        box["loss"] = module(**given)

    def backward():
        box.pop("loss").backward()

    forward(), backward(), module.zero_grad()
    kept = saved(module, lambda: module(**given)).nbytes
    curve = traced(("forward", forward), ("backward", backward))
    return kept, curve.peak_of("forward"), curve.peak_of("backward")


class TestAModule:
    @pytest.mark.parametrize("checkpoint", [False, True])
    def test_its_step_is_what_a_real_one_allocates(self, checkpoint):
        module = Net(checkpoint=checkpoint)
        kept, forward, backward = measured(module, batch())
        ran = estimate(module, inputs=batch(), device="cpu").activations
        # The random state that torch's checkpoint keeps is no tensor of the step's.
        aside = 3 * 5056 if checkpoint else 0
        given = sum(t.nbytes for t in batch().values())  # there before a real step is measured
        assert abs(ran.saved - kept - 2048 * 4) <= 4 + aside  # the loss, and what autograd's function keeps aside
        assert max(ran.forward[0], ran.loss[0]) == pytest.approx(forward + given, abs=aside)
        assert sum(ran.backward) == pytest.approx(backward + given, abs=aside)

    def test_it_is_left_as_it_was(self):
        module = Net().eval()
        before = {name: (id(p), p.sum().item()) for name, p in module.named_parameters()}
        estimate(module, inputs=batch())
        assert {name: (id(p), p.sum().item()) for name, p in module.named_parameters()} == before
        assert not module.training
        assert all(p.grad is None for p in module.parameters())

    @pytest.mark.parametrize(("layers", "kinds"), [(12, ("plain",)), (23, ("plain", "gelu", "gelu"))])
    def test_layers_that_repeat_are_not_run(self, layers, kinds):
        with torch.device("meta"):
            module = Net(layers, kinds=kinds)
        assert stacks(module)
        deep = estimate(module, inputs=batch()).activations
        assert any("follow from" in note for note in deep.notes)
        module.layers = torch.nn.ModuleList([*module.layers])
        for i, layer in enumerate(module.layers):
            layer.own = f"{i}"  # no two are alike
        whole = estimate(module, inputs=batch()).activations
        assert not whole.notes
        assert deep[:5] == whole[:5]
        assert deep.kept[:5] == whole.kept[:5]
        assert isinstance(deep.recorded, Recorded)
        sizes = [sorted(n for code, _, n in one.recorded.events if code == 1) for one in (deep, whole)]
        assert sizes[0] == sizes[1]

    def test_batch_and_sequence_are_the_inputs_own(self):
        e = estimate(Net(), inputs=batch())
        assert (e.training.batch, e.training.seq) == (4, 16)
        with pytest.raises(InputError, match="those of the inputs"):
            estimate(Net(), inputs=batch(), seq=8)
        with pytest.raises(InputError, match="inputs are for a torch"):
            estimate("gpt2", inputs=batch())

    def test_values_of_inputs_are_known_and_those_of_weights_are_not(self):
        class Choosing(Net):
            def forward(self, x, labels):
                x = x[labels > 0]
                return self.head(x[: int(labels.sum())]).sum()

        class Asking(Net):
            def forward(self, x, labels):
                return super().forward(x[self.head(x).sum(-1) > 0][None], labels)

        given = {"x": torch.zeros(4, 16, 32), "labels": torch.ones(4, 16, dtype=torch.long)}
        assert estimate(Choosing(), inputs=given).activations.saved > 0
        e = estimate(Asking(), gpu="80GiB", inputs=given)
        assert e.activations is None
        assert "follows from weights or from data" in str(e)
        assert not e.fits

    def test_a_card_keeps_masks_of_a_byte(self):
        module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 64))
        x = torch.zeros(128, 64)
        cpu, cuda = (estimate(module, inputs=x, device=d).activations.saved for d in ("cpu", "cuda"))
        assert cpu - cuda == 3 * 128 * 64

    def test_autocast_and_frozen_parameters(self):
        module = Net()
        kept = estimate(module, inputs=batch(), device="cpu").activations.saved
        assert estimate(module, inputs=batch(), device="cpu", mixed="bf16").activations.saved != kept
        module.layers.requires_grad_(False)
        frozen = estimate(module, inputs=batch(), device="cpu").activations
        assert frozen.saved < kept / 2
        assert frozen.accumulated.gradients == 4 * (32 * 100 + 100)


SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 300}


class TestTransformers:
    @pytest.fixture(autouse=True)
    def transformers(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MEMOPT_CACHE", str(tmp_path))
        return pytest.importorskip("transformers", minversion="5.0")

    @pytest.mark.parametrize(
        "config",
        [
            {"model_type": "helium", **SMALL, "num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 16},
            {"model_type": "mamba", "hidden_size": 32, "vocab_size": 300, "num_hidden_layers": 2},
            {
                "model_type": "qwen3_next",
                **SMALL,
                "num_hidden_layers": 4,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "num_key_value_heads": 2,
            },
        ],
        ids=lambda c: c["model_type"],
    )
    def test_a_type_without_a_family_is_its_module(self, config, transformers):
        e = estimate(config, "adamw", weights="fp32", seq=8)
        with torch.device("meta"):
            module = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
        assert dict(e.model.shapes) == {name: tuple(p.shape) for name, p in module.named_parameters()}
        assert e.model.provenance == "exact"
        assert type(module).__name__ in str(e)
        assert e.activations is not None, e.without

    def test_it_is_remembered_without_torch(self, tmp_path):
        config = {"model_type": "helium", **SMALL, "num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 16}
        first = estimate(config, "adamw")
        assert len(list((tmp_path / "models").iterdir())) == 1
        code = (
            "import json, sys; from estimators import estimate; "
            f"e = estimate(json.loads({json.dumps(config)!r}), 'adamw'); "
            "print(e.parameters, 'torch' in sys.modules, 'transformers' in sys.modules)"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert out.split() == [str(first.parameters), "False", "False"]
        (kept,) = (tmp_path / "models").iterdir()
        kept.write_text('{"shapes": [["a", ["b"]]], "frozen": [], "buffers": 0, "class": ""}')
        assert estimate(config, "adamw").parameters == first.parameters

    @pytest.mark.parametrize(
        ("family", "checkpointing"),
        [(f, "none") for f in ("llama", "qwen3_moe", "t5", "whisper")] + [("gpt2", "full"), ("whisper", "full")],
    )
    def test_traced_and_written_tapes_agree(self, family, checkpointing):
        import benchmarks.estimates_models as models
        from estimators.memory.step_rows import run
        from estimators.models.from_config import from_config
        from estimators.traced.from_transformers import from_transformers
        from estimators.training import Training

        config = models.config(family, models.SIZES[0][0])
        training = Training(batch=2, seq=64, checkpointing=checkpointing, device="cpu")
        written, _ = run(from_config(config, ""), training)
        ran, why = run(from_transformers(config, ""), training)
        assert ran is not None, why
        assert sum(ran.backward) == pytest.approx(sum(written.backward), rel=0.005)
        if checkpointing == "none":  # tables that checkpointed layers are called with are no saved ones to the formulas
            assert ran.saved == pytest.approx(written.saved, rel=0.005)

    @pytest.mark.parametrize("kind", ["camembert", "mt5"])
    def test_aliases_are_the_types_own_modules(self, kind):
        from estimators.models.from_config import from_config
        from estimators.traced.from_transformers import from_transformers

        sizes = {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_heads": 4, "num_layers": 2} if kind == "mt5" else SMALL
        config = {"model_type": kind, **sizes, "vocab_size": 300, "num_hidden_layers": 2}
        config = {k: v for k, v in config.items() if kind != "mt5" or k != "num_hidden_layers"}
        alias = from_config(config, "")
        assert not alias.head
        assert dict(alias.shapes) == dict(from_transformers(config, "").shapes)

    def test_without_transformers_the_language_model_is_counted_and_gets_no_verdict(self, monkeypatch):
        monkeypatch.setattr("estimators.traced.from_transformers.missing", lambda: "pip install transformers")
        text = {"model_type": "gemma3_text", **SMALL, "num_hidden_layers": 2, "head_dim": 16, "num_key_value_heads": 2}
        e = estimate({"model_type": "gemma3", "text_config": text, "vision_config": {}}, "adamw", gpu="80GiB", seq=8)
        assert e.parameters == estimate(text, "adamw").parameters
        assert e.fits is not True
        assert "vision_config (pip install transformers)" in str(e)
        with pytest.raises(InputError, match="transformers builds it where it is installed"):
            estimate({"model_type": "mamba"})

    def test_what_cannot_be_built_is_said(self):
        with pytest.raises(InputError, match="did you mean 'gemma'"):
            estimate({"model_type": "gemmma"})
        with pytest.raises(InputError, match=r"transformers (refuses the configuration|does not build)"):
            estimate({"model_type": "helium", **SMALL, "hidden_size": "wide"})
        for wrong, sentence in (
            ({"num_hidden_layers": 10**9}, "'num_hidden_layers'=1000000000 is not allowed; at most 16,384"),
            ({"num_hidden_layers": 4000}, "more than 30,000 modules and weights"),
            ({"backbone": "resnet50", "model_type": "dpt"}, "nothing is looked up there"),
        ):
            with pytest.raises(InputError, match=sentence):
                estimate({"model_type": "helium", **SMALL, **wrong})


def test_the_command_line(tmp_path, monkeypatch, run):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class M(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a = torch.nn.Linear(64, 64)\n"
        "    def forward(self, x):\n"
        "        return self.a(x).relu().sum()\n"
        "def batch():\n"
        "    return (torch.zeros(8, 64),)\n"
    )

    command = [sys.executable, "-m", "memopt", "estimate", "--module", "mine:M", "--inputs", "mine:batch", "--json"]
    done = subprocess.run([*command, "--optim", "adamw"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["model"]["parameters"] == 64 * 65
    assert out["saved_nbytes"] == 2 * 8 * 64 * 4 + 4  # the input, the result of relu, and the loss
    monkeypatch.syspath_prepend(tmp_path)
    for arguments, sentence in (
        (("--module", "mine"), "it is package.module:name"),
        (("--module", "mine:N"), "mine has no N"),
        (("--module", "nobodys:N"), "cannot be imported"),
        (("--module", "mine:batch"), "makes"),
        (("gpt2", "--inputs", "mine:batch"), "--inputs are those of --module"),
    ):
        code, _, said = run("estimate", *arguments)
        assert code == 2
        assert sentence in said
