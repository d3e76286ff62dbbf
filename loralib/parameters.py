"""Parameters that are computed: bare matrices with a low-rank update, and tables some of whose rows are trained.

Where a matrix is no layer of its own but a Parameter that a larger module reads (the fused experts of Mixtral,
(E, o, i); `in_proj_weight` of `nn.MultiheadAttention`; the weights of `nn.LSTM`), there is no forward to add a branch
to. The module gets a class with a property of the Parameter's name, which gives W + scaling * B A, differentiably; the
Parameter itself stays where it is. PEFT calls that `target_parameters`, and the tensors are laid out as it has them:

| weight                    | lora_A_<name> | lora_B_<name> | update of expert e                            |
|---------------------------|---------------|---------------|-----------------------------------------------|
| (o, i)                    | (r, i)        | (o, r)        | B A                                           |
| (E, o, i)                 | (E r, i)      | (o, r E)      | B[:, e::E] A[e r : (e + 1) r]                 |
| (E, i, o), `is_transposed`| (E r, i)      | (o, r E)      | the transpose of that                         |

Within the module's forward the property gives a `Sum`, which a product does not form: of an expert that no token chose
nothing is computed, and of the others no matrix of their size.
"""

import copy
import functools
import math
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralib.core import (
    Adapted,
    InPlace,
    LoRALayer,
    _cached,
    _constructor,
    _is_traced_by_fx,
    _same,
    _train,
    full_precision,
    identity,
)
from loralib.layers import Groups


class LowRank:
    """A low-rank update of a Parameter: its settings, and what to compute."""

    lora_dropout = staticmethod(identity)  # dropout of an input has no place where there is no input
    enable_lora: list[bool]

    def __init__(self, r: int, lora_alpha: float, scaling: float, transposed: bool = False, **groups: Any):
        self.r, self.lora_alpha, self.scaling, self.transposed = r, lora_alpha, scaling, transposed
        vars(self).update(groups)

    def __repr__(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}"

    @staticmethod
    def names(name: str) -> tuple[str, ...]:
        """The names of the tensors that an update of the Parameter `name` has."""
        return f"lora_A_{name}", f"lora_B_{name}"

    def shapes(self, weight: Tensor) -> tuple[tuple[int, ...], ...]:
        """The shapes of A and B for `weight`."""
        if weight.dim() == 2 and hasattr(self, "enable_lora"):
            return Groups.group_shapes(weight.shape[1], vars(self))
        *experts, rows, columns = weight.shape
        if self.transposed and experts:
            rows, columns = columns, rows
        r = self.r * math.prod(experts)
        return (r, columns), (rows, r)

    def draw(self, weight: Tensor, A: Tensor, B: Tensor) -> None:
        """Draw A and B; the update is then zero."""
        Adapted.draw(A, B)

    def factors(self, weight: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices, or stacks of them, whose product is the unscaled update in the layout of `weight`."""
        if weight.dim() == 2:
            return (Groups._full_B(self, B) if hasattr(self, "enable_lora") else B), A  # type: ignore[arg-type]
        A, B = A.unflatten(0, (-1, self.r)), B.unflatten(1, (self.r, -1)).permute(2, 0, 1)
        return (A.mT, B.mT) if self.transposed else (B, A)

    def lazy(self, weight: Tensor, A: Tensor, B: Tensor) -> Any:
        """What a forward may read in the place of the sum."""
        if weight.dim() == 2:  # code that reads one matrix may do anything with it
            return self.value(weight, A, B)
        return Sum(weight, *self.factors(weight, A, B), self.scaling)

    def value(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """W + scaling * B A."""
        return Sum(weight, *self.factors(weight, A, B), self.scaling).value()


class Rows:
    """Some rows of a table that are trained in its place: PEFT's `trainable_token_indices`."""

    def __init__(self, indices: Sequence[int]):
        self.indices = list(indices)

    def __repr__(self) -> str:
        return f"{len(self.indices)} rows"

    @staticmethod
    def names(name: str) -> tuple[str, ...]:
        """The name of the tensor that the rows of the Parameter `name` are in."""
        return (f"lora_rows_{name}",)

    def shapes(self, weight: Tensor) -> tuple[tuple[int, ...], ...]:
        """The shape of the rows."""
        return ((len(self.indices), *weight.shape[1:]),)

    def draw(self, weight: Tensor, rows: Tensor) -> None:
        """Begin with the rows of the base."""
        with torch.no_grad():
            rows.copy_(weight[self.indices])

    def lazy(self, weight: Tensor, rows: Tensor) -> Any:
        """What a forward may read in the place of the whole table."""
        return Table(weight, rows, torch.tensor(self.indices, device=weight.device))

    def value(self, weight: Tensor, rows: Tensor) -> Tensor:
        """The whole table."""
        return self.lazy(weight, rows).value()


class _Lazy:
    """A tensor that is computed when a function needs it; `_products` are the functions that do without."""

    weight: Tensor
    _products: dict[str, Callable] = {}

    def value(self) -> Tensor:
        """The tensor."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        product = cls._products.get(func.__name__)
        result = NotImplemented if product is None else product(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        given = torch.utils._pytree.tree_map(_formed, (args, kwargs or {}), is_leaf=lambda x: isinstance(x, _Lazy))
        return func(*given[0], **given[1])

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "device", "ndim", "dim", "size", "numel", "is_cuda", "element_size", "layout"):
            return getattr(self.weight, name)
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.value(), name)

    def __getitem__(self, index: Any) -> Any:
        return self.value()[index]

    def __len__(self) -> int:
        return len(self.weight)

    def __matmul__(self, other: Tensor) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]


def _formed(x: Any) -> Any:
    return x.value() if isinstance(x, _Lazy) else x


class Sum(_Lazy):
    """W + scaling * left right, of matrices or of stacks of them."""

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor, scaling: float):
        self.weight, self.left, self.right, self.scaling = weight, left, right, scaling
        self._each: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def value(self) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.promote_types(self.left.dtype, torch.float32))
        add = torch.baddbmm if self.weight.dim() == 3 else torch.addmm
        with full_precision(self.weight.device):
            given = (tensor.to(dtype) for tensor in (self.weight, self.left, self.right))
            return add(*given, alpha=self.scaling).to(self.weight.dtype)

    def __getitem__(self, index: Any) -> Any:
        is_tensor = isinstance(index, Tensor) and index.dim() < 2 and index.dtype in (torch.int64, torch.int32)
        if self.weight.dim() != 3 or isinstance(index, bool) or not (isinstance(index, int) or is_tensor):
            return self.value()[index]
        if is_tensor and index.dim() == 1:
            return Sum(self.weight[index], self.left[index], self.right[index], self.scaling)
        if self._each is None:  # once for all experts: the gradient of each slice would be as large as the stack
            self._each = list(zip(self.weight, self.left.unbind(), self.right.unbind(), strict=True))
        return Sum(*self._each[int(index)], self.scaling)

    def transpose(self, first: int, second: int) -> Any:
        """The stack of the transposed matrices, not formed either."""
        dims = self.weight.dim()
        if {first % dims, second % dims} != {dims - 2, dims - 1}:
            return self.value().transpose(first, second)
        return Sum(self.weight.mT, self.right.mT, self.left.mT, self.scaling)

    @property
    def mT(self) -> Any:  # noqa: N802 (torch's name)
        return self.transpose(-2, -1)

    @property
    def T(self) -> Any:  # noqa: N802
        return self.transpose(-2, -1) if self.weight.dim() == 2 else self.value().T

    def _narrow(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.left.to(dtype), self.right.to(dtype)

    @staticmethod
    def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
        if not isinstance(x, Tensor) or not isinstance(weight, Sum):
            return NotImplemented
        left, right = weight._narrow(x.dtype)
        base = F.linear(x, weight.weight, bias)
        return base + F.linear(F.linear(x, right) * weight.scaling, left).to(base.dtype)

    @staticmethod
    def _matmul(first: Any, second: Any) -> Any:
        if isinstance(first, Tensor) and isinstance(second, Sum):
            left, right = second._narrow(first.dtype)
            base = torch.matmul(first, second.weight)
            return base + torch.matmul(torch.matmul(first, left) * second.scaling, right).to(base.dtype)
        if isinstance(first, Sum) and isinstance(second, Tensor):
            left, right = first._narrow(second.dtype)
            base = torch.matmul(first.weight, second)
            return base + torch.matmul(left, torch.matmul(right, second) * first.scaling).to(base.dtype)
        return NotImplemented

    @staticmethod
    def _grouped(x: Any, weight: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Tensor) or not isinstance(weight, Sum) or weight.weight.dim() != 3:
            return NotImplemented
        product = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
        left, right = weight._narrow(x.dtype)
        pad = -left.shape[-1] % (16 // x.element_size())  # rows of 16 bytes is what the kernels take
        left, right = F.pad(left, (0, pad)).contiguous(), F.pad(right, (0, 0, 0, pad)).contiguous()
        return product(x, weight.weight, **kwargs) + product(
            product(x, left, **kwargs) * weight.scaling, right, **kwargs
        )


Sum._products = {
    "linear": Sum._linear,
    **dict.fromkeys(["matmul", "__matmul__", "mm", "bmm"], Sum._matmul),
    **dict.fromkeys(["grouped_mm", "_grouped_mm"], Sum._grouped),
}


class Table(_Lazy):
    """A table with other rows in the places `index`."""

    def __init__(self, weight: Tensor, rows: Tensor, index: Tensor):
        self.weight, self.rows, self.index = weight, rows, index

    def value(self) -> Tensor:
        return self.weight.index_copy(0, self.index, self.rows.to(self.weight.dtype))

    @staticmethod
    def _embedding(x: Any, weight: Any, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Any:
        by_frequency = kwargs.get("scale_grad_by_freq", len(args) > 2 and args[2])  # counts that only the table has
        if not isinstance(x, Tensor) or not isinstance(weight, Table) or by_frequency:
            return NotImplemented
        base = F.embedding(x, weight.weight, padding_idx, *args, **kwargs)
        ordered, order = weight.index.sort()
        place = torch.searchsorted(ordered, x).clamp(max=len(ordered) - 1)
        padding = [] if padding_idx is None else (weight.index == padding_idx).nonzero().flatten().tolist()
        rows = F.embedding(order[place], weight.rows.to(base.dtype), *padding)
        return torch.where((ordered[place] == x)[..., None], rows, base)

    @staticmethod
    def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
        if not isinstance(x, Tensor) or not isinstance(weight, Table):
            return NotImplemented
        base = F.linear(x, weight.weight, bias)
        trained = F.linear(x, weight.rows.to(x.dtype), None if bias is None else bias[weight.index])
        return base.index_copy(-1, weight.index, trained.to(base.dtype))


Table._products = {"embedding": Table._embedding, "linear": Table._linear}


class Computed(Tensor):
    """What is read of a computed Parameter from outside: a result, into which nothing can be written."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.__name__
        written = args[0] if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) else None
        if isinstance(written, Computed) and name != "requires_grad_":
            raise RuntimeError(
                f"{name} would write into a Parameter that is computed from the base and an adapter, and be lost; "
                "write into the adapter's tensors (lora_A_..., lora_B_..., lora_rows_...), or before injecting"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        is_view = name == "__get__" or name in ("__getitem__", "view", "detach", "select", "narrow", "t", "transpose")
        plain = not is_view or type(result) not in (Tensor, cls)
        return (result.as_subclass(Tensor) if type(result) is cls else result) if plain else result.as_subclass(cls)


class Parameters(Adapted):
    """A module some of whose Parameters are computed."""

    is_leaf = False
    lora_parameters: dict[str, Any]
    _lazy: dict | None = None

    @property
    def has_adapter(self) -> bool:
        """Whether something is computed."""
        return bool(vars(self).get("lora_parameters"))

    def base_weight(self) -> Any:
        """Return the Parameter `weight`."""
        return self._parameters.get("weight")

    def updates(self) -> dict[str, Any]:
        """What has a rank, by the ending of its name."""
        return {f".{name}": each for name, each in self._computed() if isinstance(each, LowRank)}

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The tensors of the adapter, by name."""
        return {key: self._tensor(key) for name, each in self._computed() for key in each.names(name)}

    def sums(self) -> dict[str, Tensor]:
        """What the computed Parameters are, by name."""
        return {name: self._value(name) for name, _ in self._computed()}

    def delta_weight(self, name: str = "weight") -> Tensor:
        """Return scaling * B A of the Parameter `name`, in its layout, in float32 or wider."""
        weight: Any = self._parameters[name]
        zero = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        return self.lora_parameters[name].value(zero, *self._of(name))

    def reset_lora_parameters(self) -> None:
        """Draw the adapter anew; the module then computes its base."""
        for name, each in self._computed():
            each.draw(self._parameters[name], *self._of(name))

    def merge(self) -> None:
        """Compute the sums once, and anew only where something has changed."""
        self.merged = True
        if not self._disabled and self.has_adapter and not self.is_sharded():
            self._aside: Any = {}

    def unmerge(self) -> None:
        """Let go of the sums."""
        self._aside, self.merged = None, False

    _unmerge = unmerge

    def _take_over(self) -> None:
        pass

    def _computed(self) -> Iterable[tuple[str, Any]]:
        return list(vars(self).get("lora_parameters", {}).items())

    def _of(self, name: str) -> list[Any]:
        return [self._tensor(key) for key in self.lora_parameters[name].names(name)]

    def _value(self, name: str) -> Tensor:
        return self.lora_parameters[name].value(self._parameters[name], *self._of(name))

    def _merged_value(self, name: str) -> Tensor:
        tensors = [self._parameters[name], *self._of(name)]
        versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        made_from = getattr(self.lora_parameters[name], "scaling", 1), tensors, versions
        value, made, copies = self._aside.get(name, (None, None, ()))
        if value is not None and _same(made, made_from) and all(map(torch.equal, tensors[1:], copies)):
            return value
        with torch.inference_mode(False), torch.no_grad():
            value = self._value(name)
            # Copies on a CPU, since writes through `.data` leave no trace in version counters.
            copies = [tensor.detach().clone() for tensor in tensors[1:]] if value.is_cpu else tensors[1:]
        self._aside[name] = value, made_from, copies
        return value

    def _read(self, name: str) -> Any:
        weight: Any = self._parameters.get(name, vars(self).get(name))
        if weight is None or self._disabled or name not in vars(self).get("lora_parameters", {}):
            return weight
        if _is_traced_by_fx():
            raise RuntimeError(
                f"{type(self).__name__}.{name} is computed, which torch.fx cannot follow; trace what "
                "lora.merge_and_unload(model) returns"
            )
        grad, compiling = torch.is_grad_enabled(), torch.compiler.is_compiling()
        if self._parameters.get(name) is None:  # a replica of nn.DataParallel
            return weight
        if self._aside is not None and not compiling and not (weight.requires_grad and grad):
            value = self._merged_value(name)
            return value.as_subclass(Computed) if self._lazy is None else value
        if self._lazy is None or compiling:
            return self._value(name) if compiling else self._value(name).as_subclass(Computed)
        if (name, grad) not in self._lazy:
            self._lazy[name, grad] = self.lora_parameters[name].lazy(weight, *self._of(name))
        return self._lazy[name, grad]

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        InPlace._save_to_state_dict(self, destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["tokens"] = self._tokens()

    def _tokens(self) -> dict[str, list[int]]:
        return {name: each.indices for name, each in self._computed() if isinstance(each, Rows)}

    def _load_from_state_dict(self, state: dict, prefix: str, metadata: dict, *args: Any) -> None:
        if metadata.get("tokens", self._tokens()) != self._tokens():
            args[-1].append(
                f"{prefix[:-1]}: the checkpoint has the rows {metadata['tokens']}, the model trains {self._tokens()}"
            )
            return
        super()._load_from_state_dict(state, prefix, metadata, *args)

    def __getstate__(self) -> dict:
        merged, self._aside = self._aside, None
        try:
            state = super().__getstate__()
        finally:
            self._aside = merged
        if "lora_parameters" in state:
            state["lora_parameters"] = {name: copy.copy(each) for name, each in state["lora_parameters"].items()}
        state.pop("_lazy", None)
        return {**state, "merged": False, "_aside": None, "_merge_again": True} if merged is not None else state

    def extra_repr(self) -> str:
        parts = [
            f"{name}: r={each.r}, lora_alpha={each.lora_alpha}" for name, each in self._computed() if hasattr(each, "r")
        ]
        rows = [f"{name}: {len(each.indices)} rows" for name, each in self._computed() if not hasattr(each, "r")]
        return ", ".join(part for part in (self._base_class.extra_repr(self), *parts, *rows) if part)


@_cached  # type: ignore[untyped-decorator]
def with_parameters(cls: Any, names: tuple[str, ...]) -> Any:
    """Return the class of a module of class `cls` whose Parameters `names` are computed.

    >>> issubclass(with_parameters(nn.LSTM, ("weight_ih_l0",)), nn.LSTM)
    True
    """

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._lazy is not None or self._disabled or torch.compiler.is_compiling():
            return cls.forward(self, *args, **kwargs)
        self._lazy = {}
        try:
            return cls.forward(self, *args, **kwargs)
        finally:
            del self._lazy  # or it would be there after unloading

    members: dict = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_base_class": cls, "forward": forward}
    members.update(_recipe=(with_parameters, (cls, names)), train=_train, __new__=_constructor(cls))
    for name in names:
        members[name] = property(functools.partial(_get, name), functools.partial(_set, name))
    if issubclass(cls, nn.RNNBase):  # which keeps its weights in a list besides
        members["_flat_weights"] = property(_flat_weights, _keep_flat_weights)
    if cls.__repr__ is not nn.Module.__repr__:
        members["__repr__"] = cls.__repr__
    return types.new_class(cls.__name__, (Parameters, cls, LoRALayer), exec_body=lambda body: body.update(members))


def _get(name: str, module: Any) -> Any:
    return module._read(name)


def _set(name: str, module: Any, value: Any) -> None:
    vars(module)[name] = value


def _keep_flat_weights(module: Any, value: Any) -> None:
    vars(module)["_flat_weights"] = [module._parameters.get(name) for name in module._flat_weights_names]


def _flat_weights(module: Any) -> list[Any]:
    return [_formed(getattr(module, name, None)) for name in module._flat_weights_names]
