"""What is done to a whole model that has LoRA layers: choose what trains, collect it, merge, unload, count."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loralib.adapters import (
    LORA_NAMES,
    active_parts,
    base_modules,
    check_whole,
    exchange,
    exchanged,
    own_tensors,
    replace_modules,
    slot_of,
    without_heads,
)
from loralib.architectures import DEFAULT_TARGET_MODULES
from loralib.inject import check_bias_mode, inject_lora, is_bias, match_names
from loralib.layers import LoRALayer, is_quantized, whole

__all__ = [
    "count_parameters",
    "disable_adapters",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge_and_unload",
    "merge_lora_weights",
    "unload",
    "unmerge_lora_weights",
]


def mark_only_lora_as_trainable(
    model: nn.Module, bias: str = "none", modules_to_save: Sequence[str] | str | None = None
) -> None:
    """Set `requires_grad` of every Parameter: true for the adapters and what the arguments add, false for the rest.

    >>> import loralib as lora
    >>> model = nn.Sequential(lora.Linear(8, 8, r=2), nn.Linear(8, 4))
    >>> lora.mark_only_lora_as_trainable(model, modules_to_save=["1"])
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['0.lora_A', '0.lora_B', '1.weight', '1.bias']

    Args:
        model: a Hugging Face model of a known architecture without LoRA layers is given its default adapters first,
            with a `UserWarning`; any other model without LoRA layers has none to train, with a `UserWarning`. The
            heads and biases that `inject_lora` gave to the active adapter count as part of it.
        bias: "none"; "all", every bias of the model; or "lora_only", the biases of the LoRA layers.
        modules_to_save: modules to train whole, such as a classifier head, named as `inject_lora` names targets.
            Unlike those of `inject_lora` they are trained in place, not in a copy.

    Raises:
        ValueError: `bias` is none of the three, or an entry of `modules_to_save` matches nothing. Nothing has been
            changed then.
    """
    trained_names(model, bias, modules_to_save)  # for its errors, before anything changes
    if not any(isinstance(module, LoRALayer) for module in model.modules()):
        if getattr(getattr(model, "config", None), "model_type", None) in DEFAULT_TARGET_MODULES:
            names = inject_lora(model)
            message = f"no LoRA layers yet: injected the default adapters (r=8, lora_alpha=16) into {len(names)} layers"
            warnings.warn(f"{message}; call lora.inject_lora(model, ...) first to choose others", stacklevel=2)
        else:
            message = f"{type(model).__name__} has no LoRA layers: it is frozen, and no adapter trains"
            warnings.warn(f"{message}; call lora.inject_lora(model, ...) first", stacklevel=2)
    trained = trained_names(model, bias, modules_to_save)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in trained:
            parameter.requires_grad = True


def lora_state_dict(
    model: nn.Module, bias: str = "none", modules_to_save: Sequence[str] | str | None = None
) -> dict[str, Tensor]:
    """Return what `mark_only_lora_as_trainable` with the same arguments trains, as `state_dict()` names and holds it.

    >>> import loralib as lora
    >>> model = nn.Sequential(lora.Linear(8, 8, r=2), nn.Linear(8, 4))
    >>> {name: tuple(tensor.shape) for name, tensor in lora.lora_state_dict(model, bias="all").items()}
    {'0.bias': (8,), '0.lora_A': (2, 8), '0.lora_B': (8, 2), '1.bias': (4,)}

    The tensors are the model's own, not copies. Buffers inside `modules_to_save` are included. The result has no
    `lora_alpha`; `save_lora` writes a file that does. Of a model that `fully_shard` shards, whole tensors are put
    together: every process has to call this, and each gets all.

    Raises:
        ValueError: as `mark_only_lora_as_trainable`.
    """
    return {name: whole(tensor) for name, tensor in trained_state(model, bias, modules_to_save).items()}


def merge_lora_weights(model: nn.Module) -> nn.Module:
    """Merge every LoRA layer, in any mode, and return the model; `train()` or `unmerge_lora_weights` undoes it.

    >>> import loralib as lora
    >>> model = lora.merge_lora_weights(nn.Sequential(lora.Linear(8, 8, r=2)))
    >>> model[0].merged
    True

    Raises:
        ValueError: an adapter holds NaN or infinity, or `model` is sharded by `fully_shard`. Nothing has been changed
            then.
    """
    check_whole(model)
    _check_finite(model)
    for layer in _lora_layers(model):
        layer.merged = True
    return model


def unmerge_lora_weights(model: nn.Module) -> nn.Module:
    """Unmerge every LoRA layer and return the model; `weight` is again the base weight, bit for bit.

    >>> import loralib as lora
    >>> model = lora.unmerge_lora_weights(nn.Sequential(lora.Linear(8, 8, r=2)).eval())
    >>> model[0].merged
    False
    """
    for layer in _lora_layers(model):
        layer.merged, layer._merge_cache = False, None
    return model


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Add the active adapter to the base for good and put plain layers back; return the model.

    The layers have their original classes and Parameter objects, and heads and biases of the adapter its values; no
    LoRA parameters, no second copy of the weights and no other adapters remain. A weight that another layer uses too
    stays with that layer, and the adapted one gets a weight of its own.

    >>> import loralib as lora
    >>> lora.merge_and_unload(nn.Sequential(lora.Linear(8, 8, r=2)))
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
    )

    Raises:
        ValueError: an adapter holds NaN or infinity, a weight is quantised, or `model` is sharded by `fully_shard`.
            Nothing has been changed then.
    """
    check_whole(model)
    _check_finite(model)
    for path, layer in model.named_modules():
        if isinstance(layer, LoRALayer) and layer.has_adapter and is_quantized(layer._base_weight):
            raise ValueError(
                f"{path}: the weight is quantised ({type(layer._base_weight).__name__}), and the sum would have to be "
                "rounded to it; nothing was merged. Keep the adapter apart, or load the base in floating point"
            )
    _add_to_base(model)
    return unload(model)


def unload(model: nn.Module) -> nn.Module:
    """Drop every adapter and put plain layers back, the base bit for bit as it was; return the model.

    Heads and biases that were trained in place, as `mark_only_lora_as_trainable` has them, stay as they are.
    What was frozen stays frozen: `model.requires_grad_(True)` makes everything trainable again.

    >>> import loralib as lora
    >>> lora.unload(nn.Sequential(lora.Linear(8, 8, r=2)))
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
    )

    Raises:
        ValueError: `model` is sharded by `fully_shard`. Nothing has been changed then.
    """
    check_whole(model)
    exchange(model, lambda slot: slot.base)
    for module in model.modules():
        module.__dict__.pop("_slot", None)
    plain = {id(layer): layer.plain_layer() for layer in _lora_layers(model)}
    replace_modules(model, plain)
    return plain.get(id(model), model)


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Within the `with` block the model computes its base alone, merged or not, and with the heads of the base.

    What comes into the model within the block does compute there: switch, inject and load adapters outside.

    >>> import loralib as lora
    >>> layer, x = lora.Linear(4, 4, r=2), torch.ones(1, 4)
    >>> _ = nn.init.ones_(layer.lora_B)
    >>> with lora.disable_adapters(layer):
    ...     torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    True
    """
    before = [(layer, layer._disabled) for layer in _lora_layers(model)]
    try:
        for layer, _ in before:
            layer._disabled = True
        with without_heads(model):
            yield model
    finally:
        for layer, disabled in before:
            layer._disabled = disabled


class ParameterCount(NamedTuple):
    """Numbers of elements, each Parameter counted once however many names it has."""

    trainable: int
    total: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Return how many parameters `model` trains and has.

    >>> import loralib as lora
    >>> count_parameters(lora.Linear(10, 10, r=1, bias=False))
    ParameterCount(trainable=20, total=120)
    """
    parameters = list(model.parameters())
    return ParameterCount(
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        sum(parameter.numel() for parameter in parameters),
    )


def _lora_layers(model: nn.Module) -> list[LoRALayer]:
    return [module for module in model.modules() if isinstance(module, LoRALayer)]


def trained_names(model: nn.Module, bias: str, modules_to_save: Sequence[str] | str | None) -> set[str]:
    """Return the state-dict names of what `mark_only_lora_as_trainable` trains and `lora_state_dict` holds."""
    check_bias_mode(bias)
    modules = dict(model.named_modules(remove_duplicate=False))
    names = set()
    for prefix, module in modules.items():
        dot, is_lora = prefix and prefix + ".", isinstance(module, LoRALayer)
        wants_bias = bias == "all" or (bias == "lora_only" and is_lora)
        for name, parameter in module._parameters.items():
            adapter = is_lora and name.startswith("lora_")
            if parameter is not None and (adapter or (wants_bias and is_bias(name))):
                names.add(dot + name)
    for prefix in match_modules_to_save(model, modules_to_save):
        names.update(f"{prefix}.{name}" for name in modules[prefix].state_dict())
    for prefix, part in active_parts(modules).items():
        names.update(f"{prefix}.{name}" for name in part.own)
    return names


def trained_state(model: nn.Module, bias: str, modules_to_save: Sequence[str] | str | None) -> dict[str, Tensor]:
    """Return what `lora_state_dict` does, sharded tensors as they are."""
    trained = trained_names(model, bias, modules_to_save)
    state = model.state_dict()
    parts = active_parts(dict(model.named_modules(remove_duplicate=False)))
    for path, part in parts.items():  # which are not all in the model while adapters are disabled
        state.update({f"{path}.{key}": tensor for key, tensor in part.tensors().items()})
    return {name: tensor for name, tensor in state.items() if name in trained}


def match_modules_to_save(model: nn.Module, modules_to_save: Sequence[str] | str | None) -> list[str]:
    """Return the full names of the modules that `modules_to_save` means."""
    return match_names(base_modules(model), modules_to_save, "modules_to_save") if modules_to_save else []


@torch.no_grad()
def _check_finite(model: nn.Module) -> None:
    found: dict[torch.device, dict[str, Tensor]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, LoRALayer) and module.has_adapter:
            for name in ("lora_A", "lora_B"):
                tensor, dot = getattr(module, name), prefix and prefix + "."
                found.setdefault(tensor.device, {})[dot + name] = tensor
    for tensors in found.values():
        if torch.cat([tensor.flatten() for tensor in tensors.values()]).isfinite().all():  # a GPU is waited for once
            continue
        name = next(name for name, tensor in tensors.items() if not tensor.isfinite().all())
        raise ValueError(
            f"{name} holds NaN or infinity; nothing was merged. "
            "Load an earlier adapter, or train again with a lower learning rate"
        )


@torch.no_grad()
def _add_to_base(model: nn.Module) -> None:
    with exchanged(model, lambda slot: slot.base):
        uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())

    def put(module: nn.Module, name: str, value: Tensor) -> None:
        tensor = own_tensors(module)[name]
        if uses[id(tensor)] > 1:
            setattr(module, name, nn.Parameter(value, requires_grad=tensor.requires_grad))
            _untie(model)
        else:
            tensor.copy_(value)

    for layer in _lora_layers(model):
        if layer.has_adapter:
            put(layer, "weight", layer._merge(layer._base_weight))
            slot = slot_of(layer)
            for plain in (layer, slot.base if slot else layer):
                if isinstance(plain, nn.Embedding):
                    plain.max_norm = None  # the rows were bounded before the update came on top
    for module in model.modules():
        slot = slot_of(module)
        if slot and slot.active in slot.parts:
            for key, value in slot.parts[slot.active].tensors().items():
                if key not in LORA_NAMES:
                    put(slot.base, key, value)


def _untie(model: nn.Module) -> None:
    # transformers would otherwise tie the two weights again when it loads what it saved.
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
        warnings.warn(
            "the merged embedding no longer equals the output layer's weight: set config.tie_word_embeddings to False",
            stacklevel=5,
        )
