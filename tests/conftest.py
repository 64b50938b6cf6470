"""What every test stands on: checked tensor axes, a fixed seed, threads that workers do not fight over."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder

import pytest
import torch
from jaxtyping import config, install_import_hook

from tests.typechecking import check_anew  # the hook finds check_tensors by name

# Where there is no GPU Triton interprets its kernels; it settles that when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# In front of the first import of the package: its functions then check the tensors they are given and return.
install_import_hook("allmlp", "tests.typechecking.check_tensors")


class _Unchecked:
    """Kernels are source for Triton, which takes no decorated functions."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, path) if name.startswith("allmlp.ops.kernels.") else None


sys.meta_path.insert(0, _Unchecked)  # type: ignore[arg-type]

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# The first backward starts a thread for each kind of device, and processes forked from then on can take none. torch's
# fake tensors (compile, export) pretend that there is a GPU: in front of them there is no thread to start.
torch.zeros((), requires_grad=True).backward()


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


@pytest.fixture(autouse=True)
def _checked() -> None:
    check_anew()


@pytest.fixture
def unchecked(_checked: None) -> None:
    """Leave tensor axes unchecked: for tracing (compile, export, fx), which hands over placeholders."""
    config.update("jaxtyping_disable", True)
