"""How a pretrained model is saved while adapters are in it: by its `save_pretrained`, and so by a Trainer.

The class of an adapted model (`loralib.core.adapted`) has the members that are made here, so a trainer has to be told
nothing. A folder then holds

- `adapter_config.json` and `adapter_model.safetensors`, PEFT's folder, for `from_pretrained`, engines and `load_lora`;
- `model.safetensors`, the same under the names of `state_dict()`, which a Trainer reads to resume, and for the best
  model. It holds the base too if that is found nowhere else.
"""

import functools
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from loralib.adapters import active_adapter, active_parts, any_sharded, base_modules, list_adapters, own_tensors
from loralib.architectures import base_name, saves_itself
from loralib.checkpoint import gather, in_first_process, lora_layers
from loralib.core import IN_PLACE, quiet_state
from loralib.formats import SCALINGS, Adapter, scalings_of, to_bytes, write_atomically
from loralib.peft_format import write_peft
from loralib.utils import trained_names
from loralib.wrappers import without_compiled

WHOLE, MODEL_CONFIG = "model.safetensors", "config.json"
# Where transformers notes that adapters of PEFT are in a model: a Trainer takes a quantised base then, and gradient
# checkpointing reaches the first layers.
_FLAG = "_hf_peft_config_loaded"
# What transformers has for those, and what does the same to ours.
_INSTEAD = {
    "active_adapters": "lora.active_adapter(model)",
    "add_adapter": "lora.inject_lora(model, adapter_name=...)",
    "dequantize": "lora.merge_and_unload(model, dequantize=True)",
    "delete_adapter": "lora.delete_adapter(model, ...)",
    "disable_adapters": "with lora.disable_adapters(model): ...",
    "enable_adapters": "with lora.disable_adapters(model): ...",
    "get_adapter_state_dict": "lora.lora_state_dict(model)",
    "load_adapter": "lora.load_lora(model, path, adapter_name=...)",
    "set_adapter": "lora.set_adapter(model, ...)",
}
_ON_THE_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def _members(cls: Any) -> dict:
    library = saves_itself(cls)
    if library != "transformers":
        return {} if library is None else {"save_pretrained": _refusing(cls, library)}
    members: dict = {"save_pretrained": _saving(cls), "load_state_dict": _loading(cls)}
    # Granite Speech switches adapters of PEFT in its generate, where it finds the note.
    switches = "enable_adapters" in getattr(getattr(getattr(cls, "generate", None), "__code__", None), "co_names", ())
    if hasattr(cls, _FLAG) and not switches:
        members[_FLAG] = True
        members.update({name: _of_peft(name) for name in _INSTEAD if hasattr(cls, name)})
    return members


IN_PLACE.append(_members)


def _saving(cls: Any) -> Callable:
    @functools.wraps(cls.save_pretrained)
    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("distributed_checkpoint"):
            raise ValueError("distributed_checkpoint=True: an adapter is saved whole; leave it out")
        if not is_main_process and not any_sharded(self):
            return
        folder = Path(save_directory)
        others = [name for name in list_adapters(self) if name != active_adapter(self)]
        if others:
            warnings.warn(
                f"the active adapter, {active_adapter(self)!r}, is saved, and not {', '.join(others)}; save each after "
                "lora.set_adapter",
                stacklevel=2,
            )
        also, bias = _trained_beside(self)
        if also:
            warnings.warn(f"{', '.join(also[:8])}: trained, and goes with the adapter, whole", stacklevel=2)
        _, adapter, layers, modules = gather(self, bias, also or None, state_dict)
        adapter.base_model = base_name(self)
        there = Path(adapter.base_model or "")
        is_base = adapter.base_model is not None and there.is_dir() and folder.is_dir() and there.samefile(folder)
        alone = _is_known(adapter.base_model) and not (folder / MODEL_CONFIG).exists()

        def write() -> None:
            write_peft(folder, adapter, self, modules, layers, False)
            if alone:  # not beside a configuration, with which it would be taken for a whole model
                write_atomically(folder / WHOLE, to_bytes(_for_trainer(adapter, state_dict), {"format": "pt"}))

        if not alone and not is_base:
            _save_whole(cls, self, folder, is_main_process, state_dict, adapter, kwargs)
        if state_dict is None and any_sharded(self):
            in_first_process(write)
        else:
            write()
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    return save_pretrained


def _save_whole(
    cls: Any, model: Any, folder: Path, is_main_process: bool, state: dict | None, adapter: Adapter, kwargs: dict
) -> None:
    with quiet_state():
        state = {**(model.state_dict() if state is None else state), SCALINGS: scalings_of(adapter)}
    before = vars(model).get(_FLAG)
    setattr(model, _FLAG, False)
    try:
        cls.save_pretrained(model, folder, is_main_process=is_main_process, state_dict=state, **kwargs)
    finally:
        delattr(model, _FLAG)
        if before is not None:
            setattr(model, _FLAG, before)


def _loading(cls: Any) -> Callable:
    @functools.wraps(cls.load_state_dict)
    def load_state_dict(self: Any, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if SCALINGS not in state_dict:
            return cls.load_state_dict(self, state_dict, strict, assign)
        ours = {without_compiled(name): name for name in trained_names(self, "none", None)}
        state = {ours.get(name, name): tensor for name, tensor in state_dict.items() if name != SCALINGS}
        layers, theirs = lora_layers(self), state_dict[SCALINGS].tolist()
        here = [layers[name].scaling for name in sorted(layers)]
        problems = [f"{name}: not in the checkpoint" for name in sorted(set(ours.values()) - state.keys())]
        if len(here) != len(theirs):
            problems.append(f"{len(theirs)} layers in the checkpoint, {len(here)} in the model")
        elif not problems:
            problems = [
                f"{name}: scaled by {there:g} in the checkpoint, by {layers[name].scaling:g} in the model"
                for name, there in zip(sorted(layers), theirs, strict=True)
                if there != layers[name].scaling
            ]
        if problems:
            what = (
                f"the checkpoint is of another adapter than {type(self).__name__} has; nothing was loaded. Give it the"
            )
            raise ValueError("\n  ".join([f"{what} ranks, alphas, layers and heads of that training:", *problems[:8]]))
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad} - set(ours.values())
        alone = bool(frozen) and not frozen & state.keys()
        with quiet_state():
            unexpected = sorted(state.keys() - self.state_dict().keys()) if strict and alone else []
        if unexpected:
            raise RuntimeError(
                f"{', '.join(unexpected[:8])}: in the checkpoint, and not in {type(self).__name__}; nothing was "
                "loaded. Load it into the model that it was saved from, or with strict=False"
            )
        result = cls.load_state_dict(self, state, strict and not alone, assign)
        if alone:  # the base is not meant to be there
            result.missing_keys.clear()
        return result

    return load_state_dict


def _trained_beside(model: Any) -> tuple[list[str], str]:
    """The modules that have Parameters which somebody has unfrozen, beside those of the adapter; and the `bias` that
    takes those of adapted layers."""
    modules = base_modules(model)
    parts, layers = active_parts(modules), lora_layers(model)
    also, bias = [], "none"
    for name, module in modules.items():
        tensors = {key: t for key, t in own_tensors(module).items() if key not in parts.get(name, {})}
        trained = [key for key, tensor in tensors.items() if tensor.requires_grad]
        if not trained:
            continue
        inside = [layer for layer in layers if layer.startswith(f"{name}." if name else "")]
        if trained == ["bias"] and name in layers:
            bias = "lora_only"
        elif inside:
            where = name or f"the {type(model).__name__} itself"
            raise ValueError(
                f"{', '.join(trained)} of {where}: trained, but cannot be saved with the adapter, as the module also "
                f"holds adapted layers ({inside[0]}); freeze it, or save with torch.save(model.state_dict(), path). "
                "Nothing was written"
            )
        else:
            also.append(name)
    return also, bias


def _for_trainer(adapter: Adapter, state: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors under the names of `state_dict()`, with those that `torch.compile` around the model gives."""
    names = {without_compiled(name): name for name in state or ()}
    tensors = {names.get(name, name): tensor for name, tensor in adapter.tensors.items()}
    return {**tensors, SCALINGS: scalings_of(adapter)}


def _is_known(base: str | None) -> bool:
    """Whether a base is found under its name."""
    return base is not None and (os.path.isdir(base) or _ON_THE_HUB.fullmatch(base) is not None)


def _refusing(cls: Any, library: str) -> Callable:
    other = ", lora.save_lora(model, path, format='diffusers')" if library == "diffusers" else ""

    @functools.wraps(cls.save_pretrained)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"save_pretrained of {library} would write the adapter under names that its from_pretrained passes over; "
            f"nothing was written. Save it with lora.save_lora(model, path){other}, or the sum of base and adapter "
            "after lora.merge_and_unload(model)"
        )

    return save_pretrained


def _of_peft(name: str) -> Callable:
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"{type(self).__name__}.{name} does not know the adapters of this model, which are loralib's: use "
            f"{_INSTEAD[name]}"
        )

    return method
