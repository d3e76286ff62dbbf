"""What is known of architectures: which layers to adapt, how fused projections lie, what the head is.

Layers are found by the structure of the model and by their names, exceptions by class names, because the library does
not import transformers.
"""

import dis
import inspect
import itertools
import re
import types
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from loralib.adapters import MERGED, RESIZED, base_modules, input_embeddings, named_modules, own_tensors
from loralib.core import _cached, computes_with, steps_of
from loralib.layers import is_conv1d
from loralib.quantized import is_quantized

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
_WITHOUT_GRADIENT = re.compile("Indexer$|^BltPatcher$|^Apertus1p5VisionTokenizerVectorQuantizer$")

# What vision towers pool their features with, which contrastive models read, and language models do not.
_POOLING_HEAD = re.compile("^(Siglip2?|Aimv2|Phi4MultimodalVision)\\w*PoolingHead$")

# By the class of a model, names of what it computes and does not read; with a group, a number, in the last one only.
_UNREAD = {
    "CanineFor(SequenceClassification|MultipleChoice)": r"canine\.(?:final_char_encoder|projection)\..*",
    "Lilt": r".*layer\.(\d+)\.(?:.*\.layout_(?:value|output\.dense)|layout_(?:intermediate|output)\.dense)",
    "LayoutLMv3": r".*encoder\.rel_pos_(?:[xy]_)?bias",  # looked up under `torch.no_grad`
    "PI0": r".*vlm\.language_model\.layers\.(\d+)\.(?:self_attn\.[qo]_proj|mlp\..*)",  # it reads keys and values
}

# The classes whose head pretraining has not seen.
_WITH_HEAD = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|CTC|XVector)")

# The classes that have any head: they return what it computes, not what the pretrained part returns.
_HAS_A_HEAD = re.compile(r"For[A-Z]|LMHead|EncoderDecoderModel$")

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
_WRAPPERS = {
    **dict.fromkeys(["DataParallel", "DistributedDataParallel", "DeepSpeedEngine", "AveragedModel"], "module"),
    **{"OptimizedModule": "_orig_mod", "_FabricModule": "_original_module"},
}

# Subclasses of nn.Linear that compute what nn.Linear computes, in a forward of their own.
LINEAR_BY_ANOTHER_NAME = ("FalconLinear",)

# Classes like nn.Linear that derive from nothing and return more than the product: their weight is computed as the sum.
LINEAR_IN_PART = ("QuantLinear",)  # I-BERT's, which rounds its weight once it is told to

# Names of methods that do not compute a forward.
_NO_FORWARD = ("init", "tie", "resize", "load", "save", "reset", "prune", "get_", "set_")


def is_read_from_outside(modules: dict[str, nn.Module], name: str, key: str = "weight") -> bool:
    """Whether a module around the layer `name` reads its weight, or its Parameter `key`, rather than to call it only.

    The code tells: what is looked for is `.name.weight` in the methods of all modules that the layer is in.

    >>> is_read_from_outside({"": nn.MultiheadAttention(4, 2)}, "out_proj")
    True
    """
    owners = itertools.accumulate(name.split(".")[:-1], lambda above, part: f"{above}.{part}", initial="")
    paths = [owner.removeprefix(".") for owner in owners]
    attribute = name.rpartition(".")[2]
    return any(attribute in _weights_read_by(type(modules[path]), key) for path in paths if path in modules)


@_cached  # type: ignore[untyped-decorator]
def _weights_read_by(cls: type, key: str) -> frozenset[str]:
    read: set[str] = set()
    codes: dict[str, types.CodeType] = {}
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, member in vars(base).items():
            member = getattr(member, "fget", None) or getattr(member, "__func__", member)
            code = getattr(inspect.unwrap(member) if inspect.isfunction(member) else member, "__code__", None)
            if code is not None and not any(part in name for part in _NO_FORWARD):
                codes.setdefault(name, code)
                read |= _weights_read_in(code, key)
    # What a method is given it reads, too: any attribute of where it is called may be that.
    given = {name for name, code in codes.items() if read & {*code.co_varnames[1 : code.co_argcount]}}
    return frozenset(read.union(*(code.co_names for code in codes.values() if given & {*code.co_names})))


def _weights_read_in(code: types.CodeType, weight: str) -> set[str]:
    read: set[str] = set()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):  # a function within
            read |= _weights_read_in(constant, weight)
    if weight not in code.co_names:
        return read
    steps = steps_of(code)
    for i, (operation, key, _) in enumerate(steps[1:-1], 1):
        before = steps[i - 1]
        from_attribute = before[0] in ("LOAD_ATTR", "LOAD_FAST", "LOAD_FAST_BORROW")
        if (operation, key) == ("LOAD_ATTR", weight) and from_attribute and computes_with(steps, i):
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
    return any("Expert" in cls.__name__ or cls.__name__ in LINEAR_IN_PART for cls in type(owner).__mro__)


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


@_cached  # type: ignore[untyped-decorator]
def is_pretrained(cls: Any) -> bool:
    """Whether modules of class `cls` are models that tie their tables, or that are saved by a method of their own."""
    return hasattr(cls, "tie_weights") or saves_itself(cls) is not None


def saves_itself(cls: Any) -> str | None:
    """Return which library's `save_pretrained` a class has, of transformers, diffusers and huggingface_hub."""
    bases = {base.__name__: base.__module__.partition(".")[0] for base in cls.__mro__}
    found = (bases.get(name) for name in ("PreTrainedModel", "ModelMixin", "ModelHubMixin"))
    return next((library for library in found if library in ("transformers", "diffusers", "huggingface_hub")), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of `torch.compile`, data parallelism, Lightning's Fabric or torch's `AveragedModel`."""
    while type(model).__name__ in _WRAPPERS:
        model = getattr(model, _WRAPPERS[type(model).__name__])
    return model


def pretrained_models(model: nn.Module) -> dict[str, Any]:
    """Return the outermost Hugging Face models in `model` by name, as a LightningModule or sentence-transformers have
    them inside; {"": model} if it is one itself."""
    found: dict[str, Any] = {}
    seen = set()

    def visit(module: nn.Module, name: str) -> None:
        seen.add(module)
        if hasattr(type(module), "base_model_prefix"):
            found[name] = module
            return
        for key, child in module._modules.items():
            if child is not None and child not in seen:
                visit(child, f"{name}.{key}".removeprefix("."))

    visit(model, "")
    return found


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
    modules = named_modules(model)
    for name, module in modules.items():
        config = vars(module).get("config")
        inherited = towers.get(name.rpartition(".")[0]) if name else None
        towers[name] = type(config) if hasattr(config, "get_text_config") else inherited
        if module._modules:
            found.update((f"{name}.{layer}".removeprefix("."), towers[name]) for layer in _query_and_value(module))
    deaf = tuple(f"{name}." for name in without_gradient(model)) if found else ()
    found = {name: tower for name, tower in found.items() if not f"{name}.".startswith(deaf)}
    get = getattr(getattr(model, "config", None), "get_text_config", None)
    language = type(get(decoder=True)) if callable(get) else None
    if language in found.values():
        found = {name: tower for name, tower in found.items() if tower is language}
    return [name for name in modules if name in found]


def without_gradient(model: nn.Module) -> list[str]:
    """Return the names of the modules that no loss of the model depends on differentiably, as far as the code tells.

    Those are the indexers of sparse attention, poolers that the model around them does not read, and a few by class.
    """
    modules = named_modules(model)
    found = []
    for name, module in modules.items():
        kind = type(module).__name__
        pools, is_pooler = _POOLING_HEAD.search(kind), name.endswith(".pooler")
        if _WITHOUT_GRADIENT.search(kind):
            found.append(name)
        elif pools or is_pooler:
            owners = name.split(".")[:-1]
            around = [modules[".".join(owners[:depth])] for depth in range(len(owners))]  # the owner itself aside
            reader: Any = _class_in_transformers(around[-1]) if around else None
            if reader is None:
                read = True
            elif pools:
                read = any("logit_scale" in each._parameters for each in around)
            else:
                read = _reads_pooled(reader) or not _HAS_A_HEAD.search(reader.__name__)
            found += [] if read else [name]
    return found + _unread(type(model).__name__, modules)


def _class_in_transformers(module: nn.Module) -> type | None:
    # A class of ours may be around it; one of a user's may read what it likes.
    cls = next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("loralib."))
    return cls if cls.__module__.startswith("transformers.models.") else None


def _unread(kind: str, names: Iterable[str]) -> list[str]:
    pattern = next((pattern for start, pattern in _UNREAD.items() if re.match(start, kind)), None)
    matches = [match for name in names if pattern and (match := re.fullmatch(pattern, name))]
    numbers = [int(match[1]) if match.re.groups else 0 for match in matches]
    return [match[0] for match, number in zip(matches, numbers, strict=True) if number == max(numbers)]


@_cached  # type: ignore[untyped-decorator]
def _reads_pooled(cls: Any) -> bool:
    # The second output of an encoder, by its name or by its place.
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    steps = [step for step in dis.get_instructions(code) if step.opname != "CACHE"] if code else []
    return code is None or any(
        step.argval == "pooler_output"
        or (step.argval == 1 and (after.opname == "BINARY_SUBSCR" or after.argrepr == "[]"))
        or (step.argval == 2 and before.argval is None and "SLICE" in after.opname)
        or step.argrepr == "slice(None, 2, None)"
        for before, step, after in zip(steps, steps[1:], steps[2:], strict=False)
    )


def default_target_modules(model: nn.Module) -> list[str]:
    """Return the full names of what to adapt when nothing is named.

    >>> default_target_modules(nn.TransformerEncoderLayer(8, 2))
    ['self_attn.in_proj_weight']
    """
    modules = named_modules(model)
    in_part = {name for name, module in modules.items() if type(module).__name__ in LINEAR_IN_PART}
    names = [f"{name}.weight" if name in in_part else name for name in find_query_and_value(model)]
    names = names or [
        f"{path}.{key}".removeprefix(".")
        for path, module in modules.items()
        if isinstance(module, nn.MultiheadAttention)
        for key in ("in_proj_weight", "q_proj_weight", "v_proj_weight")
        if module._parameters.get(key) is not None
    ]
    if names:
        return names
    owners = sorted({type(m).__name__ for m in modules.values() if _has_bare_query(m)})
    why = (
        f"its query and value are Parameters of {', '.join(owners)}, not layers"
        if owners
        else "it has no query and value"
    )
    slices = ", or target_parameters=['q', 'v'], each slice of which is a matrix then" if owners else ""
    raise ValueError(f"no default target_modules for {type(model).__name__}: {why}; {what_to_name(model)}{slices}")


def what_to_name(model: nn.Module) -> str:
    """Return what to tell somebody whose model has nothing to adapt by default: what to name instead."""
    heads = tuple(f"{name}." for name in find_head(model) or ())
    layers = {name: m for name, m in named_modules(model).items() if not f"{name}.".startswith(heads)}
    if any(hasattr(module, "in_features") or is_conv1d(module) for module in layers.values()):
        return "name the layers to adapt, or pass target_modules='all-linear'"
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    others = {name.rpartition(".")[2] for name, module in layers.items() if not isinstance(module, kinds)}
    paths = [name.split(".") for name, module in layers.items() if isinstance(module, kinds)]
    kernels = Counter(".".join(path[-2 if path[-1] in others else -1 :]) for path in paths)
    named = [name for name, _ in kernels.most_common() if not name.isdigit()][:4]
    head = f", and the head, modules_to_save={[name.rstrip('.') for name in heads]}" if heads else ""
    return f"name its convolutions, target_modules={named}{head}" if named else "name the layers to adapt"


def find_head(model: nn.Module) -> list[str] | None:
    """Return the full names of what Hugging Face classifiers have beside their pretrained part, their heads.

    [] for other models, None if a head cannot be told from the rest.
    """
    names = []
    for path, classifier in pretrained_models(model).items():
        head = _find_head(classifier)
        if head is None:
            return None
        names += [f"{path}.{name}".removeprefix(".") for name in head]
    return names


def _find_head(model: nn.Module) -> list[str] | None:
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
    pretrained |= {n for n, child in children.items() if isinstance(child, nn.Embedding)}  # T5 keeps its table outside
    return [n for n, child in children.items() if n not in pretrained and next(child.parameters(), None) is not None]


def default_modules_to_save(model: nn.Module) -> list[str]:
    """Return the full names of the modules to train whole when none are named: the head of a classifier, and what else
    of it the checkpoint that it was loaded from does not have, such as the pooler in a BERT of masked words."""
    head = find_head(model)
    if head is None:
        classifier = next(each for each in pretrained_models(model).values() if _find_head(each) is None)
        raise ValueError(
            f"{type(classifier).__name__} has no {classifier.base_model_prefix!r}, so its head cannot be told from the "
            f"rest ({', '.join(name for name, _ in classifier.named_children())}); "
            "name it in modules_to_save, or pass modules_to_save=[] to train no head"
        )
    if not head and model._parameters and _WITH_HEAD.search(type(model).__name__):
        raise ValueError(
            f"the head of {type(model).__name__} is {', '.join(model._parameters)}, Parameters of the model itself, "
            "which modules_to_save cannot name; pass modules_to_save=[] to leave them as they are"
        )
    inside = tuple(f"{name}." for name in head)
    return head + [name for name in drawn_anew(model) if head and not f"{name}.".startswith(inside)]


def drawn_anew(model: nn.Module) -> list[str]:
    """Return the full names of the modules whose Parameters transformers, since version 5, drew while it loaded a
    model; every further load draws other ones."""
    found: list[str] = []
    for path, each in pretrained_models(model).items():
        loaded, drawn = False, dict[str, None]()
        for name, module in base_modules(each).items():
            for tensor in own_tensors(module).values():
                if isinstance(tensor, nn.Parameter) and not is_quantized(module):
                    marked = getattr(tensor, _BY_TRANSFORMERS, False)
                    loaded = loaded or marked
                    # A copy, and what somebody has put in since, have no mark either; but nothing was drawn into them.
                    if not marked and getattr(module, _BY_TRANSFORMERS, False) and _is_written(tensor):
                        drawn[f"{path}.{name}".strip(".")] = None
        found += drawn if loaded else []
    return found


# Its mark of a Parameter that was loaded, and of a module that is loaded or drawn.
_BY_TRANSFORMERS = "_is_hf_initialized"


def _is_written(tensor: nn.Parameter) -> bool:
    return not tensor.is_inference() and tensor._version > 0


def base_name(model: nn.Module) -> str | None:
    """Return where a Hugging Face model was loaded from; None if that is not known, or its base is another one now."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return None if name == vars(model).get(MERGED) else name


def note_merged(model: nn.Module) -> None:
    """Note that the base of the Hugging Face models in `model` is no longer what they were loaded from."""
    for module in model.modules():
        if hasattr(type(module), "base_model_prefix"):
            vars(module)[MERGED] = base_name(module) or vars(module).get(MERGED)


def output_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that the Hugging Face language models in `model` end with."""
    found = pretrained_models(model) or {"": model}
    return [last for each in found.values() if (last := _output_layer(each)) is not None]


def _output_layer(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def resized_embeddings(model: nn.Module) -> tuple[list[nn.Module], str]:
    """Return the embeddings of Hugging Face models with another number of tokens than their base, and what says so."""
    found = [_resized(each) for each in pretrained_models(model).values()]
    return [end for ends, _ in found for end in ends], next((why for _, why in found if why), "")


def _resized(model: Any) -> tuple[list[nn.Module], str]:
    config: Any = getattr(model, "config", None)
    ends = [end for end in (input_embeddings(model), _output_layer(model)) if end is not None]
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
