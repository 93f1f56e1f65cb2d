"""The installed project is whole, set-up works where little is allowed, and what is pinned is what is asked for."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def asked_for() -> set[str]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    lines = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]
    return {plain(re.match(r"[\w.-]+", line).group()) for line in lines}  # type: ignore[union-attr]


def test_every_package_is_listed() -> None:
    """setuptools takes the packages that pyproject.toml names, no others: a forgotten one is missing once installed."""
    inits = [path for folder in ("backbones", "pipeline", "jobs") for path in (ROOT / folder).rglob("__init__.py")]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in inits}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"objectives"}


def test_constraints_pin_what_the_project_names() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = {plain(line.split("==")[0]) for line in lines}
    assert pinned <= asked_for()
    assert asked_for() - pinned <= {"tqdm", "setuptools"}  # whatever else comes along


def test_set_up_names_no_index() -> None:
    address = re.compile(r"index-url|find-links|https?://[^\s)\"']*(simple|pypi|whl)")
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/setup", ".ci/run", "README.md", ".gitignore"):
        assert not address.search((ROOT / name).read_text()), name


def test_wheel_holds_the_packages_and_no_ssl(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "tests", "runs", "build", "*.egg-info", "__pycache__")
    )
    build = "from setuptools import build_meta; print(build_meta.build_wheel('wheels'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "wheels").glob("*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    for path in ("backbones/names.py", "objectives/dino.py", "pipeline/pretrain.py", "pipeline/data/beton.py"):
        assert path in held
    assert not [path for path in held if path.startswith(("ssl/", "tests/"))]

    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    program = "import ssl, objectives, pipeline, backbones; ssl.create_default_context(); print(objectives.__file__)"
    environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith(str(installed)), done.stderr


FAKE_PYTHON = """#!/usr/bin/env bash
# Answers as an interpreter whose pip installs everything, and which cannot import FFCV.
if [ "$2" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; exit; fi
case "$*" in
    *"print("*) echo 3.12 ;;
    *"import ffcv"* | *Python.h*) exit 1 ;;
    *"install"*) echo "pip $*" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout with a machine of its own: nothing but a shell, its usual small tools, make, and an interpreter."""
    folder, tools = tmp_path / "clone", tmp_path / "bin"
    folder.mkdir()
    tools.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    for name in ("bash", "sh", "env", "mkdir", "touch", "tail", "id", "dirname", "flock", "cp", "make", "cat"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    (tools / "python3").write_text(FAKE_PYTHON)
    (tools / "python3").chmod(0o755)
    return folder


def make(folder: Path, *targets: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(folder.parent / "bin"), "HOME": str(folder.parent)}
    return subprocess.run(["make", *targets], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_set_up_without_root_or_compiler_says_so_and_succeeds(clone: Path) -> None:
    first = make(clone, "setup")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "so data is read through OpenCV" in first.stdout
    assert re.search(r"apt-get install g\+\+ pkg-config libturbojpeg0-dev .*python3.12-dev", first.stdout)
    assert first.stdout.count("pip -m pip install") == 1
    again = make(clone, "setup")
    assert again.returncode == 0
    assert "setup:" not in again.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_set_up_without_a_fitting_python_says_what_to_do(clone: Path) -> None:
    (clone.parent / "bin" / "python3").unlink()
    done = make(clone, "test")
    assert done.returncode != 0
    assert "no Python 3.11, 3.12 or 3.13 found" in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_clean_leaves_runs_and_packed_images(clone: Path) -> None:
    for name in ("rm", "find"):
        (clone.parent / "bin" / name).symlink_to(shutil.which(name) or "")
    for path in (".venv/ready", "runs/one/config.yaml", ".cache/x.beton", "pipeline/__pycache__/x.pyc", "build/x"):
        (clone / path).parent.mkdir(parents=True)
        (clone / path).touch()
    assert make(clone, "clean").returncode == 0
    left = {str(path.relative_to(clone)) for path in clone.rglob("*") if path.is_file()}
    assert {"runs/one/config.yaml", ".cache/x.beton"} < left
    assert not left & {".venv/ready", "pipeline/__pycache__/x.pyc", "build/x"}
