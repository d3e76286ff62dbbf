"""What is done to a whole model that has LoRA layers: choose what trains, collect it, merge, unload, count."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loralib.inject import DEFAULT_TARGET_MODULES, inject_lora, match_names
from loralib.layers import LoRALayer

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

_BIAS_MODES = ("none", "all", "lora_only")


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
            with a `UserWarning`; any other model without LoRA layers has none to train, with a `UserWarning`.
        bias: "none"; "all", every bias of the model; or "lora_only", the biases of the LoRA layers.
        modules_to_save: modules to train whole, such as a classifier head, named as `inject_lora` names targets.

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
    `lora_alpha`; `save_lora` writes a file that does.

    Raises:
        ValueError: as `mark_only_lora_as_trainable`.
    """
    trained = trained_names(model, bias, modules_to_save)
    return {name: tensor for name, tensor in model.state_dict().items() if name in trained}


def merge_lora_weights(model: nn.Module) -> nn.Module:
    """Merge every LoRA layer, in any mode, and return the model; `train()` or `unmerge_lora_weights` undoes it.

    >>> import loralib as lora
    >>> model = lora.merge_lora_weights(nn.Sequential(lora.Linear(8, 8, r=2)))
    >>> model[0].merged
    True

    Raises:
        ValueError: an adapter holds NaN or infinity. Nothing has been changed then.
    """
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
    """Add every adapter to its weight for good and put plain layers back; return the model.

    The layers have their original classes and Parameter objects; no LoRA parameters and no second copy of the weights
    remain. A weight that another layer uses too stays with that layer, and the adapted one gets a weight of its own.

    >>> import loralib as lora
    >>> lora.merge_and_unload(nn.Sequential(lora.Linear(8, 8, r=2)))
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
    )

    Raises:
        ValueError: an adapter holds NaN or infinity. Nothing has been changed then.
    """
    _check_finite(model)
    return _put_plain_layers(model, merge=True)


def unload(model: nn.Module) -> nn.Module:
    """Drop every adapter and put plain layers back, the base bit for bit as it was; return the model.

    >>> import loralib as lora
    >>> lora.unload(nn.Sequential(lora.Linear(8, 8, r=2)))
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
    )
    """
    return _put_plain_layers(model, merge=False)


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Within the `with` block every LoRA layer computes its base alone, merged or not.

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
    if bias not in _BIAS_MODES:
        raise ValueError(f"bias={bias!r}: must be one of {', '.join(map(repr, _BIAS_MODES))}")
    modules = dict(model.named_modules(remove_duplicate=False))
    names = set()
    for prefix, module in modules.items():
        dot = prefix and prefix + "."
        for name, parameter in module._parameters.items():
            is_lora = isinstance(module, LoRALayer)
            adapter = is_lora and name.startswith("lora_")
            chosen_bias = _is_bias(name) and (bias == "all" or (bias == "lora_only" and is_lora))
            if parameter is not None and (adapter or chosen_bias):
                names.add(dot + name)
    for prefix in match_modules_to_save(model, modules_to_save):
        names.update(f"{prefix}.{name}" for name in modules[prefix].state_dict())
    return names


def match_modules_to_save(model: nn.Module, modules_to_save: Sequence[str] | str | None) -> list[str]:
    """Return the full names of the modules that `modules_to_save` means."""
    names = dict(model.named_modules(remove_duplicate=False))
    return match_names(names, modules_to_save, "modules_to_save") if modules_to_save else []


def _is_bias(name: str) -> bool:
    return name == "bias" or name.startswith("bias_") or name.endswith("_bias")


def _check_finite(model: nn.Module) -> None:
    for prefix, module in model.named_modules():
        if isinstance(module, LoRALayer) and module.has_adapter:
            for name in ("lora_A", "lora_B"):
                if not torch.isfinite(getattr(module, name)).all():
                    raise ValueError(
                        f"{prefix + '.' if prefix else ''}{name} holds NaN or infinity; nothing was merged. "
                        "Load an earlier adapter, or train again with a lower learning rate"
                    )


@torch.no_grad()
def _put_plain_layers(model: nn.Module, merge: bool) -> nn.Module:
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    plain_layers = {}
    for layer in _lora_layers(model):
        weight = layer._base_weight
        if merge and layer.has_adapter:
            merged = layer._merge(weight)
            if uses[id(weight)] == 1:
                weight.copy_(merged)
            else:
                layer.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)
                _untie(model)
        plain_layers[id(layer)] = layer.plain_layer(merged=merge)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = plain_layers.get(id(child), child)
    return plain_layers.get(id(model), model)


def _untie(model: nn.Module) -> None:
    # transformers would otherwise tie the two weights again when it loads what it saved.
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        model.config.tie_word_embeddings = False
        warnings.warn(
            "the merged embedding no longer equals the output layer's weight: set config.tie_word_embeddings to False",
            stacklevel=4,
        )
