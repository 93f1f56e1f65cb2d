"""What holds the house up: which way imports run, who may import what, and that Python's own `ssl` stays Python's."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"backbones": "backbones", "objectives": "ssl/objectives", "pipeline": "pipeline", "jobs": "jobs"}
LAYERS = {
    "backbones": (),
    "objectives": ("backbones",),
    "pipeline": ("backbones", "objectives"),
    "jobs": ("backbones", "objectives", "pipeline"),
}
ONLY_IN = {
    "ray": ("pipeline/cluster/", "jobs/cluster.py"),  # training on a cluster; jobs for one
    "mlflow": ("pipeline/tracking/",),
    "ffcv": ("pipeline/data/",),
}
MODULES = [path for folder in FOLDERS.values() for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The packages that a file imports, each with whether that happens when the file itself is imported."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lazy = {id(inner) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written out from the package"
            names = [node.module or ""]
        else:
            continue
        for name in names:
            yield name.split(".")[0], id(node) not in lazy


def modules_after(program: str) -> set[str]:
    """Names of the modules loaded after a program ran in a fresh interpreter, in the root of the checkout."""
    program += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    package = next(name for name, folder in FOLDERS.items() if path.is_relative_to(ROOT / folder))
    for name, at_import in imports(path):
        assert name not in LAYERS or name in (*LAYERS[package], package), f"{package} imports {name}"
        if name in ONLY_IN:
            assert any(path.is_relative_to(ROOT / home) for home in ONLY_IN[name]), (
                f"{name} is imported in {ONLY_IN[name]}"
            )
            assert not at_import or name == "ffcv", f"{name} is imported inside functions"


def test_ssl_stays_pythons_own() -> None:
    assert not (ROOT / "ssl" / "__init__.py").exists()
    program = "import pipeline, objectives, ssl; print(ssl.__file__, file=sys.stderr); ssl.create_default_context()"
    done = subprocess.run([sys.executable, "-c", "import sys; " + program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not Path(done.stderr.strip()).is_relative_to(ROOT / "ssl")


@pytest.mark.parametrize(
    "module",
    ["backbones", "backbones.names", "objectives", "objectives.views", "pipeline.config", "pipeline.asked",
     "pipeline.recipes", "pipeline.tracking", "pipeline.pretrain", "pipeline.evaluate", "pipeline.compare",
     "pipeline.pack", "pipeline.classify", "pipeline.replay", "pipeline.results", "pipeline.learns",
     "pipeline.bench.__main__", "pipeline.tracking.__main__", "jobs.submit", "jobs.scheduler", "jobs.render.__main__"],
)  # fmt: skip
def test_command_line_waits_for_no_heavy_import(module: str) -> None:
    heavy = {"torch", "timm", "torchvision", "ray", "mlflow", "ffcv", "numba", "cv2", "pandas", "pyarrow"}
    assert not modules_after(f"import pipeline, {module}") & heavy


@pytest.mark.parametrize(
    "module",
    ["backbones.build", "objectives.dino", "objectives.mae", "pipeline.data.loader", "pipeline.training.worker"],
)
def test_training_imports_no_ray_mlflow_or_ffcv(module: str) -> None:
    """They are imported where they are used: `--engine local` runs on machines that have none of them."""
    assert not modules_after(f"import pipeline, {module}") & {"ray", "mlflow", "ffcv"}


@pytest.mark.parametrize("folder", ["backbones", "ssl/objectives", "pipeline", "jobs"])
def test_nothing_tells_of_the_machine_it_was_written_on(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for trace in ("/home/", "/root/", "/work/", "pypi.org", "extra-index-url"):
            assert trace not in path.read_text(), f"{path} names {trace}"
