"""Layers with a low-rank update: y = W x + b + scaling * B A x, scaling = lora_alpha / r.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1. W and b belong to the
plain layer and stay frozen; A and B are trained. The axes below: i `in_features`, o `out_features`, r the rank,
V `num_embeddings`, d `embedding_dim`, g the rows of one adapted group of a fused projection (all of one size, unless
`group_sizes` says otherwise), n the number of adapted groups.

| layer        | weight                | lora_A       | lora_B       | starts as        |
|--------------|-----------------------|--------------|--------------|------------------|
| Linear       | (o, i)                | (r, i)       | (o, r)       | A random, B zero |
| MergedLinear | (o, i)                | (n r, i)     | (n g, r)     | A random, B zero |
| Embedding    | (V, d)                | (r, V)       | (d, r)       | A zero, B normal |
| Conv*        | (o, i/groups, k...)   | see `Kernel` | see `Kernel` | A random, B zero |

The sizes of `MergedLinear(128, 384, r=2, enable_lora=[True, False, True])`, fused q, k and v with q and v adapted:
    weight (384, 128), three groups of g = 128 rows; n = 2
    lora_A (4, 128): rows 0-1 belong to q, rows 2-3 to v
    lora_B (256, 2): rows 0-127 belong to q, rows 128-255 to v
    B as one block matrix (384, 4): q in [0:128, 0:2], zeros for k, v in [256:384, 2:4]
    x (..., 128) -> x A^T (..., 4) -> (x A^T) B^T (..., 384)

How the classes are built. `LoRALayer` is a plain class that holds hyperparameters, as in loralib 0.1.2. `loralib.core`
has the machinery: branch, merging, state. A kind (`Matrix`, `Groups`, `Table`, `Kernel`) is the arithmetic of one kind
of layer. A LoRA layer is a kind mixed into a `torch.nn` class, `class Linear(Matrix, nn.Linear, LoRALayer)`, and
`adapted(cls, kind)` makes such a class for any other class of layers, so that a layer of a model can be adapted where
it stands, by giving it another class.
"""

import itertools
import math
import numbers
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralib.core import (
    PUBLIC,
    Adapted,
    LoRALayer,
    _forward,
    _reset_parameters,
    _train,
    check_hyperparameters,
    full_precision,
    identity,
    with_convolution,
)


class Matrix(Adapted):
    """A linear layer. `Groups` differs in the (o, A's rows) matrix that B stands for, `_full_B`."""

    fan_in_fan_out = False
    in_features: int
    out_features: int
    # The base's own formula for the rows of a matrix, or None where only its class knows.
    _product: Any = None

    @classmethod
    def shapes(cls, layer: Any, settings: dict) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inputs, outputs = matrix_shape(layer)
        return (settings["r"], inputs), (outputs, settings["r"])

    @classmethod
    def members_for(cls, base: Any) -> dict:
        transposed = _conv1d_product if base.__name__ == "Conv1D" else None
        return {"_product": _linear_product if base.forward is nn.Linear.forward else transposed}

    def __getattr__(self, name: str) -> Any:
        # Of a layer made by hand, which torch's attention modules read past its forward.
        if name == "weight" and not torch.compiler.is_compiling() and sys._getframe(1).f_code in _READERS:
            weight = self._parameters.get("weight")
            if weight is not None and self.has_adapter and not self.merged and not self._disabled:
                return self._sum(weight)
        return super().__getattr__(name)

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
            return F.linear(x, self._tensor("weight").T, self._bias())
        return super()._plain_forward(x)

    def _base_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        if self._product is None and (weight is None or weight is self._tensor("weight")):
            return self._base_class.forward(self, x)
        return F.linear(x, weight.T if self.fan_in_fan_out else weight, self._bias())

    def _adapted_forward(self, x: Tensor, weight: Tensor) -> Tensor:
        A: Any = self._parameters.get("lora_A")
        B: Any = self._parameters.get("lora_B")
        # Tensors of torch.func may be stacked and x not, nested ones have no shape, compilers fuse by themselves.
        plain = type(A) is type(B) is nn.Parameter and isinstance(x, Tensor) and not x.is_nested
        if not plain or self._product is None or torch.compiler.is_compiling() or isinstance(self.scaling, Tensor):
            return super()._adapted_forward(x, weight)
        # Nobody else has the base's output yet, so the update is added in place, by the very product. In two axes: with
        # more, F.linear returns a view, and autograd copies what is written into a view.
        dropped = self.lora_dropout(x)
        rows = _as_rows(x)
        if torch._C._is_any_autocast_enabled() and rows.dtype == torch.float32:
            device = rows.device.type
            if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
                rows = rows.to(torch.get_autocast_dtype(device))  # once, for the base and for A
        result = self._product(rows, weight)
        narrow = rows if dropped is x else _as_rows(dropped)
        if not narrow.dtype == A.dtype == result.dtype:
            # In the output's dtype: rounding the small matrices is cheaper than a wide copy of x.
            narrow, A, B = (tensor.to(result.dtype) for tensor in (narrow, A, B))
        result.addmm_(F.linear(narrow, A), self._full_B(B).T, alpha=self.scaling)
        return result if x.dim() == 2 else result.view(*x.shape[:-1], result.shape[-1])

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
        if isinstance(self.scaling, Tensor):
            return super()._add_delta(weight, A, B)
        B = self._full_B(B)
        factors = (A.T, B.T) if self.fan_in_fan_out else (B, A)
        return torch.addmm(weight, *factors, alpha=self.scaling)

    def _extra_repr(self) -> list[str]:
        return ["fan_in_fan_out=True"] if self.fan_in_fan_out else []


_READERS = {nn.MultiheadAttention.forward.__code__, nn.TransformerEncoderLayer.forward.__code__}


def _linear_product(layer: Any, rows: Tensor, weight: Tensor) -> Tensor:
    return F.linear(rows, weight.T if layer.fan_in_fan_out else weight, layer._bias())


def _conv1d_product(layer: Any, rows: Tensor, weight: Tensor) -> Tensor:
    return torch.addmm(layer._bias(), rows, weight)


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


class Linear(Matrix, nn.Linear, LoRALayer):
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


class _EqualShares:
    # The `group_sizes` of layers of 0.1.2, and of clients' that go past the constructor: whoever has its own does not
    # get here. (A property that asks for them first is more than torch 2.5 can compile.)
    def __get__(self, layer: Any, owner: Any = None) -> Any:
        return self if layer is None else [layer.out_features // len(layer.enable_lora)] * len(layer.enable_lora)


class Groups(Matrix):
    """A linear layer that computes several projections at once."""

    enable_lora: list[bool]
    group_sizes: Any = _EqualShares()
    interleave = 1

    @classmethod
    def shapes(cls, layer: Any, settings: dict) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return cls.group_shapes(matrix_shape(layer)[0], settings)

    @staticmethod
    def group_shapes(inputs: int, settings: dict) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for that many inputs."""
        pairs = zip(settings["group_sizes"], settings["enable_lora"], strict=True)
        sizes, r = [size for size, enabled in pairs if enabled], settings["r"]
        return (r * len(sizes), inputs), (sum(sizes), r)

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
        groups = rows_of_groups(self.group_sizes, self.interleave)
        return torch.cat([rows for rows, on in zip(groups, self.enable_lora, strict=True) if on]).to(self.lora_B.device)

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


class MergedLinear(Groups, nn.Linear, LoRALayer):
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
            q, k, v of the first head, then of the second, as in GPT-NeoX. `lora_B` is always ordered by groups.
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


def rows_of_groups(group_sizes: Sequence[int], interleave: int = 1) -> list[Tensor]:
    """Return for each group of a fused projection its rows of the output.

    >>> rows_of_groups([4, 2], 2)
    [tensor([0, 1, 3, 4]), tensor([2, 5])]
    """
    turns = torch.arange(sum(group_sizes)).view(interleave, -1)
    return [rows.flatten() for rows in turns.split([size // interleave for size in group_sizes], dim=1)]


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


class Table(Adapted):
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


class Embedding(Table, nn.Embedding, LoRALayer):
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


class Kernel(Adapted):
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
    _inner: Any = None

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

    def _follow(self) -> None:
        # What was set on the inner layer, as code for 0.1.2 does.
        if self._inner is not None:
            vars(self).update({key: vars(self._inner)[key] for key in _SETTINGS if key in vars(self._inner)})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _SETTINGS and "_inner" in vars(self):
            setattr(self._inner, name, value)
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
        return self._convolve(x, weight, self._bias())

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
        self._follow()
        # A client's own convolution may compute with any function of the weight.
        of_torch = type(self)._conv_forward in _CONV_FORWARDS  # type: ignore[attr-defined]
        drops = self.training and self.lora_dropout is not identity
        if of_torch and (drops or self._narrow_is_cheaper(x)):
            return super()._adapted_forward(x, weight)
        A = self._tensor("lora_A")
        dtype = torch.promote_types(weight.dtype, A.dtype)
        with full_precision(A.device):
            weight_and_update = self._add_delta(weight.to(dtype), self.lora_A.to(dtype), self.lora_B.to(dtype))
        return self._base_forward(x, weight_and_update.to(weight.dtype))

    def _narrow_is_cheaper(self, x: Any) -> bool:
        # Either p convolutions to r p channels of a p-th of the input and a mixing of those, or B A, the sum and the
        # gradient of a whole weight: by their products, and by the numbers that they move, one of which takes as long
        # as some hundred products. The products of few channels run at a third of the speed.
        if self.groups > 1 or not isinstance(x, Tensor) or isinstance(self, nn.modules.conv._ConvTransposeNd):
            return False  # with groups the rows of B A do not fall into groups; such a weight is small
        rows, columns = _kernel_shape(self)
        rank, kernel, size = self.lora_B.shape[1], rows * columns, self._tensor("weight").numel()
        places = x.numel() // self.in_channels // math.prod(self.stride)
        narrow = 3 * places * rank * (self.in_channels * kernel + rows * self.out_channels)
        narrow += 400 * places * self.out_channels
        whole = size * rank + 80 * size
        if not (torch.is_grad_enabled() and self.lora_A.requires_grad):
            return narrow < whole
        return 3 * narrow < 3 * whole + places * size

    def _lora_forward(self, x: Tensor) -> Tensor:
        narrow = self._narrow_is_cheaper(x)
        x = self.lora_dropout(x)
        if not narrow:
            with full_precision(x.device):
                delta = self._delta(self.lora_A, self.lora_B) * self.scaling
            return self._convolve(x, delta.to(x.dtype), None)
        # Row o of the update is p rows of B A side by side, each for a p-th of the input's channels: p convolutions to
        # r p channels with A as the kernel, and one by a kernel of size 1 that mixes them.
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        rows = _kernel_shape(self)[0]
        channels = -1 - len(self.kernel_size)  # the axis of them, with a batch or without
        hidden = [self._convolve(part, kernel, None) for part, kernel in self._parts(x, A, rows, channels)]
        mix = B.reshape(self.out_channels, -1, *[1] * len(self.kernel_size))
        return getattr(F, f"conv{len(self.kernel_size)}d")(torch.cat(hidden, channels) * self.scaling, mix)

    def _parts(self, x: Tensor, A: Tensor, rows: int, channels: int) -> Iterator[tuple[Tensor, Tensor]]:
        # A row of A may begin and end within a channel's kernel, which zeros then fill up.
        size, length = math.prod(self.kernel_size), A.shape[1]
        most = max(-(-(row + 1) * length // size) - row * length // size for row in range(rows))
        for row in range(rows):
            first = min(row * length // size, self.in_channels - most)
            before = row * length - first * size
            kernel = F.pad(A, (before, most * size - before - length))
            yield x.narrow(channels, first, most), kernel.view(-1, most, *self.kernel_size)

    def _delta(self, A: Tensor, B: Tensor) -> Tensor:
        return (B @ A).view(self._tensor("weight").shape)

    def _add_delta(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        if not weight.is_contiguous() or isinstance(self.scaling, Tensor):  # which the sum stays as
            return super()._add_delta(weight, A, B)
        # In one pass over the weight, which is what takes the time.
        return torch.addmm(weight.view(B.shape[0], A.shape[1]), B, A, alpha=self.scaling).view(weight.shape)

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
                self.__class__ = with_convolution(type(self), type(inner))
            parameters = {**inner._parameters, **state["_parameters"]}
            modules = {name: module for name, module in state["_modules"].items() if name != "conv"}
            state = {**vars(inner), **state, "_parameters": parameters, "_modules": modules}
        super().__setstate__(state)


_CONV_FORWARDS = [cls._conv_forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)]
# What a convolution computes by, beside its tensors, and may be set to something else.
_SETTINGS = ("stride", "padding", "dilation", "output_padding", "padding_mode", "_reversed_padding_repeated_twice")


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


class ConvLoRA(Kernel, LoRALayer):
    """A convolution of any kind with a low-rank update; `Conv1d`, `Conv2d` and `Conv3d` are made from it.

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
        if type(convolution).forward.__module__ != nn.Conv2d.__module__:
            raise TypeError(
                f"conv_module={conv_module!r}: has a forward of its own, which ConvLoRA would leave out; "
                "lora.inject_lora adapts such a layer where it is"
            )
        if not isinstance(self, type(convolution)):
            self.__class__ = with_convolution(type(self), type(convolution))
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


PUBLIC.update({(nn.Linear, Matrix): Linear, (nn.Linear, Groups): MergedLinear, (nn.Embedding, Table): Embedding})
PUBLIC.update({(cls._base_class, Kernel): cls for cls in (Conv1d, Conv2d, Conv3d)})
