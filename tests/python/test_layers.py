"""The package's layers: a file imports only from its own level or lower ones, wherever the import stands."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import qtale

ROOT = Path(qtale.__file__).parent
# The package itself only re-exports, lazily; it belongs to no level.
LEVELS = (
    {"errors", "files", "names", "process", "spec"},
    {"_core", "tensors", "kernels", "ops", "solve", "torch_library", "torch_ops", "torch_dense"},
    {"checkpoint", "format", "layerwise", "nn"},
    {"importance", "planner", "memory", "ptq", "routing", "qat"},
    {"engine"},
    {"integrations", "deployment", "report", "demo", "bench"},
    {"cli", "eval", "doctor", "__main__"},
)
LEVEL = {name: level for level, members in enumerate(LEVELS) for name in members}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part_of(path: Path) -> str:
    """The member of the package that a file belongs to: ``qtale/nn/linear.py`` → ``nn``."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(source: str) -> set[str]:
    """Members of qtale that a source text imports; from ``qtale`` itself, names that are no member are left out."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "relative imports hide the level"
            modules = [node.module]
            if node.module == "qtale":
                modules = [f"qtale.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [module.split(".") for module in modules]
        found.update(names[1] for names in parts if names[0] == "qtale" and len(names) > 1)
    return found & set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    assert part in LEVEL, f"{part} has no level; add it to LEVELS"
    upward = {other for other in imported_parts(path.read_text()) if LEVEL[other] > LEVEL[part]}
    assert not upward, f"{part} (level {LEVEL[part]}) imports {upward}"


def test_the_check_sees_every_way_to_import() -> None:
    source = "import qtale.cli.main\ndef f():\n    from qtale.eval import run\nfrom qtale import doctor, __version__\n"
    assert imported_parts(source) == {"cli", "eval", "doctor"}
    assert imported_parts("import numpy\nfrom qtale import QuantSpec") == set()


def test_level_0_imports_nothing_but_the_standard_library_and_itself() -> None:
    for name in LEVELS[0]:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not {module.split(".")[0] for module in modules if module} & {"torch", "numpy", "transformers"}


@pytest.mark.parametrize("name", ["fields", "plan", "problem", "scores", "solve", "wait"])
def test_the_plan_and_its_solvers_need_nothing_of_the_package_but_level_0(name: str) -> None:
    assert imported_parts((ROOT / "planner" / f"{name}.py").read_text()) <= LEVELS[0] | {"planner"}
