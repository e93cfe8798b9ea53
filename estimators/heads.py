"""The head with which a model is counted: what a family is trained with, or another that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from estimators.errors import InputError, shown
from estimators.head_names import HEADS
from estimators.models.model import Model

#: Families that are no causal language models -> the head that their formula has.
_OWN = {
    **dict.fromkeys(("bert", "distilbert", "roberta", "xlm-roberta"), "masked-lm"),
    **dict.fromkeys(("t5", "whisper"), "seq2seq-lm"),
    "vit": "image-classification",
}


#: The last model, what was asked of it, and the answer: many estimates of one model follow each other.
_LAST: list[tuple[Model, str, Model]] = []


def with_head(model: Model, head: str) -> Model:
    """The model with this head, and a note where it is not plain which is counted. ``head``: empty for the one that the
    family is trained with, one of :data:`HEADS`, or the name of a class of transformers. Raises :class:`InputError`."""
    if not (_LAST and _LAST[0][0] is model and _LAST[0][1] == head):
        _LAST[:] = [(model, head, _with(model, head))]
    return _LAST[0][2]


def _with(model: Model, head: str) -> Model:
    written = model.config is not None and not model.head and model.module is None
    if not head:
        said = _said(model.config) if written and model.config else ()
        return model._replace(notes=(*model.notes, *said)) if said else model
    if head not in HEADS and not (head.isidentifier() and head[0].isupper()):
        raise InputError(
            f"head={shown(head)} is not allowed; it is one of {', '.join(HEADS)} or a class of transformers, such as "
            "BertForMaskedLM"
        )
    model.known(f"head={shown(head)} is for a model with a configuration")
    if model.config is None or model.module is not None:
        raise InputError(
            f"head={shown(head)} is for a model with a configuration; of {model.name} the weights are known"
        )
    if written and head == _own(model.config):
        return model._replace(notes=(*model.notes, f"counted with its {_words(head)} head"))
    from estimators.traced.from_transformers import from_transformers, missing

    if missing():
        raise InputError(f"head={shown(head)}: transformers builds {model.name} with that head: {missing()}")
    built = from_transformers(model.config, model.name, head)
    aside = tuple(note for note in model.notes if not note.startswith("counted as"))
    return built._replace(notes=(*aside, *built.notes))


def _own(config: Mapping[str, Any]) -> str:
    return _OWN.get(str(config.get("model_type")), "causal-lm")


def _words(head: str) -> str:
    return {"causal-lm": "language model's", "masked-lm": "masked-language-model", "seq2seq-lm": "decoder's"}.get(
        head, head.replace("-", " ")
    )


def _said(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What is counted, where the configuration names a class with another head, or the family has several usual
    ones."""
    own = _own(config)
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    fits = not first or first.endswith((HEADS[own][1], "LMHeadModel", "ForPreTraining"))
    if fits and own in ("causal-lm", "seq2seq-lm"):
        return ()
    which = f", not as {first}" if first and not fits else ""
    return (f"counted with its {_words(own)} head{which}; --head changes it",)
