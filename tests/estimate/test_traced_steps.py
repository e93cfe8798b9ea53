"""Traced steps of a type without a formula beside real ones: checkpointed, by policy too, and with PEFT's adapters."""

import pytest

from estimators import InputError, estimate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from estimators.measure import saved, traced  # noqa: E402

CONFIG = {
    "model_type": "helium",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "vocab_size": 300,
    "use_cache": False,
}
#: The bars of a traced step: saved bytes and the peak beside a real one.
SAVED, PEAK = 0.01, 0.05
BATCH, SEQ = 2, 64


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMOPT_CACHE", str(tmp_path))


def real_model():
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CONFIG)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def steps(model):
    """Saved bytes and the peak of a real step."""
    ids = torch.arange(BATCH * SEQ).reshape(BATCH, SEQ)
    box = {}

    def forward():
        box["loss"] = model(input_ids=ids, labels=ids).loss

    def backward():
        box.pop("loss").backward()

    forward(), backward(), model.zero_grad()
    return saved(model, lambda: model(input_ids=ids, labels=ids).loss).nbytes, traced(
        ("forward", forward), ("backward", backward)
    ).peak


def peak(ran):
    return max(ran.forward.activations, ran.loss.activations, sum(ran.backward))


@pytest.mark.parametrize("how", ["full", "selective"])
def test_checkpointed(how):
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    aten = torch.ops.aten
    kept = [aten.mm.default, aten.addmm.default, aten._scaled_dot_product_flash_attention_for_cpu.default]
    model, kwargs = real_model(), {"use_reentrant": False, "preserve_rng_state": False}
    if how == "selective":
        kwargs["context_fn"] = lambda: create_selective_checkpoint_contexts(kept)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    _, highest = steps(model)
    ran = estimate(CONFIG, "adamw", weights="fp32", seq=SEQ, batch=BATCH, device="cpu", checkpointing=how).activations
    assert peak(ran) == pytest.approx(highest, rel=PEAK)
    plain = estimate(CONFIG, "adamw", weights="fp32", seq=SEQ, batch=BATCH, device="cpu").activations
    assert peak(ran) < peak(plain)


@pytest.mark.parametrize("flags", [{}, {"lora_dropout": 0.1}, {"modules_to_save": "lm_head"}])
def test_with_adapters(flags):
    peft = pytest.importorskip("peft")
    made = {**flags, **({"modules_to_save": ["lm_head"]} if "modules_to_save" in flags else {})}
    model = peft.get_peft_model(real_model(), peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], **made))
    kept, highest = steps(model)
    e = estimate(
        CONFIG,
        "adamw",
        weights="fp32",
        seq=SEQ,
        batch=BATCH,
        device="cpu",
        lora=8,
        lora_targets="q_proj,v_proj",
        **flags,
    )
    assert e.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert e.activations.saved == pytest.approx(kept, rel=SAVED)
    assert peak(e.activations) == pytest.approx(highest, rel=PEAK)
    wrapped = estimate(model, "adamw", seq=SEQ, batch=BATCH, device="cpu")
    assert wrapped.trainable == e.trainable
    assert wrapped.activations.saved == e.activations.saved


def test_a_live_module_is_traced():
    e = estimate(real_model(), "adamw", seq=SEQ, batch=BATCH, device="cpu")
    plain = estimate(CONFIG, "adamw", weights="fp32", seq=SEQ, batch=BATCH, device="cpu")
    assert e.activations.saved == plain.activations.saved


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "helium"])
def test_gradients_that_are_added_up(kind, tied):
    """A second micro-batch: a large gradient is there beside the one that it is added to, and both halves of a table
    that is shared, and their sum."""
    config = {**CONFIG, "model_type": kind, "vocab_size": 8000, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).train()
    ids, box = torch.arange(32).reshape(2, 16), {}

    def forward():
        box["loss"] = model(input_ids=ids, labels=ids).loss

    def backward():
        box.pop("loss").backward()

    forward(), backward()
    real = traced(("forward", forward), ("backward", backward)).peak_of("backward")
    e = estimate(config, "adamw", weights="fp32", seq=16, batch=2, accumulate=2, device="cpu")
    assert e.activations.accumulated.activations == pytest.approx(real, rel=0.01)


def test_sizes_are_no_numbers_of_layers_and_a_part_of_a_model_is_a_module():
    from transformers.models.sam.modeling_sam import SamMaskDecoder, SamMaskDecoderConfig

    from estimators.models.from_config import from_config
    from estimators.traced.bounds import checked

    assert checked({"vocab_size_per_layer_input": 262_144}, "a configuration")
    with pytest.raises(InputError, match="is not allowed"):
        checked({"num_hidden_layers": 262_144}, "a configuration")
    with torch.device("meta"):
        part = SamMaskDecoder(SamMaskDecoderConfig())
    model = from_config({"model_type": "sam_mask_decoder"}, "a configuration")
    assert dict(model.shapes) == {name: tuple(p.shape) for name, p in part.named_parameters()}


def test_a_layer_that_runs_again_on_a_card_has_the_same_dropout():
    class Dropped(torch.nn.Linear):
        def forward(self, x):
            again = {"use_reentrant": False, "preserve_rng_state": False}
            return torch.utils.checkpoint.checkpoint(
                lambda y: torch.nn.functional.dropout(super(Dropped, self).forward(y), 0.1), x, **again
            )

    e = estimate(torch.nn.Sequential(torch.nn.Linear(8, 8), Dropped(8, 8)), inputs=torch.zeros(4, 8), device="cuda")
    assert e.activations is not None, e.without
