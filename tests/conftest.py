"""What every test stands on: checked tensor axes, a fixed seed, threads that workers do not fight over."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch
from jaxtyping import config, install_import_hook

import tests.typechecking  # noqa: F401  (the hook finds it by name)

# In front of the first import of the package: its functions then check the tensors they are given and return.
install_import_hook("allmlp", "tests.typechecking.check_tensors")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log() -> Iterator[None]:
    """What the command line makes of the package's log ends with the test."""
    log = logging.getLogger("allmlp")
    handlers, propagate, level = log.handlers[:], log.propagate, log.level
    yield
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Leave tensor axes unchecked: for tracing (compile, export, fx), which hands over placeholders."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
