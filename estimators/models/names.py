"""Names as people have them: of tuned, quantised and renamed models, and what they are built as."""

from __future__ import annotations

import re
from typing import Any

#: Endings and middles that say how a model was tuned or stored, not how it is built.
_TUNED = re.compile(
    r"-(?:chat-v1\.0|instruct|chat|base|hf|it|pt|sft|dpo|preview|thinking|coder|math|1m|[48]k|128k|2[45]\d\d|v1\.1)(?=-|$)"
)
#: How weights are stored, where the name says it.
_STORED = re.compile(r"-(?:unsloth-)?(bnb-[48]bit|gptq|awq|gguf|int[48]|fp8|mlx|exl2)\b.*$")

#: Beginnings of names -> the published model, by the sizes that follow; what is not here keeps its name.
_RENAMED = (
    (re.compile(r"deepseek-r1-distill-llama-8b"), "llama-3.1-8b"),
    (re.compile(r"deepseek-r1-distill-llama-70b"), "llama-3.3-70b"),
    (re.compile(r"deepseek-r1-distill-qwen-(\d+(?:\.\d)?b)"), r"qwen2.5-\1"),
    (re.compile(r"deepseek-(?:r1|v3\.1|v3-0324|r1-0528)(?:-zero)?$"), "deepseek-v3"),
    (re.compile(r"vicuna-(7b|13b)-v1\.5(?:-16k)?"), r"llama-2-\1"),
    (re.compile(r"vicuna-(7b|13b)(?:-v1\.[0-3])?$"), r"llama-\1"),
    (re.compile(r"vicuna-33b"), "llama-30b"),
    (re.compile(r"(?:alpaca|wizardlm|guanaco)-(7b|13b|30b|65b)"), r"llama-\1"),
    (re.compile(r"zephyr-7b-(?:alpha|beta)"), "mistral-7b-v0.1"),
    (re.compile(r"openhermes-2(?:\.5)?-mistral-7b"), "mistral-7b-v0.1"),
    (re.compile(r"mistral-7b-v0\.2"), "mistral-7b-v0.1"),
    (re.compile(r"mixtral-(8x\d+b)-v0\.[13]"), r"mixtral-\1"),
    (re.compile(r"phi-3\.5-mini"), "phi-3-mini"),
    (re.compile(r"tinyllama(?:-1\.1b)?"), "tinyllama-1.1b"),
    (re.compile(r"llama-2-(7b|13b|70b)"), r"llama-2-\1"),
    (re.compile(r"codellama-(7b|13b|34b|70b)(?:-python)?"), r"codellama-\1"),
)  # fmt: skip
#: Renamed models that differ from what they are named after: fields that do.
_OTHERWISE: dict[str, dict[str, Any]] = {
    "deepseek-r1-distill-qwen-1.5b": {"tie_word_embeddings": False},
    "mistral-7b-v0.2": {"sliding_window": None},
    "phi-3-mini-128k": {"sliding_window": 262144},
    "phi-3-medium-128k": {"sliding_window": 131072},
    "phi-3.5-mini": {"sliding_window": 262144},
}


def plain_name(text: str) -> str:
    """A published name as the table spells it.

    >>> plain_name("meta-llama/Llama-3.1-8B-Instruct"), plain_name("google/gemma-2-9b-it")
    ('llama-3.1-8b', 'gemma-2-9b')
    >>> plain_name("mistralai/Mistral-7B-Instruct-v0.3"), plain_name("unsloth/Qwen2.5-Coder-7B-Instruct-bnb-4bit")
    ('mistral-7b-v0.3', 'qwen2.5-7b')
    """
    name = _spelt(text)
    for pattern, known in _RENAMED:
        found = pattern.match(name)
        if found:
            return found.expand(known)
    return name


def _spelt(text: str) -> str:
    name = text.strip().rstrip("/").rpartition("/")[2].lower().replace("_", "-").removeprefix("meta-")
    return _TUNED.sub("", _STORED.sub("", name))


def stored_as(text: str) -> str:
    """How the weights of a model of that name are stored; empty where the name does not say it.

    >>> stored_as("TheBloke/Llama-2-7B-GPTQ"), stored_as("gpt2")
    ('gptq', '')
    """
    found = _STORED.search(text.strip().rstrip("/").rpartition("/")[2].lower().replace("_", "-"))
    return found[1] if found else ""


def otherwise(text: str) -> dict[str, Any]:
    """Fields of the configuration in which the model differs from the one it is named after."""
    long = "-128k" if "-128k" in text.lower() else ""
    return _OTHERWISE.get(_spelt(text) + long, {})


def notes(text: str, name: str) -> tuple[str, ...]:
    """Sentences about a name that was taken for another."""
    stored, spelt = stored_as(text), _spelt(text)
    found = [] if spelt == name else [f"{text} is built as {name}"]
    if stored:
        found.append(
            f"weights stored as {stored} are priced in the dtype asked for; --lora 16 --quantised nf4 trains on 4 bits"
        )
    return tuple(found)
