"""What `auto` chooses on each kind of device: one table, which docs/devices.md explains."""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Choices:
    """What `auto` means on one kind of device. All have `sdpa` attention and the fused AdamW."""

    mixed_precision: str  # what the hardware computes in, with loss scaling where it is fp16
    compile: bool
    loss_impl: str  # chunked where memory is the card's


CHOICES = {
    "CUDA from 8.0 on": Choices("bf16", compile=True, loss_impl="chunked"),  # Ampere
    "CUDA 7.0 to 7.5": Choices("fp16", compile=True, loss_impl="chunked"),  # V100, T4
    "CUDA before 7.0": Choices("no", compile=False, loss_impl="chunked"),  # Triton refuses these
    "ROCm": Choices("bf16", compile=True, loss_impl="chunked"),
    "XPU": Choices("bf16", compile=False, loss_impl="chunked"),
    "MPS": Choices("no", compile=False, loss_impl="chunked"),
    "CPU with bf16": Choices("bf16", compile=False, loss_impl="plain"),  # AVX512-BF16 or AMX
    "CPU": Choices("no", compile=False, loss_impl="plain"),
}


def best_device() -> str:
    """The accelerator of this machine, or the CPU where there is none or the launcher asks for it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return "cpu"
    return accelerator.type


def kind_of(device: torch.device) -> str:
    """The row of CHOICES for a device.

    Raises:
        ValueError: another kind of device.
    """
    match device.type:
        case "cpu":
            has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            return "CPU with bf16" if has_bf16 else "CPU"
        case "cuda" if torch.version.hip:
            return "ROCm"
        case "cuda":
            capability = torch.cuda.get_device_capability(device)
            if capability >= (8, 0):
                return "CUDA from 8.0 on"
            return "CUDA 7.0 to 7.5" if capability >= (7, 0) else "CUDA before 7.0"
        case "xpu" | "mps":
            return device.type.upper()
    raise ValueError(f"the device is {device.type}: give one of CUDA, ROCm, XPU, MPS and CPU")


def choices(device: torch.device) -> Choices:
    """What `auto` chooses on this device."""
    return CHOICES[kind_of(device)]


def description(device: torch.device) -> str:
    """One line: the device's kind and what `auto` chooses on it."""
    auto = choices(device)
    compiled = "compiled" if auto.compile else "eager"
    return f"{kind_of(device)}: mixed_precision {auto.mixed_precision}, {compiled}, {auto.loss_impl} loss"
