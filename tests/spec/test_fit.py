"""memopt.fit: exact, within the budget, and no less gentle than it has to be."""

from math import prod

import pytest

import memopt
from estimators import resolve
from memopt.pricing.fit import LADDER, fit
from memopt.pricing.offload_share import on_device
from memopt.spec import parse

SHAPES = list(resolve("smollm2-135m").shapes)


@pytest.fixture(scope="module")
def extremes():
    return memopt.price(SHAPES, "adamw").nbytes, memopt.price(SHAPES, "adamw-4bit.factored").nbytes


@pytest.mark.parametrize("share", [0.01, 0.1, 0.2, 0.27, 0.3, 0.5, 0.9, 0.999])
def test_within_the_budget_and_the_last_move_was_needed(extremes, share):
    budget = int(extremes[0] * share)
    if budget < extremes[1]:
        with pytest.raises(memopt.SpecError, match="the least that adamw needs is"):
            fit(SHAPES, budget)
        return
    spec = fit(SHAPES, budget)
    assert memopt.price(SHAPES, spec).nbytes <= budget
    worst = max(LADDER.index(f) for f in (spec.format, *spec.overrides.values()))
    # The largest parameter on the lowest rung in use, put back one rung, breaks the budget: nothing moved in vain.
    largest = max((prod(s), n) for n, s in SHAPES if spec.for_parameter(n)[0] == LADDER[worst])[1]
    formats = {n: spec.for_parameter(n)[0] for n, _ in SHAPES}

    def cost(fmt):
        return memopt.price(dict(SHAPES), spec.replace(format="32bit", overrides={largest: fmt})).nbytes

    gentler = next(f for f in LADDER[worst - 1 :: -1] if cost(f) > cost(LADDER[worst]))
    changed = spec.replace(format="32bit", overrides={**formats, largest: gentler})
    assert memopt.price(SHAPES, changed).nbytes > budget


def test_everything_fits_unchanged(extremes):
    assert fit(SHAPES, extremes[0]) == parse("adamw")


def test_one_byte_less_moves_one_parameter(extremes):
    spec = fit(SHAPES, extremes[0] - 1)
    assert spec.format == "32bit"
    assert list(spec.overrides.values()) == ["8bit"]


def test_embeddings_move_last(extremes):
    eight = memopt.price(SHAPES, "adamw-8bit").nbytes
    embedding = next(name for name, _ in SHAPES if "embed" in name)
    assert fit(SHAPES, eight + 2**20 * 200).for_parameter(embedding)[0] == "32bit"


def test_sizes_and_names():
    assert fit({"a[0].w": (512, 512), "b": (512, 512)}, "3MiB").overrides == {"a[[]0].w": "8bit"}
    for bad in ("3", "-1GiB", -1, True, None, "manyGiB", 1.5):
        with pytest.raises(memopt.SpecError, match="budget"):
            fit(SHAPES, bad)


def test_the_optimizer_allocates_what_was_promised():
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Embedding(300, 64), torch.nn.Linear(64, 512), torch.nn.Linear(512, 300))
    budget = memopt.price(model, "adamw").nbytes // 2
    optimizer = memopt.create(model, fit(model, budget), lr=1e-3)
    model(torch.zeros(2, dtype=torch.long)).sum().backward()
    optimizer.step()
    live = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    assert live == optimizer.ledger().nbytes <= budget


# A share of the state on the host ----------------------------------------------------------------------------------


FEW = [one for one in SHAPES if ".layers." not in one[0] or ".layers.0." in one[0] or ".layers.1." in one[0]]


@pytest.mark.parametrize(
    ("spec", "offload"),
    [
        *((spec, "cpu") for spec in ("adamw", "adamw-8bit", "adafactor", "muon(adamw)")),
        *((spec, place) for spec in ("adamw", "adamw-8bit") for place in ("host", "disk")),
    ],
)
def test_the_share_fits_and_no_smaller_one_does(spec, offload):
    whole = on_device(FEW, spec)
    moved = []
    for part in (0.999, 0.7, 0.2):
        budget = int(whole * part)
        found = fit(FEW, budget, spec, offload=offload, workspace="8MiB")
        assert on_device(FEW, found) <= budget
        assert found.format == parse(spec).format
        away = [name for name, _ in FEW if found.for_parameter(name)[1] == offload]
        moved.append(sum(_bytes(name, spec) for name in away))
        least = min(away, key=lambda name: _bytes(name, spec))
        places = {name: f"@{offload if name in away and name != least else 'device'}" for name, _ in FEW}
        stays = parse(spec, options={"workspace": "8MiB"} if len(away) > 1 else {}, overrides=places)
        assert on_device(FEW, stays) > budget
    assert moved == sorted(moved)
    assert moved[0] < 0.02 * whole + (2**23 if offload != "cpu" else 0)  # and what buffers take


def _bytes(name, spec):
    return memopt.price({name: dict(SHAPES)[name]}, spec).nbytes


def test_a_share_of_all_or_nothing():
    assert fit(FEW, "100GiB", "adamw-8bit", offload="cpu") == parse("adamw-8bit")
    assert fit(FEW, 0, "adamw-8bit", offload="cpu") == parse("adamw-8bit@cpu")
    with pytest.raises(memopt.SpecError, match="with all state @host the device still has"):
        fit(FEW, 0, "adamw-8bit", offload="host")


@pytest.mark.parametrize(
    "wrong", [{"offload": "card"}, {"offload": "device"}, {"spec": "adamw@host", "offload": "cpu"}]
)
def test_what_a_share_cannot_be(wrong):
    with pytest.raises(memopt.SpecError, match="offload="):
        fit(FEW, "1GiB", **wrong)


def test_live_bytes_and_bits_of_a_share(monkeypatch):
    """On the simulated device, whose memory is the CPU's."""
    torch = pytest.importorskip("torch")
    from memopt.placements.transfer import device
    from tests.helpers.simulated import DeviceTransfer

    made = DeviceTransfer(torch.device("cpu"))
    monkeypatch.setitem(device.TRANSFERS, "cpu", lambda where: made)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 96), torch.nn.Linear(96, 64)))
    model, twin = models
    budget = on_device(model, "adamw-8bit") // 2
    spec = fit(model, budget, "adamw-8bit", offload="cpu", offload_gradients=True)
    opt, other = memopt.create(model, spec, lr=1e-2), memopt.create(twin, "adamw-8bit", lr=1e-2)
    for _ in range(3):
        for net, one in ((model, opt), (twin, other)):
            net(torch.ones(2, 64)).square().mean().backward()
            one.step()
            one.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    kinds = "parameter", "moment", "part", "lifetime"
    live = opt.ledger()
    assert live.by(*kinds) == memopt.price(model, spec, device="cuda").by(*kinds)
    stay = {name for name, _ in model.named_parameters() if spec.for_parameter(name)[1] == "device"}
    assert 0 < sum(line.nbytes for line in live if line.parameter in stay and line.moment != "step") <= budget
    assert "@cpu" in spec.overrides.values() or spec.placement == "cpu"


def test_the_calculator_has_the_share_where_it_is():
    from estimators import estimate

    budget = on_device(SHAPES, "adamw-8bit") // 2
    spec = fit(SHAPES, budget, "adamw-8bit", offload="cpu")
    state = [row for row in estimate("smollm2-135m", spec=spec).rows if row.what == "state"]
    assert sum(row.nbytes for row in state if row.tier == "GPU") == on_device(SHAPES, spec) <= budget
