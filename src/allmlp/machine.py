"""The machine and the versions that figures depend on."""

import os
import platform
import time
from pathlib import Path
from typing import Any

import timm
import torch
import transformers

from allmlp._version import __version__


def surroundings() -> dict[str, Any]:
    """What a run's metrics say of where it ran."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "device": device,
        "cores": cores(),
        "python": platform.python_version(),
        "allmlp": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
