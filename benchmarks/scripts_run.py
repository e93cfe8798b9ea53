"""One public script, run where there is no network: what ``benchmarks/scripts.py`` does in each of its processes.

Stand-ins of our own take the place of what the scripts fetch (a metric, a text corpus) and of three names that later
versions removed or renamed; models and data are local folders of the names that the scripts ask for. Written down are
the losses, as ``backward()`` was called on them, and who stepped.
"""

from __future__ import annotations

import json
import os
import pickle
import runpy
import sys
import traceback
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

WORDS, LENGTH = 60, 24


def run(script: str, arguments: list[str], environment: dict[str, str], log: str, result: str) -> None:
    """In a process of its own: ``script`` as ``python script *arguments``, its output in ``log``."""
    os.environ.update(environment)
    os.chdir(Path(script).parent)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *arguments]
    torch.set_num_threads(1)
    found: dict[str, Any] = {"losses": [], "stepped": {}, "code": 0}
    optimizers = _record(found)
    try:
        _stand_in()
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        found["code"] = end.code or 0
    except BaseException:
        traceback.print_exc()
        found["code"] = 1
    found["state"] = sum(_state_bytes(x) for x in optimizers)
    for_parent = json.dumps(found)
    Path(result).write_text(for_parent)
    sys.stdout.flush()
    os._exit(int(found["code"] != 0))  # process groups that the scripts leave open hold threads that abort the end


def _record(found: dict[str, Any]) -> list[Any]:
    """Losses and steps, from now on; the optimizers that stepped."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    backward, optimizers = torch.Tensor.backward, []

    def recorded(self: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        if self.numel() == 1:
            found["losses"].append(self.item())
        return backward(self, *arguments, **keywords)

    def stepped(optimizer: Any, *_: Any) -> None:
        name = f"memopt {optimizer.spec}" if hasattr(optimizer, "ledger") else type(optimizer).__name__
        found["stepped"][name] = found["stepped"].get(name, 0) + 1
        if not any(optimizer is one for one in optimizers):
            optimizers.append(optimizer)

    torch.Tensor.backward = recorded  # type: ignore[method-assign]
    register_optimizer_step_post_hook(stepped)
    return optimizers


def _state_bytes(optimizer: Any) -> int:
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return sum(x.nbytes for x in tensors if x.numel() > 1)


# What the scripts ask the network for -------------------------------------------------------------------------------


class Accuracy:
    """In the place of ``evaluate``'s metrics."""

    def __init__(self) -> None:
        self.right = self.all = 0

    def add_batch(self, predictions: Any, references: Any) -> None:
        self.right += int((torch.as_tensor(predictions) == torch.as_tensor(references)).sum())
        self.all += len(references)

    def compute(self, predictions: Any = (), references: Any = ()) -> dict[str, float]:
        self.add_batch(predictions, references)
        value = self.right / max(self.all, 1)
        self.__init__()  # type: ignore[misc]
        return {"accuracy": value, "f1": value}


class Corpus(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """In the place of Lightning's WikiText2: (tokens, the next tokens)."""

    vocab_size = WORDS

    def __init__(self) -> None:
        self.text = torch.tensor(text(4064 + LENGTH))

    def __len__(self) -> int:
        return len(self.text) - LENGTH

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.text[i : i + LENGTH], self.text[i + 1 : i + LENGTH + 1]


def _stand_in() -> None:
    import accelerate
    import transformers

    evaluate = types.ModuleType("evaluate")
    evaluate.load = lambda *_, **__: Accuracy()  # type: ignore[attr-defined]
    sys.modules["evaluate"] = evaluate
    transformers.utils.send_example_telemetry = lambda *_, **__: None
    if not hasattr(transformers.TrainingArguments, "overwrite_output_dir"):
        transformers.TrainingArguments.overwrite_output_dir = False
    if not hasattr(accelerate.DistributedType, "TPU"):
        accelerate.DistributedType.TPU = accelerate.DistributedType.XLA
    if "LIGHTNING" in os.environ:
        import lightning.pytorch.demos as demos

        demos.WikiText2 = Corpus
    if os.environ.get("DS_ACCELERATOR") == "cpu":  # its own collectives would be compiled first, a minute's work
        from importlib import import_module

        import_module("deepspeed.comm.torch").build_shm_op = lambda: None


# Local models and data ----------------------------------------------------------------------------------------------


def text(count: int) -> list[int]:
    """Words by number: each follows from the one before, but for one in five."""
    g = torch.Generator().manual_seed(0)
    random = torch.randint(WORDS, (count,), generator=g).tolist()
    told = (torch.rand(count, generator=g) < 0.8).tolist()
    found = [0]
    for i in range(1, count):
        found.append((found[-1] * 7 + 3) % WORDS if told[i] else random[i])
    return found


def prepare(folder: Path) -> None:
    """The models and data sets, under the names that the scripts ask for."""
    import numpy
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
        T5Config,
        T5ForConditionalGeneration,
    )

    special = ["<pad>", "<unk>", "<eos>", "positive", "negative"]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(WORDS))])}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing("$A <eos>", "$A <eos> $B <eos>", [("<eos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=64
    )
    torch.manual_seed(0)
    n = len(vocabulary)
    bert = BertConfig(
        vocab_size=n, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=64, initializer_range=0.2, hidden_dropout_prob=0.0,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=n, d_model=512, d_kv=16, d_ff=64, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    gpt2 = GPT2Config(
        vocab_size=n, n_positions=64, n_embd=128, n_layer=1, n_head=2, eos_token_id=2, bos_token_id=2, pad_token_id=0
    )
    for name, model in (
        ("bert-base-cased", BertForSequenceClassification(bert)),
        ("t5-base", T5ForConditionalGeneration(t5)),
        ("tiny-gpt2", GPT2LMHeadModel(gpt2)),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    words = [f"w{i}" for i in text(8192)]
    lines = [" ".join(words[i : i + LENGTH]) for i in range(0, len(words), LENGTH)]
    (folder / "text.txt").write_text("\n".join(lines[:240]))
    _json_lines(folder / "sft" / "train.jsonl", [{"text": line} for line in lines[:64]])
    pairs = [
        {"sentence1": a, "sentence2": b, "label": int(a[:3] != b[:3] and i % 8 != 0), "idx": i}
        for i, (a, b) in enumerate(pairwise(lines[:193]))
    ]
    _json_lines(folder / "glue" / "train.jsonl", pairs)
    _json_lines(folder / "glue" / "validation.jsonl", pairs[:16])
    files = "".join(f"  - split: {name}\n    path: {name}.jsonl\n" for name in ("train", "validation"))
    (folder / "glue" / "README.md").write_text(f"---\nconfigs:\n- config_name: mrpc\n  data_files:\n{files}---\n")
    phrases = [{"sentence": line, "label": "positive" if line < "w3" else "negative"} for line in lines]
    bank = folder / "temp" / "data" / "FinancialPhraseBank-v1.0"
    _json_lines(bank / "financial_phrase_bank_train.jsonl", phrases[:256])
    _json_lines(bank / "financial_phrase_bank_val.jsonl", phrases[256:272])
    (folder / "data" / "words").mkdir(parents=True)
    for name in ("train", "val"):
        numpy.array(text(8192), dtype=numpy.uint16).tofile(folder / "data" / "words" / f"{name}.bin")
    (folder / "data" / "words" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": WORDS}))


def _json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))
