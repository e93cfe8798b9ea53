"""The spec: ``RULE[-FORMAT[.FORMAT]][(FALLBACK[-FORMAT])][+MASTER][@PLACEMENT][/PARTITION]`` and what it means."""

from memopt.spec.by_parameter import SHARED
from memopt.spec.grammar import lookahead, pairs_of, parse, specs
from memopt.spec.optim_spec import OptimSpec
from memopt.spec.spec_fields import FIELDS

__all__ = ["FIELDS", "SHARED", "OptimSpec", "lookahead", "pairs_of", "parse", "specs"]
