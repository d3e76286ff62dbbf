"""Several adapters on one base: what each has of its own in a module, and which of them is there.

An adapter is tensors, not modules. A module in which adapters have something of their own (A and B, a bias, the
tensors of a head) keeps a `Place`: for each adapter its tensors and settings, and for the base the tensors that the
active adapter's stand in for. Switching exchanges entries of `_parameters` and `_buffers`, and the class of the module
(`loralib.layers.adapted`); the module stays the object it is. So an adapter costs its own tensors only, and
`state_dict()` holds the active adapter alone, under the plain names.
"""

import contextlib
import copy
import functools
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from loralib.core import Adapted, InPlace, adapted, identity, is_sharded, note_state
from loralib.layers import Kernel
from loralib.quantized import is_quantized
from loralib.reloaded import check_not_reloaded

__all__ = ["active_adapter", "delete_adapter", "list_adapters"]

DEFAULT_NAME = "default"
BASE_NAME = "__base__"  # PEFT's, for the base among names of adapters
LORA_NAMES = frozenset({"lora_A", "lora_B"})
_OWN_PREFIXES = (*LORA_NAMES, "lora_rows_")
# What a model that was given adapters knows: by adapter and module the shapes of the base's tensors; and whether its
# embeddings were resized since.
PARTS, RESIZED = "_lora_parts", "_lora_resized"
# The name of a Hugging Face model whose base is another one by now, as an adapter was merged into it.
MERGED = "_lora_merged"
_Key = TypeVar("_Key")


class Form:
    """What a module is while an adapter (or none) is active: its class, and the attributes that are set then."""

    def __init__(self, cls: Any, settings: dict[str, Any] | None = None):
        self.cls, self.settings = cls, settings or {}

    def __reduce__(self) -> tuple:  # a class made by `adapted` has no name to be found under
        return _form, (vars(self.cls).get("_recipe") or (_named, (self.cls,)), self.settings)


def _form(recipe: tuple, settings: dict) -> Form:
    make, arguments = recipe
    return Form(make(*arguments), settings)


def _named(cls: type[nn.Module]) -> type[nn.Module]:
    return cls


class Part:
    """What an adapter has in one module: the names of its own tensors, and, while it is not active, those tensors."""

    def __init__(self, own: frozenset[str], tensors: dict[str, Tensor], form: Form | None):
        self.own, self.tensors, self.form = own, tensors, form


class Place:
    """The adapters of one module.

    Attributes:
        plain: the form that the module had at first, and has again when the place is gone.
        base: its form while no adapter is in it.
        now: its form at present, without the settings, which are the module's.
        parts: by adapter.
        active: the adapter whose part is in the module; None for the base.
        replaced: the tensors of the base that the active adapter's stand in for.
        suspended: whether heads and biases are exchanged for a while: `replaced` then holds the adapter's.
        statistics: the values of the base's buffers when that began, which a forward in training mode would change.
        adapters, current: the adapters of the whole model, and the one that it computes with.
        layouts, tried: how the rows of a batch lie in what the module is given, by the call of the model, and by which
            calls that was tried in vain.
        stacked: the tensors of several adapters in one, and what they were made of: of the last block, until an adapter
            is deleted or the model is moved.
    """

    stacked: tuple | None = None
    layouts: dict[tuple, Any] = {}
    tried: frozenset = frozenset()

    def __init__(self, module: nn.Module):
        self.plain = Form(type(module))
        self.parts: dict[str, Part] = {}
        self.active: str | None = None
        self.replaced: dict[str, Any] = {}
        self.suspended = False
        self.statistics: dict[str, Tensor] = {}
        self.adapters: frozenset[str] = frozenset()
        self.current: str | None = None
        if isinstance(module, Adapted):  # made by hand: without its adapter it is a layer of rank 0
            rank_zero = {"r": 0, "scaling": 0.0, "lora_dropout": identity, "merged": False, "_aside": None}
            here = {key: getattr(module, key) for key in module.settings if hasattr(module, key)}
            self.base = Form(type(module), {**here, **rank_zero})
            if module.has_adapter:
                self.parts[DEFAULT_NAME] = Part(LORA_NAMES, {}, None)
                self.active = self.current = DEFAULT_NAME
        else:
            self.base = Form(adapted(type(module), None))
            change_class(module, self.plain.cls, self.base.cls)
        self.now = Form(self.base.cls)
        vars(module)["_place"] = self

    def tensors(self, module: nn.Module, name: str) -> dict[str, Tensor]:
        """The own tensors of adapter `name`, by their names in the module."""
        part = self.parts[name]
        if name != self.active:
            return part.tensors
        there = _tensors(module)
        if isinstance(module, Adapted) and module._aside is not None and "weight" in part.own:
            there["weight"] = module.base_weight()  # the adapter's own, rather than the sum
        there.update(self.replaced if self.suspended else {})
        missing = sorted(part.own - there.keys())
        if missing:
            raise ValueError(_COMPUTED.format(", ".join(missing), module))
        return {key: tensor for key, tensor in there.items() if key in part.own}  # in the order of the module

    def settings(self, module: nn.Module, name: str) -> dict[str, Any]:
        """The attributes that adapter `name` puts on the module: ranks, scalings, groups."""
        if name != self.active:
            form = self.parts[name].form
            return {} if form is None else form.settings
        there = {**vars(module), **module._modules}
        return {key: there[key] for key in Adapted.settings if key in there}

    def form_of(self, name: str) -> Form:
        """The form of the module while adapter `name` is active, without its settings if it is."""
        return self.now if name == self.active else self.parts[name].form or self.base

    def base_tensors(self) -> dict[str, Tensor]:
        """The tensors of the base that are not in the module at present."""
        return {} if self.suspended else self.replaced

    def narrow(self, module: nn.Module) -> torch.dtype | None:
        """The half-precision dtype of the base, if the module is all an adapter's just now, in a wider one."""
        names = [key for key, value in module._parameters.items() if value is not None]
        if not self.replaced.keys() >= set(names) or all(map(is_bias, names)):  # of a bias alone see InPlace
            return None
        for key, base in self.replaced.items():
            tensor = module._parameters.get(key)
            if tensor is not None and base.is_floating_point() and base.itemsize < tensor.itemsize:
                return base.dtype
        return None

    @contextlib.contextmanager
    def with_base(self, model: nn.Module) -> Iterator[None]:
        """Within the block the whole `model` is its base: for what ties its tensors."""
        name = self.current
        away = self.suspended or any(getattr(module, "_disabled", False) for module in model.modules())
        if not away:
            put(model, None)
        try:
            yield
        finally:
            if not away:
                put(model, name)

    def prepare_resizing(self, model: Any) -> None:
        """Raise ValueError if the embeddings of `model` hold something of an adapter; note that they change."""
        ends = [input_embeddings(model), model.get_output_embeddings()]
        weights = [own_tensors(end).get("weight") for end in ends if end is not None]
        for path, module in model.named_modules():
            place = vars(module).get("_place")
            held = {key for part in place.parts.values() for key in part.own} if place else set()
            shared = any(tensor is weight for tensor in own_tensors(module).values() for weight in weights)
            if held and (shared or module in ends):
                raise ValueError(
                    f"{path} holds {', '.join(sorted(held))} of an adapter, whose size would not follow; nothing was "
                    "resized. Resize first and inject or load then: save the adapter with lora.save_lora and call "
                    "lora.unload(model) before, if it is to be kept"
                )
        vars(model)[RESIZED] = True

    def put(self, module: nn.Module, name: str | None) -> None:
        """Make `name` the adapter that is in the module; the base, if it has no part here."""
        note_state(module)
        self.resume(module)
        if vars(module).pop("_disabled", False):  # what comes within disable_adapters does compute
            vars(module)["merged"] = False  # it said what is to be after the block
        name = name if name in self.parts else None
        if name == self.active:
            return
        if self.active is not None:
            part = self.parts[self.active]
            if isinstance(module, Adapted) and (module.merged or module._aside is not None):
                module.unmerge()
            part.tensors = self.tensors(module, self.active)
            if isinstance(module, Adapted):
                part.form = Form(self.now.cls, _take_settings(module))
            for key in part.tensors.keys() - self.replaced.keys():
                del module._parameters[key]
            _set_tensors(module, self.replaced)
            self.replaced = {}
        self.active = name
        form = self.base
        if name is not None:
            part = self.parts[name]
            there = _tensors(module)
            self.replaced = {key: there[key] for key in part.tensors if key in there}
            _set_tensors(module, part.tensors)
            part.tensors, form, part.form = {}, part.form or self.base, None
        if isinstance(module, Adapted):  # made by hand, it has some as the base, too
            _take_settings(module)
        change_class(module, self.now.cls, form.cls)
        for key, value in form.settings.items():
            if isinstance(value, nn.Module):
                module._modules[key] = value.train(module.training)
            else:
                vars(module)[key] = value
        self.now = Form(form.cls)

    @property
    def shown(self) -> str | None:
        """The adapter that a state dict of the module is of: None while heads and biases are the base's."""
        return None if self.suspended else self.current

    def put_into(self, state: dict) -> None:
        """Put a copy of the place into the state of its module, with the adapter's heads and biases in theirs."""
        place = copy.copy(self)
        place.parts = {name: Part(part.own, dict(part.tensors), part.form) for name, part in self.parts.items()}
        place.replaced, place.suspended, place.stacked, place.statistics = dict(self.replaced), False, None, {}
        if self.suspended:
            for kind in ("_parameters", "_buffers"):
                for key in state[kind].keys() & self.replaced.keys():
                    state[kind][key], place.replaced[key] = self.replaced[key], state[kind][key]
        state["_place"] = place

    def suspend(self, module: nn.Module) -> None:
        """Put the base's heads and biases in for a while."""
        if self.active is not None and not self.suspended:
            note_state(module)
            self._exchange(module)
            self.suspended = True
            there = {key: module._buffers.get(key) for key in self.replaced}
            self.statistics = {key: buffer.clone() for key, buffer in there.items() if buffer is not None}

    def resume(self, module: nn.Module) -> None:
        if self.suspended:
            for key, values in self.statistics.items():
                _tensors(module)[key].copy_(values)
            self.statistics = {}
            note_state(module)
            self._exchange(module)
            self.suspended = False

    def follow(self, fn: Callable) -> None:
        """Do to the tensors that are not in the module what `nn.Module._apply` does to those that are."""
        self.stacked = None
        for store in (self.replaced, *(part.tensors for part in self.parts.values())):
            holder = nn.Module()
            for key, tensor in store.items():
                (holder._parameters if isinstance(tensor, nn.Parameter) else holder._buffers)[key] = tensor
            holder._apply(fn)
            store.update(_tensors(holder))

    def leave(self, module: nn.Module) -> None:
        """Make the module what it was before it had a place."""
        self.put(module, None)
        del vars(module)["_place"]
        change_class(module, self.base.cls, self.plain.cls)

    def _exchange(self, module: nn.Module) -> None:
        there = _tensors(module)
        _set_tensors(module, self.replaced)
        self.replaced = {key: there[key] for key in self.replaced}


def _tensors(module: nn.Module) -> dict[str, Any]:
    return {**module._buffers, **module._parameters}


def _set_tensors(module: nn.Module, tensors: dict[str, Any]) -> None:
    # By setattr where a class watches it, as recurrent layers do.
    watched = type(module).__setattr__ not in _UNWATCHED or isinstance(module, nn.RNNBase)
    for key, tensor in tensors.items():
        if watched:
            setattr(module, key, tensor)
        elif isinstance(tensor, nn.Parameter):
            module._parameters[key] = tensor
        else:
            module._buffers[key] = tensor


_UNWATCHED = (nn.Module.__setattr__, Adapted.__setattr__, Kernel.__setattr__)


_SETTINGS = frozenset(Adapted.settings)


def _take_settings(module: nn.Module) -> dict[str, Any]:
    taken = {}
    for store in (vars(module), module._modules):
        for key in _SETTINGS & store.keys():
            taken[key] = store.pop(key)
    return taken


def change_class(module: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    """Give `module`, of class `old` or of a class that somebody derived from it since, the class `new`."""
    if old is new:
        return
    before = type(module)
    module.__class__ = _derived(before, old, new)
    # What wraps the forward of one module holds that of its class, as accelerate's hooks do.
    for key in ("forward", "_old_forward"):
        method = vars(module).get(key)
        if isinstance(method, types.MethodType) and method.__self__ is module and method.__func__ is before.forward:
            vars(module)[key] = types.MethodType(type(module).forward, module)


def _derived(cls: type, old: type, new: type) -> type:
    if cls is old or old not in cls.__mro__:
        return new if cls is old else cls
    bases = tuple(_derived(base, old, new) for base in cls.__bases__)
    members = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return types.new_class(cls.__name__, bases, exec_body=lambda body: body.update(members))


def list_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters of `model`, sorted; LoRA layers made by hand are called "default".

    >>> import loralib as lora
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    >>> lora.inject_lora(model, r=2, target_modules=["0"], adapter_name="sst2")
    ['0']
    >>> lora.inject_lora(model, r=4, target_modules=["0", "1"], adapter_name="mrpc")
    ['0', '1']
    >>> lora.list_adapters(model), lora.active_adapter(model)
    (['mrpc', 'sst2'], 'mrpc')
    >>> lora.set_adapter(model, "sst2")
    >>> model[0].r, model[1]
    (2, Linear(in_features=8, out_features=4, bias=True))
    >>> lora.delete_adapter(model, "mrpc")
    >>> lora.list_adapters(model)
    ['sst2']
    """
    check_intact(model)
    return adapter_names(model)


def adapter_names(model: nn.Module) -> list[str]:
    """Return what `list_adapters` does, without asking whether they are intact."""
    names = {name for _, place in places(model) for name in place.parts}
    return sorted(names | ({DEFAULT_NAME} if _made_by_hand(all_modules(model)) else set()))


def active_adapter(model: nn.Module) -> Any:
    """Return the name of the active adapter, or the list of names whose sum is active; None if `model` has no adapter,
    or inside `adapters_per_row`. Example: see `list_adapters`.
    """
    found = places(model)
    several = next((vars(module)["_several"] for module, _ in found if "_several" in vars(module)), None)
    if several is not None:
        return several.block.shown
    if found:
        return found[0][1].current
    return DEFAULT_NAME if _made_by_hand(all_modules(model)) else None


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Delete an adapter that is not active, with its tensors. Example: see `list_adapters`.

    Raises:
        ValueError: `model` has no such adapter, or it is the active one. Nothing has been changed then.
    """
    check_one(model.modules())
    check_present(model, adapter_name)
    if adapter_name == active_adapter(model):
        others = [name for name in list_adapters(model) if name != adapter_name]
        first = f"call lora.set_adapter(model, ...) with another one first ({', '.join(others)}), or " if others else ""
        raise ValueError(f"adapter {adapter_name!r} is active; {first}lora.unload(model) drops all there are")
    for module, place in places(model):
        place.parts.pop(adapter_name, None)
        place.adapters -= {adapter_name}
        place.stacked = None
        if not place.parts:
            place.leave(module)
    for module in all_modules(model):  # the model, or what is wrapped in it
        vars(module).get(PARTS, {}).pop(adapter_name, None)


def add_part(
    module: nn.Module,
    name: str,
    own: frozenset[str],
    form: Form | None,
    adapter: dict,
    copies: dict,
    apart: frozenset[str] = frozenset(),
    widen: bool = True,
) -> None:
    """Give adapter `name`, which is not active, its part in `module`: `adapter`'s A and B, and copies of what else is
    to be its `own`. To `widen` copies in half precision means that heads and biases are float32, so that small steps
    are not rounded away.

    `copies` is one dict for all parts of an adapter: tensors that are tied in the base have one copy, but for those
    named in `apart`.
    """
    place = vars(module).get("_place") or Place(module)
    there = {**_tensors(module), **place.base_tensors()}
    before = place.parts.get(name)
    tensors = {**(before.tensors if before else {}), **adapter}
    whole = form is None and own >= {key for key, value in module._parameters.items() if value is not None}
    for key in sorted(own - tensors.keys()):
        tensor = there[key]
        is_parameter = isinstance(tensor, nn.Parameter)
        same = (id(tensor), id(module)) if key in apart else id(tensor)
        if same not in copies:
            widened = widen and tensor.is_floating_point() and tensor.itemsize == 2
            widened = widened and (whole or (is_parameter and is_bias(key) and not isinstance(module, nn.RNNBase)))
            clone = tensor.detach().to(torch.float32 if widened else tensor.dtype, copy=True)
            copies[same] = nn.Parameter(clone, clone.is_floating_point()) if is_parameter else clone
        tensors[key] = copies[same]
    place.parts[name] = Part(own, tensors, before.form if before and form is None else form)


def note_parts(model: nn.Module, name: str, own: dict[str, frozenset[str]], modules: dict[str, nn.Module]) -> None:
    """Remember what adapter `name` has, so that `check_intact` can tell what somebody has taken out since."""
    noted = vars(model).setdefault(PARTS, {}).setdefault(name, {})
    for path, keys in own.items():
        wanted = {*of_base(keys), "weight"}
        tensors = {} if is_quantized(modules[path]) else own_tensors(modules[path])
        noted[path] = {key: tensor.shape for key, tensor in tensors.items() if key in wanted}


def check_stored(modules: Mapping[str, Any]) -> None:
    """Raise ValueError if A or B of a layer is computed from something else, which files and sums do not know."""
    for path, layer in modules.items():
        if not isinstance(layer, Adapted):
            continue
        by_hand = layer._place is None and layer.has_adapter  # of the others `Place.tensors` says it
        missing = [name for name in sorted(LORA_NAMES) if by_hand and name not in layer._parameters]
        if missing:
            raise ValueError(_COMPUTED.format(", ".join(missing), path))


_COMPUTED = "{} of {} is computed, by torch.nn.utils.prune or parametrize; remove the pruning or parametrization first"


def check_intact(model: nn.Module, names: Iterable[str | None] | None = None) -> None:
    """Warn of modules whose adapter, of those called `names` or of all, is gone because somebody replaced them; raise
    ValueError if one was resized."""
    for module in all_modules(model):  # the model, or what is wrapped in it
        if PARTS in vars(module):
            _check_intact(module, vars(module)[PARTS], names)


def _check_intact(model: nn.Module, all_noted: dict[Any, dict], names: Iterable[str | None] | None) -> None:
    for name in all_noted if names is None else dict.fromkeys(names):
        noted = all_noted.get(name, {})
        lost = []
        for path, shapes in noted.items():
            module = _submodule(model, path)
            place = None if module is None else vars(module).get("_place")
            if module is None or place is None or name not in place.parts:
                lost.append(path)
                continue
            for key, shape in shapes.items():
                there = place.base_tensors().get(key)
                tensor = module._parameters.get(key, module._buffers.get(key)) if there is None else there
                if tensor is not None and tensor.shape != shape:
                    raise ValueError(
                        f"{path}.{key} was {tuple(shape)} when adapter {name!r} was put there and is "
                        f"{tuple(tensor.shape)} now; resize a model before it gets adapters"
                    )
        if lost:
            warnings.warn(
                f"{', '.join(lost[:8])}{', ...' if len(lost) > 8 else ''}: replaced by somebody since adapter {name!r} "
                "was put there, which is gone from it with what it had learned; change a model before it gets adapters",
                stacklevel=5,
            )
            for path in lost:
                del noted[path]


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    module: Any = model
    try:
        for part in path.split(".") if path else ():
            module = module._modules[part]
    except (AttributeError, KeyError):
        return None
    return module


def input_embeddings(model: Any) -> nn.Module | None:
    """Return the table of tokens of a Hugging Face model; None if it has none, or is another kind of model."""
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # models of sounds and images have the method, and raise
        return None


def make_plain(layer: Adapted) -> None:
    """Make a layer that was made by hand the layer of torch that it is without its adapter.

    One of a client's class, which may compute something else, stays what it is, with rank 0.
    """
    layer.unmerge()
    own = type(layer).__mro__[hasattr(layer, "parametrizations")]
    if not own.__module__.startswith("loralib."):
        for key in LORA_NAMES & layer._parameters.keys():
            delattr(layer, key)
        layer.r, layer.scaling, layer.lora_dropout = 0, 0.0, identity
        return
    if getattr(layer, "fan_in_fan_out", False):
        layer.weight = nn.Parameter(layer.base_weight().detach().T.contiguous(), requires_grad=False)
    for key in LORA_NAMES & layer._parameters.keys():
        delattr(layer, key)
    _take_settings(layer)
    # What torch.nn.utils.parametrize made of its class stays.
    change_class(layer, own, layer._base_class)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the Parameters and saved buffers of a module itself, by name; those of the base, without A and B."""
    buffers = {key: value for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set}
    found = {key: value for key, value in {**module._parameters, **buffers}.items() if value is not None}
    if isinstance(module, InPlace):
        if module._place is not None:
            found.update(module._place.base_tensors())
        if isinstance(module, Adapted) and "weight" in found:
            found["weight"] = found["weight"] if module._aside is None else module.base_weight()
        if module._place is not None or isinstance(module, Adapted):
            found = {key: found[key] for key in of_base(found)}
    return found


def of_base(names: Iterable[str]) -> dict[str, None]:
    """Return those of a module's tensors that its base has too, in order: not A, B, rows.

    >>> list(of_base(["weight", "lora_A", "lora_B"]))
    ['weight']
    """
    return {name: None for name in names if not name.startswith(_OWN_PREFIXES)}


def places(model: nn.Module) -> list[tuple[nn.Module, Place]]:
    """Return the modules of `model` that have a place, with it."""
    return _places(all_modules(model))


def _places(modules: list[nn.Module]) -> list[tuple[nn.Module, Place]]:
    return [(module, module.__dict__["_place"]) for module in modules if "_place" in module.__dict__]


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Return `list(model.modules())`, whose nested generators take several times as long."""
    found: dict[nn.Module, None] = {model: None}

    def visit(module: nn.Module) -> None:
        for child in module._modules.values():
            if child is not None and child not in found:
                found[child] = None
                if child._modules:
                    visit(child)

    visit(model)
    return list(found)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return `dict(model.named_modules())`: every module once, under its first name. See `all_modules`."""
    names: dict[nn.Module, str] = {model: ""}

    def visit(module: nn.Module, prefix: str) -> None:
        for key, child in module._modules.items():
            if child is not None and child not in names:
                names[child] = name = prefix + key
                if child._modules:
                    visit(child, name + ".")

    visit(model, "")
    return {name: module for module, name in names.items()}


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of `model` by name, under all their names, without those that adapters have brought."""
    modules: dict[str, nn.Module] = {"": model}

    def visit(module: nn.Module, prefix: str) -> None:
        if isinstance(module, Adapted) and module.is_leaf:  # its dropout is nobody's target
            return
        for key, child in module._modules.items():
            if child is not None:
                modules[prefix + key] = child
                if child._modules:
                    visit(child, f"{prefix}{key}.")

    visit(model, "")
    return modules


def active_parts(modules: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Return the own tensors of the active adapter in `modules`, by name, whether or not it is disabled just now."""
    found = {name: vars(module).get("_place") for name, module in modules.items()}
    return {
        name: place.tensors(modules[name], place.active)
        for name, place in found.items()
        if place is not None and place.active is not None
    }


def adopt(modules: Iterable[nn.Module]) -> None:
    """Make places for those LoRA layers that a model was built with, so that other adapters can take their place."""
    for layer in _made_by_hand(modules):
        Place(layer)


def put(model: nn.Module, adapter_name: str | None, modules: list[nn.Module] | None = None) -> None:
    """Put adapter `adapter_name`, or the base for None, into every place of `model`, whose `modules` may be given."""
    modules = all_modules(model) if modules is None else modules
    found = _places(modules)
    known = {place.adapters for _, place in found}
    if len(known) == 1 and adapter_name in {None, *next(iter(known))}:
        adapters = known.pop()
    else:
        adapters = frozenset(name for _, place in found for name in place.parts)
    changing = [
        (module, place)
        for module, place in found
        if place.active != adapter_name or place.suspended or "_disabled" in vars(module)
    ]
    if any(adapter_name in place.parts or place.active for _, place in changing):
        check_whole(model, modules)
    for module, place in changing:
        if place.active is not None:
            try:
                place.tensors(module, place.active)  # for its error, before anything changes
            except ValueError as error:
                path = next(name for name, each in model.named_modules() if each is module)
                raise ValueError(f"{path}: {error}") from error
    merged = any(m._aside is not None or (m._disabled and m.merged) for m, _ in changing if isinstance(m, Adapted))
    for _, place in found:
        place.adapters, place.current = adapters, adapter_name
    for module, place in changing:
        place.put(module, adapter_name)
        if isinstance(module, Adapted) and (merged or (module.merge_weights and not module.training)):
            module.merge()


@contextlib.contextmanager
def unchanged_by_an_error(model: nn.Module, name: str) -> Iterator[None]:
    """If the block, which makes `name` the active adapter, raises, all is where it was: the same Parameters, merged or
    disabled."""
    undone: list[Callable[[], object]] = []
    for parameter in model.parameters():
        undone.append(functools.partial(parameter.requires_grad_, parameter.requires_grad))
    for module in all_modules(model):
        undone.append(functools.partial(setattr, module, "__class__", type(module)))
        place = vars(module).get("_place")
        parts = [] if place is None else [place.parts[key] for key in {place.active, name} & place.parts.keys()]
        owners = [module] if place is None else [module, place, *parts]
        held: list[Any] = [vars(owner) for owner in owners]
        # And what is changed in place: Parameters, hooks, parts, the list that recurrent layers compute with.
        held += [each for of in held for each in of.values() if type(each) in (dict, OrderedDict, list)]
        undone += [functools.partial(_refill, values, copy.copy(values)) for values in held]
        weight = module._parameters.get("weight") if isinstance(module, Adapted) else None
        if weight is not None and module.merged and module._aside is None:
            undone.append(functools.partial(setattr, weight, "data", weight.data))  # by hand: it will be subtracted
    try:
        yield
    except BaseException:
        for undo in undone:
            undo()
        raise


def _refill(values: Any, before: Any) -> None:
    values.clear()
    (values.extend if isinstance(values, list) else values.update)(before)


def _made_by_hand(modules: Iterable[nn.Module]) -> list[Adapted]:
    return [m for m in modules if isinstance(m, Adapted) and m._place is None and m.has_adapter]


def any_sharded(model: nn.Module, modules: list[nn.Module] | None = None) -> bool:
    """Whether `fully_shard` shards `model` or a part of it; just after a forward not all Parameters tell."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and imported if it is in use
    modules = all_modules(model) if modules is None else modules
    if any(issubclass(kind, getattr(fsdp, "FSDPModule", ())) for kind in set(map(type, modules))):
        return True
    kinds = {type(tensor) for module in modules for tensor in module._parameters.values()}
    return any(map(is_sharded, kinds))


def check_whole(model: nn.Module, modules: list[nn.Module] | None = None) -> None:
    """Raise ValueError if the weights of `model` are not here: `fully_shard` keeps parts, accelerate offloads them."""
    modules = all_modules(model) if modules is None else modules
    check_one(modules)
    check_not_reloaded(modules)
    check_not_of_peft(modules)
    check_not_fsdp1(modules)
    if any("_hf_hook" in module.__dict__ for module in modules):
        check_not_offloaded({name: m for name, m in named_modules(model).items() if isinstance(m, InPlace)})
    check_not_partitioned(modules)
    if any_sharded(model, modules):
        raise ValueError(
            f"{type(model).__name__} is sharded by fully_shard, which allows neither to replace its layers nor to "
            "merge them; nothing was changed. Inject, load, switch or unload adapters before fully_shard; to merge, "
            "save the adapter with lora.save_lora and load it in one process that has the whole base"
        )


def check_not_of_peft(modules: Iterable[nn.Module]) -> None:
    """Raise ValueError if PEFT has put an adapter in, which nothing that is saved of ours would hold."""
    for kind in {type(module) for module in modules}:
        if kind.__module__.startswith("peft.tuners.") and hasattr(kind, "get_base_layer"):
            raise ValueError(
                f"the model has an adapter of PEFT in it ({kind.__module__}.{kind.__name__}); nothing was changed. "
                "Load the base alone, and the adapter with lora.load_lora(model, folder), or merge it with PEFT first"
            )


def check_not_partitioned(modules: Iterable[nn.Module]) -> None:
    """Raise ValueError if DeepSpeed's ZeRO-3 has taken the Parameters apart, which have no numbers here then."""
    if "deepspeed" in sys.modules and any(
        hasattr(t, "ds_id") for module in modules for t in module._parameters.values()
    ):
        raise ValueError(
            "the weights are partitioned by DeepSpeed (ZeRO-3), and not here; nothing was done. Use ZeRO-2, or "
            "torch.distributed.fsdp.fully_shard (FSDP2; in accelerate fsdp_version: 2)"
        )


def check_not_exchanged(model: nn.Module) -> None:
    """Raise ValueError if `model` is in DistributedDataParallel, which knows of no Parameter that comes later."""
    if type(model).__name__ == "DistributedDataParallel":
        raise ValueError(
            "DistributedDataParallel exchanges the gradients of what was trained when it was made, and of nothing that "
            "comes later; nothing was changed. Inject, load or switch in its `module`, and wrap that anew"
        )


def check_one(modules: Iterable[nn.Module]) -> None:
    """Raise ValueError if several adapters compute at once in `modules`."""
    several = next((vars(module)["_several"] for module in modules if "_several" in vars(module)), None)
    if several is not None:
        shown = several.block.shown
        raise ValueError(
            f"the model computes with the sum of {' and '.join(map(repr, shown))}; call lora.set_adapter(model, ...) "
            "with one of them first, or make one adapter of them with lora.combine_adapters"
            if shown
            else "each row has an adapter of its own just now; do that outside of lora.adapters_per_row"
        )


def untied(tensors: Mapping[_Key, Tensor], values: Mapping[_Key, Tensor]) -> list[_Key]:
    """Return the names of the `tensors` that are one object under several names, to which `values` of their own go."""
    tied: dict[int, list[_Key]] = {}
    for name, tensor in tensors.items():
        tied.setdefault(id(tensor), []).append(name)
    differing = [
        group for group in tied.values() if any(not torch.equal(values[group[0]], values[n]) for n in group[1:])
    ]
    return [name for group in differing for name in group]


def is_bias(name: str) -> bool:
    """Whether a Parameter of that name is a bias."""
    return name == "bias" or name.startswith("bias_") or name.endswith("_bias")


def check_not_fsdp1(modules: Sequence[nn.Module]) -> None:
    """Raise ValueError if `FullyShardedDataParallel` has flattened the Parameters and keeps a piece of them here."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    wrapped = any(kind.__name__ == "FullyShardedDataParallel" for kind in set(map(type, modules)))
    tensors = [tensor for module in modules for tensor in module._parameters.values()]
    if wrapped or any([hasattr(tensor, "_fsdp_flattened") for tensor in tensors]):
        raise ValueError(
            "the model is wrapped in FullyShardedDataParallel (FSDP1), which leaves each process a flat piece of "
            "its tensors; nothing was done. Use torch.distributed.fsdp.fully_shard (FSDP2; in accelerate "
            "fsdp_version: 2), whose adapters are saved whole"
        )


def check_not_offloaded(modules: dict[str, nn.Module]) -> None:
    """Raise ValueError if accelerate keeps the weights of a module elsewhere and fetches them for a call."""
    for name, module in modules.items():
        hook = vars(module).get("_hf_hook")
        if any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,))):
            raise ValueError(
                f"{name} is offloaded by accelerate, which would not find an adapter's tensors where it keeps the "
                "base's; nothing was changed. Inject, load, switch, merge, save or unload adapters first, and call "
                "accelerate.dispatch_model or cpu_offload then; accelerate.hooks.remove_hook_from_submodules undoes it"
            )


def check_adapter_name(adapter_name: str) -> None:
    """Raise if `adapter_name` is no name."""
    if not isinstance(adapter_name, str) or not adapter_name:
        raise ValueError(f"adapter_name={adapter_name!r}: must be a string that is not empty")
    if adapter_name == BASE_NAME:
        raise ValueError(f"adapter_name={adapter_name!r}: that is the base, among the names for the rows of a batch")


def check_present(model: nn.Module, adapter_name: str) -> None:
    """Raise ValueError if `model` has no adapter of that name."""
    names = adapter_names(model)
    if adapter_name not in names:
        raise ValueError(f"no adapter {adapter_name!r}; the model has {', '.join(map(repr, names)) or 'none'}")
