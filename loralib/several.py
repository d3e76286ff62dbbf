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
of four tokens looks the same with time first. So it is tried, once for each module: at the first call the model runs
its first row alone, its last row alone, and all, as its base, and what a module is given and gives has to be, at its
beginning and its end, what it is of these rows alone. That holds for windows and flattened tokens, too; what is the
same for any number of rows, such as positions, is used for each. All else is refused by name, and so are experts that
are given the tokens that chose them, as those differ from call to call.
"""

import contextlib
import copy
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralib import core
from loralib.adapters import (
    LORA_NAMES,
    Place,
    active_adapter,
    adopt,
    base_modules,
    change_class,
    check_intact,
    check_one,
    check_present,
    check_whole,
    own_tensors,
    places,
    put,
)
from loralib.architectures import is_read_from_outside, unwrapped
from loralib.core import Adapted, InPlace
from loralib.layers import Groups, Kernel, Matrix, Table

__all__ = ["adapters_per_row", "set_adapter", "share_base"]

BASE = "__base__"  # PEFT's name for it
_flatten, _unflatten = torch.utils._pytree.tree_flatten, torch.utils._pytree.tree_unflatten
Names = tuple[str, ...]


class Block:
    """Which adapters the rows of a batch are computed with.

    Attributes:
        slots: the different ones: names of adapters, none for the base, several for their sum.
        rows: for each row the number of its slot.
        off: whether adapters are disabled for a while.
        beams: whether each row may stand for several, one after the other, as the beams of `generate` do.
    """

    def __init__(self, rows: Sequence[Names], before: str | None):
        self.before = before
        self.slots: list[Names] = [(), *sorted({names for names in rows if names})]
        self.rows = [self.slots.index(names) for names in rows]
        self.single = len(set(self.rows)) == 1
        self.index = torch.tensor(self.rows)
        self.off = self.beams = self.entered = False
        self.dropless = True
        self.recorder: _Recorder | None = None
        self.changed: list[tuple[nn.Module, type]] = []
        self.shown: list[str] | None = None
        self.undo: Callable[[], None]

    def index_on(self, device: torch.device) -> Tensor:
        """The numbers of the slots, there."""
        if self.index.device != device:
            self.index = self.index.to(device)
        return self.index


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
        self.stacks: tuple | None = None
        self.made_from: list = []

    @property
    def place(self) -> Place:
        """The place that remembers how rows lie in what the module is given."""
        return self.members[0][1]

    def names_in(self, slot: Names) -> Names:
        """Those adapters of a slot that have something here."""
        return tuple(name for name in slot if any(name in place.parts for _, place in self.members))

    def rows(self, leaf: int, x: Tensor) -> int:
        """How many rows of the batch are in `x`, the input of that number: 1 if it is the same for all."""
        block = self.block
        if block.single:
            return 1
        layout = self.place.layout
        if layout is None:
            raise ValueError(
                f"{self.path} was not called when it was tried which rows of its input are whose; call the model as a "
                "whole, and not compiled the first time, in lora.adapters_per_row"
            )
        if layout[leaf] == "rows" and x.shape[0] % len(block.rows) == 0:
            return len(block.rows)
        if layout[leaf] == "shared" and x.shape[0] == 1:
            return 1
        raise ValueError(
            f"{self.path} got {x.shape[0]} rows for a batch of {len(block.rows)}: which are whose cannot be told; "
            f"{_INSTEAD}"
        )

    def stacked(self, device: torch.device, dtype: torch.dtype) -> tuple:
        """A, B and biases of all slots, in one tensor each (`_stack`)."""
        (module, place), slots = self.members[0], self.block.slots
        tensors = [tensor for slot in slots for name in self.names_in(slot) for tensor in place.parts[name].tensors.values()]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return _stack(module, place, slots, device, dtype)
        if torch.compiler.is_compiling() and self.stacks is not None:
            return self.stacks
        made_from = [device, dtype]
        for tensor in tensors:
            made_from += [id(tensor), 0 if tensor.is_inference() else tensor._version]
        if self.stacks is None or made_from != self.made_from:
            with torch.inference_mode(False), torch.no_grad():
                self.stacks, self.made_from = _stack(module, place, slots, device, dtype), made_from
        return self.stacks


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
    there = sum(map(len, tensors))
    return torch.cat([*tensors, like.new_zeros(rank - there, like.shape[1])])


def _factors(part: Any) -> tuple[Tensor, Tensor]:
    A, B, settings = part.tensors["lora_A"], part.tensors["lora_B"], part.form.settings
    if "enable_lora" in settings:
        sizes = settings.get("group_sizes") or [len(B) // sum(settings["enable_lora"])] * len(settings["enable_lora"])
        groups = {"interleave": 1, **settings, "group_sizes": sizes}
        B = Groups._full_B(types.SimpleNamespace(**groups), B)  # type: ignore[arg-type]
    return A, B.T * settings["scaling"]


# A product with all adapters at once, of which a mask leaves each row its own, costs numbers; one with the row's own
# costs a copy of A and B for each row, which is worth it from so many positions of a row on.
_POSITIONS = 16


def _linear(work: Work, base: Any, module: Any, x: Tensor) -> Tensor:
    result = base(module, x)
    _check_dropout(work, module)
    A, B, bias = work.stacked(result.device, result.dtype)
    block, rows = work.block, work.rows(0, x)
    index = block.rows[0] if block.single else block.index_on(x.device)
    if rows == 1 and not block.single:  # what is the same for all so far is not any more
        result = result.expand(len(block.rows), *result.shape[1:])
    if A is not None:
        given = x.to(result.dtype).reshape(rows, -1, x.shape[-1])
        wide = rows == 1 or given.shape[1] * (len(A) - 1) <= _POSITIONS
        if block.single:
            hidden, B = F.linear(given[0], A[index]), B[index]
        elif wide:
            of_all = F.linear(given, A.flatten(0, 1)).unflatten(-1, A.shape[:2])
            own = F.one_hot(index, len(A)).to(of_all.dtype)[:, None, :, None]
            hidden, B = (of_all * own).flatten(2).flatten(0, 1), B.flatten(0, 1)
        else:
            hidden, B = torch.bmm(given, A[index].mT), B[index]
        result = _add_product(result, hidden, B, work.plain)
    if bias is not None:
        each = result.reshape(1 if block.single else len(block.rows), -1, result.shape[-1])
        result = (each + bias[index].unsqueeze(-2)).to(result.dtype).reshape(result.shape)
    return result


def _add_product(result: Tensor, hidden: Tensor, B: Tensor, plain: bool) -> Tensor:
    shape = (-1, result.shape[-1]) if hidden.dim() == 2 else (len(hidden), -1, result.shape[-1])
    # Nobody else has the output of a plain layer yet.
    if plain and result.is_contiguous() and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        add = torch.Tensor.addmm_ if hidden.dim() == 2 else torch.Tensor.baddbmm_
    else:
        add = torch.addmm if hidden.dim() == 2 else torch.baddbmm
    with core.full_precision(result.device):  # the factors have the dtype of the result
        return add(result.reshape(shape), hidden, B).reshape(result.shape)


def _lookup(work: Work, base: Any, module: Any, x: Tensor) -> Tensor:
    result = base(module, x)
    A, B, _ = work.stacked(result.device, result.dtype)
    block, rows = work.block, work.rows(0, x)
    ids = x.reshape(rows, -1)
    if block.single:
        slot = block.rows[0]
        hidden, B = F.embedding(ids, A[slot].T), B[slot]
    else:
        index = block.index_on(x.device)
        hidden = F.embedding(ids + (index * A.shape[2])[:, None], A.mT.flatten(0, 1))
        B = B[index]
    if module.padding_idx is not None and hidden.requires_grad:
        hidden = torch.where((ids == module.padding_idx)[..., None], hidden.detach(), hidden)
    update = torch.matmul(hidden, B)
    if rows == 1 and not block.single:
        result = result.expand(len(block.rows), *result.shape[1:])
    return result + update.reshape(result.shape)


def _by_parts(work: Work, base: Any, module: Any, args: tuple, kwargs: dict) -> Any:
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
    given = [work.rows(i, leaf) if isinstance(leaf, Tensor) else 1 for i, leaf in enumerate(leaves)]
    if set(given) == {1}:  # the same for all so far
        leaves = [_repeated(leaf, len(block.rows)) for leaf in leaves]
        given = [len(block.rows) if isinstance(leaf, Tensor) else 1 for leaf in leaves]
    order, outputs = [], []
    for slot in sorted(set(block.rows)):
        rows = [i for i, other in enumerate(block.rows) if other == slot]
        order += rows
        chosen = [_chosen(leaf, rows, n) if n > 1 else leaf for leaf, n in zip(leaves, given, strict=True)]
        outputs.append(_with_adapters(work, module, block.slots[slot], *_unflatten(chosen, form)))
    inverse = [order.index(row) for row in range(len(order))]
    each, forms = zip(*map(_flatten, outputs), strict=True)
    whole = [_put_together(work, parts, inverse) for parts in zip(*each, strict=True)]
    return _unflatten(whole, forms[0])


def _repeated(leaf: Any, rows: int) -> Any:
    return leaf.expand(rows, *leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf


def _chosen(leaf: Tensor, rows: list[int], of: int) -> Tensor:
    return leaf.unflatten(0, (of, -1))[rows].flatten(0, 1)


def _put_together(work: Work, parts: tuple, inverse: list[int]) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0]
    counts = [work.block.rows.count(slot) for slot in sorted(set(work.block.rows))]
    each = [part.unflatten(0, (count, -1)) for part, count in zip(parts, counts, strict=True)]
    return torch.cat(each)[inverse].flatten(0, 1)


def _with_adapters(work: Work, module: Any, slot: Names, args: tuple, kwargs: dict) -> Any:
    names = work.names_in(slot)
    if len(names) < 2:
        return _with_adapter(work, module, names[0] if names else None, args, kwargs)
    # Of what is linear in its weight the update is what it makes of a difference.
    outputs = [_with_adapter(work, module, name, args, kwargs) for name in names]
    return sum(outputs) - (len(names) - 1) * _with_adapter(work, module, None, args, kwargs)


def _with_adapter(work: Work, module: Any, name: str | None, args: tuple, kwargs: dict) -> Any:
    several = type(module)
    plain = several.__mro__[several.__mro__.index(Several) + 1]
    change_class(module, several, plain)
    try:
        for member, place in work.members:
            place.put(member, name)
        return type(module).forward(module, *args, **kwargs)
    finally:
        for member, place in work.members:
            place.put(member, None)
        change_class(module, plain, several)


def _check_dropout(work: Work, module: nn.Module) -> None:
    if module.training and not work.block.dropless:
        raise RuntimeError(
            f"{work.path} is in training mode, and an adapter has lora_dropout, which is not done with several adapters "
            "at once; call model.eval(), or train them one by one"
        )


class Several(InPlace):
    """What the class of a module has in which several adapters compute, or of a model around it."""

    _several: Work | None = None

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        if self._several is not None:
            self._several.stacks = None
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
            return _by_parts(work, cls.forward, self, args, kwargs)
        return _WAYS[way](work, cls.forward, self, *args, **kwargs)

    return types.new_class(cls.__name__, (Several, cls), exec_body=lambda body: body.update(_members(cls, forward)))


_WAYS = {"linear": _linear, "lookup": _lookup}


@core._cached  # type: ignore[untyped-decorator]
def _entered(cls: Any) -> Any:
    """The class of a model, or of a part that is called by itself, in a block."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        block = self._several.block
        if block.off or block.entered or block.recorder is not None:
            return cls.forward(self, *args, **kwargs)
        size = _batch_size(self, args, kwargs)
        fits = size == len(block.rows) or (block.beams and size % len(block.rows) == 0)
        if not fits:
            raise ValueError(f"{len(block.rows)} names of adapters for a batch of {size}: give one for each row")
        if torch.compiler.is_compiling():
            return cls.forward(self, *args, **kwargs)
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
            before, block.beams = block.beams, True
            try:
                return cls.generate(self, *args, **kwargs)
            finally:
                block.beams = before

        members["generate"] = generate
    return types.new_class(cls.__name__, (Several, cls), exec_body=lambda body: body.update(members))


def _members(cls: Any, forward: Any) -> dict:
    return {"__module__": __name__, "__doc__": cls.__doc__, "forward": forward, "__new__": core._constructor(cls)}


def _batch_size(model: Any, args: tuple, kwargs: dict) -> int:
    main = kwargs.get(getattr(model, "main_input_name", ""))
    for leaf in [main, *args, *_flatten(kwargs)[0]]:
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError(f"{type(model).__name__} got no tensor whose rows the adapters could be for")


# Which rows are whose.


class _Recorder:
    """What modules get and give, call by call."""

    def __init__(self) -> None:
        self.calls: dict[Work, list[tuple[list, list]]] = {}

    def see(self, work: Work, given: Any, output: Any) -> None:
        self.calls.setdefault(work, []).append((_flatten(given)[0], _flatten(output)[0]))


def _try_rows(block: Block, model: Any, forward: Any, args: tuple, kwargs: dict, size: int) -> None:
    """Find out how the rows lie in what modules are given, if that is not known for all."""
    given = frozenset(key for key, value in kwargs.items() if value is not None), len(args)
    works = [vars(module)["_several"] for module, _ in block.changed]
    open_ = [work for work in works if isinstance(work, Work) and work.place.layout is None and given not in work.place.tried]
    if not open_:
        return
    beams = size // len(block.rows)
    seen = []
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:  # not by eval(), which merges
            module.training = False
        for rows in (range(beams), range(size - beams, size), None):
            block.recorder = _Recorder()
            own, named = torch.utils._pytree.tree_map(functools.partial(_taken, rows=rows, size=size), (args, kwargs))
            with torch.no_grad(), torch.random.fork_rng(), core.quiet_state():
                forward(model, *own, **named)
            seen.append(block.recorder.calls)
    except Exception as error:
        raise ValueError(
            "which rows are whose is tried by running one row alone, and that failed with "
            f"{type(error).__name__}: {error}; {_INSTEAD}"
        ) from error
    finally:
        block.recorder = None
        for module in training:
            module.training = True
    layouts = {work: _layout(work, *(calls.get(work, []) for calls in seen), len(block.rows)) for work in open_}
    for work, layout in layouts.items():
        work.place.tried |= {given}
        if layout is not None:
            work.place.layout = layout


def _taken(leaf: Any, rows: Any, size: int) -> Any:
    if not isinstance(leaf, Tensor):
        leaf = copy.deepcopy(leaf)
        if rows is not None and hasattr(leaf, "batch_select_indices") and leaf.get_seq_length():  # a cache
            leaf.batch_select_indices(torch.tensor(list(rows)))
        return leaf
    return leaf[list(rows)] if rows is not None and leaf.dim() and leaf.shape[0] == size else leaf.clone()


def _layout(work: Work, first: list, last: list, whole: list, rows: int) -> tuple | None:
    """For each tensor that a module is given whether it has rows or is the same for all; None if it is not called."""
    if not whole and not first and not last:
        return None
    found = set()
    for one, other, all_ in zip(first, last, whole, strict=False):
        each = [
            [_kind(*leaves, rows) for leaves in zip(*three, strict=False)] for three in zip(one, other, all_, strict=True)
        ]
        found.add((tuple(each[0]), tuple(each[1])))
    same = len(found) == 1 and len(first) == len(last) == len(whole)
    given, output = next(iter(found)) if same else ((None,), (None,))
    tensors = [kind for kind in given if kind != "other"]
    lookup = "shared" in tensors[:1] and work.way != "parts" and len(whole[0][0][0]) == 1
    apart = tensors[:1] == ["rows"] and set(output) <= {"rows", "other"}
    if not same or None in given or not (apart or lookup or set(tensors) == set(output) == {"shared"}):
        of = ", ".join(str(tuple(x.shape)) for x in (whole or first or last)[0][0] if isinstance(x, Tensor))
        raise ValueError(
            f"{work.path} is given tensors of {of or 'no size'} for a batch of {rows} rows, and which of it is whose "
            f"cannot be told; {_INSTEAD}"
        )
    return given


def _kind(first: Any, last: Any, whole: Any, rows: int) -> str | None:
    if not isinstance(whole, Tensor):
        return "other"
    if whole.dim() and len(whole) == rows * len(first) and first.shape == last.shape:
        size = len(first)
        if _close(whole[:size], first) and _close(whole[-size:], last):
            return "rows"
    same = first.shape == last.shape == whole.shape
    return "shared" if same and _close(whole, first) and _close(whole, last) else None


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape[1:] != other.shape[1:]:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    near = 1e-3 if one.dtype in (torch.float32, torch.float64) else 5e-2
    one, other = (torch.nan_to_num(x.float()) for x in (one, other))
    return bool((one - other).norm() <= near * other.norm() + 1e-6)


# What users call.


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> None:
    """Make `adapter_name` the adapter that `model` computes with, trains and saves, its head and biases included.

    Nothing is copied or loaded; the modes (training, merged) carry over. Example: see `list_adapters`.

    A list of names means the sum of their updates, until another call of `set_adapter`:

    >>> import loralib as lora
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> for name in ("tone", "facts"):
    ...     _ = lora.inject_lora(model, r=2, target_modules=["0"], adapter_name=name)
    >>> lora.set_adapter(model, ["tone", "facts"])
    >>> lora.active_adapter(model)
    ['tone', 'facts']

    A sum is for computing: the base stands in the model, which therefore lists none of the tensors that train, and
    saves, merges and changes nothing until one adapter is set again. Gradients do reach the tensors of each.

    Raises:
        ValueError: `model` has no such adapter, or is sharded by `fully_shard`; or several have a head, a bias or
            something else in one module that does not add up. Nothing has been changed then.
    """
    several = next((vars(m)["_several"].block for m in model.modules() if "_several" in vars(m)), None)
    if several is not None and not several.shown:
        check_one(model.modules())
    names = None if isinstance(adapter_name, str) else _names_of(model, adapter_name)
    if names is not None and not names:
        raise ValueError(f"adapter_name={adapter_name!r}: must be a name, or a list of them")
    check_intact(model)
    if names is None and not any(adapter_name in place.parts for _, place in places(model)):
        check_present(model, adapter_name)  # type: ignore[arg-type]
    if several is not None:
        several.undo()
    if names is None or len(names) == 1:
        return put(model, adapter_name if names is None else names[0])  # type: ignore[arg-type]
    try:
        _begin(model, [names], entries=False).shown = list(names)
    except Exception:
        if several is not None:
            set_adapter(model, several.shown)
        raise


@contextlib.contextmanager
def adapters_per_row(model: nn.Module, adapter_names: Sequence[str | None | Sequence[str]]) -> Iterator[nn.Module]:
    """Within the `with` block each row of a batch is computed with an adapter of its own, as it would be alone.

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

    Hugging Face models also take the list as PEFT has it, `model(..., adapter_names=[...])` and
    `model.generate(..., adapter_names=[...])`; in `generate` each row's beams are computed with the row's adapter.

    Heads, biases and statistics of the adapters are used, too, if their shapes agree. The first call runs the model
    three times more, on its first row, its last row and all rows, to find out how the rows of the batch lie in what
    each layer is given (windows of an image, flattened tokens); that is remembered. Nothing is merged within the
    block. Gradients reach the tensors of each adapter, which `model.parameters()` does not list there. Not for several
    threads at once on one model: see `share_base`.

    Args:
        model: a model with adapters; called as a whole, or by a part of it that is a Hugging Face model.
        adapter_names: for each row a name; None or "__base__" for the base; or a list of names for their sum.

    Raises:
        ValueError: `model` has no adapter of one of the names, is computing with several or without adapters already,
            or has a layer, which is named, whose rows cannot be told apart: experts that get the tokens that chose
            them, and layers with time before the batch. Or, at a call, there is not one name for each row.
        RuntimeError: at a call: a convolution, head or norm is compiled; or an adapter has dropout, in training mode.
    """
    model = unwrapped(model)
    block = _begin(model, [_names_of(model, given) for given in _listed(adapter_names)])
    try:
        yield model
    finally:
        block.undo()


def _listed(adapter_names: Any) -> list:
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence) or not adapter_names:
        raise ValueError(f"adapter_names={adapter_names!r}: must be a list, with a name or None for each row")
    return list(adapter_names)


def _names_of(model: nn.Module, given: Any) -> Names:
    names = [given] if given is None or isinstance(given, str) else list(given)
    if len(set(names)) < len(names) or (len(names) > 1 and None in names):
        raise ValueError(f"{given!r}: a sum is of different adapters")
    for name in names:
        if name is not None and name != BASE:
            check_present(model, name)
    return tuple(name for name in names if name is not None and name != BASE)


def _begin(model: nn.Module, rows: list[Names], entries: bool = True) -> Block:
    check_whole(model)
    check_intact(model)
    off = [m for m in model.modules() if vars(m).get("_disabled")] + [m for m, place in places(model) if place.suspended]
    if off:
        raise ValueError("the adapters are disabled just now; choose adapters outside of lora.disable_adapters")
    adopt(model)
    modules = {name: module for name, module in base_modules(model).items() if name in dict(model.named_modules())}
    block = Block(rows, active_adapter(model))
    planned = _plan(block, model, modules)
    merged = [module for module in modules.values() if isinstance(module, Adapted) and module.merged]
    block.undo = functools.partial(_end, block, model, block.before, merged)
    try:
        put(model, None)
        for module, work in planned:
            _change(block, module, _computing(type(module), work.way), work)
        around = {model: None, **{m: None for m in modules.values() if hasattr(type(m), "tie_weights")}}
        for module in around if entries else ():
            if "_several" not in vars(module):
                _change(block, module, _entered(type(module)), Around(block))
    except BaseException:
        block.undo()
        raise
    return block


def _change(block: Block, module: nn.Module, cls: Any, work: Any) -> None:
    block.changed.append((module, type(module)))
    change_class(module, type(module), cls)
    vars(module)["_several"] = work


def _end(block: Block, model: nn.Module, before: Any, merged: list[Adapted]) -> None:
    for module, cls in reversed(block.changed):
        vars(module).pop("_several", None)
        change_class(module, type(module), cls)
    block.changed.clear()
    put(model, before)
    for module in merged:
        if not module.merged:
            module.merge()


def _plan(block: Block, model: nn.Module, modules: dict[str, nn.Module]) -> list[tuple[nn.Module, Work]]:
    """What each module has to do that has something of the named adapters, or that holds such modules."""
    used = {name for slot in block.slots for name in slot}
    paths = [path for path, module in modules.items() if used & _parts_here(module)]
    units = {path: _unit(modules, path) for path in paths}
    planned = []
    for unit in dict.fromkeys(units.values()):
        inside = [path for path in paths if f"{path}.".startswith(f"{unit}.")] if unit else [""]
        if any(unit != other and f"{unit}.".startswith(f"{other}.") for other in units.values()):
            continue  # a part of another one
        members = [(modules[path], vars(modules[path])["_place"]) for path in inside]
        way = _way(*members[0], used) if inside == [unit] and units[unit] == unit else "parts"
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
    torchs = [name for name in above if isinstance(modules.get(name), nn.TransformerEncoderLayer)]
    if torchs:
        return torchs[0]
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
    bounded = getattr(module, "max_norm", None) is not None
    return "lookup" if kinds == {"lookup"} and not bounded else "parts"


def _check_work(block: Block, model: nn.Module, modules: dict[str, nn.Module], work: Work, path: str) -> None:
    """Raise ValueError for what cannot be done; nothing is changed."""
    module = modules[path]
    if module is model and not block.single:
        raise ValueError(f"a {type(module).__name__} by itself: put it into a model, such as nn.Sequential")
    above = itertools.accumulate(path.split(".")[:-1], lambda one, part: f"{one}.{part}")
    for name in above:
        experts = isinstance(modules.get(name), (nn.ModuleList, nn.ModuleDict)) and "expert" in name.rpartition(".")[2]
        if experts and not block.single:
            raise ValueError(
                f"{path} is given the tokens that chose it, and whose they are cannot be told; {_INSTEAD}"
            )
    for slot in block.slots:
        own = [[place.parts[name].own for name in slot if name in place.parts] for _, place in work.members]
        more = [keys - LORA_NAMES for each in own for keys in each if keys - LORA_NAMES]
        linear = work.way != "parts" or (isinstance(module, Kernel) or isinstance(module, nn.modules.conv._ConvNd))
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
                settings = vars(member) | member._modules if place.active == name else place.form_of(name).settings
                block.dropless = block.dropless and settings.get("lora_dropout", core.identity) is core.identity


def share_base(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with adapters of its own and the very Parameters of its base, which take no memory anew.

    For threads: each serves on a copy of its own, switches it, and loads adapters into it as it likes. What is not
    safe is one model in two threads while one of them switches, merges, or is in `adapters_per_row`; and to train the
    base's Parameters, or to move or cast one of the copies by `to`, which changes them for all.

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
    return copy.deepcopy(model, memo)


core.per_row.append(adapters_per_row)
