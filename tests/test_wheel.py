"""What is installed from a wheel: modules, sources of the kernels, parts of pages, marks of typed packages."""

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("align", "policies", "rewards", "rollouts")
KERNELS = ROOT / "policies" / "layers" / "kernels"
SUFFIXES = (".py", ".typed", ".h", ".cpp", ".css", ".js", ".jinja")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the files in a wheel that is built offline from a copy: building writes beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(source / "dist")]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (path,) = (source / "dist").glob("*.whl")
    with ZipFile(path) as archive:
        return set(archive.namelist())


def test_a_wheel_has_the_sources_of_the_kernels(wheel: set[str]) -> None:
    sources = {path.relative_to(ROOT).as_posix() for path in KERNELS.iterdir() if path.suffix in (".h", ".cpp")}
    assert "policies/layers/kernels/kernels.cpp" in sources
    assert sources <= wheel


def test_a_wheel_has_what_the_pages_are_made_of(wheel: set[str]) -> None:
    assert {f"align/report/assets/{name}" for name in ("page.css", "page.js", "report.html.jinja")} <= wheel


def test_every_package_of_a_wheel_is_marked_as_typed(wheel: set[str]) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= wheel


def test_a_wheel_has_every_module_and_nothing_else(wheel: set[str]) -> None:
    packaged = {name for name in wheel if name.startswith(tuple(f"{package}/" for package in PACKAGES))}
    expected: set[str] = set()
    for package in PACKAGES:
        files = (path for path in (ROOT / package).rglob("*") if path.suffix in SUFFIXES)
        expected |= {path.relative_to(ROOT).as_posix() for path in files}
    assert packaged == expected
