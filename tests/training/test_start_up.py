"""What a first step does not import."""

import subprocess
import sys

CODE = """
import sys, torch, memopt
model = torch.nn.Linear(8, 8)
opt = memopt.create(model, "adamw-8bit", lr=1e-3)
model(torch.ones(2, 8)).sum().backward()
opt.step()
opt.zero_grad()
assert model.weight.grad is None
sys.exit("torch._dynamo" in sys.modules)
"""


def test_torchs_compiler_is_not_imported():
    """It takes a second or two; torch's own add_param_group and zero_grad import it."""
    subprocess.run([sys.executable, "-c", CODE], check=True)
