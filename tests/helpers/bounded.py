"""A test that takes seconds of the processor has failed."""

import time

import pytest

#: A refusal takes a few milliseconds; on a busy machine, with the garbage of other tests, a second.
SECONDS = 3.0

#: Tests of hundreds of refusals, and how many times as long all of them may take.
MANY = {"test_every_place_of_a_manifest_with_every_value": 5}


@pytest.fixture(autouse=True)
def at_once(request):
    """CPU time, not that of other processes."""
    before = time.process_time()
    yield
    assert time.process_time() - before < SECONDS * MANY.get(request.node.originalname, 1)
