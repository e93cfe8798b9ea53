"""APOLLO beside the package of its authors, where that is installed."""

import pytest
import torch

from tests.rules.test_apollo import created
from tests.rules.test_sinkgd import of


@pytest.mark.parametrize(
    ("kind", "rank", "theirs_scale"), [("channel", 8, 1), ("tensor", 1, 128)], ids=["apollo", "mini"]
)
@pytest.mark.parametrize("shape", [(24, 48), (40, 24), (32, 32)])
def test_the_authors_package_steps_the_same_in_its_own_projection(shape, kind, rank, theirs_scale, monkeypatch):
    """Fifty steps; its ``scale`` is the square of the paper's."""
    apollo_torch = pytest.importorskip("apollo_torch")
    (ours,), (theirs,) = of([shape]), of([shape])
    group = {"rank": rank, "proj": "random", "scale_type": kind, "scale": theirs_scale, "proj_type": "std"}
    reference = apollo_torch.APOLLOAdamW([{"params": [theirs], "update_proj_gap": 200, **group}], lr=1e-3, eps=1e-8)
    hyper = {"projection_rank": rank, "scale_type": kind, "scale": theirs_scale**0.5}
    opt = created([ours], lr=1e-3, **hyper)
    for t in range(50):
        g = torch.randn(shape, generator=torch.Generator().manual_seed(t))
        ours.grad, theirs.grad = g.clone(), g.clone()
        reference.step()
        p = reference.state[theirs]["projector"].ortho_matrix.double()
        p = p if p.shape[0] == rank else p.t()
        monkeypatch.setattr("memopt.rules.apollo.gaussian", lambda *_, p=p: lambda first, stop: p[:, first:stop])
        opt.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
