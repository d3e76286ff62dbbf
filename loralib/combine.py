"""One adapter out of several: their weighted sum, exact or of a smaller rank, and the methods TIES and DARE.

For layer l and adapters a with weights w_a the update is scaling_a * B_a A_a =: D_a, and `combine_adapters` makes

| method            | the new update                                                  | its rank           |
|-------------------|-----------------------------------------------------------------|--------------------|
| "cat"             | sum of w_a D_a                                                  | the sum of ranks   |
| "svd"             | of all matrices of rank r the nearest to that (Frobenius norm)  | r                  |
| "linear"          | (sum of p_a B_a) (sum of q_a A_a), p_a q_a = w_a scaling_a      | that of each       |
| "magnitude_prune" | as "linear", of each factor only the largest entries            | that of each       |
| "ties"            | as that, of each entry the mean of those with the common sign   | that of each       |
| "dare_linear"     | as "linear", of each factor random entries, divided by density  | that of each       |
| "dare_ties"       | as "ties", with the random entries                              | that of each       |
| "..._svd"         | the last four on the matrices D_a rather than on A_a and B_a, nearest of rank r              |

Names and meanings are those of PEFT's `add_weighted_adapter`. TIES: Yadav et al., arXiv 2306.01708; DARE: Yu et al.,
arXiv 2311.03099. A fused projection is combined group by group, and a stack of experts matrix by matrix.
"""

import math
import numbers
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loralib.adapters import (
    adopt,
    base_modules,
    check_adapter_name,
    check_intact,
    check_not_offloaded,
    check_one,
    check_present,
    check_whole,
    list_adapters,
    of_base,
    own_tensors,
    unchanged_by_an_error,
    untied,
)
from loralib.architectures import group_spec, unwrapped
from loralib.core import Adapted, full_precision
from loralib.inject import LayerNames, Plan, plan_layers, plan_tokens, put_adapter
from loralib.layers import Groups
from loralib.parameters import LowRank
from loralib.utils import merge_lora_weights

__all__ = ["combine_adapters"]

_PRUNING = {"ties": "magnitude", "magnitude_prune": "magnitude", "dare_linear": "random", "dare_ties": "random"}
METHODS = ("cat", "svd", "linear", *_PRUNING, *(f"{name}_svd" for name in _PRUNING))
Pair = tuple[Tensor, Tensor]  # A and B of one matrix


def combine_adapters(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    method: str = "cat",
    r: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    generator: torch.Generator | None = None,
) -> list[str]:
    """Make a new adapter out of others, make it the active one and return the names of its LoRA layers.

    >>> import loralib as lora
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    >>> names = lora.inject_lora(model, r=2, target_modules=["0"], adapter_name="polite")
    >>> names = lora.inject_lora(model, r=3, target_modules=["0", "1"], adapter_name="rude")
    >>> lora.combine_adapters(model, ["polite", "rude"], [1.0, -0.5], "kind")
    ['0', '1']
    >>> lora.active_adapter(model), model[0].r, model[1].r
    ('kind', 5, 3)

    The adapters may differ in layers, ranks and alphas; where one has no layer, its update is zero. What they train
    whole (heads, biases, rows of tokens) gets the base's value plus the weighted sum of its changes; TIES and DARE are
    applied to these changes, too.

    Args:
        model: a model with the adapters, in any state; its base and the adapters are left as they are.
        adapters: their names, active or not.
        weights: one number for each; a negative one subtracts.
        adapter_name: the name of the new one. Its alpha is its rank, so its scaling is 1.
        method: "cat", exact; "svd", the best of rank `r`; "linear", a rough one that adds up A and B separately; or
            "ties", "dare_linear", "dare_ties", "magnitude_prune", each also with "_svd" (see `loralib.combine`). TIES
            elects signs before the weights are applied and takes means, as in PEFT.
        r: rank for "svd" and "..._svd"; by default the largest rank in each layer, and never more than the sum of the
            ranks there.
        density: which share of the entries TIES, DARE and "magnitude_prune" keep, above 0 and at most 1.
        majority_sign_method: how TIES elects a sign, by the "total" or the "frequency".
        generator: what DARE draws from; by default torch's own.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of range, there is no such adapter, the new name is
            taken, an adapter holds NaN or infinity, "linear" and the like meet different ranks, or two adapters adapt a
            module in ways that exclude each other. Nothing has been changed then.
    """
    check_adapter_name(adapter_name)
    model = unwrapped(model)
    check_one(model.modules())
    check_whole(model)
    names, weights = _check_adapters(model, adapters, weights)
    how = _check_method(method, r, density, majority_sign_method, generator)
    if adapter_name in list_adapters(model):
        raise ValueError(f"adapter_name={adapter_name!r}: the model has that adapter; delete it or take another name")
    adopt(base_modules(model).values())
    sources = [_read(model, name) for name in names]
    modules = base_modules(model)
    _check_together(names, sources)
    merged = any(isinstance(module, Adapted) and module._aside is not None for module in modules.values())
    with torch.no_grad():
        made = {path: _combine_layer(path, sources, weights, how) for path in _paths(modules, sources)}
        rows = {path: _combine_rows(path, modules, sources, weights, how) for path in _union(s.rows for s in sources)}
        whole = _combine_whole(modules, sources, weights, how)
    tensors = [*whole.values(), *(tensor for *_, pair in [*made.values(), *rows.values()] for tensor in pair)]
    if not all(tensor.float().isfinite().all() for tensor in tensors):
        raise ValueError(f"weights={list(weights)}: the result holds numbers that float32 cannot hold")
    merge_weights = any(layer.merge_weights for source in sources for layer in source.layers.values())
    plans = plan_layers(modules, {path: spec for path, (spec, _) in made.items()}, merge_weights)
    plans.update(plan_tokens(modules, {path: indices for path, (indices, _) in rows.items()}, merge_weights))
    values = {**{path: pair for path, (_, pair) in made.items()}, **{f"{p}.weight": t for p, (_, t) in rows.items()}}
    with unchanged_by_an_error(model, adapter_name):
        put_combined(model, adapter_name, modules, plans, values, whole)
    if merged:
        merge_lora_weights(model)
    return LayerNames(made)


def put_combined(
    model: nn.Module,
    adapter_name: str,
    modules: dict[str, nn.Module],
    plans: dict[str, Plan],
    values: Mapping[str, tuple[Tensor, ...]],
    whole: dict[tuple[str, str], Tensor],
) -> None:
    """Put an adapter into `model` whose numbers are known.

    Args:
        model, adapter_name, plans: see `put_adapter`.
        modules: those of `base_modules`.
        values: the tensors of each plan.
        whole: the values of what is trained whole, by module and name.
    """
    own: dict[str, frozenset[str]] = {}
    for name, plan in plans.items():
        plans[name] = plan._replace(draw=_drawn(values[name]))
        own[plan.path] = own.get(plan.path, frozenset()) | plan.shapes.keys()
    for path, key in whole:
        own[path] = own.get(path, frozenset()) | {key}
    check_not_offloaded({path: modules[path] for path in own})
    tensors = {place: own_tensors(modules[place[0]])[place[1]] for place in whole}
    apart = [".".join(place) for place in untied(tensors, whole)]
    put_adapter(model, adapter_name, plans, own, apart)
    with torch.no_grad():
        for (path, key), value in whole.items():
            place = vars(modules[path])["_place"]
            place.tensors(modules[path], adapter_name)[key].copy_(value)


def _drawn(values: tuple[Tensor, ...]) -> Callable[..., None]:
    def draw(weight: Tensor, *tensors: Tensor) -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)

    return draw


class _Method(NamedTuple):
    """How to combine: see `combine_adapters`."""

    name: str
    r: int | None
    density: float
    majority: str
    generator: torch.Generator | None

    @property
    def kind(self) -> str:
        return self.name.removesuffix("_svd")

    def merge(self, tensors: list[Tensor], weights: list[float]) -> Tensor:
        """The combination of tensors of one shape, entry by entry."""
        if self.density < 1:
            tensors = [self._prune(tensor) for tensor in tensors]
        stacked = torch.stack(tensors)
        weighted = stacked * stacked.new_tensor(weights).view(-1, *[1] * tensors[0].dim())
        if self.kind not in ("ties", "dare_ties"):
            return weighted.sum(0)
        votes = stacked if self.majority == "total" else stacked.sign()
        elected = stacked.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
        return (weighted * elected).sum(0) / elected.sum(0).clamp(min=1)

    def _prune(self, tensor: Tensor) -> Tensor:
        if _PRUNING[self.kind] == "magnitude":
            keep = torch.zeros_like(tensor).flatten()
            keep[tensor.abs().flatten().topk(int(self.density * tensor.numel())).indices] = 1
            return tensor * keep.view_as(tensor)
        device = tensor.device if self.generator is None else self.generator.device
        chances = torch.full(tensor.shape, self.density, device=device)
        return tensor * torch.bernoulli(chances, generator=self.generator).to(tensor) / self.density


class _Layer(NamedTuple):
    """What an adapter has where it adapts one weight.

    Attributes:
        pairs: A and B of each matrix, by the number of the group or of the expert.
        scaling, lora_dropout, merge_weights: of the layer.
        groups: the specification of a fused projection; {} for others.
        stacked: whether the matrices are experts of a stack.
        rows: how many ranks of a matrix one of the layer is (convolutions).
    """

    pairs: dict[int, Pair]
    scaling: float
    lora_dropout: float
    merge_weights: bool
    groups: dict
    stacked: bool = False
    rows: int = 1


class _Adapter(NamedTuple):
    """An adapter as it is read from a model: updates, rows of tables and what it has whole, in float64."""

    layers: dict[str, _Layer]
    rows: dict[str, tuple[list[int], Tensor]]
    whole: dict[tuple[str, str], Tensor]


def _read(model: nn.Module, name: str) -> _Adapter:
    found = _Adapter({}, {}, {})
    for path, module in model.named_modules():
        place = vars(module).get("_place")
        if place is None or name not in place.parts:
            continue
        settings = place.settings(module, name)
        tensors = {key: _checked(name, path, key, tensor) for key, tensor in place.tensors(module, name).items()}
        found.whole.update({(path, key): tensors[key] for key in of_base(tensors)})
        if "lora_A" in tensors:
            found.layers[path] = _layer(settings, tensors["lora_A"], tensors["lora_B"])
        for key, each in settings.get("lora_parameters", {}).items():
            own = [tensors[own] for own in each.names(key)]
            if isinstance(each, LowRank):
                given = {**vars(each), "lora_parameters": {}, "merge_weights": settings["merge_weights"]}
                found.layers[f"{path}.{key}".removeprefix(".")] = _layer(given, *own)
            else:
                found.rows[path] = each.indices, own[0]
    return found


def _checked(name: str, path: str, key: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise ValueError(f"{path}.{key} of adapter {name!r} is on the meta device, which holds no values")
    if not tensor.is_floating_point():
        return tensor.detach()
    if not tensor.isfinite().all():
        raise ValueError(f"{path}.{key} of adapter {name!r} holds NaN or infinity; nothing was combined")
    return wide(tensor)


def wide(tensor: Tensor) -> Tensor:
    """Return `tensor` in float64, or in float32 where the device has no such numbers."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _layer(settings: dict, A: Tensor, B: Tensor) -> _Layer:
    r, enabled = settings["r"], settings.get("enable_lora")
    dropout = getattr(settings.get("lora_dropout"), "p", 0.0)
    rest = float(settings["scaling"]), dropout, bool(settings.get("merge_weights"))
    if enabled is not None:
        on = [number for number, each in enumerate(enabled) if each]
        sizes = settings.get("group_sizes") or [len(B) // len(on)] * len(enabled)
        split = zip(A.split(r), B.split([sizes[number] for number in on]), strict=True)
        groups = {"enable_lora": enabled, "group_sizes": sizes, "interleave": settings.get("interleave", 1)}
        return _Layer(dict(zip(on, split, strict=True)), *rest, groups)
    if "lora_parameters" in settings:
        stacks = zip(A.unflatten(0, (-1, r)), B.unflatten(1, (r, -1)).permute(2, 0, 1), strict=True)
        return _Layer(dict(enumerate(stacks)), *rest, {}, stacked=True)
    return _Layer({0: (A, B)}, *rest, {}, rows=len(A) // r)


def _as_one_matrix(layer: _Layer) -> _Layer:
    # Where another adapter has the fused projection whole, or otherwise divided.
    if not layer.groups:
        return layer
    A, B = (torch.cat(tensors) for tensors in zip(*layer.pairs.values(), strict=True))
    full: Any = types.SimpleNamespace(**layer.groups)
    return layer._replace(pairs={0: (A, Groups._full_B(full, B))}, groups={})


def _combine_layer(
    path: str, sources: list[_Adapter], weights: Sequence[float], how: _Method
) -> tuple[dict, tuple[Tensor, Tensor]]:
    """The specification of the new layer, and its A and B."""
    both = [(s.layers[path], weight) for s, weight in zip(sources, weights, strict=True) if path in s.layers]
    layers = [layer for layer, _ in both]
    if len({(tuple(each.groups.get("group_sizes", ())), each.groups.get("interleave")) for each in layers}) > 1:
        layers = [_as_one_matrix(each) for each in layers]
    first, pairs = layers[0], {}
    for number in sorted(_union(layer.pairs for layer in layers)):
        having = [(each, weight) for each, (_, weight) in zip(layers, both, strict=True) if number in each.pairs]
        given = [each.pairs[number] for each, _ in having]
        scalings, factors = [each.scaling for each, _ in having], [weight for _, weight in having]
        with full_precision(given[0][0].device):
            pairs[number] = _combine_pairs(path, given, scalings, factors, how, first.rows)
    groups = {}
    if first.groups:
        enabled = [number in pairs for number in range(len(first.groups["group_sizes"]))]
        groups = group_spec(enabled, first.groups["group_sizes"], first.groups["interleave"])
    r, joined = join(pairs, first.stacked, first.rows)
    return layer_spec(r, first.lora_dropout, groups), joined


def layer_spec(r: int, lora_dropout: float = 0.0, groups: dict | None = None) -> dict:
    """Return the specification of a layer whose A and B are to be scaled by 1."""
    return {"r": r, "lora_alpha": r, "scaling": 1.0, "lora_dropout": lora_dropout, **(groups or {})}


def join(pairs: dict[int, Pair], stacked: bool, rows: int) -> tuple[int, tuple[Tensor, Tensor]]:
    """Return the rank of a layer, and its A and B, of those of its matrices: all get the rank of the largest."""
    r = max(math.ceil(len(A) / rows) for A, _ in pairs.values())
    padded = []
    for A, B in pairs.values():
        missing = r * rows - len(A)
        padded.append((nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))))
    firsts, seconds = zip(*padded, strict=True)
    return r, (torch.cat(firsts), torch.stack(seconds, 2).flatten(1) if stacked else torch.cat(seconds))


def _combine_pairs(
    path: str, pairs: list[Pair], scalings: list[float], weights: list[float], how: _Method, rows: int
) -> Pair:
    scaled = [weight * scaling for weight, scaling in zip(weights, scalings, strict=True)]
    ranks = [len(A) for A, _ in pairs]
    most = max(ranks) if how.r is None else how.r * rows
    if how.name in ("cat", "svd"):
        A = torch.cat([A * each for (A, _), each in zip(pairs, scaled, strict=True)])
        B = torch.cat([B for _, B in pairs], 1)
        return (A, B) if how.name == "cat" else nearest_of_product(A, B, most)
    if how.name.endswith("_svd"):
        updates = [B @ A * scaling for (A, B), scaling in zip(pairs, scalings, strict=True)]
        A, B, _ = nearest(how.merge(updates, weights), most)
        return A, B
    if len(set(ranks)) > 1:
        raise ValueError(
            f"method={how.name!r}: the ranks in {path} are {', '.join(str(rank // rows) for rank in ranks)}, and A and "
            "B of different sizes have no sum; take 'cat', 'svd' or another method with '_svd'"
        )
    # The root of each factor goes to A and to B, its sign to A alone.
    roots = [math.sqrt(abs(each)) for each in scaled]
    signed = [math.copysign(root, each) for root, each in zip(roots, scaled, strict=True)]
    return how.merge([A for A, _ in pairs], signed), how.merge([B for _, B in pairs], roots)


def nearest_of_product(A: Tensor, B: Tensor, r: int) -> Pair:
    """Return the factors of rank `r` whose product is nearest to B A, which is not formed."""
    left, upper = torch.linalg.qr(B)
    right, lower = torch.linalg.qr(A.T)
    small_A, small_B, _ = nearest(upper @ lower.T, r)
    return small_A @ right.T, left @ small_B


def nearest(matrix: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors A and B whose product is the matrix of rank `r` nearest to `matrix`, and all singular values.

    Eckart and Young (1936). The rows of A are orthonormal, as PEFT has them, so that a rank without value can learn.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return right[:r], left[:, :r] * values[:r], values


def _combine_rows(
    path: str, modules: dict[str, nn.Module], sources: list[_Adapter], weights: Sequence[float], how: _Method
) -> tuple[list[int], tuple[Tensor]]:
    indices = list(dict.fromkeys(row for source in sources for row in source.rows.get(path, ([],))[0]))
    base = wide(own_tensors(modules[path])["weight"][indices])
    changes = []
    for source in sources:
        mine, rows = source.rows.get(path, ([], base[:0]))
        where = [indices.index(row) for row in mine]
        changes.append(
            torch.zeros_like(base).index_copy(
                0, torch.tensor(where, dtype=torch.long, device=base.device), rows - base[where]
            )
        )
    return indices, (base + how.merge(changes, list(weights)),)


def _combine_whole(
    modules: dict[str, nn.Module], sources: list[_Adapter], weights: Sequence[float], how: _Method
) -> dict[tuple[str, str], Tensor]:
    found, left = {}, []
    for path, key in _union(source.whole for source in sources):
        base = own_tensors(modules[path])[key]
        values = [s.whole[path, key] for s in sources if (path, key) in s.whole]
        if isinstance(base, nn.Parameter) and base.is_floating_point():
            having = [w for s, w in zip(sources, weights, strict=True) if (path, key) in s.whole]
            found[path, key] = wide(base) + how.merge([value - wide(base) for value in values], having)
        else:  # statistics of norms, counters: no weights that could be added up
            alike = all(torch.equal(values[0], value) for value in values)
            found[path, key] = values[0] if alike else base.detach()
            left += [] if alike else [f"{path}.{key}"]
    if left:
        warnings.warn(
            f"{', '.join(left[:8])}{', ...' if len(left) > 8 else ''}: the adapters' differ, and statistics have no "
            "weighted sum: the new adapter has the base's. A few batches in train() make them anew",
            stacklevel=3,
        )
    return found


def _union(parts: Any) -> dict:
    return {key: None for part in parts for key in part}


def _paths(modules: dict[str, nn.Module], sources: list[_Adapter]) -> list[str]:
    there = _union(source.layers for source in sources)
    order = {name: number for number, name in enumerate(modules)}
    return sorted(there, key=lambda path: order.get(path, order.get(path.rpartition(".")[0], 0)))


def _check_adapters(
    model: nn.Module, adapters: Sequence[str], weights: Sequence[float]
) -> tuple[list[str], list[float]]:
    if isinstance(adapters, str) or not isinstance(adapters, Sequence):
        raise TypeError(f"adapters={adapters!r}: must be a list of names")
    if not adapters:
        raise ValueError("adapters=[]: must name at least one adapter")
    check_intact(model)
    for name in adapters:
        check_present(model, name)
    given = getattr(weights, "tolist", lambda: weights)()
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != len(adapters):
        raise ValueError(f"weights={weights!r}: must be a list of numbers, one for each of {list(adapters)}")
    for weight in given:
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise TypeError(f"weights={weights!r}: {weight!r} is no number")
        if not math.isfinite(weight):
            raise ValueError(f"weights={weights!r}: must be finite")
    return list(adapters), list(map(float, given))


def _check_method(
    method: str, r: int | None, density: float | None, majority: str, generator: torch.Generator | None
) -> _Method:
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(map(repr, METHODS))}")
    pruning = _PRUNING.get(method.removesuffix("_svd"))
    if r is not None:
        if not method.endswith("svd"):
            raise ValueError(f"r={r}: {method!r} has a rank of its own; r is for 'svd' and the methods with '_svd'")
        check_rank(r)
    if (density is None) != (pruning is None):
        raise ValueError(f"density={density!r}: {method!r} {'takes none' if pruning is None else 'needs one'}")
    if density is not None and (isinstance(density, bool) or not 0 < density <= 1):
        raise ValueError(f"density={density!r}: must be over 0 and at most 1, the share of entries to keep")
    if majority not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method={majority!r}: must be 'total' or 'frequency'")
    if generator is not None and pruning != "random":
        raise ValueError(f"generator: {method!r} draws nothing; it is for the methods of DARE")
    return _Method(method, r, 1.0 if density is None else density, majority, generator)


def check_rank(r: int) -> None:
    """Raise if `r` is no positive integer."""
    if isinstance(r, bool) or not isinstance(r, numbers.Integral):
        raise TypeError(f"r={r!r}: the rank must be an integer, not {type(r).__name__}")
    if r < 1:
        raise ValueError(f"r={r}: the rank must be at least 1")


def _check_together(names: list[str], sources: list[_Adapter]) -> None:
    # What a module is in one adapter has to be what it is in another, or there are two classes for it.
    for name, source in zip(names, sources, strict=True):
        for other, against in zip(names, sources, strict=True):
            for path in against.rows:
                if path in source.layers or f"{path}.weight" in source.layers or (path, "weight") in source.whole:
                    raise ValueError(
                        f"{path}: adapter {other!r} trains rows of it, and {name!r} adapts it or trains it whole; "
                        "there is no one adapter that does both"
                    )
            for path in source.layers:
                if path.rpartition(".")[0] in against.layers:
                    raise ValueError(
                        f"{path}: adapter {name!r} adapts the Parameter, and {other!r} the layer; there is no one "
                        "adapter that does both"
                    )
