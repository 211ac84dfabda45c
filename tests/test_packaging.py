"""What a user installs: an editable checkout forgives what a wheel drops, so the wheel itself is looked into."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ("kernels", "models", "pipelines", "samplers", "streaming", "training", "ui")
NOT_SOURCE = (".*", "build", "dist", "data", "runs", "*.egg-info", "__pycache__", "*.mp4")


def modules() -> set[str]:
    inside = (path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix() for path in inside} | {"__init__.py", "__main__.py"}


def assets() -> set[str]:
    folders = (ROOT / "assets", ROOT / "ui" / "page" / "static")
    return {path.relative_to(ROOT).as_posix() for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_packages_are_the_directories() -> None:
    folders = {Path(module).parent.as_posix() for module in modules()} - {"."}
    expected = {"millstream"} | {"millstream." + folder.replace("/", ".") for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


def test_every_package_folder_can_be_imported_as_one() -> None:
    folders = {Path(module).parent for module in modules()}
    assert [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from that sdist."""
    # From a copy: setuptools leaves build/ behind, and what lies there from last time would get into the next wheel.
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    # Elsewhere than in the checkout, whose kernels/ would hide the PyPI package of that name.
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_wheel_holds_every_module_and_asset_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"millstream/{name}" for name in modules() | assets() | {"py.typed"}}
    assert names == expected


def test_wheel_carries_licence_and_command(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        texts = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert "Apache License" in texts["LICENSE"]
    assert "millstream = millstream.ui.cli:main" in texts["entry_points.txt"]


def test_sdist_holds_source_assets_and_tests(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    wanted = modules() | assets() | tests | {"README.md", "LICENSE", "pyproject.toml", "Makefile", "py.typed"}
    assert wanted - names == set()
