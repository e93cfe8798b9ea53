"""Compiles the CPU kernels into a wheel; everything else is in pyproject.toml.

With a C++ compiler the wheel is one for its platform and every Python (``py3-none-PLATFORM``): the kernels have a plain
C interface and know nothing of Python or torch. Without one, or with ``MEMOPT_KERNELS=off``, it is a pure wheel:
kernels are compiled at first use, or the plain torch path runs, and ``memopt doctor`` says which. An editable install
compiles nothing here: it builds at first use, whenever sources change.

Where the sources are on the web is known to who builds for the public: ``MEMOPT_REPOSITORY`` is their address, and the
links of the README, which lead to files beside it, then lead there. A source distribution keeps it for its wheels.
"""

import os
import re
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


def address() -> str:
    """Of the repository, or nothing where it was not said."""
    kept = Path("PKG-INFO")  # of a source distribution
    found = (
        re.search(r"^Project-URL: Source, (\S+)$", kept.read_text(encoding="utf-8"), re.M) if kept.exists() else None
    )
    return os.environ.get("MEMOPT_REPOSITORY", "").rstrip("/") or (found[1] if found else "")


def readme(repository: str, version: str) -> str:
    """The README, with links that lead to the version's files in the repository."""
    text = Path("README.md").read_text(encoding="utf-8")
    if not repository:
        return text
    return re.sub(
        r"(!?)(\[[^\]]*\]\()(?![a-z]+:|#)([^)]+)\)",
        lambda link: f"{link[1]}{link[2]}{repository}/{'raw' if link[1] else 'blob'}/v{version}/{link[3]})",
        text,
    )


def urls(repository: str, version: str) -> dict[str, str]:
    if not repository:
        return {}
    files = {"Documentation": "docs/index.md", "Changelog": "CHANGELOG.md"}
    found = {name: f"{repository}/blob/v{version}/{path}" for name, path in files.items()}
    return {"Source": repository, "Issues": f"{repository}/issues", **found}


version = re.search(r'^version = "(.*)"$', Path("pyproject.toml").read_text(encoding="utf-8"), re.M)
assert version is not None
setup(
    cmdclass={"build_py": BuildKernels, "bdist_wheel": OneForEveryPython},
    distclass=WithKernels,
    long_description=readme(address(), version[1]),
    long_description_content_type="text/markdown",
    project_urls=urls(address(), version[1]),
)
