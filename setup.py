"""Compiles the CPU kernels into a package that is installed; everything else is in pyproject.toml.

A machine without a C++ compiler installs the package all the same: the plain torch path runs, and ``memopt doctor``
says how to get the kernels. An editable install compiles nothing here: it builds at first use, whenever sources change.
"""

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))


class BuildKernels(build_py):
    """``build_py``, then the shared library beside ``memopt/kernels``."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        from memopt.kernels.build import BuildError, build

        try:
            print("compiled", build(Path(self.build_lib) / "memopt" / "kernels"))
        except BuildError as error:
            print(f"The CPU kernels were not compiled, and the plain torch path will run: {error}", file=sys.stderr)


class WithKernels(Distribution):
    """The wheel holds machine code, so it is one platform's."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildKernels}, distclass=WithKernels)
