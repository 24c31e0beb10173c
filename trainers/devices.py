"""What a device could do at most: peak rates of matrix products, from its maker's data sheet."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # plans need the table alone
    import torch


@dataclass(frozen=True, slots=True)
class Peak:
    """FLOP/s of dense matrix products, without sparsity: the makers' headline figures count it twice."""

    bfloat16: float
    float32: float
    """Without TF32, which the trainer does not use."""
    source: str


PEAKS = {
    "H200": Peak(989e12, 67e12, "NVIDIA H200 data sheet"),
    "H100 PCIe": Peak(756e12, 51e12, "NVIDIA H100 data sheet"),
    "H100 NVL": Peak(835e12, 60e12, "NVIDIA H100 NVL data sheet"),
    "H100": Peak(989e12, 67e12, "NVIDIA H100 data sheet"),
    "A100": Peak(312e12, 19.5e12, "NVIDIA A100 data sheet"),
    "L40S": Peak(362e12, 91.6e12, "NVIDIA L40S data sheet"),
    "L4": Peak(121e12, 30.3e12, "NVIDIA L4 data sheet"),
    "A10": Peak(125e12, 31.2e12, "NVIDIA A10 data sheet"),
    "RTX 4090": Peak(165.2e12, 82.6e12, "NVIDIA Ada architecture white paper"),
}


def peak(device_name: str) -> Peak | None:
    """The peak of a device by the name CUDA gives it; None if it is not in the table.

    Names are compared word by word ("NVIDIA H100 80GB HBM3" is an H100, an A10G is no A10); of several
    that fit the longest counts.
    """
    words = device_name.replace("-", " ").split()
    fitting = [
        name
        for name in PEAKS
        if any(words[i : i + len(name.split())] == name.split() for i in range(len(words)))
    ]
    return PEAKS[max(fitting, key=len)] if fitting else None


def device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held: of the GPU's memory, or of the machine's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
