"""One process, or the several that torchrun starts: who is who, and sums over all.

    torchrun --nproc_per_node 2 run_training.py

Each process computes its share of every batch, and the gradients are added, so the number of processes changes nothing
but the speed and the order of sums.
"""

import os
import sys

import torch
import torch.distributed as dist


def start(device):
    """Join the other processes if torchrun started this one; return the device of this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends): one process prints
    return device


def stop():
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """Whether this is the process that prints and writes files."""
    return rank() == 0


def share(items):
    """The part of a list that this process works on."""
    return items[rank() :: processes()]


def add_up(tensor):
    """Replace the tensor's values by their sums over all processes."""
    if processes() > 1:
        dist.all_reduce(tensor)


def largest(number, device):
    """The largest of the numbers that the processes give."""
    if processes() == 1:
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def collect(value):
    """What every process gave, in the order of their ranks."""
    if processes() == 1:
        return [value]
    values = [None] * processes()
    dist.all_gather_object(values, value)
    return values
