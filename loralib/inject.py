"""Put LoRA into an existing model: replace chosen layers by LoRA layers that share their Parameters."""

import copy
import difflib
import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from loralib.layers import (
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    LoRALayer,
    MergedLinear,
    check_hyperparameters,
    constructor_arguments,
)

__all__ = ["inject_lora"]

# Query and value projections, which section 4.2 of the paper adapts, by `config.model_type` of Hugging Face.
DEFAULT_TARGET_MODULES = {
    "gpt2": ["c_attn"],
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "electra", "albert", "vit"], ["query", "value"]),
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi"], ["q_proj", "v_proj"]),
    **dict.fromkeys(["opt", "gpt_neo", "bart", "whisper"], ["q_proj", "v_proj"]),
    "distilbert": ["q_lin", "v_lin"],
    "deberta-v2": ["query_proj", "value_proj"],
    "t5": ["q", "v"],
}

# By exact class: a subclass may compute something else, and some parents (nn.MultiheadAttention) bypass its forward.
_LAYERS = {cls._plain_class: cls for cls in (Linear, Embedding, Conv1d, Conv2d, Conv3d)}


def inject_lora(
    model: nn.Module,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
    enable_lora: Sequence[bool] | None = (True, False, True),
    merge_weights: bool = True,
) -> list[str]:
    """Replace layers of `model` by LoRA layers, freeze everything but their adapters and return the replaced names.

    The new layers share the Parameters of the old ones under the old names, so checkpoints of the base still load.
    Adapters of a half-precision base are float32.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> inject_lora(model, r=2, target_modules=["0"])
    ['0']
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['0.lora_A', '0.lora_B']

    Args:
        model: changed in place; its `nn.Linear`, `nn.Embedding`, `nn.Conv1d/2d/3d` and Hugging Face `Conv1D` layers
            can be adapted.
        r: rank, at least 1.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: see `LoRALayer`; embeddings have none.
        target_modules: a list of full names or last parts of names ("q_proj", "attn.c_attn"); or one string, a regular
            expression that matches full names; or None for query and value of a known Hugging Face architecture.
        enable_lora: which of q, k, v to adapt in a fused `c_attn` (`MergedLinear`); None adapts the matrix as a whole.
        merge_weights: whether `eval()` merges.

    Raises:
        TypeError: a target is of a class that cannot be adapted, or an argument of a wrong type.
        ValueError: a target matches nothing, the model has LoRA layers already, its architecture has no default, or an
            argument is out of range. Nothing has been changed then.
    """
    check_hyperparameters(r, lora_alpha, lora_dropout)
    if r < 1:
        raise ValueError(f"r={r}: the rank to inject must be at least 1")
    if target_modules is None:
        target_modules = default_target_modules(model)
    modules = dict(model.named_modules())
    names = match_names(modules, target_modules, "target_modules")
    present = [name for name, module in modules.items() if isinstance(module, LoRALayer)]
    if present:
        raise ValueError(f"the model already has LoRA layers ({_some(present)}); call lora.unload(model) first")
    spec = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    specs = {name: dict(spec, **_fused(name, modules[name], enable_lora)) for name in names}
    layers = plan_layers(model, specs, merge_weights)
    widest = max(min(_matrix_shape(layer)) for layer in layers.values())
    if r > widest:
        raise ValueError(f"r={r}: an update of that rank is low-rank for none of the targets; at most {widest} here")
    put_layers(model, layers)
    return names


def default_target_modules(model: nn.Module) -> list[str]:
    """Return the layers to adapt when none are named, by the model's `config.model_type`."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in DEFAULT_TARGET_MODULES:
        raise ValueError(
            f"no default target_modules for {type(model).__name__} (model_type={model_type!r}); name them, "
            f"or use one of {', '.join(sorted(DEFAULT_TARGET_MODULES))}"
        )
    return DEFAULT_TARGET_MODULES[model_type]


def match_names(names: Iterable[str], targets: Sequence[str] | str, argument: str) -> list[str]:
    """Return the module names that `targets` mean; `argument` is what an error calls them.

    >>> match_names(["h.0.attn", "h.0.mlp", "h.1.attn"], ["attn"], "target_modules")
    ['h.0.attn', 'h.1.attn']
    """
    names = [name for name in names if name]
    if isinstance(targets, str):
        try:
            matched = {targets: [name for name in names if re.fullmatch(targets, name)]}
        except re.error as error:
            raise ValueError(f"{argument}={targets!r} is no regular expression: {error}") from error
    else:
        matched = {target: [name for name in names if ("." + name).endswith("." + target)] for target in targets}
    unmatched = [target for target, found in matched.items() if not found]
    if unmatched or not matched:
        # Layers of a stack differ only in their index, so the last parts are what a user can choose from.
        parts = sorted({name.rsplit(".", 1)[-1] for name in names})
        near = sorted({close for target in unmatched for close in difflib.get_close_matches(target, parts + names)})
        hint = f"did you mean {_some(near)}?" if near else f"the model has {_some(parts, 20)}"
        if isinstance(targets, str):
            hint = f"a string is a regular expression for full names, a list holds names; {hint}"
        raise ValueError(f"{argument}={targets!r}: nothing in the model is called {_some(unmatched)!r}; {hint}")
    chosen = {name for found in matched.values() for name in found}
    return [name for name in names if name in chosen]


def plan_layers(model: nn.Module, specs: dict[str, dict], merge_weights: bool = True) -> dict[str, LoRALayer]:
    """Return a LoRA layer for each name in `specs`, its adapter still on the meta device; `model` is not changed."""
    if "" in specs:
        raise ValueError(f"{type(model).__name__} itself cannot be replaced; put it into a model, or use a LoRA layer")
    return {name: _wrap(name, model.get_submodule(name), spec, merge_weights) for name, spec in specs.items()}


def put_layers(model: nn.Module, layers: dict[str, LoRALayer]) -> None:
    """Give the planned `layers` real adapters, put them into `model`, and freeze all the rest of it."""
    replaced = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    for layer in layers.values():
        weight = layer._base_weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for name in ("lora_A", "lora_B"):
            if name in layer._parameters:
                empty = torch.empty(layer._parameters[name].shape, device=weight.device, dtype=dtype)
                setattr(layer, name, nn.Parameter(empty))
        layer.reset_lora_parameters()
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = replaced.get(id(child), child)


def _wrap(name: str, module: nn.Module, spec: dict, merge_weights: bool) -> LoRALayer:
    spec = dict(spec, merge_weights=merge_weights, device="meta")
    cls = Linear if _is_conv1d(module) else _LAYERS.get(type(module))
    if cls is Linear and "enable_lora" in spec:
        cls = MergedLinear
    if cls is Embedding:
        spec.pop("lora_dropout")
    if _is_conv1d(module):
        in_features, out_features = module.weight.shape
        layer = cls(in_features, out_features, fan_in_fan_out=True, **spec)
    elif cls is not None:
        layer = cls(**constructor_arguments(module, cls._plain_arguments), **spec)
    else:
        allowed = ", ".join(f"nn.{plain.__name__}" for plain in _LAYERS)
        raise TypeError(f"{name} is a {type(module).__name__}, which LoRA cannot adapt; {allowed} and Conv1D it can")
    layer._parameters.update(module._parameters)
    shell = copy.copy(module)
    shell._parameters = dict.fromkeys(module._parameters)
    layer.__dict__["_shell"] = shell  # past nn.Module, which would register it
    return layer.train(module.training)


def _is_conv1d(module: nn.Module) -> bool:
    # Hugging Face's class, known by its shape because the library does not import transformers.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and module.weight.dim() == 2


def _fused(name: str, module: nn.Module, enable_lora: Sequence[bool] | None) -> dict:
    if enable_lora is None or name.rsplit(".", 1)[-1] != "c_attn" or not _is_conv1d(module):
        return {}
    # q, k, v in self-attention; k, v where GPT-2 attends to another sequence.
    groups = module.weight.shape[1] // module.weight.shape[0]
    return {"enable_lora": list(enable_lora)[-groups:]}


def _matrix_shape(layer: LoRALayer) -> tuple[int, int]:
    if isinstance(layer, MergedLinear):
        return layer.in_features, layer.out_features // len(layer.enable_lora)
    weight = layer._base_weight
    return weight.shape[0], weight[0].numel()


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
