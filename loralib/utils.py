"""What is done to a whole model that has LoRA layers: choose what trains, collect it, merge, unload, count."""

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from loralib.adapters import (
    PARTS,
    RESIZED,
    active_parts,
    all_modules,
    base_modules,
    check_not_fsdp1,
    check_one,
    check_stored,
    check_whole,
    is_bias,
    make_plain,
    named_modules,
    of_base,
    places,
    put,
)
from loralib.architectures import find_query_and_value, note_merged
from loralib.core import SHARED_BASE, Adapted, LoRALayer, note_state, quiet_state, whole
from loralib.inject import check_bias_mode, inject_lora, match_names
from loralib.quantized import allow_packing, count, dequantized, is_quantized, make_float, merges, tells
from loralib.reloaded import check_not_reloaded

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
        model: an adapter is what the LoRA layers own, the heads and biases that `inject_lora` gave to the active
            adapter, and every Parameter with a part of its dotted name that begins with `lora_` ("lora_A",
            "lora_gate", "q_proj.lora_A.default.weight" of PEFT). A Hugging Face model without any of these gets its
            default adapters first, with a `UserWarning`. If it has no query and value, or is any other model, there is
            nothing to train, and a `UserWarning` says so.
        bias: "none"; "all", every bias of the model; or "lora_only", the biases of the LoRA layers, and of whatever
            else holds a `lora_...`, its own or that of the one layer that it wraps.
        modules_to_save: modules to train whole, such as a classifier head, named as `inject_lora` names targets.
            Unlike those of `inject_lora` they are trained in place, not in a copy.

    Raises:
        ValueError: `bias` is none of the three, or an entry of `modules_to_save` matches nothing. Nothing has been
            changed then.
    """
    trained_names(model, bias, modules_to_save)  # for its errors, before anything changes
    if not has_adapters(model):
        if getattr(getattr(model, "config", None), "model_type", None) and find_query_and_value(model):
            names = inject_lora(model)
            message = f"no LoRA layers yet: injected the default adapters (r=8, lora_alpha=16) into {len(names)} layers"
            warnings.warn(f"{message}; call lora.inject_lora(model, ...) first to choose others", stacklevel=2)
        else:
            message = f"{type(model).__name__} has no LoRA layers: it is frozen, and no adapter trains"
            warnings.warn(f"{message}; call lora.inject_lora(model, ...) first", stacklevel=2)
    trained = trained_names(model, bias, modules_to_save)
    model.requires_grad_(False)
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, tensors in active_parts(dict(model.named_modules(remove_duplicate=False))).items():
        parameters.update({_join(path, key): t for key, t in tensors.items() if isinstance(t, nn.Parameter)})
    for name in trained & parameters.keys():  # those of the adapter also while the base's are in their place
        parameters[name].requires_grad = True


def lora_state_dict(
    model: nn.Module, bias: str = "none", modules_to_save: Sequence[str] | str | None = None
) -> dict[str, Tensor]:
    """Return the entries of `state_dict()` that `mark_only_lora_as_trainable` with the same arguments trains.

    >>> import loralib as lora
    >>> model = nn.Sequential(lora.Linear(8, 8, r=2), nn.Linear(8, 4))
    >>> {name: tuple(tensor.shape) for name, tensor in lora.lora_state_dict(model, bias="all").items()}
    {'0.bias': (8,), '0.lora_A': (2, 8), '0.lora_B': (8, 2), '1.bias': (4,)}

    The tensors are the model's own, not copies. Buffers inside `modules_to_save` are included. The result has no
    `lora_alpha`; `save_lora` writes a file that does. If `fully_shard` shards the model, every process has to call
    this, and each gets whole tensors.

    Raises:
        ValueError: as `mark_only_lora_as_trainable`.
    """
    check_not_fsdp1(all_modules(model))
    return {name: whole(tensor) for name, tensor in trained_state(model, bias, modules_to_save).items()}


def merge_lora_weights(model: nn.Module) -> nn.Module:
    """Merge every LoRA layer, in any mode, and return the model; `train()` or `unmerge_lora_weights` undoes it.

    >>> import loralib as lora
    >>> model = lora.merge_lora_weights(nn.Sequential(lora.Linear(8, 8, r=2)))
    >>> model[0].merged
    True

    Raises:
        ValueError: an adapter holds NaN or infinity, a layer is of bitsandbytes, HQQ or gptqmodel, or `model` is
            sharded by `fully_shard`. Nothing has been changed then.
    """
    check_whole(model)
    _check_finite(model)
    for path, layer in named_modules(model).items():
        if isinstance(layer, Adapted) and not merges(layer):
            raise ValueError(
                f"{path} is a quantised {type(layer).__name__}, whose weight has no place for a sum; nothing was "
                "merged. It computes the same unmerged; merge_and_unload(model, dequantize=True) gives plain layers"
            )
    for layer in _lora_layers(model):
        layer.merge()
    return model


def unmerge_lora_weights(model: nn.Module) -> nn.Module:
    """Unmerge every LoRA layer and return the model; `weight` is again the base weight, bit for bit.

    >>> import loralib as lora
    >>> model = lora.unmerge_lora_weights(nn.Sequential(lora.Linear(8, 8, r=2)).eval())
    >>> model[0].merged
    False
    """
    for layer in _lora_layers(model):
        layer.unmerge()
    return model


def merge_and_unload(model: nn.Module, dequantize: bool = False) -> nn.Module:
    """Add the active adapter to the base permanently, put plain layers back, and return the model.

    The layers have their original classes and Parameter objects; heads and biases have the values of the adapter. No
    LoRA parameters, no second copy of the weights and no other adapters remain. A weight that another layer or another
    model (`share_base`) uses too does not change there; the adapted layer gets a weight of its own.

    >>> import loralib as lora
    >>> lora.merge_and_unload(nn.Sequential(lora.Linear(8, 8, r=2)))
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
    )

    Args:
        model: a model with LoRA layers, in any state.
        dequantize: first turn every quantised layer of the model, adapted or not, into an `nn.Linear` in floating
            point. This is what you deploy after training on a 4-bit base. The memory grows accordingly.

    Raises:
        ValueError: an adapter holds NaN or infinity, a weight is quantised and `dequantize` is false or its layer
            cannot return it, or `model` is sharded by `fully_shard`. Nothing has been changed then.
    """
    check_whole(model)
    _check_finite(model)
    for path, layer in named_modules(model).items():
        if isinstance(layer, Adapted) and layer.has_adapter and is_quantized(layer) and not dequantize:
            raise ValueError(
                f"{path}: the weight is quantised ({_stored_as(layer)}), and the sum would have to be rounded to it; "
                "nothing was merged. Keep the adapter apart, load the base in floating point, or pass dequantize=True "
                "for plain layers in floating point"
            )
        if dequantize and not tells(layer):
            raise ValueError(
                f"{path}: a {_stored_as(layer)} of gptqmodel that does not tell the weight it computes with; nothing "
                "was merged. Load a GPTQ model with backend=BACKEND.GPTQ_TORCH for that, without rotation or EoRA"
            )
    check_stored(named_modules(model))
    _check_takes(model)
    if dequantize:
        _dequantize(model)
    _add_to_base(model)
    note_merged(model)
    return unload(model)


@torch.no_grad()
def _dequantize(model: nn.Module) -> None:
    unmerge_lora_weights(model)
    made: dict[nn.Module, nn.Module] = {}
    for layer in list(model.modules()):
        if is_quantized(layer) and hasattr(layer, "in_features"):
            stored = dequantized(layer)
            adapted = isinstance(layer, Adapted) and layer.has_adapter
            weight = layer._sum(stored) if isinstance(layer, Adapted) and adapted else stored
            made[layer] = make_float(layer, weight.to(stored.dtype).clone())
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if child in made:
                setattr(parent, name, made[child])
    # What transformers notes of a quantised model, and writes into its configuration.
    config: Any = getattr(model, "config", None)
    for holder, keys in ((model, _NOTES), (config, ("quantization_config", "_pre_quantization_dtype"))):
        for key in keys:
            if key in getattr(holder, "__dict__", {}):
                delattr(holder, key)


_NOTES = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


def _stored_as(layer: nn.Module) -> str:
    weight = layer._parameters.get("weight")
    return type(weight).__name__ if weight is not None else type(layer).__name__


def unload(model: nn.Module) -> nn.Module:
    """Remove every adapter, put plain layers back, with the base bit for bit as it was, and return the model.

    Heads and biases that were trained in place (`mark_only_lora_as_trainable`) keep their values. What was frozen stays
    frozen: `model.requires_grad_(True)` makes everything trainable again.

    >>> import loralib as lora
    >>> lora.unload(nn.Sequential(lora.Linear(8, 8, r=2)))
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
    )

    Raises:
        ValueError: `model` is sharded by `fully_shard`. Nothing has been changed then.
    """
    check_whole(model)
    put(model, None)
    for module, place in places(model):
        place.leave(module)
    for module in model.modules():
        for note in (PARTS, RESIZED):
            vars(module).pop(note, None)
    for layer in _lora_layers(model):
        make_plain(layer)
    allow_packing(model)
    return model


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the `with` block the model computes as its base, with the base's heads, whether it is merged or not.

    An adapter that is switched on, injected or loaded inside the block does take effect there: do that outside.

    >>> import loralib as lora
    >>> layer, x = lora.Linear(4, 4, r=2), torch.ones(1, 4)
    >>> _ = nn.init.ones_(layer.lora_B)
    >>> with lora.disable_adapters(layer):
    ...     torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    True
    """
    layers = [layer for layer in _lora_layers(model) if not layer._disabled]
    heads = [(module, place) for module, place in places(model) if place.replaced and not place.suspended]
    blocks = {vars(module)["_several"].block for module in model.modules() if "_several" in vars(module)}
    blocks = {block for block in blocks if not block.off}
    if heads:
        check_whole(model)
    try:
        for block in blocks:
            block.off = True
        for layer in layers:
            merged = layer.merged
            layer.unmerge()
            note_state(layer)
            # Until the end of the block `merged` says what is to be then.
            layer._disabled, layer.merged = True, merged
        for module, place in heads:
            place.suspend(module)
        yield model
    finally:
        for block in blocks:
            block.off = False
        for module, place in heads:
            place.resume(module)
        for layer in layers:
            if vars(layer).get("_disabled"):  # otherwise another adapter has come, or none
                note_state(layer)
                del layer._disabled
                merged, layer.merged = layer.merged, False
                if merged:
                    layer.merge()


class ParameterCount(NamedTuple):
    """Numbers of elements, each Parameter counted once however many names it has."""

    trainable: int
    total: int

    @property
    def percentage(self) -> float:
        """How many of a hundred are trained."""
        return 100 * self.trainable / max(self.total, 1)

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({self.percentage:.2f} %)"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Return how many parameters of `model` are trained, and how many it has.

    >>> import loralib as lora
    >>> count_parameters(lora.Linear(10, 10, r=1, bias=False))
    ParameterCount(trainable=20, total=120)
    >>> print(count_parameters(lora.Linear(10, 10, r=1, bias=False)))
    20 of 120 parameters are trained (16.67 %)
    """
    parameters = list(model.parameters())
    return ParameterCount(
        sum(count(parameter) for parameter in parameters if parameter.requires_grad),
        sum(map(count, parameters)),
    )


def _lora_layers(model: nn.Module) -> list[Adapted]:
    modules = all_modules(model)
    check_not_reloaded(modules)
    return [module for module in modules if isinstance(module, Adapted)]


def has_adapters(model: nn.Module) -> bool:
    """Whether `model` has LoRA layers, or Parameters that are called so."""
    if any(isinstance(module, LoRALayer) for module in model.modules()):
        return True
    return any(map(is_lora_name, dict(model.named_parameters(remove_duplicate=False))))


def is_lora_name(name: str) -> bool:
    """Whether a part of a dotted name begins with `lora_`: what 0.1.2 trains and saves.

    >>> is_lora_name("q_proj.lora_A.default.weight"), is_lora_name("explora_head.weight")
    (True, False)
    """
    return name.startswith("lora_") or ".lora_" in name


def trained_names(model: nn.Module, bias: str, modules_to_save: Sequence[str] | str | None) -> set[str]:
    """Return the state-dict names of what `mark_only_lora_as_trainable` trains and `lora_state_dict` holds."""
    check_bias_mode(bias)
    check_one(model.modules())
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = {
        (prefix, name)
        for prefix, module in modules.items()
        for name, tensor in {**module._parameters, **module._buffers}.items()
        if tensor is not None
    }
    names = {_join(prefix, name) for prefix, name in tensors}
    trained = set(filter(is_lora_name, names))
    with_bias = {prefix for prefix, module in modules.items() if isinstance(module, LoRALayer)}
    for name in trained:
        wrapper = f".{name}".partition(".lora_")[0].removeprefix(".")
        if wrapper not in with_bias and wrapper in modules:
            inner = [key for key, _ in modules[wrapper].named_children() if not key.startswith("lora_")]
            with_bias |= {wrapper} | {_join(wrapper, key) for key in inner if len(inner) == 1}
    for prefix, name in tensors:
        wanted = is_bias(name) if bias == "all" else bias == "lora_only" and prefix in with_bias and name == "bias"
        if wanted and name in modules[prefix]._parameters:
            trained.add(_join(prefix, name))
    for prefix in match_modules_to_save(model, modules_to_save):
        with quiet_state():
            trained.update(f"{prefix}.{name}" for name in modules[prefix].state_dict())
    for prefix, tensors_of in active_parts(modules).items():
        trained.update(_join(prefix, name) for name in tensors_of)
    return trained


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def trained_state(model: nn.Module, bias: str, modules_to_save: Sequence[str] | str | None) -> dict[str, Tensor]:
    """Return what `lora_state_dict` does, sharded tensors as they are."""
    trained = trained_names(model, bias, modules_to_save)
    with quiet_state():
        state = model.state_dict()
    for path, tensors in active_parts(dict(model.named_modules(remove_duplicate=False))).items():
        # They are not all in the model while adapters are disabled.
        state.update({_join(path, key): tensor.detach() for key, tensor in tensors.items()})
    return {name: tensor for name, tensor in state.items() if name in trained}


def match_modules_to_save(model: nn.Module, modules_to_save: Sequence[str] | str | None) -> list[str]:
    """Return the full names of the modules that `modules_to_save` means."""
    return match_names(base_modules(model), modules_to_save, "modules_to_save") if modules_to_save else []


@torch.no_grad()
def _check_finite(model: nn.Module) -> None:
    found: dict[torch.device, dict[str, Tensor]] = {}
    for prefix, module in named_modules(model).items():
        if isinstance(module, Adapted):
            for name, tensor in module.adapter_tensors().items():
                found.setdefault(tensor.device, {})[_join(prefix, name)] = tensor
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
    unmerge_lora_weights(model)
    values: list[tuple[nn.Module, str, Tensor]] = []
    for layer in _lora_layers(model):
        values += [(layer, name, value) for name, value in layer.sums().items()]
        if layer.has_adapter and isinstance(layer, nn.Embedding):
            layer.max_norm = None  # the rows were bounded before the update came on top
    summed = {(id(module), name) for module, name, _ in values}
    for module, place in places(model):
        if place.active is not None:
            own = place.tensors(module, place.active)
            values += [(module, key, own[key]) for key in of_base(own) if (id(module), key) not in summed]
    put(model, None)
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    held = [module._parameters.get(name, module._buffers.get(name)) for module, name, _ in values]
    fresh: dict[int, nn.Parameter] = {}
    for (module, name, value), tensor in zip(values, held, strict=True):
        if tensor is None:  # torch.nn.utils.parametrize computes it, and takes what it is to be
            setattr(module, name, value)
            continue
        same = [other for (_, _, other), of in zip(values, held, strict=True) if of is tensor]
        if len(same) < uses[id(tensor)] or not all(other is value or torch.equal(other, value) for other in same):
            value = value.detach().to(tensor.dtype, copy=True)
            setattr(module, name, nn.Parameter(value, requires_grad=tensor.requires_grad))
            _untie(model)
        elif hasattr(tensor, SHARED_BASE):  # by other models, too
            if id(tensor) not in fresh:
                fresh[id(tensor)] = nn.Parameter(value.detach().to(tensor.dtype, copy=True), tensor.requires_grad)
            setattr(module, name, fresh[id(tensor)])
        else:
            tensor.copy_(value)


@torch.no_grad()
def _check_takes(model: nn.Module) -> None:
    """Raise a ValueError if a weight is computed, and cannot be made to be what it has to become."""
    values: list[tuple[nn.Module, str, Tensor]] = []
    for layer in _lora_layers(model):
        if parametrize.is_parametrized(layer) or layer._forward_pre_hooks:  # of pruning, weight and spectral norm
            values += [(layer, name, value) for name, value in layer.sums().items()]
    for module, place in places(model):
        if place.active is not None:
            own = place.tensors(module, place.active)
            values += [(module, key, own[key]) for key in of_base(own)]
    for module, name, value in values:
        if name not in module._parameters and name not in module._buffers and not _takes(module, name, value):
            path = next(path for path, each in model.named_modules() if each is module)
            raise ValueError(
                f"{path}.{name} is computed by torch.nn.utils (pruning, weight norm, parametrize), and cannot be made "
                "to be the sum; nothing was merged. Remove that first (torch.nn.utils.prune.remove, ...)"
            )


def _takes(module: nn.Module, name: str, value: Tensor) -> bool:
    """Whether what torch.nn.utils.parametrize computes is `value` once it has been assigned that."""
    if not parametrize.is_parametrized(module, name):
        return False
    parametrization: Any = copy.deepcopy(module.parametrizations[name])  # type: ignore[index]
    try:
        parametrization.right_inverse(value)
        return bool(torch.allclose(parametrization(), value, rtol=1e-3, atol=1e-5))
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return False


def _untie(model: nn.Module) -> None:
    # transformers would otherwise tie the weights again when it loads what it saved. It has one switch for all ties of
    # a model, and writes one tensor of those that are the same object: so each gets its own.
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    tying: list[Any] = [config for config in configs.values() if getattr(config, "tie_word_embeddings", False)]
    if not tying:
        return
    for config in tying:
        config.tie_word_embeddings = False
    seen: set[int] = set()
    for module in model.modules():
        if getattr(module, "all_tied_weights_keys", None):
            vars(module)["all_tied_weights_keys"] = {}
        for name, tensor in module._parameters.items():
            if id(tensor) in seen and tensor is not None:
                module._parameters[name] = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
            seen.add(id(tensor))
    warnings.warn(
        "the merged embedding no longer equals the output layer's weight: set config.tie_word_embeddings to False, and "
        "gave each of the tied weights a tensor of its own",
        stacklevel=5,
    )
