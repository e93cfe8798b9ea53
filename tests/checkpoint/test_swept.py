"""Samples of the sweeps: kills at system calls, Ctrl-C at bytecodes. All of them are run by hand, from benchmarks/."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import interrupt_bytecodes
import interrupt_ranks
import kill_every_call
import system_calls

#: Every so many calls, and so many bytecodes.
EVERY, TRIES = 11, 3

pytestmark = pytest.mark.filterwarnings("ignore")
traced = pytest.mark.skipif(system_calls.available() is not None, reason=str(system_calls.available()))


@traced
@pytest.mark.parametrize("name", ["save, asynchronous", "save, keep=1", "convert", "@disk, a step"])
def test_a_process_killed_at_a_system_call_leaves_the_old_or_the_new(name, tmp_path):
    (scenario,) = [s for s in kill_every_call.SCENARIOS if s.name == name]
    found = kill_every_call.sweep(scenario, tmp_path, EVERY, torn=False)
    assert found["kills"] == sum(found["outcomes"].values()) >= 2


@pytest.mark.parametrize("what", ["first step", "load", "convert_ format", "convert_ rule", "save"])
@pytest.mark.parametrize("place", ["device", "disk kept", "reference device"])
def test_ctrl_c_at_a_bytecode_leaves_the_old_the_new_or_a_sentence(what, place):
    found = interrupt_bytecodes.sweep(place, what, TRIES)
    assert sum(found["outcomes"].values()) == TRIES


def test_ctrl_c_on_two_ranks_saves_the_old_the_new_or_nothing(tmp_path):
    found = interrupt_ranks.sweep("step", 2, tmp_path)
    assert sum(found["outcomes"].values()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("what", interrupt_ranks.WORKS)
def test_ctrl_c_on_two_ranks_at_many_bytecodes(what, tmp_path):
    found = interrupt_ranks.sweep(what, 40, tmp_path)
    assert sum(found["outcomes"].values()) == 40


@pytest.mark.slow
@traced
@pytest.mark.parametrize("scenario", kill_every_call.SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_process_killed_at_every_system_call(scenario, tmp_path):
    run = kill_every_call.sweep_ranks if isinstance(scenario, kill_every_call.Ranks) else kill_every_call.sweep
    found = run(scenario, tmp_path)
    assert found["kills"] == sum(found["outcomes"].values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("what", interrupt_bytecodes.WORKS)
@pytest.mark.parametrize("place", [*interrupt_bytecodes.PLACES, *interrupt_bytecodes.REFERENCE])
def test_ctrl_c_at_many_bytecodes(what, place):
    assert sum(interrupt_bytecodes.sweep(place, what, 250)["outcomes"].values()) == 250
