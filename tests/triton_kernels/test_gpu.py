"""What needs a CUDA device: graphs, GradScaler, schedules and memory on a small transformer. Agreement of the compiled
kernels with the plain path is in ``test_triton.py``, which compiles them where there is a device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import memopt

pytestmark = pytest.mark.gpu

VOCABULARY, WIDTH, LENGTH = 512, 128, 32


class Small(nn.Module):
    """A transformer of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.layers(self.embedding(tokens)))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def model() -> Small:
    torch.manual_seed(0)
    return Small().cuda()


def batch(seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed % 4)
    return torch.randint(0, VOCABULARY, (8, LENGTH), generator=g).cuda()


def uses_kernels(opt: memopt.Optimizer) -> bool:
    return type(opt.stepper.plan).__module__ == "memopt.kernels.triton.cached_step"


@pytest.mark.parametrize("spec", ["adamw", "adamw-8bit", "adamw-4bit", "adafactor", "came", "adamw-8bit@paged"])
def test_trains_with_clipping_accumulation_and_a_schedule(spec) -> None:
    if "paged" in spec:
        pytest.importorskip("bitsandbytes")
    net = model()
    opt = memopt.create(net, spec, lr=3e-3 if "adafactor" not in spec else 1e-2)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 60)
    losses = []
    for step in range(60):
        for half in range(2):
            loss = net(batch(2 * step + half)) / 2
            loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        rates.step()
        losses.append(2 * float(loss))
    assert uses_kernels(opt)
    assert losses[-1] < 0.7 * losses[0]


def test_grad_scaler_finds_its_scale_and_skipped_steps_change_nothing() -> None:
    net = model()
    opt = memopt.create(net, "adamw-8bit", lr=1e-3)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)  # far too large: the first steps overflow
    first = last = 0.0
    for step in range(60):
        with torch.autocast("cuda", torch.float16):
            loss = net(batch(step))
        scaler.scale(loss).backward()
        if step % 2:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        last = float(loss)
        first = first or last
    assert scaler.get_scale() < 2.0**40
    assert last < first
    taken = {float(state["step"]) for state in opt.state.values()}
    assert len(taken) == 1
    assert taken.pop() < 60


def test_a_captured_step_is_the_same_as_an_eager_one() -> None:
    def steps(captured: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in [(256, 512), (100,), (5000,)]]
        rate = torch.tensor(1e-2, device="cuda")
        opt = memopt.create(params, "adamw-8bit", capturable=True)
        for group in opt.param_groups:
            group["lr"] = rate
        for p in params:
            p.grad = torch.zeros_like(p)
        gradients = [[torch.randn_like(p) for p in params] for _ in range(6)]

        def give(step: int) -> None:
            rate.fill_(1e-2 / (step + 1))
            for p, g in zip(params, gradients[step], strict=True):
                p.grad.copy_(g)

        for step in range(2):
            give(step)
            opt.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                opt.step()
        for step in range(2, 6):
            give(step)
            graph.replay() if captured else opt.step()
        torch.cuda.synchronize()
        assert float(opt.state[params[0]]["step"]) == 6
        return [p.detach().clone() for p in params] + [t for p in params for t in opt.state[p].values()]

    for a, b in zip(steps(True), steps(False), strict=True):
        assert torch.equal(a.float(), b.float())


def test_nan_in_a_graph_leaves_the_step_out() -> None:
    p = nn.Parameter(torch.randn(64, 256, device="cuda"))
    p.grad = torch.ones_like(p)
    opt = memopt.create([p], "adamw-8bit", capturable=True)
    opt.step()
    opt.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    before = p.detach().clone()
    p.grad[3, 3] = float("nan")
    graph.replay()
    assert torch.equal(p, before)
    assert opt.skipped_steps == 1
    p.grad.fill_(1.0)
    graph.replay()
    assert not torch.equal(p, before)
    assert float(opt.state[p]["step"]) == 3


def test_a_graph_captured_after_one_step_and_steps_between_its_runs_have_each_their_rate() -> None:
    p = nn.Parameter(torch.zeros(64, 256, device="cuda"))
    p.grad = torch.ones_like(p)
    opt = memopt.create([p], "sgd", lr=1.0, capturable=True)
    opt.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    opt.param_groups[0]["lr"] = 0.25
    for _ in range(2):
        opt.step()
        graph.replay()
    assert torch.equal(p.detach(), torch.full_like(p, -3.5))


def test_without_capturable_a_capture_says_what_to_do() -> None:
    p = nn.Parameter(torch.randn(64, 256, device="cuda"))
    p.grad = torch.ones_like(p)
    opt = memopt.create([p], "adamw")
    opt.step()
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()


def test_a_step_waits_for_nothing() -> None:
    params = [nn.Parameter(torch.randn(512, 512, device="cuda")) for _ in range(4)]
    for p in params:
        p.grad = torch.ones_like(p)
    for keywords in ({"capturable": True}, {"nonfinite": "propagate"}):
        opt = memopt.create(params, "adamw-8bit", **keywords)
        for _ in range(2):
            opt.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            opt.param_groups[0]["lr"] = 1e-4
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("spec", ["adamw", "adamw-8bit", "adamw-4bit", "adafactor", "came"])
def test_peak_memory_above_the_state(spec) -> None:
    params = [nn.Parameter(torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = memopt.create(params, spec)
    opt.init_state()
    resident = torch.cuda.memory_allocated()
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        opt.step()
        assert torch.cuda.max_memory_allocated() - resident < 64 * 2**20


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "step_gpu.py"
    done = subprocess.run(
        [sys.executable, str(script), "--brief", "--numel", "20000000", "--minutes", "2", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "step_gpu.json").exists()
