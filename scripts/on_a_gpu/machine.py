"""The machine and the code, for the head of the report."""

import importlib.metadata
import importlib.util
import json
import subprocess
import warnings
from typing import Any

OWNER = ("host", "pid")
"""Not in a report that people pass on."""


def has_card() -> bool:
    """Whether PyTorch finds a CUDA card; without its warning about a missing driver."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def no_card() -> str:
    """Return one line that says what is missing."""
    import torch

    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f"on_a_gpu: PyTorch {torch.__version__} {built} finds no CUDA card; --cpu makes a dry run"


def answer() -> None:
    """Print `machine` as JSON: the work of a process of its own, which alone opens the card."""
    print(json.dumps(machine()))


def machine() -> dict[str, Any]:
    """Return processor, card, versions and commit."""
    import torch

    from capsexp.analysis.speed.bench import processor
    from capsexp.training.environment import describe

    described, _ = describe("cuda" if has_card() else "cpu")
    described["versions"] |= {"torch": torch.__version__, "triton": _version("triton")}
    card = _card() if has_card() else None
    return {
        **{key: value for key, value in described.items() if key not in OWNER},
        "processor": processor(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpu": card,
        "driver": _driver(),
        "tf32": {
            "products": torch.backends.cuda.matmul.allow_tf32,
            "convolutions": torch.backends.cudnn.allow_tf32,
        },
    }


def _card() -> dict[str, Any]:
    import torch

    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": card.name,
        "capability": f"{card.major}.{card.minor}",
        "memory": card.total_memory,
        "processors": card.multi_processor_count,
        "cards": torch.cuda.device_count(),
    }


def _version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else None


def _driver() -> str | None:
    """Return the version of NVIDIA's driver; None if nvidia-smi does not say it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(said.stdout.split()), None)
