"""The command and the versions, written beside every artefact."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("predict-train", "torch", "transformers", "lightning", "safetensors")


def command() -> str:
    """The command line of this process, quoted for a shell."""
    name = Path(sys.argv[0]).name.replace(
        "__main__.py", "predict-train"
    )  # after `python -m`, the name is that of the file
    return shlex.join([name, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that figures depend on; packages that are not installed are left out.

    Torch's own version names its build (`+cpu`, `+cu130`); the version of its package may not.
    """
    import torch

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"torch": str(torch.__version__)}


def hardware() -> dict[str, Any]:
    """The CPU, its cores, torch's threads, the GPUs and the machine's load."""
    import torch

    cpu, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "load_average": os.getloadavg()[0],
    }
