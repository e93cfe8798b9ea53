"""The head with which a model is counted, and packed sequences."""

import json

import pytest

from estimators import InputError, estimate
from estimators.models.published import KNOWN
from memopt.cli import main

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "architectures": ["LlamaForCausalLM"],
}


class TestNamed:
    def test_a_base_model_that_is_counted_with_a_head(self):
        e = estimate({**KNOWN["bert-base-uncased"], "architectures": ["BertModel"]})
        assert any("masked-language-model head, not as BertModel" in note for note in e.model.notes)

    def test_a_causal_model_needs_no_word(self):
        assert not any("head" in note for note in estimate(LLAMA).model.notes)

    def test_under_the_table(self, capsys):
        assert main(["estimate", "bert-base-uncased", "--optim", "adamw"]) == 0
        assert "counted with its masked-language-model head; --head changes it" in capsys.readouterr().out

    def test_its_own_needs_no_transformers(self):
        e = estimate(LLAMA, head="causal-lm")
        assert e.model.head == ""
        assert "counted with its language model's head" in e.model.notes

    @pytest.mark.parametrize(
        ("model", "head", "part"),
        [
            (LLAMA, "regression", "classification"),
            ("8B", "none", "a model with a configuration"),
            (LLAMA, "image-classification", "has no llama"),
            (LLAMA, "NoSuchModel", "no model class"),
        ],
    )
    def test_what_is_refused(self, model, head, part):
        if part in ("has no llama", "no model class"):
            pytest.importorskip("transformers")
        with pytest.raises(InputError, match=part):
            estimate(model, head=head)


class TestBuilt:
    @pytest.mark.parametrize(
        ("head", "name"),
        [("none", "LlamaModel"), ("classification", "LlamaForSequenceClassification"), ("LlamaModel", "LlamaModel")],
    )
    def test_is_transformers_class(self, head, name):
        transformers = pytest.importorskip("transformers", minversion="5.0")
        import torch

        e = estimate(LLAMA, "adamw", head=head, seq=32, batch=2, gpu="1GiB")
        config = transformers.AutoConfig.for_model("llama", **{k: v for k, v in LLAMA.items() if k != "model_type"})
        with torch.device("meta"):
            module = getattr(transformers, name)(config)
        assert e.parameters == sum(p.numel() for p in module.parameters())
        assert any(name in note for note in e.model.notes)
        assert e.activations is not None
        assert e.activations.saved < estimate(LLAMA, "adamw", seq=32, batch=2).activations.saved

    def test_what_is_emitted_is_read_back(self, capsys, tmp_path):
        pytest.importorskip("transformers", minversion="5.0")
        path = tmp_path / "config.json"
        path.write_text(json.dumps(LLAMA))
        argv = ["estimate", str(path), "--head", "none", "--optim", "adamw"]
        assert main([*argv, "--emit", "python"]) == 0
        (tmp_path / "train.py").write_text(capsys.readouterr().out)
        assert main([*argv, "--json"]) == 0
        first = json.loads(capsys.readouterr().out)
        assert main(["estimate", "--from", str(tmp_path / "train.py"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model"]["parameters"] == first["model"]["parameters"]


class TestPacked:
    def test_a_real_forward_pass(self):
        """Positions that begin again say where a sequence does, and make transformers mask the others."""
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers", minversion="5.0")
        from estimators.measure import saved

        fields = {k: v for k, v in LLAMA.items() if k not in ("model_type", "architectures")}
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).to(torch.bfloat16).train()
        model.config.use_cache = False
        ids = torch.arange(128).remainder(500)[None]
        for positions, flags in (
            (torch.arange(128)[None], {}),
            (torch.arange(64).repeat(2)[None], {"packed": True}),
        ):
            kept = saved(
                model, lambda positions=positions: model(input_ids=ids, labels=ids, position_ids=positions).loss
            ).nbytes
            e = estimate(LLAMA, "adamw", seq=128, device="cpu", **flags)
            assert e.activations.saved == pytest.approx(kept, rel=0.005)

    def test_a_kernel_that_takes_lengths_needs_no_mask(self):
        flash, packed = (estimate(LLAMA, "adamw", seq=128, attention="flash", packed=p) for p in (False, True))
        assert flash.activations.saved == packed.activations.saved

    def test_without_a_formula(self):
        e = estimate("gpt2", "adamw", seq=64, packed=True, gpu="8GiB")
        assert e.fits is None
        assert "under packed" in e.without[0]
        with pytest.raises(InputError, match="needs seq"):
            estimate(LLAMA, packed=True)
