"""A run that changes to two formats and back goes on within a percent of one that never did."""

import warnings

import pytest
import torch

import memopt
from memopt.train.job import ModelConfig
from memopt.train.model import LanguageModel
from memopt.train.text import Corpus, load_text

THIRD, LR = 70, 2e-3
PAIR = "adamw-8bit.factored"


class Run:
    """The language model of ``memopt train``, small."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = ModelConfig(context=64, width=64, layers=2, heads=2)
        self.model, self.corpus = LanguageModel(config), Corpus(load_text(), config.context)

    def train(self, opt: torch.optim.Optimizer, third: int) -> "Run":
        for step in range(third * THIRD, (third + 1) * THIRD):
            opt.zero_grad()
            self.model(self.corpus.batch(0, step, 8)).backward()
            opt.step()
        return self

    def loss(self) -> float:
        """Of 64 other windows."""
        with torch.no_grad():
            return sum(self.model(self.corpus.batch(1, i, 16)).item() for i in range(4)) / 4


def begun(make):
    """A run whose first third another optimizer made, and what continues it in the pair of formats."""
    run = Run()
    theirs = make(run.model.parameters())
    run.train(theirs, 0)
    opt = memopt.create(run.model, PAIR, lr=LR)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        opt.load_state_dict(theirs.state_dict())
    return run, opt, "\n".join(str(w.message) for w in told)


@pytest.fixture(scope="module")
def never():
    run = Run()
    opt = memopt.create(run.model, "adamw", lr=LR)
    for third in range(3):
        run.train(opt, third)
    return run.loss()


def goes_on(run, opt, never):
    run.train(opt, 1)
    back = opt.convert_("adamw")
    assert set(back.relative_error) == {"exp_avg", "exp_avg_sq"}
    assert all(error < 1e-6 for error in back.relative_error.values())  # nothing is lost on the way to 32 bits
    run.train(opt, 2)
    assert abs(run.loss() / never - 1) < 0.01


@pytest.mark.slow
def test_there_and_back(never):
    run = Run()
    opt = memopt.create(run.model, "adamw", lr=LR)
    run.train(opt, 0)
    error = opt.convert_(PAIR).relative_error
    assert 0 < error["exp_avg"] < 0.02
    assert 0.1 < error["exp_avg_sq"] < 1  # a matrix of rank one
    goes_on(run, opt, never)


@pytest.mark.slow
def test_from_torch(never):
    run, opt, told = begun(lambda params: torch.optim.AdamW(params, lr=LR))
    assert all(word in told for word in ("exp_avg", "exp_avg_sq", "relative error"))
    goes_on(run, opt, never)


@pytest.mark.slow
def test_from_bitsandbytes(never):
    bnb = pytest.importorskip("bitsandbytes")
    run, opt, told = begun(lambda params: bnb.optim.AdamW8bit(params, lr=LR))
    assert all(word in told for word in ("exp_avg", "exp_avg_sq", "relative error"))
    goes_on(run, opt, never)
