"""Several adapters on one base: what each puts into the model, and which of them is there.

A model that adapters were put into has slots: places where each adapter has a module of its own (a LoRA layer, or a
layer with a bias or a weight of its own), and where the original module goes back when no adapter is active. Switching
exchanges these modules. They share submodules and all other Parameters with the original, so an adapter costs its own
tensors only, and `state_dict()` holds the active adapter alone, under the plain names.
"""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from loralib.layers import LoRALayer, is_sharded

__all__ = ["active_adapter", "delete_adapter", "list_adapters", "set_adapter"]

DEFAULT_NAME = "default"
LORA_NAMES = frozenset({"lora_A", "lora_B"})


class Part(NamedTuple):
    """What an adapter puts into one slot: the module, and which Parameters and buffers of it are the adapter's own."""

    module: nn.Module
    own: frozenset[str]

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's own tensors, by their names in the module."""
        return {key: tensor.detach() for key, tensor in own_tensors(self.module).items() if key in self.own}


class Slot:
    """One place of a model: the module that was there first, each adapter's part by name, and the active adapter."""

    def __init__(self, base: nn.Module):
        self.base = base
        self.parts: dict[str, Part] = {}
        self.active: str | None = None
        base.__dict__["_slot"] = self  # past nn.Module, which would register modules inside

    def add(self, name: str, module: nn.Module, own: frozenset[str]) -> None:
        module.__dict__["_slot"] = self
        self.parts[name] = Part(module, own)

    def module(self, name: str | None) -> nn.Module:
        """What belongs here while adapter `name` (None: no adapter) is active."""
        return self.parts[name].module if name in self.parts else self.base

    def own(self, module: nn.Module) -> frozenset[str]:
        return next((part.own for part in self.parts.values() if part.module is module), frozenset())


def list_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters of `model`, sorted; LoRA layers made by hand are called "default".

    >>> import loralib as lora
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    >>> lora.inject_lora(model, r=2, target_modules=["0"], adapter_name="sst2")
    ['0']
    >>> lora.inject_lora(model, r=4, target_modules=["0", "1"], adapter_name="mrpc")
    ['0', '1']
    >>> lora.list_adapters(model), lora.active_adapter(model)
    (['mrpc', 'sst2'], 'mrpc')
    >>> lora.set_adapter(model, "sst2")
    >>> model[0].r, model[1]
    (2, Linear(in_features=8, out_features=4, bias=True))
    >>> lora.delete_adapter(model, "mrpc")
    >>> lora.list_adapters(model)
    ['sst2']
    """
    names = {name for slot in _slots(model) for name in slot.parts}
    return sorted(names | ({DEFAULT_NAME} if _made_by_hand(model) else set()))


def active_adapter(model: nn.Module) -> str | None:
    """Return the name of the adapter that `model` computes with; None if it has none. Example: `list_adapters`."""
    for slot in _slots(model):
        return slot.active
    return DEFAULT_NAME if _made_by_hand(model) else None


def set_adapter(model: nn.Module, adapter_name: str) -> None:
    """Make `adapter_name` the adapter that `model` computes with, trains and saves, its head and biases included.

    Nothing is copied or loaded; the modes (training, merged) carry over. In eval the layers of an adapter that merges
    (`merge_weights`) are merged at the next forward, which takes a copy of the adapted weights; adapters that take
    turns are better loaded with `merge_weights=False`. Example: see `list_adapters`.

    Raises:
        ValueError: `model` has no such adapter, or is sharded by `fully_shard`. Nothing has been changed then.
    """
    _check_present(model, adapter_name)
    slots = _slots(model)
    exchange(model, lambda slot: slot.module(adapter_name))
    for slot in slots:
        slot.active = adapter_name


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Drop an adapter that is not active, and its tensors. Example: see `list_adapters`.

    Raises:
        ValueError: `model` has no such adapter, or it is the active one. Nothing has been changed then.
    """
    _check_present(model, adapter_name)
    if adapter_name == active_adapter(model):
        raise ValueError(
            f"adapter {adapter_name!r} is active; call lora.set_adapter(model, ...) with another one first "
            f"({', '.join(list_adapters(model))}), or lora.unload(model) to drop all"
        )
    for slot in _slots(model):
        slot.parts.pop(adapter_name, None)
        if not slot.parts:
            del slot.base.__dict__["_slot"]


def add_part(slot: Slot, name: str, own: frozenset[str], layer: LoRALayer | None, copies: dict[int, Tensor]) -> None:
    """Give adapter `name` its part in `slot`: `layer`, or else the base again, with copies of what is to be its `own`.

    `copies` is one dict for all parts of an adapter: tensors that are tied in the base have one copy.
    """
    base = slot.base
    module = layer or copy.copy(base)
    module._parameters, module._buffers = dict(module._parameters), dict(module._buffers)
    shared = own_tensors(base)
    for key, tensor in own_tensors(module).items():
        if key in own:
            is_parameter = isinstance(tensor, nn.Parameter)
            if tensor is shared.get(key):
                copied = tensor.detach().clone()
                tensor = copies.setdefault(id(tensor), nn.Parameter(copied) if is_parameter else copied)
                setattr(module, key, tensor)
            tensor.requires_grad = is_parameter and tensor.is_floating_point()
    slot.add(name, module, own)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the Parameters and saved buffers of a module itself, by name."""
    buffers = {key: value for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set}
    return {key: value for key, value in {**module._parameters, **buffers}.items() if value is not None}


def slot_of(module: nn.Module) -> Slot | None:
    return module.__dict__.get("_slot")


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of `model` by name, under all their names, as they are while no adapter is active."""
    modules: dict[str, nn.Module] = {}
    layer: str | tuple = ()  # the last adapted one: what is in it follows it
    for name, module in model.named_modules(remove_duplicate=False):
        if not name.startswith(layer):
            slot = slot_of(module)
            modules[name] = slot.base if slot else module
            if isinstance(module, LoRALayer):  # its dropout is nobody's target
                layer = name + "."
    return modules


def active_parts(modules: dict[str, nn.Module]) -> dict[str, Part]:
    """Return what the active adapter has in the slots of `modules`, by name, whether or not it is disabled just now."""
    slots = {name: slot_of(module) for name, module in modules.items()}
    return {name: slot.parts[slot.active] for name, slot in slots.items() if slot and slot.active in slot.parts}


def adopt(model: nn.Module) -> None:
    """Make slots for the LoRA layers that `model` was built with, so that other adapters can take their place."""
    for layer in _made_by_hand(model):
        base = copy.copy(layer)
        base._parameters = {key: value for key, value in layer._parameters.items() if key not in LORA_NAMES}
        base._modules = {**layer._modules, "lora_dropout": nn.Identity()}
        base.r, base.scaling = 0, 0.0
        slot = Slot(base)
        slot.add(DEFAULT_NAME, layer, LORA_NAMES)
        slot.active = DEFAULT_NAME


def exchange(model: nn.Module, choose: Callable[[Slot], nn.Module]) -> None:
    """Put `choose(slot)` into every slot of `model`."""
    found = ((slot, module) for module in model.modules() if (slot := slot_of(module)) is not None)
    changes = [(slot, module, choose(slot)) for slot, module in found if choose(slot) is not module]
    if changes:
        check_whole(model)
    for slot, old, new in changes:
        _hand_over(slot, old, new)
    replace_modules(model, {id(old): new for _, old, new in changes})


@contextlib.contextmanager
def exchanged(model: nn.Module, choose: Callable[[Slot], nn.Module]) -> Iterator[None]:
    """Within the block the slots hold what `choose` says, afterwards the active adapter's modules again."""
    exchange(model, choose)
    try:
        yield
    finally:
        exchange(model, lambda slot: slot.module(slot.active))


def without_heads(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within the block the slots hold the base wherever the active adapter owns more than `lora_A` and `lora_B`."""
    return exchanged(model, lambda slot: slot.base if _owns_more(slot) else slot.module(slot.active))


def replace_modules(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Put `replacements[id(module)]` in the place of `module`, everywhere below `model`."""
    if replacements:
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                parent._modules[name] = replacements.get(id(child), child)


def _owns_more(slot: Slot) -> bool:
    return slot.active in slot.parts and bool(slot.parts[slot.active].own - LORA_NAMES)


def _hand_over(slot: Slot, old: nn.Module, new: nn.Module) -> None:
    # The modules outside the model miss what is done to it. Shared Parameters and buffers may have been replaced (the
    # base keeps those that an adapter in between has of its own), ...
    for source, target in ((old, slot.base), (slot.base, new)):
        own = slot.own(source) | slot.own(target)
        for kind in ("_parameters", "_buffers"):
            ours = getattr(target, kind)
            theirs = getattr(source, kind).items()
            ours.update({key: tensor for key, tensor in theirs if key in ours and key not in own})
    # ... those of one's own stay behind on a device or in a dtype, ...
    before = own_tensors(old)
    for key, tensor in own_tensors(new).items():
        like = before.get(key)
        device = next(iter(before.values()), tensor).device if like is None else like.device
        dtype = tensor.dtype if like is None else like.dtype
        if (tensor.device, tensor.dtype) != (device, dtype) and not tensor.is_meta:
            tensor.data = tensor.data.to(device, dtype)
    # ... and the modes are those of the last time.
    if isinstance(new, LoRALayer) and new.training != old.training:
        new.train(old.training)
    new.training = old.training
    if isinstance(old, LoRALayer):
        old._merge_cache = None
        if isinstance(new, LoRALayer):
            new.merged = old.merged


def _slots(model: nn.Module) -> list[Slot]:
    return [slot for slot in map(slot_of, model.modules()) if slot is not None]


def _made_by_hand(model: nn.Module) -> list[LoRALayer]:
    return [
        module
        for module in model.modules()
        if isinstance(module, LoRALayer) and module.has_adapter and slot_of(module) is None
    ]


def any_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` shards `model` or a part of it; just after a forward not all Parameters tell."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and imported if it is in use
    kinds = getattr(fsdp, "FSDPModule", ())
    return any(
        isinstance(module, kinds) or any(map(is_sharded, module._parameters.values())) for module in model.modules()
    )


def check_whole(model: nn.Module) -> None:
    """Raise ValueError if `fully_shard` shards `model`: it keeps hold of the modules, and of their weights as parts."""
    if any_sharded(model):
        raise ValueError(
            f"{type(model).__name__} is sharded by fully_shard, which allows neither to replace its layers nor to "
            "merge them; nothing was changed. Inject, load, switch or unload adapters before fully_shard; to merge, "
            "save the adapter with lora.save_lora and load it in one process that has the whole base"
        )


def check_adapter_name(adapter_name: str) -> None:
    """Raise if `adapter_name` is no name."""
    if not isinstance(adapter_name, str) or not adapter_name:
        raise ValueError(f"adapter_name={adapter_name!r}: must be a string that is not empty")


def _check_present(model: nn.Module, adapter_name: str) -> None:
    names = list_adapters(model)
    if adapter_name not in names:
        raise ValueError(f"no adapter {adapter_name!r}; the model has {', '.join(map(repr, names)) or 'none'}")
