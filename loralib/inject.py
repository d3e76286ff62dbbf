"""Put LoRA into an existing model: chosen layers become LoRA layers where they stand."""

import difflib
import math
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from loralib.adapters import (
    DEFAULT_NAME,
    Form,
    active_adapter,
    adapter_names,
    add_part,
    adopt,
    all_modules,
    base_modules,
    check_adapter_name,
    check_intact,
    check_not_exchanged,
    check_not_offloaded,
    check_whole,
    input_embeddings,
    is_bias,
    named_modules,
    note_parts,
    of_base,
    own_tensors,
    put,
    unchanged_by_an_error,
)
from loralib.architectures import (
    LINEAR_BY_ANOTHER_NAME,
    default_modules_to_save,
    default_target_modules,
    find_head,
    fused_layout,
    group_spec,
    in_proj_layout,
    is_matrix,
    is_pretrained,
    is_read_from_outside,
    is_router,
    output_layers,
    pretrained_models,
    unwrapped,
    what_to_name,
    without_gradient,
)
from loralib.core import (
    Adapted,
    InPlace,
    LoRALayer,
    adapted,
    as_number,
    check_hyperparameters,
    identity,
    takes_any_keyword,
)
from loralib.layers import Groups, Kernel, Matrix, Table, as_booleans, check_groups, is_conv1d, matrix_shape
from loralib.parameters import LowRank, Parameters, Rows, with_parameters
from loralib.quantized import is_quantized, keep_gradients

__all__ = ["inject_lora"]

_TOKENS = "trainable_token_indices"
BIAS_MODES = ("none", "all", "lora_only")
ALL_LINEAR, ALL_LINEAR_PEFT = "all-linear", "all-linear-peft"

_KINDS: dict[type[nn.Module], type[Adapted]] = {
    **{nn.Linear: Matrix, nn.Embedding: Table},
    **dict.fromkeys([nn.Conv1d, nn.Conv2d, nn.Conv3d], Kernel),
}
_FORWARDS = [cls.forward for cls in _KINDS]
_FUSED_KEYS = ("enable_lora", "group_sizes", "interleave")
# Buffers of torch's layers that training changes though all is frozen: of batch norms and of spectral norms.
STATISTICS = {"running_mean", "running_var", "num_batches_tracked", "weight_u", "weight_v", "_u", "_v"}


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
    target_parameters: Sequence[str] | None = None,
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
) -> list[str]:
    """Put LoRA into layers of `model`, freeze the rest but a classifier's head, and return the names of these layers.

    Every module remains the same object, with its Parameters, hooks and attributes. An adapted module gets `lora_A`,
    `lora_B` and a class that computes with them, so checkpoints of the base still load. Adapters of a half-precision
    base are float32. The arguments have PEFT's names and meanings.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> inject_lora(model, r=2, target_modules=["0"])
    ['0']
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['0.lora_A', '0.lora_B']

    Args:
        model: changed in place, also within `torch.compile` and `nn.DataParallel`; its `nn.Linear`, `nn.Embedding`,
            `nn.Conv1d/2d/3d` and Hugging Face `Conv1D` layers, their subclasses, and the quantised linear layers of
            torchao, bitsandbytes, HQQ and gptqmodel can be adapted. In a subclass with a forward of its own, and in
            layers whose weight another module reads (`nn.MultiheadAttention`), `weight` is computed as the sum.
        r: rank, at least 1.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: see `LoRALayer`; embeddings have none.
        target_modules: a list of full names or last parts of names ("q_proj", "attn.c_attn"); or one string, a regular
            expression that matches full names; or "all-linear", every matrix but the output layer or head, the
            routers of experts, and what gets no gradient, such as the indexers of sparse attention and poolers that the
            model around them does not read: the linear layers, fused experts, and the weights of
            `nn.MultiheadAttention` and of recurrent layers (a `UserWarning` names what is left out, if it is much); or
            "all-linear-peft", the linear layers that PEFT takes for "all-linear"; or None for query and value of every
            attention, found by their names, in a Hugging Face model of several towers those of the language model.
        exclude_modules: targets to leave out, named in the same way.
        rank_pattern, alpha_pattern: ranks and alphas of single layers, by full names, last parts or regular expressions
            for the end of a name ("attn.c_proj", "layer.(0|1).attention.query"); the first that matches counts.
        modules_to_save: modules to train whole, in copies of their own, such as a classifier head; named as targets
            are. None means the head of a Hugging Face classifier (of sequences, tokens, images, sounds, choices,
            answers, or by CTC); [] means none.
        use_rslora: scale by lora_alpha / sqrt(r) instead (Kalajdzievski, arXiv 2312.03732).
        bias: biases to train, in copies of their own: "none", "all", or "lora_only", those of the adapted layers.
        enable_lora: which of q, k, v to adapt, three booleans, in a fused projection whose layout is known, such as
            GPT-2's `c_attn` (`MergedLinear`). None means q and v, [True, False, True], while `target_modules` is None,
            and with named targets the matrix as a whole, as PEFT does.
        merge_weights: whether `eval()` merges, which takes a copy of the adapted weights; it never merges quantised
            weights. `merge_lora_weights` merges when asked.
        adapter_name: the name of the adapter; a model can have several (`set_adapter`), the new one becomes active.
        target_parameters: Parameters to adapt that are not in a layer of their own, named as `target_modules` are
            ("mlp.experts.gate_up_proj", "in_proj_weight"): matrices, and stacks of matrices, each of which gets an
            update of rank `r`. Without `target_modules` nothing else is adapted. Dropout is not applied to them.
        trainable_token_indices: tokens whose rows of the input embeddings are trained; or such lists by the names of
            embeddings. A layer that shares the table, such as a tied output layer, uses these rows, too. They come in
            addition to the layers; with `target_modules=[]` they are all that is trained.

    Raises:
        TypeError: a target is of a class that cannot be adapted, or has an attribute that a LoRA layer needs for
            itself, or an argument is of a wrong type.
        ValueError: a target matches nothing, the model has an adapter of that name already, its architecture has no
            default, it is sharded by `fully_shard`, offloaded by accelerate or in `DistributedDataParallel` (inject
            before that), or an argument is out of range. Nothing has been changed then.
    """
    _check_arguments(r, lora_alpha, lora_dropout)
    check_bias_mode(bias)
    check_adapter_name(adapter_name)
    if enable_lora is not None and len(as_booleans(enable_lora)) != 3:
        raise ValueError(f"enable_lora={list(enable_lora)}: must be three booleans, for q, k and v")
    check_not_exchanged(model)
    model = unwrapped(model)
    check_whole(model)
    modules = base_modules(model)
    if modules_to_save is None:
        saved = default_modules_to_save(model)
    else:
        saved = match_names(modules, modules_to_save, "modules_to_save") if modules_to_save else []
    packed = [
        name for name in modules if any(f"{name}.".startswith(f"{s}.") for s in saved) and is_quantized(modules[name])
    ]
    if packed:
        raise ValueError(
            f"modules_to_save={modules_to_save!r}: the weight of {_some(packed)} is quantised, and cannot be trained; "
            "load the base without quantising it (llm_int8_skip_modules of transformers), or adapt it"
        )
    extra = target_parameters is not None or trainable_token_indices is not None
    names: list[str] = []
    aside, groups = saved, enable_lora
    if target_modules or (target_modules is None and target_parameters is None) or not extra:
        try:
            names, aside = _targets(model, modules, target_modules, exclude_modules, saved)
        except ValueError as error:
            hint = "; target_modules=[] trains the rows of the embedding alone" if extra and not target_modules else ""
            raise ValueError(f"{error}{hint}") from None
        if modules_to_save is None and target_modules is not None and not isinstance(target_modules, str):
            _check_outside_of_heads(modules, target_modules, saved)
        if groups is None and target_modules is None:
            groups = (True, False, True)
    if target_parameters is not None:
        found = _target_parameters(model, modules, target_parameters, saved)
        excluded = []
        if exclude_modules:
            excluded = match_names([*modules, *_parameters(model, modules)], exclude_modules, "exclude_modules")
        names += [name for name in found if name not in excluded]
    if not names and trainable_token_indices is None:
        raise ValueError(f"nothing is left to adapt after exclude_modules={exclude_modules!r}")
    _warn_of_ties(modules, [*names, *saved])
    tokens = token_rows(model, modules, trainable_token_indices, saved) if trainable_token_indices is not None else {}
    knobs = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": float(lora_dropout)}
    specs = {name: {**knobs, **_fused(modules, name, groups)} for name in names}
    if enable_lora is not None and not any("enable_lora" in s for s in specs.values()):
        raise ValueError(
            f"enable_lora={list(enable_lora)}: none of the targets is a fused projection whose layout is known; "
            "leave it out to adapt them whole"
        )
    _apply_pattern(specs, rank_pattern or {}, "rank_pattern", "r")
    _apply_pattern(specs, alpha_pattern or {}, "alpha_pattern", "lora_alpha")
    for spec in specs.values():
        _check_arguments(spec["r"], spec["lora_alpha"], lora_dropout)
        spec.update(r=int(spec["r"]), lora_alpha=as_number(spec["lora_alpha"]))
        if use_rslora:
            spec["scaling"] = spec["lora_alpha"] / math.sqrt(spec["r"])
    check_intact(model, [active_adapter(model)])
    if adapter_name in adapter_names(model):
        present = [name for name, module in named_modules(model).items() if isinstance(module, Adapted)]
        raise ValueError(
            f"the model already has LoRA layers of an adapter {adapter_name!r} ({_some(present)}); "
            "call lora.unload(model) first, or give another adapter_name"
        )
    left_out: dict[str, str] | None = {} if target_modules == ALL_LINEAR else None
    plans = plan_layers(modules, specs, merge_weights, left_out)
    if left_out is not None:
        if not plans and not tokens:
            raise TypeError("; ".join(list(left_out.values())[:8]))
        _tell_left_out(model, modules, plans, [*left_out], aside)
        names = [name for name in names if name in plans]
    widest = max((plan.widest for plan in plans.values()), default=0)
    largest = max((spec["r"] for spec in specs.values()), default=0)
    if largest > widest:
        raise ValueError(
            f"r={largest}: an update of that rank is low-rank for none of the targets; at most {widest} here"
        )
    plans.update(plan_tokens(modules, tokens, merge_weights))
    both = [name for name, plan in plans.items() if plan.path != name and plan.path in plans]
    if both:
        raise ValueError(f"{_some(both)}: its module is a target, too; name one of the two")
    own = own_names(modules, own_of_plans(plans), bias, saved)
    check_not_offloaded({name: modules[name] for name in own})
    with unchanged_by_an_error(model, adapter_name):
        put_adapter(model, adapter_name, plans, own)
    return LayerNames(names)


class LayerNames(list):
    """The names of the layers that were adapted; used as a model, it says what went wrong."""

    _MISTAKE = (
        "inject_lora and load_lora change the model in place and return the names of the adapted layers: write "
        "lora.inject_lora(model, ...), not model = lora.inject_lora(model, ...)"
    )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a list of layer names has no {name!r}; {self._MISTAKE}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"a list of layer names is no model; {self._MISTAKE}")


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
    # What gives its names once only would be empty the second time.
    once = isinstance(targets, Iterator)
    if once or not isinstance(targets, Iterable) or not all(isinstance(target, str) for target in targets):
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
        if any(target.lower().replace("_", "-") == ALL_LINEAR for target in unmatched):
            hint = f'did you mean {argument}="{ALL_LINEAR}"?'
        elif isinstance(targets, str):
            hint = f"a string is a regular expression for full names, a list holds names; {hint}"
        raise ValueError(f"{argument}={targets!r}: nothing in the model is called {_some(unmatched)!r}; {hint}")
    chosen = {name for found in matched.values() for name in found}
    return [name for name in names if name in chosen]


def check_bias_mode(bias: str) -> None:
    """Raise if `bias` is none of the three modes."""
    if bias not in BIAS_MODES:
        raise ValueError(f"bias={bias!r}: must be one of {', '.join(map(repr, BIAS_MODES))}")


def own_names(
    modules: dict[str, nn.Module], targets: Mapping[str, Iterable[str]], bias: str, saved: Iterable[str]
) -> dict[str, frozenset[str]]:
    """Return, by module, which of its Parameters and buffers an adapter has of its own: the one place that knows.

    Args:
        modules: the modules of the model without its adapters, by name.
        targets: the names of the adapter's tensors, by module.
        bias: the bias mode.
        saved: the names of the modules to save whole.
    """
    own = {name: frozenset(keys) for name, keys in targets.items()}
    first = {id(module): name for name, module in reversed(modules.items())}
    first.update((id(modules[name]), name) for name in own)
    for name in first.values():
        if bias == "all" or (bias == "lora_only" and name in own):
            parameters = modules[name]._parameters
            biases = {key for key, value in parameters.items() if value is not None and is_bias(key)}
            if biases:
                own[name] = own.get(name, frozenset()) | biases
        statistics = {key for key, value in modules[name]._buffers.items() if key in STATISTICS and value is not None}
        if statistics:
            own[name] = own.get(name, frozenset()) | statistics
    for name in saved:
        for path in modules:
            if f"{path}.".startswith(f"{name}."):
                own[path] = own.get(path, frozenset()) | own_tensors(modules[path]).keys()
                other = first.get(id(modules[path]), path)
                if other != path and own.get(other, own[path]) != own[path]:
                    raise ValueError(f"{path} is {other} by another name, which is adapted; name it once")
    return {path: keys for path, keys in own.items() if keys}


class Plan(NamedTuple):
    """A layer, or a Parameter of one, that is to be adapted.

    Attributes:
        path: the module.
        parameter: its Parameter.
        shapes: those of the adapter's tensors, by name.
        draw: what draws them, given the Parameter and them.
        form: the module's form while the adapter is active; None where the Parameter is to be computed
        computed: by this.
        widest: the largest rank that the update can have.
        merge_weights: whether `eval()` merges.
    """

    path: str
    parameter: str
    shapes: dict[str, tuple[int, ...]]
    draw: Callable[..., None]
    form: Form | None = None
    computed: LowRank | Rows | None = None
    widest: int = 0
    merge_weights: bool = False


def plan_layers(
    modules: dict[str, nn.Module],
    specs: dict[str, dict],
    merge_weights: bool = False,
    left_out: dict[str, str] | None = None,
) -> dict[str, Plan]:
    """Return what each layer named in `specs` is to become; nothing is changed.

    What cannot be adapted goes to `left_out`, with the reason, or is an error if that is None.
    """
    if "" in specs:
        raise ValueError(f"{type(modules['']).__name__} itself cannot be adapted; put it into a model")
    plans = {}
    for name, spec in specs.items():
        try:
            plans[name] = _plan(name, modules, spec, merge_weights)
        except TypeError as error:
            if left_out is None:
                raise
            left_out[name] = str(error)
    deaf = [name for name, plan in plans.items() if specs[name]["lora_dropout"] and _is_deaf(plan)]
    if deaf:
        warnings.warn(
            f"lora_dropout does nothing in {_some(deaf)}: a forward of their own reads the sum of weight and update",
            stacklevel=4,
        )
    return plans


def plan_tokens(
    modules: dict[str, nn.Module], tokens: Mapping[str, Sequence[int]], merge_weights: bool = False
) -> dict[str, Plan]:
    """Return plans for the rows of the tables, by the name of the table's module; nothing is changed."""
    for path, indices in tokens.items():
        weight = own_tensors(modules[path]).get("weight") if path in modules else None
        if weight is None or not all(0 <= index < len(weight) for index in indices):
            has = "no such module" if weight is None else f"{len(weight)} rows"
            raise ValueError(f"rows {min(indices)} to {max(indices)} of {path}: the model has {has}")
    return {
        f"{path}.weight": _compute(modules, path, "weight", Rows(indices), merge_weights)
        for path, indices in tokens.items()
    }


def own_of_plans(plans: Mapping[str, Plan]) -> dict[str, list[str]]:
    """Return the names of the adapter's tensors that `plans` bring, by module."""
    own: dict[str, list[str]] = {}
    for plan in plans.values():
        own.setdefault(plan.path, []).extend(plan.shapes)
    return own


def put_adapter(
    model: nn.Module,
    adapter_name: str,
    plans: dict[str, Plan],
    own: dict[str, frozenset[str]],
    apart: Iterable[str] = (),
) -> None:
    """Put the planned layers, and copies of what else is the adapter's own, into `model`, and freeze all the rest.

    The adapters of the layers get memory and are drawn. Tensors named in `apart` are copied each for itself even where
    the base ties them.
    """
    adopt(all_modules(model))
    put(model, None)
    model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = None  # of before: an optimizer that has the frozen Parameters would go on with it
    keep_gradients(model)
    modules, done = base_modules(model), set()
    copies: dict = {}
    note_parts(model, adapter_name, own, modules)
    # Models, for what they do to their embeddings and how they are saved; and what would ignore `adapter_names`.
    for name, module in modules.items():
        cls, inside = _plain_class(module), f"{name}." if name else ""
        within = is_pretrained(cls) and any(f"{path}.".startswith(inside) for path in own)
        if within or (module is model and takes_any_keyword(cls.forward)):
            own = {**own, name: own.get(name, frozenset())}
    narrow = _read_by_others(modules, own)
    here: dict[str, list[Plan]] = {}
    for plan in plans.values():
        here.setdefault(plan.path, []).append(plan)
    for name, keys in own.items():
        module = modules[name]
        if id(module) in done:  # one module can have two names
            continue
        done.add(id(module))
        adapter: dict[str, nn.Parameter] = {}
        for plan in here.get(name, ()):
            tensors = own_tensors(module)
            weight = tensors.get(plan.parameter, next(iter(tensors.values())))
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            # The rows of tied tables are the same ones.
            shared = (id(weight), *plan.shapes) if isinstance(plan.computed, Rows) else (name, *plan.shapes)
            if shared not in copies:
                made = [torch.empty(shape, device=weight.device, dtype=dtype) for shape in plan.shapes.values()]
                plan.draw(weight, *made)
                copies[shared] = list(map(nn.Parameter, made))
            adapter.update(zip(plan.shapes, copies[shared], strict=True))
        own_copies = frozenset(key for key in keys if f"{name}.{key}" in apart)
        form = _form_of(module, here.get(name, []))
        read = name in narrow
        add_part(module, adapter_name, keys, form, adapter, copies, own_copies, widen=not read)
        dtypes = {tensor.dtype for key, tensor in own_tensors(module).items() if key in keys and tensor.itemsize == 2}
        if read and dtypes:
            warnings.warn(
                f"{name} is trained in {dtypes.pop()}, in which small steps are rounded away: code outside of it reads "
                "its Parameters, and computes in that dtype",
                stacklevel=3,
            )
    put(model, adapter_name)


def _read_by_others(modules: dict[str, nn.Module], own: dict[str, frozenset[str]]) -> set[str]:
    """The modules that have to keep the dtype that other code computes with, which reads what is to be trained there.

    Those in one that is trained whole go together.
    """
    read = {
        path for path, keys in own.items() if any(is_read_from_outside(modules, path, key) for key in of_base(keys))
    }
    whole = [path for path, keys in own.items() if keys >= own_tensors(modules[path]).keys()]
    owners = [owner for owner in whole if any(path.startswith(f"{owner}.") for path in read)]
    return read | {path for path in whole if any(f"{path}.".startswith(f"{owner}.") for owner in owners)}


def _warn_of_ties(modules: dict[str, nn.Module], names: list[str]) -> None:
    # Encoder and decoder have tables of their own beside a shared one, which nothing calls.
    tables = {name: module for name, module in modules.items() if isinstance(module, nn.Embedding)}
    for name in names:
        weight = own_tensors(tables[name]).get("weight") if name in tables else None
        others = [other for other, module in tables.items() if own_tensors(module).get("weight") is weight]
        left = [other for other in others if other not in names and modules[other] is not modules[name]]
        if weight is not None and left:
            warnings.warn(
                f"{name} is tied to {_some(left)}, which compute with the base: name them, too, if they are meant",
                stacklevel=3,
            )


def _tell_left_out(
    model: nn.Module, modules: dict[str, nn.Module], plans: dict[str, Plan], failed: list[str], aside: list[str]
) -> None:
    # What stands in layers that are known not to be matrices is no surprise.
    total, left = 0, {}
    adapted_ones = {f"{plan.path}.{plan.parameter}" for plan in plans.values()}
    last = output_layers(model)
    for name, tensor in _parameters(model, modules).items():
        path, _, key = name.rpartition(".")
        total += tensor.numel()
        is_matrix_like = tensor.dim() in (2, 3) and min(tensor.shape) > 1 and not is_bias(key)
        known = isinstance(modules[path], _NO_MATRICES) or modules[path] in last
        known = known or any(f"{name}.".startswith(f"{each}.") for each in aside)
        open_ = path in failed or name in failed or (is_matrix_like and not known and name not in adapted_ones)
        if open_ and not is_router(modules[path.rpartition(".")[0]], path, modules[path]):
            left[name] = tensor.numel()
    share = sum(left.values()) / max(total, 1)
    if share >= 0.01:
        warnings.warn(
            f"all-linear leaves out {_some(left)}: {share:.0%} of the parameters; "
            "name what is to be adapted of them in target_parameters or target_modules",
            stacklevel=4,
        )


_NO_MATRICES = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)


def _form_of(module: nn.Module, plans: list[Plan]) -> Form | None:
    if not plans or plans[0].form is not None:
        return plans[0].form if plans else None
    # XLNet has a Parameter `r`, which an attribute of the class would hide.
    shadowed = [name for name in module._parameters if name in _names_of_ours(Parameters)]
    names = tuple(
        name for name in module._parameters if name in shadowed or any(plan.parameter == name for plan in plans)
    )
    computed = {plan.parameter: plan.computed for plan in plans}
    settings = {"lora_parameters": computed, "merged": False, "merge_weights": plans[0].merge_weights}
    return Form(with_parameters(_plain_class(module), names), settings)


def _plain_class(module: nn.Module) -> Any:
    place = vars(module).get("_place")
    return place.plain.cls if place else type(module)


def _is_deaf(plan: Plan) -> bool:
    if plan.form is None:
        return True
    return not plan.form.cls.branches and plan.form.settings["lora_dropout"] is not identity


def _target_parameters(
    model: nn.Module, modules: dict[str, nn.Module], target_parameters: Sequence[str], saved: list[str]
) -> list[str]:
    names = match_names(_parameters(model, modules), target_parameters, "target_parameters")
    inside = [name for name in names if any(name.startswith(f"{head}.") for head in saved)]
    if inside:
        raise ValueError(f"target_parameters={target_parameters!r}: {_some(inside)} is trained whole; name it once")
    return names


def _parameters(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    first = named_modules(model)
    return {
        f"{path}.{key}" if path else key: tensor
        for path, module in modules.items()
        if path in first
        for key, tensor in own_tensors(module).items()
        if isinstance(tensor, nn.Parameter)
    }


def token_rows(
    model: Any, modules: dict[str, nn.Module], indices: Sequence[int] | Mapping[str, Sequence[int]], saved: list[str]
) -> dict[str, list[int]]:
    """Return by table, also those that are tied to a named one, the rows to train; raise if they are none."""
    if isinstance(indices, Mapping):
        named = {path: rows for key, rows in indices.items() for path in match_names(modules, [key], _TOKENS)}
    else:
        tables = [input_embeddings(each) for each in (pretrained_models(model) or {"": model}).values()]
        named = {path: indices for path, module in modules.items() if len(tables) == 1 and module is tables[0]}
        if not named:
            raise ValueError(
                f"{_TOKENS}={indices!r}: {type(model).__name__} does not say which its input embeddings are; give a "
                "dict of lists by the names of embeddings"
            )
    found: dict[str, list[int]] = {}
    for path, rows in named.items():
        table = modules[path]
        size = getattr(table, "num_embeddings", 0)
        whole = [operator.index(row) for row in rows]
        if not isinstance(table, nn.Embedding) or not whole or len(set(whole)) < len(whole):
            raise ValueError(
                f"{_TOKENS}: {path}, a {type(table).__name__}, {whole}: must be an embedding and rows, once each"
            )
        if min(whole) < 0 or max(whole) >= size:
            raise ValueError(f"{_TOKENS}: {path} has rows 0 to {size - 1}, not {min(whole)} to {max(whole)}")
        if path in saved:
            raise ValueError(f"{_TOKENS}: {path} is trained whole (modules_to_save)")
        weight = own_tensors(table)["weight"]
        same = [other for other, module in modules.items() if own_tensors(module).get("weight") is weight]
        differing = [other for other in same if found.get(other, whole) != whole]
        if differing:
            raise ValueError(f"{_TOKENS}: {path} and {differing[0]} are one table; give all rows under one name")
        found.update(dict.fromkeys(same, whole))
    return found


def _targets(
    model: nn.Module,
    modules: dict[str, nn.Module],
    target_modules: Sequence[str] | str | None,
    exclude_modules: Sequence[str] | str | None,
    saved: list[str],
) -> tuple[list[str], list[str]]:
    """The names of what is to be adapted, and of what is left alone on purpose."""
    # A module has several names where it is used twice; the first is the one to report.
    first, every = named_modules(model), modules
    modules = {name: module for name, module in modules.items() if name in first}
    heads, aside, bare = [*saved], [], {}
    if target_modules is None:
        names = default_target_modules(model)
    elif target_modules in (ALL_LINEAR, ALL_LINEAR_PEFT):
        heads += find_head(model) or []
        last = output_layers(model)
        names = [name for name, m in first.items() if name in modules and m not in last]
        names = [name for name in names if _is_linear(modules[name])]
        if target_modules == ALL_LINEAR:
            names = [name for name in names if not is_router(modules[name.rpartition(".")[0]], name, modules[name])]
            bare = _parameters(model, modules)
            names += [name for name in bare if is_matrix(modules[name.rpartition(".")[0]], name, bare[name])]
            aside = without_gradient(model)
            names = [name for name in names if not any(f"{name}.".startswith(f"{each}.") for each in aside)]
    else:
        one_of = {id(module): name for name, module in modules.items()}
        names = [one_of.get(id(every[name]), name) for name in match_names(every, target_modules, "target_modules")]
        names = list(dict.fromkeys(names))
    excluded = []
    if exclude_modules:
        excluded = match_names([*modules, *_parameters(model, modules)], exclude_modules, "exclude_modules")
    inside = [name for name in names if any(f"{name}.".startswith(f"{head}.") for head in heads)]
    left = [name for name in names if name not in excluded and name not in inside]
    if not left:
        hint = "; modules_to_save=[] trains no head" if inside else ""
        hint += f"; {what_to_name(model)}" if target_modules in (ALL_LINEAR, ALL_LINEAR_PEFT) else ""
        raise ValueError(
            f"target_modules={target_modules!r}: nothing is left of {_some(names) or 'it'} after exclude_modules="
            f"{exclude_modules!r} and the modules trained whole, {_some(dict.fromkeys(heads)) or 'none'}{hint}"
        )
    return left, heads + excluded + aside


def _check_outside_of_heads(modules: dict[str, nn.Module], targets: Sequence[str], heads: list[str]) -> None:
    for target in targets:
        meant = match_names(modules, [target], "target_modules")
        if all(any(f"{name}.".startswith(f"{head}.") for head in heads) for name in meant):
            raise ValueError(
                f"target_modules={targets!r}: {target!r} is in {_some(heads)}, which is trained whole; leave it "
                "out, or pass modules_to_save=[] to train no head"
            )


def _is_linear(module: nn.Module) -> bool:
    # Quantised layers need not derive from nn.Linear, and HQQ's and gptqmodel's do not.
    return (
        isinstance(module, nn.Linear) or is_conv1d(module) or (is_quantized(module) and hasattr(module, "in_features"))
    )


def _fused(modules: dict[str, nn.Module], name: str, enable_lora: Sequence[bool] | None) -> dict:
    if enable_lora is None:
        return {}
    owner = modules[name.rpartition(".")[0]]
    layout = fused_layout(owner, name, modules[name]) if name in modules else in_proj_layout(owner, name)
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


def _plan(name: str, modules: dict[str, nn.Module], spec: dict, merge_weights: bool) -> Plan:
    owner = modules.get(name.rpartition(".")[0])
    if owner is not None and name not in modules and name.rpartition(".")[2] in own_tensors(owner):
        return _plan_parameter(name, modules, spec, merge_weights)
    if name not in modules or owner is None:
        raise ValueError("the model has no such layer")
    module = modules[name]
    place = vars(module).get("_place")
    cls: Any = place.plain.cls if place else type(module)
    client: Any = None
    if issubclass(cls, Adapted):  # made by hand
        client = None if cls.__module__.startswith("loralib.") else cls
        cls = cls._base_class
    kind = next((kind for plain, kind in _KINDS.items() if issubclass(cls, plain)), None)
    quantized = is_quantized(module)
    if quantized:
        kind = Matrix if hasattr(module, "in_features") else None
    elif is_conv1d(module) or cls.__name__ in LINEAR_BY_ANOTHER_NAME:
        kind = Matrix
    if kind is None:
        allowed = ", ".join(f"nn.{plain.__name__}" for plain in _KINDS)
        where = f"{cls.__module__}." if any(cls.__name__ == plain.__name__ for plain in _KINDS) else ""
        raise TypeError(
            f"{name} is a {where}{cls.__name__}, which LoRA cannot adapt; {allowed} and Conv1D it can. "
            + ("Name the layers in it" if module._modules else "exclude_modules leaves layers out")
        )
    if "weight" not in own_tensors(module) and not quantized:
        raise TypeError(f"{name} is a {cls.__name__} whose weight is computed, which LoRA cannot adapt")
    _check_names(name, cls, module, kind)
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
    A, B = kind.shapes(module, settings)
    if 0 in A:
        raise ValueError(f"{name} would get no adapter: r={r}, enable_lora={spec.get('enable_lora')}")
    branch = quantized or cls.forward in _FORWARDS or _is_by_name(cls, module)
    # A forward that was put on the object may have kept that of its class, and would go past the branch; a wrapper's is
    # made to follow where what it has kept is just that.
    kept = [vars(module)[key] for key in ("_old_forward", "forward") if key in vars(module)][:1]
    follows = all(getattr(forward, "__func__", None) is type(module).forward for forward in kept)
    computed = not quantized and (not branch or not follows or is_read_from_outside(modules, name))
    if computed and getattr(module, "max_norm", None) is not None:
        raise TypeError(
            f"{name} is a {cls.__name__} with max_norm={module.max_norm} and a forward of its own, which would bound "
            "the sum of weight and update; exclude_modules leaves layers out"
        )
    if client is not None:
        if not issubclass(client, kind):
            raise TypeError(f"{name} is a {client.__name__}, made by hand, which cannot become a layer of another kind")
        form = Form(client, settings)
    else:
        form = Form(adapted(cls, kind, branch and follows, computed), settings)
    groups = settings.get("group_sizes")
    widest = min(A[1], max(groups) if groups else B[0])
    return Plan(name, "weight", {"lora_A": A, "lora_B": B}, _drawn_by(form.cls), form, widest=widest)


def _is_by_name(cls: Any, module: Any) -> bool:
    """Whether a class that is known by its name computes the product of its weight, as that of transformers does."""
    if not is_conv1d(module) and cls.__name__ not in LINEAR_BY_ANOTHER_NAME:
        return False
    if cls.__module__.startswith("transformers."):
        return True
    weight, bias = (module._parameters.get(key) for key in ("weight", "bias"))
    if weight is None or weight.is_meta:
        return False
    with torch.no_grad():
        matrix = weight if is_conv1d(module) else weight.T
        x = torch.linspace(-1, 1, 2 * len(matrix), dtype=weight.dtype, device=weight.device).reshape(2, -1)
        product = x @ matrix if bias is None else x @ matrix + bias
        return bool(torch.allclose(cls.forward(module, x), product, rtol=1e-2, atol=1e-3))


def _drawn_by(cls: Any) -> Callable[..., None]:
    return lambda weight, A, B: cls.draw(A, B)


def _plan_parameter(name: str, modules: dict[str, nn.Module], spec: dict, merge_weights: bool) -> Plan:
    path, _, key = name.rpartition(".")
    module, r = modules[path], spec["r"]
    weight = own_tensors(module)[key]
    if weight.dim() not in (2, 3):
        raise TypeError(
            f"{name} has {weight.dim()} axes, {tuple(weight.shape)}; LoRA adapts matrices and stacks of them"
        )
    groups = {}
    if "enable_lora" in spec:
        groups = check_groups(weight.shape[0], **{k: spec[k] for k in _FUSED_KEYS if k in spec})
    scaling = spec.get("scaling", spec["lora_alpha"] / r)
    transposed = weight.dim() == 3 and bool(getattr(module, "is_transposed", False))
    update = LowRank(r, spec["lora_alpha"], scaling, transposed, **groups)
    return _compute(modules, path, key, update, merge_weights)


def _compute(modules: dict[str, nn.Module], path: str, key: str, update: LowRank | Rows, merge_weights: bool) -> Plan:
    module = modules[path]
    weight, cls = own_tensors(module)[key], _plain_class(module)
    if (
        not isinstance(weight, nn.Parameter)
        or is_quantized(module)
        or not weight.is_floating_point()
        or weight.itemsize < 2
    ):
        raise TypeError(
            f"{path}.{key} is no Parameter of floating-point numbers of 16 bits or more, which LoRA adapts there"
        )
    if issubclass(cls, Adapted) or getattr(module, "max_norm", None) is not None:
        raise TypeError(f"{path} is a {cls.__name__}, made by hand or with max_norm, whose {key} cannot be computed")
    if "forward" in vars(module) or "_old_forward" in vars(module):
        raise TypeError(f"{path} has a forward of its own beside its class's, which would read {key} past the update")
    _check_names(path, cls, module, Parameters)
    shapes = dict(zip(update.names(key), update.shapes(weight), strict=True))
    widest = min(weight.shape[-2:]) if weight.dim() > 1 else 0
    return Plan(path, key, shapes, update.draw, None, update, widest, merge_weights)


def _check_names(name: str, cls: type, module: nn.Module, kind: type) -> None:
    taken = [] if isinstance(module, Adapted) else sorted(_names_of(cls, module) & _names_of_ours(kind))
    if "_place" not in vars(module) and not isinstance(module, LoRALayer):
        taken += [name for name in (*module._parameters, *module._buffers) if name.startswith("lora_")]
    if taken:
        raise TypeError(
            f"{name} is a {cls.__name__} with attributes that a LoRA layer has too ({', '.join(taken)}); "
            "exclude_modules leaves layers out"
        )


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


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
