"""What importing qtale costs: no heavy package may come with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import qtale
from tiny_models import run_python

HEAVY = {"torch", "transformers", "lm_eval", "datasets", "accelerate", "huggingface_hub", "numpy", "tokenizers"}


def heavy_after(code: str, folder: Path) -> set[str]:
    printed = run_python(f"{code}; import sys; print(*sys.modules)", folder)
    return HEAVY & set(printed.split())


def test_import_qtale_loads_no_heavy_package(tmp_path: Path) -> None:
    assert heavy_after("import qtale", tmp_path) == set()


@pytest.mark.parametrize(
    "code",
    [
        "import qtale; qtale.ops",
        "import qtale; qtale.QuantSpec(4)",
        "import qtale.cli.main as main; main.build_parser()",
        "import qtale; qtale.doctor.report()",
        "import qtale; qtale.inspect",
        "import qtale; qtale.quantize",
        "import qtale; qtale.load_torch",
        "import qtale; qtale.demo",
        "import qtale; qtale.load; qtale.Engine",
        "import qtale; qtale.plan; qtale.planner.Plan",
        "import qtale; qtale.memory.budget(); qtale.memory.devices()",
        "import qtale.cli.main as main; main.main(['plan', 'config.json', '--mode', 'paper', '--budget', '16GiB'])",
    ],
)
def test_these_do_not_load_torch(code: str, tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parent / "fixtures" / "llama-2-7b.json", tmp_path / "config.json")
    assert not heavy_after(code, tmp_path) & {"torch", "transformers", "lm_eval", "datasets", "accelerate"}


def test_the_operators_work_on_numpy_without_torch(tmp_path: Path) -> None:
    code = (
        "import numpy as np; from qtale import ops; codes, scale, _ = ops.quantize(np.ones((4, 64), np.float32), 4); "
        "ops.qmatmul(np.ones((1, 64), np.float32), ops.prepack(codes, scale, num_bits=4), 4)"
    )
    assert heavy_after(code, tmp_path) == {"numpy"}


def test_every_public_name_resolves() -> None:
    for name in qtale.__all__:
        assert getattr(qtale, name) is not None
    assert set(dir(qtale)) >= {"quantize", "load_torch", "nn", "doctor"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qtale.nothing  # noqa: B018
