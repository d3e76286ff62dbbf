"""Several adapters in one forward: each row of a batch under its own, or all rows under the sum of some.

While that lasts the model is its base, and every module in which one of the adapters has something computes it for the
rows that are that adapter's (`_several`: a `Work`). Three ways:

| what adapters have in a module                        | how                                                          |
|-------------------------------------------------------|--------------------------------------------------------------|
| A and B of linear layers, fused or not, and biases    | stacked A and B, taken by an index or masked (`_linear`)     |
| A and B of an embedding                               | the same, with a lookup for A (`_lookup`)                    |
| all else: convolutions, heads, norms, computed ones   | the module's own forward, for each adapter on its rows alone |

The ranks of a stack are filled up with zeros to the largest, and it has the scalings in it.

Which rows of what a module is given belong to which row of the batch cannot be told from sizes: a batch of four texts
of four tokens looks the same with time first. So it is tried, once for each way to call the model: it runs its first
row alone, all rows, and all in reverse, as its base. What a module is given and gives has to begin with what it is of
the first row alone, and to be reversed with the rows. That holds for windows and flattened tokens, too; what is the
same for any number of rows, such as positions, is used for each. How much of it each row has must not change
afterwards, or it is tried anew. All else is refused by name, and so are experts that are given the tokens that chose
them, as those differ from call to call.
"""

import contextlib
import copy
import functools
import itertools
import operator
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralib import core
from loralib.adapters import (
    BASE_NAME,
    LORA_NAMES,
    Place,
    _places,
    adapter_names,
    adopt,
    all_modules,
    change_class,
    check_intact,
    check_not_exchanged,
    check_one,
    check_present,
    check_whole,
    list_adapters,
    own_tensors,
    put,
)
from loralib.architectures import is_read_from_outside, unwrapped
from loralib.core import SHARED_BASE, Adapted, InPlace
from loralib.layers import Groups, Kernel, Matrix, Table
from loralib.quantized import is_quantized

__all__ = ["adapters_per_row", "set_adapter", "share_base"]

_flatten, _unflatten = torch.utils._pytree.tree_flatten, torch.utils._pytree.tree_unflatten
Names = tuple[str, ...]


class Block:
    """Which adapters the rows of a batch are computed with.

    Attributes:
        slots: the different ones: names of adapters, none for the base, several for their sum.
        rows: for each row the number of its slot.
        off: whether adapters are disabled for a while.
        given: how the model is called: the names of what it is given, and which flags.
        shape: that of a row of its main input.
        size: the number of rows in this call, beams included.
        enlarged: the number of rows that were found to be beams.
        beams: whether each row may stand for several, one after the other, as the beams of `generate` do.
    """

    def __init__(self, rows: Sequence[Names]):
        self.slots: list[Names] = [(), *sorted({names for names in rows if names})]
        self.rows = [self.slots.index(names) for names in rows]
        self.single = len(set(self.rows)) == 1
        with torch.inference_mode(False):  # to be used in and out of it
            self.index = torch.tensor(self.rows)
            self.own = F.one_hot(self.index, len(self.slots)).float()[:, None, :, None]
        self.off = self.beams = self.entered = False
        self.enlarged = 0
        self.dropless = True
        self.given: tuple = ()
        self.shape: tuple[int, ...] = ()
        self.size = len(self.rows)
        self.recorder: _Recorder | None = None
        self.changed: list[tuple[nn.Module, type]] = []
        self.shown: list[str] | None = None
        self.undo: Callable[[], None]

    def index_on(self, device: torch.device) -> Tensor:
        """The numbers of the slots, there."""
        if self.index.device != device:
            self.index = self.index.to(device)
        return self.index

    def mask(self, like: Tensor) -> Tensor:
        """1 for each row's slot, 0 for the others: (rows, 1, slots, 1)."""
        return self.own.to(like.device, like.dtype)


class Layout(NamedTuple):
    """How the rows of a batch lie in what a module is given and gives, tensor by tensor: the axis, SHARED or OTHER.

    And how much of that axis is of one row: so many, or TOKENS, as many as the input has. One that may be another the
    next time, though the model is called in the same way, is not certain.
    """

    given: tuple
    output: tuple
    sizes: tuple = ()
    certain: bool = True


SHARED, OTHER = "shared", "other"  # the same for any rows; no tensor
TOKENS = -1


class Around:
    """What a model around such modules has to know."""

    def __init__(self, block: Block):
        self.block = block


class Work:
    """What a module has to do in a block.

    Attributes:
        path: its name.
        way: "linear", "lookup" or "parts".
        members: the modules, it or below it, that get an adapter's tensors for the rows of that adapter.
    """

    def __init__(self, block: Block, path: str, way: str, members: list[tuple[Any, Place]], plain: bool):
        self.block, self.path, self.way, self.members, self.plain = block, path, way, members, plain
        self.classes: dict[nn.Module, Any] = {}  # outside of the block
        self.tensors: list[Tensor] | None = None
        self.scalings: list[float] = []
        self.norms: list[tuple[float, float]] = []

    @property
    def place(self) -> Place:
        """The place that remembers how rows lie in what the module is given."""
        return self.members[0][1]

    def names_in(self, slot: Names) -> Names:
        """Those adapters of a slot that have something here."""
        return tuple(name for name in slot if any(name in place.parts for _, place in self.members))

    def layout(self) -> Layout | None:
        """How rows lie in what the module is given by such a call of the model, if that is known."""
        block, layouts = self.block, self.place.layouts
        return layouts.get((block.given, None)) or layouts.get((block.given, block.shape))

    def is_open(self) -> bool:
        """Whether that has still to be tried."""
        layout = self.layout()
        return (layout is None or not layout.certain) and self.block.given not in self.place.tried

    def axis(self, leaf: int, x: Tensor) -> int | None:
        """The axis of `x`, the input of that number, that has the rows of the batch; None if it is the same for all."""
        block, compiling = self.block, torch.compiler.is_compiling()
        if block.single:
            return None
        layout, whole = self.layout(), block.entered or compiling
        if layout is None and (compiling or not whole or block.given in self.place.tried):
            layout = next((each for (given, _), each in self.place.layouts.items() if _agree(given, block.given)), None)
        if layout is None or leaf >= len(layout.given):
            raise ValueError(
                f"{self.path} was not called, or otherwise, when it was tried which rows of its input are whose; call "
                "the model as a whole, and not compiled the first time, in lora.adapters_per_row"
            )
        axis, size = layout.given[leaf], layout.sizes[leaf]
        if isinstance(axis, int):
            each = _tokens(block.shape) if size == TOKENS else size
            if x.shape[axis] == (each * block.size if whole else len(block.rows)):
                return axis
        elif axis == SHARED and (leaf or x.shape[0] == 1):
            return None
        raise ValueError(
            f"{self.path} got {tuple(x.shape)} for a batch of {block.size if whole else len(block.rows)}: which rows "
            f"are whose cannot be told; {_INSTEAD}"
        )

    def stacked(self, device: torch.device, dtype: torch.dtype) -> tuple:
        """A, B and biases of all slots, in one tensor each (`_stack`)."""
        (module, place), slots, grad = self.members[0], self.block.slots, torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            if grad or place.stacked is None:
                place.stacked = None  # they train
                return _stack(module, place, slots, device, dtype)
            A, B, bias = place.stacked[2]  # what has been written into them since, it could not see
            return *(x if x is None else x.to(device, dtype) for x in (A, B)), bias
        tensors = self.own_tensors()
        if grad and any(tensor.requires_grad for tensor in tensors):
            place.stacked = None
            return _stack(module, place, slots, device, dtype)
        versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        of, kept = (slots, self.scalings, device, dtype, versions, self.norms), place.stacked
        if kept is None or kept[0] != of or not all(map(operator.is_, kept[1], tensors)):
            # Outside inference mode, so that the tensors can be used in and out of it.
            with torch.inference_mode(False), torch.no_grad():
                place.stacked = kept = of, tensors, _stack(module, place, slots, device, dtype)
        return kept[2]

    def own_tensors(self) -> list[Tensor]:
        """The tensors of the adapters that are stacked."""
        if self.tensors is None:
            parts = [self.place.parts[name] for slot in self.block.slots for name in self.names_in(slot)]
            self.tensors = [tensor for part in parts for tensor in part.tensors.values()]
            self.scalings = [part.form.settings["scaling"] for part in parts if part.form]
        return self.tensors


def _note_norms(works: list[Work]) -> None:
    """Note what tells of writes through `.data`, which leave no trace, since an earlier block."""
    tensors = [tensor.detach().float() for work in works for tensor in work.own_tensors()]
    if tensors and not any(tensor.is_meta for tensor in tensors):
        device = tensors[0].device
        # Signs and places change no norm, but a sum with weights that differ.
        weights = {x.device: torch.linspace(1, 2, max(map(torch.numel, tensors)), device=x.device) for x in tensors}
        sums = [x.flatten() @ weights[x.device][: x.numel()] for x in tensors]
        noted = torch.stack([x.to(device) for x in (*torch._foreach_norm(tensors), *sums)]).tolist()
        pairs = iter(zip(noted, noted[len(tensors) :], strict=False))
        for work in works:
            work.norms = list(itertools.islice(pairs, len(work.own_tensors())))


_INSTEAD = "run the rows of each adapter by themselves, with lora.set_adapter"


def _stack(module: Any, place: Place, slots: list[Names], device: torch.device, dtype: torch.dtype) -> tuple:
    """A (slots, rank, inputs), scaling * B (slots, rank, outputs), and biases beyond the base's or None."""
    pairs, biases = [], []
    for slot in slots:
        parts = [place.parts[name] for name in slot if name in place.parts]
        adapted = [part for part in parts if part.own >= LORA_NAMES]
        pairs.append([_factors(part) for part in adapted])
        biases.append(next((part.tensors["bias"] for part in parts if "bias" in part.own), None))
    rank = max((sum(len(A) for A, _ in pair) for pair in pairs), default=0)
    some = next((pair[0] for pair in pairs if pair), None)
    if some is None:
        A = B = None
    else:
        A, B = (torch.stack([_filled([pair[i] for pair in each], rank, some[i]) for each in pairs]) for i in (0, 1))
        A, B = A.to(device, dtype), B.to(device, dtype)
    if all(bias is None for bias in biases):
        return A, B, None
    base = module._parameters["bias"]
    wide = torch.promote_types(base.dtype, torch.float32)
    more = [torch.zeros_like(base, dtype=wide) if bias is None else bias.to(wide) - base.to(wide) for bias in biases]
    return A, B, torch.stack(more).to(device)


def _filled(tensors: list[Tensor], rank: int, like: Tensor) -> Tensor:
    missing = rank - sum(map(len, tensors))
    if missing:
        tensors = [*tensors, like.new_zeros(missing, like.shape[1])]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _factors(part: Any) -> tuple[Tensor, Tensor]:
    A, B, settings = part.tensors["lora_A"], part.tensors["lora_B"], part.form.settings
    if "enable_lora" in settings:
        sizes = settings.get("group_sizes") or [len(B) // sum(settings["enable_lora"])] * len(settings["enable_lora"])
        groups = {"interleave": 1, **settings, "group_sizes": sizes}
        B = Groups._full_B(types.SimpleNamespace(**groups), B)  # type: ignore[arg-type]
    return A, B.T * settings["scaling"]


# A product with all adapters at once, of which a mask leaves each row its own, is cheaper than a copy of A and B for
# each row, while the positions of a row times the adapters are few: measured on CPUs.
_WIDE = 18


def _linear(work: Work, base: Any, module: Any, x: Tensor) -> Tensor:
    axis = work.axis(0, x)
    if axis:
        return _rows_first(work, base, module, x.movedim(axis, 0), True).movedim(0, axis).contiguous()
    return _rows_first(work, base, module, x, axis == 0)


def _rows_first(work: Work, base: Any, module: Any, x: Tensor, apart: bool) -> Tensor:
    _check_dropout(work, module)
    result = base(module, x)
    A, B, bias = work.stacked(result.device, result.dtype)
    block = work.block
    index: Any = block.rows[0] if block.single else block.index_on(x.device)
    count = 1 if block.single else len(block.rows)
    if not apart:  # what is the same for all so far is not any more
        result = _expanded(result, count)
    if A is not None:
        given = x.to(result.dtype).reshape(count if apart else 1, -1, x.shape[-1])
        if block.single:
            hidden, B = F.linear(given[0], A[index]), B[index]
        elif not apart or given.shape[1] * len(A) <= _WIDE:
            of_all = F.linear(given, A.flatten(0, 1)).unflatten(-1, A.shape[:2])
            hidden, B = (of_all * block.mask(of_all)).flatten(2).flatten(0, 1), B.flatten(0, 1)
        else:
            hidden, B = torch.bmm(given, A[index].mT), B[index]
        result = _add_product(result, hidden, B, work.plain)
    if bias is not None:
        each = result.reshape(count, -1, result.shape[-1])
        result = (each + bias[index].unsqueeze(-2)).to(result.dtype).reshape(result.shape)
    return result


def _expanded(x: Any, count: int) -> Any:
    if not isinstance(x, Tensor) or count == 1:
        return x
    return x.expand(count, *x.shape[1:])


def _add_product(result: Tensor, hidden: Tensor, B: Tensor, plain: bool) -> Tensor:
    shape = (-1, result.shape[-1]) if hidden.dim() == 2 else (len(hidden), -1, result.shape[-1])
    # Nobody else has the output of a plain layer yet.
    if plain and result.is_contiguous() and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        add: Any = torch.Tensor.addmm_ if hidden.dim() == 2 else torch.Tensor.baddbmm_
    else:
        add = torch.addmm if hidden.dim() == 2 else torch.baddbmm
    with core.full_precision(result.device):  # the factors have the dtype of the result
        return add(result.reshape(shape), hidden, B).reshape(result.shape)


def _lookup(work: Work, base: Any, module: Any, x: Tensor) -> Tensor:
    axis = work.axis(0, x)
    ids = x.movedim(axis, 0) if axis else x
    result = base(module, ids)
    A, B, _ = work.stacked(result.device, result.dtype)
    block = work.block
    if block.single:
        hidden, B = F.embedding(ids.reshape(1, -1), A[block.rows[0]].T), B[block.rows[0]]
    else:
        index = block.index_on(x.device)
        apart = ids.reshape(1 if axis is None else len(index), -1)
        hidden, B = F.embedding(apart + (index * A.shape[2])[:, None], A.mT.flatten(0, 1)), B[index]
        result = _expanded(result, len(index)) if axis is None else result
    if module.padding_idx is not None and hidden.requires_grad:
        padding = _expanded(ids, 1 if axis is not None else len(hidden)) == module.padding_idx
        hidden = torch.where(padding.reshape(*hidden.shape[:-1], 1), hidden.detach(), hidden)
    result = result + torch.matmul(hidden, B).reshape(result.shape)
    return result.movedim(0, axis) if axis else result


def _by_parts(work: Work, module: Any, args: tuple, kwargs: dict) -> Any:
    block = work.block
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{work.path}, a {type(module).__name__}, computes each adapter's rows by themselves, which torch.compile "
            f"would do anew for each assignment; {_INSTEAD}, or do not compile"
        )
    _check_dropout(work, module)
    if block.single:
        return _with_adapters(work, module, block.slots[block.rows[0]], args, kwargs)
    leaves, form = _flatten((args, kwargs))
    axes = [work.axis(i, leaf) if isinstance(leaf, Tensor) else None for i, leaf in enumerate(leaves)]
    if any(not isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
        raise ValueError(
            f"{work.path} computes each adapter's rows by themselves, and is given a cache or the like, which would "
            f"have to be taken apart; {_INSTEAD}, or pass use_cache=False"
        )
    count = len(block.rows)
    if all(axis is None for axis in axes):  # the same for all so far
        leaves = [_expanded(leaf, count) for leaf in leaves]
        axes = [0 if isinstance(leaf, Tensor) else None for leaf in leaves]
    order, outputs = [], []
    for slot in sorted(set(block.rows)):
        rows = [i for i, other in enumerate(block.rows) if other == slot]
        order += rows
        chosen = [
            leaf if axis is None else _rows_of(leaf, axis, count)[rows].flatten(0, 1).movedim(0, axis)
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        outputs.append((len(rows), _with_adapters(work, module, block.slots[slot], *_unflatten(chosen, form))))
    inverse = [order.index(row) for row in range(count)]
    layout = work.layout() or next(iter(work.place.layouts.values()))
    axes = [0 if axis == SHARED else axis for axis in layout.output]
    each, forms = zip(*(_flatten(output) for _, output in outputs), strict=True)
    whole = [
        parts[0]
        if not isinstance(parts[0], Tensor)
        else torch.cat([_rows_of(part, axis, n) for part, (n, _) in zip(parts, outputs, strict=True)])[inverse]
        .flatten(0, 1)
        .movedim(0, axis)
        for axis, *parts in zip(axes, *each, strict=True)
    ]
    return _unflatten(whole, forms[0])


_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


def _rows_of(x: Tensor, axis: int, count: int) -> Tensor:
    """(count, how many of the axis are of one row, the other axes)"""
    return x.movedim(axis, 0).unflatten(0, (count, -1))


def _with_adapters(work: Work, module: Any, slot: Names, args: tuple, kwargs: dict) -> Any:
    names = work.names_in(slot)
    if len(names) < 2:
        return _with_adapter(work, module, names[0] if names else None, args, kwargs)
    # Of what is linear in its weight the update is what it makes of a difference.
    outputs = [_with_adapter(work, module, name, args, kwargs) for name in names]
    return sum(outputs) - (len(names) - 1) * _with_adapter(work, module, None, args, kwargs)


def _with_adapter(work: Work, module: Any, name: str | None, args: tuple, kwargs: dict) -> Any:
    now = [(inner, type(inner)) for inner in work.classes]
    for inner, cls in now:
        change_class(inner, cls, work.classes[inner])
    try:
        for member, place in work.members:
            place.put(member, name)
        return type(module).forward(module, *args, **kwargs)
    finally:
        for member, place in work.members:
            place.put(member, None)
        for inner, cls in now:
            change_class(inner, work.classes[inner], cls)


def _check_dropout(work: Work, module: nn.Module) -> None:
    if module.training and not work.block.dropless:
        raise RuntimeError(
            f"{work.path} is in training mode, and an adapter has lora_dropout, which several adapters at once do not "
            "have; call model.eval(), or train them one by one"
        )


class Several(InPlace):
    """What the class of a module has in which several adapters compute, or of a model around it."""

    _several: Work | None = None

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        work = vars(self).get("_several")
        if name != "weight" or not isinstance(work, Work) or work.block.off or work.block.recorder is not None:
            return value
        if torch.compiler.is_compiling():
            return value
        if core.is_read_past_forward(core.reader_of(sys._getframe(1)), self):
            raise ValueError(f"the weight of {work.path} is read past its forward, where rows share it; {_INSTEAD}")
        return value

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        if isinstance(self._several, Work):
            self._several.tensors = None
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        check_one([self])

    def __reduce_ex__(self, protocol: Any) -> Any:
        check_one([self])
        return super().__reduce_ex__(protocol)


@core._cached  # type: ignore[untyped-decorator]
def _computing(cls: Any, way: str) -> Any:
    """The class of a module of class `cls` in a block."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        work = self._several
        block = work.block
        if block.off or block.recorder is not None:
            output = cls.forward(self, *args, **kwargs)
            if block.recorder is not None:
                block.recorder.see(work, (args, kwargs), output)
            return output
        if way == "parts":
            return _by_parts(work, self, args, kwargs)
        return _WAYS[way](work, cls.forward, self, *args, *kwargs.values())  # `input`, by whatever name

    return types.new_class(cls.__name__, (Several, cls), exec_body=lambda body: body.update(_members(cls, forward)))


_WAYS = {"linear": _linear, "lookup": _lookup}


@core._cached  # type: ignore[untyped-decorator]
def _within(cls: Any) -> Any:
    """The class of a module in another one that does its work, while it is not doing it."""

    def check(self: Any) -> None:
        block = self._several.block
        if not block.off and block.recorder is None:
            raise ValueError(
                f"a {cls.__name__} in {self._several.path} is used past the forward of that, where it cannot be told "
                f"which rows are whose; {_INSTEAD}"
            )

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        check(self)
        return cls.forward(self, *args, **kwargs)

    def weight(self: Any) -> Any:
        check(self)
        return self._parameters["weight"]

    members = _members(cls, forward)
    if getattr(cls, "weight", None) is None:
        members["weight"] = property(weight)
    return types.new_class(cls.__name__, (Several, cls), exec_body=lambda body: body.update(members))


@core._cached  # type: ignore[untyped-decorator]
def _entered(cls: Any) -> Any:
    """The class of a model, or of a part that is called by itself, in a block."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        block = self._several.block
        if block.off or block.entered or block.recorder is not None:
            return cls.forward(self, *args, **kwargs)
        size, *shape = _main_shape(self, args, kwargs)
        fits = size == len(block.rows) or (block.beams and size % len(block.rows) == 0)
        if fits and size != len(block.rows) != 1 and block.enlarged != size and not torch.compiler.is_compiling():
            _check_beams(_flatten((args, kwargs))[0], len(block.rows), size)
            block.enlarged = size
        if not fits:
            raise ValueError(f"{len(block.rows)} names of adapters for a batch of {size}: give one for each row")
        given = [*enumerate(args), *sorted(kwargs.items())]
        block.given = tuple((key, _flag(value)) for key, value in given if value is not None)
        block.size, block.shape = size, tuple(shape)
        if torch.compiler.is_compiling():
            return cls.forward(self, *args, **kwargs)
        if torch.is_grad_enabled() and any(_computes_anew(module) for module in self.modules()):
            raise RuntimeError(
                "gradient checkpointing computes anew in the backward pass, when the block may be over; call "
                "model.gradient_checkpointing_disable(), or torch.no_grad()"
            )
        if not block.single:
            _try_rows(block, self, cls.forward, args, kwargs, size)
        block.entered = True
        try:
            return cls.forward(self, *args, **kwargs)
        finally:
            block.entered = False

    members = _members(cls, forward)
    if hasattr(cls, "generate"):

        @functools.wraps(cls.generate)
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            block = self._several.block
            _check_prompts(args, kwargs, len(block.rows))
            before, block.beams, block.enlarged = block.beams, True, 0
            try:
                return cls.generate(self, *args, **kwargs)
            finally:
                block.beams = before

        members["generate"] = generate
    return types.new_class(cls.__name__, (Several, cls), exec_body=lambda body: body.update(members))


def _check_prompts(args: tuple, kwargs: dict, rows: int) -> None:
    # Before `generate` repeats them, after which too few names look like those of beams.
    named = [kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds", "input_features", "input_values")]
    for x in (*args[:1], *named):
        if isinstance(x, Tensor) and x.dim() and len(x) != rows:
            raise ValueError(f"{rows} names of adapters for a batch of {len(x)}: give one for each row")


def _members(cls: Any, forward: Any) -> dict:
    return {"__module__": __name__, "__doc__": cls.__doc__, "forward": forward, "__new__": core._constructor(cls)}


def _check_beams(tensors: list, rows: int, size: int) -> None:
    # The beams of a row begin as copies of it, one after the other. Guidance repeats the batch as a whole instead.
    for x in tensors:
        if isinstance(x, Tensor) and x.dim() and len(x) == size:
            beams = x.unflatten(0, (rows, -1))
            if not torch.equal(beams, beams[:, :1].expand_as(beams)):
                raise ValueError(
                    f"{rows} names of adapters for a batch of {size}, whose rows are not each repeated in place, as "
                    f"beams are (guidance?): which are whose cannot be told; {_INSTEAD}"
                )


def _computes_anew(module: nn.Module) -> bool:
    return module.training and getattr(module, "gradient_checkpointing", False) is True


def _flag(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_flag, value))
    if isinstance(value, dict):
        return tuple((key, _flag(each)) for key, each in value.items())
    return value if isinstance(value, (bool, int, float, str)) else None


def _agree(*ways: tuple) -> bool:
    """Whether two ways of calling a model differ in no flag, but at most in the tensors that are given."""
    one, other = ({key: flag for key, flag in way if flag is not None} for way in ways)
    return one == other


def _main_shape(model: Any, args: tuple, kwargs: dict) -> torch.Size:
    main = kwargs.get(getattr(model, "main_input_name", ""))
    for leaf in [main, *args, *_flatten(kwargs)[0]]:
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape
    raise ValueError(f"{type(model).__name__} got no tensor whose rows the adapters could be for")


def _tokens(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


# Which rows are whose.


class _Recorder:
    """What modules get and give, call by call."""

    def __init__(self) -> None:
        self.calls: dict[Work, list[tuple[list, list]]] = {}

    def see(self, work: Work, given: Any, output: Any) -> None:
        self.calls.setdefault(work, []).append((_flatten(given)[0], _flatten(output)[0]))


def _try_rows(block: Block, model: Any, forward: Any, args: tuple, kwargs: dict, size: int) -> None:
    """Find out how the rows lie in what modules are given, if that is not known for all."""
    works = dict.fromkeys(vars(module)["_several"] for module, _ in block.changed)
    open_ = [work for work in works if isinstance(work, Work) and work.is_open()]
    if not open_:
        return
    beams = size // len(block.rows)
    reverse = [row * beams + beam for row in reversed(range(len(block.rows))) for beam in range(beams)]
    seen, devices = [], [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    training = [module for module in model.modules() if module.training]
    state = _tensors_held(model)
    try:
        for module in training:  # not by eval(), which merges
            module.training = False
        for rows in (range(beams), reverse, None):
            block.recorder = _Recorder()
            own, named = torch.utils._pytree.tree_map(functools.partial(_taken, rows=rows, size=size), (args, kwargs))
            with torch.no_grad(), torch.random.fork_rng(devices):
                forward(model, *own, **named)
            seen.append(block.recorder.calls)
    except Exception as error:
        known = [[given for given, _ in work.place.layouts if _agree(given, block.given)] for work in open_]
        if all(known):  # a cache that cannot be taken apart, after the first token
            for work in open_:
                work.place.tried |= {block.given}
            return
        raise ValueError(
            "which rows are whose is tried by running one row alone, and that failed with "
            f"{type(error).__name__}: {error}; {_INSTEAD}"
        ) from error
    finally:
        block.recorder = None
        for module in training:
            module.training = True
        _hold_again(state)
    layouts = {work: _layout(work, [calls.get(work, []) for calls in seen], len(block.rows)) for work in open_}
    for work, layout in layouts.items():
        if layout is None:
            work.place.tried |= {block.given}
            continue
        sizes = tuple(size if size is None else size // beams for size in layout.sizes)
        shape, tokens = block.shape, _tokens(block.shape)
        certain = layout.certain and (len(shape) > 2 or {*sizes} <= {None, 1, tokens})  # not if padding is taken out
        # So it is for any length, but not for images, which have more windows if they are larger.
        if any_length := tokens > 1 and len(shape) < 3 and {*sizes} <= {None, 1, tokens}:
            sizes = tuple(TOKENS if size == tokens else size for size in sizes)
        call = block.given, None if any_length else shape
        work.place.layouts = {**work.place.layouts, call: layout._replace(sizes=sizes, certain=certain)}


def _tensors_held(model: nn.Module) -> list[tuple[nn.Module, dict, dict]]:
    """What the modules remember from call to call: their buffers, and tensors in attributes."""
    return [
        (
            module,
            {key: (t, _version(t), t.clone()) for key, t in module._buffers.items() if t is not None},
            {key: value for key, value in vars(module).items() if value is None or isinstance(value, Tensor)},
        )
        for module in model.modules()
    ]


@torch.no_grad()
def _hold_again(state: list[tuple[nn.Module, dict, dict]]) -> None:
    for module, buffers, attributes in state:
        for key, (buffer, version, values) in buffers.items():
            module._buffers[key] = buffer
            if version is None or buffer._version != version:
                buffer.copy_(values)
        vars(module).update(attributes)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _taken(leaf: Any, rows: Any, size: int) -> Any:
    if not isinstance(leaf, Tensor):
        leaf = copy.deepcopy(leaf)
        if rows is not None and hasattr(leaf, "batch_select_indices") and leaf.get_seq_length():  # a cache
            leaf.batch_select_indices(torch.tensor(list(rows)))
        return leaf
    return leaf[list(rows)] if rows is not None and leaf.dim() and leaf.shape[0] == size else leaf.clone()


def _layout(work: Work, seen: list[list], rows: int) -> Layout | None:
    """How the rows lie in what a module is given and gives; None if it is not called."""
    first, reverse, whole = seen
    if not any(seen):
        return None
    found, certain = set(), True
    for calls in zip(first, reverse, whole, strict=False):
        given, output = [
            [_kind(*leaves, rows) for leaves in zip(*each, strict=False)] for each in zip(*calls, strict=True)
        ]
        sizes = [x.shape[axis] if isinstance(axis, int) else None for axis, x in zip(given, calls[0][0], strict=False)]
        found.add(Layout(tuple(given), tuple(output), tuple(sizes)))
        certain = certain and all(_tells(kind, x, rows) for kind, x in zip(given, calls[2][0], strict=False))
    layout = found.pop() if len(found) == 1 and len(first) == len(reverse) == len(whole) else Layout((None,), (None,))
    given, output = ([kind for kind in kinds if kind != OTHER] for kinds in layout[:2])
    # Of what is the same for all, what is computed gets a first axis for the rows: there has to be room for it.
    alike = set(given) == set(output) == {SHARED} and all(
        len(x) == 1 for x in whole[0][0] + whole[0][1] if isinstance(x, Tensor)
    )
    if None in given or not given or not (alike or (given[0] != SHARED and not {None, SHARED} & set(output))):
        of = ", ".join(str(tuple(x.shape)) for x in (whole or first or reverse)[0][0] if isinstance(x, Tensor))
        raise ValueError(
            f"{work.path} is given {of or 'no tensor'} for a batch of {rows} rows, and which of it is whose cannot be "
            f"told; {_INSTEAD}"
        )
    return layout._replace(certain=certain)


def _tells(kind: Any, x: Any, rows: int) -> bool:
    """Whether the rows of a tensor differ, or there is one place only where they can be."""
    if not isinstance(kind, int):
        return True
    there = _rows_of(x, kind, rows)
    one_place = there.shape[1] == 1 and (x.dim() < 2 or x.shape[1 - kind] % rows != 0)
    return one_place or not _close(there, there[:1].expand_as(there))


def _kind(first: Any, reverse: Any, whole: Any, rows: int) -> Any:
    if not isinstance(whole, Tensor):
        return OTHER
    for axis in range(min(2, whole.dim())):
        size = first.shape[axis]
        if whole.shape == reverse.shape and whole.shape[axis] == rows * size:
            there, back = _rows_of(whole, axis, rows), _rows_of(reverse, axis, rows)
            if _is_row(there[0], first.movedim(axis, 0), there) and _is_row(there.flip(0), back, there):
                return axis
    same = first.shape == reverse.shape == whole.shape
    return SHARED if same and _close(whole, first) and _close(whole, reverse) else None


def _is_row(one: Tensor, other: Tensor, rows: Tensor) -> bool:
    """Whether two are close, and, but for rounding, closer than `rows` are to each other."""
    if not _close(one, other) or not one.is_floating_point():
        return _close(one, other)
    rounding = 1e-5 if one.dtype in (torch.float32, torch.float64) else 1e-2
    one, other, rows = (torch.nan_to_num(x.float()) for x in (one, other, rows))
    spread, rounding = (rows - rows.mean(0)).norm() / len(rows) ** 0.5, rounding * one.norm()
    each = spread * (one.numel() / rows[0].numel()) ** 0.5
    return bool(spread <= rounding or (one - other).norm() <= max(each, rounding))


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    near = 1e-3 if one.dtype in (torch.float32, torch.float64) else 5e-2
    one, other = (torch.nan_to_num(x.float()) for x in (one, other))
    return bool((one - other).norm() <= near * other.norm() + 1e-6)


# What users call.


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> None:
    """Make `adapter_name` the adapter that `model` computes with, trains and saves, its head and biases included.

    Nothing is copied or loaded; the modes (training, merged) stay. Example: see `list_adapters`.

    A list of names means the sum of their updates, until another call of `set_adapter`:

    >>> import loralib as lora
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> for name in ("tone", "facts"):
    ...     _ = lora.inject_lora(model, r=2, target_modules=["0"], adapter_name=name)
    >>> lora.set_adapter(model, ["tone", "facts"])
    >>> lora.active_adapter(model)
    ['tone', 'facts']

    A sum is for computing only. Meanwhile the modules of the model hold the base, so the model lists no trained
    tensors, and saving, merging and changing it are refused until one adapter is set again. Gradients do reach the
    tensors of each adapter. What is written into them through `.data` meanwhile does not count.

    Raises:
        ValueError: `model` has no such adapter, or is sharded by `fully_shard`; or several have a head, a bias or
            something else in one module that does not add up. Nothing has been changed then.
    """
    modules = all_modules(model)
    several = next((vars(m)["_several"].block for m in modules if "_several" in vars(m)), None)
    if several is not None and not several.shown:
        check_one(modules)
    names = (adapter_name,) if isinstance(adapter_name, str) else _names_of(model, adapter_name, adapter_names(model))
    if not names:
        raise ValueError(f"adapter_name={adapter_name!r}: must be a name, or a list of them")
    found = _places(modules)
    if found and found[0][1].current != adapter_name:
        check_not_exchanged(model)
    check_intact(model, [found[0][1].current, *names] if found else None)
    if not any(names[0] in place.parts for _, place in found):
        check_present(model, names[0])
    if several is not None:
        several.undo()
    if len(names) == 1:
        return put(model, names[0], modules)
    try:
        _begin(model, [names], entries=False).shown = list(names)
    except Exception:
        if several is not None:
            set_adapter(model, several.shown)
        raise


@contextlib.contextmanager
def adapters_per_row(model: nn.Module, adapter_names: Sequence[str | None | Sequence[str]]) -> Iterator[nn.Module]:
    """Inside the `with` block each row of a batch is computed with its own adapter, as if it were alone.

    >>> import loralib as lora
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    >>> for name in ("sst2", "mrpc"):
    ...     _ = lora.inject_lora(model, r=2, target_modules=["0"], adapter_name=name)
    ...     _ = nn.init.ones_(model[0].lora_B)
    >>> x = torch.ones(3, 8)
    >>> with torch.no_grad(), lora.adapters_per_row(model, ["sst2", None, "mrpc"]):
    ...     mixed = model(x)
    >>> lora.set_adapter(model, "sst2")
    >>> torch.allclose(mixed[:1], model(x[:1]))
    True

    Hugging Face models also take the list as in PEFT: `model(..., adapter_names=[...])` and
    `model.generate(..., adapter_names=[...])`. In `generate` the beams of a row use the row's adapter.

    Heads, biases and statistics of the adapters are used, too, if their shapes agree. The first call runs the model
    three more times, on its first row, all rows and all in reverse, to find out how the rows of the batch lie in the
    input of each layer (windows of an image, flattened tokens); that is remembered for calls with the same arguments
    and flags. Two things are not noticed: a model that orders rows by their data (by length, say) and gets them in
    that order at first, and `torch.utils.checkpoint` by hand with `use_reentrant=True`.

    Nothing is merged inside the block. Gradients reach the tensors of each adapter, which `model.parameters()` does not
    list there. One model must not be used by several threads: see `share_base`.

    Args:
        model: a model with adapters; called as a whole, or by a part of it that is a Hugging Face model.
        adapter_names: for each row a name; None or "__base__" for the base; or a list of names for their sum.

    Raises:
        ValueError: `model` has no adapter of one of the names, is computing with several or without adapters already,
            or has a layer whose rows cannot be told apart (the error names it): experts that get the tokens that chose
            them, and layers with time before the batch. Or, at a call, there is not one name for each row.
        RuntimeError: at a call: a convolution, head or norm is compiled; or an adapter has dropout, in training mode.
    """
    model = unwrapped(model)
    there = list_adapters(model)
    block = _begin(model, [_names_of(model, given, there) for given in _listed(adapter_names)])
    try:
        yield model
    finally:
        block.undo()


def _listed(adapter_names: Any) -> list:
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence) or not adapter_names:
        raise ValueError(f"adapter_names={adapter_names!r}: must be a list, with a name or None for each row")
    return list(adapter_names)


def _names_of(model: nn.Module, given: Any, there: list[str]) -> Names:
    names = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(set(names)) < len(names) or (len(names) > 1 and None in names):
        raise ValueError(f"{given!r}: a sum is of different adapters")
    for name in names:
        if name not in (None, BASE_NAME, *there):
            check_present(model, name)  # raises
    return tuple(name for name in names if name not in (None, BASE_NAME))


def _begin(model: nn.Module, rows: list[Names], entries: bool = True) -> Block:
    modules = {path: module for module, path in _first_names(model).items()}
    all_ = list(modules.values())
    check_whole(model, all_)
    suspended = (vars(module)["_place"].suspended for module in all_ if "_place" in vars(module))
    if any("_disabled" in vars(module) for module in all_) or any(suspended):
        raise ValueError("the adapters are disabled just now; choose adapters outside of lora.disable_adapters")
    adopt(all_)
    found = [(module, vars(module)["_place"]) for module in all_ if "_place" in vars(module)]
    block = Block(rows)
    planned = _plan(block, model, modules)
    here = [(module, place, place.active) for module, place in found if place.active is not None]
    for module, place, active in here:
        place.tensors(module, active)  # for its error, before anything changes
    merged = [module for module in all_ if isinstance(module, Adapted) and module.merged]
    names = [(place, place.current) for _, place in found]
    block.undo = functools.partial(_end, block, here, names, merged)
    try:
        for module, place, _ in here:
            place.put(module, None)
        for _, place in found:
            place.current = None
        _note_norms([work for _, work in planned if work.way != "parts"])
        for module, work in planned:
            if work.way != "parts":
                A = next(part.tensors["lora_A"] for part in work.place.parts.values() if "lora_A" in part.own)
                with torch.no_grad():
                    work.stacked(A.device, _dtype_of(module, A))
            _change(block, module, _computing(type(module), work.way), work)
            for member, _ in work.members:
                if member is not module:
                    _change(block, member, _within(type(member)), work)
        around = [model, *(module for module in all_ if module is not model and hasattr(type(module), "tie_weights"))]
        for module in around if entries else ():
            if "_several" not in vars(module):
                _change(block, module, _entered(type(module)), Around(block))
    except BaseException:
        block.undo()
        raise
    return block


def _dtype_of(module: nn.Module, A: Tensor) -> torch.dtype:
    weight = module._parameters.get("weight")
    return A.dtype if weight is None or is_quantized(module) else weight.dtype


def _first_names(model: nn.Module) -> dict[nn.Module, str]:
    found: dict[nn.Module, str] = {}
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module not in found:
            found[module] = path
            children = () if isinstance(module, Adapted) and module.is_leaf else reversed(module._modules.items())
            waiting += [(f"{path}.{key}" if path else key, child) for key, child in children if child is not None]
    return found


def _change(block: Block, module: nn.Module, cls: Any, work: Any) -> None:
    block.changed.append((module, type(module)))
    if isinstance(work, Work):
        work.classes[module] = type(module)
    change_class(module, type(module), cls)
    vars(module)["_several"] = work


def _end(block: Block, here: list[tuple], names: list[tuple], merged: list[Adapted]) -> None:
    for module, cls in reversed(block.changed):
        vars(module).pop("_several", None)
        change_class(module, type(module), cls)
    block.changed.clear()
    for module, place, active in here:
        place.put(module, active)
    for place, current in names:
        place.current = current
    for module in merged:
        if not module.merged:
            module.merge()


def _plan(block: Block, model: nn.Module, modules: dict[str, nn.Module]) -> list[tuple[nn.Module, Work]]:
    """What each module has to do that has something of the named adapters, or that holds such modules."""
    used = {name for slot in block.slots for name in slot}
    units = {path: _unit(modules, path) for path, module in modules.items() if used & _parts_here(module)}
    chosen = set(units.values())
    inside: dict[str, list[str]] = {}
    for path in units:
        above = itertools.accumulate(path.split("."), lambda one, part: f"{one}.{part}")
        inside.setdefault(next(name for name in above if name in chosen), []).append(path)
    planned = []
    for unit, paths in inside.items():
        members = [(modules[path], vars(modules[path])["_place"]) for path in paths]
        way = _way(*members[0], used) if paths == [unit] and units[unit] == unit else "parts"
        plain = members[0][1].plain.cls.forward in (nn.Linear.forward, core._forward)
        work = Work(block, unit, way, members, plain)
        _check_work(block, model, modules, work, unit)
        planned.append((modules[unit], work))
    return planned


def _parts_here(module: nn.Module) -> set[str]:
    place = vars(module).get("_place")
    return {name for name, part in place.parts.items() if part.own} if place else set()


def _unit(modules: dict[str, nn.Module], path: str) -> str:
    """The module that computes with the weights of the module `path`: it, or one around it that reads them."""
    above = list(itertools.accumulate(path.split(".")[:-1], lambda one, part: f"{one}.{part}"))
    for name in above:
        module = modules.get(name)
        if isinstance(module, nn.TransformerEncoderLayer) or getattr(module, "share_att_key", False):
            return name
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and "expert" in name.rpartition(".")[2]:
            return name.rpartition(".")[0]  # an expert is given the tokens that chose it, from any row
    key = path.rpartition(".")[2]
    if not is_read_from_outside(modules, path):
        return path
    for name in above:
        if name in modules and is_read_from_outside({"": modules[name]}, key):
            return name
    raise ValueError(
        f"{path} is read by the model itself, past its forward, which no row can be told apart in; {_INSTEAD}"
    )


def _way(module: nn.Module, place: Place, used: set[str]) -> str:
    kinds = set()
    for name in used & place.parts.keys():
        part, form = place.parts[name], place.form_of(name)
        branches = getattr(form.cls, "branches", False) and not getattr(form.cls, "computes_weight", False)
        if part.own >= LORA_NAMES and branches and issubclass(form.cls, (Matrix, Table)):
            is_table = issubclass(form.cls, Table) and not part.own - LORA_NAMES
            is_matrix = issubclass(form.cls, Matrix) and not part.own - LORA_NAMES - {"bias"}
            kinds.add("lookup" if is_table else "linear" if is_matrix else "parts")
        else:
            kinds.add("bias" if part.own == {"bias"} else "parts")
    if kinds <= {"linear", "bias"} and "linear" in kinds:
        return "linear"
    # Norms that lookups bound, and gradients that the counts of tokens scale, are of each adapter's own lookup.
    alone = getattr(module, "max_norm", None) is not None or getattr(module, "scale_grad_by_freq", False)
    return "lookup" if kinds == {"lookup"} and not alone else "parts"


def _check_work(block: Block, model: nn.Module, modules: dict[str, nn.Module], work: Work, path: str) -> None:
    """Raise ValueError for what cannot be done; nothing is changed."""
    module = modules[path]
    if module is model and not block.single:
        raise ValueError(f"a {type(module).__name__} by itself: put it into a model, such as nn.Sequential")
    for slot in block.slots:
        own = [[place.parts[name].own for name in slot if name in place.parts] for _, place in work.members]
        more = [keys - LORA_NAMES for each in own for keys in each if keys - LORA_NAMES]
        linear = work.way != "parts" or isinstance(module, (Kernel, nn.modules.conv._ConvNd))
        if len(work.names_in(slot)) > 1 and (len(more) > 1 or not linear or (more and work.way == "parts")):
            what = ", ".join(sorted(frozenset().union(*more))) or "the update"
            raise ValueError(
                f"{path}: {' and '.join(map(repr, slot))} have both something there ({what}) that does not add up; "
                "choose one of them"
            )
    for name in {name for slot in block.slots for name in slot}:
        for member, place in work.members:
            if name in place.parts:
                place.tensors(member, name)  # for its error
                settings = place.settings(member, name)
                block.dropless = block.dropless and settings.get("lora_dropout", core.identity) is core.identity


def share_base(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with its own adapters and the same base Parameters, so that the base takes no memory.

    For threads: each one uses its own copy, and can switch it, load adapters into it and merge it, even permanently.
    Two things are not safe: one model in two threads while one of them switches, merges, or is in `adapters_per_row`;
    and anything that changes the shared Parameters for all copies (training the base, loading a state dict, `to`).

    >>> import loralib as lora
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = lora.inject_lora(model, r=2, target_modules=["0"])
    >>> other = lora.share_base(model)
    >>> other[0].weight is model[0].weight, other[0].lora_A is model[0].lora_A
    (True, False)
    """
    check_one(model.modules())
    memo: dict[int, Any] = {}
    for module in model.modules():
        base = own_tensors(module) if isinstance(module, InPlace) else module._parameters
        memo.update((id(tensor), tensor) for tensor in base.values() if isinstance(tensor, nn.Parameter))
    for tensor in memo.values():
        setattr(tensor, SHARED_BASE, True)
    return copy.deepcopy(model, memo)


core.per_row.append(adapters_per_row)
