"""Layers with a low-rank update: y = W x + b + scaling * B A x, scaling = lora_alpha / r.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1. W and b belong to the
replaced layer and stay frozen; A and B are trained. The axes below: i `in_features`, o `out_features`, r the rank,
V `num_embeddings`, d `embedding_dim`, g the rows of one adapted group of a fused projection (all of one size, unless
`group_sizes` says otherwise), n the number of adapted groups.

| layer        | weight                | lora_A    | lora_B    | starts as        |
|--------------|-----------------------|-----------|-----------|------------------|
| Linear       | (o, i)                | (r, i)    | (o, r)    | A random, B zero |
| MergedLinear | (o, i)                | (n r, i)  | (n g, r)  | A random, B zero |
| Embedding    | (V, d)                | (r, V)    | (d, r)    | A zero, B normal |
| Conv*        | (o, i/groups, k...)   | see _Conv | see _Conv | A random, B zero |

The sizes of `MergedLinear(128, 384, r=2, enable_lora=[True, False, True])`, fused q, k and v with q and v adapted:
    weight (384, 128), three groups of g = 128 rows; n = 2
    lora_A (4, 128): rows 0-1 belong to q, rows 2-3 to v
    lora_B (256, 2): rows 0-127 belong to q, rows 128-255 to v
    B as one block matrix (384, 4): q in [0:128, 0:2], zeros for k, v in [256:384, 2:4]
    x (..., 128) -> x A^T (..., 4) -> (x A^T) B^T (..., 384)

Two laws hold in every state (training, eval, merged or not, after loading, moving, copying):
1. `forward` is the base plus scaling * B A (dropout aside), up to the dtype's rounding.
2. `state_dict()` holds the base weight, never the merged one; merging never writes to it, so unmerging is exact.

The registered `weight` is therefore always the base. A merged layer keeps W + scaling * B A beside it, made at first
use and again whenever A, B, `scaling` or W have changed; the attribute `weight` then reads as that merged value. The
price is a copy of the adapted weights; `merge_weights=False`, or `merge_and_unload` for deployment, avoids it. Layers
that `torch.distributed.fsdp.fully_shard` shards stay unmerged, as every process would keep the whole copy. Two
limits: what is written into the attribute `weight` of a merged layer goes to that copy and is lost; and a write that
leaves no trace in torch's version counters (through `.data` of W anywhere or of A and B off the CPU, or by a fused
optimizer without a forward before it) shows after the next `train()`, `eval()` or merge only.
"""

import contextlib
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoRALayer", "MergedLinear"]

_Layer = TypeVar("_Layer", bound="LoRALayer")


class LoRALayer(nn.Module):
    """The half that all LoRA layers share: scaling, merging, state; mixed into a `torch.nn` layer in front of it.

    >>> layer = Linear(4, 6, r=2, lora_alpha=4)
    >>> isinstance(layer, LoRALayer), layer.scaling, layer.merged
    (True, 2.0, False)

    A subclass registers `lora_A` and `lora_B` with `_add_adapter` and defines `_base_forward`, `_lora_forward` (or
    `_adapted_forward` as a whole) and `_delta`.

    Args:
        r: rank of the update; 0 means a plain layer without adapter.
        lora_alpha: numerator of `scaling`.
        lora_dropout: probability of dropping an input of the low-rank branch (never of the base) in training.
        merge_weights: whether `eval()` merges.

    Raises:
        TypeError: `r` is not an integer or `lora_alpha`, `lora_dropout` not a number.
        ValueError: `r` is negative, `lora_alpha` not finite, or `lora_dropout` outside [0, 1].
    """

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    # Class defaults, because torch's constructors call reset_parameters() before __init__ below has run.
    merged = False
    _disabled = False
    _sharded = False
    _merge_cache: tuple | None = None
    # The class a subclass extends and the names of its arguments, `bias` aside.
    _plain_class: type[nn.Module]
    _plain_arguments: tuple[str, ...]

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool):
        check_hyperparameters(r, lora_alpha, lora_dropout)
        self.r = r
        self.lora_alpha = lora_alpha
        self.scaling = lora_alpha / r if r > 0 else 0.0
        self.lora_dropout = Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.merged = False
        self.merge_weights = merge_weights

    # What a subclass supplies.

    def _base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """The plain layer's output with `weight` in place of its own."""
        raise NotImplementedError

    def _lora_forward(self, x: Tensor) -> Tensor:
        """The update's output, dropout and scaling included, without forming B A where that would cost more."""
        raise NotImplementedError

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        """B A in the layout of `weight`, unscaled."""
        raise NotImplementedError

    def _drop(self, x: Tensor) -> Tensor:
        return x if self.merged or not self.training else self.lora_dropout(x)

    def _dropped(self, x: Tensor) -> tuple[Tensor, float]:
        # With the factor that scales what was kept, which costs less on a narrow product than on x.
        dropout = self._modules["lora_dropout"]
        if self.merged or not self.training or type(dropout) is nn.Identity:
            return x, 1.0
        return dropout.drop(x) if isinstance(dropout, Dropout) else (self._drop(x), 1.0)

    def _add_adapter(self, shape_A: tuple[int, int], shape_B: tuple[int, int]) -> None:
        self.lora_A = nn.Parameter(self.weight.new_zeros(shape_A))
        self.lora_B = nn.Parameter(self.weight.new_zeros(shape_B))
        self.weight.requires_grad = False

    def _reset_base(self) -> None:
        super().reset_parameters()  # type: ignore[misc]  # the torch layer's, which comes next in the MRO

    # What is the same for every layer.

    @property
    def has_adapter(self) -> bool:
        """Whether the layer has LoRA parameters (false for r = 0 and for a `MergedLinear` with nothing enabled)."""
        return "lora_A" in self._parameters or hasattr(self, "lora_A")

    def _tensor(self, name: str) -> Any:
        # Several times quicker than the attribute. That serves what torch.nn.utils turned into something computed, and
        # replicas of nn.DataParallel, which hold plain tensors.
        parameters = self._parameters
        return parameters[name] if name in parameters else getattr(self, name)

    @property
    def _base_weight(self) -> Tensor:
        return self._tensor("weight")

    def forward(self, x: Tensor) -> Tensor:
        if self.merged and self._uses_merged_weight():
            return self._base_forward(x, self.weight)
        if self._disabled or not self.has_adapter:
            return self._base_forward(x, self._base_weight)
        return self._adapted_forward(x)

    def _adapted_forward(self, x: Tensor) -> Tensor:
        result = self._base_forward(x, self._base_weight)
        return result + self._lora_forward(x).to(result.dtype)

    def delta_weight(self) -> Tensor:
        """Return scaling * B A in the layout of `weight`, in float32 or wider.

        Of a layer that `fully_shard` shards, all processes have to ask for it together.

        >>> layer = Linear(4, 6, r=2)
        >>> layer.delta_weight().shape, layer.delta_weight().abs().sum().item()
        (torch.Size([6, 4]), 0.0)
        """
        if not self.has_adapter:
            return torch.zeros_like(self._base_weight)
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        with _full_precision(self.lora_A.device):
            return self.scaling * self._delta(*(whole(tensor).to(dtype) for tensor in (self.lora_A, self.lora_B)))

    def reset_parameters(self) -> None:
        """Draw the base and the adapter anew, as a newly constructed layer has them."""
        merged, self.merged = self.merged, False  # torch writes through `weight`, which has to mean the base
        self._reset_base()
        self.reset_lora_parameters()
        self.merged = merged

    def reset_lora_parameters(self) -> None:
        """Draw the adapter anew: A as `nn.Linear` draws its weight, B zero; the update is then zero (section 4.1)."""
        if self.has_adapter:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    def train(self: _Layer, mode: bool = True) -> _Layer:
        """Set training mode, which unmerges, or evaluation mode, which merges if `merge_weights`; return the layer."""
        super().train(mode)
        self._merge_cache = None
        self.merged = not mode and (self.merged or self.merge_weights) and not self._is_sharded()
        return self

    def plain_layer(self) -> nn.Module:
        """Return the `torch.nn` layer that this one is without its adapter, on the same Parameter objects.

        >>> Linear(4, 6, r=2).plain_layer()
        Linear(in_features=4, out_features=6, bias=True)
        """
        plain = self._plain_class(**constructor_arguments(self, self._plain_arguments), device="meta")
        plain._parameters = {name: self._parameters[name] for name in plain._parameters}
        return plain.train(self.training)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"r={self.r}", f"lora_alpha={self.lora_alpha}"]
        if self.has_adapter and self.scaling != self.lora_alpha / self.r:
            parts.append(f"scaling={self.scaling:.6g}")
        return ", ".join(parts + self._extra_repr() + (["merged"] if self.merged else []))

    def _extra_repr(self) -> list[str]:
        return []

    # Merging: `weight` reads as the merged value, which is a cache; nothing registered changes.

    def _is_sharded(self) -> bool:
        # Remembered, because in a forward, and at the root also after one, fully_shard puts ordinary Parameters in.
        if any(map(is_sharded, self._parameters.values())):
            self._sharded, self.merged, self._merge_cache = True, False, None
        return self._sharded

    def _uses_merged_weight(self) -> bool:
        # A compiled graph cannot ask whether the cache is stale, and the cache has no gradient to give to the adapter;
        # the low-rank path is exact in both cases. Tensors put in by torch.func are no Parameters and are not cached.
        if self._disabled or not self.has_adapter or torch.compiler.is_compiling():
            return False
        tensors = self._base_weight, self.lora_A, self.lora_B
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            self._merge_cache = None  # a fused optimizer step may follow, which leaves no trace in version counters
            return False
        return all(isinstance(tensor, nn.Parameter) for tensor in tensors)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        # Reached for "weight" because nn.Module keeps parameters outside the instance's attributes. One who comes here
        # is fully_shard, before its first forward; what it gets is the base for it from then on.
        if name == "weight" and self.has_adapter and not self._is_sharded() and self.merged and not self._disabled:
            return self._merged_weight()
        return super().__getattr__(name)

    def _merged_weight(self) -> Tensor:
        cache, made_from = self._merge_cache, self._cache_key()
        if cache is None or not _same_key(cache[0], made_from) or not all(map(torch.equal, self._compared(), cache[1])):
            # Outside inference mode, so that the tensor can be used in and out of it.
            with torch.inference_mode(False), torch.no_grad():
                merged = self._merge(self._base_weight.detach())
                adapter = [tensor.detach().clone() for tensor in self._compared()]
            cache = made_from, adapter, merged
            if all(
                isinstance(tensor, nn.Parameter) for tensor in made_from[1]
            ):  # torch.func's must not outlive its call
                self._merge_cache = cache
        return cache[2]

    def _merge(self, base: Tensor) -> Tensor:
        if is_quantized(base):
            base = base.dequantize()
        dtype = torch.promote_types(torch.promote_types(base.dtype, self.lora_A.dtype), torch.float32)
        with _full_precision(base.device):
            merged = self._add_delta(*(tensor.to(dtype) for tensor in (base, self.lora_A, self.lora_B)))
        return merged.to(base.dtype)

    def _add_delta(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return weight + self.scaling * self._delta(A, B)

    def _cache_key(self) -> tuple:
        tensors = self._base_weight, self.lora_A, self.lora_B
        return self.scaling, tensors, [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]

    def _compared(self) -> list[Tensor]:
        # Writes through `.data` leave no trace in version counters. Elsewhere than on a CPU the comparison would stall.
        return [tensor for tensor in (self.lora_A, self.lora_B) if tensor.is_cpu]

    def _apply(self: _Layer, *args: Any, **kwargs: Any) -> _Layer:
        self._merge_cache = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_merge_cache": None}


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
    for name, value in (("lora_alpha", lora_alpha), ("lora_dropout", lora_dropout)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}={value!r}: must be a number, not {type(value).__name__}")
    if not _is_finite(lora_alpha):
        raise ValueError(f"lora_alpha={lora_alpha}: must be finite")
    if not 0 <= lora_dropout <= 1:
        raise ValueError(f"lora_dropout={lora_dropout}: must be a probability between 0 and 1")


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer that no float reaches
        return False


def constructor_arguments(layer: nn.Module, names: tuple[str, ...]) -> dict:
    """Return the arguments that `layer` was made with: the attributes `names`, and `bias` as a boolean.

    >>> constructor_arguments(nn.Linear(4, 6), ("in_features", "out_features"))
    {'in_features': 4, 'out_features': 6, 'bias': True}
    """
    arguments = {name: getattr(layer, name) for name in names}
    if "bias" in layer._parameters:
        arguments["bias"] = layer.bias is not None
    return arguments


def is_quantized(weight: Tensor) -> bool:
    """Whether `weight` is of a tensor subclass that stores rounded values and knows how to restore them (torchao).

    >>> is_quantized(nn.Linear(4, 4).weight)
    False
    """
    return type(weight).dequantize is not Tensor.dequantize


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
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _same_key(then: tuple, now: tuple) -> bool:
    return then[0] == now[0] and then[2] == now[2] and all(a is b for a, b in zip(then[1], now[1], strict=True))


class Dropout(nn.Dropout):
    """`nn.Dropout`, but on a CPU several times quicker, and one byte an element kept for the backward instead of four.

    There `p` is rounded to a multiple of 1 / 65536, and what is kept is scaled by what was kept: the mean is x's.

    >>> dropout = Dropout(0.5)
    >>> sorted(set(dropout(torch.ones(100)).tolist())), dropout.eval()(torch.ones(2)).tolist()
    ([0.0, 2.0], [1.0, 1.0])
    """

    def forward(self, x: Tensor) -> Tensor:
        x, factor = self.drop(x)
        return x if factor == 1 else x.mul_(factor)

    def drop(self, x: Tensor) -> tuple[Tensor, float]:
        """Return what is kept, and the factor that it still lacks.

        >>> Dropout(0.5).eval().drop(torch.ones(2))
        (tensor([1., 1.]), 1.0)
        """
        plain = type(x) is Tensor and not x.is_nested and x.device.type == "cpu"
        dropped = round(self.p * 65536)
        if not self.training or not plain or dropped == 65536 or torch.compiler.is_compiling():
            return super().forward(x), 1.0
        if torch._C._functorch.is_functorch_wrapped_tensor(x):  # in torch 2.5 vmap knows no view as another dtype
            return super().forward(x), 1.0
        # A draw of 64 bits takes as long as one of 32, and 16 decide an element.
        draws = x.new_empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 32768
        return torch.where(keep, x, 0.0), 65536 / (65536 - dropped)


class _Linear(LoRALayer, nn.Linear):
    """What `Linear` and `MergedLinear` share; they differ in the (o, A's rows) matrix that B stands for, `_full_B`."""

    fan_in_fan_out = False
    _plain_class = nn.Linear
    _plain_arguments = ("in_features", "out_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        fan_in_fan_out: bool,
        merge_weights: bool,
        shapes: tuple[tuple[int, int], tuple[int, int]],
        **kwargs: Any,
    ):
        check_hyperparameters(r, lora_alpha, lora_dropout)
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.fan_in_fan_out = fan_in_fan_out
        if fan_in_fan_out:
            self.weight = nn.Parameter(self.weight.new_empty(in_features, out_features))
        if 0 not in shapes[0]:
            self._add_adapter(*shapes)
        # A second time, as upstream does: the same seed then gives the same layer.
        self.reset_parameters()

    def _full_B(self, B: Tensor) -> Tensor:
        return B

    def _reset_base(self) -> None:
        if not self.fan_in_fan_out:
            return super()._reset_base()
        # nn.Linear would take the fan-in from the wrong axis of a transposed weight.
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, **like)
        with torch.no_grad():
            self.weight.copy_(plain.weight.T)
            if self.bias is not None:
                self.bias.copy_(plain.bias)

    def _base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.T if self.fan_in_fan_out else weight, self._tensor("bias"))

    def _adapted_forward(self, x: Tensor) -> Tensor:
        A, B = self._tensor("lora_A"), self._tensor("lora_B")
        if type(A) is not nn.Parameter or x.is_nested or torch.compiler.is_compiling():
            # Tensors of torch.func may be stacked and x not, nested ones have no shape, compilers fuse by themselves.
            return super()._adapted_forward(x)
        # Nobody else has the base's output yet, so the update is added in place, by the very product. In two axes: with
        # more, F.linear returns a view, and autograd copies what is written into a view.
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        device = rows.device.type
        if rows.dtype == torch.float32 and device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
            rows = rows.to(torch.get_autocast_dtype(device))  # once, for the base and for A
        result = self._base_forward(rows, self._base_weight)
        if not rows.dtype == A.dtype == result.dtype:
            # In the output's dtype: rounding the small matrices is cheaper than a wide copy of x.
            rows, A, B = (tensor.to(result.dtype) for tensor in (rows, A, B))
        rows, factor = self._dropped(rows)
        hidden = F.linear(rows, A)
        result.addmm_(hidden, self._full_B(B).T, alpha=self.scaling * factor)
        return result if x.dim() == 2 else result.view(*x.shape[:-1], -1)

    def _lora_forward(self, x: Tensor) -> Tensor:
        # The scaling sits on the narrow product rather than in torch.add(alpha=), whose alpha inductor drops when it
        # fuses the sum with a product (2.13).
        hidden = F.linear(self._drop(x), self.lora_A.to(x.dtype)) * self.scaling
        return F.linear(hidden, self._full_B(self.lora_B.to(x.dtype)))

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        delta = self._full_B(B) @ A
        return delta.T if self.fan_in_fan_out else delta

    def _add_delta(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        B = self._full_B(B)
        factors = (A.T, B.T) if self.fan_in_fan_out else (B, A)
        return torch.addmm(weight, *factors, alpha=self.scaling)

    def plain_layer(self) -> nn.Module:
        plain = super().plain_layer()
        if self.fan_in_fan_out:
            plain.weight = nn.Parameter(self._base_weight.detach().T.contiguous(), requires_grad=False)
        return plain

    def _extra_repr(self) -> list[str]:
        return ["fan_in_fan_out=True"] if self.fan_in_fan_out else []


class Linear(_Linear):
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
        shapes = (r, in_features), (out_features, r)
        super().__init__(
            in_features, out_features, r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights, shapes, **kwargs
        )


class MergedLinear(_Linear):
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
        enable_lora = as_booleans(enable_lora)
        group_sizes = _group_sizes(out_features, enable_lora, group_sizes, interleave)
        enabled_sizes = [size for size, enabled in zip(group_sizes, enable_lora, strict=True) if enabled]
        shapes = (r * len(enabled_sizes), in_features), (sum(enabled_sizes), r)
        super().__init__(
            in_features, out_features, r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights, shapes, **kwargs
        )
        self.enable_lora = enable_lora
        self.group_sizes = group_sizes
        self.interleave = interleave

    def _full_B(self, B: Tensor) -> Tensor:
        # Each block on its group's rows and columns, zero elsewhere: (n g, r) -> (o, n r).
        groups = list(zip(self.group_sizes, self.enable_lora, strict=True))
        blocks = iter(B.split([size for size, enabled in groups if enabled]))
        full = torch.block_diag(*(next(blocks) if enabled else B.new_empty(size, 0) for size, enabled in groups))
        if self.interleave > 1:
            turns = [rows.unflatten(0, (self.interleave, -1)) for rows in full.split(self.group_sizes)]
            full = torch.cat(turns, 1).flatten(0, 1)
        return full

    def _extra_repr(self) -> list[str]:
        parts = [f"enable_lora={self.enable_lora}"]
        if len(set(self.group_sizes)) > 1:
            parts.append(f"group_sizes={self.group_sizes}")
        if self.interleave > 1:
            parts.append(f"interleave={self.interleave}")
        return [*parts, *super()._extra_repr()]


def _group_sizes(
    out_features: int, enable_lora: list[bool], group_sizes: Sequence[int] | None, interleave: int
) -> list[int]:
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
    return list(group_sizes)


def as_booleans(enable_lora: Sequence[bool]) -> list[bool]:
    """Return `enable_lora` as a list; raise if it is none of booleans.

    >>> as_booleans((True, False, True))
    [True, False, True]
    """
    if isinstance(enable_lora, str) or not isinstance(enable_lora, Sequence):
        raise TypeError(f"enable_lora={enable_lora!r}: must be a list of booleans, one per group")
    if not all(isinstance(enabled, bool) for enabled in enable_lora):
        raise TypeError(
            f"enable_lora={list(enable_lora)}: every entry must be True or False, "
            f"for example {[bool(enabled) for enabled in enable_lora]}"
        )
    return list(enable_lora)


class Embedding(LoRALayer, nn.Embedding):
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

    _plain_class = nn.Embedding
    _plain_arguments = (
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    )

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
        if r > 0:
            self._add_adapter((r, num_embeddings), (embedding_dim, r))
        if kwargs.get("_weight") is None:
            self.reset_parameters()
        else:  # from_pretrained() hands the table in
            self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Draw the adapter anew: A zero, B normal."""
        if self.has_adapter:
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)

    def _base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        # The rows of a merged weight are bounded already, and bounding happens in place.
        max_norm = self.max_norm if weight is self._base_weight else None
        return F.embedding(x, weight, self.padding_idx, max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)

    def _lora_forward(self, x: Tensor) -> Tensor:
        rows = F.embedding(x, self.lora_A.T, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        return F.linear(rows * self.scaling, self.lora_B)

    def _merge(self, base: Tensor) -> Tensor:
        if self.max_norm is not None:
            base = torch.renorm(base, self.norm_type, 0, self.max_norm)
        return super()._merge(base)

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).T


class _Conv(LoRALayer, nn.modules.conv._ConvNd):
    """What the convolutions share; mixed in before `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.

    With kernel (k_1, ..., k_d), p = k_1 rows (p = 1 for a 1-d kernel) and c = prod(kernel) / p columns:
        lora_A (r p, in c), lora_B (out / groups p, r p), and B A (out / groups p, in c), read in order, is the update
        of weight (out, in / groups, k_1, ..., k_d).
    For a square 2-d kernel and for kernels of size 1 these are upstream's shapes.
    """

    _plain_arguments = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )
    _pointwise: Callable[..., Tensor]

    def __init__(
        self,
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
        self._plain_class.__init__(self, in_channels, out_channels, kernel_size, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if r > 0:
            rows = self.kernel_size[0] if len(self.kernel_size) > 1 else 1
            columns = math.prod(self.kernel_size) // rows
            self._add_adapter((r * rows, in_channels * columns), (out_channels // self.groups * rows, r * rows))
        self.reset_parameters()

    @property
    def conv(self) -> nn.Module:
        """The layer itself, for code written for upstream's `layer.conv.weight`."""
        return self

    def _base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)

    def _lora_forward(self, x: Tensor) -> Tensor:
        A, B, x = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype), self._drop(x)
        if self.groups > 1:  # the rows of B A do not fall into groups; such a weight is small
            return self._conv_forward(x, self._delta(A, B) * self.scaling, None)
        # Row o of the update is p rows of B A side by side, hence B as (out, p r p) times p copies of A on a diagonal:
        # a convolution to p r p channels and one by a kernel of size 1.
        rows = B.shape[0] // self.out_channels
        kernel = torch.block_diag(*[A] * rows).view(-1, self.in_channels, *self.kernel_size)
        mix = B.reshape(self.out_channels, -1, *[1] * len(self.kernel_size))
        hidden = self._conv_forward(x, kernel, None) * self.scaling
        return self._pointwise(hidden, mix)

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).view(self._base_weight.shape)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # Upstream keeps the convolution one level down, and its main branch writes the weight under both names.
        for name in ("weight", "bias"):
            if prefix + "conv." + name in state_dict:
                state_dict.setdefault(prefix + name, state_dict.pop(prefix + "conv." + name))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Conv1d(_Conv, nn.Conv1d):
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

    _plain_class = nn.Conv1d
    _pointwise = staticmethod(F.conv1d)


class Conv2d(_Conv, nn.Conv2d):
    """`nn.Conv2d` with a low-rank update: (batch, in_channels, height, width) -> (batch, out_channels, ...).

    >>> layer = Conv2d(4, 8, (3, 5), r=2)
    >>> layer(torch.ones(1, 4, 7, 7)).shape, layer.lora_A.shape, layer.lora_B.shape
    (torch.Size([1, 8, 5, 3]), torch.Size([6, 20]), torch.Size([24, 6]))

    Args and Raises: those of `Conv1d`, with a kernel of two axes.
    """

    _plain_class = nn.Conv2d
    _pointwise = staticmethod(F.conv2d)


class Conv3d(_Conv, nn.Conv3d):
    """`nn.Conv3d` with a low-rank update: (batch, in_channels, depth, height, width) -> (batch, out_channels, ...).

    >>> layer = Conv3d(4, 8, 3, r=2)
    >>> layer(torch.ones(1, 4, 5, 5, 5)).shape, layer.lora_A.shape, layer.lora_B.shape
    (torch.Size([1, 8, 3, 3, 3]), torch.Size([6, 36]), torch.Size([24, 6]))

    Args and Raises: those of `Conv1d`, with a kernel of three axes.
    """

    _plain_class = nn.Conv3d
    _pointwise = staticmethod(F.conv3d)
