"""Operations that only count: what each one allocates, and what autograd keeps of it for the backward pass.

A family writes its forward pass once, with these operations in place of torch's (``estimators/activations/`` has one
file per kind of family). Saved bytes, the peak of the forward pass and the peak of the backward pass all follow from
that one description, with adapters or without, in any dtype. Which tensors an operation saves is what
torch.autograd's ``derivatives.yaml`` says; a tensor that several operations save counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from estimators.activations.op import BOOL, INT64, Op, Tensor
from estimators.activations.scope import Parameter, Scope

if TYPE_CHECKING:
    from estimators.activations.step import Step


class Tape:
    """The operations of one segment of a model, from its input ``x`` to its output.

    ``item`` is the bytes of one element of activations; ``scope`` the segment's parameters: their dtypes, which of them
    train, and their adapters. On a ``cpu`` masks of dropout have the input's dtype, and operands of another dtype are
    converted in a copy. ``mm`` are the bytes of an element of matrix products: under ``autocast`` another dtype's, and
    its copies of weights that train are ``cached`` bytes.
    """

    __slots__ = (
        "autocast",
        "cached",
        "cpu",
        "float8",
        "held",
        "holds",
        "input_gradients",
        "item",
        "lora_dropout",
        "masked",
        "mm",
        "ops",
        "out",
        "outlives",
        "outputs",
        "pinned",
        "pins",
        "saves_quantised_input",
        "scope",
        "shared",
        "shares",
        "sources",
        "step",
        "trains",
        "x",
    )

    def __init__(self, step: Step, scope: Scope, x: Tensor) -> None:
        self.step = step
        #: What was gathered to be multiplied and is not saved, by ``id`` -> the part that is saved for it.
        self.sources: dict[int, Tensor] = {}
        self.cpu = step.cpu
        self.item = step.item
        self.autocast = bool(step.mixed)
        self.mm = step.mixed or step.item
        self.float8 = step.float8
        self.lora_dropout = step.lora_dropout
        self.saves_quantised_input = step.saves_quantised_input
        #: Whether the model's output lives until the backward pass is over.
        self.outputs = step.outputs
        self.cached = 0
        #: The words' embedding is told to require a gradient (enable_input_require_grads), trained or not.
        self.input_gradients = False
        self.scope = scope
        #: Whether attention is given a mask: sequences are packed, or longer than a window.
        self.masked = step.packed
        #: Whether any parameter of the segment trains: said of operations whose parameters are not looked up.
        self.trains = scope.trains
        self.ops: list[Op] = []
        #: Tensors that a variable of the forward pass keeps alive to its end, saved or not.
        self.held: list[Tensor] = []
        #: Operation, by its index -> tensors that a variable keeps alive up to it, though none after reads them.
        self.holds: dict[int, list[Tensor]] = {}
        #: Those of them that live until the backward pass is over.
        self.outlives: list[Tensor] = []
        #: Inputs that nodes of autograd keep as attributes, not as saved tensors: checkpointing and offload do not
        #: see them, and they go with the graph, when the backward pass is over.
        self.pinned: list[Tensor] = []
        self.pins = step.pins
        self.x = x
        self.out = x
        #: Tensors of earlier segments that this one may read, and those that it makes for later ones, by name.
        self.shared: dict[str, Tensor] = {}
        self.shares: dict[str, Tensor] = {}

    @property
    def elsewhere(self) -> set[int]:
        """Shared tensors, by ``id``: they outlive the segment, so its caller counts them."""
        return {id(t) for t in (*self.shared.values(), *self.shares.values())}

    @property
    def given(self) -> set[int]:
        """What is there before the first operation, by ``id``."""
        return {id(self.x), *(id(t) for t in self.shared.values())}

    @property
    def mask(self) -> int:
        """Elements of the mask that attention is given."""
        return self.step.mask(self.masked)

    @property
    def boundary(self) -> set[int]:
        """What other segments see, by ``id``."""
        return {id(self.x), id(self.out)} | self.elsewhere

    def tensor(self, numel: int, item: int | None = None) -> Tensor:
        """A tensor that needs no gradient and is there already: a mask, a table."""
        return Tensor(numel, item or self.item, requires=False)

    def op(
        self,
        ins: Sequence[Tensor],
        numel: int | None = None,
        item: int | None = None,
        *,
        saves: Sequence[Tensor] = (),
        saves_out: bool = False,
        gradients: int = 0,
        forward_tmp: int = 0,
        backward_tmp: int = 0,
        alias: bool = False,
        expands: bool = False,
        product: bool = False,
        beside: Sequence[Tensor] = (),
    ) -> Tensor:
        """An operation whose result is, unless said otherwise, like its first input. ``product``: a matrix product, or
        fused attention, which makes ``beside`` its result too."""
        requires = bool(gradients) or any(t.requires for t in ins)
        first = ins[0] if ins else self.x
        out = Tensor(first.numel if numel is None else numel, item or first.item, requires)
        saved = [t.stored for t in (*saves, *([out] if saves_out else []))] if requires else []
        self.ops.append(
            Op(ins, out, saved, gradients, forward_tmp, backward_tmp, alias, expands, (out, *beside) if product else ())
        )
        return out

    def hold(self, *tensors: Tensor) -> None:
        """Variables of a function that ends here held them until now."""
        self.holds.setdefault(len(self.ops) - 1, []).extend(tensors)

    # Tensor parallelism ------------------------------------------------------------------------------------------

    def gathered(self, x: Tensor) -> Tensor:
        """All tokens of ``x``, of which each rank has a part between layers: the input of column-parallel layers. Along
        the sequence's dimension torch copies what it has gathered; Megatron-LM, whose first dimension that is, does
        not."""
        tp = self.step.tp
        if tp == 1:
            return x
        whole, again = x.numel * tp, self.step.regather
        copied = whole * x.item * (not again)
        y = self.op([x], whole, forward_tmp=copied, backward_tmp=copied)
        if again:
            self.sources[id(y)] = x
        return y

    def scattered(self, x: Tensor) -> Tensor:
        """This rank's part of the sum over ranks of ``x``, a row-parallel layer's result."""
        tp = self.step.tp
        copied = x.nbytes * (not self.step.regather)
        return x if tp == 1 else self.op([x], x.numel // tp, forward_tmp=copied, backward_tmp=copied)

    # Arithmetic ------------------------------------------------------------------------------------------------

    def cast(self, x: Tensor, item: int) -> Tensor:
        """``x.to(dtype)``: ``x`` itself where it has that dtype."""
        return x if x.item == item else self.op([x], item=item)

    def copy(self, x: Tensor, numel: int | None = None) -> Tensor:
        """A copy or a multiple: saves nothing."""
        return self.op([x], numel)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        converted = self._converted(a, b)
        return self.op([a, b], item=max(a.item, b.item), alias=a.item == b.item, forward_tmp=converted)

    def view(self, x: Tensor) -> Tensor:
        """Another shape in the same memory. The gradient of what is summed next is an expanded one, which cannot be
        seen in the former shape without a copy."""
        out = Tensor(x.numel, x.item, x.requires, x.stored)
        self.ops.append(Op([x], out, [], 0, 0, 0, False, False, ()))
        return out

    def add_(self, a: Tensor, b: Tensor) -> Tensor:
        """In place: the result has the memory of ``a``."""
        out = Tensor(a.numel, a.item, a.requires or b.requires, a.stored)
        self.ops.append(Op([a, b], out, [], 0, 0, 0, True, False, ()))
        return out

    def _converted(self, a: Tensor, b: Tensor) -> int:
        """Bytes of the copy of the operand with the narrower dtype."""
        narrow, wide = sorted((a, b), key=lambda t: t.item)
        return narrow.numel * wide.item if self.cpu and narrow.item != wide.item else 0

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """Each factor is saved if the other needs a gradient; a smaller one is broadcast, and its gradient summed."""
        saves = [t for t, other in ((a, b), (b, a)) if other.requires]
        numel, item = max(a.numel, b.numel), max(a.item, b.item)
        tmp = sum(_beside(t, numel, item) for t in (a, b) if t.requires)
        return self.op([a, b], numel, item, saves=saves, backward_tmp=tmp, forward_tmp=self._converted(a, b))

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x.chunk(2)``: two views, whose gradients are copied into one tensor when both are there."""
        first, second = (Tensor(x.numel // 2, x.item, x.requires, x) for _ in range(2))
        self.ops.append(Op([x], first, [], 0, 0, 0, False, False, (), (second,)))
        return first, second

    def parameter(self, *shapes: tuple[int, ...], name: str = "") -> Parameter:
        """The next parameter of one of these shapes; where there is none, one as the others are."""
        return self.scope.take(*shapes, name=name) or Parameter(
            "", shapes[0], self.item, self.trains, "", None, self.trains
        )

    def weighted(self, x: Tensor, width: int, item: int | None = None) -> Tensor:
        """``x`` times a vector: saves ``x`` for the vector's gradient."""
        p = self.parameter((width,))
        item = item or max(x.item, p.item)
        tmp = x.numel * item * p.trains + _beside(x, x.numel, item) * x.requires
        return self.op(
            [x], item=item, saves=[x] if p.trains else [], gradients=width * p.item * p.trains, backward_tmp=tmp
        )

    def square(self, x: Tensor) -> Tensor:
        """``x.pow(2)``; backward computes ``grad * (2 * x.pow(1))``."""
        return self.op([x], saves=[x], backward_tmp=2 * x.nbytes)

    def sum(self, x: Tensor, numel: int) -> Tensor:
        """Down to ``numel`` elements; backward expands the gradient, which allocates nothing."""
        return self.op([x], numel, alias=True, expands=True)

    def mean(self, x: Tensor, width: int) -> Tensor:
        """Over the last dimension."""
        return self.op([x], x.numel // width)

    def root(self, x: Tensor) -> Tensor:
        """rsqrt, sqrt, tanh, sigmoid, softmax of a small tensor: the result is saved."""
        return self.op([x], saves_out=True)

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """One byte per element of mask; nothing at all where p is 0."""
        return self.op([x], saves=[self.tensor(x.numel, x.item if self.cpu else BOOL)]) if p else x

    # Layers ----------------------------------------------------------------------------------------------------

    def embedding(self, tokens: int, rows: int, width: int, *, tied: bool = False) -> Tensor:
        """Rows of a table; the gradient is dense. A tied one is added to the head's, which exists by then."""
        p = self.parameter((rows, width))
        nbytes = rows * width * p.item * p.trains
        source = Tensor(0, p.item, requires=p.trains)
        ids = self.tensor(tokens, INT64)
        first = not self.ops
        out = self.op(
            [source], tokens * width, p.item, saves=[ids], gradients=nbytes * (not tied), backward_tmp=nbytes * tied
        )
        out.requires = out.requires or (first and self.input_gradients)
        return out

    def activation(self, x: Tensor, kind: str) -> Tensor:
        """A nonlinearity by its name in transformers; raises KeyError for one that is not known."""
        if kind in _SAVES_INPUT:
            return self.op([x], saves=[x])
        if kind == "relu":
            return self.op([x], saves_out=True)
        if kind == "gelu_new":
            # 0.5 * x * (1 + tanh(√(2/π) * (x + 0.044715 * x³))), operation by operation
            half = self.copy(x)
            cube = self.op([x], saves=[x], backward_tmp=2 * x.nbytes)
            bent = self.root(self.copy(self.add(x, self.copy(cube))))
            return self.mul(half, self.copy(bent))
        raise KeyError(kind)


def _beside(t: Tensor, numel: int, item: int) -> int:
    """What a product's gradient with respect to ``t`` takes besides itself: it is made in the shape and dtype of the
    result, and then summed or cast."""
    made = numel * item
    if made == t.nbytes:
        return 0
    return made - t.nbytes if t.numel == numel else made


#: Nonlinearities that are one operation of torch, which saves its input.
_SAVES_INPUT = frozenset({"silu", "swish", "gelu", "gelu_pytorch_tanh"})
