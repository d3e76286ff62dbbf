"""The adapter that comes nearest to a full fine-tune.

For each adapted weight the change W_tuned - W_base is cut off after its largest singular values, which no matrix of
that rank comes nearer to (Eckart and Young, 1936). What has no matrix to adapt (biases, norms, heads) is kept whole.
"""

import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loralib.adapters import (
    DEFAULT_NAME,
    base_modules,
    check_adapter_name,
    check_intact,
    check_one,
    check_whole,
    is_bias,
    list_adapters,
    of_base,
    own_tensors,
    unchanged_by_an_error,
)
from loralib.architectures import default_modules_to_save, unwrapped
from loralib.combine import check_rank, join, layer_spec, nearest, put_combined
from loralib.core import Adapted, full_precision
from loralib.inject import (
    ALL_LINEAR,
    ALL_LINEAR_PEFT,
    STATISTICS,
    Plan,
    _fused,
    _parameters,
    _some,
    _target_parameters,
    _targets,
    match_names,
    own_names,
    own_of_plans,
    plan_layers,
)
from loralib.layers import Kernel, Table, as_booleans, rows_of_groups
from loralib.parameters import LowRank
from loralib.quantized import dequantized, is_quantized, tells
from loralib.wrappers import without_compiled

__all__ = ["extract_lora"]

_Place = tuple[str, str]  # a module and the name of one of its tensors


class Extracted(NamedTuple):
    """What an adapter holds of the change to one weight.

    Attributes:
        r: its rank, at least 1; what the adapter holds nothing of is in `left_out`.
        change: the Frobenius norm of W_tuned - W_base.
        energy: which share of the square of that the adapter holds.
    """

    r: int
    change: float
    energy: float


class Extraction(NamedTuple):
    """What an extracted adapter holds, and what it does not; `print` shows it as a table.

    Attributes:
        layers: what it holds of each adapted layer or Parameter, by name.
        saved: the other tensors that differ and are the adapter's own, whole, with the norm of the change.
        left_out: those that differ and are not in the adapter, with the norm of the change.
    """

    layers: dict[str, Extracted]
    saved: dict[str, float]
    left_out: dict[str, float]

    @property
    def energy(self) -> float:
        """Which share of the sum of the squared changes the adapter holds."""
        low = [(layer.change**2, layer.energy) for layer in self.layers.values()]
        held = math.fsum(square * share for square, share in low) + math.fsum(norm**2 for norm in self.saved.values())
        all_ = math.fsum([*(square for square, _ in low), *(x**2 for x in (self.saved | self.left_out).values())])
        return held / all_

    def __str__(self) -> str:
        rows = [(name, str(each.r), f"{each.change:.4g}", f"{each.energy:.1%}") for name, each in self.layers.items()]
        rows += [(name, "whole", f"{norm:.4g}", "100.0%") for name, norm in self.saved.items()]
        rows += [(name, "left out", f"{norm:.4g}", "0.0%") for name, norm in self.left_out.items()]
        rows = [("", "rank", "change", "held"), *rows, ("all", "", "", f"{self.energy:.1%}")]
        name, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
        lines = (
            "  ".join([row[0].ljust(name), *(cell.rjust(width) for cell, width in zip(row[1:], widths, strict=True))])
            for row in rows
        )
        return "\n".join(lines)


def extract_lora(
    model: nn.Module,
    tuned: nn.Module | Mapping[str, Tensor],
    r: int | None = None,
    energy: float | None = None,
    target_modules: Sequence[str] | str | None = None,
    exclude_modules: Sequence[str] | str | None = None,
    modules_to_save: Sequence[str] | str | None = None,
    enable_lora: Sequence[bool] | None = None,
    adapter_name: str = DEFAULT_NAME,
    merge_weights: bool = False,
    target_parameters: Sequence[str] | None = None,
) -> Extraction:
    """Inject into `model` the adapter that is nearest to a full fine-tune of it, and report how near it is.

    >>> import copy
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    >>> tuned = copy.deepcopy(model)
    >>> with torch.no_grad():
    ...     _ = tuned[0].weight.addmm_(torch.ones(8, 1), torch.ones(1, 8)), tuned[1].weight.add_(1)
    >>> print(extract_lora(model, tuned, r=1))
               rank  change    held
    0             1       8  100.0%
    1.weight  whole   2.828  100.0%
    all                      100.0%
    >>> torch.allclose(model(torch.eye(8)), tuned(torch.eye(8)), atol=1e-5)
    True

    The adapter becomes the active one; the base stays as it is, and is frozen.

    Args:
        model: the base, which gets the adapter in place; it may have others.
        tuned: the fine-tuned model, or its state dict. A model whose LoRA layers were trained has to be merged first.
        r: the rank of every layer; or
        energy: which share of each layer's squared change the adapter holds, above 0 and at most 1: the smallest rank
            that holds it is taken.
        target_modules, target_parameters: what to adapt, named as `inject_lora` names it. None for both means every
            matrix that differs, embeddings, convolutions and experts included. What does not differ gets nothing.
        exclude_modules: targets to leave out, named in the same way.
        modules_to_save: modules to keep whole; None means the head of a Hugging Face classifier. Norms, and biases,
            are kept whole in any case, where they differ.
        enable_lora: see `inject_lora`; None adapts a fused projection as one matrix.
        adapter_name, merge_weights: see `inject_lora`.

    Returns:
        What the adapter holds of each change. Whatever differs and is not in the adapter is in `left_out`, and in a
        `UserWarning`.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: the models differ in names or shapes (as after resizing the embeddings), nothing differs, `tuned`
            holds NaN or infinity or has adapters, or an argument is out of range. Nothing has been changed then.
    """
    check_adapter_name(adapter_name)
    _check_size(r, energy)
    if enable_lora is not None and len(as_booleans(enable_lora)) != 3:
        raise ValueError(f"enable_lora={list(enable_lora)}: must be three booleans, for q, k and v")
    model = unwrapped(model)
    check_one(model.modules())
    check_whole(model)
    if adapter_name in list_adapters(model):
        raise ValueError(f"adapter_name={adapter_name!r}: the model has that adapter; delete it or take another name")
    check_intact(model)
    modules = base_modules(model)
    values = _tuned_values(model, modules, tuned)
    changes = _changed(modules, values)
    saved = default_modules_to_save(model) if modules_to_save is None else []
    if modules_to_save:
        saved = match_names(modules, modules_to_save, "modules_to_save")
    saved = [head for head in saved if any(_is_within(place, head) for place in changes)]
    names = _targets_of(model, modules, changes, saved, target_modules, target_parameters)
    if exclude_modules:
        excluded = match_names([*modules, *_parameters(model, modules)], exclude_modules, "exclude_modules")
        names = [name for name in names if name not in excluded and f"{name}.weight" not in excluded]
    specs = {name: {**layer_spec(1), **_fused(modules, name, enable_lora)} for name in names}
    if enable_lora is not None and not any("enable_lora" in spec for spec in specs.values()):
        raise ValueError(f"enable_lora={enable_lora}: none of the targets is a fused projection whose layout is known")
    everything = target_modules in (ALL_LINEAR, ALL_LINEAR_PEFT) or (target_modules is None is target_parameters)
    layers, tensors = {}, {}
    for name, plan in _plan(modules, specs, everything=everything).items():
        change = _change(modules, values, plan.path, plan.parameter)
        layers[name], tensors[name] = _cut_off(change, plan, r, energy)
        specs[name] = {**specs[name], **layer_spec(layers[name].r)}
    if not layers:
        raise ValueError(
            f"target_modules={target_modules!r}: of {_some(map('.'.join, changes))}, which differ, none is adapted"
        )
    plans = plan_layers(modules, {name: specs[name] for name in layers}, merge_weights)
    done = {(plan.path, plan.parameter) for plan in plans.values()}
    own = _own(modules, plans, changes.keys() - done, saved)
    whole = {(path, key): values[path, key] for path, keys in own.items() for key in of_base(keys)}
    packed = [path for path, key in whole if key == "weight" and is_quantized(modules[path])]
    if packed:
        raise ValueError(f"{', '.join(packed[:8])}: the weight is quantised, and cannot be kept whole; adapt it")
    with unchanged_by_an_error(model, adapter_name):
        put_combined(model, adapter_name, modules, plans, tensors, whole)
    named = {place: ".".join(filter(None, place)) for place in changes if place not in done}
    result = Extraction(
        layers,
        {name: changes[place] for place, name in named.items() if place in whole},
        {name: changes[place] for place, name in named.items() if place not in whole},
    )
    if result.left_out:
        warnings.warn(
            f"not in the adapter, though the models differ there: {_some(result.left_out)}. It holds "
            f"{result.energy:.1%} of the change; name them in target_modules or modules_to_save to hold more",
            stacklevel=2,
        )
    return result


def _check_size(r: int | None, energy: float | None) -> None:
    if (r is None) == (energy is None):
        raise ValueError(f"r={r}, energy={energy}: give one of the two")
    if r is not None:
        check_rank(r)
    elif isinstance(energy, bool) or not isinstance(energy, numbers.Real):
        raise TypeError(f"energy={energy!r}: must be a number, not {type(energy).__name__}")
    elif not 0 < energy <= 1:
        raise ValueError(f"energy={energy}: must be over 0 and at most 1, the share of the squared change to hold")


def _tuned_values(
    model: nn.Module, modules: dict[str, nn.Module], tuned: nn.Module | Mapping[str, Tensor]
) -> dict[_Place, Tensor]:
    """What each tensor of the base is in the fine-tuned model; raise if the two do not fit."""
    if isinstance(tuned, nn.Module):
        tuned = unwrapped(tuned)
        check_whole(tuned)
        adapted = [name for name, module in tuned.named_modules() if isinstance(module, Adapted) and module.has_adapter]
        if adapted:
            raise ValueError(
                f"tuned has LoRA layers ({_some(adapted)}): merge a copy of it first, "
                "lora.merge_and_unload(copy.deepcopy(tuned))"
            )
        given = {
            f"{path}.{key}".removeprefix("."): _value(module, key)
            for path, module in base_modules(tuned).items()
            for key in own_tensors(module)
        }
    elif isinstance(tuned, Mapping) and all(isinstance(tensor, Tensor) for tensor in tuned.values()):
        given = {name: tensor.detach() for name, tensor in tuned.items()}
    else:
        raise TypeError(f"tuned, a {type(tuned).__name__}: must be a model or its state dict")
    given = {without_compiled(name): tensor for name, tensor in given.items()}
    if (
        given and all(name.startswith("module.") for name in given) and "module" not in modules
    ):  # DistributedDataParallel
        given = {name.removeprefix("module."): tensor for name, tensor in given.items()}
    places: dict[_Place, Tensor] = {}
    for path, module in modules.items():
        for key, tensor in own_tensors(module).items():
            if not is_quantized(module) or key in module._parameters:
                places[path, key] = tensor
    names = {place: without_compiled(".".join(filter(None, place))) for place in places}
    found: dict[_Place, Tensor] = {}
    problems = []
    # A state dict may have one name of a tensor that has several.
    known = {id(tensor): given[names[place]] for place, tensor in places.items() if names[place] in given}
    for place, tensor in places.items():
        value = given.get(names[place], known.get(id(tensor)))
        if value is None:
            problems.append(f"{names[place]}: missing in tuned")
            continue
        shape = _value(modules[place[0]], place[1]).shape
        if value.shape != shape:
            problems.append(f"{names[place]}: {tuple(value.shape)} in tuned, {tuple(shape)} in the base")
        elif value.is_meta or tensor.is_meta:
            problems.append(f"{names[place]}: on the meta device, which holds no values")
        elif _has_nan(value):
            problems.append(f"{names[place]}: NaN or infinity in tuned")
        found[place] = value
    problems += [f"{name}: unexpected in tuned" for name in sorted(given.keys() - set(names.values()))]
    if problems:
        more = [f"... ({len(problems)} in all)"] if len(problems) > 20 else []
        lines = [f"tuned is no fine-tune of this {type(model).__name__}; nothing was changed:", *problems[:20], *more]
        raise ValueError("\n  ".join(lines))
    return found


def _has_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(tensor.to(_wide_dtype(tensor)).isfinite().all())


def _wide_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _value(module: Any, key: str) -> Tensor:
    """What the layer computes with."""
    value = own_tensors(module)[key].detach()
    if key == "weight" and is_quantized(module) and tells(module):
        return dequantized(module).detach()
    if key == "weight" and getattr(module, "max_norm", None) is not None:
        return torch.renorm(value, module.norm_type, 0, module.max_norm)
    return value


def _change(modules: dict[str, nn.Module], values: dict[_Place, Tensor], path: str, key: str) -> Tensor:
    base, value = _value(modules[path], key), values[path, key]
    value = value.to(base.device)
    dtype = _wide_dtype(base, value)
    return value.to(dtype) - base.to(dtype)


def _changed(modules: dict[str, nn.Module], values: dict[_Place, Tensor]) -> dict[_Place, float]:
    """The norm of the change where there is one, once for each module."""
    seen: set[tuple[int, str]] = set()
    changes = {}
    for path, key in values:
        if (id(modules[path]), key) in seen:
            continue
        seen.add((id(modules[path]), key))
        norm = _change(modules, values, path, key).double().norm().item()
        if norm:
            changes[path, key] = norm
    if not changes:
        raise ValueError("tuned does not differ from the base: there is nothing to extract")
    return changes


def _is_within(place: _Place, head: str) -> bool:
    return f"{place[0]}.".startswith(f"{head}.")


def _targets_of(
    model: nn.Module,
    modules: dict[str, nn.Module],
    changes: dict[_Place, float],
    saved: list[str],
    target_modules: Sequence[str] | str | None,
    target_parameters: Sequence[str] | None,
) -> list[str]:
    """The names of the layers and Parameters that differ and are to be adapted."""
    places = {place: _target(modules, *place) for place in changes if not any(_is_within(place, h) for h in saved)}
    names = []
    if target_modules is None and target_parameters is None:
        names = [name for (path, key), name in places.items() if _is_matrix(modules[path], key)]
    elif target_modules is not None:
        names = _targets(model, modules, target_modules, None, saved)[0]
    if target_parameters is not None:
        names = names + _target_parameters(model, modules, target_parameters, saved)
    full = {name: ".".join(filter(None, place)) for place, name in places.items()}
    return [name if name in names else full[name] for name in full if name in names or full[name] in names]


def _target(modules: dict[str, nn.Module], path: str, key: str) -> str:
    return path if key == "weight" else f"{path}.{key}".removeprefix(".")


def _is_matrix(module: nn.Module, key: str) -> bool:
    tensor = own_tensors(module)[key]
    return isinstance(tensor, nn.Parameter) and not is_bias(key) and (tensor.dim() > 1 or is_quantized(module))


def _plan(modules: dict[str, nn.Module], specs: dict[str, dict], everything: bool) -> dict[str, Plan]:
    if not everything:
        return plan_layers(modules, specs)
    failed: dict[str, str] = {}
    plans = plan_layers(modules, specs, left_out=failed)
    bare = (
        {f"{name}.weight": specs[name] for name in failed if "weight" in own_tensors(modules[name])} if failed else {}
    )
    specs.update(bare)
    plans.update(plan_layers(modules, bare, left_out={}))
    return {name: plan for name, plan in plans.items() if plan.path == name or plan.path not in plans}


def _matrices(change: Tensor, plan: Plan) -> tuple[dict[int, Tensor], bool, int]:
    """The matrices that the products B A are to be near to, whether they are a stack, and their rows per rank."""
    settings = vars(plan.computed) if plan.form is None else plan.form.settings
    A, B = plan.shapes.values()
    if change.dim() == 3 and isinstance(plan.computed, LowRank):
        return dict(enumerate(change.mT if plan.computed.transposed else change)), True, 1
    if plan.form is not None and issubclass(plan.form.cls, Kernel):
        return {0: change.reshape(B[0], A[1])}, False, A[0]
    if settings.get("fan_in_fan_out") or (plan.form is not None and issubclass(plan.form.cls, Table)):
        change = change.T
    if "enable_lora" not in settings:
        return {0: change}, False, 1
    groups = rows_of_groups(settings["group_sizes"], settings["interleave"])
    on = [number for number, enabled in enumerate(settings["enable_lora"]) if enabled]
    return {number: change[groups[number].to(change.device)] for number in on}, False, 1


@torch.no_grad()
def _cut_off(
    change: Tensor, plan: Plan, r: int | None, energy: float | None
) -> tuple[Extracted, tuple[Tensor, Tensor]]:
    """What the adapter holds of a change, and its A and B."""
    matrices, stacked, rows = _matrices(change, plan)
    with full_precision(change.device):
        found = {number: nearest(matrix, min(matrix.shape)) for number, matrix in matrices.items()}
    most = max(len(values) for *_, values in found.values())
    squares = [nn.functional.pad(values.double().square(), (0, most - len(values))) for *_, values in found.values()]
    held = torch.stack(squares).sum(0).cumsum(0)
    if r is None:
        enough = (energy or 1.0) * held[-1] * (1 - torch.finfo(change.dtype).eps)
        r = int((held < enough).sum()) // rows + 1
    pairs = {number: (A[: r * rows], B[:, : r * rows]) for number, (A, B, _) in found.items()}
    rank, joined = join(pairs, stacked, rows)
    norm = change.double().norm().item()
    return Extracted(rank, norm, min(1.0, held[min(r * rows, most) - 1].item() / norm**2)), joined


def _own(
    modules: dict[str, nn.Module], plans: dict[str, Plan], places: set[_Place], saved: list[str]
) -> dict[str, frozenset[str]]:
    """What the adapter has of its own, by module: the updates, and whole what has no matrix."""
    leaves = [path for path, key in places if not is_bias(key) and key not in STATISTICS and _is_vectors(modules, path)]
    saved = list(dict.fromkeys(saved + sorted(leaves)))
    owners = {path for path, key in places if is_bias(key) and key in modules[path]._parameters}
    owners = {path for path in owners if not any(_is_within((path, ""), head) for head in saved)}
    adapted = own_of_plans(plans)
    bias = "none" if not owners else "lora_only" if owners <= adapted.keys() else "all"
    return own_names(modules, adapted, bias, saved)


def _is_vectors(modules: dict[str, nn.Module], path: str) -> bool:
    below = [module for name, module in modules.items() if _is_within((name, ""), path)]
    return path != "" and all(tensor.dim() < 2 for module in below for tensor in own_tensors(module).values())
