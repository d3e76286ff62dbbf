"""What is known of Hugging Face architectures: which layers to adapt, how fused projections lie, what the head is.

Models are recognised by `config.model_type` and by class names, because the library does not import transformers.
"""

import dis
import inspect
import itertools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from loralib.adapters import RESIZED
from loralib.core import _cached
from loralib.layers import is_conv1d

# Query and value projections, which section 4.2 of the paper adapts, by `config.model_type`. Of the names given, a
# model has those of its version of transformers.
DEFAULT_TARGET_MODULES = {
    **dict.fromkeys(["gpt2", "gpt_bigcode"], ["c_attn"]),
    **dict.fromkeys(["gpt_neox", "falcon", "bloom"], ["query_key_value"]),
    **dict.fromkeys(["bert", "roberta", "xlm-roberta", "electra", "albert"], ["query", "value"]),
    **dict.fromkeys(["llama", "mistral", "mixtral", "qwen2", "qwen3", "phi"], ["q_proj", "v_proj"]),
    **dict.fromkeys(["gemma", "gemma2", "gemma3_text"], ["q_proj", "v_proj"]),
    **dict.fromkeys(["opt", "gpt_neo", "gptj", "bart", "mbart", "whisper"], ["q_proj", "v_proj"]),
    **dict.fromkeys(["t5", "mt5"], ["q", "v"]),
    "deberta-v2": ["query_proj", "value_proj"],
    "distilbert": ["q_lin", "v_lin"],
    "mpt": ["Wqkv"],
    "phi3": ["qkv_proj"],
    "vit": ["query", "value", "q_proj", "v_proj"],
}  # fmt: skip

# Endings of the classes whose head pretraining has not seen.
_WITH_HEAD = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForImageClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)

# What training wraps around a model, and where the model is in it.
_WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}

# Subclasses of nn.Linear that compute what nn.Linear computes, in a forward of their own.
LINEAR_BY_ANOTHER_NAME = ("FalconLinear",)

# What code asks of a weight without computing with it, and names of methods that do not compute a forward.
_HARMLESS = {"dtype", "device", "shape", "size", "requires_grad", "requires_grad_", "ndim", "dim", "numel", "is_meta"}
_NO_FORWARD = ("init", "tie", "resize", "load", "save", "reset", "prune", "get_", "set_")


def is_read_from_outside(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether a module around the layer `name` reads its weight, rather than to call the layer only.

    The code tells: what is looked for is `.name.weight` in the methods of all modules that the layer is in.

    >>> is_read_from_outside({"": nn.MultiheadAttention(4, 2)}, "out_proj")
    True
    """
    owners = itertools.accumulate(name.split(".")[:-1], lambda above, part: f"{above}.{part}", initial="")
    paths = [owner.removeprefix(".") for owner in owners]
    attribute = name.rpartition(".")[2]
    return any(attribute in _weights_read_by(type(modules[path])) for path in paths if path in modules)


@_cached  # type: ignore[untyped-decorator]
def _weights_read_by(cls: type) -> frozenset[str]:
    read: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, member in vars(base).items():
            member = getattr(member, "fget", None) or getattr(member, "__func__", member)
            code = getattr(inspect.unwrap(member) if inspect.isfunction(member) else member, "__code__", None)
            if code is not None and not any(part in name for part in _NO_FORWARD):
                read |= _weights_read_in(code)
    return frozenset(read)


def _weights_read_in(code: types.CodeType) -> set[str]:
    read: set[str] = set()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):  # a function within
            read |= _weights_read_in(constant)
    if "weight" not in code.co_names:
        return read
    skipped = ("CACHE", "RESUME", "PUSH_NULL", "PRECALL", "NOP", "EXTENDED_ARG")
    steps = [(step.opname, step.argval) for step in dis.get_instructions(code) if step.opname not in skipped]
    for i, (operation, key) in enumerate(steps[1:-1], 1):
        before, after = steps[i - 1], steps[i + 1]
        if (operation, key) != ("LOAD_ATTR", "weight") or before[0] != "LOAD_ATTR":
            continue
        start = next(k for k in range(i, -1, -1) if steps[k][0] != "LOAD_ATTR")
        asked = after[0] in ("LOAD_ATTR", "LOAD_METHOD") and (after[1] in _HARMLESS or after[1].endswith("_"))
        if not asked and not (start and steps[start - 1][1] == "isinstance"):
            read.add(before[1])
    return read


def is_router(owner: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether `module`, the layer `name` of `owner`, chooses experts: it returns choices rather than features."""
    named = name.rpartition(".")[2] in ("gate", "router") and "experts" in owner._modules
    return named or any("Router" in cls.__name__ for cls in type(module).__mro__)


def is_matrix(owner: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether the Parameter `name` of `owner` is a matrix, or a stack of them, that inputs are multiplied by."""
    key = name.rpartition(".")[2]
    if parameter.dim() not in (2, 3) or "bias" in key:
        return False
    if isinstance(owner, (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)):
        return "weight" in key
    return any("Expert" in cls.__name__ for cls in type(owner).__mro__)


# How many rows of a fused projection belong to q, k and v, and in how many turns they are laid out, by the class that
# owns the projection and the projection's name.
Layout = tuple[list[int], int]
_FUSED: dict[tuple[str, str], Callable[[Any, int], Layout]] = {
    ("GPTNeoXAttention", "query_key_value"): lambda owner, rows: _thirds(rows, owner.config.num_attention_heads),
    ("BloomAttention", "query_key_value"): lambda owner, rows: _thirds(rows, owner.num_heads),
    ("FalconAttention", "query_key_value"): lambda owner, rows: _falcon(owner, rows),
    ("Phi3Attention", "qkv_proj"): lambda owner, rows: (_grouped(rows, owner.head_dim, owner.num_key_value_heads), 1),
    ("MptAttention", "Wqkv"): lambda owner, rows: _thirds(rows, 1),
    ("GPTBigCodeAttention", "c_attn"): lambda owner, rows: (
        (_grouped(rows, owner.kv_dim, 1), 1) if owner.multi_query else _thirds(rows, owner.num_heads)
    ),
}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of `torch.compile`, `nn.DataParallel` or `DistributedDataParallel`."""
    while type(model).__name__ in _WRAPPERS:
        model = getattr(model, _WRAPPERS[type(model).__name__])
    return model


def default_target_modules(model: nn.Module) -> list[str]:
    """Return the last parts of the names of the layers to adapt when none are named."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in DEFAULT_TARGET_MODULES:
        raise ValueError(
            f"no default target_modules for {type(model).__name__} (model_type={model_type!r}); name them, "
            f"or use one of {', '.join(sorted(DEFAULT_TARGET_MODULES))}"
        )
    present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    wanted = DEFAULT_TARGET_MODULES[model_type]
    return [name for name in wanted if name in present] or wanted


def default_modules_to_save(model: nn.Module) -> list[str]:
    """Return the head of a classifier: what a Hugging Face model of such a class has beside its pretrained part."""
    kind = type(model).__name__
    if not kind.endswith(_WITH_HEAD):
        return []
    prefix = getattr(model, "base_model_prefix", None)
    if prefix is None:  # not of transformers
        return []
    children = dict(model.named_children())
    if prefix not in children:
        raise ValueError(
            f"{kind} has no {prefix!r}, so its head cannot be told from the rest ({', '.join(children)}); "
            "name it in modules_to_save, or pass modules_to_save=[] to train no head"
        )
    return [name for name, child in children.items() if name != prefix and next(child.parameters(), None) is not None]


def output_layer(model: nn.Module) -> nn.Module | None:
    """Return the layer that a Hugging Face language model ends with, if there is one."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def resized_embeddings(model: nn.Module) -> tuple[list[nn.Module], str]:
    """Return the embeddings of a Hugging Face model with another number of tokens than its base, and what says so."""
    config: Any = getattr(model, "config", None)
    get_input = getattr(model, "get_input_embeddings", None)
    if config is None or not callable(get_input):
        return [], ""
    ends = [end for end in (get_input(), output_layer(model)) if end is not None]
    if vars(model).get(RESIZED):
        return ends, "the embeddings were resized after the adapter was put in"
    name = getattr(config, "_name_or_path", None)
    try:
        base = type(config).from_pretrained(name, local_files_only=True) if name else config
        sizes = [each.get_text_config().vocab_size for each in (config, base)]
    except Exception:  # of whatever kind: not here, no configuration of that class, no words
        return [], ""
    if sizes[0] == sizes[1]:
        return [], ""
    return ends, f"the model has {sizes[0]} tokens, {name} {sizes[1]}"


def fused_layout(owner: nn.Module, name: str, module: Any) -> Layout | None:
    """Return the rows of q, k, v of a fused projection and in how many turns they lie; None if it is not one, or
    its layout is not known.

    Args:
        owner: the module that has `module` under the last part of `name`.
        name: name of `module`.
        module: a linear layer.
    """
    attribute = name.rsplit(".", 1)[-1]
    if is_conv1d(module):
        # q, k, v in GPT-2's self-attention; k, v where it attends to another sequence.
        columns, rows = module.weight.shape
        return ([columns] * (rows // columns), 1) if attribute == "c_attn" and rows % columns == 0 else None
    for cls in type(owner).__mro__:
        if (cls.__name__, attribute) in _FUSED:
            sizes, turns = _FUSED[cls.__name__, attribute](owner, module.out_features)
            return sizes, turns
    return None


def in_proj_layout(owner: nn.Module, name: str) -> Layout | None:
    """Return the rows of q, k, v of `in_proj_weight` of `nn.MultiheadAttention`; None for any other Parameter."""
    if not isinstance(owner, nn.MultiheadAttention) or not name.endswith("in_proj_weight"):
        return None
    return [owner.embed_dim] * 3, 1


def group_spec(enable_lora: list[bool], sizes: list[int], turns: int) -> dict:
    """Return the arguments of `MergedLinear` for a layout, without those that say what is the default.

    >>> group_spec([True, False, True], [4, 4, 4], 1)
    {'enable_lora': [True, False, True]}
    >>> group_spec([True, False, True], [8, 2, 2], 2)
    {'enable_lora': [True, False, True], 'group_sizes': [8, 2, 2], 'interleave': 2}
    """
    spec: dict = {"enable_lora": enable_lora}
    if len(set(sizes)) > 1 or turns > 1:
        spec.update(group_sizes=sizes, interleave=turns)
    return spec


def _thirds(rows: int, turns: int) -> Layout:
    return [rows // 3] * 3, turns


def _grouped(rows: int, head_dim: int, key_heads: int) -> list[int]:
    return [rows - 2 * key_heads * head_dim, key_heads * head_dim, key_heads * head_dim]


def _falcon(owner: Any, rows: int) -> Layout:
    if owner.new_decoder_architecture:
        return _grouped(rows, owner.head_dim, owner.num_kv_heads), owner.num_kv_heads
    if owner.multi_query:
        return _grouped(rows, owner.head_dim, 1), 1
    return _thirds(rows, owner.num_heads)
