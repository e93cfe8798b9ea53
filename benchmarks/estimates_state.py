"""State bytes: predicted from shapes, against the live optimizer, for every rule × format × master on a model of
every family.

    python benchmarks/estimates_state.py      a minute or two; writes benchmarks/results/estimates_state.json

One small model of each family, as transformers builds it, with parameters in bfloat16. Predicted: ``memopt.price``.
Live: the bytes of every tensor in the optimizer's state after ``init_state()``, counted without the ledger.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import memopt

sys.path.insert(0, str(Path(__file__).parent.parent))
from estimates_models import FAMILIES, SIZES, build, config
from provenance import write_result

from tests.helpers.cases import HYPER, live_nbytes

RESULTS = Path(__file__).parent / "results"


def specs() -> list[str]:
    return [str(s) for s in memopt.specs() if (s.placement, s.partition) == ("device", "none")]


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.manual_seed(0)
    chosen, wrong, compared = specs(), [], 0
    for family in FAMILIES:
        model = build(config(family, SIZES[0][0]), torch.bfloat16, "eager")
        for spec in chosen:
            hyper = HYPER.get(memopt.parse(spec).rule, {})
            predicted = memopt.price(model, spec, **hyper).nbytes
            opt = memopt.create(model, spec, **hyper)
            opt.init_state()
            live = live_nbytes(opt)
            compared += 1
            if live != predicted:
                wrong.append({"family": family, "spec": spec, "predicted": predicted, "live": live})
        print(f"{family}: {compared} compared, {len(wrong)} differ", file=sys.stderr, flush=True)
    found = {"families": len(FAMILIES), "specs": len(chosen), "compared": compared, "differ": wrong}
    write_result(RESULTS / "estimates_state.json", found)
    print(f"{compared} live optimizers: {len(wrong)} differ from what was predicted")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
