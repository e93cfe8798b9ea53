"""The constants of the plain path, measured again."""

import pytest


class TestTemporaries:
    """The constants of the plain path, measured again."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_plain_step(self, dtype, monkeypatch):
        torch = pytest.importorskip("torch")
        import memopt
        from estimators.measure import traced
        from estimators.memory.state import COPIES, MASTER, PLAIN_PATH

        for module in ("memopt.kernels", "memopt.kernels.cached_step"):
            monkeypatch.setattr(f"{module}.library", lambda: None)
        n = 256
        checked = 0
        masters = [("adamw-32bit", m, 8) for m in MASTER] + [("sgd-32bit", m, 0) for m in MASTER if m != "none"]
        masters += [("lion-8bit", m, 24) for m in MASTER if m != "none"]
        for spec, master, per_element in masters if dtype == "bfloat16" else []:
            weight = torch.nn.Parameter(torch.randn(n, n, dtype=torch.bfloat16))
            hyper = {"momentum": 0.9} if spec.startswith("sgd") else {}
            optimizer = memopt.create([weight], memopt.parse(spec).replace(master=master), lr=1e-3, **hyper)
            for _ in range(2):
                weight.grad = torch.randn_like(weight)
                optimizer.step()
            peak = traced(("step", optimizer.step)).peak
            want = n * n * max(per_element + COPIES, MASTER[master])
            assert want <= peak + 16 <= want * 1.05 + 2**16, (spec, master, peak / n / n)
        for rule, formats in PLAIN_PATH.items():
            for fmt, per_element in formats.items():
                layer = torch.nn.Embedding(n, n) if rule == "scale_embedding" else torch.nn.Linear(n, n, bias=False)
                name = "lm_head" if rule == "scale_head" else "layer"
                beside = {"hidden": torch.nn.Linear(n, n // 2, bias=False)} if "_" in rule else {}  # it has no gradient
                model = torch.nn.ModuleDict({name: layer, **beside}).to(getattr(torch, dtype))
                weight = layer.weight
                hyper = {"momentum": 0.9} if rule == "sgd" else {}
                hyper |= {"projection_rank": n // 16} if rule == "apollo" else {}  # 256 of 4096
                optimizer = memopt.create(model, f"{rule.partition('_')[0]}-{fmt}", lr=1e-3, **hyper)
                group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
                assert optimizer.setup.rule_of(group).name == rule
                for _ in range(2):
                    weight.grad = torch.randn_like(weight)
                    optimizer.step()
                peak = traced(("step", optimizer.step)).peak
                want = n * n * (per_element + (COPIES if dtype == "bfloat16" else 0))
                assert want <= peak + 16 <= want * 1.05 + 2**16, (rule, fmt, peak / n / n)
                checked += 1
        assert checked > 40
