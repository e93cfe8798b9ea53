"""Models from live modules and from files: shapes, dtypes, and input that cannot be used."""

import json

import pytest

import memopt
from estimators import InputError, estimate, resolve
from estimators.models.from_config import from_config
from estimators.models.published import KNOWN


class TestLiveModels:
    def test_shared_parameters_count_once_frozen_ones_do_not_train_and_buffers_are_counted(self):
        torch = pytest.importorskip("torch")
        with torch.device("meta"):
            model = torch.nn.ModuleDict({"a": torch.nn.Linear(100, 50), "b": torch.nn.Linear(100, 50, bias=False)})
            model["b"].weight = model["a"].weight
            model["norm"] = torch.nn.BatchNorm1d(50, dtype=torch.float32)
        model["a"].bias.requires_grad_(False)
        e = estimate(model, "adamw")
        assert (e.parameters, e.trainable) == (5000 + 50 + 100, 5000 + 100)
        assert e["adamw"].nbytes("weights") == 4 * 5150
        assert e["adamw"].nbytes("gradients") == 4 * 5100
        assert e["adamw"].nbytes("buffers") == 2 * 50 * 4 + 8
        assert e["adamw"].nbytes("state") == memopt.price(model, "adamw").nbytes

    def test_the_predicted_state_is_the_live_state(self):
        torch = pytest.importorskip("torch")
        model = torch.nn.Sequential(torch.nn.Embedding(300, 64), torch.nn.Linear(64, 300))
        for spec in ("adamw", "adamw-8bit", "adamw-4bit", "adafactor"):
            predicted = estimate(model, spec)[spec].nbytes("state")
            optimizer = memopt.create(model, spec, lr=1e-3)
            model(torch.zeros(2, dtype=torch.long)).sum().backward()
            optimizer.step()
            live = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t))
            assert predicted == live

    def test_dtypes_may_be_mixed_and_may_be_overruled(self):
        torch = pytest.importorskip("torch")
        model = torch.nn.Sequential(torch.nn.Linear(8, 8).bfloat16(), torch.nn.Linear(8, 8))
        assert estimate(model, "adamw")["adamw"].nbytes("weights") == 72 * 2 + 72 * 4
        assert estimate(model, "adamw").weights == "mixed"
        assert estimate(model, "adamw", weights="fp16")["adamw"].nbytes("gradients") == 144 * 2

    def test_a_module_without_parameters_is_refused(self):
        torch = pytest.importorskip("torch")
        with pytest.raises(InputError, match="Identity has no parameters"):
            estimate(torch.nn.Identity())


LLAMA = b'{"model_type": "llama", "num_attention_heads": 32, "intermediate_size": 64, "hidden_size": '


class TestFiles:
    def test_a_config_and_the_folder_that_holds_it(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(KNOWN["qwen3-8b"]))
        for path in (tmp_path, tmp_path / "config.json", str(tmp_path)):
            assert estimate(path).parameters == 8_190_735_360

    def test_safetensors_files_and_their_index(self, tmp_path):
        torch = pytest.importorskip("torch")
        save = pytest.importorskip("safetensors.torch").save_file
        save({"a": torch.zeros(5, 3), "b": torch.zeros(7, dtype=torch.bfloat16)}, tmp_path / "one.safetensors")
        save({"c": torch.zeros(2, 2)}, tmp_path / "two.safetensors", metadata={"format": "pt"})
        names = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
        assert dict(resolve(str(tmp_path / "one.safetensors")).shapes) == {"a": (5, 3), "b": (7,)}
        e = estimate(tmp_path, "adamw")
        assert e.parameters == 15 + 7 + 4
        assert e["adamw"].nbytes("weights") == 15 * 4 + 7 * 2 + 4 * 4
        (tmp_path / "two.safetensors").unlink()
        with pytest.raises(InputError, match=r"two\.safetensors' is not beside it"):
            estimate(index)

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [
            (b"", "is empty"),
            (b"{", "is not JSON"),
            (b"\xff\xfe\x00", "is not JSON"),
            (b"[1, 2]", "holds a list"),
            (b'"llama"', "holds a string"),
            (b"7", "holds a number"),
            (b"null", "holds null"),
            (b"{}", "has no model_type"),
            (b'{"model_type": 7}', "model_type=7"),
            (b'{"model_type": "lama"}', "did you mean 'llama'"),
            (b'{"model_type": "llava", "text_config": {"model_type": 7}}', "transformers refuses|has no formula"),
            (b'{"model_type": "llama"}', "has no num_attention_heads"),
            (b"[" * 200_000, "nested too deeply"),
            (LLAMA + b"9" * 5000 + b"}", "is not JSON"),
            (LLAMA + b"9" * 4000 + b"}", "an integer of 13288 bits"),
            (LLAMA + b'"4096"}', "hidden_size='4096'"),
            (LLAMA + b"4096.5}", "hidden_size=4096.5"),
            (LLAMA + b"NaN}", "hidden_size=nan"),
            (LLAMA + b"true}", "hidden_size=True"),
            (LLAMA + b"-1}", "hidden_size=-1"),
        ],
        ids=range(20),
    )
    def test_broken_files(self, tmp_path, content, sentence):
        path = tmp_path / "config.json"
        path.write_bytes(content)
        with pytest.raises(InputError, match=sentence) as caught:
            estimate(str(path))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\x01",
            b"\xff" * 8,
            (10).to_bytes(8, "little") + b"[1,2,3,45]",
            (2).to_bytes(8, "little") + b"7 ",
            (20).to_bytes(8, "little") + b'{"a":{"dtype":"F3"}}',
            (10**7).to_bytes(8, "little") + b"{}",
        ],
        ids=range(7),
    )
    def test_broken_safetensors(self, tmp_path, content):
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(InputError):
            estimate(str(path))

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(InputError, match=r"has none of config\.json"):
            estimate(tmp_path)


def test_quantized_configurations_are_priced_as_asked_and_say_so():
    config = {**KNOWN["deepseek-v3"], "quantization_config": {"quant_method": "fp8"}}
    assert "quantization_config is not applied" in from_config(config, "x").notes[0]


def test_too_many_parameters_in_all():
    config = {**KNOWN["mixtral-8x7b"], "num_local_experts": 65536, "num_hidden_layers": 1024}
    with pytest.raises(InputError, match="more than 1000T"):
        from_config(config, "x")
