"""Where a model computes and in what precision, in training and after it."""

import contextlib
from dataclasses import dataclass

import torch

from common.cli import UserError, knob

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class ComputeKnobs:
    """The knobs of any computation with a model."""

    device: str = knob("auto", "cpu, cuda, mps, or auto for the fastest that is there")
    precision: str = knob("fp32", "of the matrix products (autocast); weights and updates stay float32", PRECISIONS)
    eval_batch_size: int = knob(40, "texts at a time where nothing is trained")


def choose_device(name):
    """The torch device for --device: "auto" is the first of cuda, mps, cpu that is there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    there = device is not None and available.get(device.type, False)
    if there and device.type == "cuda":
        there = (device.index or 0) < torch.cuda.device_count()
    if not there:
        usable = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"--device {name}: no such device here; use auto or one of: {usable}")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # what is asked of CUDA without saying of which one
    return device


def autocast(device, precision):
    """The context in which matrix products are computed in the chosen precision."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()


def to_device(batch, device):
    return {name: tensor.to(device) for name, tensor in batch.items()}
