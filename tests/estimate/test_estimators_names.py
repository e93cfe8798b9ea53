"""Names of models as people write them, and what is not known."""

import pytest

from estimators import InputError, estimate


class TestNamesAsPeopleHaveThem:
    @pytest.mark.parametrize(
        ("name", "parameters"),
        [
            ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 8_030_261_248),
            ("DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),  # its head is not tied, as Qwen2.5-1.5B's is
            ("deepseek-ai/DeepSeek-R1", 671_026_404_352),
            ("Qwen/Qwen2.5-Coder-7B-Instruct", 7_615_616_512),
            ("codellama/CodeLlama-34b-Instruct-hf", 33_743_970_304),
            ("lmsys/vicuna-13b-v1.5", 13_015_864_320),
            ("vicuna-7b", 6_738_415_616),
            ("lmsys/vicuna-7b-v1.1", 6_738_415_616),
            ("unsloth/llama-3-8b-bnb-4bit", 8_030_261_248),
            ("TheBloke/Llama-2-7B-GPTQ", 6_738_415_616),
            ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552),
            ("mistralai/Mixtral-8x7B-Instruct-v0.1", 46_702_792_704),
            ("microsoft/Phi-3.5-mini-instruct", 3_821_079_552),
            ("HuggingFaceH4/zephyr-7b-beta", 7_241_732_096),
        ],
    )
    def test_names_as_people_have_them(self, name, parameters):
        assert estimate(name).parameters == parameters

    def test_what_was_taken_for_what_is_said(self):
        assert "is built as llama-2-13b" in " ".join(estimate("lmsys/vicuna-13b-v1.5").model.notes)
        assert "stored as gptq" in " ".join(estimate("TheBloke/Llama-2-7B-GPTQ").model.notes)
        assert estimate("llama-3.1-8b").model.notes == ()

    @pytest.mark.parametrize(
        ("gpu", "part"),
        [("a100", "a100-40gb, a100-80gb; say which"), ("V100", "v100-16gb"), ("M3 Max", "three quarters")],
    )
    def test_cards_that_are_several_or_none(self, gpu, part):
        with pytest.raises(InputError, match=part):
            estimate("gpt2", gpu=gpu)

    @pytest.mark.parametrize(
        ("name", "part"), [("m.bin", "pickle"), ("m.gguf", "inference"), ("model_index.json", "unet")]
    )
    def test_files_that_are_no_source(self, tmp_path, name, part):
        (tmp_path / name).write_bytes(b"{}")
        with pytest.raises(InputError, match=part):
            estimate(str(tmp_path / name))


def test_an_unknown_name_is_refused_at_once_without_a_network(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from estimators.models import from_hub

    asked = []

    def gone(*_, **options):
        asked.append(options)
        raise OSError("not in the cache")

    monkeypatch.setattr(from_hub, "_reachable", lambda endpoint: False)
    monkeypatch.setattr(hub, "hf_hub_download", gone)
    with pytest.raises(InputError, match="cannot be reached"):
        estimate("some-org/unknown-model-7q")
    assert asked == [{"local_files_only": True}]


def test_nobody_answers_soon_enough(monkeypatch):
    from estimators.models import from_hub

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert from_hub._reachable("http://127.0.0.1:9") is False
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert from_hub._reachable("http://127.0.0.1:9") is True
