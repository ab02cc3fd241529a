"""What is installed is what is in the repository: packages, data files, versions and the direction of imports."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

import rft_lightning

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Folder in the repository -> package it is installed as.
FOLDERS = {
    "rft_lightning": "rft_lightning",
    "datamodules": "rft_lightning.datamodules",
    "callbacks": "rft_lightning.callbacks",
    "configs": "rft_lightning.configs",
}


def files(folder: str, pattern: str = "*") -> list[Path]:
    """Files below a folder of the repository that are no build products."""
    found = (ROOT / folder).rglob(pattern)
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def installed(path: Path) -> str:
    """Where a file of the repository lies in the wheel."""
    folder, *rest = path.relative_to(ROOT).parts
    return "/".join([*FOLDERS[folder].split("."), *rest])


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in files(folder, "*.py")]


def imports(path: Path) -> Iterator[tuple[int, str, int]]:
    """(level, module, line) of every import in a file; level 0 is absolute."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, node.lineno


def test_tests_run_on_this_checkout() -> None:
    found = Path(rft_lightning.__file__).resolve().parent
    assert found == ROOT / "rft_lightning", "another installation shadows this checkout; run `pip install -e .` here"


def test_listed_packages_are_the_folders() -> None:
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    with_sources = {".".join(installed(path).split("/")[:-1]) for path in sources()}
    assert len(listed) == len(set(listed))
    assert set(listed) == with_sources, "update [tool.setuptools] packages in pyproject.toml"


@pytest.mark.parametrize("package", ["rft_lightning.configs", "rft_lightning.assets"])
def test_data_folders_are_found(package: str) -> None:
    # Without an __init__.py the editable install does not find a mapped folder.
    assert Path(str(resources.files(package))).is_dir()


def test_every_mapped_folder_exists() -> None:
    mapping = PYPROJECT["tool"]["setuptools"]["package-dir"]
    assert {package: folder for folder, package in FOLDERS.items()} == mapping
    assert all((ROOT / folder).is_dir() for folder in mapping.values())


def test_mapped_folders_are_flat() -> None:
    nested = [path for folder in ("datamodules", "callbacks") for path in files(folder, "*.py")]
    assert [path for path in nested if path.parent.parent != ROOT] == []


def test_no_relative_imports() -> None:
    found = [f"{path.relative_to(ROOT)}:{line}" for path in sources() for level, _, line in imports(path) if level]
    assert found == [], "write `from rft_lightning...`: the folders are imported under another name than they lie in"


def test_mapped_folders_are_imported_by_their_full_name() -> None:
    bare = {"datamodules", "callbacks", "configs"}
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in [*sources(), *files("tests", "*.py"), *files("benchmarks", "*.py")]
        for _, module, line in imports(path)
        if module.split(".")[0] in bare
    ]
    assert found == [], "write `rft_lightning.datamodules` or `rft_lightning.callbacks`"


def test_dependencies_point_one_way() -> None:
    above = ("rft_lightning.datamodules", "rft_lightning.callbacks")
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files("rft_lightning", "*.py")
        for _, module, line in imports(path)
        if module.startswith(above) and path.name != "cli.py"
    ]
    assert found == [], "rft_lightning imports datamodules and callbacks in cli.py only"


def test_every_dependency_has_a_bound_and_is_documented() -> None:
    documented = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in PYPROJECT["project"]["dependencies"]:
        name = re.split(r"[\[<>=!~ ]", requirement)[0]
        assert ">=" in requirement, f"{name} has no lower bound"
        assert re.search(rf"^\| {name}( \\\*)? \|", documented, re.MULTILINE), (
            f"{name} is missing in docs/dependencies.md"
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy: setuptools would reuse whatever an older build left in the checkout."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = work.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_claims_no_other_name(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"rft_lightning", f"rft_lightning-{rft_lightning.__version__}.dist-info"}


def test_wheel_holds_every_file(wheel: zipfile.ZipFile) -> None:
    configs = [path for path in files("configs") if path.suffix in (".yaml", ".sh", ".sbatch")]
    expected = {installed(path) for path in [*sources(), *configs, *files("rft_lightning/assets")]}
    assert expected | {"rft_lightning/py.typed"} <= set(wheel.namelist()), "update package-data in pyproject.toml"


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    info = f"rft_lightning-{rft_lightning.__version__}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {rft_lightning.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "rft = rft_lightning.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()
