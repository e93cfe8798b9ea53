"""What older versions of libraries did otherwise, as far as it takes memory.

| before | what | source |
|---|---|---|
| torch 1.13 | all of torch's kernels are loaded with the context | torch/cuda/__init__.py, CUDA_MODULE_LOADING |
| torch 2.0 | ``zero_grad`` leaves zeros, so gradients stay from step to step | release notes of 2.0: ``set_to_none`` |
| transformers 4.49 | the loss copies the logits without their last token | huggingface/transformers pull 35646 |
| transformers 5.0 | checkpointing runs the first forward pass without autograd | huggingface/transformers pull 43203 |
| bitsandbytes 0.43.2 | the product with a 4-bit weight saves its input | bitsandbytes pull 1270 |
"""

# No ``from __future__ import annotations`` here: typing.NamedTuple compiles every annotation that is a string.

from typing import NamedTuple

from estimators.errors import InputError, shown

KNOWN = ("torch", "transformers", "bitsandbytes")
Version = tuple[int, ...]
_NEW: Version = (10**6,)


class Versions(NamedTuple):
    """Of each library; the newest where it is not said."""

    torch: Version = _NEW
    transformers: Version = _NEW
    bitsandbytes: Version = _NEW

    @property
    def loads_all_kernels(self) -> bool:
        return self.torch < (1, 13)

    @property
    def keeps_gradients(self) -> bool:
        return self.torch < (2, 0)

    @property
    def copies_logits(self) -> bool:
        return self.transformers < (4, 49)

    @property
    def checkpoints_reentrantly(self) -> bool:
        return self.transformers < (5,)

    @property
    def saves_quantised_input(self) -> bool:
        return self.bitsandbytes < (0, 43, 2)


def parsed(text: str) -> Versions:
    """Versions of ``torch=1.12,bitsandbytes=0.41.1``. Raises :class:`InputError`.

    >>> parsed("torch=1.12").keeps_gradients, parsed("").keeps_gradients
    (True, False)
    """
    found = Versions()
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = (p.strip() for p in part.partition("="))
        numbers = value.partition("+")[0].split(".")
        if name not in KNOWN or not all(n.isascii() and n.isdigit() and len(n) < 7 for n in numbers):
            raise InputError(
                f"versions={shown(part)} is not allowed; it is {', '.join(KNOWN)} with a number, such as "
                "torch=1.12,bitsandbytes=0.41.1"
            )
        found = found._replace(**{name: tuple(map(int, numbers))})
    return found
