"""The calculator: shapes against transformers' own modules, bytes against memopt.price, peaks, and bad input."""

import pkgutil
import subprocess
import sys
from math import prod

import pytest

import estimators
import memopt
from estimators import InputError, estimate, resolve
from estimators.hardware import GPUS, capacity
from estimators.memory.memory_row import PHASES, Row, peak
from estimators.models.families import FAMILIES
from estimators.models.published import KNOWN
from estimators.result import Column
from estimators.units import gib
from tests.helpers.cases import MASTERED, sampled

GIB = 2**30

#: What the authors publish (model cards, or the totals of their safetensors files).
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b-v0.1": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-9b": 9_241_705_984,
    "phi-2": 2_779_683_840,
    "phi-3-mini": 3_821_079_552,
    "gpt2": 124_439_808,
    "pythia-6.9b": 6_857_302_016,
    "gpt-j-6b": 6_050_882_784,
    "gpt-oss-20b": 20_914_757_184,
    # 671,026,419,200 in the files, of which 58 x 256 router biases are buffers in transformers 5.
    "deepseek-v3": 671_026_419_200 - 58 * 256,
    "t5-3b": 2_851_598_336,
    "whisper-large-v2": 1_543_304_960,
}


def parameters(model):
    return sum(prod(shape) for _, shape in resolve(model).shapes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert estimate(name).parameters == PUBLISHED[name]


def test_at_least_forty_architectures_of_every_family():
    assert len(KNOWN) >= 40
    # ministral3, gpt_bigcode, glm4, granite and olmo3 are read from a config.json only.
    named = {config["model_type"] for config in KNOWN.values()}
    assert set(FAMILIES) - named == {"ministral3", "gpt_bigcode", "glm4", "granite", "olmo3"}


def test_the_largest_model_is_priced_in_less_than_100_ms():
    import time

    resolve("deepseek-v3")  # the first call imports
    times = []
    for _ in range(5):
        start = time.process_time()
        estimate("deepseek-v3", "adamw-8bit")
        times.append(time.process_time() - start)
    assert min(times) < 0.1


class TestCounts:
    @pytest.mark.parametrize("n", [1, 2, 63, 64, 4095, 4096, 4097, 123_456_789, 8_000_000_000, 10**15])
    def test_a_count_is_met_exactly(self, n):
        assert parameters(n) == n
        assert resolve(n).provenance == "assumed"

    @pytest.mark.parametrize(
        ("text", "n"), [("8B", 8 * 10**9), ("1.5b", 1_500_000_000), (" 350M ", 350 * 10**6), ("0.5T", 5 * 10**11)]
    )
    def test_spellings(self, text, n):
        assert estimate(text).parameters == n

    @pytest.mark.parametrize(
        "bad", [0, -1, 10**16, pytest.param(10**5000, id="huge"), "0B", "9999T", True, 1.5, None, [], b"8B"]
    )
    def test_refused(self, bad):
        with pytest.raises(InputError):
            estimate(bad)


class TestNames:
    @pytest.mark.parametrize(
        "name", ["meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B", "LLAMA_3.1_8b", "llama-3.1-8b"]
    )
    def test_spellings(self, name):
        assert estimate(name).parameters == PUBLISHED["llama-3.1-8b"]

    def test_unknown_suggests_the_nearest(self):
        with pytest.raises(InputError, match=r"'lama-3\.1-8b'.*nearest names: llama-3\.1-8b"):
            resolve("lama-3.1-8b")

    def test_tied_embeddings_count_once(self):
        tied, untied = dict(KNOWN["qwen3-0.6b"]), {**KNOWN["qwen3-0.6b"], "tie_word_embeddings": False}
        assert parameters(untied) - parameters(tied) == tied["vocab_size"] * tied["hidden_size"]


class TestState:
    """State is memopt.price's and nothing else."""

    @pytest.mark.parametrize("spec", sampled(4) + MASTERED)
    def test_every_spec_is_the_price_of_every_tensor(self, spec):
        model = resolve("smollm2-135m")
        hyper = {"momentum": 0.9} if spec.startswith("sgd") else {}
        column = estimate(model, spec, world_size=3, **hyper)[spec]
        fullest = max(
            memopt.price(model.shapes, spec, world_size=3, rank=r, device="cuda", **hyper).nbytes for r in range(3)
        )
        assert column.nbytes("state") == fullest

    @pytest.mark.parametrize("model", ["mixtral-8x7b", "whisper-tiny", "gpt2", "vit-base-patch16-224", "1B"])
    def test_other_models(self, model):
        shapes = [(n, s) for n, s in resolve(model).shapes if n not in resolve(model).frozen]
        for spec in ("adamw", "adamw-8bit", "adafactor", "came-4bit"):
            assert estimate(model, spec)[spec].nbytes("state") == memopt.price(shapes, spec).nbytes

    def test_shared_tables_of_a_foreign_engine_count_once(self):
        shapes = resolve("smollm2-135m").shapes
        spec = memopt.parse("adamw-8bit", engine="bitsandbytes")
        assert estimate("smollm2-135m", spec).columns[0].nbytes("state") == memopt.price(shapes, spec).nbytes

    def test_overrides_price_every_parameter_by_its_name(self):
        overrides = {"*embed*": "32bit", "*.0.*": "4bit"}
        shapes = resolve("smollm2-135m").shapes
        expected = memopt.price(shapes, "adamw-8bit", overrides=overrides).nbytes
        assert estimate("smollm2-135m", "adamw-8bit", overrides=overrides).columns[0].nbytes("state") == expected

    def test_hyperparameters_reach_the_rule(self):
        plain, momentum = (estimate("gpt2", "sgd", momentum=m)["sgd"].nbytes("state") for m in (0.0, 0.9))
        assert momentum - plain == 4 * 124_439_808

    def test_paged_state_is_pageable_and_step_counters_are_on_the_host(self):
        tiers = {(row.detail, row.tier) for row in estimate("gpt2", "adamw@paged").rows if row.what == "state"}
        assert tiers == {("exp_avg", "pageable"), ("exp_avg_sq", "pageable"), ("step", "host")}

    def test_frozen_parameters_have_neither_gradients_nor_state(self):
        e = estimate("whisper-tiny", "adamw")
        frozen = 1500 * 384
        assert e.parameters - e.trainable == frozen
        assert e["adamw"].nbytes("weights") - e["adamw"].nbytes("gradients") == 2 * frozen


class TestPeak:
    def test_it_is_the_maximum_over_phases_and_never_a_sum_of_maxima(self):
        rows = [
            Row("s", "weights", "", 10, "GPU", PHASES, "exact"),
            Row("s", "load only", "", 5, "GPU", ("load",), "exact"),
            Row("s", "backward only", "", 7, "GPU", ("backward",), "exact"),
            Row("s", "step only", "", 6, "GPU", ("step",), "exact"),
        ]
        assert peak("s", rows) == ("s", "backward", 17, 0, 0)
        assert peak("s", rows[:3]).phase == "backward"
        assert peak("s", rows[:2]).phase == "load"

    def test_pageable_bytes_choose_the_phase_but_are_not_fixed_gpu_memory(self):
        rows = [
            Row("s", "weights", "", 10, "GPU", PHASES, "exact"),
            Row("s", "gradients", "", 3, "GPU", ("backward",), "exact"),
            Row("s", "state", "", 9, "pageable", ("step",), "exact"),
            Row("s", "state", "", 2, "pinned", ("step",), "exact"),
            Row("s", "state", "", 4, "disk", ("step",), "exact"),
        ]
        assert peak("s", rows) == ("s", "step", 10, 9, 2)

    def test_fit_over_and_paging(self):
        rows = [Row("s", "w", "", 10, "GPU", PHASES, ""), Row("s", "state", "", 5, "pageable", PHASES, "")]
        column = Column("s", rows)
        assert (column.over(9), column.over(10)) == (1, 0)
        assert [column.paged_out(gpu) for gpu in (9, 10, 12, 15, 20)] == [5, 5, 3, 0, 0]

    def test_the_peak_of_several_specs_is_the_lowest_and_names_it(self):
        e = estimate("8B", ["adamw", "adamw-8bit", "adamw-4bit"])
        assert e.peak.spec == "adamw-4bit"
        assert e.peak.nbytes == min(c.peak.nbytes for c in e.columns)

    def test_weights_gradients_and_state_add_up(self):
        e = estimate("8B", "adamw", weights="fp32", gradients="bf16")
        assert e.peak.nbytes == (4 + 2 + 8) * 8 * 10**9
        assert e.peak.phase == "step"

    def test_fits_is_said_of_what_it_takes_at_most(self):
        given = {"seq": 128, "batch": 1}
        column = estimate("gpt2", "adamw-8bit", **given).columns[0]
        high, expected = column.process.high, column.process.expected
        assert column.allocated.expected <= column.reserved.expected <= expected == column.peak.nbytes < high
        assert estimate("gpt2", "adamw-8bit", **given).fits is None
        assert estimate("gpt2", "adamw-8bit", gpu=high, **given).fits is True
        for gpu, verdict in ((high, "FITS"), (high - 1, "TIGHT"), (expected, "TIGHT"), (expected - 1, "over")):
            e = estimate("gpt2", "adamw-8bit", gpu=gpu, **given)
            assert e.verdict(e.columns[0]) == verdict
            assert e.fits is (verdict == "FITS")
        assert estimate("gpt2", ["adamw", "adamw-8bit"], gpu=high, **given).fits is True

    def test_no_verdict_without_activations(self):
        need = estimate("gpt2", "adamw-8bit").peak.nbytes
        assert estimate("gpt2", "adamw-8bit", gpu=2**40).fits is None
        assert estimate("8B", "adamw-8bit", gpu=2**40, seq=128).fits is None
        e = estimate("gpt2", ["adamw", "adamw-8bit"], gpu=need)
        assert [e.verdict(c) for c in e.columns] == ["over", ""]
        assert e.fits is None
        assert estimate("gpt2", "adamw-8bit", gpu=need - 1).fits is False


class TestArguments:
    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ({"world_size": 0}, "world_size=0"),
            ({"world_size": 2.0}, "world_size=2.0"),
            ({"world_size": True}, "world_size=True"),
            ({"weights": "int3"}, "weights='int3'"),
            ({"gradients": "fp64"}, "gradients='fp64'"),
            ({"gpu": "24"}, "24GiB"),
            ({"gpu": "rtx-9999"}, "rtx-9999"),
            ({"gpu": 0}, "gpu=0"),
            ({"gpu": "-3GiB"}, "-3GiB"),
            ({"spec": []}, "no spec"),
            ({"spec": "adamw-3bit"}, "3bit"),
            ({"spec": ["adamw", 7]}, "int"),
            ({"momentum": 0.9}, "adamw has no hyperparameter 'momentum'"),
        ],
    )
    def test_refused_by_name(self, given, sentence):
        with pytest.raises(ValueError, match=sentence):
            estimate("8B", **{"spec": "adamw", **given})

    def test_repeated_specs_count_once(self):
        columns = estimate("gpt2", ["adamw8bit", "adamw-8bit", "adamw"]).columns
        assert [column.spec for column in columns] == ["adamw-8bit", "adamw"]

    def test_cards(self):
        assert len(GPUS) >= 25
        assert capacity("NVIDIA GeForce RTX 4090") == capacity("rtx4090") == 24564 * 2**20
        assert capacity("1.5 GiB") == 3 * GIB // 2
        assert capacity("24GB") == 24 * 10**9

    def test_gib_is_always_spelled(self):
        for nbytes in (0, 1, 10**4, 10**6, 10**8, 10**9, 10**11, 10**13, 10**16):
            assert gib(nbytes).split()[-1] in ("GiB", "KiB", "TiB", "bytes")


def test_torch_is_not_imported():
    code = "import sys, estimators; estimators.estimate('gpt2', ['adamw', 'adafactor']); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_public_names_are_not_hidden_by_a_module_of_that_name():
    """Importing a submodule sets it as an attribute of its package."""
    for module in pkgutil.iter_modules(estimators.__path__):
        assert module.name not in estimators.__all__


def test_public_names():
    assert sorted(estimators.__all__) == sorted(estimators._PUBLIC)
    assert all(hasattr(estimators, name) for name in estimators.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        estimators.nothing  # noqa: B018
