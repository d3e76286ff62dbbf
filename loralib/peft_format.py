"""PEFT's adapter folder (adapter_config.json, adapter_model.safetensors) to and from an `Adapter`.

The two differ in names, in that PEFT adapts a fused projection whole, and in the layout of convolutions:

| layer        | here                                   | in PEFT                                          |
|--------------|----------------------------------------|--------------------------------------------------|
| Linear       | lora_A (r, i), lora_B (o, r)           | the same, `.lora_A.weight`, `.lora_B.weight`     |
| MergedLinear | n groups of rank r                     | one of rank n r, B with blocks on its diagonal   |
| Embedding    | lora_A (r, V), lora_B (d, r)           | the same, `.lora_embedding_A`, `.lora_embedding_B` |
| Conv*        | (r p, in c), (out p, r p), see `Kernel` | (r, in, k...), (out, r, 1...)                    |

Every conversion is exact. PEFT's `scaling` is alpha / r, or alpha / sqrt(r) with `use_rslora`.
"""

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralib.adapters import of_base, own_tensors
from loralib.architectures import (
    find_head,
    fused_layout,
    group_spec,
    in_proj_layout,
    is_read_from_outside,
)
from loralib.core import as_number, check_hyperparameters, whole
from loralib.formats import Adapter, read_safetensors, read_torch, sort_out, to_bytes, write_atomically
from loralib.inject import compile_pattern, match_names, match_pattern
from loralib.layers import Groups, is_conv1d
from loralib.model_card import model_card
from loralib.parameters import LowRank
from loralib.quantized import is_quantized
from loralib.wrappers import names_for_peft, under_names_of

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
OLD_WEIGHTS = "adapter_model.bin"  # of PEFT before 0.6
_EXPERTS_OF_OLD = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
_TOKENS = "token_adapter.trainable_tokens_delta"
PREFIX = "base_model.model."
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Entries that do not change what a trained adapter computes, or are taken care of here. The layers that target_modules,
# layers_to_transform and layers_pattern chose are those that have tensors in the file.
_KNOWN = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    *("peft_version", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "bias"),
    *("modules_to_save", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying", "init_lora_weights"),
    *("target_parameters", "trainable_token_indices"),
    *("merge_weights",),  # of the first versions of PEFT
}  # fmt: skip
_VARIANTS = {
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "layer_replication"),
    *("arrow_config", "kasa_config", "monteclora_config", "velora_config"),
}  # fmt: skip
# The other ways to start change the weights of the base, which the adapter file does not hold.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")

# In a state dict of PEFT's model, though not in its files, the name of the adapter is in the names of its tensors.
_ADAPTER_NAME = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|modules_to_save)\.(?!weight$)([^.]+)(?=\.|$)")
_HALVES = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def write_peft(
    folder: Path,
    adapter: Adapter,
    model: nn.Module,
    modules: dict[str, nn.Module],
    layers: dict[str, Any],
    single_rank: bool,
) -> None:
    """Write PEFT's folder, the weights before the configuration, each file atomically, and a model card if it has none.

    Args:
        folder: made if it does not exist.
        adapter, model, modules, layers, single_rank: see `to_peft`.
    """
    tensors, config = to_peft(adapter, model, modules, layers, single_rank)
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    others = [name for name, layer in layers.items() if not math.isclose(layer.scaling, scaling)]
    if others and not single_rank:
        warnings.warn(
            "ranks or alphas differ (rank_pattern, alpha_pattern): engines that read one of each, such as vLLM, would "
            f"scale {', '.join(others[:8])} wrongly; save with single_rank=True for them",
            stacklevel=4,
        )
    write_atomically(folder / WEIGHTS, to_bytes(tensors, {"format": "pt"}))
    if not (folder / CARD).exists():
        write_atomically(folder / CARD, model_card(adapter.base_model).encode())
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def to_peft(
    adapter: Adapter,
    model: nn.Module,
    modules: dict[str, nn.Module],
    layers: dict[str, Any],
    single_rank: bool,
) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors and the configuration of an adapter as PEFT has them.

    Args:
        adapter: what to convert.
        model: whose class tells the task.
        modules: the modules of the model without adapters, by name.
        layers: its LoRA layers.
        single_rank: give all layers one rank and one alpha.
    """
    # The adapter's tensors rather than the layers', which may be sharded.
    parameters = {name: layer for name, layer in layers.items() if isinstance(layer, LowRank)}
    owners = {name.rpartition(".")[0] for name in parameters}
    inside = [n for n in adapter.modules_to_save if any(n.startswith(f"{path}.") for path in owners)]
    if "" in owners or inside:
        what = f"save {', '.join(inside)} within it" if inside else "wrap the model itself"
        raise ValueError(
            f"PEFT wraps the module whose Parameters it adapts, and cannot {what}; save with format='loralib'"
        )
    for name in parameters:
        path, _, key = name.rpartition(".")
        if key != "weight" and is_read_from_outside(modules, path, key):
            raise ValueError(
                f"PEFT wraps {path}, whose {key} the module around it reads: the model would not run; save with "
                "format='loralib'"
            )
    converted = {}
    for name, layer in layers.items():
        A, B = (adapter.tensors[key].detach() for key in _keys_of(name, layer))
        converted[name] = _to_peft(name, layer, A, B)
    experts = {name: _experts(layer, converted[name][0]) for name, layer in layers.items()}
    if single_rank:
        converted = _with_one_rank(converted, experts)
    use_rslora = not single_rank and _is_rslora(layers.values())
    ranks = {name: A.shape[0] // experts[name] for name, (A, B, scaling) in converted.items()}
    alphas = {}
    for name, (_, _, scaling) in converted.items():
        alphas[name] = _whole(scaling * (math.sqrt(ranks[name]) if use_rslora else ranks[name]))
    r, rank_pattern = _pattern(ranks) if ranks else (8, {})
    lora_alpha, alpha_pattern = _pattern(alphas) if alphas else (8, {})
    whole_layers = [name for name in layers if name not in parameters]
    # With fused experts in the model, PEFT takes layers of these names for those of transformers 4, which are the
    # experts now; as Parameters it finds them.
    fused = any("gate_up_proj" in module._parameters for module in modules.values())
    misread = [name for name in whole_layers if fused and name.rpartition(".")[2] in _EXPERTS_OF_OLD]
    by_weight = {f"{name}.weight" for name in misread}
    dropouts = {spec["lora_dropout"] for spec in adapter.layers.values()} - {0.0}
    if dropouts and (parameters or misread):
        message = "PEFT has no dropout where it adapts Parameters: lora_dropout=0.0 was written"
        warnings.warn(f"{message}, which matters to further training only", stacklevel=3)
        dropouts = set()
    if len(dropouts) > 1:
        message = f"PEFT has one lora_dropout for all layers: of {sorted(dropouts)} the largest was written"
        warnings.warn(f"{message}, which matters to further training only", stacklevel=5)
    if not layers:
        warnings.warn(
            "PEFT, and so from_pretrained, reads no adapter of token rows alone; lora.load_lora reads the folder",
            stacklevel=5,
        )
    differs = [name for name, layer in layers.items() if getattr(layer, "computes_weight", False)]
    differs += [
        name
        for name in parameters
        if name.endswith(".weight") and is_read_from_outside(modules, name.removesuffix(".weight"))
    ]
    differs += [path for path in adapter.token_indices if _is_biased_head(modules[path])]
    if differs:
        warnings.warn(
            f"PEFT may compute {', '.join(differs[:8])} differently: it adds the update to the output; here it is in "
            "the weight, too, which other code reads or a forward of the layer's own uses",
            stacklevel=5,
        )
    transposed = any(
        is_conv1d(modules[name]) or getattr(modules[name], "fan_in_fan_out", False) for name in whole_layers
    )
    # An adapted layer with a weight of its own is told by its tensors.
    saved = [name for name in adapter.modules_to_save if name not in layers]
    tokens = _first_of_tied(adapter.token_indices, modules)
    config = {
        "peft_type": "LORA",
        "task_type": _task(model, saved),
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": max(dropouts, default=0.0),
        "use_rslora": use_rslora,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": _target_modules([n for n in whole_layers if n not in misread], modules, saved),
        "target_parameters": _target_parameters([*parameters, *by_weight], modules) or None,
        "trainable_token_indices": tokens or None,
        "fan_in_fan_out": transposed,
        "bias": adapter.bias,
        "modules_to_save": saved or None,
    }
    tensors = {}
    wrapped: dict[str, list[str]] = {name: [name] for name in whole_layers}
    for name in parameters:
        path = name.rpartition(".")[0]
        wrapped[path] = [f"{path}.{key}" for key in modules[path]._parameters if f"{path}.{key}" in parameters]
    for path, names in wrapped.items():
        for depth, name in enumerate(reversed(names)):  # the last one is outermost
            is_table = name in whole_layers and isinstance(modules[name], nn.Embedding)
            first, second = _adapter_keys(_wrapped(path, owners, wrapped) + ".base_layer" * depth, is_table)
            tensors[first], tensors[second], _ = converted[name]
    for path in tokens:
        tensors[f"{PREFIX}{path}.{_TOKENS}"] = adapter.tensors[f"{path}.lora_rows_weight"]
    for name, tensor in adapter.tensors.items():
        path, _, key = name.rpartition(".")
        if of_base([key]):
            there = _wrapped(path, owners, wrapped) + ".base_layer" * len(wrapped.get(path, ()))
            tensors[f"{PREFIX}{there}.{key}"] = tensor
    # PEFT trains every module whose name ends with one of `modules_to_save`: those that are not meant get their base.
    for path, module in modules.items():
        if _ends_with(path, saved) and path not in saved:
            inside = [name for name in layers if name.startswith(f"{path}.")]
            if parameters.keys() & set(inside):
                raise ValueError(
                    f"PEFT takes {path} for a head, as its name ends with one of {saved}, and cannot adapt Parameters "
                    f"in it ({', '.join(inside[:8])}); save with format='loralib', or adapt the model without them"
                )
            if inside:
                warnings.warn(f"PEFT takes {path} for a head and drops the adapters of {inside[:8]}", stacklevel=5)
            state = {key: tensor for key, tensor in module.state_dict().items() if "lora_" not in key}
            tensors = {**{f"{PREFIX}{path}.{key}": whole(tensor) for key, tensor in state.items()}, **tensors}
    halves = [key.removeprefix(PREFIX) for key in tensors if ".lora_" in key]
    renamed, lost = names_for_peft(model, halves)
    if lost:
        layers_lost = list(dict.fromkeys(key.partition(".lora_")[0] for key in lost))
        raise ValueError(
            f"PEFT would lose the adapters of {', '.join(layers_lost[:8])}: it takes these names for old ones of "
            f"{type(model).__name__}'s, and renames them; save with format='loralib', or adapt the model without them "
            "(exclude_modules)"
        )
    return {PREFIX + renamed.get(bare := key.removeprefix(PREFIX), bare): t for key, t in tensors.items()}, config


def read_peft(folder: Path, modules: dict[str, nn.Module], known_groups: dict[str, dict]) -> Adapter:
    """Read PEFT's folder for a model with `modules`; ValueError says what cannot be read or is no plain LoRA.

    `known_groups` are the specs of the fused layers that the model has already, empty for a layer that is not fused.
    """
    config = read_config(folder / CONFIG, (folder / CONFIG).read_bytes())
    if (folder / WEIGHTS).is_file():
        tensors, _ = read_safetensors(folder / WEIGHTS)
    elif (folder / OLD_WEIGHTS).is_file():
        tensors = read_torch(folder / OLD_WEIGHTS)
    else:
        raise FileNotFoundError(f"{folder}: there is {CONFIG}, but neither {WEIGHTS} nor {OLD_WEIGHTS}")
    tensors, names_there = _named_as_here(folder, tensors, modules)
    result: dict[str, Tensor] = {}
    layers, rest = {}, set()
    for key in list(tensors):
        for first, second in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if key.endswith("." + first):
                name = key.removesuffix("." + first)
                A, B = tensors.pop(key), tensors.pop(f"{name}.{second}", None)
                if B is None:
                    raise ValueError(f"{folder}: {name} has {first} and no {second}")
                name, keys = _place_of(name, modules, config)
                try:
                    there = names_there.get(name, name)
                    layers[name], A, B = layer_from_peft(name, there, modules, A, B, config, known_groups.get(name))
                except ValueError as error:
                    raise ValueError(f"{folder}: {error}") from error
                result.update(zip(keys, (A, B), strict=True))
    rows = {key.removesuffix("." + _TOKENS): tensors.pop(key) for key in list(tensors) if key.endswith("." + _TOKENS)}
    tokens = {}
    for path, tensor in rows.items():
        given = config["trainable_token_indices"]
        found = (
            [rows for key, rows in given.items() if names_there.get(path, path).endswith(key)]
            if isinstance(given, dict)
            else [given]
        )
        weight = own_tensors(modules[path]).get("weight") if path in modules else None
        if not found or weight is None:
            raise ValueError(
                f"{folder}: {path}.{_TOKENS} is there, and no trainable_token_indices or no such embedding"
            )
        for name, module in modules.items():
            if own_tensors(module).get("weight") is weight:
                tokens[name], result[f"{name}.lora_rows_weight"] = list(found[0]), tensor
                if _is_biased_head(module):
                    warnings.warn(
                        f"{name} has a bias, which PEFT leaves out where it trains rows of tokens; here it is added",
                        stacklevel=5,
                    )
    if not layers and not tokens:
        raise ValueError(f"{folder} holds no LoRA tensors")
    saved = [name for name in modules if name and _ends_with(name, config["modules_to_save"])]
    for name, tensor in tensors.items():
        is_saved = any(name.startswith(module + ".") for module in saved)
        # PEFT adds embeddings that are adapted, or whose size differs from the base model's on the Hub.
        if not is_saved and _is_base_weight(name, tensor, modules.get(name.rpartition(".")[0])):
            continue
        result[name] = tensor
        if not is_saved:
            rest.add(name)
    leaves, bias = sort_out(rest, layers)
    bias = bias if bias != "none" else config["bias"]
    base = config["base_model_name_or_path"]
    return Adapter(result, layers, bias, saved + leaves, base, token_indices=tokens)


def _keys_of(name: str, layer: Any) -> list[str]:
    """The names of A and B of what has the name `name`."""
    if not isinstance(layer, LowRank):
        return [f"{name}.lora_A", f"{name}.lora_B"]
    path, _, key = name.rpartition(".")
    return [f"{path}.{each}" if path else each for each in layer.names(key)]


def _place_of(name: str, modules: dict[str, nn.Module], config: dict) -> tuple[str, list[str]]:
    """Our name of what PEFT's wrapper `name` adapts, and those of A and B: the k-th wrapper from outside adapts the
    k-th Parameter from the last of those that `target_parameters` means."""
    path = re.sub(r"(\.base_layer)+$", "", name)
    targets = config["target_parameters"]
    module = modules.get(path)
    keys = [] if module is None else [key for key, t in own_tensors(module).items() if isinstance(t, nn.Parameter)]
    keys = [key for key in keys if any(f".{path}.{key}".endswith(f".{target}") for target in targets)]
    depth = name.count(".base_layer", len(path))
    if depth >= len(keys):
        return name, [f"{name}.lora_A", f"{name}.lora_B"]
    key = keys[-1 - depth]
    if isinstance(module, nn.Linear):  # the same as the layer
        return path, [f"{path}.lora_A", f"{path}.lora_B"]
    return f"{path}.{key}", [f"{path}.{each}" for each in LowRank.names(key)]


def _wrapped(path: str, owners: set[str], wrapped: dict[str, list[str]]) -> str:
    """What PEFT calls a module that is inside of one whose Parameters are adapted."""
    for owner in owners:
        if path.startswith(f"{owner}."):
            return f"{owner}{'.base_layer' * len(wrapped[owner])}{path[len(owner) :]}"
    return path


def _is_biased_head(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.bias is not None


def _experts(layer: Any, A: Tensor) -> int:
    stacked = isinstance(layer, LowRank) and not hasattr(layer, "enable_lora")
    return A.shape[0] // layer.r if stacked else 1


def _target_parameters(names: list[str], modules: dict[str, nn.Module]) -> list[str]:
    everything = [f"{path}.{key}" for path, module in modules.items() for key in own_tensors(module)]
    short = sorted({".".join(name.split(".")[-2:]) for name in names})
    exact = names and set(match_names(everything, short, "target_parameters")) == set(names)
    return short if exact else sorted(names)


def _first_of_tied(tokens: dict[str, list[int]], modules: dict[str, nn.Module]) -> dict[str, list[int]]:
    # PEFT gives the others the rows by itself.
    first = {id(own_tensors(modules[path])["weight"]): path for path in reversed(list(tokens))}
    return {path: tokens[path] for path in first.values()}


def _named_as_here(
    folder: Path, tensors: dict[str, Tensor], modules: dict[str, nn.Module]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file under the names of the model, and the names in the file of modules that are renamed so."""
    plain: dict[str, Tensor] = {}
    adapters, clashes = set(), False
    for key, tensor in tensors.items():
        key = key.partition(PREFIX)[2] or key
        if ".original_module." in key:  # the base's, which bias="all" takes along
            continue
        key = re.sub(r"\.modules_to_save\.(?=[^.]+$)", ".", key)
        named = _ADAPTER_NAME.search(key)
        if named:
            adapters.add(named[2])
            key = key[: named.start()] + ("" if named[1] == "modules_to_save" else "." + named[1]) + key[named.end() :]
        # Before A and B it counts the Parameters that are adapted in one module.
        key = re.sub(r"(\.base_layer)+\.(?!lora_)", ".", key)
        if key in plain:
            clashes = clashes or key.endswith(_HALVES) or not torch.equal(plain[key], tensor)
        plain[key] = tensor
    if len(adapters) > 1 or clashes:
        raise ValueError(
            f"{folder} holds several adapters ({', '.join(sorted(adapters))} in the names of their tensors); save each "
            "to a folder of its own"
        )
    deepest = max((key.count(".base_layer") for key in plain), default=0)
    endings = [".base_layer" * depth + half for depth in range(deepest, -1, -1) for half in _HALVES]
    endings.append(f".{_TOKENS}")
    return under_names_of(plain, endings, modules)


def _to_peft(name: str, layer: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, float]:
    if hasattr(layer, "enable_lora"):
        B = Groups._full_B(layer, B)
    if isinstance(layer, _CONVS):
        other = _beyond_peft(layer)
        if other:
            raise ValueError(f"{name}: PEFT has no equal of a LoRA convolution with {other}")
        A, B = _conv_to_peft(A, B, layer)
    return A, B, as_number(layer.scaling)


def _beyond_peft(convolution: Any) -> str:
    """What a convolution has that those of PEFT's adapters have not, whose sum is then of another function."""
    if convolution.groups > 1:
        return f"groups={convolution.groups}"
    pairs = zip(convolution.kernel_size, convolution.dilation, strict=True)
    if any(size > 1 and step > 1 for size, step in pairs):
        return f"dilation={convolution.dilation}"
    padded = any(convolution._reversed_padding_repeated_twice)
    return f"padding_mode={convolution.padding_mode!r}" if convolution.padding_mode != "zeros" and padded else ""


def _conv_to_peft(A: Tensor, B: Tensor, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[Tensor, Tensor]:
    # Row o of the update is p rows of B A side by side; as one row of a matrix product it has p copies of A on a
    # diagonal, or A itself cut into p pieces where B treats them alike, as it does if it came from PEFT.
    p = B.shape[0] // layer.out_channels
    blocks = B.reshape(layer.out_channels, p, -1, p)
    alike = torch.zeros_like(blocks)
    alike.diagonal(dim1=1, dim2=3).copy_(blocks[:, :1, :, 0].transpose(1, 2).expand(-1, -1, p))
    if torch.equal(alike, blocks):
        B, A = blocks[:, 0, :, 0], A.reshape(blocks.shape[2], -1)
    else:
        B, A = B.reshape(layer.out_channels, -1), torch.block_diag(*[A] * p)
    ones = [1] * len(layer.kernel_size)
    return A.reshape(-1, layer.in_channels, *layer.kernel_size), B.reshape(*B.shape, *ones)


def _conv_from_peft(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    p = A.shape[2] if A.dim() > 3 else 1
    A, B = A.reshape(A.shape[0] * p, -1), B.flatten(1)
    return A, torch.kron(B.contiguous(), torch.eye(p, dtype=B.dtype))


def layer_from_peft(
    name: str, there: str, modules: dict[str, nn.Module], A: Tensor, B: Tensor, config: dict, known: dict | None
) -> tuple[dict, Tensor, Tensor]:
    """Return the spec, A and B of a layer from PEFT's A and B; `there` is its name for the patterns of `config`."""
    module = modules.get(name)
    other = _beyond_peft(module) if A.dim() > 2 and isinstance(module, _CONVS) else ""
    if other:
        raise ValueError(
            f"{name}: a LoRA convolution with {other} has no equal here: unmerged, PEFT computes with a convolution "
            "without that"
        )
    if A.dim() != B.dim() or A.dim() < 2 or A.shape[0] != B.shape[1] or A.shape[0] == 0:
        raise ValueError(f"{name}: A of {tuple(A.shape)} and B of {tuple(B.shape)} make no product of low rank")
    path, _, key = name.rpartition(".")
    weight = own_tensors(modules[path]).get(key) if module is None and path in modules else None
    r = A.shape[0] // (weight.shape[0] if weight is not None and weight.dim() == 3 else 1)
    # Of a layer that transformers has renamed the patterns may say the new name, too.
    rank_key, alpha_key = (
        match_pattern(config[patterns], there) or match_pattern(config[patterns], name)
        for patterns in ("rank_pattern", "alpha_pattern")
    )
    named = config["r"] if rank_key is None else config["rank_pattern"][rank_key]
    if named != r:
        raise ValueError(f"{name}: the configuration says rank {named}, the tensors have {r}")
    alpha = config["lora_alpha"] if alpha_key is None else config["alpha_pattern"][alpha_key]
    scaling = alpha / (math.sqrt(r) if config["use_rslora"] else r)
    spec = {"r": r, "lora_alpha": alpha, "scaling": scaling, "lora_dropout": config["lora_dropout"]}
    if A.dim() > 2:
        # Before the conversion, whose result grows with the square of the kernel.
        ours = (module.in_channels, *module.kernel_size) if isinstance(module, _CONVS) else None
        if A.shape[1:] != ours:
            raise ValueError(f"{name}: a kernel of {tuple(A.shape[1:])} in the file, {ours} in the model")
        A, B = _conv_from_peft(A, B)
    layout, enable_lora = None, None
    if known is not None:
        enable_lora = known.get("enable_lora")
        if enable_lora:
            sizes = known.get("group_sizes", [B.shape[0] // len(enable_lora)] * len(enable_lora))
            layout = sizes, known.get("interleave", 1)
    elif weight is not None:
        found = in_proj_layout(modules[path], name)
        layout = found and (found.sizes, found.turns)
    elif isinstance(module, nn.Linear) or (module is not None and is_conv1d(module)):
        found = fused_layout(modules[name.rpartition(".")[0]], name, module)
        layout = found and (found.sizes, found.turns)
    if layout and B.shape[0] == sum(layout[0]):
        blocks = _blocks(B, *layout, enable_lora)
        if blocks is not None:
            enable_lora, B = blocks
            alpha = scaling * (math.sqrt(B.shape[1]) if config["use_rslora"] else B.shape[1])
            spec.update(r=B.shape[1], lora_alpha=_whole(alpha), **group_spec(enable_lora, *layout))
    return spec, A, B


def _blocks(
    B: Tensor, sizes: list[int], turns: int, enable_lora: list[bool] | None
) -> tuple[list[bool], Tensor] | None:
    # Undo MergedLinear._full_B if B is what it gives: for each adapted group the columns of its own. Of groups that are
    # not known those count as adapted that are not zero.
    groups = B.unflatten(0, (turns, -1)).split([size // turns for size in sizes], dim=1)
    groups = [group.flatten(0, 1) for group in groups]
    enable_lora = enable_lora or [bool(group.any()) for group in groups]
    adapted = [group for group, enabled in zip(groups, enable_lora, strict=True) if enabled]
    if not adapted or B.shape[1] % len(adapted):
        return None
    r = B.shape[1] // len(adapted)
    inside = [group[:, j * r : (j + 1) * r] for j, group in enumerate(adapted)]
    if torch.cat(inside).count_nonzero() != B.count_nonzero():
        return None
    return enable_lora, torch.cat(inside)


def read_config(path: Path, text: str | bytes) -> dict:
    """Return what of a configuration the adapter's computation depends on; ValueError says what is wrong with it.

    Args:
        path: the file that it is in.
        text: the configuration as JSON.
    """
    try:
        config = json.loads(text)
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is {config.get('peft_type')!r}, this library reads 'LORA'")
        unknown = {key: value for key, value in config.items() if value and key not in _KNOWN}
        # A boolean, a list or a dict turns a new variant on; what other programs add are texts and numbers.
        variants = sorted(k for k, value in unknown.items() if k in _VARIANTS or isinstance(value, (bool, list, dict)))
        if variants:
            raise ValueError(f"{', '.join(variants)} set: a variant of LoRA that this library does not have")
        if unknown:
            warnings.warn(
                f"{path}: {', '.join(sorted(unknown))} is no entry of PEFT's; it is taken for a note, and nothing is "
                "computed from it",
                stacklevel=6,
            )
        init = config.get("init_lora_weights", True)
        if init not in _PLAIN_INITS:
            raise ValueError(
                f"init_lora_weights={init!r} changed the weights of the base, which the folder does not hold; convert "
                "the adapter to plain LoRA with PEFT first (path_initial_model_for_weight_conversion)"
            )
        given = {
            "r": config.get("r", 8),
            "lora_alpha": config.get("lora_alpha", 8),
            "lora_dropout": config.get("lora_dropout") or 0.0,
            "use_rslora": bool(config.get("use_rslora")),
            "bias": config.get("bias") or "none",
            "modules_to_save": list(config.get("modules_to_save") or []),
            "rank_pattern": dict(config.get("rank_pattern") or {}),
            "alpha_pattern": dict(config.get("alpha_pattern") or {}),
            "base_model_name_or_path": config.get("base_model_name_or_path"),
            "target_parameters": list(config.get("target_parameters") or []),
            "trainable_token_indices": config.get("trainable_token_indices") or {},
        }
        check_hyperparameters(given["r"], given["lora_alpha"], given["lora_dropout"])
        for key, rank in given["rank_pattern"].items():
            _check_pattern(key)
            check_hyperparameters(rank, 1, 0.0)
        for key, alpha in given["alpha_pattern"].items():
            _check_pattern(key)
            check_hyperparameters(1, alpha, 0.0)
        if not all(isinstance(n, str) for n in (given["bias"], *given["modules_to_save"], *given["target_parameters"])):
            raise ValueError("bias and modules_to_save must be names")
        return given
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError, re.error) as error:
        raise ValueError(f"{path} is no configuration this library reads: {error}") from error


def _check_pattern(pattern: str) -> None:
    # It is a stranger's, and Python tries every way to match a name of, say, 100 letters: that can take years.
    groups, bars, optional, repeats = (len(re.findall(mark, pattern)) for mark in (r"\(", r"\|", r"\?", r"[*+{]"))
    ways = (1 + bars) ** groups * 2**optional * 100**repeats
    if len(pattern) > 500 or ways > 1e6 or re.search(r"\)[*+{]|\(\?(?!:)", pattern):
        raise ValueError(
            f"the pattern {pattern[:200]!r} could take for ever to match; give names, or at most three repetitions, "
            "none of them of a group"
        )
    compile_pattern(pattern)


def _is_base_weight(name: str, tensor: Tensor, module: nn.Module | None) -> bool:
    if module is None or not name.endswith(".weight"):
        return False
    weight = own_tensors(module).get("weight")
    if weight is None or weight.shape != tensor.shape or is_quantized(module) or not tensor.is_floating_point():
        return False
    return torch.equal(whole(weight.detach()).cpu(), tensor.to(weight.dtype))


def _adapter_keys(name: str, embedding: bool) -> tuple[str, str]:
    kind = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    return f"{PREFIX}{name}.{kind[0]}", f"{PREFIX}{name}.{kind[1]}"


def _is_rslora(layers: Iterable[Any]) -> bool:
    layers = list(layers)
    plain = all(math.isclose(layer.scaling, layer.lora_alpha / layer.r) for layer in layers)
    return not plain and all(math.isclose(layer.scaling, layer.lora_alpha / math.sqrt(layer.r)) for layer in layers)


def _with_one_rank(
    converted: dict[str, tuple[Tensor, Tensor, float]], experts: dict[str, int]
) -> dict[str, tuple[Tensor, Tensor, float]]:
    r = max(A.shape[0] // experts[name] for name, (A, _, _) in converted.items())
    common = Counter(scaling for _, _, scaling in converted.values() if scaling).most_common(1)
    target = common[0][0] if common else 1.0
    result = {}
    for name, (A, B, scaling) in converted.items():
        # (experts, r, i...) and (o, r, experts, ...)
        A, B = A.unflatten(0, (experts[name], -1)), B.unflatten(1, (-1, experts[name]))
        rows = A.new_zeros(A.shape[0], r - A.shape[1], *A.shape[2:])
        columns = B.new_zeros(B.shape[0], r - B.shape[1], *B.shape[2:])
        factor = scaling / target
        A, B = torch.cat([A, rows], dim=1), torch.cat([B if factor == 1 else B * factor, columns], dim=1)
        result[name] = A.flatten(0, 1), B.flatten(1, 2), target
    return result


def _pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most frequent value, and the others by name."""
    common = Counter(values.values()).most_common(1)[0][0]
    others = {name: value for name, value in values.items() if value != common}
    # A name may also be the end of a longer one.
    return common, {
        f"^{name}" if any(other.endswith("." + name) for other in values) else name: value
        for name, value in others.items()
    }


def _target_modules(names: list[str], modules: dict[str, nn.Module], saved: list[str]) -> list[str] | str:
    if not names:
        return []
    candidates = [name for name in modules if not any(f"{name}.".startswith(f"{head}.") for head in saved)]
    for targets in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if set(match_names(candidates, targets, "target_modules")) == set(names):
            return targets
    return "|".join(map(re.escape, names))


def _task(model: nn.Module, saved: list[str]) -> str | None:
    kind = type(model).__name__
    task = next((task for suffix, task in _TASKS.items() if kind.endswith(suffix)), None)
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None  # PEFT's classes for the tasks take texts
    head = find_head(model)
    if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and (head is None or not set(head) <= set(saved)):
        return None  # PEFT would miss the head in the file
    return task


def _whole(value: float) -> float:
    return round(value) if abs(value - round(value)) < 1e-9 * max(1.0, abs(value)) else value


def _ends_with(name: str, endings: list[str]) -> bool:
    # PEFT matches these without regard to dots.
    return any(name.endswith(ending) for ending in endings)
