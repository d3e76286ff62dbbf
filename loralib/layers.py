"""Layers with a low-rank update: y = W x + b + scaling * B A x, scaling = lora_alpha / r.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1. W and b belong to the
plain layer and stay frozen; A and B are trained. The axes below: i `in_features`, o `out_features`, r the rank,
V `num_embeddings`, d `embedding_dim`, g the rows of one adapted group of a fused projection (all of one size, unless
`group_sizes` says otherwise), n the number of adapted groups.

| layer        | weight                | lora_A      | lora_B      | starts as        |
|--------------|-----------------------|-------------|-------------|------------------|
| Linear       | (o, i)                | (r, i)      | (o, r)      | A random, B zero |
| MergedLinear | (o, i)                | (n r, i)    | (n g, r)    | A random, B zero |
| Embedding    | (V, d)                | (r, V)      | (d, r)      | A zero, B normal |
| Conv*        | (o, i/groups, k...)   | see _Kernel | see _Kernel | A random, B zero |

The sizes of `MergedLinear(128, 384, r=2, enable_lora=[True, False, True])`, fused q, k and v with q and v adapted:
    weight (384, 128), three groups of g = 128 rows; n = 2
    lora_A (4, 128): rows 0-1 belong to q, rows 2-3 to v
    lora_B (256, 2): rows 0-127 belong to q, rows 128-255 to v
    B as one block matrix (384, 4): q in [0:128, 0:2], zeros for k, v in [256:384, 2:4]
    x (..., 128) -> x A^T (..., 4) -> (x A^T) B^T (..., 384)

How the classes are built. `LoRALayer` is a plain class that holds hyperparameters, as in loralib 0.1.2. `_Adapted` is
the machinery: branch, merging, state. A kind (`_Matrix`, `_Groups`, `_Table`, `_Kernel`) is the arithmetic of one kind
of layer. A LoRA layer is a kind mixed into a `torch.nn` class, `class Linear(_Matrix, nn.Linear, LoRALayer)`, and
`adapted(cls, kind)` makes such a class for any other class of layers, so that a layer of a model can be adapted where
it stands, by giving it another class.

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
import functools
import itertools
import math
import numbers
import types
import warnings
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralib.quantized import dequantized, is_quantized, merges

# Plain, because mypy does not take a class of modules for hashable.
_cached: Any = functools.cache
_Layer = TypeVar("_Layer", bound="_InPlace")


def _identity(x: Tensor) -> Tensor:
    return x


class LoRALayer:
    """The hyperparameters of a LoRA layer, for anyone's multiple inheritance, as in loralib 0.1.2.

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
        lora_alpha = _as_number(lora_alpha)
        check_hyperparameters(r, lora_alpha, lora_dropout)
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout: Any = nn.Dropout(lora_dropout) if lora_dropout > 0 else _identity
        self.merged = False
        self.merge_weights = merge_weights


class _InPlace(nn.Module):
    """What a module whose class was exchanged has beyond its own class: copies, moves and the adapter's name."""

    # What the adapters of the module are: `loralib.adapters.Place`.
    _place: Any = None
    # How `adapted` made the class, for pickles: a function and its arguments.
    _recipe: tuple[Callable, tuple] | None = None

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
                f"state_dict() of this model holds its base and the active adapter, {self._place.current!r}, and none "
                "of the others; save each with lora.save_lora after lora.set_adapter"
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


class _Merged(NamedTuple):
    """What merging has put aside, and where the merged weight came from."""

    base: nn.Parameter
    weight: nn.Parameter
    made_from: tuple
    adapter: list[Tensor]  # copies on a CPU, since writes through `.data` leave no trace in version counters
    sums: tuple[Tensor, ...]


class _Adapted(_InPlace):
    """A `torch.nn` layer with a low-rank update: the machinery that all kinds share.

    A kind defines `_base_forward`, `_lora_forward` (or `_adapted_forward` as a whole), `_delta` and `shapes`.
    """

    # The attributes that an adapter puts on a layer.
    settings = (
        *("r", "lora_alpha", "scaling", "lora_dropout", "merged", "merge_weights"),
        *("enable_lora", "group_sizes", "interleave", "fan_in_fan_out", "_aside", "_inner"),
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
    # Whether the forward adds the update to the base's output; otherwise the base's forward reads the sum.
    branches = True
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

    @property
    def has_adapter(self) -> bool:
        """Whether the layer has LoRA parameters (false for r = 0 and for a `MergedLinear` with nothing enabled)."""
        return self.r > 0 and ("lora_A" in self._parameters or hasattr(self, "lora_A"))

    def _tensor(self, name: str) -> Any:
        # Several times quicker than the attribute. That serves what torch.nn.utils turned into something computed, and
        # replicas of nn.DataParallel, which hold plain tensors.
        parameters = self._parameters
        return parameters[name] if name in parameters else getattr(self, name)

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

        >>> layer = Linear(4, 6, r=2)
        >>> layer.delta_weight().shape, layer.delta_weight().abs().sum().item()
        (torch.Size([6, 4]), 0.0)
        """
        if not self.has_adapter:
            return torch.zeros_like(self.base_weight())
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        with _full_precision(self.lora_A.device):
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
            self._subtract(self._tensor("weight"))
        self.merged = False

    def _unmerge(self) -> None:
        self._take_over()
        if self._aside is not None:
            base, weight = self._aside.base, self._aside.weight
            if base.requires_grad != weight.requires_grad:  # set while merged
                base.requires_grad_(weight.requires_grad)
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
        if weight is aside.weight:
            aside.base.data.copy_(weight.data)
            base = aside.base
        if not _is_view(weight, aside.base):  # somebody has put the base back
            self._subtract(base)
        self._parameters["weight"], self._aside, self.merged = base, None, False
        self.merge()

    def _subtract(self, weight: Tensor) -> None:
        with torch.no_grad():
            dtype = torch.promote_types(weight.dtype, torch.float32)
            weight.data = (weight.to(dtype) - self.delta_weight()).to(weight.dtype)

    def _made_from(self, base: Tensor) -> tuple:
        tensors = base, self._tensor("lora_A"), self._tensor("lora_B")
        return self.scaling, tensors, [0 if tensor.is_inference() else tensor._version for tensor in tensors]

    def _sum(self, base: Tensor) -> Tensor:
        if is_quantized(self):
            base = dequantized(self)
        dtype = torch.promote_types(torch.promote_types(base.dtype, self.lora_A.dtype), torch.float32)
        with _full_precision(base.device):
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

    def _apply(self: "_Adapted", fn: Callable, recurse: bool = True) -> "_Adapted":
        with self._unmerged():
            super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        base = None if self._aside is None else self.base_weight()
        if self._aside is not None and base is not None:
            destination[f"{prefix}weight"] = base if keep_vars else base.detach()
            _tell_once(
                "state_dict() of a merged layer holds the base weight, without the update, beside lora_A and lora_B; "
                "for an export of the sum call lora.merge_and_unload(model) first"
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
        if self.has_adapter and self.scaling != self.lora_alpha / self.r:
            parts.append(f"scaling={self.scaling:.6g}")
        return ", ".join([part for part in parts if part] + self._extra_repr() + (["merged"] if self.merged else []))

    def _extra_repr(self) -> list[str]:
        return []


# The methods of every LoRA layer. They stand in each class itself, before those of torch, so that for whoever extends
# a layer `super(lora.Linear, self)` is torch's class, as in 0.1.2.


def _forward(self: Any, input: Any = None, x: Any = None) -> Tensor:
    """Return the base's output plus that of the update. The argument is `input`, as torch names it, or `x` (0.1.2)."""
    input = x if input is None else input
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
    return bool(torch.fx._symbolic_trace.is_fx_tracing())


def _repr_with_settings(self: Any) -> str:
    return f"{self._base_class.__repr__(self)[:-1]}, {_Adapted.extra_repr(self).removeprefix(', ')})"


@_cached  # type: ignore[untyped-decorator]
def adapted(cls: Any, kind: Any, branch: bool = True, computed: bool = False) -> Any:
    """Return the class that a module of class `cls` gets while adapters are in it.

    >>> adapted(nn.Linear, _Matrix) is Linear
    True

    Args:
        cls: the module's own class.
        kind: what the update is to it, or None for a module that has none, but a bias or a weight of its own.
        branch: whether the forward adds the update to the output of `cls`.
        computed: whether `weight`, read by anyone else, is the sum.
    """
    if kind is not None and branch and not computed and (cls, kind) in _PUBLIC:
        return _PUBLIC[cls, kind]
    members: dict = {"__module__": __name__, "__doc__": cls.__doc__}
    members["_recipe"] = adapted, (cls, kind, branch, computed)
    if kind is None:
        return types.new_class(cls.__name__, (_InPlace, cls), exec_body=lambda body: body.update(members))
    members.update(_base_class=cls, train=_train, reset_parameters=_reset_parameters, branches=branch)
    if branch:
        members["forward"] = _forward
        if issubclass(kind, _Matrix):
            transposed = _conv1d_product if cls.__name__ == "Conv1D" else None
            members["_product"] = _linear_product if cls.forward is nn.Linear.forward else transposed
    else:
        members["forward"] = cls.forward
    if computed:
        members["weight"] = property(_computed_weight, _set_computed_weight)
    if cls.__repr__ is not nn.Module.__repr__:
        members["__repr__"] = _repr_with_settings
    # Under the class of ours that it is like, if there is one, so that isinstance(layer, lora.Linear) is true.
    like = next((_PUBLIC[plain, kind] for plain in cls.__mro__ if (plain, kind) in _PUBLIC), kind)
    return types.new_class(cls.__name__, (like, cls, LoRALayer), exec_body=lambda body: body.update(members))


@_cached  # type: ignore[untyped-decorator]
def _with_convolution(cls: Any, convolution: Any) -> Any:
    members: dict = {"__module__": __name__, "_base_class": convolution}
    members["_recipe"] = _with_convolution, (cls, convolution)
    return types.new_class(cls.__name__, (cls, convolution), exec_body=lambda body: body.update(members))


def _restore(make: Callable, arguments: tuple) -> nn.Module:
    cls = make(*arguments)
    return cls.__new__(cls)


def check_hyperparameters(r: int, lora_alpha: float, lora_dropout: float) -> None:
    """Raise if `r`, `lora_alpha` or `lora_dropout` is not what a LoRA layer takes.

    >>> check_hyperparameters(-1, 1, 0.0)
    Traceback (most recent call last):
    ValueError: r=-1: the rank must be 0 (no adapter) or a positive integer
    """
    if isinstance(r, bool) or not isinstance(r, numbers.Integral):
        raise TypeError(f"r={r!r}: the rank must be an integer, not {type(r).__name__}")
    if r < 0:
        raise ValueError(f"r={r}: the rank must be 0 (no adapter) or a positive integer")
    for name, value in (("lora_alpha", _as_number(lora_alpha)), ("lora_dropout", lora_dropout)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}={value!r}: must be a number, not {type(value).__name__}")
    if not _is_finite(lora_alpha):
        raise ValueError(f"lora_alpha={lora_alpha}: must be finite")
    if not 0 <= lora_dropout <= 1:
        raise ValueError(f"lora_dropout={lora_dropout}: must be a probability between 0 and 1")


def _as_number(value: Any) -> Any:
    """Return the number in a tensor of one element, which 0.1.2 takes for `lora_alpha`; anything else as it is."""
    constant = isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad
    return value.item() if constant else value


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


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
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


_told = False
_quiet = False


def _tell_once(message: str) -> None:
    global _told
    if not _told and not _quiet:
        _told = True
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


class _Matrix(_Adapted):
    """A linear layer. `_Groups` differs in the (o, A's rows) matrix that B stands for, `_full_B`."""

    fan_in_fan_out = False
    in_features: int
    out_features: int
    # The base's own formula for the rows of a matrix, or None where only its class knows.
    _product: Any = None

    @classmethod
    def shapes(cls, layer: Any, settings: dict) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inputs, outputs = matrix_shape(layer)
        return (settings["r"], inputs), (outputs, settings["r"])

    def _full_B(self, B: Tensor) -> Tensor:
        return B

    def _transpose_weight(self) -> None:
        # In a new Parameter rather than by a view of the old one: safetensors wants contiguous tensors.
        self.weight = nn.Parameter(self.weight.new_empty(self.in_features, self.out_features))

    def _reset_base(self) -> None:
        if not (self.fan_in_fan_out and self._base_class is nn.Linear):
            return super()._reset_base()
        # nn.Linear would take the fan-in from the wrong axis of a transposed weight.
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, **like)
        with torch.no_grad():
            self.weight.copy_(plain.weight.T)
            if self.bias is not None:
                self._tensor("bias").copy_(plain.bias)

    def _plain_forward(self, x: Tensor) -> Tensor:
        if self.fan_in_fan_out and self._base_class is nn.Linear:
            return F.linear(x, self._tensor("weight").T, self._tensor("bias"))
        return super()._plain_forward(x)

    def _base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        if self._product is None and (weight is None or weight is self._tensor("weight")):
            return self._base_class.forward(self, x)
        return F.linear(x, weight.T if self.fan_in_fan_out else weight, self._tensor("bias"))

    def _adapted_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        A, B = self._tensor("lora_A"), self._tensor("lora_B")
        # Tensors of torch.func may be stacked and x not, nested ones have no shape, compilers fuse by themselves.
        plain = type(A) is nn.Parameter and isinstance(x, Tensor) and not x.is_nested
        if not plain or self._product is None or torch.compiler.is_compiling() or isinstance(self.scaling, Tensor):
            return super()._adapted_forward(x, weight)
        # Nobody else has the base's output yet, so the update is added in place, by the very product. In two axes: with
        # more, F.linear returns a view, and autograd copies what is written into a view.
        dropped = self.lora_dropout(x)
        rows = _as_rows(x)
        device = rows.device.type
        if rows.dtype == torch.float32 and device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
            rows = rows.to(torch.get_autocast_dtype(device))  # once, for the base and for A
        result = self._product(rows, weight)
        narrow = rows if dropped is x else _as_rows(dropped)
        if not narrow.dtype == A.dtype == result.dtype:
            # In the output's dtype: rounding the small matrices is cheaper than a wide copy of x.
            narrow, A, B = (tensor.to(result.dtype) for tensor in (narrow, A, B))
        result.addmm_(F.linear(narrow, A), self._full_B(B).T, alpha=self.scaling)
        return result if x.dim() == 2 else result.view(*x.shape[:-1], -1)

    def _lora_forward(self, x: Tensor) -> Tensor:
        # The scaling sits on the narrow product rather than in torch.add(alpha=), whose alpha inductor drops when it
        # fuses the sum with a product (2.13).
        x = self.lora_dropout(x)
        hidden = F.linear(x, self.lora_A.to(x.dtype)) * self.scaling
        return F.linear(hidden, self._full_B(self.lora_B.to(x.dtype)))

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        delta = self._full_B(B) @ A
        return delta.T if self.fan_in_fan_out else delta

    def _add_delta(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        B = self._full_B(B)
        factors = (A.T, B.T) if self.fan_in_fan_out else (B, A)
        return torch.addmm(weight, *factors, alpha=self.scaling)

    def _extra_repr(self) -> list[str]:
        return ["fan_in_fan_out=True"] if self.fan_in_fan_out else []


def _linear_product(layer: Any, rows: Tensor, weight: Tensor) -> Tensor:
    return F.linear(rows, weight.T if layer.fan_in_fan_out else weight, layer._tensor("bias"))


def _conv1d_product(layer: Any, rows: Tensor, weight: Tensor) -> Tensor:
    return torch.addmm(layer._tensor("bias"), rows, weight)


def is_conv1d(module: Any) -> bool:
    """Whether `module` is the Hugging Face class `Conv1D`, a linear layer with a transposed weight."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def matrix_shape(module: Any) -> tuple[int, int]:
    """Return how many inputs and outputs a linear layer has.

    >>> matrix_shape(nn.Linear(4, 6))
    (4, 6)
    """
    if is_conv1d(module):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features


def _as_rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class Linear(_Matrix, nn.Linear, LoRALayer):
    """`nn.Linear` with a low-rank update: (..., in_features) -> (..., out_features).

    >>> layer = Linear(8, 6, r=2, lora_alpha=4)
    >>> layer(torch.ones(3, 8)).shape, layer.lora_A.shape, layer.lora_B.shape
    (torch.Size([3, 6]), torch.Size([2, 8]), torch.Size([6, 2]))

    Args:
        in_features, out_features: sizes of the last axis of input and output.
        r, lora_alpha, lora_dropout, merge_weights: see `LoRALayer`.
        fan_in_fan_out: store `weight` as (in_features, out_features), as Hugging Face's `Conv1D` does.
        **kwargs: `bias`, `device`, `dtype` of `nn.Linear`.

    Raises:
        TypeError, ValueError: see `LoRALayer`.
    """

    _base_class, _product = nn.Linear, _linear_product
    forward, train, reset_parameters = _forward, _train, _reset_parameters

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,  # True if the layer to replace stores its weight as (in, out)
        merge_weights: bool = True,
        **kwargs: Any,
    ):
        check_hyperparameters(r, lora_alpha, lora_dropout)
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if fan_in_fan_out:
            self._transpose_weight()
        self._add_adapter(r, fan_in_fan_out=fan_in_fan_out)
        # A second time, as upstream does: the same seed then gives the same layer.
        self.reset_parameters()


class _Groups(_Matrix):
    """A linear layer that computes several projections at once."""

    enable_lora: list[bool]
    interleave = 1

    @classmethod
    def shapes(cls, layer: Any, settings: dict) -> tuple[tuple[int, ...], tuple[int, ...]]:
        pairs = zip(settings["group_sizes"], settings["enable_lora"], strict=True)
        sizes, r = [size for size, enabled in pairs if enabled], settings["r"]
        return (r * len(sizes), matrix_shape(layer)[0]), (sum(sizes), r)

    @property
    def group_sizes(self) -> list[int]:
        """How many rows each group has."""
        if "group_sizes" in vars(self):
            return vars(self)["group_sizes"]
        # Layers of 0.1.2, and clients' that go past the constructor, have equal shares.
        return [self.out_features // len(self.enable_lora)] * len(self.enable_lora)

    @group_sizes.setter
    def group_sizes(self, sizes: list[int]) -> None:
        vars(self)["group_sizes"] = sizes

    def _full_B(self, B: Tensor) -> Tensor:
        # Each block on its group's rows and columns, zero elsewhere: (n g, r) -> (o, n r).
        blocks, first = [], 0
        for size, enabled in zip(self.group_sizes, self.enable_lora, strict=True):
            blocks.append(B.narrow(0, first, size) if enabled else B.new_empty(size, 0))
            first += size if enabled else 0
        full = torch.block_diag(*blocks)
        if self.interleave > 1:
            starts = itertools.accumulate(self.group_sizes, initial=0)
            groups = [full.narrow(0, *rows) for rows in zip(starts, self.group_sizes, strict=False)]
            full = torch.cat([rows.unflatten(0, (self.interleave, -1)) for rows in groups], 1).flatten(0, 1)
        return full

    def _rows(self) -> Tensor:
        # For each row of lora_B the row of the output that it belongs to.
        turns = torch.arange(sum(self.group_sizes), device=self.lora_B.device).view(self.interleave, -1)
        groups = turns.split([size // self.interleave for size in self.group_sizes], dim=1)
        return torch.cat([rows.flatten() for rows, on in zip(groups, self.enable_lora, strict=True) if on])

    @property
    def lora_ind(self) -> Tensor:
        """Which rows of the output have an update, as booleans."""
        if "lora_ind" in vars(self):  # a client's
            return vars(self)["lora_ind"]
        return self.zero_pad(torch.ones(len(self.lora_B), dtype=torch.bool, device=self.lora_B.device))

    @lora_ind.setter
    def lora_ind(self, rows: Tensor) -> None:
        vars(self)["lora_ind"] = rows

    def zero_pad(self, x: Tensor) -> Tensor:
        """Return the rows `x` of the adapted groups among zeros for the others: (n g, ...) -> (o, ...)."""
        result = x.new_zeros(sum(self.group_sizes), *x.shape[1:])
        result[self._rows()] = x
        return result

    def merge_AB(self) -> Tensor:
        """Return B A in the layout of `weight`, unscaled, as 0.1.2's method of that name does."""
        return self._delta(self.lora_A, self.lora_B)

    def _extra_repr(self) -> list[str]:
        parts = [f"enable_lora={self.enable_lora}"]
        if len(set(self.group_sizes)) > 1:
            parts.append(f"group_sizes={self.group_sizes}")
        if self.interleave > 1:
            parts.append(f"interleave={self.interleave}")
        return [*parts, *super()._extra_repr()]


class MergedLinear(_Groups, nn.Linear, LoRALayer):
    """A linear layer that computes several projections at once, some of them with a low-rank update of their own.

    (..., in_features) -> (..., out_features), the output being `len(enable_lora)` groups, such as q, k and v of GPT-2's
    `c_attn`. Section 4.2 of the paper adapts q and v.

    >>> layer = MergedLinear(128, 384, r=2, enable_lora=[True, False, True])
    >>> layer.lora_A.shape, layer.lora_B.shape
    (torch.Size([4, 128]), torch.Size([256, 2]))

    Four query heads of size 32 that share one key and one value head:

    >>> layer = MergedLinear(128, 192, r=2, enable_lora=[True, False, True], group_sizes=[128, 32, 32])
    >>> layer.lora_A.shape, layer.lora_B.shape
    (torch.Size([4, 128]), torch.Size([160, 2]))

    Args:
        in_features, out_features: sizes of the last axis of input and output.
        r: rank of each adapted group.
        lora_alpha, lora_dropout, merge_weights: see `LoRALayer`.
        enable_lora: for each group whether it is adapted; with none the layer is a plain one.
        fan_in_fan_out: store `weight` as (in_features, out_features).
        group_sizes: how many rows each group has; equal shares of `out_features` if not given.
        interleave: in how many turns the groups take their rows. 1: all of q, all of k, all of v. The number of heads:
            q, k, v of the first head, then of the second, as GPT-NeoX has it. `lora_B` is ordered by groups always.
        **kwargs: `bias`, `device`, `dtype` of `nn.Linear`.

    Raises:
        TypeError: see `LoRALayer`; or an entry of `enable_lora` is no boolean, of `group_sizes` no integer.
        ValueError: see `LoRALayer`; or the groups do not add up to `out_features` or do not divide by `interleave`.
    """

    _base_class, _product = nn.Linear, _linear_product
    forward, train, reset_parameters = _forward, _train, _reset_parameters

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        group_sizes: Sequence[int] | None = None,
        interleave: int = 1,
        **kwargs: Any,
    ):
        check_hyperparameters(r, lora_alpha, lora_dropout)
        groups = check_groups(out_features, enable_lora, group_sizes, interleave)
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if fan_in_fan_out:
            self._transpose_weight()
        self._add_adapter(r, fan_in_fan_out=fan_in_fan_out, **groups)
        self.reset_parameters()


def check_groups(
    out_features: int, enable_lora: Sequence[bool], group_sizes: Sequence[int] | None = None, interleave: int = 1
) -> dict:
    """Return the settings of a fused projection, complete; raise if they do not fit.

    >>> check_groups(6, [True, False, True])
    {'enable_lora': [True, False, True], 'group_sizes': [2, 2, 2], 'interleave': 1}
    """
    enable_lora = as_booleans(enable_lora)
    groups = len(enable_lora)
    if isinstance(interleave, bool) or not isinstance(interleave, numbers.Integral):
        raise TypeError(f"interleave={interleave!r}: must be an integer, not {type(interleave).__name__}")
    if interleave < 1:
        raise ValueError(f"interleave={interleave}: must be at least 1")
    if group_sizes is None:
        if not groups or out_features % groups:
            raise ValueError(
                f"enable_lora={enable_lora}: its length must divide out_features={out_features}, one entry per group"
            )
        group_sizes = [out_features // groups] * groups
    if not all(isinstance(size, numbers.Integral) and not isinstance(size, bool) for size in group_sizes):
        raise TypeError(f"group_sizes={group_sizes!r}: every entry must be an integer, the rows of one group")
    if len(group_sizes) != groups or sum(group_sizes) != out_features or min(group_sizes) < 1:
        raise ValueError(
            f"group_sizes={list(group_sizes)}: must be one positive size for each of the {groups} entries of "
            f"enable_lora, {out_features} (out_features) in all"
        )
    if any(size % interleave for size in group_sizes):
        raise ValueError(f"interleave={interleave}: must divide every size of a group, {list(group_sizes)}")
    return {"enable_lora": enable_lora, "group_sizes": list(group_sizes), "interleave": interleave}


def as_booleans(enable_lora: Sequence[bool]) -> list[bool]:
    """Return `enable_lora` as a list; raise if it is none of booleans, those of numpy and torch included.

    >>> as_booleans((True, False, True))
    [True, False, True]
    """
    given = getattr(enable_lora, "tolist", lambda: enable_lora)()
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"enable_lora={enable_lora!r}: must be a list of booleans, one per group")
    booleans = [getattr(enabled, "item", lambda enabled=enabled: enabled)() for enabled in given]
    if not all(isinstance(enabled, bool) for enabled in booleans):
        raise TypeError(
            f"enable_lora={list(enable_lora)}: every entry must be True or False, "
            f"for example {[bool(enabled) for enabled in booleans]}"
        )
    return booleans


class _Table(_Adapted):
    """An embedding."""

    embedding_dim: int
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool

    @classmethod
    def shapes(cls, layer: Any, settings: dict) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (settings["r"], layer.num_embeddings), (layer.embedding_dim, settings["r"])

    @staticmethod
    def draw(A: Tensor, B: Tensor) -> None:
        """Draw an adapter: A zero, B normal."""
        nn.init.zeros_(A)
        nn.init.normal_(B)

    def _plain_forward(self, x: Tensor) -> Tensor:
        # The rows of a merged weight are bounded already, and bounding happens in place.
        if self._aside is not None and self.max_norm is not None:
            return self._look_up(x, self._tensor("weight"), None)
        return super()._plain_forward(x)

    def _base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._look_up(x, weight, self.max_norm)

    def _look_up(self, x: Tensor, weight: Tensor, max_norm: float | None) -> Tensor:
        return F.embedding(x, weight, self.padding_idx, max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)

    def _lora_forward(self, x: Tensor) -> Tensor:
        rows = F.embedding(x, self.lora_A.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        return F.linear(rows * self.scaling, self.lora_B)

    def _sum(self, base: Tensor) -> Tensor:
        if self.max_norm is not None:
            base = torch.renorm(base, self.norm_type, 0, self.max_norm)
        return super()._sum(base)

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).T


class Embedding(_Table, nn.Embedding, LoRALayer):
    """`nn.Embedding` with a low-rank update: integer (...) -> (..., embedding_dim).

    The initialisation is the reverse of `Linear`'s: A, which is looked up, starts at zero and B is normal. The authors
    intend it so; the update starts at zero either way.

    >>> layer = Embedding(10, 4, r=2)
    >>> layer(torch.tensor([[1, 2, 3]])).shape, layer.lora_A.shape, layer.lora_B.shape
    (torch.Size([1, 3, 4]), torch.Size([2, 10]), torch.Size([4, 2]))

    Args:
        num_embeddings, embedding_dim: size of the table.
        r, lora_alpha, merge_weights: see `LoRALayer`.
        **kwargs: those of `nn.Embedding`. `max_norm` bounds the base rows only; `sparse` concerns the base only.

    Raises:
        TypeError, ValueError: see `LoRALayer`.
    """

    _base_class = nn.Embedding
    forward, train, reset_parameters = _forward, _train, _reset_parameters

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ):
        check_hyperparameters(r, lora_alpha, 0.0)
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, 0.0, merge_weights)
        self._add_adapter(r)
        if kwargs.get("_weight") is None:
            self.reset_parameters()
        else:  # from_pretrained() hands the table in
            self.reset_lora_parameters()


class _Kernel(_Adapted):
    """A convolution.

    With kernel (k_1, ..., k_d), p = k_1 rows (p = 1 for a 1-d kernel) and c = prod(kernel) / p columns:
        lora_A (r p, in c), lora_B (out / groups p, r p), and B A (out / groups p, in c), read in order, is the update
        of weight (out, in / groups, k_1, ..., k_d), or (in, out / groups, k_1, ...) of a transposed convolution.
    For a square 2-d kernel and for kernels of size 1 these are the shapes of 0.1.2.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int

    @classmethod
    def shapes(cls, layer: Any, settings: dict) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows, columns = _kernel_shape(layer)
        r = settings["r"]
        return (r * rows, layer.in_channels * columns), (layer.out_channels // layer.groups * rows, r * rows)

    @property
    def conv(self) -> nn.Module:
        """The plain convolution, on the same Parameters: what 0.1.2 has as an inner module."""
        if "_inner" in vars(self):  # with the hooks and attributes that it got
            return self._inner
        inner = vars(self)["_inner"] = self._base_class.__new__(self._base_class)
        nn.Module.__init__(inner)
        own = {key: value for key, value in vars(self).items() if key[0] != "_" and key not in self.settings}
        vars(inner).update(own, _reversed_padding_repeated_twice=self._reversed_padding_repeated_twice)
        vars(inner)["_parameters"] = _ParametersOf(self)
        return inner

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "conv":
            return super().__setattr__(name, value)
        sizes = ("in_channels", "out_channels", "kernel_size", "groups")
        if not isinstance(value, self._base_class) or any(getattr(value, k) != getattr(self, k) for k in sizes):
            raise ValueError(f"conv={value}: must be a {self._base_class.__name__} of the layer's own sizes, {self}")
        plain = {key: setting for key, setting in vars(value).items() if key[0] != "_" and key != "training"}
        vars(self).update(plain, _reversed_padding_repeated_twice=value._reversed_padding_repeated_twice)
        self._parameters.update(value._parameters)  # into a merged layer as a merged weight, as in 0.1.2
        vars(self).pop("_inner", None)

    def __getattr__(self, name: str) -> Any:
        # torch.nn.utils.prune, given the inner layer, makes the weight an attribute of it.
        if name == "weight" and "weight" not in self._parameters and "_inner" in vars(self):
            return self._inner.weight
        return super().__getattr__(name)

    def _plain_forward(self, x: Tensor) -> Tensor:
        return self._inner(x) if "_inner" in vars(self) else super()._plain_forward(x)

    def _base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._convolve(x, weight, self._tensor("bias"))

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not isinstance(self, nn.modules.conv._ConvTransposeNd):
            return self._conv_forward(x, weight, bias)
        layer: Any = self
        dimensions = len(layer.kernel_size)
        sizes = layer.stride, layer.padding, layer.kernel_size, dimensions, layer.dilation
        output_padding = layer._output_padding(x, None, *sizes)
        function = getattr(F, f"conv_transpose{dimensions}d")
        return function(x, weight, bias, *sizes[:2], output_padding, self.groups, layer.dilation)

    def _adapted_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        # A client's own convolution may compute with any function of the weight.
        of_torch = type(self)._conv_forward in _CONV_FORWARDS  # type: ignore[attr-defined]
        drops = self.training and self.lora_dropout is not _identity
        if of_torch and (drops or self._narrow_is_cheaper(x)):
            return super()._adapted_forward(x, weight)
        delta = self._scaled_delta(torch.promote_types(weight.dtype, self._tensor("lora_A").dtype))
        return self._base_forward(x, (weight + delta).to(weight.dtype))

    def _scaled_delta(self, dtype: torch.dtype) -> Tensor:
        device = self._tensor("lora_A").device
        with _full_precision(device):
            return self._delta(self.lora_A.to(dtype), self.lora_B.to(dtype)) * self.scaling

    def _narrow_is_cheaper(self, x: Any) -> bool:
        # Either a convolution to r p p channels and a mixing of those, or B A, the sum and the gradient of a whole
        # weight: by their products, and by the numbers that they move, one of which takes as long as some hundred
        # products. The products of few channels run at a third of the speed.
        if self.groups > 1 or not isinstance(x, Tensor) or isinstance(self, nn.modules.conv._ConvTransposeNd):
            return False  # with groups the rows of B A do not fall into groups; such a weight is small
        rows, columns = _kernel_shape(self)
        rank, kernel, size = self.lora_B.shape[1], rows * columns, self._tensor("weight").numel()
        places = x.numel() // self.in_channels // math.prod(self.stride)
        narrow = 3 * places * rank * rows * (self.in_channels * kernel + self.out_channels)
        narrow += 400 * places * self.out_channels
        whole = size * rank + 80 * size
        if not (torch.is_grad_enabled() and self.lora_A.requires_grad):
            return narrow < whole
        return 3 * narrow < 3 * whole + places * size

    def _lora_forward(self, x: Tensor) -> Tensor:
        narrow = self._narrow_is_cheaper(x)
        x = self.lora_dropout(x)
        if not narrow:
            return self._convolve(x, self._scaled_delta(self.lora_A.dtype).to(x.dtype), None)
        # Row o of the update is p rows of B A side by side, hence B as (out, p r p) times p copies of A on a diagonal:
        # a convolution to p r p channels and one by a kernel of size 1.
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        rows = B.shape[0] // self.out_channels
        kernel = torch.block_diag(*[A] * rows).view(-1, self.in_channels, *self.kernel_size)
        mix = B.reshape(self.out_channels, -1, *[1] * len(self.kernel_size))
        hidden = self._convolve(x, kernel, None) * self.scaling
        return getattr(F, f"conv{len(self.kernel_size)}d")(hidden, mix)

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).view(self._tensor("weight").shape)

    def _load_from_state_dict(self, state: dict, prefix: str, *args: Any) -> None:
        # Upstream keeps the convolution one level down, and its main branch writes the weight under both names.
        for name in ("weight", "bias"):
            if prefix + "conv." + name in state:
                state.setdefault(prefix + name, state.pop(prefix + "conv." + name))
        super()._load_from_state_dict(state, prefix, *args)

    def __setstate__(self, state: dict) -> None:
        inner = state["_modules"].get("conv")
        if inner is not None:  # of loralib 0.1.2
            if not isinstance(self, type(inner)):
                self.__class__ = _with_convolution(type(self), type(inner))
            parameters = {**inner._parameters, **state["_parameters"]}
            modules = {name: module for name, module in state["_modules"].items() if name != "conv"}
            state = {**vars(inner), **state, "_parameters": parameters, "_modules": modules}
        super().__setstate__(state)


_CONV_FORWARDS = [cls._conv_forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)]


def _kernel_shape(layer: Any) -> tuple[int, int]:
    rows = layer.kernel_size[0] if len(layer.kernel_size) > 1 else 1
    return rows, math.prod(layer.kernel_size) // rows


class _ParametersOf(MutableMapping):
    """The weight and bias of an adapted layer, live: the `_parameters` of the plain layer within it."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __getitem__(self, name: str) -> Any:
        if name.startswith("lora_"):
            raise KeyError(name)
        return self.layer._parameters[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.layer._parameters[name] = value

    def __delitem__(self, name: str) -> None:
        del self.layer._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in self.layer._parameters if not name.startswith("lora_")])

    def __len__(self) -> int:
        return len(list(iter(self)))


class ConvLoRA(_Kernel, LoRALayer):
    """A convolution with a low-rank update; `Conv1d`, `Conv2d` and `Conv3d` are this of torch's.

    >>> layer = ConvLoRA(nn.ConvTranspose2d, 4, 8, 3, stride=2, r=2)
    >>> layer(torch.ones(1, 4, 5, 5)).shape, isinstance(layer, nn.ConvTranspose2d)
    (torch.Size([1, 8, 11, 11]), True)

    Args:
        conv_module: `nn.Conv2d`, `nn.ConvTranspose2d` or another convolution of torch, or what makes one.
        in_channels, out_channels, kernel_size: those of `conv_module`.
        r, lora_alpha, lora_dropout, merge_weights: see `LoRALayer`.
        **kwargs: the other arguments of `conv_module`.

    Raises:
        TypeError, ValueError: see `LoRALayer`; or `conv_module` makes no convolution.
    """

    train, reset_parameters = _train, _reset_parameters

    def __init__(
        self,
        conv_module: Callable[..., nn.Module],
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ):
        check_hyperparameters(r, lora_alpha, lora_dropout)
        convolution = conv_module(in_channels, out_channels, kernel_size, **kwargs)
        if not isinstance(convolution, nn.modules.conv._ConvNd):
            raise TypeError(f"conv_module={conv_module!r}: must make a convolution of torch, such as nn.Conv2d")
        if not isinstance(self, type(convolution)):
            self.__class__ = _with_convolution(type(self), type(convolution))
        nn.Module.__init__(self)
        vars(self).update(vars(convolution))
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self._add_adapter(r)
        self.reset_parameters()

    def forward(self, x: Any = None, input: Any = None) -> Tensor:
        """Return the convolution with the weight W + scaling * B A."""
        return _forward(self, input, x)


class Conv1d(ConvLoRA, nn.Conv1d):  # type: ignore[misc]
    """`nn.Conv1d` with a low-rank update: (batch, in_channels, length) -> (batch, out_channels, length').

    >>> layer = Conv1d(4, 8, 3, r=2, padding=1)
    >>> layer(torch.ones(1, 4, 5)).shape, layer.lora_A.shape, layer.lora_B.shape
    (torch.Size([1, 8, 5]), torch.Size([2, 12]), torch.Size([8, 2]))

    Args:
        in_channels, out_channels, kernel_size: those of `nn.Conv1d`.
        r, lora_alpha, lora_dropout, merge_weights: see `LoRALayer`.
        **kwargs: the other arguments of `nn.Conv1d` (`stride`, `padding`, `dilation`, `groups`, `padding_mode`, ...).

    Raises:
        TypeError, ValueError: see `LoRALayer`.
    """

    _base_class = nn.Conv1d

    def __init__(self, *args: Any, **kwargs: Any):
        ConvLoRA.__init__(self, nn.Conv1d, *args, **kwargs)


class Conv2d(ConvLoRA, nn.Conv2d):  # type: ignore[misc]
    """`nn.Conv2d` with a low-rank update: (batch, in_channels, height, width) -> (batch, out_channels, ...).

    >>> layer = Conv2d(4, 8, (3, 5), r=2)
    >>> layer(torch.ones(1, 4, 7, 7)).shape, layer.lora_A.shape, layer.lora_B.shape
    (torch.Size([1, 8, 5, 3]), torch.Size([6, 20]), torch.Size([24, 6]))

    Args and Raises: those of `Conv1d`, with a kernel of two axes.
    """

    _base_class = nn.Conv2d

    def __init__(self, *args: Any, **kwargs: Any):
        ConvLoRA.__init__(self, nn.Conv2d, *args, **kwargs)


class Conv3d(ConvLoRA, nn.Conv3d):  # type: ignore[misc]
    """`nn.Conv3d` with a low-rank update: (batch, in_channels, depth, height, width) -> (batch, out_channels, ...).

    >>> layer = Conv3d(4, 8, 3, r=2)
    >>> layer(torch.ones(1, 4, 5, 5, 5)).shape, layer.lora_A.shape, layer.lora_B.shape
    (torch.Size([1, 8, 3, 3, 3]), torch.Size([6, 36]), torch.Size([24, 6]))

    Args and Raises: those of `Conv1d`, with a kernel of three axes.
    """

    _base_class = nn.Conv3d

    def __init__(self, *args: Any, **kwargs: Any):
        ConvLoRA.__init__(self, nn.Conv3d, *args, **kwargs)


# What `adapted` gives for the classes that have a name of their own.
_PUBLIC: dict[tuple[type, type], Any] = {
    (nn.Linear, _Matrix): Linear,
    (nn.Linear, _Groups): MergedLinear,
    (nn.Embedding, _Table): Embedding,
    **{(cls._base_class, _Kernel): cls for cls in (Conv1d, Conv2d, Conv3d)},
}
