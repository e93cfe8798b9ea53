"""Adapters, storage and freezing: which parameters an operation takes, and real steps of PEFT's modules on the CPU."""

import importlib
import json
import sys
import weakref
from pathlib import Path

import pytest

from estimators import InputError, estimate
from estimators.activations import scope
from memopt.cli import main

SAVED_TOLERANCE = 0.01


def models():
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        return importlib.import_module("estimates_models")
    finally:
        sys.path.pop(0)


class TestNames:
    @pytest.mark.parametrize(
        "family", ["llama", "phi", "gpt2", "bert", "gptj", "falcon", "t5", "whisper", "opt", "qwen3"]
    )
    def test_operations_take_the_parameters_of_the_modules_that_run(self, family, monkeypatch):
        """The order in which linear layers of one block are called, by transformers and by the tape."""
        torch = pytest.importorskip("torch")
        pytest.importorskip("transformers", minversion="5.0")
        m = models()
        config = m.config(family, m.SIZES[0][0])
        model = m.build(dict(config), torch.float32, "eager" if family in m.ONLY_EAGER else "sdpa", 0)
        called = []
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dim() == 2 and type(module).__name__ != "Embedding":
                module.register_forward_hook(lambda *_, name=name: called.append(name))
        model(**m.inputs(config, 1, 16, torch.float32))
        taken = []
        take = scope.Scope.take

        def noted(self, *shapes, name=""):
            found = take(self, *shapes, name=name)
            if found and len(found.shape) == 2:
                taken.append(found.name.removesuffix(".weight"))
            return found

        monkeypatch.setattr(scope.Scope, "take", noted)
        estimate(config, seq=16, weights="fp32")
        # The tape runs one layer of each kind: its names, in their order, begin what the modules of that block called.
        seen = []
        for name in called:
            local = scope._BLOCK.sub("", name, count=1)
            if local != name and local not in seen:
                seen.append(local)
        assert [name for name in dict.fromkeys(taken) if name in seen] == seen

    def test_targets(self):
        trainable = {
            wanted: estimate("llama-3.1-8b", lora=16, lora_targets=wanted).trainable
            for wanted in ("all-linear", "default", "q_proj,v_proj", "attention", "lm_head")
        }
        assert trainable["default"] == trainable["q_proj,v_proj"] == 6_815_744  # PEFT's print_trainable_parameters
        assert trainable["all-linear"] == 41_943_040
        assert trainable["attention"] == 13_631_488
        assert trainable["lm_head"] == 16 * (4096 + 128256)
        saved = estimate("llama-3.1-8b", lora=16, modules_to_save="lm_head")
        assert saved.trainable == 41_943_040 + 4096 * 128256

    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ({"lora": 4, "lora_targets": "q_prj"}, "no linear layer 'q_prj'"),
            ({"lora": 4, "lora_targets": "default"}, None),
            ({"lora": 4, "modules_to_save": "head"}, "no module 'head'"),
            ({"lora_targets": "q_proj"}, "there are none"),
            ({"lora": 4, "lora_dropout": 1.0}, "lora_dropout=1.0"),
            ({"lora": 4, "lora_kind": "pissa"}, "lora, rslora, dora"),
            ({"kbit_prepare": "yes"}, "quantised is not given"),
            ({"lora": 4, "quantised": "gptq", "kbit_prepare": "yes"}, "changes nothing"),
            ({"frozen": "nothing"}, "matches no parameter"),
            ({"frozen": "*"}, "leaves nothing to train"),
            ({"frozen": "a", "train": "b"}, "give one of them"),
            ({"lora": 4, "train": "norm"}, "do not go with lora"),
            ({"loss": "fused"}, "need seq"),
        ],
    )
    def test_contradictions(self, given, sentence):
        if sentence is None:
            with pytest.raises(InputError, match="PEFT has no default targets for olmo"):
                estimate("olmo-1b", **given)
        else:
            with pytest.raises(InputError, match=sentence):
                estimate("qwen3-0.6b", **given)


CASES = {
    "targets": ({"target_modules": ["q_proj", "v_proj"]}, {"lora_targets": "q_proj,v_proj"}, "bfloat16", False),
    "autocast": ({"target_modules": "all-linear"}, {"mixed": "bf16"}, "float32", True),
    "autocast on bf16": ({"target_modules": "all-linear"}, {"mixed": "bf16"}, "bfloat16", True),
    "dropout": ({"target_modules": "all-linear", "lora_dropout": 0.1}, {"lora_dropout": 0.1}, "bfloat16", False),
    "head": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"lora_targets": "q_proj", "modules_to_save": "lm_head"},
        "float32",
        False,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_real_step_of_peft(name):
    """Saved bytes by flags and of the wrapped module itself, beside a real forward pass."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers", minversion="5.0")
    from estimators.measure import saved

    made, given, dtype, autocast = CASES[name]
    m = models()
    config = m.config("llama", m.SIZES[0][0])
    model = m.build(dict(config), getattr(torch, dtype), "sdpa", 0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, **made))
    tokens = m.inputs(config, 2, 64, getattr(torch, dtype))

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(**tokens).loss

    run().backward()
    kept = saved(model, run).nbytes
    step = {"batch": 2, "seq": 64, "device": "cpu"}
    flags = estimate(config, weights=dtype, lora=8, **given, **step)
    assert flags.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert flags.activations.saved == pytest.approx(kept, rel=SAVED_TOLERANCE)
    wrapped = estimate(model, mixed=given.get("mixed", ""), **step)
    assert wrapped.activations.saved == flags.activations.saved
    assert wrapped.columns[0].allocated.expected == pytest.approx(flags.columns[0].allocated.expected, rel=1e-4)


@pytest.mark.parametrize("pattern", ["embed_tokens", "model.layers.[01].*", "mlp", "norm"])
def test_a_real_step_with_frozen_parameters(pattern):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.0")
    from fnmatch import fnmatchcase

    from estimators.measure import saved

    m = models()
    config = m.config("llama", m.SIZES[0][0])
    model = m.build(dict(config), torch.float32, "sdpa", 0)
    for name, p in model.named_parameters():
        p.requires_grad_(not fnmatchcase(name, pattern if "*" in pattern else f"*{pattern}*"))
    tokens = m.inputs(config, 2, 64, torch.float32)
    kept = saved(model, lambda: model(**tokens).loss).nbytes
    step = {"batch": 2, "seq": 64, "device": "cpu"}
    flags = estimate(config, weights="fp32", frozen=pattern, **step)
    assert flags.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert flags.activations.saved == pytest.approx(kept, rel=SAVED_TOLERANCE)
    assert estimate(model, **step).activations.saved == flags.activations.saved


def test_kbit_preparation_makes_the_rest_fp32():
    given = {"seq": 512, "lora": 16, "quantised": "nf4"}
    prepared, plain = (estimate("llama-3.1-8b", "adamw", **given, kbit_prepare=how) for how in ("yes", "no"))
    ends = 2 * (2 * 128256 * 4096 + 65 * 4096)
    assert prepared["adamw"].nbytes("weights") - plain["adamw"].nbytes("weights") == ends
    assert prepared.activations.saved > plain.activations.saved
    assert estimate("llama-3.1-8b", "adamw", **given).activations[:7] == prepared.activations[:7]
    gptq = estimate("llama-3.1-8b", "adamw", **{**given, "quantised": "gptq"})
    assert {r.detail for r in gptq.rows if r.what == "weights"} == {"bfloat16", "gptq", "float32"}


def test_no_logits_at_once():
    for name in ("llama-3.1-8b", "gemma-2-2b"):
        full, chunked, fused = (
            estimate(name, "adamw-8bit", seq=2048, batch=4, checkpointing="full", lora=8, loss=loss).columns[0]
            for loss in ("full", "chunked", "fused")
        )
        assert chunked.allocated.expected < full.allocated.expected
        assert fused.allocated.expected < full.allocated.expected
        assert chunked.allocated.high < full.allocated.expected


def test_kept_outputs_are_within_at_most():
    dropped, kept = (
        estimate("llama-3.1-8b", "adamw", seq=512, batch=4, checkpointing="full", lora=8, outputs=how).columns[0]
        for how in ("dropped", "kept")
    )
    assert dropped.allocated.expected < kept.allocated.expected <= dropped.allocated.high


class TestFolder:
    def write(self, folder, **given):
        content = {"peft_type": "LORA", "base_model_name_or_path": "qwen3-0.6b", "r": 8, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps({**content, **given}))
        return str(folder)

    def test_an_adapters_folder_stands_for_its_flags(self, tmp_path):
        path = self.write(tmp_path, modules_to_save=["embed_tokens"], lora_dropout=0.05, use_dora=True)
        e = estimate(path, "adamw", seq=64)
        t = e.training
        assert (t.lora, t.lora_targets, t.modules_to_save, t.lora_dropout, t.lora_kind) == (
            8,
            "q_proj",
            "embed_tokens",
            0.05,
            "dora",
        )
        assert (
            e.trainable
            == estimate(
                "qwen3-0.6b", lora=8, lora_targets="q_proj", lora_kind="dora", modules_to_save="embed_tokens"
            ).trainable
        )
        assert estimate(path, lora=4).training.lora == 4
        assert main(["estimate", path, "--seq", "64"]) == 0

    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ({"peft_type": "IA3"}, "knows LORA"),
            ({"r": 0}, "r=0"),
            ({"base_model_name_or_path": None}, "which model it adapts"),
            ({"target_modules": "model.*q"}, "regular expression"),
            ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
            ({"modules_to_save": [1]}, "list of names"),
        ],
    )
    def test_what_cannot_be_used_is_one_sentence(self, tmp_path, given, sentence):
        with pytest.raises(InputError, match=sentence):
            estimate(self.write(tmp_path, **given))


class TestInputsOf8BitLayers:
    """bitsandbytes' int8 product keeps its input as an attribute of its node: checkpointing does not see it."""

    def test_the_node_keeps_it(self):
        torch, bnb = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes")
        from torch.utils.checkpoint import checkpoint

        linear = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu")
        x = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)
        for reentrant in (False, True):
            inputs = []

            def layer(x, inputs=inputs):
                inputs.append(weakref.ref(y := x * 1.0))
                return linear(y)

            out = checkpoint(layer, x, use_reentrant=reentrant)
            assert (inputs[0]() is not None) == (not reentrant)
            out.sum().backward()
            assert (inputs[0]() is not None) == (not reentrant)  # as long as the graph

    def test_they_stay_under_checkpointing(self):
        flags = {"lora": 8, "seq": 512, "checkpointing": "full"}
        layers, tokens = 28, 512
        inputs = tokens * 4 * (1024 + 2048 + 1024 + 3072) * layers  # of q, k, v; of o; of gate and up; of down, in fp32
        today, before, in4 = (
            estimate("qwen3-0.6b", "adamw", quantised=kind, versions=versions, **flags)
            for kind, versions in (("int8", ""), ("int8", "transformers=4.57"), ("nf4", ""))
        )
        assert today.activations.saved - before.activations.saved == inputs
        assert in4.activations.saved == before.activations.saved
        fullest = [e.columns[0].allocated.expected for e in (today, before)]
        assert fullest[0] - fullest[1] >= 0.9 * inputs
