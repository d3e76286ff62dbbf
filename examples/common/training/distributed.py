"""One process, or the several that torchrun starts: who is who, and sums over all.

    torchrun --nproc_per_node 2 run_training.py

Each process computes its share of every batch, and the gradients are added, so the number of processes changes nothing
but the speed and the order of sums. With --fsdp the frozen weights are shared, too: a process holds its part of them,
and each block is put together where it computes.
"""

import math
import os
import sys

import torch
import torch.distributed as dist

from common.cli import UserError


def started():
    """How many processes torchrun started, before or after they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(device):
    """Join the other processes if torchrun started this one; return the device of this process."""
    if started() == 1:
        return device
    if device.type == "mps":
        raise UserError("--device mps: it is for one process; start with python, or give --device cpu")
    if device.type == "cuda":
        place, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= there:
            raise UserError(f"torchrun started more processes than there are GPUs; give --nproc_per_node {there}")
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends): one process prints
    return device


def stop():
    """Leave the other processes, once all are done."""
    if dist.is_initialized():
        dist.barrier()
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


def share_batches(batches, model):
    """The batches that this process computes; of a sharded model as many as every other, as it takes all for each."""
    mine = share(batches)
    if is_sharded(model) and len(mine) < math.ceil(len(batches) / processes()):
        mine = [*mine, batches[0]]  # computed twice
    return mine


def shard(model, device):
    """Divide what is frozen between the processes, block by block; what trains stays whole. Ends on the device."""
    from torch.distributed.device_mesh import init_device_mesh  # seconds to import
    from torch.distributed.fsdp import fully_shard

    options = {"mesh": init_device_mesh(device.type, (processes(),))}
    options["ignored_params"] = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for part in [*_blocks(model), model]:
        fully_shard(part, **options)
    model.to(device)


def _blocks(module):
    # What is in a list, but not in a list within such a block.
    for child in module.children():
        yield from child if isinstance(child, torch.nn.ModuleList) else _blocks(child)


def is_sharded(model):
    if processes() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


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


def union(values):
    """The dicts of all processes in one."""
    return {key: value for part in collect(values) for key, value in part.items()}


def collect(value):
    """What every process gave, in the order of their ranks."""
    if processes() == 1:
        return [value]
    values = [None] * processes()
    dist.all_gather_object(values, value)
    return values
