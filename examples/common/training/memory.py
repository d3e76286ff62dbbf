"""The memory that a training needs, told before it is tried.

What is held throughout follows from counts (`account`). The rest, activations above all, is that of a step on tensors
that have shapes and no numbers (`training_memory`): it goes through the model's own code, so that attention kernels,
gradient checkpointing and frozen layers count as they are.
"""

import weakref
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from common.training import loop


class Memory(NamedTuple):
    """Bytes. Gradients come as activations go, so `peak`, the most at one time, is less than the sum of all."""

    weights: int
    gradients: int
    optimizer: int
    peak: int


def account(total, trained):
    """The bytes that float32 training with AdamW has to hold, activations aside, and those of what it leaves."""
    held = {
        "weights": 4 * total,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,  # two moments
    }
    return {**held, "together": sum(held.values()), "checkpoint": 4 * trained}


def plain_tensors(tensor):
    """The tensors that hold the numbers of one, several if it is quantised."""
    state = getattr(tensor, "quant_state", None)
    if state is not None:  # of bitsandbytes' 4-bit weights; the scales of the scales are in another state
        states = [state] if state.state2 is None else [state, state.state2]
        scales = [part for each in states for part in (each.absmax, each.code, each.offset) if part is not None]
        return [tensor, *scales]
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [plain for name in tensor.__tensor_flatten__()[0] for plain in plain_tensors(getattr(tensor, name))]


class _Live(TorchDispatchMode):
    # What the tensors hold that operations made within the block, or `add` was given, until the last view is gone.
    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def add(self, tensor):
        for plain in plain_tensors(tensor):
            storage = plain.untyped_storage()
            key = storage._cdata
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += self.sizes[key]
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, key)

    def _gone(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


def training_memory(build, batch_size, seq_len, gradient_checkpointing=False):
    """The `Memory` of training a causal language model with AdamW on full batches; takes seconds and no memory to tell.

    Beside it a process holds some 0.5 GB for Python and the libraries; and on a CPU what the allocator does not give
    back, unless MALLOC_MMAP_THRESHOLD_=65536 is in its environment.

    Args:
        build: function without arguments that makes the model as it trains: adapted, frozen, in its dtype (that of
            `from_config`; it cannot be converted afterwards), quantised.
        batch_size: texts at a time, those of a part with --grad_accumulation.
        seq_len: tokens of each text, all with labels.
        gradient_checkpointing: whether activations are computed again in the backward pass.
    """
    with FakeTensorMode():
        model = build().train()
        if gradient_checkpointing:
            loop.set_checkpointing(model, True)
        parameters = list(model.parameters())
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        with _Live() as live:
            for tensor in (*parameters, *model.buffers()):
                live.add(tensor)
            weights = live.now
            for _ in range(2):  # the moments of Adam are made at the end of the first
                tokens = torch.zeros(batch_size, seq_len, dtype=torch.long)
                output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
                logits = output.logits[:, :-1].flatten(0, 1).float()
                loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
                del output, logits
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        gradients = sum(parameter.nbytes for parameter in trained)
    return Memory(weights, gradients, 2 * gradients, live.most)


def largest_that_fits(builds, memory, batch_size, seq_len, **options):
    """(Name, `Memory`) of the largest of {name: build} whose peak is within `memory` bytes; None if none is."""
    sizes = {name: training_memory(build, batch_size, seq_len, **options) for name, build in builds.items()}
    fitting = [(name, size) for name, size in sizes.items() if size.peak <= memory]
    return max(fitting, key=lambda pair: pair[1].weights, default=None)
