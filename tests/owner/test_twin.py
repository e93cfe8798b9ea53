"""A memopt optimizer and its twin of torch.optim through the same random sequences: a minute of them.

benchmarks/twin.py runs thousands on kernels with sanitizers. Both draw from the operations of tests/twin.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.twin.cases import draw_case
from tests.twin.machine import Twin
from tests.twin.operations import load_all
from tests.twin.sequences import draw, load_checkpoints, perform, replay

#: Operations whose meaning is not there yet, and why.
NOT_YET: dict[str, str] = {}
#: Sequences that went wrong once, cut down to the operations that it took.
FOUND: list[str] = [
    "1000974: clip/528",  # memopt.clip_grad_norm_ of gradients in double precision
    # names of a group that was edited, in a state_dict that is asked for before anything else
    "15: remove_parameter/8378 state_dict/6888",
    "40: remove_group/804 come_back/2588 state_dict/9602",
    "3: reorder/508 state_dict_back/6350",
    "24: swap_parameter/8226 append_rows/5180",  # a weight that had grown when it was looked at
    "1068: watch/7801 our_schedule/8874 switch/8468",  # a moment that begins while it is watched
    "1484: clip/6239 reorder/8833 step/6260",  # a parameter moved to the group beside it: the rate of that group
    "1269: watch/3467 switch/6482",  # the same in one group of several
    "4000036: switch/7398 convert_format/9434",  # a conversion that is refused by what new groups would have
    "4000021: step/3208 freeze/151 switch/7384 append_rows/156",  # rows of a moment that is not there yet
    "3033: append_rows/2652",  # a weight that has grown already and has no moments
    "391: accumulate/5759 remove_parameter/6644 copied/5083 come_back/8666 steps/7217",  # a copy has all state
    "712: freeze/3508 backward/3497 grown/6281",  # two codes in a byte: one element less takes as many bytes
    "1068: watch/7801 step/4296 freeze/6479 switch/8468",  # a moment that a frozen parameter does not have yet
    "20409: remove_parameter/8879 convert_place/701 remove_parameter/47 reorder/9565 steps/2104",  # an empty group
    # no moments when files were laid out anew
    "22342: remove_group/1605 switch/4826 remove_parameter/4572 append_rows/1481 come_back/1350 accumulate/7028",
]


@pytest.mark.parametrize("text", FOUND)
def test_what_went_wrong_once(text):
    replay(text)


@pytest.mark.parametrize("first", range(0, 80, 20))
def test_sequences(first):
    for seed in range(first, first + 20):
        replay(draw(seed, NOT_YET))


class Pair(RuleBasedStateMachine):
    """The same operations, drawn and cut down by hypothesis."""

    t: Twin | None = None

    @initialize(seed=st.integers(0, 2**20))
    def begin(self, seed):
        torch.set_num_threads(1)
        self.t = Twin(draw_case(seed), seed)

    def teardown(self):
        if self.t is not None:
            try:
                load_checkpoints(self.t)
            finally:
                self.t.close()


def _rule_of(name):
    def do(self, seed):
        perform(self.t, name, seed)

    do.__name__ = name
    return rule(seed=st.integers(0, 2**16))(do)


for _name in load_all():
    if _name not in NOT_YET:
        setattr(Pair, _name, _rule_of(_name))


def test_sequences_of_hypothesis():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(
            Pair,
            settings=settings(
                max_examples=30,
                stateful_step_count=12,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


def test_there_are_thirty_kinds_of_operation():
    assert len(load_all().keys() - NOT_YET.keys()) >= 30
