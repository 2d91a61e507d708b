"""Build and metadata: the package, and its native kernel as a plain shared library that ctypes loads."""

import os
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before 70.1
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:
        raise SystemExit(
            "hvd_sketch: this setuptools cannot build wheels: leave out --no-build-isolation, or run "
            "`pip install --upgrade setuptools` first"
        ) from None

SOURCES = runpy.run_path(str(Path("hvd_sketch", "native", "sources.py")))
NATIVE = SOURCES["files"]()
KERNEL = Extension(
    "hvd_sketch.native._kernel",
    [str(file) for file in NATIVE if file.suffix == ".cpp"],
    depends=[str(file) for file in NATIVE if file.suffix == ".hpp"],
)
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-fPIC", "-shared", "-Wno-psabi")

EXTRAS = {
    "horovod": ["horovod==0.28.1"],  # the collectives; builds as environment/create shows
    "mpi": ["mpi4py>=4,<5"],  # the collectives where Horovod is not installed
    "swarm": ["networkx>=3,<4"],  # graphs of peers
    "gpu": ["triton>=3.3,<4; sys_platform == 'linux'"],  # the sketch's kernels, and their interpreter for the tests
    "examples": [
        "tqdm>=4.66,<5",  # progress bar
        "matplotlib>=3.8,<4",  # --plot
        "scikit-learn>=1.4,<2",  # the digits
        "rich>=13,<16",  # the final table
    ],
    "frameworks": [  # examples/with_….py
        "accelerate>=1.0,<2",
        "transformers>=4.48,<6",
        "lightning>=2.4,<3",
    ],
    "oracles": ["byzfl>=0.0.11,<0.1"],  # robust rules and attacks of others, to compare with in the tests
    "dev": [
        "pytest>=8,<10",  # runs the tests
        "pytest-timeout>=2.3,<3",  # a hang is a failure
        "pytest-xdist>=3.6,<4",  # two files of tests at a time
        "hypothesis>=6.100,<7",  # invariants on generated input
        "psutil>=5.9,<8",  # ends all descendants of a launcher that hangs
        "auditwheel>=6,<7",  # on which systems the wheel's kernel runs
        "ruff>=0.17,<0.18",  # lint; its rules change between minor versions
        "mypy>=2.4,<2.5",  # types; likewise
        "pre-commit>=4,<5",  # both before each commit, for those who want it
    ],
}


CLASSIFIERS = [
    "Development Status :: 4 - Beta",
    "Intended Audience :: Developers",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: C++",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Topic :: System :: Distributed Computing",
    "Typing :: Typed",
]


class BuildKernelFirst(build):
    """The kernel before the Python files: a missing compiler is then told at once, not below a page of file names."""

    sub_commands = sorted(build.sub_commands, key=lambda command: command[0] != "build_ext")


class BuildKernel(build_ext):
    """Compile the kernel with one command, the same everywhere: it is linked against neither Python nor PyTorch."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX") or "g++"
        if shutil.which(compiler) is None:
            raise SystemExit(
                f"hvd_sketch: no C++ compiler: {compiler!r} is not on the PATH; install one (Debian or Ubuntu: "
                "apt-get install g++) or name yours in CXX"
            )
        library = self.get_ext_fullpath(ext.name)
        Path(library).parent.mkdir(parents=True, exist_ok=True)
        flags = (*FLAGS, f'-DKERNEL_SOURCES="{SOURCES["digest"]()}"', *shlex.split(os.environ.get("CXXFLAGS", "")))
        if subprocess.run([compiler, *flags, *ext.sources, "-o", library], check=False).returncode:
            raise SystemExit(
                f"hvd_sketch: {compiler} could not compile {' '.join(ext.sources)}; its messages are above"
            )


class BuildWheel(bdist_wheel):
    """One wheel for every Python: its kernel is linked against none."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    name="hvd_sketch",
    version="0.1.0",
    description=(
        "Training over slow networks: compressed gradients with error feedback for Horovod, torchrun (DDP) and MPI"
    ),
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The hvd_sketch authors",
    license="Apache-2.0",
    keywords="distributed training, gradient compression, error feedback, Count-Sketch, Horovod, DDP, MPI, PyTorch",
    project_urls={"Paper": "https://arxiv.org/abs/1903.04488"},
    classifiers=CLASSIFIERS,
    entry_points={"console_scripts": ["hvd-sketch = hvd_sketch.frontends.run_script:main"]},
    python_requires=">=3.11",
    packages=find_packages(include=["hvd_sketch", "hvd_sketch.*"]),
    package_data={"hvd_sketch": ["py.typed"]},
    ext_modules=[KERNEL],
    cmdclass={"build": BuildKernelFirst, "build_ext": BuildKernel, "bdist_wheel": BuildWheel},
    install_requires=["torch>=2.2", "numpy>=1.26,<3"],
    extras_require=EXTRAS,
    zip_safe=False,
)
