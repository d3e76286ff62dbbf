"""What the library does by default to every architecture of the installed transformers, and how fused layers lie.

Where a model comes from says `every_architecture`. A few of each kind are tried always, all of them with `-m slow`:
`pytest -m slow tests/test_every_architecture.py`. What a new version of transformers broke is listed by the failure.
"""

import ast
import copy
import functools
import inspect
import json
import re

import every_architecture as every
import peft
import pytest
import torch
from peft.utils import transformers_weight_conversion
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import loralib as lora
from loralib.architectures import _FUSED, default_modules_to_save, find_query_and_value, fused_layout
from loralib.layers import is_conv1d
from loralib.wrappers import _old_names, _renamed, matched_names, names_for_peft

pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers warns of while it builds

# Model types without a query and a value: recurrent and convolutional ones, a Fourier transform. XLNet has them as bare
# Parameters, and Gemma's assistants read keys and values of another model.
WITHOUT = {
    *("bit", "convnext", "convnextv2", "efficientnet", "falcon_mamba", "fnet", "focalnet", "gemma4_assistant"),
    *("gemma4_unified_assistant", "hgnet_v2", "mamba", "mamba2", "mobilenet_v1", "mobilenet_v2", "poolformer"),
    *("pp_lcnet", "regnet", "resnet", "textnet", "xlnet"),
}

# Why the default adapters of a type do not do all that they should.
FAULTS = {
    "mra": "no ",  # effect, gradient: without its CUDA kernel its attention gives zeros
    "deepseek_v4": "no gradient: ['model.layers.0.self_attn.compressor",  # whose window is longer than the text
    "longcat_flash": "no gradient: ['model.layers.0.mlp.experts",  # the router chooses those that do nothing
    "rwkv": "modified by an inplace operation",  # in eval mode, where its state is kept
    "canine": "no gradient",  # its classifiers do not use what they compute last
}


def structure(kind, name):
    """What is wrong with the targets and the head of a model on the meta device; "" if nothing is."""
    model, _ = every.build(kind, name)
    if model is None:
        return None
    targets = find_query_and_value(model)
    if bool(targets) == (kind in WITHOUT):
        return f"default targets {targets[:4]}"
    if any(part in target for target in targets for part in ("indexer", "pooler", "patcher")):
        return f"an adapter without gradient: {targets}"
    head = default_modules_to_save(model)
    if ("Classification" in name or "CTC" in name) and kind != "shieldgemma2" and not head:
        return "no head"
    modules = dict(model.named_modules())
    if not modules.keys() >= {*targets, *head}:
        return f"no such modules: {targets} {head}"
    return ""


def numbers(kind, name, targets=None):
    """What is wrong with the adapters of a model with weights; "" if nothing is, None if it does not run."""
    model = every.with_weights(kind, name)
    with torch.no_grad():
        ran = model and every.taken(model)
    if ran is None:
        return None
    given, wanted = ran
    try:
        names = lora.inject_lora(model, r=2, target_modules=targets)
    except (TypeError, ValueError) as error:
        told = "no default target_modules" if targets is None else "name its convolutions"
        return "" if kind in WITHOUT and told in str(error) else str(error)
    called, modules = set(), dict(model.named_modules())
    updates = {name: parameter for name, parameter in model.named_parameters() if "lora_B" in name}
    for target in {name if name in modules else name.rpartition(".")[0] for name in names}:
        modules[target].register_forward_hook(lambda *_, target=target: called.add(target))
    for parameter in updates.values():
        nn.init.normal_(parameter, std=0.1)
    outputs = every.run(lora.unmerge_lora_weights(model), given)
    if not any(far(a, b) > 1e-6 for a, b in zip(outputs, wanted, strict=True)):
        return "no effect"
    sum((tensor * torch.randn_like(tensor)).sum() for tensor in outputs if tensor.requires_grad).backward()
    deaf = [name for name, parameter in updates.items() if name.rpartition(".")[0] in called and parameter.grad is None]
    if deaf:
        return f"no gradient: {deaf}"
    with torch.no_grad():
        merged = every.run(lora.merge_lora_weights(model), given)
        if any(far(a, b) > 1e-3 for a, b in zip(merged, outputs, strict=True)):
            return "merged and unmerged differ"
        if any(far(a, b) > 1e-6 for a, b in zip(every.run(lora.unload(model), given), wanted, strict=True)):
            return "unloaded, it is not the base"
    return ""


def all_linear(kind, name):
    """What is wrong with the adapters of every matrix."""
    return numbers(kind, name, "all-linear")


def names(kind, name):
    """What is wrong with the names under which PEFT is given the layers of a model, and with what it was once called.

    PEFT's own conversion of a file's names is the oracle; the old names are those that transformers would write.
    """
    model, _ = every.build(kind, name)
    table = _old_names(model)
    if model is None or not table:
        return None
    modules = dict(model.named_modules())
    halves = {f"{path}.lora_A.weight": path for path, module in modules.items() if hasattr(module, "in_features")}
    named, lost = names_for_peft(model, halves)
    written = {named.get(key, key): key for key in halves}
    there = {f"base_model.model.{key}": torch.zeros(1, 1) for key in written}
    config = peft.LoraConfig(r=1)
    read = transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers(model, config, there)
    missing = {f"base_model.model.{key}" for key in halves} - read.keys()
    if {key.removeprefix("base_model.model.") for key in missing} != set(lost):
        return f"PEFT does not find {sorted(missing)[:4]}"
    back = [renaming.reverse_transform() for renaming in reversed(table)]
    old = {}
    for key, path in halves.items():
        before = functools.reduce(lambda new, renaming: renaming.rename_source_key(new)[0], back, key)
        known = _renamed(before, table) == key and before.removesuffix(".lora_A.weight") not in modules
        old[path] = before.removesuffix(".lora_A.weight") if known else path
    if len(set(old.values())) < len(old):
        return ""
    found = matched_names(old.values(), [], modules)
    wrong = [path for path, before in old.items() if found.get(before, before) != path]
    return f"old names of {wrong[:4]} do not load" if wrong else ""


def far(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() if a.numel() else 0.0


FAST = ["squeezebert", "zaya", "jetmoe", "deepseek_v3", "xlnet", "whisper", "siglip", "hgnet_v2", "xlm", "ctrl"]


@pytest.mark.parametrize("kind", FAST)
def test_some_architectures(kind):
    """A convolution, halves of a value, experts for queries, latent attention, bare Parameters, two towers, ..."""
    for _, name in dict((task, name) for task, each, name in every.architectures() if each == kind).items():
        assert structure(kind, name) == ""
        assert not numbers(kind, name)
        assert not names(kind, name)


@pytest.mark.slow
@pytest.mark.parametrize("check", [structure, numbers, all_linear, names])
def test_every_architecture(check):
    faults, passed, not_run = [], 0, 0
    for _, kind, name in every.architectures():
        try:
            fault = check(kind, name)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        passed, not_run = passed + (fault == ""), not_run + (fault is None)
        if fault and (check is structure or FAULTS.get(kind, "?") not in fault):
            faults.append(f"{kind} {name}: {fault[:200]}")
    print(f"{check.__name__}: {passed} pass, {not_run} do not run as tiny models, {len(faults)} fail")
    assert not faults, "\n".join(faults)
    assert passed > (300 if check is names else 400)


# Model types with what no gradient reaches: a part of the names of the modules that "all-linear" leaves out.
WITHOUT_GRADIENT = {
    ("deepseek_v32", "DeepseekV32ForCausalLM"): ["indexer"],
    ("big_bird", "BigBirdForMaskedLM"): ["pooler"],
    ("luke", "LukeForMaskedLM"): ["pooler"],
    ("siglip", "SiglipForImageClassification"): ["vision_model.head"],
    ("gemma3", "Gemma3ForConditionalGeneration"): ["vision_tower.head"],
    ("canine", "CanineForSequenceClassification"): ["final_char_encoder", "projection"],
    ("layoutlmv3", "LayoutLMv3ForSequenceClassification"): ["rel_pos_bias", "rel_pos_x_bias"],
    ("lilt", "LiltForSequenceClassification"): ["layer.1.layout_output", "layer.1.attention.self.layout_value"],
    ("bert", "BertForSequenceClassification"): [],  # which reads its pooler
    ("albert", "AlbertForSequenceClassification"): [],
}


def test_a_weight_that_a_method_is_given_is_read():
    """LayoutLMv3's tables of relative positions, if they are named."""
    model = every.with_weights("layoutlmv3", "LayoutLMv3ForSequenceClassification")
    given, _ = every.taken(model)
    lora.inject_lora(model, r=2, target_modules=["rel_pos_bias", "rel_pos_x_bias"])
    for key, parameter in model.named_parameters():
        nn.init.normal_(parameter) if "lora_B" in key else None
    with torch.no_grad():
        unmerged = every.run(lora.unmerge_lora_weights(model), given)[0]
        torch.testing.assert_close(every.run(lora.merge_lora_weights(model), given)[0], unmerged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, name", WITHOUT_GRADIENT, ids=[kind for kind, _ in WITHOUT_GRADIENT])
def test_what_gets_no_gradient_is_left_out(kind, name):
    """Named, it is adapted: a loss of one's own may reach it."""
    model, _ = every.build(kind, name)
    left_out = WITHOUT_GRADIENT[kind, name]
    adapted = lora.inject_lora(model, r=1, target_modules="all-linear")
    assert [part for part in left_out if any(part in target for target in adapted)] == []
    assert left_out or any("pooler" in target for target in adapted)
    if left_out:
        layers = [path for path, module in model.named_modules() if hasattr(module, "in_features")]
        target = next(path for path in layers if left_out[0] in path)
        assert target in lora.inject_lora(lora.unload(model), r=1, target_modules=[target])


CONVOLUTIONS = ["resnet", "efficientnet", "pp_lcnet", "mobilevitv2", "poolformer"]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_of_convolutions_the_error_says_what_works(kind):
    name = next(name for _, each, name in every.architectures() if each == kind)
    model, _ = every.build(kind, name)
    with pytest.raises(ValueError, match="nothing is left of .*; name its convolutions, ") as raised:
        lora.inject_lora(model, r=1, target_modules="all-linear")
    told = re.fullmatch(r".*target_modules=(\[.*\]), and the head, modules_to_save=(\[.*\])", str(raised.value))
    targets, head = map(ast.literal_eval, told.groups())
    assert lora.inject_lora(model, r=1, target_modules=targets, modules_to_save=head)


# What transformers takes for old names in new ones, and what PEFT finds instead: by a part that has one letter less, is
# missing, or comes twice.
RENAMED = {
    "laguna": ("mlp.shared_experts.up_proj", "mlp.shared_expert.up_proj"),
    "mistral_large4": ("mlp.shared_experts.up_proj", "shared_experts.up_proj"),
    "deepseek_ocr2": ("model.language_model.layers.0", "model.layers.0"),
}


@pytest.mark.parametrize("kind, new, old", [(kind, *names) for kind, names in RENAMED.items()], ids=RENAMED)
def test_peft_finds_what_transformers_has_renamed(kind, new, old, tmp_path):
    """Both ways to load a folder apply the tables of old names to new names, too, and lose adapters in silence."""
    name = next(name for _, each, name in every.architectures() if each == kind)
    base = every.with_weights(kind, name)
    given, _ = every.taken(base)
    model = copy.deepcopy(base)
    lora.inject_lora(model, r=2, target_modules="all-linear")
    for key, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.1) if "lora_B" in key else None
    lora.save_lora(model, tmp_path, format="peft")
    written = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any(old in key for key in written) and not any(new in key for key in written)
    wanted = every.run(model.eval(), given)[0]
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    also_theirs, ours = copy.deepcopy(base), copy.deepcopy(base)
    also_theirs.load_adapter(str(tmp_path))
    lora.load_lora(ours, tmp_path)
    for loaded in (theirs, also_theirs, ours):
        torch.testing.assert_close(every.run(loaded.eval(), given)[0], wanted, rtol=1e-4, atol=1e-4)


def test_what_peft_cannot_find_is_refused(tmp_path):
    """Of `sconv.weight_proj` it always makes `sconv.weight_proj.weight`."""
    model = every.with_weights("inkling2_text", "Inkling2ForCausalLM")
    lora.inject_lora(model, r=2, target_modules="all-linear")
    with pytest.raises(ValueError, match=r"would lose the adapters of .*k_proj\.sconv\.weight_proj.*format='loralib'"):
        lora.save_lora(model, tmp_path / "adapter", format="peft")
    assert not (tmp_path / "adapter").exists()


# Vision-language models before transformers 4.52, by what their layers are called now.
OLD_NAMES = {
    "llava": {r"^model\.language_model": "language_model.model", r"^model\.vision": "vision"},
    "qwen2_vl": {r"^model\.language_model": "model", r"^model\.visual": "visual"},
}


@pytest.mark.parametrize("format", ["loralib", "peft"])
@pytest.mark.parametrize("around", ["", "module."])
@pytest.mark.parametrize("kind", OLD_NAMES)
def test_adapters_with_old_names_load(kind, around, format, tmp_path):
    name = next(name for _, each, name in every.architectures() if each == kind)
    model, _ = every.build(kind, name)
    model = model.to_empty(device="cpu")
    targets = lora.inject_lora(model, r=2, target_modules=r".*\.([qv]_proj|qkv)")
    assert any("vision" in target or "visual" in target for target in targets)
    for key, parameter in model.named_parameters():
        nn.init.normal_(parameter) if "lora_" in key else None
    wanted = lora.lora_state_dict(model)
    path = tmp_path / ("adapter" if format == "peft" else "adapter.safetensors")
    lora.save_lora(model, path, format=format)
    file = path / "adapter_model.safetensors" if format == "peft" else path
    prefix = "base_model.model." if format == "peft" else ""

    def old(key):
        for pattern, before in OLD_NAMES[kind].items():
            key = re.sub(pattern, before, key)
        return around + key

    rename(file, lambda key: prefix + old(key.removeprefix(prefix)))
    model, _ = every.build(kind, name)
    lora.load_lora(model.to_empty(device="cpu"), path)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in lora.lora_state_dict(model).items())


def rename(file, change):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {change(key): tensor for key, tensor in load_file(file).items()}
    if "loralib" in metadata:
        settings = json.loads(metadata["loralib"])
        settings["layers"] = {change(key): spec for key, spec in settings["layers"].items()}
        metadata["loralib"] = json.dumps(settings)
    save_file(tensors, file, metadata)


def parts_by_effect(attend, owner, layer, layout):
    """What the parts of a fused layer are, told by what changes in the attention when one number of each does.

    A change of a query at one token changes the result at that token only, or at the few that a short convolution
    mixes; of a value, also at others, in one channel, and in one more for each further query head that shares it; of a
    key, at others in all channels of a head.

    Args:
        attend: calls `owner`.
        owner: the attention, with what comes after it: its result is read before its norm or its last layer.
        layer: the fused layer.
        layout: what is said of it; only the rows of the parts are used, not what they are.
    """
    places = torch.arange(len(layout.sizes)).repeat_interleave(torch.tensor(layout.sizes) // layout.turns)
    places = places.repeat(layout.turns)
    norm = getattr(owner, "norm", None)
    linear = [m for m in owner.modules() if hasattr(m, "in_features") or hasattr(m, "num_experts") or is_conv1d(m)]
    after = [norm] if isinstance(norm, nn.Module) else [module for module in linear if module is not layer]
    seen, row = [], None

    def change(_, __, y):
        seen.clear()
        y = y.clone()
        if row is not None:
            y.view(-1, y.shape[-1])[0, row] += 1.0
        return y

    def results():
        with torch.no_grad():
            attend()
        result = seen[0] if after == [norm] else seen[-2:][0]
        return result.reshape(-1, result.shape[-1])

    hooks = [layer.register_forward_hook(change)]
    hooks += [module.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for module in after]
    hooks.append(owner.register_forward_hook(lambda _, __, y: seen.append(y if torch.is_tensor(y) else y[0])))
    base, parts = results(), ""
    for part in range(len(layout.sizes)):
        of_part = (places == part).nonzero().flatten()
        row = of_part[len(of_part) // 2]
        changed = results() != base
        tokens, channels = changed.any(1).sum().item(), changed.any(0).sum().item()
        few = owner.conv_kernel_size * owner.num_v_heads // owner.num_k_heads if hasattr(owner, "conv1d") else 1
        shared = max(1, base.shape[-1] // layout.sizes[part])
        kind = "q" if tokens <= few else "v" if channels <= shared else "k"
        parts += "z" if tokens == 0 and "z" in layout.parts else kind
    for hook in hooks:
        hook.remove()
    return parts


def parts_adapted(owner, key, layout):
    """What the parts of a fused layer are, told by which rows change when one of q, k and v is adapted alone."""
    places = torch.arange(len(layout.sizes)).repeat_interleave(torch.tensor(layout.sizes) // layout.turns)
    places, parts = places.repeat(layout.turns), ["z"] * len(layout.sizes)
    for part in set("qkv") & set(layout.parts):
        attention = nn.ModuleDict({"attention": copy.deepcopy(owner)})
        layer = attention["attention"].get_submodule(key)
        before = layer.weight.detach().clone()
        lora.inject_lora(attention, r=1, target_modules=[key], enable_lora=[part == each for each in "qkv"])
        nn.init.normal_(layer.lora_B)
        changed = (lora.merge_lora_weights(attention)["attention"].get_submodule(key).weight != before).any(
            int(not is_conv1d(layer))
        )
        [place] = places[changed].unique()
        parts[place] = part if torch.equal(changed, places == place) else "?"
    return "".join(parts)


def alone(owner, layer):
    """Ways to call an attention that text alone does not reach, by what its forward takes."""
    width = layer.in_features
    accepted = inspect.signature(owner.forward).parameters
    if "cu_seqlens" in accepted:
        for size in (owner.head_dim, owner.head_dim // 2):
            angles = torch.arange(16.0).view(16, 1) * torch.ones(1, size)
            yield {
                "hidden_states": torch.randn(16, width),
                "cu_seqlens": torch.tensor([0, 16]),
                "position_embeddings": (angles.cos(), angles.sin()),
            }
    elif "latents" in accepted:
        yield {"x": torch.randn(1, 16, width), "latents": torch.randn(1, 4, width), "mask": torch.ones(1, 20)}
    elif "attention_dists" in accepted:
        size = owner.context_size
        yield {
            "hidden_states": torch.randn(1, size, width),
            "attention_dists": torch.zeros(size, size, dtype=torch.long) + owner.max_pos_emb,
        }
    else:
        side = (len(owner.rel_pos_h) + 1) // 2 if hasattr(owner, "rel_pos_h") else 4
        yield {"hidden_states": torch.randn(1, side, side, width)}
        yield {"hidden_states": torch.randn(1, 16, width)}
        yield {"hidden_states": torch.randn(1, 64, width)}


def fused_layers(kind, name, known=()):
    """Of each fused layer of a model: its owner's class, its name, its parts as its layout has them, as they work, and
    as they are adapted."""
    model = every.with_weights(kind, name)
    with torch.no_grad():
        ran = model and every.taken(model)
    model = model or every.build(kind, name)[0]
    if model is None:
        return
    modules = dict(model.named_modules())
    for path, layer in modules.items():
        owner, key = modules[path.rpartition(".")[0]], path.rpartition(".")[2]
        classes = [cls.__name__ for cls in type(owner).__mro__]
        found = next((kind for kind in classes if (kind, key) in _FUSED), classes[0])
        linear = hasattr(layer, "in_features") or is_conv1d(layer)
        layout = fused_layout(owner, path, layer) if linear and (found, key) not in known else None
        if layout is None or sum(parameter.numel() for parameter in owner.parameters()) > every.MOST:
            continue
        if layer.weight.is_meta:  # the attention alone may not be too large
            owner.to_empty(device="cpu")
            for parameter in owner.parameters():
                nn.init.normal_(parameter, std=0.02)
        ways = [functools.partial(every.run, model, ran[0])] if ran else []
        ways += [functools.partial(owner, **given) for given in ([] if is_conv1d(layer) else alone(owner, layer))]
        for attend in ways:
            try:
                effect = parts_by_effect(attend, owner, layer, layout)
                yield found, key, layout.parts, effect, parts_adapted(owner, key, layout)
                known = {*known, (found, key)}
                break
            except Exception:
                continue


@pytest.mark.parametrize("kind", ["gpt2", "codegen", "deepseek_v3", "qwen3_next", "jetmoe", "deberta"])
def test_some_fused_layouts(kind):
    """Blocks, turns of four with the value before the key, latent attention, a gate, keys and values only."""
    name = next(name for _, each, name in every.architectures() if each == kind)
    layers = list(fused_layers(kind, name))
    assert layers and all(said == done == adapted for _, _, said, done, adapted in layers), layers


@pytest.mark.slow
def test_every_fused_layout():
    """A layout that nothing here tries would be a guess."""
    said_and_done = {}
    for _, kind, name in every.architectures():
        for found, key, *parts in fused_layers(kind, name, said_and_done.keys()):
            said_and_done[found, key] = parts
    wrong = {layer: parts for layer, parts in said_and_done.items() if len(set(parts)) > 1}
    assert not wrong
    assert not _FUSED.keys() - said_and_done.keys()
