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

import torch
from torch import Tensor, nn

from loralib.adapters import own_tensors
from loralib.architectures import default_modules_to_save, fused_layout, group_spec
from loralib.core import Adapted, check_hyperparameters, whole
from loralib.formats import Adapter, read_safetensors, read_torch, sort_out, to_bytes, write_atomically
from loralib.inject import compile_pattern, match_names, match_pattern
from loralib.layers import Groups, is_conv1d
from loralib.quantized import is_quantized

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Entries that do not change what a trained adapter computes, or are taken care of here. Any other entry that is set
# stands for a variant of LoRA that this library does not have.
_KNOWN = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    *("peft_version", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "bias"),
    *("modules_to_save", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying", "init_lora_weights"),
}  # fmt: skip
# The other ways to start change the weights of the base, which the adapter file does not hold.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")

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
    layers: dict[str, Adapted],
    single_rank: bool,
) -> None:
    """Write PEFT's folder, the weights before the configuration, each of the two files atomically.

    Args:
        folder: made if it does not exist.
        adapter: what to write.
        model: whose class tells the task.
        modules: the modules of the model without adapters, by name.
        layers: its LoRA layers.
        single_rank: write one rank and one alpha for all layers.
    """
    # The adapter's tensors rather than the layers', which may be sharded.
    factors = {name: [adapter.tensors[f"{name}.{key}"].detach() for key in ("lora_A", "lora_B")] for name in layers}
    converted = {name: _to_peft(name, layer, *factors[name]) for name, layer in layers.items()}
    if single_rank:
        converted = _with_one_rank(converted)
    use_rslora = not single_rank and _is_rslora(layers.values())
    ranks = {name: A.shape[0] for name, (A, B, scaling) in converted.items()}
    alphas = {}
    for name, (_, _, scaling) in converted.items():
        alphas[name] = _whole(scaling * (math.sqrt(ranks[name]) if use_rslora else ranks[name]))
    r, rank_pattern = _pattern(ranks)
    lora_alpha, alpha_pattern = _pattern(alphas)
    dropouts = {spec["lora_dropout"] for spec in adapter.layers.values()} - {0.0}
    if len(dropouts) > 1:
        message = f"PEFT has one lora_dropout for all layers: of {sorted(dropouts)} the largest was written"
        warnings.warn(f"{message}, which matters to further training only", stacklevel=3)
    differs = [name for name, layer in layers.items() if layer.computes_weight]
    if differs:
        warnings.warn(
            f"PEFT computes {', '.join(differs[:8])} differently: it adds the update to the output; here it is in the "
            "weight, which something else reads or a forward of the layer's own uses",
            stacklevel=3,
        )
    transposed = any(is_conv1d(modules[name]) or getattr(modules[name], "fan_in_fan_out", False) for name in layers)
    # An adapted layer with a weight of its own is told by its tensors.
    saved = [name for name in adapter.modules_to_save if name not in layers]
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
        "target_modules": _target_modules(list(layers), modules, saved),
        "fan_in_fan_out": transposed,
        "bias": adapter.bias,
        "modules_to_save": saved or None,
    }
    tensors = {}
    for name, (A, B, _) in converted.items():
        first, second = _adapter_keys(name, isinstance(modules[name], nn.Embedding))
        tensors[first], tensors[second] = A, B
    for name, tensor in adapter.tensors.items():
        path, _, key = name.rpartition(".")
        if key not in ("lora_A", "lora_B"):
            tensors[f"{_PREFIX}{path}.base_layer.{key}" if path in layers else _PREFIX + name] = tensor
    # PEFT trains every module whose name ends with one of `modules_to_save`: those that are not meant get their base.
    for path, module in modules.items():
        if _ends_with(path, saved) and path not in saved:
            inside = [name for name in layers if name.startswith(f"{path}.")]
            if inside:
                warnings.warn(f"PEFT takes {path} for a head and drops the adapters of {inside[:8]}", stacklevel=3)
            state = {key: tensor for key, tensor in module.state_dict().items() if "lora_" not in key}
            tensors = {**{f"{_PREFIX}{path}.{key}": whole(tensor) for key, tensor in state.items()}, **tensors}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, to_bytes(tensors, {"format": "pt"}))
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def read_peft(folder: Path, modules: dict[str, nn.Module], known_groups: dict[str, dict]) -> Adapter:
    """Read PEFT's folder for a model with `modules`; ValueError says what cannot be read or is no plain LoRA.

    `known_groups` are the specs of the fused layers that the model has already, empty for a layer that is not fused.
    """
    config = _read_config(folder / CONFIG)
    if (folder / WEIGHTS).is_file():
        tensors, _ = read_safetensors(folder / WEIGHTS)
    elif (folder / "adapter_model.bin").is_file():  # PEFT before 0.6
        tensors = read_torch(folder / "adapter_model.bin")
    else:
        raise FileNotFoundError(f"{folder}: there is {CONFIG}, but neither {WEIGHTS} nor adapter_model.bin")
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    result, layers, rest = {}, {}, set()
    for key in list(tensors):
        for first, second in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if key.endswith("." + first):
                name = key.removesuffix("." + first)
                A, B = tensors.pop(key), tensors.pop(f"{name}.{second}", None)
                if B is None:
                    raise ValueError(f"{folder}: {name} has {first} and no {second}")
                try:
                    layers[name], A, B = _from_peft(name, modules, A, B, config, known_groups.get(name))
                except ValueError as error:
                    raise ValueError(f"{folder}: {error}") from error
                result[f"{name}.lora_A"], result[f"{name}.lora_B"] = A, B
    if not layers:
        raise ValueError(f"{folder} holds no LoRA tensors")
    saved = [name for name in modules if name and _ends_with(name, config["modules_to_save"])]
    for name, tensor in tensors.items():
        name = name.replace(".base_layer.", ".")
        is_saved = any(name.startswith(module + ".") for module in saved)
        # PEFT adds embeddings that are adapted, or whose size differs from the base model's on the Hub.
        if not is_saved and _is_base_weight(name, tensor, modules.get(name.rpartition(".")[0])):
            continue
        result[name] = tensor
        if not is_saved:
            rest.add(name)
    leaves, bias = sort_out(rest, layers)
    bias = bias if bias != "none" else config["bias"]
    return Adapter(result, layers, bias, saved + leaves, config["base_model_name_or_path"])


def _to_peft(name: str, layer: Adapted, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, float]:
    if isinstance(layer, Groups):
        B = layer._full_B(B)
    if isinstance(layer, _CONVS):
        if layer.groups > 1:
            raise ValueError(f"{name}: PEFT has no equal of a LoRA convolution with groups={layer.groups}")
        A, B = _conv_to_peft(A, B, layer)
    return A, B, layer.scaling


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


def _from_peft(
    name: str, modules: dict[str, nn.Module], A: Tensor, B: Tensor, config: dict, known: dict | None
) -> tuple[dict, Tensor, Tensor]:
    module = modules.get(name)
    groups = getattr(module, "groups", 1)
    if A.dim() > 2 and groups > 1:
        raise ValueError(f"{name}: a LoRA convolution with groups={groups} has no equal here")
    if A.dim() != B.dim() or A.dim() < 2 or A.shape[0] != B.shape[1] or A.shape[0] == 0:
        raise ValueError(f"{name}: A of {tuple(A.shape)} and B of {tuple(B.shape)} make no product of low rank")
    r = A.shape[0]
    rank_key, alpha_key = match_pattern(config["rank_pattern"], name), match_pattern(config["alpha_pattern"], name)
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


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is {config.get('peft_type')!r}, this library reads 'LORA'")
        unknown = sorted(key for key, value in config.items() if value and key not in _KNOWN)
        if unknown:
            raise ValueError(f"{', '.join(unknown)} set: a variant of LoRA that this library does not have")
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
        }
        check_hyperparameters(given["r"], given["lora_alpha"], given["lora_dropout"])
        for key, rank in given["rank_pattern"].items():
            _check_pattern(key)
            check_hyperparameters(rank, 1, 0.0)
        for key, alpha in given["alpha_pattern"].items():
            _check_pattern(key)
            check_hyperparameters(1, alpha, 0.0)
        if not all(isinstance(name, str) for name in (given["bias"], *given["modules_to_save"])):
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
    return f"{_PREFIX}{name}.{kind[0]}", f"{_PREFIX}{name}.{kind[1]}"


def _is_rslora(layers: Iterable[Adapted]) -> bool:
    layers = list(layers)
    plain = all(math.isclose(layer.scaling, layer.lora_alpha / layer.r) for layer in layers)
    return not plain and all(math.isclose(layer.scaling, layer.lora_alpha / math.sqrt(layer.r)) for layer in layers)


def _with_one_rank(converted: dict[str, tuple[Tensor, Tensor, float]]) -> dict[str, tuple[Tensor, Tensor, float]]:
    r = max(A.shape[0] for A, _, _ in converted.values())
    common = Counter(scaling for _, _, scaling in converted.values() if scaling).most_common(1)
    target = common[0][0] if common else 1.0
    result = {}
    for name, (A, B, scaling) in converted.items():
        rows, columns = A.new_zeros(r - A.shape[0], *A.shape[1:]), B.new_zeros(B.shape[0], r - B.shape[1], *B.shape[2:])
        factor = scaling / target
        result[name] = torch.cat([A, rows]), torch.cat([B if factor == 1 else B * factor, columns], dim=1), target
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
    if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and not set(default_modules_to_save(model)) <= set(saved):
        return None  # PEFT would miss the head in the file
    return task


def _whole(value: float) -> float:
    return round(value) if abs(value - round(value)) < 1e-9 * max(1.0, abs(value)) else value


def _ends_with(name: str, endings: list[str]) -> bool:
    # PEFT matches these without regard to dots.
    return any(name.endswith(ending) for ending in endings)
