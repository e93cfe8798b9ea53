"""The golden bits of ``golden_bits.py``: no change of structure may change a bit."""

import pytest
import torch

from tests.helpers import golden_bits, ranks
from tests.helpers.golden_bits import ISA, STEMS, SUMMING, cases, golden, kernels, reference_key, run, stems

CASES = cases()
EVERY = 6  # of the cases, so many in the tests that always run


@pytest.fixture
def fused():
    with kernels(ISA):
        from memopt.kernels import loader

        if loader.library() is None:
            pytest.skip(loader.missing())
        yield


@pytest.fixture
def reference():
    if golden("reference")["of"] != reference_key():
        pytest.skip(f"recorded with {golden('reference')['of']}; this is {reference_key()}")
    with kernels("off"):
        yield


def test_every_case_has_its_bits():
    assert list(golden("kernels")["cases"]) == list(golden("reference")["cases"]) == list(CASES)


def _check(keys, name, **how):
    wanted = golden(name)["cases"]
    for key in keys:
        found = run(CASES[key], save=name == "kernels" and not how, **how)
        assert found.items() <= wanted[key].items(), (key, found, wanted[key])


def test_kernels(fused):
    _check(list(CASES)[::EVERY], "kernels")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(EVERY))
def test_kernels_whole(fused, part):
    _check(list(CASES)[part::EVERY], "kernels")


def test_kernels_with_two_threads(fused):
    torch.set_num_threads(2)
    _check(list(stems()), "kernels", planned=True)


def test_kernels_without_a_plan(fused):
    _check(list(stems()), "kernels", planned=False)


@pytest.mark.parametrize("placement", ["paged", "host", "cpu", "disk"])
def test_placements(fused, placement):
    _check(list(stems()), "kernels", ending=f"@{placement}")


@pytest.mark.parametrize("placement", ["host", "cpu", "disk"])
def test_placements_that_stream(fused, placement, device):
    _check(list(stems()), "kernels", ending=f"@{placement}")


def test_a_partition_of_one(fused):
    _check([key for key, case in stems().items() if case[0] not in SUMMING], "kernels", ending="/zero1")


def test_partitions_of_two_ranks(fused):
    wanted = golden("ranks")["cases"]
    for rank, found in zip("01", ranks.run(golden_bits.on_ranks, 2), strict=True):
        assert set(found) == set(STEMS)
        assert found == wanted[rank]


def test_reference(reference):
    _check(list(CASES)[:: 4 * EVERY], "reference")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(EVERY))
def test_reference_whole(reference, part):
    _check(list(CASES)[part::EVERY], "reference")
