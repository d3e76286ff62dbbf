"""Put LoRA into an existing model: chosen layers become LoRA layers where they stand."""

import difflib
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from loralib.adapters import (
    DEFAULT_NAME,
    LORA_NAMES,
    Form,
    add_part,
    adopt,
    base_modules,
    check_adapter_name,
    check_not_offloaded,
    check_whole,
    list_adapters,
    own_tensors,
    put,
)
from loralib.architectures import (
    LINEAR_BY_ANOTHER_NAME,
    default_modules_to_save,
    default_target_modules,
    find_head,
    fused_layout,
    group_spec,
    is_read_from_outside,
    output_layer,
    unwrapped,
)
from loralib.core import Adapted, InPlace, adapted, check_hyperparameters, identity
from loralib.layers import Groups, Kernel, Matrix, Table, as_booleans, check_groups, is_conv1d, matrix_shape
from loralib.quantized import is_quantized

__all__ = ["inject_lora"]

BIAS_MODES = ("none", "all", "lora_only")
ALL_LINEAR = "all-linear"

_KINDS: dict[type[nn.Module], type[Adapted]] = {
    **{nn.Linear: Matrix, nn.Embedding: Table},
    **dict.fromkeys([nn.Conv1d, nn.Conv2d, nn.Conv3d], Kernel),
}
_FORWARDS = [cls.forward for cls in _KINDS]
_FUSED_KEYS = ("enable_lora", "group_sizes", "interleave")


def inject_lora(
    model: nn.Module,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
    exclude_modules: Sequence[str] | str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] | str | None = None,
    use_rslora: bool = False,
    bias: str = "none",
    enable_lora: Sequence[bool] | None = None,
    merge_weights: bool = False,
    adapter_name: str = DEFAULT_NAME,
) -> list[str]:
    """Adapt layers of `model` where they stand, freeze everything but their adapters and return their names.

    Every module stays the object that it is, with its Parameters, hooks and attributes; an adapted one gets `lora_A`,
    `lora_B` and a class that computes with them, so checkpoints of the base still load. Adapters of a half-precision
    base are float32. The arguments have PEFT's names and meanings.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> inject_lora(model, r=2, target_modules=["0"])
    ['0']
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['0.lora_A', '0.lora_B']

    Args:
        model: changed in place, also within `torch.compile` and data parallelism; its `nn.Linear`, `nn.Embedding`,
            `nn.Conv1d/2d/3d` and Hugging Face `Conv1D` layers, their subclasses, and the quantised linear layers of
            torchao, bitsandbytes and HQQ can be adapted. Of a subclass with a forward of its own, and of layers whose
            weight is read past their forward (`nn.MultiheadAttention`), `weight` is computed as the sum.
        r: rank, at least 1.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: see `LoRALayer`; embeddings have none.
        target_modules: a list of full names or last parts of names ("q_proj", "attn.c_attn"); or one string, a regular
            expression that matches full names; or "all-linear", every linear layer but the output layer or head and
            the routers of experts; or None for query and value of every attention, found by their names, in a Hugging
            Face model of several towers those of the language model.
        exclude_modules: targets to leave out after all, named in the same way.
        rank_pattern, alpha_pattern: ranks and alphas that differ, by full names, last parts or regular expressions for
            the end of a name ("attn.c_proj", "layer.(0|1).attention.query"); the first that matches counts.
        modules_to_save: modules to train whole, in copies of their own, such as a classifier head; named as targets
            are. None means the head of a Hugging Face classifier (of sequences, tokens, images, sounds, choices,
            answers, or by CTC); [] means none.
        use_rslora: scale by lora_alpha / sqrt(r) instead (Kalajdzievski, arXiv 2312.03732).
        bias: biases to train, in copies of their own: "none", "all", or "lora_only", those of the adapted layers.
        enable_lora: which of q, k, v to adapt, three booleans, in a fused projection whose layout is known, such as
            GPT-2's `c_attn` (`MergedLinear`). None means q and v, [True, False, True], while `target_modules` is None,
            and with named targets the matrix as a whole, as PEFT does.
        merge_weights: whether `eval()` merges, which takes a copy of the adapted weights; quantised weights are never
            merged by it. `merge_lora_weights` merges when asked.
        adapter_name: what to call the adapter; a model can have several (`set_adapter`), the new one becomes active.

    Raises:
        TypeError: a target is of a class that cannot be adapted or has an attribute with the name of one of a LoRA
            layer, or an argument is of a wrong type.
        ValueError: a target matches nothing, the model has an adapter of that name already, its architecture has no
            default, it is sharded by `fully_shard` or offloaded by accelerate (inject before that), or an argument is
            out of range. Nothing has been changed then.
    """
    _check_arguments(r, lora_alpha, lora_dropout)
    check_bias_mode(bias)
    check_adapter_name(adapter_name)
    if enable_lora is not None and len(as_booleans(enable_lora)) != 3:
        raise ValueError(f"enable_lora={list(enable_lora)}: must be three booleans, for q, k and v")
    model = unwrapped(model)
    check_whole(model)
    modules = base_modules(model)
    if modules_to_save is None:
        saved = default_modules_to_save(model)
    else:
        saved = match_names(modules, modules_to_save, "modules_to_save") if modules_to_save else []
    names = _targets(model, modules, target_modules, exclude_modules, saved)
    if enable_lora is None and target_modules is None:
        enable_lora = (True, False, True)
    specs = {
        name: {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, **_fused(modules, name, enable_lora)}
        for name in names
    }
    if target_modules is not None and enable_lora is not None and not any("enable_lora" in s for s in specs.values()):
        raise ValueError(
            f"enable_lora={list(enable_lora)}: none of the targets is a fused projection whose layout is known; "
            "leave it out to adapt them whole"
        )
    _apply_pattern(specs, rank_pattern or {}, "rank_pattern", "r")
    _apply_pattern(specs, alpha_pattern or {}, "alpha_pattern", "lora_alpha")
    for spec in specs.values():
        _check_arguments(spec["r"], spec["lora_alpha"], lora_dropout)
        if use_rslora:
            spec["scaling"] = spec["lora_alpha"] / math.sqrt(spec["r"])
    present = [name for name, module in model.named_modules() if isinstance(module, Adapted)]
    if adapter_name in list_adapters(model):
        raise ValueError(
            f"the model already has LoRA layers of an adapter {adapter_name!r} ({_some(present)}); "
            "call lora.unload(model) first, or give another adapter_name"
        )
    plans = plan_layers(modules, specs, merge_weights)
    widest = max(_widest(plan) for plan in plans.values())
    largest = max(spec["r"] for spec in specs.values())
    if largest > widest:
        raise ValueError(
            f"r={largest}: an update of that rank is low-rank for none of the targets; at most {widest} here"
        )
    own = own_names(modules, names, bias, saved)
    check_not_offloaded({name: modules[name] for name in own})
    put_adapter(model, adapter_name, plans, own)
    return names


def _check_arguments(r: int, lora_alpha: float, lora_dropout: float) -> None:
    check_hyperparameters(r, lora_alpha, lora_dropout)
    if r < 1:
        raise ValueError(f"r={r}: the rank to inject must be at least 1")


def match_names(names: Iterable[str], targets: Sequence[str] | str, argument: str) -> list[str]:
    """Return the module names that `targets` mean; `argument` is what an error calls them.

    >>> match_names(["h.0.attn", "h.0.mlp", "h.1.attn"], ["attn"], "target_modules")
    ['h.0.attn', 'h.1.attn']
    """
    names = [name for name in names if name]
    if not isinstance(targets, Iterable) or not all(isinstance(target, str) for target in targets):
        raise TypeError(f"{argument}={targets!r}: must be a list of names, or a regular expression as a string")
    if not targets:
        raise ValueError(f"{argument}={targets!r} names nothing")
    if isinstance(targets, str):
        try:
            matched = {targets: [name for name in names if re.fullmatch(targets, name)]}
        except re.error as error:
            raise ValueError(f"{argument}={targets!r} is no regular expression: {error}") from error
    else:
        matched = {target: [name for name in names if ("." + name).endswith("." + target)] for target in targets}
    unmatched = [target for target, found in matched.items() if not found]
    if unmatched:
        # Layers of a stack differ only in their index, so the last parts are what a user can choose from.
        parts = sorted({name.rsplit(".", 1)[-1] for name in names})
        near = sorted({close for target in unmatched for close in difflib.get_close_matches(target, parts + names)})
        hint = f"did you mean {_some(near)}?" if near else f"the model has {_some(parts, 20)}"
        if isinstance(targets, str):
            hint = f"a string is a regular expression for full names, a list holds names; {hint}"
        raise ValueError(f"{argument}={targets!r}: nothing in the model is called {_some(unmatched)!r}; {hint}")
    chosen = {name for found in matched.values() for name in found}
    return [name for name in names if name in chosen]


def check_bias_mode(bias: str) -> None:
    """Raise if `bias` is none of the three modes."""
    if bias not in BIAS_MODES:
        raise ValueError(f"bias={bias!r}: must be one of {', '.join(map(repr, BIAS_MODES))}")


def is_bias(name: str) -> bool:
    """Whether a Parameter of that name is a bias."""
    return name == "bias" or name.startswith("bias_") or name.endswith("_bias")


def own_names(
    modules: dict[str, nn.Module], targets: Iterable[str], bias: str, saved: Iterable[str]
) -> dict[str, frozenset[str]]:
    """Return, by module, which of its Parameters and buffers an adapter has of its own: the one place that knows.

    Args:
        modules: the modules of the model without its adapters, by name.
        targets: the names of the adapted layers.
        bias: the bias mode.
        saved: the names of the modules to save whole.
    """
    own = {name: LORA_NAMES for name in targets}
    first = {id(module): name for name, module in reversed(modules.items())}
    first.update((id(modules[name]), name) for name in own)
    for name in first.values():
        if bias == "all" or (bias == "lora_only" and name in own):
            parameters = modules[name]._parameters
            biases = {key for key, value in parameters.items() if value is not None and is_bias(key)}
            if biases:
                own[name] = own.get(name, frozenset()) | biases
    for name in saved:
        for path in modules:
            if f"{path}.".startswith(f"{name}."):
                own[path] = own.get(path, frozenset()) | own_tensors(modules[path]).keys()
    return {path: keys for path, keys in own.items() if keys}


class Plan(NamedTuple):
    """A layer to be: its form while the adapter is active, and the shapes of A and B."""

    form: Form
    shapes: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def groups(self) -> dict:
        """The settings of a fused projection, as `group_spec` gives them."""
        settings = self.form.settings
        if "enable_lora" not in settings:
            return {}
        return group_spec(*(settings[key] for key in ("enable_lora", "group_sizes", "interleave")))


def plan_layers(modules: dict[str, nn.Module], specs: dict[str, dict], merge_weights: bool = False) -> dict[str, Plan]:
    """Return what each layer named in `specs` is to become; nothing is changed."""
    if "" in specs:
        raise ValueError(f"{type(modules['']).__name__} itself cannot be adapted; put it into a model")
    plans = {}
    for name, spec in specs.items():
        if name not in modules:
            raise ValueError("the model has no such layer")
        plans[name] = _plan(name, modules[name], modules[name.rpartition(".")[0]], spec, merge_weights)
    deaf = [name for name, plan in plans.items() if not plan.form.cls.branches and _drops(plan)]
    if deaf:
        warnings.warn(
            f"lora_dropout does nothing in {_some(deaf)}: a forward of their own reads the sum of weight and update",
            stacklevel=4,
        )
    return plans


def put_adapter(model: nn.Module, adapter_name: str, plans: dict[str, Plan], own: dict[str, frozenset[str]]) -> None:
    """Put the planned layers, and copies of what else is the adapter's own, into `model`, and freeze all the rest.

    The adapters of the layers get memory and are drawn.
    """
    adopt(model)
    put(model, None)
    model.requires_grad_(False)
    modules, done = base_modules(model), set()
    copies: dict = {}
    for name, keys in own.items():
        module, plan = modules[name], plans.get(name)
        if id(module) in done:  # one module can have two names
            continue
        done.add(id(module))
        adapter = {}
        if plan is not None:
            tensors = own_tensors(module)
            weight = tensors.get("weight", next(iter(tensors.values())))
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            A, B = (nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype)) for shape in plan.shapes)
            plan.form.cls.draw(A, B)
            adapter = {"lora_A": A, "lora_B": B}
        add_part(module, adapter_name, keys, plan.form if plan else None, adapter, copies)
    put(model, adapter_name)


def _targets(
    model: nn.Module,
    modules: dict[str, nn.Module],
    target_modules: Sequence[str] | str | None,
    exclude_modules: Sequence[str] | str | None,
    saved: list[str],
) -> list[str]:
    # A module has several names where it is used twice; the first is the one to report.
    first = {name for name, _ in model.named_modules()}
    modules = {name: module for name, module in modules.items() if name in first}
    heads = [*saved]
    if target_modules is None:
        names = default_target_modules(model)
    elif target_modules == ALL_LINEAR:
        heads += find_head(model) or []
        last = output_layer(model)
        names = [name for name, m in model.named_modules() if name in modules and m is not last]
        names = [name for name in names if isinstance(modules[name], nn.Linear) or is_conv1d(modules[name])]
        # What chooses experts returns choices, and is left alone unless it is named.
        names = [name for name in names if "Router" not in type(modules[name]).__name__]
    else:
        names = match_names(modules, target_modules, "target_modules")
    excluded = match_names(modules, exclude_modules, "exclude_modules") if exclude_modules else []
    inside = [name for name in names if any(f"{name}.".startswith(f"{head}.") for head in heads)]
    left = [name for name in names if name not in excluded and name not in inside]
    if not left:
        raise ValueError(
            f"target_modules={target_modules!r}: nothing is left of {_some(names) or 'it'} after exclude_modules="
            f"{exclude_modules!r} and the modules trained whole, {_some(heads) or 'none'}"
        )
    return left


def _fused(modules: dict[str, nn.Module], name: str, enable_lora: Sequence[bool] | None) -> dict:
    if enable_lora is None:
        return {}
    layout = fused_layout(modules[name.rpartition(".")[0]], name, modules[name])
    if layout is None:
        return {}
    return group_spec(layout.enabled(enable_lora), layout.sizes, layout.turns)


def _apply_pattern(specs: dict[str, dict], pattern: Mapping[str, float], argument: str, key: str) -> None:
    matched = set()
    for part in pattern:
        try:
            compile_pattern(part)
        except re.error as error:
            raise ValueError(f"{argument}: {part!r} is no regular expression: {error}") from error
    for name, spec in specs.items():
        matching = match_pattern(pattern, name)
        if matching is not None:
            matched.add(matching)
            spec[key] = pattern[matching]
    unmatched = sorted(pattern.keys() - matched)
    if unmatched:
        near = {close for part in unmatched for close in difflib.get_close_matches(part, list(specs), cutoff=0.4)}
        raise ValueError(
            f"{argument}: {_some(unmatched)!r} applies to none of the targets, or a pattern before it always does; "
            f"the targets are {_some(sorted(near) or specs)}"
        )


def match_pattern(pattern: Iterable[str], name: str) -> str | None:
    """Return the first key of a rank or alpha pattern that means the layer `name`, as PEFT reads them.

    >>> match_pattern({"fc": 4, r"layers\\.[01]\\.v": 8}, "layers.1.v")
    'layers\\\\.[01]\\\\.v'
    """
    return next((key for key in pattern if compile_pattern(key).match(name)), None)


def compile_pattern(key: str) -> re.Pattern:
    """Return what a key of a rank or alpha pattern has to match: the end of a name, whole parts of it."""
    return re.compile(rf"(.*\.)?({key})$")


def _plan(name: str, module: nn.Module, owner: nn.Module, spec: dict, merge_weights: bool) -> Plan:
    place = vars(module).get("_place")
    cls: Any = place.plain.cls if place else type(module)
    client: Any = None
    if issubclass(cls, Adapted):  # made by hand
        client = None if cls.__module__.startswith("loralib.") else cls
        cls = cls._base_class
    kind = next((kind for plain, kind in _KINDS.items() if issubclass(cls, plain)), None)
    quantized = is_quantized(module)
    if is_conv1d(module) or cls.__name__ in LINEAR_BY_ANOTHER_NAME or quantized:
        kind = Matrix
    if kind is None:
        allowed = ", ".join(f"nn.{plain.__name__}" for plain in _KINDS)
        raise TypeError(
            f"{name} is a {cls.__name__}, which LoRA cannot adapt; {allowed} and Conv1D it can. "
            "exclude_modules leaves layers out"
        )
    if "weight" not in own_tensors(module) and not quantized:
        raise TypeError(f"{name} is a {cls.__name__} whose weight is computed, which LoRA cannot adapt")
    taken = [] if isinstance(module, Adapted) else sorted(_names_of(cls, module) & _names_of_ours(kind))
    if taken:
        raise TypeError(
            f"{name} is a {cls.__name__} with attributes that a LoRA layer has too ({', '.join(taken)}); "
            "exclude_modules leaves layers out"
        )
    r, dropout = spec["r"], 0.0 if kind is Table else spec["lora_dropout"]
    settings = {
        "r": r,
        "lora_alpha": spec["lora_alpha"],
        "scaling": spec.get("scaling", spec["lora_alpha"] / r if r else 0.0),
        "lora_dropout": nn.Dropout(dropout) if dropout > 0 else identity,
        "merged": False,
        "merge_weights": merge_weights and not quantized,
    }
    if is_conv1d(module) or getattr(module, "fan_in_fan_out", False):
        settings["fan_in_fan_out"] = True
    if kind is Matrix and "enable_lora" in spec:
        kind = Groups
        settings.update(check_groups(matrix_shape(module)[1], **{k: spec[k] for k in _FUSED_KEYS if k in spec}))
    shapes = kind.shapes(module, settings)
    if 0 in shapes[0]:
        raise ValueError(f"{name} would get no adapter: r={r}, enable_lora={spec.get('enable_lora')}")
    branch = quantized or cls.forward in _FORWARDS or cls.__name__ in ("Conv1D", *LINEAR_BY_ANOTHER_NAME)
    # A forward that was put on the object may have kept that of its class, and would go past the branch; a wrapper's is
    # made to follow where what it has kept is just that.
    kept = [vars(module)[key] for key in ("_old_forward", "forward") if key in vars(module)][:1]
    follows = all(getattr(forward, "__func__", None) is type(module).forward for forward in kept)
    computed = not quantized and (not branch or not follows or is_read_from_outside(owner, name))
    if computed and getattr(module, "max_norm", None) is not None:
        raise TypeError(
            f"{name} is a {cls.__name__} with max_norm={module.max_norm} and a forward of its own, which would bound "
            "the sum of weight and update; exclude_modules leaves layers out"
        )
    if client is not None:
        if not issubclass(client, kind):
            raise TypeError(f"{name} is a {client.__name__}, made by hand, which cannot become a layer of another kind")
        return Plan(Form(client, settings), shapes)
    return Plan(Form(adapted(cls, kind, branch and follows, computed), settings), shapes)


def _names_of(cls: type, module: nn.Module) -> set[str]:
    # What a class adds to torch's, and what a module has of its own.
    torchs = next((plain.__mro__ for plain in _KINDS if issubclass(cls, plain)), nn.Module.__mro__)
    own = {key for each in cls.__mro__ if each not in torchs for key in vars(each)}
    return own | vars(module).keys() | module._modules.keys()


def _names_of_ours(kind: type) -> set[str]:
    ours = {key for each in kind.__mro__ if each.__module__.startswith("loralib.") for key in vars(each)}
    return (
        (ours | set(Adapted.settings)) - set(dir(nn.Module)) - set(vars(InPlace)) - {"__annotations__", "__getattr__"}
    )


def _widest(plan: Plan) -> int:
    # The largest rank that the matrix can have.
    groups, (A, B) = plan.form.settings.get("group_sizes"), plan.shapes
    return min(A[1], max(groups) if groups else B[0])


def _drops(plan: Plan) -> bool:
    return plan.form.settings["lora_dropout"] is not identity


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
