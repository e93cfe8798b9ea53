"""Momentum whose step is divided by the root of the mean of squares so far: two moments, one of them factorable."""

from memopt.rules.base import EXP_AVG, EXP_AVG_SQ, Rule


def update(p, g, state, t, h):
    """``m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g²;  p <- p - lr m / (sqrt(v) + eps)``"""
    beta1, beta2 = h["betas"]
    exp_avg = state.write("exp_avg", state.read("exp_avg").lerp_(g, 1 - beta1))
    square = state.read("exp_avg_sq").mul_(beta2).addcmul_(g, g, value=1 - beta2)
    square = state.write("exp_avg_sq", square)
    p.addcdiv_(exp_avg, square.sqrt().add_(h["eps"]), value=-float(h["lr"]))


RULE = Rule(
    name="toyrule",
    summary="a rule of a test",
    source="no paper",
    defaults={"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-3},
    moments=lambda h, shape: (EXP_AVG, EXP_AVG_SQ),
    update=update,
)
