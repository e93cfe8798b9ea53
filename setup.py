"""Compiles the CPU kernels into a wheel; everything else is in pyproject.toml.

With a C++ compiler the wheel is one for its platform and every Python (``py3-none-PLATFORM``): the kernels have a plain
C interface and know nothing of Python or torch. Without one, or with ``MEMOPT_KERNELS=off``, it is a pure wheel:
kernels are compiled at first use, or the plain torch path runs, and ``memopt doctor`` says which. An editable install
compiles nothing here: it builds at first use, whenever sources change.
"""

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))


class BuildKernels(build_py):
    """``build_py``, then the shared library beside ``memopt/kernels``."""

    def run(self) -> None:
        super().run()
        from memopt.kernels.build import NAME, BuildError, build

        directory = Path(self.build_lib) / "memopt" / "kernels"
        if self.editable_mode:
            return
        (directory / NAME).unlink(missing_ok=True)  # of an earlier build
        if os.environ.get("MEMOPT_KERNELS", "").lower() in ("off", "0", "no"):
            return
        try:
            print("compiled", build(directory))
        except BuildError as error:
            print(f"The CPU kernels were not compiled, and the wheel is pure Python: {error}", file=sys.stderr)


class OneForEveryPython(bdist_wheel):
    """Tags the wheel by what is in it."""

    def get_tag(self) -> tuple[str, str, str]:
        from memopt.kernels.build import NAME

        self.root_is_pure = not any(Path(self.bdist_dir).rglob(NAME))
        return "py3", "none", "any" if self.root_is_pure else super().get_tag()[2]


class WithKernels(Distribution):
    """May hold machine code: not known before it is compiled."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildKernels, "bdist_wheel": OneForEveryPython}, distclass=WithKernels)
