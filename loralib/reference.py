"""The reference of DPO and the like: what a model computes now, while the model itself goes on to learn."""

import contextlib
import copy
import functools
from typing import Any

from torch import nn

from loralib.adapters import (
    active_adapter,
    check_not_offloaded,
    check_one,
    check_whole,
    delete_adapter,
    list_adapters,
    places,
)
from loralib.architectures import unwrapped
from loralib.core import SHARED_BASE, Adapted
from loralib.quantized import is_quantized
from loralib.utils import unload

__all__ = ["reference_model"]


def reference_model(model: nn.Module) -> nn.Module:
    """Return a frozen model that keeps computing what `model` computes now; both share the frozen base.

    It takes the memory of one adapter. Use it as `ref_model` of TRL's trainers, for distillation and for comparison.
    Called inside `disable_adapters` it returns the base alone.

    >>> import torch, loralib as lora
    >>> model, x = nn.Sequential(nn.Linear(8, 8)), torch.ones(1, 8)
    >>> names = lora.inject_lora(model, r=2, target_modules=["0"])
    >>> reference, before = reference_model(model), model(x)
    >>> reference[0].weight is model[0].weight, reference[0].lora_A is model[0].lora_A
    (True, False)
    >>> _ = nn.init.ones_(model[0].lora_B)
    >>> torch.equal(reference(x), before), torch.equal(model(x), before)
    (True, False)

    Args:
        model: in any state. Parameters that are trained are copied; all others, and those of quantised layers, are
            shared. What is frozen must remain frozen.

    Raises:
        ValueError: `model` is sharded by `fully_shard` or offloaded by accelerate, or its forward has been replaced by
            one that would keep calling it.
    """
    model = unwrapped(model)
    check_one(model.modules())
    check_whole(model)
    check_not_offloaded(dict(model.named_modules()))
    modules, found = list(model.modules()), places(model)
    layers = [module for module in modules if isinstance(module, Adapted)]
    bare = any(layer._disabled for layer in layers) or any(place.suspended for _, place in found)
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer._unmerged())
        reference: Any = copy.deepcopy(model, _shared(modules))
    _check_apart(reference, {id(module) for module in modules})
    if bare:
        unload(reference)
    else:
        for name in list_adapters(reference):
            if name != active_adapter(reference):
                delete_adapter(reference, name)
    for module in reference.modules():
        if isinstance(module, Adapted):  # merging takes a copy of the weights
            module.merge_weights = False
    return reference.requires_grad_(False).eval()


def _shared(modules: list[nn.Module]) -> dict[int, Any]:
    """What `copy.deepcopy` is to take for copied already."""
    kept: list[Any] = []
    own: set[int] = set()
    for module in modules:
        kept += module._parameters.values()
        place = vars(module).get("_place")
        if place is not None:
            kept += place.replaced.values()
            for name, part in place.parts.items():
                kept += part.tensors.values()  # of an adapter that is not active, and is dropped
                own.update(id(tensor) for tensor in place.tensors(module, name).values() if name == place.active)
        elif isinstance(module, Adapted):
            own.update(map(id, module.adapter_tensors().values()))
        if is_quantized(module):  # what belongs to the weight stands in other attributes
            kept += [value for key, value in vars(module).items() if not key.startswith("_")]
            kept += module._buffers.values()
    trained = {id(tensor) for module in modules for tensor in module._parameters.values() if _trains(tensor)}
    shared = {id(value): value for value in kept if value is not None and id(value) not in own | trained}
    for value in shared.values():
        if isinstance(value, nn.Parameter):
            setattr(value, SHARED_BASE, True)
    return shared


def _trains(tensor: Any) -> bool:
    return tensor is not None and tensor.requires_grad


def _check_apart(reference: nn.Module, originals: set[int]) -> None:
    # A function is not copied, nor what it was made around.
    for path, module in reference.named_modules():
        for key, value in vars(module).items():
            while isinstance(value, functools.partial) or hasattr(value, "__func__"):
                value = value.func if isinstance(value, functools.partial) else value.__func__
            for cell in getattr(value, "__closure__", None) or ():
                held = cell.cell_contents
                if id(getattr(held, "__self__", held)) in originals:
                    raise ValueError(
                        f"{path or type(module).__name__}.{key} was replaced by a function that calls the model it was "
                        "made for; take the reference before the model is given to a trainer"
                    )
