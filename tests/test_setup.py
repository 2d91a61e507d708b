"""Building and installing: what a wheel holds, and what is said where something is missing."""

import email
import ensurepip
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from hvd_sketch.frontends import report
from tests.support.ranks import ROOT

WHEEL = (
    sys.executable,
    "-m",
    "pip",
    "wheel",
    "--no-deps",
    "--no-build-isolation",
    "--no-index",
    "--wheel-dir",
    "built",
)
NO_COMPILER = (
    "hvd_sketch: no C++ compiler: 'g++' is not on the PATH; install one (Debian or Ubuntu: apt-get install g++)"
)
BASIC_TOOLS = ("bash", "cat", "dirname", "sed", "sha256sum")


pytestmark = [pytest.mark.slow, pytest.mark.early]  # they build


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH")}
    return subprocess.run(
        command,
        cwd=cwd,
        env={**environment, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, with nothing built in it."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("hvd_sketch", "environment"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(sources: Path) -> Path:
    """Of these sources."""
    built = run(*WHEEL, ".", cwd=sources, CXXFLAGS="-O0")  # its symbols are those of a fast one, sooner
    assert built.returncode == 0, built.stdout
    (file,) = (sources / "built").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    assert re.fullmatch(r"hvd_sketch-[0-9.]+-py3-none-linux_[a-z0-9_]+\.whl", wheel.name)
    needed = run("readelf", "--dynamic", installed_kernel(wheel), cwd=wheel.parent)
    assert needed.returncode == 0, needed.stdout
    assert not re.search("python|torch|c10", needed.stdout)


MANYLINUX_2_28 = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8,)}
"""The newest symbols of a system of that name: of its C library, and of the C++ library of its GCC 8."""


def test_the_kernel_runs_on_systems_of_2018(wheel: Path) -> None:
    """It asks for no symbol that manylinux_2_28 has not, whatever it was built on."""
    listed = run("objdump", "--dynamic-syms", installed_kernel(wheel), cwd=wheel.parent)
    assert listed.returncode == 0, listed.stdout
    needed = re.findall(r"\(?(GLIBC|GLIBCXX|CXXABI|GCC)_([0-9.]+)\)? ", listed.stdout)
    assert needed
    for library, version in needed:
        assert tuple(map(int, version.split("."))) <= MANYLINUX_2_28[library], f"{library}_{version}"


def test_auditwheel_agrees(wheel: Path) -> None:
    pytest.importorskip("auditwheel")
    told = run(sys.executable, "-m", "auditwheel", "show", wheel, cwd=wheel.parent)
    assert told.returncode == 0, told.stdout
    assert re.search("manylinux_2_(1[0-9]|2[0-8]|[5-9])_", " ".join(told.stdout.split())), told.stdout


def installed_kernel(wheel: Path) -> Path:
    return Path(zipfile.ZipFile(wheel).extract("hvd_sketch/native/_kernel.so", wheel.parent))


def test_the_metadata_say_what_it_is_and_what_it_needs(wheel: Path) -> None:
    name = f"{wheel.name.rsplit('-', 3)[0]}.dist-info/METADATA"
    told = email.message_from_string(zipfile.ZipFile(wheel).read(name).decode())
    assert told["License"] == "Apache-2.0"
    assert str(told.get_payload()).strip().startswith("# hvd_sketch")
    needs = {requirement.split(">")[0].split("<")[0] for requirement in told.get_all("Requires-Dist", [])}
    assert {"torch", "numpy"} <= needs
    assert {need for need in needs if "extra" not in need and ";" not in need} >= {"torch", "numpy"}
    assert {"horovod", "mpi"} <= set(told.get_all("Provides-Extra", []))
    assert "Typing :: Typed" in told.get_all("Classifier", [])
    assert all(url.split(", ")[1].startswith("https://arxiv.org/") for url in told.get_all("Project-URL", []))


def packed(package: str, folder: Path) -> None:
    """A wheel of an installed package, for who may ask no index."""
    distribution = metadata.distribution(package)
    files = [file for file in distribution.files or () if file.suffix != ".pyc" and ".." not in file.parts]
    with zipfile.ZipFile(folder / f"{package}-{distribution.version}-py3-none-any.whl", "w") as archive:
        for file in files:
            archive.write(str(file.locate()), str(file))


@pytest.fixture(scope="module")
def fresh(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment after ``pip install .``, with what else the present one has.

    The build has an environment of its own, as by default; the wheel above was built in the present one.
    """
    folder = tmp_path_factory.mktemp("fresh")
    packed("setuptools", folder)
    venv.create(folder, with_pip=False)
    programs = folder / "bin"
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "present.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = (sys.executable, "-m", "pip", f"--python={programs / 'python'}", "install", "--no-index", "--no-deps")
    done = run(*pip, f"--find-links={folder}", "--ignore-installed", ".", cwd=sources, CXXFLAGS="-O0")
    assert done.returncode == 0, done.stdout
    return programs


ALONE = """
import sys
sys.modules["horovod"] = sys.modules["mpi4py"] = None
import torch
import hvd_sketch as hvd
hvd.init()
model = torch.nn.Linear(50, 40)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = hvd.DistributedOptimizer(
    optimizer, model.named_parameters(), compression=hvd.Compression.auto(ratio=5), comm=hvd.SingleProcess()
)
for step in range(2):
    optimizer.zero_grad()
    model(torch.randn(8, 50)).square().mean().backward()
    optimizer.step()
print(hvd.__file__, optimizer.exchange.stats.steps, hvd.ddp.register.__module__)
"""


def test_an_installed_package_needs_torch_alone(fresh: Path, tmp_path: Path) -> None:
    told = run(fresh / "python", "-c", ALONE, cwd=tmp_path)
    assert told.returncode == 0, told.stdout
    file, steps, module = told.stdout.split()
    assert Path(file).is_relative_to(fresh.parent)
    assert (steps, module) == ("2", "hvd_sketch.frontends.ddp")


def test_the_command_is_installed(fresh: Path, tmp_path: Path) -> None:
    told = run(fresh / "hvd-sketch", "--help", cwd=tmp_path)
    assert told.returncode == 0, told.stdout
    assert "--compression" in told.stdout


def test_a_wheel_holds_every_module_and_the_kernel(sources: Path, installed: Path) -> None:
    modules = {str(file.relative_to(sources)) for file in (sources / "hvd_sketch").rglob("*.py")}
    files = {str(file.relative_to(installed)) for file in (installed / "hvd_sketch").rglob("*") if file.is_file()}
    assert files == modules | {"hvd_sketch/py.typed", "hvd_sketch/native/_kernel.so"}


def test_a_wheel_works_from_another_directory(installed: Path, tmp_path: Path) -> None:
    program = "import hvd_sketch; from hvd_sketch.sketch import native; print(hvd_sketch.__file__, native.available())"
    told = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed))
    assert told.stdout == f"{installed / 'hvd_sketch' / '__init__.py'} True\n"


@pytest.mark.parametrize("wheel_is_there", [True, False])
def test_old_setuptools_build_with_wheel_and_say_so_without(
    sources: Path, tmp_path: Path, wheel_is_there: bool
) -> None:
    """Of 2022, as a fresh environment of Python 3.11 has them for ``--no-build-isolation``."""
    bundled = list(Path(ensurepip.__file__).parent.glob("_bundled/setuptools-*.whl"))
    if not bundled:
        pytest.skip("this Python comes without setuptools")
    zipfile.ZipFile(bundled[0]).extractall(tmp_path)
    hidden = "" if wheel_is_there else "sys.modules['wheel'] = sys.modules['wheel.bdist_wheel'] = None; "
    program = f"import sys, runpy; {hidden}sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py')"
    told = run(sys.executable, "-c", program, cwd=sources, PYTHONPATH=str(tmp_path))
    said = "hvd_sketch" if wheel_is_there else "hvd_sketch: this setuptools cannot build wheels: leave out"
    assert told.stdout.splitlines()[-1].startswith(said)
    assert "Traceback" not in told.stdout


def test_a_missing_compiler_is_told_in_one_line(sources: Path, tmp_path: Path) -> None:
    built = run(*WHEEL, ".", cwd=sources, PATH=str(tmp_path))
    assert built.returncode != 0
    assert [line.strip() for line in built.stdout.splitlines() if "compiler" in line] == [
        f"{NO_COMPILER} or name yours in CXX"
    ]
    assert "Traceback" not in built.stdout


def test_a_compiler_named_in_cxx_is_used(sources: Path) -> None:
    built = run(sys.executable, "setup.py", "--quiet", "build_ext", cwd=sources, CXX="no-such-compiler")
    assert built.returncode != 0
    assert "'no-such-compiler' is not on the PATH" in built.stdout


@pytest.mark.parametrize(
    ("python", "missing", "packages"),
    [
        (sys.executable, "a C++20 compiler (g++), cmake, make", "g++ cmake make"),
        (
            "no-such-python",
            "Python 3.11 or newer, a C++20 compiler (g++), cmake, make",
            "python3 python3-venv python3-dev g++ cmake make",
        ),
    ],
)
def test_set_up_tells_all_that_is_missing_before_it_downloads(
    sources: Path, tmp_path: Path, python: str, missing: str, packages: str
) -> None:
    for tool in BASIC_TOOLS:
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    created = run(sources / "environment" / "create", cwd=tmp_path, PATH=str(tmp_path), PYTHON=python)
    assert created.returncode == 1
    assert created.stdout == f"environment: missing: {missing}; on Debian or Ubuntu: apt-get install {packages}\n"
    assert not (sources / ".venv").exists()


def test_the_report_names_every_part_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    lines = report.report()
    assert [line.split(": ")[0] for line in lines] == ["torch", "native kernel", "Horovod", "mpi4py", "mpirun"]
    assert not [line for line in lines if "MISSING" in line]


def test_the_report_says_how_to_get_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("horovod", "mpi4py"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('libmpi.so.40 is not there')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    lines = {line.split(": ")[0]: line for line in report.report()}
    for name, remedy in (("Horovod", "make env"), ("mpi4py", "pip install mpi4py"), ("mpirun", "openmpi-bin")):
        assert f"{name}: MISSING (" in lines[name]
        assert "still" in lines[name]
        assert remedy in lines[name].split("to get it: ")[1]
        assert "\n" not in lines[name]
    assert "libmpi.so.40 is not there" in lines["Horovod"]
    assert "MISSING" not in lines["torch"]


def test_the_report_misses_the_kernel_where_python_leaves_assertions_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = tmp_path / "hvd_sketch" / "sketch" / "native.py"
    without.parent.mkdir(parents=True)
    without.write_text("available = bool")
    (tmp_path / "hvd_sketch" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    monkeypatch.setattr(report, "_PARTS", [part for part in report._PARTS if part.name == "native kernel"])
    (line,) = report.report()
    assert line.startswith("native kernel: MISSING (it is not built)")
