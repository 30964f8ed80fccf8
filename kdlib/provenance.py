"""Where a run comes from: device, versions, threads and date. None of it is in a run's key."""

import importlib.metadata
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

DECIDES_NOTHING = "it only records what a run was made with"


def provenance(device: torch.device, precision: str = "fp32") -> dict[str, Any]:
    """What is recorded with a run that is trained here and now."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kdlib": version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def version() -> str:
    """kdlib's version, or "not installed" where it is imported from a clone."""
    try:
        return importlib.metadata.version("kdlib")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The processor's name, as the system gives it."""
    # Linux has it in a file; on other systems Python knows it.
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
