"""What the library does by default to every architecture of the installed transformers, and how fused layers lie.

Where a model comes from says `every_architecture`. A few of each kind are tried always, all of them with `-m slow`:
`pytest -m slow tests/test_every_architecture.py`. What a new version of transformers broke is listed by the failure.
"""

import functools
import inspect

import every_architecture as every
import pytest
import torch
from torch import nn

import loralib as lora
from loralib.architectures import _FUSED, default_modules_to_save, find_query_and_value, fused_layout
from loralib.layers import is_conv1d

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
    "ibert": "query is a QuantLinear, which LoRA cannot adapt",  # it quantises weights while it trains
    "mra": "no effect",  # without its CUDA kernel its attention gives zeros
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


def numbers(kind, name):
    """What is wrong with the default adapters of a model with weights; "" if nothing is, None if it does not run."""
    model = every.with_weights(kind, name)
    with torch.no_grad():
        ran = model and every.taken(model)
    if ran is None:
        return None
    given, wanted = ran
    try:
        names = lora.inject_lora(model, r=2)
    except (TypeError, ValueError) as error:
        return "" if kind in WITHOUT and "no default target_modules" in str(error) else str(error)
    called = set()
    for target in names:
        model.get_submodule(target).register_forward_hook(lambda *_, target=target: called.add(target))
        nn.init.normal_(model.get_submodule(target).lora_B, std=0.1)
    outputs = every.run(lora.unmerge_lora_weights(model), given)
    if not any(far(a, b) > 1e-6 for a, b in zip(outputs, wanted, strict=True)):
        return "no effect"
    sum((tensor * torch.randn_like(tensor)).sum() for tensor in outputs if tensor.requires_grad).backward()
    deaf = [target for target in names if target in called and model.get_submodule(target).lora_B.grad is None]
    if deaf:
        return f"no gradient: {deaf}"
    with torch.no_grad():
        merged = every.run(lora.merge_lora_weights(model), given)
        if any(far(a, b) > 1e-3 for a, b in zip(merged, outputs, strict=True)):
            return "merged and unmerged differ"
        if any(far(a, b) > 1e-6 for a, b in zip(every.run(lora.unload(model), given), wanted, strict=True)):
            return "unloaded, it is not the base"
    return ""


def far(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() if a.numel() else 0.0


FAST = ["squeezebert", "zaya", "jetmoe", "deepseek_v3", "xlnet", "whisper", "siglip", "hgnet_v2", "xlm", "ctrl"]


@pytest.mark.parametrize("kind", FAST)
def test_some_architectures(kind):
    """A convolution, halves of a value, experts for queries, latent attention, bare Parameters, two towers, ..."""
    for _, name in dict((task, name) for task, each, name in every.architectures() if each == kind).items():
        assert structure(kind, name) == ""
        assert not numbers(kind, name)


@pytest.mark.slow
@pytest.mark.parametrize("check", [structure, numbers])
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
    assert passed > 400


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
    """(owner's class, name of the layer, what its layout says, what its parts do) for each fused layer of a model."""
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
                yield found, key, layout.parts, parts_by_effect(attend, owner, layer, layout)
                known = {*known, (found, key)}
                break
            except Exception:
                continue


@pytest.mark.parametrize("kind", ["gpt2", "codegen", "deepseek_v3", "qwen3_next", "jetmoe", "deberta"])
def test_some_fused_layouts(kind):
    """Blocks, turns of four with the value before the key, latent attention, a gate, keys and values only."""
    name = next(name for _, each, name in every.architectures() if each == kind)
    layers = list(fused_layers(kind, name))
    assert layers and all(said == done for _, _, said, done in layers), layers


@pytest.mark.slow
def test_every_fused_layout():
    """A layout that nothing here tries would be a guess."""
    said_and_done = {}
    for _, kind, name in every.architectures():
        for found, key, said, done in fused_layers(kind, name, said_and_done.keys()):
            said_and_done[found, key] = said, done
    wrong = {layer: parts for layer, parts in said_and_done.items() if parts[0] != parts[1]}
    assert not wrong
    assert not _FUSED.keys() - said_and_done.keys()
