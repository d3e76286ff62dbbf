"""What frameworks put around a model or a part of it, and so into the names of its layers.

A file is written under the names of one model and loaded into another that may be wrapped otherwise: by
`DistributedDataParallel` ("module."), `torch.compile` ("_orig_mod."), a LightningModule ("model.", or what its author
calls it), the class with a head ("model."), sentence-transformers ("0.model.", before its version 6 "0.auto_model.").
Or the model's own names have changed since: transformers keeps tables of the old ones, which it applies to checkpoints
that it loads, and PEFT to adapters, new names or not.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

_AROUND_PARTS = ("_orig_mod", "_fsdp_wrapped_module")
_WRAPPERS = re.compile(rf"^0\.(auto_)?model\.|(?<![^.])(module|model|{'|'.join(_AROUND_PARTS)})\.")
# What the classes of frameworks put before the names of the model that they train.
_CLASSES = {
    "LightningModule": re.compile(r"[^.]+\."),
    **dict.fromkeys(["SentenceTransformer", "CrossEncoder", "SparseEncoder"], re.compile(r"0\.(auto_)?model\.")),
    **dict.fromkeys(["DataParallel", "DistributedDataParallel"], re.compile(r"module\.")),
    "OptimizedModule": re.compile(r"_orig_mod\."),
}


def without_compiled(name: str) -> str:
    """Return a name as it is without `torch.compile` around parts of the model.

    >>> without_compiled("layers.0._orig_mod.q_proj")
    'layers.0.q_proj'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod") if "_orig_mod" in name else name


def prefix_of_wrappers(model: nn.Module, names: Iterable[str]) -> str:
    """Return what wrappers that are known by their class put before all of the `names`, which are of parts of `model`.

    >>> prefix_of_wrappers(nn.DataParallel(nn.Linear(4, 4)), ["module.weight"])
    'module.'
    """
    prefix, module, names = "", model, list(names)
    while pattern := _pattern(module):
        first = pattern.match(names[0], len(prefix)) if names else None
        if first is None or not all(name.startswith(names[0][: first.end()]) for name in names):
            break
        prefix = names[0][: first.end()]
        module = model.get_submodule(prefix[:-1])
    return prefix


def _pattern(module: nn.Module) -> re.Pattern | None:
    return next((_CLASSES[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _CLASSES), None)


def matched_names(layers: Iterable[str], others: Iterable[str], modules: dict[str, Any]) -> dict[str, str]:
    """Return what a model calls the modules of a file, where nothing but wrappers tells the names apart.

    Nothing is renamed if the model has all the layers under the names of the file, or if one of them would have no
    counterpart, or several.

    >>> model = dict.fromkeys(["q", "v", "norm"]) | {name: name for name in ["first.model.q", "second.q"]}
    >>> matched_names(["model.v"], ["model.norm", "model.else"], model)
    {'model.v': 'v', 'model.norm': 'norm'}
    >>> matched_names(["v"], [], model)
    {}

    Args:
        layers: names of the adapted layers in the file.
        others: names of the other modules that have tensors in the file.
        modules: the modules of the model, by all their names.
    """
    layers, others = list(layers), list(others)
    inner = {name: m for name, m in modules.items() if not any(f"{name}.{part}" in modules for part in _AROUND_PARTS)}
    if inner.keys() >= set(layers):
        return {}
    counterparts: dict[str, dict[int, str]] = {}  # by the module, which may have several names
    for name, module in inner.items():
        known = len(prefix_of_wrappers(modules[""], [name + "."])) if "" in modules else 0
        counterparts.setdefault(_core((name + ".")[known:]), {}).setdefault(id(module), name)
    table = _old_names(modules.get(""))
    for renamings, wrappers in [([], 0), (table, 0), (table, 1)][: 3 if table else 1]:
        new = {name: name if name in inner else _of_old(name, renamings, wrappers) for name in (*layers, *others)}
        found = {name: list(counterparts.get(_core(new[name] + "."), {}).values()) for name in new}
        if all(len(found[name]) == 1 for name in layers) and len({found[name][0] for name in layers}) == len(layers):
            return {name: candidates[0] for name, candidates in found.items() if len(candidates) == 1}
    return {}


def under_names_of(
    tensors: dict[str, Any], endings: Sequence[str], modules: dict[str, Any], others: Iterable[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tensors of a file under the names that a model has for their modules (`matched_names`), and what the
    file calls the modules that it calls otherwise.

    >>> under_names_of({"module.q.lora_A": 1, "module.q.bias": 2}, [".lora_A", ".lora_B"], {"": None, "q": None})
    ({'q.lora_A': 1, 'q.bias': 2}, {'q': 'module.q'})

    Args:
        tensors: by name.
        endings: what follows the name of an adapted layer in the names of A and B.
        modules: the modules of the model, by all their names.
        others: names of more modules that the file speaks of.
    """
    layers, owners = set(), {}
    for key in tensors:
        ending = next((ending for ending in endings if key.endswith(ending)), None)
        owners[key] = key.rpartition(".")[0] if ending is None else key.removesuffix(ending)
        layers |= set() if ending is None else {owners[key]}
    ours = matched_names(sorted(layers), {*owners.values(), *others} - layers, modules)
    renamed = {ours.get(owner, owner) + key[len(owner) :]: tensors[key] for key, owner in owners.items()}
    return renamed, {here: there for there, here in ours.items()}


def names_for_peft(model: Any, keys: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return by what names PEFT finds the tensors of a model that it would look for elsewhere, and what it cannot find.

    Its way of reading applies transformers' table of old names to new names, too: of `mlp.shared_experts` in Laguna it
    makes `mlp.shared_experts.`, and drops the adapter in silence; `mlp.shared_expert` it reads rightly.

    >>> names_for_peft(None, ["q.lora_A.weight"])
    ({}, [])

    Args:
        model: a Hugging Face model, or any other, to whose names nothing happens.
        keys: the names of tensors, as in PEFT's file without "base_model.model.".
    """
    known = getattr(sys.modules.get("transformers.conversion_mapping"), "get_checkpoint_conversion_mapping", None)
    if known is None or known(getattr(getattr(model, "config", None), "model_type", None)) is None:
        return {}, []
    table = _old_names(model)
    back = [renaming.reverse_transform() for renaming in reversed(table)]
    named, lost = {}, []
    for key in keys:
        if _read_by_peft(key, table) == key:
            continue
        candidates = [key]
        for renaming in back:
            candidates += [old for new in candidates if (old := renaming.rename_source_key(new)[0]) not in candidates]
        found = next((old for old in candidates if _read_by_peft(old, table) == key), None)
        if found is None:
            lost.append(key)
        else:
            named[key] = found
    return named, lost


def _read_by_peft(key: str, table: list[Any]) -> str:
    new = _renamed(key, table)
    # The end of its own name in the file it keeps: that is taken for a lack of a prefix.
    return key if f"base_model.model.{key}".endswith(new) else new


def _of_old(name: str, table: list[Any], wrappers: int) -> str:
    bare = _WRAPPERS.sub("", name, count=1) if wrappers else name
    return _renamed(f"{bare}.", table).removesuffix(".")


def _renamed(key: str, table: list[Any]) -> str:
    for renaming in table:
        key, _ = renaming.rename_source_key(key)
    return key


def _old_names(model: Any) -> list[Any]:
    # Transformers' renamings for a model; its conversions of values are of weights, not of what is adapted.
    tables = getattr(sys.modules.get("transformers.conversion_mapping"), "get_model_conversion_mapping", None)
    if tables is None or not hasattr(model, "base_model_prefix"):
        return []
    return [renaming for renaming in tables(model) if not hasattr(renaming, "operations")]


def _core(name: str) -> str:
    return _WRAPPERS.sub("", name)
