"""What a user installs: the wheel, its contents, what importing it brings in, and the README's examples."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
PACKAGE = CHECKOUT / "sqlitepool"


def run(*arguments: str | Path, cwd: Path) -> str:
    """Run this Python in a process of its own; return all that it printed, and fail with it if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Build sdist and, from it, the wheel, in a copy of the checkout; return the wheel and what the build printed."""
    folder = tmp_path_factory.mktemp("build")
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(CHECKOUT, folder / "checkout", ignore=ignore)
    printed = run("-m", "build", "--no-isolation", "--outdir", folder / "dist", "checkout", cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel, printed


@pytest.fixture(scope="module")
def installed(build: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds the wheel as an installer would lay it out."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(build[0]) as archive:
        archive.extractall(folder)
    return folder


def test_building_prints_no_warning(build: tuple[Path, str]) -> None:
    _, printed = build
    assert "Successfully built" in printed
    assert re.findall(r".*(?:\bwarning\b|warning:).*", printed, re.IGNORECASE) == []


def test_the_wheel_holds_the_whole_package_and_nothing_else(build: tuple[Path, str]) -> None:
    wheel, _ = build
    assert (CHECKOUT / "tests").is_dir(), "there must be something that could slip in"
    in_checkout = {
        path.relative_to(CHECKOUT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    in_wheel = {
        name for name in zipfile.ZipFile(wheel).namelist() if not re.match(r"sqlitepool-[^/]+\.dist-info/", name)
    }
    assert in_wheel == in_checkout
    assert "sqlitepool/py.typed" in in_wheel


def test_the_wheel_carries_the_licence_and_needs_nothing(build: tuple[Path, str]) -> None:
    with zipfile.ZipFile(build[0]) as archive:
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
        (licence,) = (archive.read(name) for name in archive.namelist() if name.endswith("/licenses/LICENSE"))
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert required == []
    assert "License-Expression: MIT\n" in metadata
    assert licence == (CHECKOUT / "LICENSE").read_bytes()


def test_the_version_is_the_one_in_the_metadata(installed: Path) -> None:
    program = f"""
import sys
from importlib.metadata import version
sys.path.insert(0, {str(installed)!r})
import sqlitepool
assert sqlitepool.__version__ == version("sqlitepool"), (sqlitepool.__version__, version("sqlitepool"))
"""
    run("-I", "-c", program, cwd=installed)


@pytest.mark.parametrize("flags", ["-I", "-IS"], ids=["with site-packages", "without site-packages"])
def test_the_package_imports_the_standard_library_alone(installed: Path, flags: str) -> None:
    program = f"""
import sys
before = set(sys.modules)
sys.path.insert(0, {str(installed)!r})
import importlib, pkgutil, sqlitepool
for module in pkgutil.walk_packages(sqlitepool.__path__, "sqlitepool."):
    if not module.name.startswith("sqlitepool.ext.") and not module.name.endswith(".__main__"):
        importlib.import_module(module.name)
roots = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(sorted(roots - sys.stdlib_module_names))
"""
    assert run(flags, "-c", program, cwd=installed) == "['sqlitepool']\n"


def test_the_readme_programs_run_in_their_order(installed: Path, tmp_path: Path) -> None:
    programs = re.findall(r"```python\n(.*?)```", (CHECKOUT / "README.md").read_text("utf-8"), re.DOTALL)
    assert programs
    for program in programs:
        run("-W", "error", "-I", "-c", f"import sys\nsys.path.insert(0, {str(installed)!r})\n{program}", cwd=tmp_path)
