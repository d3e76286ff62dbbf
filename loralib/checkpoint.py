"""Save the adapter of a model to a file, and load one: what is in the file against what is in the model."""

import contextlib
import functools
import itertools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralib.adapters import (
    DEFAULT_NAME,
    active_adapter,
    active_parts,
    adapter_names,
    add_part,
    all_modules,
    any_sharded,
    base_modules,
    check_adapter_name,
    check_intact,
    check_not_exchanged,
    check_not_fsdp1,
    check_not_offloaded,
    check_not_partitioned,
    check_one,
    check_stored,
    check_whole,
    named_modules,
    note_parts,
    of_base,
    own_tensors,
    put,
    unchanged_by_an_error,
    untied,
)
from loralib.architectures import base_name, group_spec, resized_embeddings, unwrapped
from loralib.core import SHARED_BASE, Adapted, as_number, is_sharded, quiet_state, whole
from loralib.diffusers_format import FILE, is_of_diffusers, read_diffusers, write_diffusers
from loralib.formats import (
    LORA_ENDINGS,
    Adapter,
    check_metadata,
    is_whole_checkpoint,
    read_native,
    read_upstream,
    whole_checkpoint,
    write_native,
)
from loralib.hub import UPSTREAM_SUFFIXES, local_path
from loralib.inject import (
    BIAS_MODES,
    STATISTICS,
    LayerNames,
    Plan,
    _some,
    check_bias_mode,
    own_names,
    plan_layers,
    plan_tokens,
    put_adapter,
)
from loralib.layers import Table
from loralib.parameters import Parameters, Rows
from loralib.peft_format import CONFIG, read_peft, write_peft
from loralib.reloaded import check_not_reloaded
from loralib.several import set_adapter
from loralib.utils import _join, is_lora_name, match_modules_to_save
from loralib.wrappers import prefix_of_wrappers, under_names_of, without_compiled

__all__ = ["load_lora", "read_metadata", "save_lora"]


def save_lora(
    model: nn.Module,
    path: str | os.PathLike,
    bias: str = "none",
    modules_to_save: Sequence[str] | str | None = None,
    format: str = "loralib",
    single_rank: bool = False,
    metadata: dict[str, str] | None = None,
    base_model: str | os.PathLike | None = None,
) -> None:
    """Write the active adapter of `model` and its configuration to one file, or in the form of PEFT or diffusers.

    If `fully_shard` shards the model, every process has to call this: the first one writes, the others wait for it.
    Otherwise one process is enough.

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
        path: the file to write; an earlier one stays whole until the new one is complete. For PEFT a folder; its files
            are replaced in the same way, the configuration last. A README.md is written only if there is none. Folders
            that do not exist are made.
        bias, modules_to_save: what to save besides the adapter and the heads and biases that it got from
            `inject_lora`, as given to `mark_only_lora_as_trainable`.
        format: "loralib"; "peft" for a folder that `peft.PeftModel.from_pretrained` reads; or "diffusers" for a file
            that `load_lora_weights` of a pipeline reads; `path` is then a safetensors file or a folder for it. (Pass
            `use_safetensors=True` to `load_lora_adapter` of a model, or diffusers leaves out the alpha.)
        single_rank: for PEFT, write one rank and one alpha for all layers, which some serving engines need: smaller
            ranks are padded with zeros, and scales that differ are multiplied into B.
        metadata: texts that `read_metadata` returns, such as the task of the adapter; only in loralib's own file.
        base_model: name of the base model on the Hub, or its folder; `AutoModel.from_pretrained` reads it from PEFT's
            folder. None means what the model was loaded from.

    Raises:
        ValueError: the model has no adapter, the arguments are wrong as in `mark_only_lora_as_trainable`, PEFT has no
            equivalent of a layer, or diffusers none of a head.
        OSError: the file cannot be written.
    """
    if format not in ("loralib", "peft", "diffusers"):
        raise ValueError(f"format={format!r}: must be 'loralib', 'peft' or 'diffusers'")
    if single_rank and format != "peft":
        raise ValueError("single_rank=True is for format='peft'; the other formats keep the rank of each layer")
    check_metadata({} if metadata is None else metadata)
    if metadata and format != "loralib":
        raise ValueError(f"metadata={metadata!r}: the files of {format} have no place for it")
    given, path = os.fspath(path), Path(path)
    if format == "loralib" and (path.is_dir() or given.endswith(("/", os.sep))):
        raise ValueError(f"{given} is a folder; give the name of a file, or format='peft'")
    if format == "loralib" and path.suffix in (*UPSTREAM_SUFFIXES, ".ckpt"):
        raise ValueError(f"{path}: files of that ending are pickles; the file is written by safetensors: name it so")
    folder = format == "peft" or (format == "diffusers" and path.suffix != ".safetensors")
    if folder and path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give the name of a folder for format={format!r}")
    model = unwrapped(model)
    inner, adapter, layers, modules = gather(model, bias, modules_to_save)
    adapter.metadata = metadata or {}
    adapter.base_model = _base_model(inner, format) if base_model is None else os.fspath(base_model)

    def write() -> None:
        if format == "peft":
            write_peft(path, adapter, inner, modules, layers, single_rank)
        elif format == "diffusers":
            write_diffusers(path, adapter, inner, modules, layers)
        else:
            write_native(path, adapter)

    if any_sharded(model):
        in_first_process(write)
    else:
        write()


def gather(
    model: nn.Module,
    bias: str = "none",
    modules_to_save: Sequence[str] | str | None = None,
    state: dict[str, Tensor] | None = None,
) -> tuple[nn.Module, Adapter, dict[str, Any], dict[str, nn.Module]]:
    """Return the model without known wrappers, its active adapter, and by their names in it the layers and the
    modules without adapters.

    `state` is a state dict of the model, if somebody has put one together from its shards, whose values count then.
    """
    every = all_modules(model)
    check_one(every)
    check_not_reloaded(every)
    check_not_fsdp1(every)
    if not state:
        check_not_partitioned(every)
    check_intact(model, [active_adapter(model)])
    found = _adapted(model)
    layers = _lora_layers(found)
    if not layers and not _token_indices(found):
        what = f"{type(model).__name__} has no adapters to save"
        if hasattr(model, "peft_config"):
            raise ValueError(f"{what}; those of PEFT are saved by its own save_pretrained, and load_lora reads them")
        raise ValueError(f"{what}; call lora.inject_lora(model, ...) first")
    check_not_offloaded(dict(found))
    check_stored(layers)
    if not state:
        _warn_of_untrained(found)
    adapter = _collect(model, found, layers, bias, modules_to_save)
    if not state:
        _warn_of_left_out(model, adapter)
    prefix = prefix_of_wrappers(model, [*adapter.tensors, *layers, *adapter.modules_to_save])

    def named(name: str) -> str:
        return without_compiled(name.removeprefix(prefix))

    adapter = _renamed(adapter, named)
    if state:
        state = {named(name): tensor for name, tensor in state.items()}
        missing = [key for key in adapter.tensors if key not in state]
        if missing:
            raise ValueError(f"state_dict has no {', '.join(missing[:8])}, which the adapter has; nothing was written")
        adapter.tensors = {key: state[key] for key in adapter.tensors}
    adapter.tensors = {key: whole(tensor) for key, tensor in adapter.tensors.items()}
    inner = unwrapped(model.get_submodule(prefix.removesuffix(".")))
    modules = {without_compiled(name): module for name, module in base_modules(inner).items()}
    return inner, adapter, {named(name): layer for name, layer in layers.items()}, modules


def load_lora(
    model: nn.Module,
    path: str | os.PathLike,
    adapter_name: str | None = None,
    lora_alpha: float | None = None,
    enable_lora: Sequence[bool] = (True, False, True),
    merge_weights: bool = False,
    heads: bool = True,
    trainable: bool = True,
    revision: str | None = None,
) -> list[str]:
    """Load an adapter into `model`, make it the active one and return the names of its LoRA layers.

    A model without the adapter gets the layers, heads and biases that the file describes; everything else is frozen.
    If the model has the adapter, its layers must be those of the file; `lora_alpha` and `scaling` become the file's. A
    model that `fully_shard` shards must have it, and every process has to load. Example: see `save_lora`.

    Args:
        model: the base model, or one with LoRA layers, in any state (merged, in eval, on any device).
        path: one of these; nothing in any of them is executed:
            a file of `save_lora`;
            a folder of PEFT;
            a safetensors file of diffusers or of kohya's scripts, from which the part for this model is taken;
            a .bin, .pt or .pth file of upstream's `lora_state_dict`;
            a checkpoint of the whole adapted model, a file (of Lightning, for example) or a folder of transformers,
            from which the adapter is taken, and whatever else differs from this base, such as a head;
            "user/name" of an adapter on the Hugging Face Hub, which huggingface_hub downloads.
            Names that differ only by wrappers (`module.`, `_orig_mod.`, `model.`, `0.auto_model.`) match.
        adapter_name: which adapter to load into; a new name makes a new adapter beside the others. None means the
            active one, or else "default".
        lora_alpha: only for upstream's files and whole checkpoints, which do not contain it. For a training with
            `use_rslora` give alpha times the root of the rank.
        enable_lora: only for upstream's files, which do not contain it: the groups of a fused projection that are
            adapted, where the shapes leave it open and the model has no such layer yet.
        merge_weights: whether `eval()` merges layers made here.
        heads: whether to load the modules that the file saves whole, too. False leaves those of the model as they are,
            so that the adapter of one task can begin the training of another.
        trainable: False freezes the adapter too, for a reference or for inference.
        revision: which branch, tag or commit of a repository on the Hub.

    Raises:
        FileNotFoundError: there is no such file, here or on the Hub. (Another OSError: it cannot be read.)
        TypeError: `lora_alpha` is no number, or `enable_lora` no list of booleans.
        ValueError: the file is damaged or of another kind, `lora_alpha` is missing, or the adapter does not fit the
            model: one error lists every tensor that is missing, unexpected or of the wrong shape, or holds NaN or
            infinity. Whatever is raised, the model has not been changed.
    """
    path, wrapped, model = local_path(os.fspath(path), revision), model, unwrapped(model)
    check_one(all_modules(model))
    modules = base_modules(model)
    name = (active_adapter(model) or DEFAULT_NAME) if adapter_name is None else adapter_name
    if trainable and name != active_adapter(model):
        check_not_exchanged(wrapped)
    check_adapter_name(name)
    check_intact(model, [name, active_adapter(model)])
    with unchanged_by_an_error(model, name):
        if name not in adapter_names(model):
            check_whole(model)
            adapter = _read_for(path, modules, {}, lora_alpha, enable_lora, heads)
            plans, problems = _plan(modules, adapter, merge_weights)
            shapes: dict[str, dict] = {}
            for plan in plans.values():
                shapes.setdefault(plan.path, {}).update(plan.shapes)
            own, misfits = _fit(modules, shapes, adapter, False)
            check_not_offloaded({name: modules[name] for name in own})
            _refuse(path, model, problems + misfits)
            put_adapter(model, name, plans, own, _untied(modules, own, adapter))
            layers = _lora_layers(_adapted(model))
        else:
            every = all_modules(model)
            check_not_reloaded(every)
            check_not_fsdp1(every)
            set_adapter(model, name)
            found = _adapted(model)
            layers = _lora_layers(found)
            check_stored(layers)
            adapter = _read_for(path, modules, layers, lora_alpha, enable_lora, heads)
            there = _adapter_tensors(found)
            shapes = {path: {key: t.shape for key, t in tensors.items()} for path, tensors in there.items()}
            own, misfits = _fit(modules, shapes, adapter, heads)
            misfits += [
                f"{key}: the model ties it to another tensor of the file, which has other values; load into a new one"
                for key in _untied(modules, own, adapter)
            ]
            if adapter.token_indices != _token_indices(found):
                misfits.append(f"tokens: {adapter.token_indices} in the file, {_token_indices(found)} in the model")
            _refuse(path, model, _differences(layers, adapter.layers) + misfits)
            _add_own(model, modules, own, name)
        for layer_name, layer in layers.items():
            layer.lora_alpha = adapter.layers[layer_name]["lora_alpha"]
            layer.scaling = adapter.layers[layer_name]["scaling"]
        if any_sharded(model):  # fully_shard shards again then, what a forward has left whole
            with quiet_state():
                model.state_dict()
        targets = _adapter_tensors(_adapted(model))
        _write(modules, own, targets, adapter.tensors)
        for part in (*active_parts(modules).values(), *targets.values()):
            for tensor in part.values():
                if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                    tensor.requires_grad_(trainable)
    return LayerNames(layers)


@torch.no_grad()
def _write(
    modules: dict[str, nn.Module],
    own: dict[str, frozenset[str]],
    targets: dict[str, dict[str, Tensor]],
    values: dict[str, Tensor],
) -> None:
    """Write the values of a file into the tensors that are the adapter's own."""
    for name, keys in own.items():
        module = modules[name]
        with module._unmerged() if isinstance(module, Adapted) else contextlib.nullcontext():
            there = _held(modules, {name: keys}, targets)[name]
            for key in keys:
                value = values.get(_join(name, key))
                if value is None:  # statistics, which other libraries do not save
                    value = vars(module)["_place"].replaced.get(key) if "_place" in vars(module) else None
                if value is not None:
                    held = _apart(modules, there[key]) if hasattr(there[key], SHARED_BASE) else there[key]
                    held.copy_(_as_held(held, value))


def _apart(modules: dict[str, nn.Module], shared: Tensor) -> nn.Parameter:
    """A copy in the place of a Parameter that other models have, too."""
    own = nn.Parameter(shared.detach().clone(), shared.requires_grad)
    for module in modules.values():
        for key in [key for key, tensor in module._parameters.items() if tensor is shared]:
            setattr(module, key, own)
    return own


def _warn_of_left_out(model: nn.Module, adapter: Adapter) -> None:
    modules = base_modules(model)
    if not any("_place" in vars(module) for module in modules.values()):
        # Made by hand, what is saved is chosen by hand, as in 0.1.2; but all that is of LoRA is meant.
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad and is_lora_name(name)}
        if left := sorted(names - adapter.tensors.keys()):
            warnings.warn(
                f"{_some(left)}: trained, and not in the file, which holds the layers of this library; save "
                "lora.lora_state_dict(model) for those of your own",
                stacklevel=4,
            )
        return
    parts = active_parts(modules)
    trained = {
        _join(path, key)
        for path, module in modules.items()
        for key, tensor in own_tensors(module).items()
        if tensor.requires_grad and key not in parts.get(path, {})
    }
    if left := sorted(trained - adapter.tensors.keys()):
        warnings.warn(
            f"{_some(left)}: trained, and not in the file, which holds the adapter only; name the modules in "
            "modules_to_save of inject_lora, which trains copies of them, or of save_lora",
            stacklevel=4,
        )


def _refuse(path: Path, model: nn.Module, problems: list[str]) -> None:
    if problems:
        what = f"{path} does not fit {type(model).__name__}; nothing was loaded"
        raise ValueError("\n  ".join([what + ":", *problems]))


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Return the texts that `save_lora` was given as `metadata`; other kinds of adapter files have none.

    >>> import tempfile, loralib as lora
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> names = lora.inject_lora(model, r=2, target_modules=["0"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lora.save_lora(model, folder + "/adapter.safetensors", metadata={"task": "sst2"})
    ...     lora.read_metadata(folder + "/adapter.safetensors")
    {'task': 'sst2'}

    Args:
        path: a file of `save_lora`, or any that `load_lora` takes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a safetensors file, but not of `save_lora`.
    """
    path = Path(path)
    if path.is_dir() or (path.suffix in UPSTREAM_SUFFIXES and path.is_file()):
        return {}
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such adapter file")
    return read_native(path).metadata


def in_first_process(write: Callable[[], None]) -> None:
    import torch.distributed as dist

    outcome: list = [None]
    if dist.get_rank() == 0:
        try:
            write()
        except Exception as error:  # for all processes: the others would wait for ever
            outcome = [error]
    dist.broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise outcome[0]


def _as_held(held: Any, tensor: Tensor) -> Tensor:
    """Return `tensor`, or this process's part of it if `held`, which it is to replace, is sharded."""
    if not is_sharded(held):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # slow to import, and imported if it is in use

    return distribute_tensor(tensor.to(held.device), held.device_mesh, held.placements, src_data_rank=None)


def _collect(
    model: nn.Module,
    found: dict[str, Adapted],
    layers: dict[str, Adapted],
    bias: str,
    modules_to_save: Sequence[str] | str | None,
) -> Adapter:
    check_bias_mode(bias)
    modules = base_modules(model)
    own = {name: frozenset(tensors) for name, tensors in active_parts(modules).items()}
    targets = _adapter_tensors(found)
    saved = match_modules_to_save(model, modules_to_save) + _owned_whole(modules, own)
    for name, keys in own.items():
        if of_base(keys).keys() - STATISTICS and not any(f"{name}.".startswith(f"{whole}.") for whole in saved):
            needed = "lora_only" if name in targets else "all"
            bias = max(bias, needed, key=("none", "lora_only", "all").index)
    resized, why = resized_embeddings(model)
    paths = [path for path, module in modules.items() if module in resized and path not in saved]
    if paths:
        warnings.warn(f"{why}: {', '.join(paths)} go with the adapter, whole", stacklevel=4)
    saved = list(dict.fromkeys(saved + paths))
    own = own_names(modules, targets, bias, saved)
    if any_sharded(model):  # fully_shard shards again then, what a forward has left whole
        with quiet_state():
            model.state_dict()
    there = _held(modules, own, targets)
    tensors = {_join(name, key): there[name][key].detach() for name, keys in own.items() for key in sorted(keys)}
    specs = {name: _spec(layer) for name, layer in layers.items()}
    return Adapter(tensors, specs, bias, saved, token_indices=_token_indices(found))


def _held(
    modules: dict[str, nn.Module], own: dict[str, frozenset[str]], targets: dict[str, dict[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """The tensors that an adapter has of its `own`, or that stand in their place, by module; `targets` has A and B."""
    parts = active_parts({name: modules[name] for name in own})
    return {name: {**own_tensors(modules[name]), **targets.get(name, {}), **parts.get(name, {})} for name in own}


def _owned_whole(modules: dict[str, nn.Module], own: dict[str, frozenset[str]]) -> list[str]:
    """The outermost modules all of whose tensors are the adapter's own."""
    if not any(map(of_base, own.values())):
        return []
    within: set[str] = set()
    shared: set[str] = set()
    for path, module in modules.items():
        for key in own_tensors(module).keys() - STATISTICS:
            parents = itertools.accumulate(path.split("."), lambda above, part: f"{above}.{part}")
            (within if key in own.get(path, ()) else shared).update(parents)
    whole = within - shared
    return [path for path in modules if path in whole and path.rpartition(".")[0] not in whole]


def _read_for(
    path: Path,
    modules: dict[str, nn.Module],
    present: dict[str, Adapted],
    lora_alpha: float | None,
    enable_lora: Sequence[bool],
    heads: bool,
) -> Adapter:
    adapter = _read(path, modules, {name: _groups(layer) for name, layer in present.items()}, lora_alpha, enable_lora)
    if not heads:
        _leave_out_heads(adapter)
    return adapter


def _read(
    path: Path,
    modules: dict[str, nn.Module],
    groups: dict[str, dict],
    lora_alpha: float | None,
    enable_lora: Sequence[bool],
) -> Adapter:
    if not path.is_dir() and not path.is_file():
        raise FileNotFoundError(f"{path}: no such adapter file")
    if _is_without_configuration(path):
        return read_upstream(path, modules, lora_alpha, enable_lora, groups)
    if lora_alpha is not None:
        raise ValueError(f"lora_alpha={lora_alpha}: {path} carries its own; it is for upstream's .bin and .pt files")
    if path.is_dir() and (path / FILE).is_file() and not (path / CONFIG).is_file():
        path = path / FILE
    if path.is_dir():
        if not (path / CONFIG).is_file():
            files = ", ".join(sorted(file.name for file in path.glob("*.safetensors")))
            hint = f"; give the file, one of {files}" if files else ""
            raise FileNotFoundError(f"{path}: a folder without {CONFIG} holds no adapter of PEFT{hint}")
        return read_peft(path, modules, groups)
    if is_of_diffusers(path):
        return read_diffusers(path, modules, groups)
    return _named_as_here(read_native(path), modules)


def _is_without_configuration(path: Path) -> bool:
    """Whether the file, or folder, is upstream's or a checkpoint of a whole model, which say nothing but tensors."""
    if path.is_dir():
        return not (path / CONFIG).is_file() and not (path / FILE).is_file() and bool(whole_checkpoint(path))
    return path.is_file() and (path.suffix in UPSTREAM_SUFFIXES or is_whole_checkpoint(path))


def _named_as_here(adapter: Adapter, modules: dict[str, nn.Module]) -> Adapter:
    """Give the adapter the names of the model, which may be wrapped otherwise than the one that was saved."""
    bare = {f".{name.rpartition('.')[2]}" for name in adapter.tensors if not of_base([name.rpartition(".")[2]])}
    endings = [*LORA_ENDINGS, *sorted(bare - set(LORA_ENDINGS))]
    adapter.tensors, there = under_names_of(adapter.tensors, endings, modules, adapter.modules_to_save)
    here = {theirs: ours for ours, theirs in there.items()}

    def renamed(name: str) -> str:
        path, dot, key = name.rpartition(".")
        return here.get(name) or here.get(path, path) + dot + key

    adapter.layers = {renamed(name): spec for name, spec in adapter.layers.items()}
    adapter.token_indices = {here.get(name, name): rows for name, rows in adapter.token_indices.items()}
    adapter.modules_to_save = [here.get(name, name) for name in adapter.modules_to_save]
    return adapter


def _leave_out_heads(adapter: Adapter) -> None:
    inside = tuple(f"{name}." for name in adapter.modules_to_save)
    adapter.tensors = {name: tensor for name, tensor in adapter.tensors.items() if not name.startswith(inside)}
    adapter.modules_to_save = []


def _differences(present: dict[str, Adapted], specs: dict[str, dict]) -> list[str]:
    problems = [f"{name}: the file adapts it, the model does not" for name in specs if name not in present]
    problems += [f"{name}: the model adapts it, the file does not" for name in present if name not in specs]
    for name in sorted(specs.keys() & present.keys()):
        ours = _spec(present[name])
        for key in ("r", "enable_lora", "group_sizes", "interleave"):
            theirs = specs[name].get(key)
            if theirs != ours.get(key):
                problems.append(f"{name}: {key} is {theirs} in the file, {ours.get(key)} in the model")
    return problems


def _plan(modules: dict[str, nn.Module], adapter: Adapter, merge_weights: bool) -> tuple[dict[str, Plan], list[str]]:
    plans: dict[str, Plan] = {}
    problems = []
    order = {name: position for position, name in enumerate(modules)}
    wanted: list[tuple[str, Callable]] = [
        (name, functools.partial(plan_layers, modules, {name: adapter.layers[name]}, merge_weights))
        for name in sorted(adapter.layers, key=lambda name: order.get(name, len(order)))
    ]
    for name, indices in adapter.token_indices.items():
        wanted.append((name, functools.partial(plan_tokens, modules, {name: indices}, merge_weights)))
    for name, plan in wanted:
        try:
            plans.update(plan())
        except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            problems.append(f"{name}: {error}")
    return plans, problems


def _fit(
    modules: dict[str, nn.Module], shapes: dict[str, dict], adapter: Adapter, whole_adapter: bool
) -> tuple[dict[str, frozenset[str]], list[str]]:
    """What would be the adapter's own in the model, and everything that speaks against it.

    `shapes` are those of the adapter's tensors, by module; `whole_adapter` says whether the file must hold all of the
    active adapter.
    """
    if adapter.bias not in BIAS_MODES:
        return {}, [f"bias={adapter.bias!r}: must be one of {', '.join(map(repr, BIAS_MODES))}"]
    problems = [
        f"{name}: the file saves it whole, the model has none"
        for name in adapter.modules_to_save
        if name not in modules
    ]
    saved = [name for name in adapter.modules_to_save if name in modules]
    own = own_names(modules, shapes, adapter.bias, saved)
    wanted: dict[str, tuple] = {}  # shape, dtype, and whether it is trained
    for path, keys in own.items():
        there = {
            key: (tuple(tensor.shape), tensor.dtype, isinstance(tensor, nn.Parameter))
            for key, tensor in own_tensors(modules[path]).items()
        }
        for key, shape in shapes.get(path, {}).items():
            there[key] = tuple(shape), torch.float32, True
        wanted.update({_join(path, key): there[key] for key in keys})
    # What the model's adapter has beyond the file would silently stay as it is.
    for path, tensors in (active_parts(modules) if whole_adapter else {}).items():
        problems += [
            f"{path}.{key}: the model's adapter has it, the file does not"
            for key in sorted(of_base(tensors).keys() - own.get(path, frozenset()))
        ]
    tensors = adapter.tensors
    # Other libraries' files are without the statistics of norms: the base's stay then.
    inside = tuple(f"{name}." for name in saved)
    missing = {name for name in wanted.keys() - tensors.keys() if name.startswith(inside) or not _is_statistic(name)}
    problems += [f"{name}: missing in the file" for name in sorted(missing)]
    problems += [f"{name}: unexpected in the file" for name in sorted(tensors.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & tensors.keys()):
        theirs, (shape, dtype, trained) = tensors[name], wanted[name]
        if tuple(theirs.shape) != shape:
            hint = " (call model.resize_token_embeddings first)" if _is_table(modules, name) else ""
            problems.append(f"{name}: {tuple(theirs.shape)} in the file, {shape} in the model{hint}")
        if theirs.is_floating_point() != dtype.is_floating_point:
            problems.append(f"{name}: {theirs.dtype} in the file, {dtype} in the model")
        elif trained and not _is_finite(theirs):
            problems.append(f"{name}: NaN or infinity in the file; load an earlier adapter")
    if any(tensor.is_meta for path in shapes for tensor in own_tensors(modules[path]).values()):
        problems.append("the model is on the meta device, which holds no values; load the base first")
    return own, problems


def _is_table(modules: dict[str, nn.Module], name: str) -> bool:
    return isinstance(modules.get(name.rpartition(".")[0]), nn.Embedding) and name.endswith(".weight")


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in STATISTICS


def _untied(modules: dict[str, nn.Module], own: dict[str, frozenset[str]], adapter: Adapter) -> list[str]:
    """The tensors that the model ties to others and to which the file gives values of their own."""
    parts = active_parts(modules)
    tensors = {
        _join(path, key): tensor
        for path, keys in own.items()
        for key, tensor in {**own_tensors(modules[path]), **parts.get(path, {})}.items()
        if key in keys and _join(path, key) in adapter.tensors
    }
    return sorted(untied(tensors, adapter.tensors))


def _is_finite(tensor: Tensor) -> bool:
    # NaN and infinity show in the sum, which is quicker to have, and which numbers that are too large spoil as well.
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))  # torch asks nothing of the narrowest dtypes
    return math.isfinite(wide.sum().item()) or bool(wide.isfinite().all())


def _add_own(
    model: nn.Module, modules: dict[str, nn.Module], own: dict[str, frozenset[str]], adapter_name: str
) -> None:
    # Layers made by hand train heads and biases in place; with places the base is shared and must not be written to.
    parts = active_parts(modules)
    missing = {path: keys | parts.get(path, {}).keys() for path, keys in own.items()}
    missing = {path: keys for path, keys in missing.items() if keys != parts.get(path, {}).keys()}
    if not any("_place" in vars(module) for module in modules.values()) or not missing:
        return
    put(model, None)
    note_parts(model, adapter_name, missing, modules)
    copies: dict = {}
    for path, keys in missing.items():
        add_part(modules[path], adapter_name, frozenset(keys), None, {}, copies)
    put(model, adapter_name)


def _adapted(model: nn.Module) -> dict[str, Adapted]:
    return {name: module for name, module in named_modules(model).items() if isinstance(module, Adapted)}


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return what has a rank in the active adapter of `model`, by name."""
    return _lora_layers(_adapted(model))


def _lora_layers(found: dict[str, Adapted]) -> dict[str, Any]:
    """What has a rank in the active adapter, by name: the LoRA layers, and updates of Parameters."""
    return {
        (name + ending).removeprefix("."): update
        for name, module in found.items()
        for ending, update in module.updates().items()
    }


def _adapter_tensors(found: dict[str, Adapted]) -> dict[str, dict[str, Tensor]]:
    return {name: tensors for name, module in found.items() if (tensors := module.adapter_tensors())}


def _warn_of_untrained(found: dict[str, Adapted]) -> None:
    # The factor that is drawn as zero: B, or A of an embedding.
    still, moved = [], False
    for path, layer in found.items():
        tensors = layer.adapter_tensors()
        for key in tensors:
            if key.startswith("lora_A" if isinstance(layer, Table) else "lora_B"):
                zero = not whole(tensors[key]).any()
                moved = moved or not zero
                still += [path + key.removeprefix("lora_B").removeprefix("lora_A").replace("_", ".", 1)] if zero else []
    if moved and still:
        more = f", ... ({len(still)} in all)" if len(still) > 8 else ""
        warnings.warn(
            f"{', '.join(still[:8])}{more}: still zero, as injection made it, though others were trained: no gradient "
            "has reached it. The model does not call that layer, or reads its weight in another way",
            stacklevel=4,
        )


def _token_indices(found: dict[str, Adapted]) -> dict[str, list[int]]:
    return {
        name: each.indices
        for name, module in found.items()
        if isinstance(module, Parameters)
        for each in vars(module).get("lora_parameters", {}).values()
        if isinstance(each, Rows)
    }


def _base_model(model: nn.Module, format: str) -> str | None:
    name = base_name(model)
    if format == "peft":  # where transformers looks for the base
        return name
    # The folders around a local model are this machine's and nobody else's business.
    return os.path.basename(os.path.abspath(name)) if name and os.path.isdir(name) else name


def _renamed(adapter: Adapter, named: Callable[[str], str]) -> Adapter:
    adapter.tensors = {named(name): tensor for name, tensor in adapter.tensors.items()}
    adapter.layers = {named(name): spec for name, spec in adapter.layers.items()}
    adapter.modules_to_save = [named(name) for name in adapter.modules_to_save]
    adapter.token_indices = {named(name): rows for name, rows in adapter.token_indices.items()}
    return adapter


def _spec(layer: Any) -> dict:
    scaling = as_number(layer.scaling)
    if isinstance(scaling, Tensor):
        raise ValueError(f"{layer}: its scaling trains or has several values, and files have a number for it")
    spec = {"r": layer.r, "lora_alpha": layer.lora_alpha, "scaling": scaling}
    return {**spec, "lora_dropout": getattr(layer.lora_dropout, "p", 0.0), **_groups(layer)}


def _groups(layer: Any) -> dict:
    if not hasattr(layer, "enable_lora"):
        return {}
    return group_spec(layer.enable_lora, layer.group_sizes, layer.interleave)
