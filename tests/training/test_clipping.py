"""One norm over gradients that are whole, cut over a mesh, empty, in several dtypes; nothing of their size is made."""

from math import inf

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import memopt
from memopt.core.hyperparameters import SpecError
from memopt.training.clip import grad_norm
from tests.helpers import ranks


def parameters(scale=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(s, dtype=dtype)) for s in [(7, 33), (40,), (), (0, 5), (3, 4, 5)]]
    for p in params[:-1]:
        p.grad = (torch.randn(p.shape, generator=g) * scale).to(dtype)
    return params  # the last has no gradient


@pytest.mark.parametrize("norm_type", [2.0, 1, 3.5, inf])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_it_is_torchs_norm_and_torchs_clipping(norm_type, max_norm):
    ours, theirs = parameters(), parameters()
    full = [p for p in theirs if p.numel()]  # torch's has no largest element of nothing
    expected = nn.utils.clip_grad_norm_(full, max_norm, norm_type)
    norm = memopt.clip_grad_norm_(ours, max_norm, norm_type)
    torch.testing.assert_close(norm, expected)
    for p, q in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-6, atol=0)
    assert ours[-1].grad is None


def test_optimizers_models_and_parameters_are_taken():
    model = nn.Linear(4, 3)
    model(torch.ones(2, 4)).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    for what in (model, memopt.create(model, "adamw"), model.parameters(), list(model.parameters())):
        torch.testing.assert_close(grad_norm(what), expected)
    torch.testing.assert_close(grad_norm(model.weight), model.weight.grad.norm())
    assert grad_norm(nn.Linear(2, 2)) == 0


def test_the_norm_of_16_bit_gradients_is_exact():
    p = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 0.01)
    torch.testing.assert_close(grad_norm([p]), p.grad.double().norm().float(), rtol=1e-6, atol=0)
    memopt.clip_grad_norm_([p], 1.0)
    assert grad_norm([p]) == pytest.approx(1.0, rel=2**-8)


@pytest.mark.parametrize("bad", [inf, float("nan")])
def test_a_norm_that_is_not_finite_changes_nothing_and_the_optimizer_says_where(bad):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    opt = memopt.create(model, "adamw", nonfinite="raise")
    model(torch.ones(1, 3)).sum().backward()
    model[1].weight.grad[0, 0] = bad
    before = model[0].weight.grad.clone()
    assert not torch.isfinite(memopt.clip_grad_norm_(opt, 1e-3))
    assert torch.equal(model[0].weight.grad, before)
    with pytest.raises(FloatingPointError, match=r"gradient of 1\.weight;"):
        opt.step()


def test_by_value():
    ours, theirs = parameters(), parameters()
    nn.utils.clip_grad_value_(theirs, 0.3)
    memopt.clip_grad_value_(ours, 0.3)
    for p, q in zip(ours[:-1], theirs[:-1], strict=True):
        assert torch.equal(p.grad, q.grad)


class Allocations(TorchDispatchMode):
    """Bytes of all results that are not views of, or the same as, what went in."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage().data_ptr() for t in tensors}
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.nbytes += t.numel() * t.element_size()
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_gradients_size_is_allocated(dtype):
    p = nn.Parameter(torch.zeros(1000, 1000, dtype=dtype))
    p.grad = torch.ones_like(p)
    with Allocations() as seen:
        memopt.clip_grad_norm_([p], 1.0)
    assert p.grad.max() < 0.01
    assert 0 < seen.nbytes < 1000


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: memopt.clip_grad_norm_([p], 0.0), "max_norm=0.0"),
        (lambda p: memopt.clip_grad_norm_([p], float("nan")), "max_norm=nan"),
        (lambda p: memopt.clip_grad_norm_([p], 1.0, norm_type=0), "norm_type=0"),
        (lambda p: memopt.clip_grad_norm_([3], 1.0), "got a int"),
        (lambda p: memopt.clip_grad_value_([p], -1), "max_value=-1"),
        (lambda p: memopt.scale_rate(1e-3, 0, 8), "batch=0"),
        (lambda p: memopt.scale_rate(1e-3, 8, 8, rule="cubic"), "unknown scaling 'cubic'; allowed: linear, sqrt"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(SpecError, match=words):
        call(parameters()[0])


def test_a_sparse_gradient_is_refused():
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(SpecError, match=r"sparse gradient of shape \(4, 2\)"):
        memopt.clip_grad_norm_(table, 1.0)


def mixed_gradients():
    """In each of four ranks on a 2 × 2 mesh: (norm, the whole of every gradient after clipping) for each norm."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2))
    cuts = [
        (Replicate(), Replicate()),
        (Shard(0), Replicate()),
        (Replicate(), Shard(1)),
        (Shard(0), Shard(1)),
        (Shard(0), Shard(0)),
    ]
    results = []
    for norm_type in (2.0, inf):
        params = []
        for cut, whole in zip([*cuts, None], wholes(), strict=True):
            value = distribute_tensor(whole, mesh, cut) if cut else whole.clone()
            p = nn.Parameter(torch.zeros_like(value))
            p.grad = value
            params.append(p)
        norm = memopt.clip_grad_norm_(params, 1.0, norm_type)
        grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in params]
        results.append((norm, grads, dist.get_rank()))
    return results


def wholes():
    g = torch.Generator().manual_seed(1)
    # Three rows over two ranks are uneven, one row leaves a rank with nothing.
    return [torch.randn(s, generator=g) for s in [(5, 7), (3, 8), (6, 5), (1, 9), (3, 2), (11,)]]


def test_sharded_and_replicated_gradients_have_one_norm_on_every_rank():
    for rank in ranks.run(mixed_gradients, 4):
        for (norm, grads, _), norm_type in zip(rank, (2.0, inf), strict=True):
            expected = torch.linalg.vector_norm(torch.cat([w.flatten() for w in wholes()]), norm_type)
            torch.testing.assert_close(norm, expected)
            for got, whole in zip(grads, wholes(), strict=True):
                torch.testing.assert_close(got, whole / (expected + 1e-6))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, inf])
def test_gradients_in_double_precision(norm_type):
    """Alone and beside others: torch's norms do not narrow them."""
    g = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(30, dtype=dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    for count in (1, 3):
        for p in params:
            p.grad = torch.randn(30, generator=g).to(p.dtype)
        some = params[:count]
        expected = torch.nn.utils.get_total_norm([p.grad.double() for p in some], norm_type)
        norm = memopt.clip_grad_norm_(some, 0.5, norm_type)
        assert abs(float(norm) - float(expected)) <= 1e-6 * float(expected)
        left = torch.nn.utils.get_total_norm([p.grad.double() for p in some], norm_type)
        assert abs(float(left) - 0.5) <= 0.01
