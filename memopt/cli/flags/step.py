"""The flags that say how a step is trained: ``memopt estimate`` and ``memopt plan`` take the same."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any, NamedTuple


class Flag(NamedTuple):
    """``kind``: ``text``, ``number``, ``share`` (from 0 to 1) or ``switch``."""

    name: str
    kind: str
    metavar: str
    help: str


FLAGS = (
    Flag("batch", "number", "N", "sequences of a micro-batch (default 1)"),
    Flag("accumulate", "number", "N", "micro-batches per step (default 1)"),
    Flag(
        "checkpointing",
        "text",
        "HOW",
        "none (default), full, selective (products are kept), selective-2 (every second one is) or every-K "
        "(layers: every-2 is half of them)",
    ),
    Flag("attention", "text", "KIND", "sdpa (default), flash or eager"),
    Flag("packed", "switch", "", "a row of --seq tokens is several sequences (TRL's packing)"),
    Flag("loss", "text", "KIND", "full (default), chunked (TRL, cut cross entropy) or fused (Liger)"),
    Flag(
        "outputs",
        "text",
        "HOW",
        "dropped (default: Trainer) or kept: the logits live through the backward pass",
    ),
    Flag("lora", "number", "RANK", "adapters (PEFT's LoRA), the weights frozen"),
    Flag("lora_targets", "text", "NAMES", "all-linear (default), attention, default (PEFT's) or q_proj,v_proj,…"),
    Flag("lora_dtype", "text", "DTYPE", "of the adapters: fp32 (PEFT's default), bf16 or fp16"),
    Flag("lora_dropout", "share", "P", "dropout before the adapters (default 0)"),
    Flag("lora_kind", "text", "KIND", "lora (default), rslora or dora"),
    Flag("modules_to_save", "text", "NAMES", "modules of which a copy trains, as PEFT's modules_to_save"),
    Flag("quantised", "text", "KIND", "storage of the weights under adapters: nf4, nf4-double, int8 or gptq"),
    Flag(
        "kbit_prepare",
        "text",
        "yes|no",
        "PEFT's prepare_model_for_kbit_training: the rest in fp32 (default yes for nf4 and int8)",
    ),
    Flag("frozen", "text", "PATTERNS", "parameters that do not train: names, or patterns such as model.layers.1?.*"),
    Flag("train", "text", "PATTERNS", "parameters that do; the others do not"),
    Flag("release_gradients", "switch", "", "each parameter steps in the backward pass and frees its gradient"),
    Flag("mixed", "text", "DTYPE", "bf16 or fp16: computed in it, weights in fp32 unless --lora and --weights"),
    Flag("offload_activations", "switch", "", "what layers save goes to the host (torchtune, TRL)"),
    Flag("offload_params", "switch", "", "weights, gradients and state live on the host (FSDP2, DeepSpeed)"),
    Flag("compile", "switch", "", "torch.compile: figures are those of eager mode, and there is no verdict"),
    Flag("float8", "switch", "", "torchao's float8 training of linear layers"),
    Flag("head", "text", "KIND", "counted with: causal-lm, masked-lm, classification, none … or a transformers class"),
    Flag(
        "reference_model",
        "text",
        "same|MODEL",
        "preference training's second, frozen model",
    ),
    Flag("tp", "number", "N", "tensor parallelism, with sequences cut between layers (default 1)"),
    Flag("pp", "number", "N", "pipeline stages; --accumulate is the micro-batches of a step, --batch one of them"),
    Flag("schedule", "text", "NAME", "of the pipeline: 1f1b (default), gpipe or interleaved-V (V chunks a rank)"),
    Flag("cp", "number", "N", "context parallelism: ranks that share each sequence"),
    Flag("ep", "number", "N", "expert parallelism: of the data-parallel ranks, those that share the experts"),
    Flag("replicas", "number", "N", "HSDP: copies of what /zero2 or /zero3 shards, among the --world ranks"),
    Flag("regather", "switch", "", "--tp as Megatron-LM: inputs are gathered again in backward, not saved"),
    Flag("alloc_conf", "text", "CONF", "PYTORCH_ALLOC_CONF, such as expandable_segments:True"),
    Flag("versions", "text", "NAME=N,…", "older torch, transformers or bitsandbytes, where they take more memory"),
    Flag("deepspeed", "switch", "", "DeepSpeed runs the step; the spec's /zero1, /zero2 or /zero3 is its stage"),
    Flag("bucket", "number", "N", "elements of DeepSpeed's reduce bucket (default 500000000)"),
)
NAMES = tuple(flag.name for flag in FLAGS)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--seq", metavar="N", help="tokens of each sequence: activations are counted")
    for flag in FLAGS:
        name = f"--{flag.name.replace('_', '-')}"
        if flag.kind == "switch":
            parser.add_argument(name, action="store_true", default=None, help=flag.help)
        else:
            parser.add_argument(name, metavar=flag.metavar, help=flag.help)


def given(args: Namespace) -> dict[str, Any]:
    """The keywords of :func:`estimators.estimate` from the flags that were given."""
    options: dict[str, Any] = {}
    if args.seq is not None:
        options["seq"] = whole(args.seq, "--seq")
    for flag in FLAGS:
        text = getattr(args, flag.name)
        if text is None:
            continue
        name = f"--{flag.name.replace('_', '-')}"
        options[flag.name] = {"number": whole, "share": share}.get(flag.kind, lambda value, _: value)(text, name)
    return options


def whole(text: str, what: str) -> int:
    """A whole number from the command line."""
    from estimators.errors import InputError, shown

    if not (text.isascii() and text.isdigit()) or len(text) > 18 or not int(text):
        raise InputError(f"{what} {shown(text)} is not allowed; it is a whole number >= 1")
    return int(text)


def share(text: str, what: str) -> float:
    """A number from 0 to 1 from the command line."""
    from estimators.errors import InputError, shown

    digits = text.replace(".", "", 1)
    if not (digits.isascii() and digits.isdigit()) or len(text) > 18:
        raise InputError(f"{what} {shown(text)} is not allowed; it is a number from 0 to 1")
    return float(text)
