"""What is known of architectures: which layers to adapt, how fused projections lie, what the head is.

Layers are found by the structure of the model and by their names, exceptions by class names, because the library does
not import transformers.
"""

import dis
import inspect
import itertools
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from loralib.adapters import RESIZED, all_modules, input_embeddings, named_modules
from loralib.core import _cached
from loralib.layers import is_conv1d

# What makes an attention, whose query and value section 4.2 of the paper adapts: siblings whose names differ in one
# word only, query, key and value, or one layer that is called by all three. The words, and the sets of them in the
# order in which they count.
_ROLES = {
    "qkv": "query_key_value|queries_keys_values|[wW]?qkvz?",
    "kv": "keys?_values?|kv",
    "q": "query|queries|[wW]?q",
    "k": "key|[wW]?k",
    "v": "value|[wW]?v",
}
_WORD = re.compile(
    "(?<![a-zA-Z])(?:" + "|".join(f"(?P<{role}>{words})" for role, words in _ROLES.items()) + ")(?![a-zA-Z])"
)
_SETS = (("q", "k", "v"), ("qkv",), ("q", "kv"))

# The same by names that do not tell it: what is adapted where layers of these names are siblings.
_OTHER_NAMES = (
    ("c_attn",),  # GPT-2: q, k, v, and in its cross-attention k, v
    ("q_proj", "kv_b_proj"),  # latent attention, the query not through a low rank
    ("q_gate_proj", "kv_b_proj"),  # latent attention, a gate beside the query
    ("q_b_proj", "kv_proj"),  # DeepSeek V4: key and value are one vector
    ("q_proj", "v_proj_current", "v_proj_delayed"),  # Zaya: half of the value is of the token before
    ("query_key", "value"),  # Reformer: query and key are one vector
    ("to_query", "to_key"),  # SwiftFormer: the weighted queries multiply the key, and nothing is called value
)
# And where the names are those of other layers, too, by the class that owns them.
_OTHER_OWNERS = {
    "DisentangledSelfAttention": ("in_proj",),  # DeBERTa
    "JetMoeAttention": ("kv_proj",),  # its query is in experts
    "RwkvSelfAttention": ("receptance", "value"),  # the receptance gates what is read, as a query does
}

# Classes inside of which nothing gets a gradient: they choose by ranks, or run under `torch.no_grad`.
_WITHOUT_GRADIENT = re.compile("Indexer$|^BltPatcher$")

# The classes whose head pretraining has not seen.
_WITH_HEAD = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|CTC|XVector)")

# Heads that are not what a model has beside its pretrained part, by full names.
_HEADS = {
    "HGNetV2ForImageClassification": ["fc"],  # the pretrained part is several modules
    "PPLCNetForImageClassification": ["head"],
    **dict.fromkeys(  # the decoder is inside of what is called the pretrained part
        [
            "PerceiverForSequenceClassification",
            "PerceiverForImageClassificationLearned",
            "PerceiverForImageClassificationFourier",
            "PerceiverForImageClassificationConvProcessing",
        ],
        ["perceiver.decoder"],
    ),
}

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


class Layout(NamedTuple):
    """How a fused projection lies: the rows of each of its parts, in how many turns, and what the parts are."""

    sizes: list[int]
    turns: int = 1
    parts: str = "qkv"  # z: a gate

    def enabled(self, enable_lora: Sequence[bool]) -> list[bool]:
        """Return for each part whether to adapt it, of what is wanted for q, k and v.

        >>> Layout([4, 4, 4, 4], 1, "qvkz").enabled([True, False, True])
        [True, True, False, False]
        """
        wanted = dict(zip("qkv", enable_lora, strict=True))
        return [wanted.get(part, False) for part in self.parts]


# By the classes that own a fused projection, its name and its layout.
_BLOCKS = """
    Blip2Attention BlipAttention CohereCompassVisionAttention DeepseekOcr2SamVisionSdpaAttention
    Dots3NoteVisionAttention Ernie4_5_VLMoeVisionAttention Florence2VisionWindowAttention Glm4vMoeVisionAttention
    Glm4vVisionAttention Glm5NextVisionAttention GlmOcrVisionAttention GotOcr2VisionAttention HieraMaskUnitAttention
    InstructBlipAttention InstructBlipVideoAttention PPFormulaNetVisionAttention Qwen2_5_VLVisionAttention
    Qwen3OmniMoeVisionAttention Qwen3VLMoeVisionAttention Qwen3VLVisionAttention Qwen3_5MoeVisionAttention
    Qwen3_5VisionAttention Qwen4ExpVisionAttention SamVisionSdpaAttention UnlimitedOcrSamVisionSdpaAttention
    VisionAttention
"""
_LATENT = """
    AXK1Attention AXK2Attention BailingHybridAttention DeepseekV2Attention DeepseekV32Attention DeepseekV3Attention
    Dots3NoteTextAttention Glm4MoeLiteAttention Glm5NextTextAttention GlmMoeDsaAttention HYV4Attention HYV4VLAttention
    KimiLinearAttention LongcatFlashMLA MiniCPM3Attention Mistral4Attention MistralLarge4TextAttention YoutuAttention
"""
_DELTA = "LaraMiniGatedDeltaNet Qwen3_5GatedDeltaNet Qwen3_5MoeGatedDeltaNet Qwen4ExpTextGatedDeltaNet"
_FUSED: dict[tuple[str, str], Callable[[Any, int], Layout]] = {
    **{(owner, "qkv"): lambda owner, rows: _thirds(rows) for owner in _BLOCKS.split()},
    **{(owner, "kv_b_proj"): lambda owner, rows: _latent(owner, rows) for owner in _LATENT.split()},
    **{(owner, "in_proj_qkv"): lambda owner, rows: _delta(owner) for owner in _DELTA.split()},
    ("Qwen3NextGatedDeltaNet", "in_proj_qkvz"): lambda owner, rows: _delta(owner, owner.num_k_heads),
    ("Exaone4_5_VisionAttention", "qkv"): lambda owner, rows: Layout([owner.q_dim, owner.kv_dim, owner.kv_dim]),
    ("ModernBertAttention", "Wqkv"): lambda owner, rows: _thirds(rows),
    ("MptAttention", "Wqkv"): lambda owner, rows: _thirds(rows),
    ("DbrxAttention", "Wqkv"): lambda owner, rows: _grouped(rows, owner.head_dim, owner.num_key_value_heads),
    **{
        (owner, "qkv_proj"): lambda owner, rows: _grouped(rows, owner.head_dim, owner.num_key_value_heads)
        for owner in ("Phi3Attention", "Phi4MultimodalAttention")
    },
    ("MiniMaxLightningAttention", "qkv_proj"): lambda owner, rows: _thirds(rows, owner.num_attention_heads),
    ("CodeGenAttention", "qkv_proj"): lambda owner, rows: Layout([rows // 3] * 3, 4, "qvk"),  # four TPU cores
    ("GPTNeoXAttention", "query_key_value"): lambda owner, rows: _thirds(rows, owner.config.num_attention_heads),
    ("GPTNeoXJapaneseAttention", "query_key_value"): lambda owner, rows: _thirds(rows, owner.num_attention_heads),
    ("PersimmonAttention", "query_key_value"): lambda owner, rows: _thirds(rows, owner.num_heads),
    ("BloomAttention", "query_key_value"): lambda owner, rows: _thirds(rows, owner.num_heads),
    ("FalconAttention", "query_key_value"): lambda owner, rows: _falcon(owner, rows),
    ("DisentangledSelfAttention", "in_proj"): lambda owner, rows: _thirds(rows, owner.num_attention_heads),
    ("GPTBigCodeAttention", "c_attn"): lambda owner, rows: (
        _grouped(rows, owner.kv_dim, 1) if owner.multi_query else _thirds(rows, owner.num_heads)
    ),
    **{
        (owner, name): lambda owner, rows: Layout([rows // 2] * 2, 1, "kv")
        for owner, name in (
            ("EvollaSequenceCompressorAttention", "to_kv"),
            ("GraniteSpeechConformerAttention", "to_kv"),
            ("GraniteSpeechPlusConformerAttention", "to_kv"),
            ("JetMoeAttention", "kv_proj"),
        )
    },
}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of `torch.compile`, `nn.DataParallel` or `DistributedDataParallel`."""
    while type(model).__name__ in _WRAPPERS:
        model = getattr(model, _WRAPPERS[type(model).__name__])
    return model


def find_query_and_value(model: nn.Module) -> list[str]:
    """Return the names of the query and value projections that are adapted when none are named; [] if there are none.

    Of a Hugging Face model whose parts have configurations of their own, those of the language model.

    >>> find_query_and_value(nn.MultiheadAttention(8, 2))
    []
    >>> find_query_and_value(nn.ModuleDict({name: nn.Linear(8, 8) for name in ("wq", "wk", "wv", "wo")}))
    ['wq', 'wv']
    """
    found: dict[str, Any] = {}
    towers: dict[str, Any] = {}
    closed: tuple[str, ...] = ()
    modules = named_modules(model)
    for name, module in modules.items():
        config = vars(module).get("config")
        inherited = towers.get(name.rpartition(".")[0]) if name else None
        towers[name] = type(config) if hasattr(config, "get_text_config") else inherited
        if _WITHOUT_GRADIENT.search(type(module).__name__):
            closed += (f"{name}.",)
        elif module._modules and not f"{name}.".startswith(closed):
            found.update((f"{name}.{layer}".removeprefix("."), towers[name]) for layer in _query_and_value(module))
    get = getattr(getattr(model, "config", None), "get_text_config", None)
    language = type(get(decoder=True)) if callable(get) else None
    if language in found.values():
        found = {name: tower for name, tower in found.items() if tower is language}
    return [name for name in modules if name in found]


def default_target_modules(model: nn.Module) -> list[str]:
    """Return the full names of what to adapt when nothing is named.

    >>> default_target_modules(nn.TransformerEncoderLayer(8, 2))
    ['self_attn.in_proj_weight']
    """
    names = find_query_and_value(model)
    names = names or [
        f"{path}.{key}".removeprefix(".")
        for path, module in named_modules(model).items()
        if isinstance(module, nn.MultiheadAttention)
        for key in ("in_proj_weight", "q_proj_weight", "v_proj_weight")
        if module._parameters.get(key) is not None
    ]
    if names:
        return names
    kind, owners = type(model).__name__, sorted({type(m).__name__ for m in all_modules(model) if _has_bare_query(m)})
    why = (
        f"its query and value are Parameters of {', '.join(owners)}, not layers"
        if owners
        else "it has no query and value"
    )
    raise ValueError(
        f"no default target_modules for {kind}: {why}; name the layers to adapt, or pass target_modules='all-linear'"
    )


def find_head(model: nn.Module) -> list[str] | None:
    """Return the full names of what a Hugging Face classifier has beside its pretrained part, its head.

    [] for other models, None if the head cannot be told from the rest.
    """
    kind = type(model).__name__
    if kind in _HEADS:
        return _HEADS[kind]
    prefix = getattr(model, "base_model_prefix", None)
    if prefix is None or not _WITH_HEAD.search(kind):
        return []
    children = dict(model.named_children())
    pretrained = {prefix} & children.keys()
    if not pretrained:  # a part of it, say its encoder, is a pretrained model as well
        pretrained = {n for n, child in children.items() if hasattr(child, "base_model_prefix")}
    if not pretrained:
        return None
    return [n for n, child in children.items() if n not in pretrained and next(child.parameters(), None) is not None]


def default_modules_to_save(model: nn.Module) -> list[str]:
    """Return the full names of the modules to train whole when none are named: the head of a classifier."""
    head = find_head(model)
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no {model.base_model_prefix!r}, so its head cannot be told from the rest "
            f"({', '.join(name for name, _ in model.named_children())}); "
            "name it in modules_to_save, or pass modules_to_save=[] to train no head"
        )
    return head


def output_layer(model: nn.Module) -> nn.Module | None:
    """Return the layer that a Hugging Face language model ends with, if there is one."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def resized_embeddings(model: nn.Module) -> tuple[list[nn.Module], str]:
    """Return the embeddings of a Hugging Face model with another number of tokens than its base, and what says so."""
    config: Any = getattr(model, "config", None)
    ends = [end for end in (input_embeddings(model), output_layer(model)) if end is not None]
    if config is None:
        return [], ""
    if vars(model).get(RESIZED):
        return ends, "the embeddings were resized after the adapter was put in"
    name = getattr(config, "_name_or_path", None)
    try:
        found = type(config).get_config_dict(name, local_files_only=True)[0] if name else {}
        base = type(config).from_dict(found) if found else config
        sizes = [each.get_text_config().vocab_size for each in (config, base)]
    except Exception:  # of whatever kind: not here, no configuration of that class, no words
        return [], ""
    if sizes[0] == sizes[1]:
        return [], ""
    return ends, f"the model has {sizes[0]} tokens, {name} {sizes[1]}"


def fused_layout(owner: nn.Module, name: str, module: Any) -> Layout | None:
    """Return how a fused projection lies; None if it is not one, or its layout is not known.

    Args:
        owner: the module that has `module` under the last part of `name`.
        name: name of `module`.
        module: a linear layer.
    """
    attribute = name.rsplit(".", 1)[-1]
    if is_conv1d(module):
        # q, k, v in GPT-2's self-attention; k, v where it attends to another sequence.
        columns, rows = module.weight.shape
        parts = {3: "qkv", 2: "kv"}.get(rows // columns, "") if attribute == "c_attn" and rows % columns == 0 else ""
        return Layout([columns] * len(parts), 1, parts) if parts else None
    for cls in type(owner).__mro__:
        if (cls.__name__, attribute) in _FUSED:
            return _FUSED[cls.__name__, attribute](owner, module.out_features)
    return None


def in_proj_layout(owner: nn.Module, name: str) -> Layout | None:
    """Return the rows of q, k, v of `in_proj_weight` of `nn.MultiheadAttention`; None for any other Parameter."""
    if not isinstance(owner, nn.MultiheadAttention) or not name.endswith("in_proj_weight"):
        return None
    return Layout([owner.embed_dim] * 3)


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


def _thirds(rows: int, turns: int = 1) -> Layout:
    return Layout([rows // 3] * 3, turns)


def _grouped(rows: int, head_dim: int, key_heads: int, turns: int = 1) -> Layout:
    return Layout([rows - 2 * key_heads * head_dim, key_heads * head_dim, key_heads * head_dim], turns)


def _falcon(owner: Any, rows: int) -> Layout:
    if owner.new_decoder_architecture:
        return _grouped(rows, owner.head_dim, owner.num_kv_heads, owner.num_kv_heads)
    if owner.multi_query:
        return _grouped(rows, owner.head_dim, 1)
    return _thirds(rows, owner.num_heads)


def _latent(owner: Any, rows: int) -> Layout:
    heads = rows // (owner.qk_nope_head_dim + owner.v_head_dim)
    return Layout([heads * owner.qk_nope_head_dim, heads * owner.v_head_dim], heads, "kv")


def _delta(owner: Any, turns: int | None = None) -> Layout:
    sizes = [owner.key_dim, owner.key_dim, owner.value_dim]
    return Layout(sizes) if turns is None else Layout([*sizes, owner.value_dim], turns, "qkvz")


def _query_and_value(owner: nn.Module) -> list[str]:
    # The names, below `owner`, of the layers of its query and value, if it is an attention.
    names = [name for name in owner._modules if _roles(name) or name in _OTHER_LAYERS]
    layers = {name: layer for name in names if (layer := _layer(name, owner._modules[name]))}
    if not layers:
        return []
    siblings: dict[tuple[str, str], dict[str, str]] = {}
    for name in layers:
        for rest, role in _roles(name):
            siblings.setdefault(rest, {})[role] = name
    for roles in _SETS:
        complete = [named for named in siblings.values() if named.keys() >= set(roles)]
        if complete:
            return [layers[named[role]] for named in complete for role in roles if role != "k"]
    others = [_OTHER_OWNERS[kind]] if (kind := type(owner).__name__) in _OTHER_OWNERS else _OTHER_NAMES
    return [layers[name] for name in next((names for names in others if layers.keys() >= set(names)), ())]


@_cached  # type: ignore[untyped-decorator]
def _roles(name: str) -> list[tuple[tuple[str, str], str]]:
    # What the words in a name may stand for, each with the rest of the name.
    return [((name[: word.start()], name[word.end() :]), str(word.lastgroup)) for word in _WORD.finditer(name)]


_OTHER_LAYERS = {name for names in (*_OTHER_NAMES, *_OTHER_OWNERS.values()) for name in names}


def _layer(name: str, module: nn.Module | None) -> str | None:
    # The name of the layer that `module` is, or that it wraps together with, say, its norm.
    if module is None:
        return None
    if _is_layer(module):
        return name
    inner = [key for key, child in module.named_children() if _is_layer(child)]
    return f"{name}.{inner[0]}" if len(inner) == 1 else None


def _is_layer(module: nn.Module) -> bool:
    return hasattr(module, "in_features") or isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or is_conv1d(module)


def _has_bare_query(module: nn.Module) -> bool:
    return module._parameters.keys() >= {"q", "v"} or "in_proj_weight" in module._parameters
