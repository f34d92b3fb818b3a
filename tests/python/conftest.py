"""Fixtures that several test files share: real data, and the demo model."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from qtale import demo
from qtale.errors import NetworkError


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Numbers that a test draws without a seed of its own are the same in every run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of torch: models this small are fastest so, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def qtale_data() -> Path:
    """The folder of real data that QTALE_DATA names (it holds data/, models/, corpus/)."""
    path = os.environ.get("QTALE_DATA")
    if not path:
        pytest.skip("QTALE_DATA is not set: it names the folder with the real data")
    if not Path(path).is_dir():
        pytest.skip(f"QTALE_DATA={path} is not a folder")
    return Path(path)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's HuggingFace folder, downloaded and converted on a machine's first run."""
    try:
        return demo.model(progress=False)
    except NetworkError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def demo_tasks() -> Path:
    """The demo tasks' folder, downloaded on a machine's first run."""
    try:
        return demo.tasks(progress=False)
    except NetworkError as error:
        pytest.skip(str(error))
