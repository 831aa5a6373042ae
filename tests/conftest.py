"""Shared by the tests: one torch thread, seeds, the folder of reference arrays, a tiny model."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.addoption("--goldens", default=str(ROOT.parent / "shared/goldens"), help="folder of reference arrays")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def goldens(request) -> Path:
    folder = Path(request.config.getoption("--goldens"))
    if not folder.is_dir():
        pytest.skip(f"no reference arrays in {folder}")
    return folder
