"""transformers' module of a configuration, on fake tensors: a shape for every weight, and no memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch

from estimators.errors import InputError, shown
from estimators.head_names import HEADS
from estimators.traced.bounds import checked, counted, offline
from estimators.traced.inputs.input_shape import read
from estimators.traced.step import Faked, fake_weights

#: transformers' tables of classes by type, in the order in which one is looked for: what a type is trained with. A
#: type that stands in none is built without a head.
TABLES = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MULTIMODAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "TEXT_TO_WAVEFORM",
    "MASKED_LM",
    "CAUSAL_LM",
    "CTC",
    "IMAGE_CLASSIFICATION",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION",
    "IMAGE_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "MASKED_IMAGE_MODELING",
    "TEXT_TO_SPECTROGRAM",
    "TIME_SERIES_PREDICTION",
    "SEQUENCE_CLASSIFICATION",
    "PRETRAINING",
)


def described(config: Mapping[str, Any], source: str, head: str = "") -> dict[str, Any]:
    """Names and shapes of the parameters, shared ones once; which of them do not train; bytes of the buffers; the
    class. Raises :class:`InputError`."""
    module, _ = _module(config, source, head)
    return {
        "shapes": [[name, list(p.shape)] for name, p in module.named_parameters()],
        "frozen": [name for name, p in module.named_parameters() if not p.requires_grad],
        "buffers": sum(prod(b.shape) * b.element_size() for b in module.buffers()),
        "class": type(module).__name__,
    }


def built(
    config: Mapping[str, Any],
    source: str,
    head: str = "",
    dtype: torch.dtype = torch.bfloat16,
    attention: str | None = None,
    prepare: Callable[[torch.nn.Module], torch.nn.Module] | None = None,
) -> tuple[torch.nn.Module, Faked]:
    """The module in training mode on fake tensors, and its fake mode. ``prepare`` is given it before: modules cannot be
    converted once their weights are fake. Raises :class:`InputError`."""
    module, faked = _module(config, source, head, dtype, attention, valued=True)
    if prepare is not None:
        module = prepare(module)
    fake_weights(module, faked)
    return module.train(), faked


def _module(
    config: Mapping[str, Any],
    source: str,
    head: str = "",
    dtype: torch.dtype = torch.bfloat16,
    attention: str | None = None,
    valued: bool = False,
) -> tuple[torch.nn.Module, Faked]:
    """The module as transformers makes it, on the meta device where that will do. ``valued``: the values of small
    buffers are needed."""
    made = configuration(config, source)
    cls = class_of(made, source, head)
    if "SequenceClassification" in cls.__name__ and getattr(made, "pad_token_id", None) is None:
        made.pad_token_id = 0  # the last token that is none is where a decoder's class is read
    parts = [made, *(read(made, name) for name in getattr(made, "sub_configs", ()))]
    for one in parts:
        if read(one, "use_cache"):
            one.use_cache = False  # as a trainer has it: nothing is generated
        if one is not None and read(made, "is_encoder_decoder"):
            for name in ("pad_token_id", "decoder_start_token_id"):  # labels are moved behind them
                if read(one, name) is None:
                    setattr(one, name, 0)
    arguments = {"attn_implementation": attention} if attention else {}
    faked = Faked()
    errors: list[Exception] = []
    for device in (torch.device("meta"), faked.on()):
        try:
            with quiet(), offline(), device, _no_init(), counted(source):
                module = made_of(cls, made, dtype, **arguments)
            if valued and not errors and _numbers(module):
                errors.append(ValueError("numbers among its buffers"))
                continue
            break
        except InputError:
            raise
        except Exception as error:  # on the meta device values are not known, under the fake mode some are
            errors.append(error)
    else:
        raise InputError(f"{source}: transformers does not build {cls.__name__}: {reason(errors[0])}")
    return module, faked


def _numbers(module: torch.nn.Module) -> bool:
    """Whether a step may look at numbers that a module keeps in its buffers, as strides and paddings."""
    return any(
        b.dim() == 0 and not b.is_floating_point() and not name.endswith("num_batches_tracked")
        for name, b in module.named_buffers()
    )


def made_of(cls: Any, config: Any, dtype: torch.dtype, **arguments: Any) -> torch.nn.Module:
    """The module of a class of transformers: a model, or a part of one, which is a plain module."""
    if not hasattr(cls, "_from_config"):
        part: torch.nn.Module = cls(config).to(dtype)
        if not hasattr(part, "config"):
            part.config = config
        return part
    module: torch.nn.Module = cls._from_config(config, dtype=dtype, **arguments)
    module.tie_weights()  # type: ignore[operator]
    return module


def configuration(config: Mapping[str, Any], source: str) -> Any:
    """transformers' configuration object. Raises :class:`InputError`."""
    try:
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError:
        raise InputError(f"{source}: transformers builds this model: pip install transformers") from None
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        from difflib import get_close_matches

        near = get_close_matches(str(kind)[:40], list(CONFIG_MAPPING.keys()), n=1)
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(f"{source}: model_type={shown(kind)} is not one that this transformers knows{guess}")
    given = checked(config, source)
    try:
        with quiet(), offline():
            made = AutoConfig.for_model(str(kind), **given)
        _filled(made)
        return made
    except Exception as error:
        raise InputError(f"{source}: transformers refuses the configuration: {reason(error)}") from None


def _filled(config: Any) -> None:
    """Heads that a configuration leaves out are what most classes of transformers make of them; some do not."""
    for one in (config, *(read(config, name) for name in getattr(config, "sub_configs", ()))):
        heads, width = read(one, "num_attention_heads"), read(one, "hidden_size")
        if not (isinstance(heads, int) and isinstance(width, int) and heads):
            continue
        for name, value in (("num_key_value_heads", heads), ("head_dim", width // heads)):
            if read(one, name, 0) is None:
                setattr(one, name, value)


def class_of(config: Any, source: str, head: str = "") -> Any:
    """The class that is built: ``head`` (a class or one of :data:`estimators.head_names.HEADS`), what the configuration
    names, or the type's in :data:`TABLES`."""
    import transformers

    if head in HEADS:
        table = HEADS[head][0]
        found = _listed(config, f"MODEL_FOR_{table}_MAPPING" if table else "MODEL_MAPPING")
        if found is None:
            raise InputError(f"{source}: transformers has no {config.model_type} with head={shown(head)}")
        return found
    named = [head] if head else [str(name) for name in getattr(config, "architectures", None) or ()]
    for name in named:
        cls = getattr(transformers, name, None) if name.isidentifier() else None
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            if not head and not isinstance(config, cls.config_class or ()):
                continue
            return cls
        if head:
            cls = class_of(config, source)
            if cls.__name__ != head:
                raise InputError(f"head={shown(head)} is no model class of transformers")
            return cls
    for table in (*(f"MODEL_FOR_{name}_MAPPING" for name in TABLES), "MODEL_MAPPING"):
        if table == "MODEL_FOR_MASKED_LM_MAPPING" and getattr(config, "is_decoder", False):
            continue
        cls = _listed(config, table)
        if cls is not None:
            return cls
    found = _beside(config)
    if found is not None:
        return found
    raise InputError(f"{source}: transformers has a configuration for {config.model_type}, and no model")


def _listed(config: Any, table: str) -> Any:
    """The class that one of transformers' tables has for this configuration, or None."""
    from transformers.models.auto import modeling_auto

    mapping = getattr(modeling_auto, table, None)
    cls = None if mapping is None else mapping.get(type(config), None)
    return cls[0] if isinstance(cls, (tuple, list)) else cls


def _beside(config: Any) -> Any:
    """A part's class, which no table lists: the model beside the configuration that takes it, else the plain module
    that is named as the configuration is."""
    from importlib import import_module
    from pkgutil import iter_modules

    import transformers

    package = import_module(type(config).__module__.rpartition(".")[0])
    stem = type(config).__name__.removesuffix("Config")
    models, parts = [], []
    for found in iter_modules(package.__path__):
        if not found.name.startswith("modeling_"):
            continue
        try:
            module = import_module(f"{package.__name__}.{found.name}")
        except ImportError:
            continue
        own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
        models += [
            cls
            for cls in own
            if issubclass(cls, transformers.PreTrainedModel)
            and cls.config_class is type(config)
            and not cls.__name__.endswith("PreTrainedModel")
        ]
        parts += [
            cls
            for cls in own
            if issubclass(cls, torch.nn.Module)
            and cls.__name__.startswith(stem)
            and cls.__init__.__annotations__.get("config") in (type(config), type(config).__name__)
        ]
    best = [cls for cls in models if cls.__name__ in (f"{stem}Model", stem)]
    return next(iter((*best, *models, *sorted(parts, key=lambda cls: len(cls.__name__)))), None)


@contextmanager
def _no_init() -> Iterator[None]:
    from importlib import import_module

    try:
        module: Any = import_module("transformers.initialization")
    except ImportError:  # before transformers 5
        module = import_module("transformers.modeling_utils")
    with module.no_init_weights():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """What transformers and torch's fake tensors say while they look for a way is not for the reader of an estimate."""
    loggers = [logging.getLogger(name) for name in ("transformers", "torch._subclasses.fake_tensor")]
    before = [(one, one.level) for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in before:
            one.setLevel(level)


def reason(error: BaseException) -> str:
    """An exception as part of a sentence."""
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "a part of it is named as a model of the Hub, and nothing is looked up there"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
