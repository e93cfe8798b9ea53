"""Optimizers of the odd model that are saved and loaded, and what it means that they are the same."""

import os

import memopt
from memopt.checkpoint.io import lock
from tests.helpers.cases import assert_same_bits, odd_model


def build(spec, hyper, **keywords):
    model = odd_model()
    return model, memopt.create(model, spec, **hyper, **keywords)


def names(folder):
    """What is in a folder of checkpoints, beside its lock."""
    return sorted(set(os.listdir(folder)) - {lock.NAME})


def assert_same_state(a, b):
    for x, y in zip(a.state.values(), b.state.values(), strict=True):
        assert x.keys() == y.keys()
        for key, value in x.items():
            assert_same_bits(value, y[key], key)


def assert_same_model(a, b):
    for name, value in a.state_dict().items():
        assert_same_bits(value, b.state_dict()[name], name)
