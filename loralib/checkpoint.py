"""Adapter files: one safetensors file with the tensors and, in its metadata, the configuration that they need."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from loralib.inject import plan_layers, put_layers
from loralib.layers import LoRALayer, MergedLinear, check_hyperparameters
from loralib.utils import lora_state_dict, mark_only_lora_as_trainable, match_modules_to_save, trained_names

__all__ = ["load_lora", "save_lora"]

_METADATA_KEY = "loralib"
_FORMAT_VERSION = 1
_SPEC_KEYS = {"r", "lora_alpha", "scaling", "lora_dropout", "enable_lora"}


def save_lora(
    model: nn.Module,
    path: str | os.PathLike,
    bias: str = "none",
    modules_to_save: Sequence[str] | str | None = None,
) -> None:
    """Write the adapters of `model` and their configuration to one safetensors file, atomically.

    >>> import tempfile, loralib as lora
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> names = lora.inject_lora(model, r=2, target_modules=["0"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.save_lora(model, folder + "/adapter.safetensors")
    ...     base = lora.unload(model)
    ...     lora.load_lora(base, folder + "/adapter.safetensors")
    ['0']

    Args:
        model: a model with LoRA layers, in any state.
        path: the file to write; an earlier one stays whole until the new one is complete.
        bias, modules_to_save: what to save besides the adapters, as given to `mark_only_lora_as_trainable`.

    Raises:
        ValueError: the model has no adapters, or the arguments are wrong as in `mark_only_lora_as_trainable`.
        OSError: the file cannot be written.
    """
    layers = {name: _spec(layer) for name, layer in _adapted_layers(model).items()}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapters to save; call lora.inject_lora(model, ...) first")
    config = {
        "format_version": _FORMAT_VERSION,
        "base_model": _base_model(model),
        "bias": bias,
        "modules_to_save": match_modules_to_save(model, modules_to_save),
        "layers": layers,
    }
    tensors = lora_state_dict(model, bias, modules_to_save)
    # Copies, because safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A single entry, because safetensors writes several in an order of chance: equal adapters give equal files.
        content = save(tensors, metadata={_METADATA_KEY: json.dumps(config)})
        with temporary.open("wb") as file:  # safetensors' own save_file would make it readable to its owner alone
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_lora(model: nn.Module, path: str | os.PathLike) -> list[str]:
    """Load a file of `save_lora` into `model` and return the names of its LoRA layers.

    A model without LoRA layers gets those that the file describes, and is then frozen but for what the file holds. One
    with LoRA layers must have the same; its `lora_alpha` and `scaling` become the file's. Example: see `save_lora`.

    Args:
        model: the base model, or one with LoRA layers, in any state (merged, in eval, on any device).
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no loralib adapter, or does not fit the model: one error lists every missing, unexpected
            and misshapen tensor. The model has not been changed then.
    """
    path = Path(path)
    tensors, config = _read(path)
    present = _adapted_layers(model)
    layers, problems = _match_layers(present, config["layers"]) if present else _plan(model, config["layers"])
    problems += _misfits(model, layers, tensors, config)
    if problems:
        what = f"{path} does not fit {type(model).__name__}; nothing was loaded"
        raise ValueError("\n  ".join([what + ":", *problems]))
    if not present:
        put_layers(model, layers)
        mark_only_lora_as_trainable(model, config["bias"], config["modules_to_save"])
    for name, layer in layers.items():
        layer.lora_alpha = config["layers"][name]["lora_alpha"]
        layer.scaling = config["layers"][name]["scaling"]
    model.load_state_dict(tensors, strict=False)
    return list(layers)


def _match_layers(present: dict[str, LoRALayer], specs: dict[str, dict]) -> tuple[dict[str, LoRALayer], list[str]]:
    problems = [f"{name}: the file adapts it, the model does not" for name in specs if name not in present]
    problems += [f"{name}: the model adapts it, the file does not" for name in present if name not in specs]
    for name in sorted(specs.keys() & present.keys()):
        ours = _spec(present[name])
        for key in ("r", "enable_lora"):
            theirs = specs[name].get(key)
            if theirs != ours.get(key):
                problems.append(f"{name}: {key} is {theirs} in the file, {ours.get(key)} in the model")
    return present, problems


def _plan(model: nn.Module, specs: dict[str, dict]) -> tuple[dict[str, LoRALayer], list[str]]:
    layers, problems = {}, []
    for name, spec in specs.items():
        arguments = {key: value for key, value in spec.items() if key != "scaling"}
        try:
            layers.update(plan_layers(model, {name: arguments}))
        except (AttributeError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            problems.append(f"{name}: {error}")
    return layers, problems


def _misfits(model: nn.Module, layers: dict[str, LoRALayer], tensors: dict[str, Tensor], config: dict) -> list[str]:
    bias = config["bias"]
    try:
        wanted = trained_names(model, bias, config["modules_to_save"])
    except ValueError as error:
        return [str(error)]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for prefix, layer in layers.items():  # planned ones are not in the model yet
        for name, parameter in layer._parameters.items():
            if name.startswith("lora_") or (name == "bias" and bias == "lora_only" and parameter is not None):
                wanted.add(f"{prefix}.{name}")
                shapes[f"{prefix}.{name}"] = parameter.shape
    problems = [f"{name}: missing in the file" for name in sorted(wanted - tensors.keys())]
    problems += [f"{name}: unexpected in the file" for name in sorted(tensors.keys() - wanted)]
    for name in sorted(wanted & tensors.keys()):
        if tensors[name].shape != shapes[name]:
            problems.append(f"{name}: {tuple(tensors[name].shape)} in the file, {tuple(shapes[name])} in the model")
    return problems


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such adapter file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    if _METADATA_KEY not in metadata:
        raise ValueError(f"{path} has no loralib configuration: it was not written by lora.save_lora")
    try:
        config = json.loads(metadata[_METADATA_KEY])
        version = config["format_version"]
        if version != _FORMAT_VERSION:
            raise ValueError(f"format_version is {version!r}, this library reads {_FORMAT_VERSION}")
        for spec in config["layers"].values():
            if not {"r", "lora_alpha", "scaling", "lora_dropout"} <= spec.keys() <= _SPEC_KEYS:
                raise ValueError(f"a layer has {sorted(spec)}, of {sorted(_SPEC_KEYS)}")
            check_hyperparameters(spec["r"], spec["lora_alpha"], spec["lora_dropout"])
            check_hyperparameters(1, spec["scaling"], 0.0)
        if not isinstance(config["modules_to_save"], list):
            raise ValueError("modules_to_save must be a list")
        if not all(isinstance(name, str) for name in (config["bias"], *config["modules_to_save"])):
            raise ValueError("bias and modules_to_save must be names")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a malformed loralib configuration: {error!r}") from error
    return tensors, config


def _base_model(model: nn.Module) -> str | None:
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    # The folders around a local model are this machine's and nobody else's business.
    return os.path.basename(os.path.abspath(name)) if name and os.path.isdir(name) else name


def _adapted_layers(model: nn.Module) -> dict[str, LoRALayer]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALayer) and module.has_adapter
    }


def _spec(layer: LoRALayer) -> dict:
    spec = {"r": layer.r, "lora_alpha": layer.lora_alpha, "scaling": layer.scaling}
    spec["lora_dropout"] = getattr(layer.lora_dropout, "p", 0.0)
    if isinstance(layer, MergedLinear):
        spec["enable_lora"] = layer.enable_lora
    return spec
