"""The machinery of a LoRA layer: the branch beside the base, merging, state, and the classes of adapted modules.

Two laws hold in every state (training, eval, merged or not, after loading, moving, copying):
1. `forward` is the base plus scaling * B A (dropout aside), up to the dtype's rounding.
2. `state_dict()` holds the base weight, never the merged one; unmerging gives back the very Parameter.

Merging puts another Parameter, W + scaling * B A, in the place of `weight` and keeps the base aside. Its price is a
copy of the adapted weights while it lasts. A forward that finds A, B, `scaling` or W changed since merges anew. What is
written into the merged `weight` itself counts, as in 0.1.2: unmerging then leaves what was written, less the update.
Layers that `torch.distributed.fsdp.fully_shard` shards stay unmerged, as every process would keep the whole copy. A
limit: a write through `.data` into W, which something else may share, or on a GPU into A or B, leaves no trace, and
shows after the next `eval()` or merge.
"""

import contextlib
import dis
import functools
import inspect
import math
import numbers
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import fusion

from loralib.quantized import dequantized, is_quantized, merges

# What `adapted` gives for the classes that have a name of their own: {(class, kind): class of ours}.
PUBLIC: dict[tuple[type, type], Any] = {}
# What makes further members for the class of a module that holds tensors of adapters, of its own class.
IN_PLACE: list[Callable[[Any], dict]] = []
# What gives each row of a batch an adapter of its own: `loralib.several.adapters_per_row`.
per_row: list[Callable] = []
SHARED_BASE = "_lora_shared"  # an attribute of Parameters that several models have
# Plain, because mypy does not take a class of modules for hashable.
_cached: Any = functools.cache
_Layer = TypeVar("_Layer", bound="InPlace")


# What modules computed with before their adapters were switched, merged or disabled: by module the number that autograd
# had reached then, and that state. Gradient checkpointing computes a forward anew in the backward pass, maybe with
# another adapter than the first time.
_STATES: weakref.WeakKeyDictionary[nn.Module, tuple] = weakref.WeakKeyDictionary()


def identity(x: Tensor) -> Tensor:
    return x


def note_state(module: nn.Module) -> None:
    """Remember what `module` computes with, before that changes."""
    if torch.compiler.is_compiling():
        return
    state = torch._C._autograd._get_sequence_nr(), _state_of(module)
    _STATES[module] = (*_STATES.get(module, ())[-15:], state)


def _state_of(module: nn.Module) -> tuple:
    held = vars(module)
    place, A = held.get("_place"), module._parameters.get("lora_A")
    active = None if place is None or place.suspended else place.active
    return active, A if A is None else id(A), "_disabled" in held, held.get("_aside") is not None


def check_computed_anew(module: nn.Module) -> None:
    """Raise a RuntimeError if a forward within a backward pass is to repeat one with another adapter."""
    node: Any = torch._C._current_autograd_node()
    if module not in _STATES or not hasattr(node, "_sequence_nr"):
        return
    made = node._sequence_nr()
    then = next((state for reached, state in _STATES[module] if made < reached), None)
    if then is not None and then != _state_of(module):
        raise RuntimeError(
            "gradient checkpointing computes a forward anew in the backward pass, and the model has been switched, "
            "merged or disabled since: the gradients would be of another adapter. Call backward() before that, or turn "
            "gradient checkpointing off"
        )


def _is_in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class LoRALayer:
    """The hyperparameters of a LoRA layer: a base class for layers of your own, as in loralib 0.1.2.

    >>> class Scale(nn.Module, LoRALayer):
    ...     def __init__(self):
    ...         nn.Module.__init__(self)
    ...         LoRALayer.__init__(self, r=2, lora_alpha=4, lora_dropout=0.0, merge_weights=True)
    >>> Scale().r, Scale().merged
    (2, False)

    Args:
        r: rank of the update; 0 means a plain layer without adapter.
        lora_alpha: numerator of `scaling`.
        lora_dropout: probability of dropping an input of the low-rank branch (never of the base) in training. The
            attribute is an `nn.Dropout`, or for 0 a function that returns its input.
        merge_weights: whether `eval()` merges.

    Raises:
        TypeError: `r` is not an integer or `lora_alpha`, `lora_dropout` not a number.
        ValueError: `r` is negative, `lora_alpha` not finite, or `lora_dropout` outside [0, 1].
    """

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool):
        check_hyperparameters(r, lora_alpha, lora_dropout)
        self.r = int(r)
        self.lora_alpha = as_number(lora_alpha)
        self.lora_dropout: Any = nn.Dropout(float(lora_dropout)) if lora_dropout > 0 else identity
        self.merged = False
        self.merge_weights = merge_weights


class InPlace(nn.Module):
    """What a module whose class was exchanged has beyond its own class: copies, moves and the adapter's name."""

    # What the adapters of the module are: `loralib.adapters.Place`.
    _place: Any = None
    # How `adapted` made the class, for pickles: a function and its arguments.
    _recipe: tuple[Callable, tuple] | None = None

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        # A bias that is trained in float32 beside a weight in half precision is as that to the forward.
        if "bias" in name and vars(self).get("_place") is not None:
            base = self._place.replaced.get(name)
            wider = base is not None and base.itemsize < value.itemsize and self._place.narrow(self) is None
            if wider and (torch.compiler.is_compiling() or _called_by_own_method(sys._getframe(1), self)):
                return value.to(base.dtype)
        return value

    def _apply(self: _Layer, fn: Callable, recurse: bool = True) -> _Layer:
        super()._apply(fn, recurse)
        if self._place is not None:
            self._place.follow(fn)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        recipe = vars(type(self)).get("_recipe")
        return super().__reduce_ex__(protocol) if recipe is None else (_restore, recipe, self.__getstate__())

    def __getstate__(self) -> dict:
        # Dicts of its own, since a shallow copy of the module would share them, and another class or merging would not.
        state = dict(super().__getstate__())
        state.update({key: dict(state[key]) for key in ("_parameters", "_buffers", "_modules")})
        if self._place is not None:
            self._place.put_into(state)
        return state

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._place is not None and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["adapter"] = self._place.shown
        if self._place is not None and len(self._place.adapters) > 1:
            _tell_once(
                "others",
                f"state_dict() of this model holds its base and the active adapter, {self._place.current!r}, and none "
                "of the others; save each with lora.save_lora after lora.set_adapter",
            )

    def _load_from_state_dict(self, state: dict, prefix: str, metadata: dict, *args: Any) -> None:
        place = self._place
        if place is not None and metadata.get("adapter", place.shown) in {None, *place.adapters} - {place.shown}:
            args[-1].append(
                f"{prefix[:-1]}: the checkpoint was made under the adapter {metadata['adapter']!r} (None: within "
                f"disable_adapters), the model computes with {place.shown!r}; call lora.set_adapter(model, ...) first"
            )
            return
        super()._load_from_state_dict(state, prefix, metadata, *args)
        # The checkpoint of a model without adapters is for the base, too, and not for copies of heads and biases only.
        # What it is of is known from its metadata, which a dict of a safetensors file or of parts does not have.
        of_base = metadata.keys() & {"version", "adapter"} == {"version"}
        if place is not None and not place.suspended and prefix and of_base:
            for key, tensor in place.replaced.items():
                value = state.get(prefix + key)
                if value is not None and value.shape == tensor.shape:
                    if tensor.is_meta:
                        place.replaced[key] = _like(tensor, value)
                    else:
                        tensor.data.copy_(value)


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    value = value.detach().clone()
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _called_by_own_method(frame: Any, module: nn.Module) -> bool:
    while frame.f_code.co_name == "__getattr__":  # of a kind
        frame = frame.f_back
    return frame.f_locals.get("self") is module


def reader_of(frame: Any) -> Any:
    """The frame of the code that reads an attribute, behind those of `__getattr__` of several kinds."""
    while frame.f_code.co_name == "__getattr__":
        frame = frame.f_back
    return frame


def is_read_past_forward(frame: Any, layer: nn.Module) -> bool:
    """Whether the code of `frame` reads an attribute of `layer` to compute with it, in the forward of another module or
    in a hook."""
    reader, depth = frame, 0
    while frame is not None and depth < 16:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            # What is below a module's call and not in its forward is a hook, or has been put in the forward's place.
            called = frame.f_code.co_name in _CALLS and frame.f_globals.get("__name__") == nn.Module.__module__
            if called:
                return _computes_at(reader.f_code, reader.f_lasti, by_name=True)
            if owner is layer:
                return False
            if frame.f_code.co_name == "forward" or getattr(owner.forward, "__code__", None) is frame.f_code:
                return _computes_at(reader.f_code, reader.f_lasti)
        frame, depth = frame.f_back, depth + 1
    return False


_CALLS = ("_call_impl", "_wrapped_call_impl", "inner")


@functools.lru_cache(maxsize=4096)
def _computes_at(code: types.CodeType, offset: int, by_name: bool = False) -> bool:
    steps = steps_of(code)
    here = next((i for i, step in enumerate(steps) if step[2] == offset), None)
    if by_name and (here is None or steps[here][0] != "LOAD_ATTR"):  # getattr, of a hook that moves tensors
        return False
    return here is None or computes_with(steps, here)


def steps_of(code: types.CodeType) -> list[tuple[str, Any, int]]:
    """The instructions of `code` that say what it does: name, argument and place."""
    skipped = ("CACHE", "RESUME", "PUSH_NULL", "PRECALL", "NOP", "EXTENDED_ARG")
    return [(s.opname, s.argval, s.offset) for s in dis.get_instructions(code) if s.opname not in skipped]


# What makes one layer of two, and reads the weight of the first for that.
_FUSING = {fusion.fuse_conv_bn_eval.__code__, fusion.fuse_linear_bn_eval.__code__}
# What code asks of a weight without computing with it.
_HARMLESS = {"dtype", "device", "shape", "size", "requires_grad", "requires_grad_", "ndim", "dim", "numel", "is_meta"}


def computes_with(steps: list[tuple[str, Any, int]], i: int) -> bool:
    """Whether the attribute that is read in step `i` is computed with, rather than asked for its dtype and the like."""
    start = next((k for k in range(i, -1, -1) if steps[k][0] != "LOAD_ATTR"), 0)
    if start and steps[start - 1][1] == "isinstance":
        return False
    after = steps[i + 1][:2] if i + 1 < len(steps) else ("", "")
    return not (after[0] in ("LOAD_ATTR", "LOAD_METHOD") and (after[1] in _HARMLESS or after[1].endswith("_")))


class _Merged(NamedTuple):
    """What merging has put aside, and where the merged weight came from."""

    base: nn.Parameter
    weight: nn.Parameter
    made_from: tuple
    adapter: list[Tensor]  # copies on a CPU, since writes through `.data` leave no trace in version counters
    sums: tuple[Tensor, ...]


class Adapted(InPlace):
    """A `torch.nn` layer with a low-rank update: the machinery that all kinds share.

    A kind defines `_base_forward`, `_lora_forward` (or `_adapted_forward` as a whole), `_delta` and `shapes`.
    """

    # The attributes that an adapter puts on a layer.
    settings = (
        *("r", "lora_alpha", "scaling", "lora_dropout", "merged", "merge_weights"),
        *("enable_lora", "group_sizes", "interleave", "fan_in_fan_out", "_aside", "_inner", "lora_parameters"),
    )
    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_alpha: float
    scaling: float
    lora_dropout: Any
    merge_weights: bool
    # Class defaults, because torch's constructors call reset_parameters() before LoRALayer.__init__ has run.
    r = 0
    merged = False
    _aside: _Merged | None = None
    _disabled = False
    _sharded = False
    # Whether what is below the module is part of it.
    is_leaf = True
    # Whether the forward adds the update to the base's output; otherwise the base's forward reads the sum.
    branches = True
    # Whether `weight`, read by anyone else, is the sum.
    computes_weight = False
    # The class that computes the base, and the arguments that its constructor takes beside `bias`.
    _base_class: Any

    # What a kind supplies.

    def _base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """The plain layer's output with `weight` in place of its own."""
        raise NotImplementedError

    def _lora_forward(self, x: Tensor) -> Tensor:
        """The update's output, dropout and scaling included, without forming B A where that would cost more."""
        raise NotImplementedError

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        """B A in the layout of `weight`, unscaled."""
        raise NotImplementedError

    @classmethod
    def members_for(cls, base: Any) -> dict:
        """What a class that adapts layers of class `base` has besides."""
        return {}

    @classmethod
    def shapes(cls, layer: Any, settings: dict) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for a plain `layer`, given the attributes that it will get."""
        raise NotImplementedError

    def _add_adapter(self, r: int, **more: Any) -> None:
        self.scaling = self.lora_alpha / r if r > 0 else 0.0
        vars(self).update(more)
        shapes = self.shapes(self, {"r": r, **more})
        if 0 not in shapes[0]:
            self.lora_A, self.lora_B = (nn.Parameter(self.weight.new_zeros(shape)) for shape in shapes)
            self.weight.requires_grad = False

    # What is the same for every layer.

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name != "weight" or torch.compiler.is_compiling():
            return value
        reader = reader_of(sys._getframe(1))
        if reader.f_code in _FUSING and self.has_adapter and not self.merged and not self._disabled:
            raise ValueError(
                f"{self}: a batch norm would be fused into the base alone; call lora.merge_lora_weights(model), or "
                "lora.merge_and_unload(model), before that"
            )
        # Layers made by hand hold the base's weight for whoever reads it, as in 0.1.2.
        if self._place is None or not is_read_past_forward(reader, self) or is_quantized(self) or self.is_sharded():
            return value
        return _computed_weight(self)

    @property
    def has_adapter(self) -> bool:
        """Whether the layer has LoRA parameters (false for r = 0 and for a `MergedLinear` with nothing enabled)."""
        return self.r > 0 and ("lora_A" in self._parameters or hasattr(self, "lora_A"))

    def _tensor(self, name: str) -> Any:
        # Several times quicker than the attribute. That serves what torch.nn.utils turned into something computed, and
        # replicas of nn.DataParallel, which hold plain tensors.
        parameters = self._parameters
        return parameters[name] if name in parameters else getattr(self, name)

    def _bias(self) -> Any:
        bias = self._tensor("bias")
        base = None if self._place is None else self._place.replaced.get("bias")
        return bias if base is None or base.itemsize >= bias.itemsize else bias.to(base.dtype)

    def updates(self) -> dict[str, Any]:
        """What has a rank, an alpha and a scaling here, by the ending of its name: the layer itself."""
        return {"": self} if self.has_adapter else {}

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The tensors of the adapter, by name."""
        return {name: getattr(self, name) for name in ("lora_A", "lora_B")} if self.has_adapter else {}

    def sums(self) -> dict[str, Tensor]:
        """W + scaling * B A for each weight that has an update, by name."""
        return {"weight": self._sum(self.base_weight())} if self.has_adapter else {}

    def base_weight(self) -> Any:
        """Return the weight without the update, in every mode."""
        if self._aside is not None:
            self._take_over()
        return self._tensor("weight") if self._aside is None else self._aside.base

    def _adapted_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        result = self._base_forward(x, weight)
        return result + self._lora_forward(x).to(result.dtype)

    def _plain_forward(self, x: Tensor) -> Tensor:
        return self._base_class.forward(self, x)

    def _merged_forward(self, x: Tensor) -> Tensor:
        base = self._base_apart(recorded=not isinstance(x, Tensor))
        return self._plain_forward(x) if base is None else self._adapted_forward(x, base)

    def _base_apart(self, recorded: bool = False) -> Tensor | None:
        """Of a merged layer, the weight to which the update has to be added just now; None: it is right as it is.

        Merges anew what is stale, unless what is computed is `recorded` by somebody.
        """
        aside = self._aside
        if aside is None or not self.has_adapter:  # merged by hand, disabled, or stripped of its adapter
            return None
        weight, A, B = (self._parameters.get(name) for name in ("weight", "lora_A", "lora_B"))
        if weight is None or A is None or B is None:  # computed by torch.nn.utils, or a replica of nn.DataParallel
            return None
        if _is_exporting():  # what is exported does not change
            return None
        _, of_A, of_B = aside.made_from[1]
        replaced = A is not of_A or B is not of_B
        if weight is not aside.weight:
            if _is_view(weight, aside.base):  # put in by torch.func, as the next ones
                return weight
            if _is_view(weight, aside.weight):
                return aside.base if replaced else None
            if replaced or not isinstance(weight, nn.Parameter):
                raise RuntimeError(
                    f"{self} is merged, and was given another weight by torch.func or by hand: whether the update is "
                    "in it already cannot be told; call lora.unmerge_lora_weights(model) before that"
                )
            return None  # a merged weight of the user's, as in 0.1.2
        if not isinstance(A, nn.Parameter) or not isinstance(B, nn.Parameter):
            return aside.base
        if aside.base.requires_grad != weight.requires_grad:  # set since
            aside.base.requires_grad_(weight.requires_grad)
        # A compiled graph cannot see that the merged weight is stale.
        if torch.compiler.is_compiling() or (weight.requires_grad and torch.is_grad_enabled()):
            return aside.base
        if not self.merged:  # somebody has set it
            self._unmerge()
            return self._tensor("weight")
        if not recorded and torch._C._get_tracing_state() is None:
            same = _same(self._made_from(aside.base), aside.made_from)
            if not same or (aside.adapter and not all(map(torch.equal, (A, B), aside.adapter))):
                self.merge()
        return None

    def delta_weight(self) -> Tensor:
        """Return scaling * B A in the layout of `weight`, in float32 or wider.

        Of a layer that `fully_shard` shards, all processes have to ask for it together.

        >>> import loralib as lora
        >>> layer = lora.Linear(4, 6, r=2)
        >>> layer.delta_weight().shape, layer.delta_weight().abs().sum().item()
        (torch.Size([6, 4]), 0.0)
        """
        if not self.has_adapter:
            return torch.zeros_like(self.base_weight())
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        with full_precision(self.lora_A.device):
            return self.scaling * self._delta(*(whole(tensor).to(dtype) for tensor in (self.lora_A, self.lora_B)))

    @staticmethod
    def draw(A: Tensor, B: Tensor) -> None:
        """Draw an adapter: A as `nn.Linear` draws its weight, B zero; the update is then zero (section 4.1)."""
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        nn.init.zeros_(B)

    def reset_lora_parameters(self) -> None:
        """Draw the adapter anew; the update is then zero."""
        if self.has_adapter:
            self.draw(self.lora_A, self.lora_B)

    def _reset_base(self) -> None:
        self._base_class.reset_parameters(self)

    # Merging puts another Parameter in the base's place.

    def merge(self) -> None:
        """Put W + scaling * B A in the place of `weight`, anew if it is there already."""
        self._take_over()
        if self._disabled or not self.has_adapter:
            self.merged = True
        if self.merged and self._aside is None:  # by hand
            return
        base = self._parameters.get("weight") if self._aside is None else self._aside.base
        A, B = self._parameters.get("lora_A"), self._parameters.get("lora_B")
        # No Parameter: torch.nn.utils computes it, and the branch follows what it computes.
        if self.is_sharded() or not merges(self) or base is None or A is None or B is None:
            return
        note_state(self)
        # Outside inference mode, so that the tensor can be used in and out of it.
        with torch.inference_mode(False), torch.no_grad():
            merged = nn.Parameter(self._sum(base.detach()), requires_grad=base.requires_grad)
            copies = [tensor.detach().clone() for tensor in (A, B) if tensor.is_cpu]
            aside = _Merged(base, merged, self._made_from(base), copies, _sums(merged))
        # At no moment is the base in place: another thread may be in a forward.
        self._parameters["weight"], self._aside, self.merged = merged, aside, True

    def unmerge(self) -> None:
        """Put the base Parameter back; what was merged by hand has the update subtracted, as in 0.1.2."""
        if self._aside is not None:
            self._unmerge()
        elif self.merged and self.has_adapter and not self._disabled:
            weight = self._subtract(self._tensor("weight"))
            if "weight" in self._parameters:
                self._parameters["weight"] = weight
        self.merged = False

    def _unmerge(self) -> None:
        self._take_over()
        if self._aside is not None:
            base, weight = self._aside.base, self._aside.weight
            if base.requires_grad != weight.requires_grad:  # set while merged
                base.requires_grad_(weight.requires_grad)
            note_state(self)
            self._parameters["weight"] = base
        self._aside, self.merged = None, False

    def _take_over(self) -> None:
        """Let what was written into the merged weight count for the base, as it does in 0.1.2."""
        aside, weight = self._aside, self._parameters.get("weight")
        if aside is None or not self.has_adapter:  # without an adapter the merged weight is the weight
            self._aside = None
            return
        if weight is None:
            raise RuntimeError(
                f"{type(self).__name__}: `weight` was taken away while it was merged (by torch.nn.utils?), and the "
                "base cannot be told from it; call train() or lora.unmerge_lora_weights(model) before that"
            )
        if weight is aside.weight and all(map(torch.equal, _sums(weight), aside.sums)):
            return
        base = weight
        if weight is aside.weight and hasattr(aside.base, SHARED_BASE):
            base = nn.Parameter(weight.data.clone(), aside.base.requires_grad)
        elif weight is aside.weight:
            aside.base.data.copy_(weight.data)
            base = aside.base
        if not _is_view(weight, aside.base):  # somebody has put the base back
            base = self._subtract(base)
        self._parameters["weight"], self._aside, self.merged = base, None, False
        self.merge()

    def _subtract(self, weight: Any) -> Any:
        """Return the base in a weight that has the update in it: the same Parameter, unless other models share it."""
        with torch.no_grad():
            dtype = torch.promote_types(weight.dtype, torch.float32)
            base = (weight.to(dtype) - self.delta_weight()).to(weight.dtype)
        if hasattr(weight, SHARED_BASE):
            weight = nn.Parameter(base, weight.requires_grad)
        else:
            weight.data = base
        return weight

    def _made_from(self, base: Tensor) -> tuple:
        tensors = base, self._tensor("lora_A"), self._tensor("lora_B")
        return self.scaling, tensors, [0 if tensor.is_inference() else tensor._version for tensor in tensors]

    def _sum(self, base: Tensor) -> Tensor:
        if is_quantized(self):
            base = dequantized(self)
        dtype = torch.promote_types(torch.promote_types(base.dtype, self.lora_A.dtype), torch.float32)
        with full_precision(base.device):
            merged = self._add_delta(*(tensor.to(dtype) for tensor in (base, self.lora_A, self.lora_B)))
        return merged.to(base.dtype)

    def _add_delta(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return weight + self.scaling * self._delta(A, B)

    def is_sharded(self) -> bool:
        """Whether `fully_shard` shards the layer."""
        # Remembered, because in a forward, and at the root also after one, fully_shard puts ordinary Parameters in.
        if any(map(is_sharded, self._parameters.values())):
            self._sharded = True
        return self._sharded

    # What nn.Module does with a layer.

    def _apply(self: "Adapted", fn: Callable, recurse: bool = True) -> "Adapted":
        with self._unmerged():
            super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        base = None if self._aside is None else self.base_weight()
        if self._aside is not None and base is not None:
            destination[f"{prefix}weight"] = base if keep_vars else base.detach()
            _tell_once(
                "merged",
                "state_dict() of a merged layer holds the base weight, without the update, beside lora_A and lora_B; "
                "for an export of the sum call lora.merge_and_unload(model) first",
            )

    def _load_from_state_dict(self, state: dict, prefix: str, metadata: dict, *args: Any) -> None:
        with self._unmerged():
            super()._load_from_state_dict(state, prefix, metadata, *args)
            if self._base_class._load_from_state_dict is not nn.Module._load_from_state_dict:  # knows its own only
                for key in ("lora_A", "lora_B"):
                    if f"{prefix}{key}" in state and key in self._parameters:
                        getattr(self, key).data.copy_(state[f"{prefix}{key}"])

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and self._aside is not None and is_sharded(value):
            # fully_shard has taken the merged weight apart: its part is to be the base's.
            from torch.distributed.tensor import distribute_tensor  # slow to import, and imported if it is in use

            base = self._aside.base.detach()
            part = distribute_tensor(base, value.device_mesh, value.placements, src_data_rank=None)
            value.to_local().detach().copy_(part.to_local())
            self._aside, self.merged = None, False
        super().__setattr__(name, value)

    @contextlib.contextmanager
    def _unmerged(self) -> Iterator[None]:
        merged = self._aside is not None
        if merged:
            self._unmerge()
        try:
            yield
        finally:
            if merged:
                self.merge()

    def __getstate__(self) -> dict:
        if self._aside is not None:
            self._take_over()
        state = super().__getstate__()
        if self._aside is not None:
            state["_parameters"]["weight"] = self._aside.base
            state.update(merged=False, _aside=None, _merge_again=True)
        elif state.pop("_disabled", False):  # for a while; `merged` says what is to be afterwards
            state.update(merged=False, _merge_again=self.merged)
        return state

    def __setstate__(self, state: dict) -> None:
        state = dict(state)
        merged = state.pop("_merge_again", False)
        super().__setstate__(state)
        if merged:
            self.merge()

    def extra_repr(self) -> str:
        parts = [self._base_class.extra_repr(self), f"r={self.r}", f"lora_alpha={self.lora_alpha}"]
        if self.has_adapter and isinstance(self.scaling, Tensor):
            parts.append(f"scaling={self.scaling.tolist()}")
        elif self.has_adapter and self.scaling != self.lora_alpha / self.r:
            parts.append(f"scaling={self.scaling:.6g}")
        return ", ".join([part for part in parts if part] + self._extra_repr() + (["merged"] if self.merged else []))

    def _extra_repr(self) -> list[str]:
        return []


# The methods of every LoRA layer. They stand in each class itself, before those of torch, so that for whoever extends
# a layer `super(lora.Linear, self)` is torch's class, as in 0.1.2.


def _forward(self: Any, input: Any = None, x: Any = None) -> Tensor:
    """Return the base's output plus that of the update. The argument is `input`, as torch names it, or `x` (0.1.2)."""
    input = x if input is None else input
    if _is_in_backward():
        check_computed_anew(self)
    if self.merged or self._aside is not None:
        return self._merged_forward(input)
    if self._disabled or not self.has_adapter:
        return self._plain_forward(input)
    parameters = self._parameters
    weight = parameters["weight"] if "weight" in parameters else getattr(self, "weight", None)  # HQQ's layers have none
    return self._adapted_forward(input, weight)


def _train(self: Any, mode: bool = True) -> Any:
    """Set training mode, which unmerges, or evaluation mode, which merges if `merge_weights`; return the layer."""
    self._base_class.train(self, mode)
    if mode:
        if self._aside is not None or self.merge_weights:
            self.unmerge()
    elif self.merge_weights or self.merged:
        self.merge()
    return self


def _reset_parameters(self: Any) -> None:
    """Draw the base and the adapter anew, as a newly constructed layer has them."""
    with self._unmerged():
        self._reset_base()
        self.reset_lora_parameters()


def _computed_weight(self: Any) -> Any:
    """W + scaling * B A, differentiable: for layers whose weight is read past their forward, or by a forward that is
    nobody's but theirs."""
    weight = self._parameters.get("weight", vars(self).get("weight"))
    if weight is None or self._disabled or not self.has_adapter:
        return weight
    if self.merged or self._aside is not None:
        base = self._base_apart(recorded=_is_traced_by_fx())
        return self._parameters["weight"] if base is None else self._sum(base)
    if _is_traced_by_fx():
        raise RuntimeError(
            f"{self} computes with the sum of its weight and its update, which torch.fx cannot follow; trace what "
            "lora.merge_and_unload(model) returns"
        )
    return self._sum(weight)


def _set_computed_weight(self: Any, value: Any) -> None:
    vars(self)["weight"] = value  # a replica of nn.DataParallel, or torch's pruning


def _is_traced_by_fx() -> bool:
    # Which torch.export sets, too; what it traces follows computed weights.
    if torch.compiler.is_compiling():
        return False
    tracer: Any = torch.fx._symbolic_trace
    return bool(getattr(tracer, "is_fx_symbolic_tracing", tracer.is_fx_tracing)())


def _repr_with_settings(self: Any) -> str:
    return f"{self._base_class.__repr__(self)[:-1]}, {Adapted.extra_repr(self).removeprefix(', ')})"


def _constructor(cls: Any) -> Callable:
    """What `type(module)(...)` calls, by which others make another module of the kind: it has no adapter."""

    def new(made: Any, *args: Any, **kwargs: Any) -> Any:
        # Without arguments also replicas of nn.DataParallel are made, which get the module's state afterwards.
        plain = "_recipe" in vars(made) and (args or kwargs)
        return cls(*args, **kwargs) if plain else object.__new__(made)

    return new


def _members_in_place(cls: Any) -> dict:
    """What a class has whose modules hold tensors of adapters: for `adapted`."""

    named = ADAPTER_NAMES in _parameters_of(cls.forward)

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if ADAPTER_NAMES in kwargs and not named:
            names = kwargs.pop(ADAPTER_NAMES)
            with contextlib.nullcontext() if names is None else per_row[0](self, names):
                return self.forward(*args, **kwargs)
        if _is_in_backward():
            check_computed_anew(self)
        narrow = None if self._place is None else self._place.narrow(self)
        if narrow is None:
            return cls.forward(self, *args, **kwargs)
        # Trained in float32 on a base in half precision: what comes in is widened, what goes out is as the base's.
        args, kwargs = _cast((args, kwargs), narrow, torch.float32)
        return _cast(cls.forward(self, *args, **kwargs), torch.float32, narrow)

    members: dict = {"__new__": _constructor(cls)}
    if cls.forward is not nn.Module.forward:
        members["forward"] = forward
    if hasattr(cls, "generate") and ADAPTER_NAMES not in _parameters_of(cls.generate):

        @functools.wraps(cls.generate)
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            names = kwargs.pop(ADAPTER_NAMES, None)
            with contextlib.nullcontext() if names is None else per_row[0](self, names):
                return cls.generate(self, *args, **kwargs) if names is None else self.generate(*args, **kwargs)

        members["generate"] = generate
    if hasattr(cls, "tie_weights"):

        @functools.wraps(cls.tie_weights)
        def tie_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
            with contextlib.nullcontext() if self._place is None else self._place.with_base(self):
                return cls.tie_weights(self, *args, **kwargs)

        members["tie_weights"] = tie_weights
    if hasattr(cls, "resize_token_embeddings"):

        @functools.wraps(cls.resize_token_embeddings)
        def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self._place is not None and any(value is not None for value in (*args[:2], *kwargs.values())):
                self._place.prepare_resizing(self)
            return cls.resize_token_embeddings(self, *args, **kwargs)

        members["resize_token_embeddings"] = resize_token_embeddings
    for more in IN_PLACE:
        members.update(more(cls))
    return members


# PEFT's argument of a forward and of `generate`: an adapter for each row.
ADAPTER_NAMES = "adapter_names"


def _parameters_of(function: Any) -> Any:
    return inspect.signature(function).parameters


def takes_any_keyword(function: Callable) -> bool:
    """Whether a function takes keywords that it does not name.

    >>> takes_any_keyword(lambda **keywords: None), takes_any_keyword(len)
    (True, False)
    """
    return any(each.kind is inspect.Parameter.VAR_KEYWORD for each in _parameters_of(function).values())


def _cast(tensors: Any, old: torch.dtype, new: torch.dtype) -> Any:
    def cast(x: Any) -> Any:
        return x.to(new) if isinstance(x, Tensor) and x.dtype == old else x

    return cast(tensors) if isinstance(tensors, Tensor) else torch.utils._pytree.tree_map(cast, tensors)


@_cached  # type: ignore[untyped-decorator]
def adapted(cls: Any, kind: Any, branch: bool = True, computed: bool = False) -> Any:
    """Return the class that a module of class `cls` gets while adapters are in it.

    >>> from loralib.layers import Linear, Matrix
    >>> adapted(nn.Linear, Matrix) is Linear
    True

    Args:
        cls: the module's own class.
        kind: what the update is to it, or None for a module that has none, but a bias or a weight of its own.
        branch: whether the forward adds the update to the output of `cls`.
        computed: whether `weight`, read by anyone else, is the sum.
    """
    if kind is not None and branch and not computed and (cls, kind) in PUBLIC:
        return PUBLIC[cls, kind]
    members: dict = {"__module__": __name__, "__doc__": cls.__doc__}
    members["_recipe"] = adapted, (cls, kind, branch, computed)
    if kind is None:
        # Libraries know a class by its full name, or read its source; transformers takes a model of a class from
        # elsewhere for code of a user's, whose weights it does not rename.
        members.update(_members_in_place(cls), __module__=cls.__module__, __qualname__=cls.__qualname__)
        return types.new_class(cls.__name__, (InPlace, cls), exec_body=lambda body: body.update(members))
    members.update(_base_class=cls, train=_train, reset_parameters=_reset_parameters)
    members.update(branches=branch, computes_weight=computed)
    if branch:
        members.update(kind.members_for(cls), forward=_forward)
    else:
        members["forward"] = cls.forward
    if computed:
        members["weight"] = property(_computed_weight, _set_computed_weight)
    if cls.__repr__ is not nn.Module.__repr__:
        members["__repr__"] = _repr_with_settings
    # Under the class of ours that it is like, if there is one, so that isinstance(layer, lora.Linear) is true.
    like = next((PUBLIC[plain, kind] for plain in cls.__mro__ if (plain, kind) in PUBLIC), kind)
    return types.new_class(cls.__name__, (like, cls, LoRALayer), exec_body=lambda body: body.update(members))


@_cached  # type: ignore[untyped-decorator]
def with_convolution(cls: Any, convolution: Any) -> Any:
    members: dict = {"__module__": __name__, "_base_class": convolution}
    members["_recipe"] = with_convolution, (cls, convolution)
    return types.new_class(cls.__name__, (cls, convolution), exec_body=lambda body: body.update(members))


def _restore(make: Callable, arguments: tuple) -> nn.Module:
    cls = make(*arguments)
    return object.__new__(cls)


def check_hyperparameters(r: int, lora_alpha: float, lora_dropout: float) -> None:
    """Raise if `r`, `lora_alpha` or `lora_dropout` is not what a LoRA layer takes.

    >>> check_hyperparameters(-1, 1, 0.0)
    Traceback (most recent call last):
    ValueError: r=-1: the rank must be 0 (no adapter) or a positive integer
    """
    if isinstance(r, bool) or not isinstance(r, numbers.Integral):
        said = repr(r) if len(repr(r)) < 80 else "..."  # a configuration of PEFT
        raise TypeError(f"r={said}: the rank must be an integer, not {type(r).__name__}")
    if r < 0:
        raise ValueError(f"r={r}: the rank must be 0 (no adapter) or a positive integer")
    for name, value in (("lora_alpha", as_number(lora_alpha)), ("lora_dropout", lora_dropout)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}={value!r}: must be a number, not {type(value).__name__}")
    if not _is_finite(lora_alpha):
        raise ValueError(f"lora_alpha={lora_alpha}: must be finite")
    if not 0 <= lora_dropout <= 1:
        raise ValueError(f"lora_dropout={lora_dropout}: must be a probability between 0 and 1")


def as_number(value: Any) -> Any:
    """Return Python's number for one of numpy, or of a tensor of one element, which 0.1.2 takes for `lora_alpha`.

    >>> as_number(torch.tensor(4.0)), as_number(16), as_number("16")
    (4.0, 16, '16')
    """
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 and not value.requires_grad else value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer that no float reaches
        return False


def is_sharded(tensor: Any) -> bool:
    """Whether this process has a part of `tensor` only, a DTensor, as `fully_shard` makes of Parameters.

    >>> is_sharded(nn.Linear(4, 4).weight)
    False
    """
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """Return `tensor`, put together if it is sharded; all processes have to ask for it then.

    >>> whole(torch.ones(2))
    tensor([1., 1.])
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    kind = device.type
    # torch 2.5 cannot compile the first question; "meta" has no answer to the second.
    if (torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _is_exporting() -> bool:
    return getattr(torch.compiler, "is_exporting", lambda: False)()


def _same(then: tuple, now: tuple) -> bool:
    return bool(then[0] == now[0]) and then[2] == now[2] and all(a is b for a, b in zip(then[1], now[1], strict=True))


def _is_view(tensor: Tensor, of: Tensor) -> bool:
    if tensor is of:
        return True
    known = not torch.compiler.is_compiling() and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return known and tensor.shape == of.shape and tensor.data_ptr() == of.data_ptr()


def _bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor as whole numbers, in its first axis and one for all others: their sums tell of writes."""
    tensor = tensor.detach().flatten(1) if tensor.dim() > 1 else tensor.detach()[None]
    tensor = tensor.contiguous()
    # Words of 8 bytes where they fit, since torch adds those ten times quicker.
    size = tensor.element_size()
    fits = tensor.shape[1] * size % 8 == 0 and tensor.storage_offset() * size % 8 == 0
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[size] if size < 8 and not fits else torch.int64)


def _sums(tensor: Tensor) -> tuple[Tensor, ...]:
    # Any change of one number, and any exchange of two, changes a sum; the samples tell of changes to all.
    if tensor.is_meta:
        return ()
    bits = _bits(tensor)
    return bits.sum(0), bits.sum(1), bits.flatten()[:: max(1, bits.numel() // 4096)].clone()


_told: set[str] = set()
_quiet = False


def _tell_once(what: str, message: str) -> None:
    if what not in _told and not _quiet:
        _told.add(what)
        warnings.warn(message, stacklevel=5)


@contextlib.contextmanager
def quiet_state() -> Iterator[None]:
    """Within the block `state_dict()` does not say what it holds: for those who know."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before
