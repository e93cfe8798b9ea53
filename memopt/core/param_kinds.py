"""What a parameter is for, as far as its name and its module say it: rules of matrices take hidden matrices alone.

An embedding and an output head are matrices too, and nothing fails where they are stepped as such: the model is only
worse. So they are told apart by what their module is where a model is at hand, and by names as models have them.
"""

# Without `from __future__ import annotations`, and without torch: prices are made of names and shapes alone.
import re
from collections.abc import Iterable, Mapping
from typing import Any

from memopt.core.param_names import clean_names

#: What a name says, and the parts of it between dots that say so, in the order in which they are looked for. Compiled
#: when the first name is looked at: four milliseconds, which whoever only asks for a price need not wait for.
_NAMES = {
    "an output head": r"(?:^|\.)(?:[a-z]+_head|head|heads|classifier|classifiers|score|qa_outputs|unembed|embed_out|"
    r"proj_out|predictions|logits|to_logits|vocab_proj)\.|^(?:model\.|transformer\.)?(?:output|fc)\.weight$",
    "an embedding": r"embed(?!_out)|\bw[tp]e\b|rel_pos|relative_attention_bias|^(?:model\.)?shared\.|codebook",
    "a gate": r"(?:^|\.)(?:gate|router|wg|shared_expert_gate|switch)\.(?:weight$|classifier\.|linear\.)",
    "a norm": r"norm\w*\.\w+$|(?:^|\.)ln_?\w*\.\w+$",
}
#: By the names of a module's classes, its own and those it is derived from.
_MODULES = {
    "Embedding": "an embedding",
    "EmbeddingBag": "an embedding",
    "_NormBase": "a norm",
    "GroupNorm": "a norm",
    "LayerNorm": "a norm",
    "RMSNorm": "a norm",
}


def kind_of_name(name: str) -> str:
    """What a name says of its parameter: ``"an embedding"``, ``"an output head"``, ``"a gate"``, ``"a norm"``, or "".

    >>> [kind_of_name(n) for n in ("model.embed_tokens.weight", "lm_head.weight", "h.0.mlp.gate.weight", "h.0.mlp.w1")]
    ['an embedding', 'an output head', 'a gate', '']
    """
    for kind, pattern in _NAMES.items():
        if re.search(pattern, name):
            return kind
    return ""


def kinds(model: Any) -> dict[str, str]:
    """Parameter name -> what its module says that it is, of those of which a module says something.

    Args:
        model: A ``torch.nn.Module``; what is no module says nothing.
    """
    if not hasattr(model, "named_modules") or not hasattr(model, "named_parameters"):
        return {}
    found: dict[int, str] = {}
    vocabularies = set()
    modules = [module for _, module in model.named_modules()]
    for module in modules:
        kind = _kind_of_module(module)
        if kind:
            found.update({id(p): kind for p in module.parameters(recurse=False)})
        if kind == "an embedding":
            vocabularies.add(getattr(module, "num_embeddings", None))
    head = getattr(model, "get_output_embeddings", None)
    heads = [head()] if callable(head) else []
    # Without a word from the model: the last matrix that goes from hidden states to a vocabulary.
    linear = [m for m in modules if getattr(m, "out_features", None) is not None and hasattr(m, "weight")]
    heads += [m for m in linear[-1:] if m.out_features in vocabularies]
    for module in heads:
        weight = getattr(module, "weight", None)
        if weight is not None:
            found.setdefault(id(weight), "an output head")
    named = list(model.named_parameters())
    names = clean_names(name for name, _ in named)
    return {name: found[id(p)] for name, (_, p) in zip(names, named, strict=True) if id(p) in found}


def _kind_of_module(module: Any) -> str:
    classes = [kind.__name__ for kind in type(module).__mro__]
    if classes[0].endswith("Norm"):
        return "a norm"
    return next((_MODULES[name] for name in classes if name in _MODULES), "")


def looks_like_vocabulary(shape: tuple[int, ...]) -> bool:
    """Whether a matrix has the proportions of an embedding or a head, whatever its name.

    >>> looks_like_vocabulary((32000, 512)), looks_like_vocabulary((4096, 14336))
    (True, False)
    """
    return len(shape) == 2 and max(shape) >= 8192 and max(shape) >= 8 * min(shape)


def some(names: Iterable[str]) -> str:
    """The first of these names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def kind_of(name: str, stated: Mapping[str, str]) -> str:
    """What the module says of a parameter, else what its name says."""
    return stated.get(name) or kind_of_name(name)
