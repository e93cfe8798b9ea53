"""torch does not ask for numpy, and neither does memopt: what is in files and in pinned memory works without it."""

import subprocess
import sys

WITHOUT = """
import sys, warnings
sys.modules["numpy"] = None
warnings.simplefilter("ignore")
import torch, memopt
def stepped(spec, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(128, 128)
    opt = memopt.create(model, spec, **options)
    model(torch.ones(2, 128)).sum().backward()
    opt.step()
    return model, opt
for spec, options in (("adamw-8bit", {}), ("adamw-4bit@host", {}), ("adamw@disk", {"directory": "state"})):
    model, opt = stepped(spec, **options)
    memopt.save("run", model=model, optimizer=opt)
    assert memopt.load("run", model=model, optimizer=opt).step == 1
    opt.convert_("adamw-8bit")
    opt.close()
memopt.checkpoint.export(memopt.checkpoint.source_of(stepped("adamw")[1]), "torch")
try:
    torch.ones(1).numpy()
except RuntimeError as error:
    print(error)
"""


def test_state_is_saved_loaded_and_converted(tmp_path):
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Numpy is not available" in done.stdout, done.stderr[-2000:]
