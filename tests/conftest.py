"""Shared by the tests: one torch thread, seeds, the folders of reference arrays."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import reference
import torch
from hypothesis import settings

# The same examples each time, so that a change is judged by what it changes; other ones: --hypothesis-profile=default.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.addoption("--goldens", default=str(ROOT.parent / "shared/goldens"), help="folder of reference arrays")
    parser.addoption("--differences", action="store_true", help="print the largest ones, for each folder compared")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def goldens(request) -> Path:
    folder = Path(request.config.getoption("--goldens"))
    if not folder.is_dir():
        pytest.skip(f"no reference arrays in {folder}")
    return folder


def pytest_generate_tests(metafunc):
    """A module's ``GOLDENS`` says of which cases its fixtures are made: from ``--goldens``, and from our small ones."""
    for fixture, cases in getattr(metafunc.module, "GOLDENS", {}).items():
        if fixture in metafunc.fixturenames:
            given = [Path(metafunc.config.getoption("--goldens")) / case for case in cases]
            small = [folder for case in cases if (folder := reference.OURS / case).is_dir()]
            names = [*cases, *(f"small_{folder.name}" for folder in small)]
            metafunc.parametrize(fixture, given + small, indirect=True, scope="module", ids=names)


@pytest.fixture(scope="module")
def golden(request) -> reference.Golden:
    return reference.Golden(request.param)


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--differences"):
        terminalreporter.section("largest differences")
        for line in reference.table():
            terminalreporter.line(line)
