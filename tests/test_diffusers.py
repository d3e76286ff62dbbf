"""Files of diffusers and of kohya's scripts: the same update, with its alpha, here and there.

The slow test has real tiny models of diffusers as its oracle (`pip install diffusers`); the others a module tree with
the same names and the literal formula. Run alone: `pytest tests/test_diffusers.py -m "slow or not slow"`.
"""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import loralib as lora

FILE = "pytorch_lora_weights.safetensors"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_out = nn.Linear(6, 6), nn.Linear(6, 6), nn.ModuleList([nn.Linear(6, 6)])

    def forward(self, x):
        return self.to_out[0](self.to_q(x) * self.to_k(x))


class UNetTiny(nn.Module):
    """Names and kinds of layers as diffusers' U-Nets have them."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 6, 3, padding=1)
        self.mid_block = nn.ModuleDict({"attn1": Attention(), "proj_in": nn.Conv2d(6, 6, 1)})

    def forward(self, x):
        x = self.mid_block["proj_in"](self.conv_in(x))
        return self.mid_block["attn1"](x.flatten(2).transpose(1, 2))


class TransformerTiny(UNetTiny):
    pass


class CLIPTextModelTiny(UNetTiny):
    pass


class Other(UNetTiny):
    pass


X = torch.linspace(-1, 1, 2 * 3 * 4 * 4, dtype=torch.float64).reshape(2, 3, 4, 4)
TARGETS = ["conv_in", "proj_in", "to_q", "to_out.0"]
Q, OUT, PROJ, CONV = "mid_block.attn1.to_q", "mid_block.attn1.to_out.0", "mid_block.proj_in", "conv_in"


def build(kind=UNetTiny):
    torch.manual_seed(0)
    return kind().double()


def adapted(kind=UNetTiny, **options):
    model = build(kind)
    options = {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"conv_in": 1}, **options}
    lora.inject_lora(model, r=2, lora_alpha=5, target_modules=TARGETS, **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["folder", "file.safetensors", "new/file.safetensors"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["plain", "by the root"])
def test_round_trip(name, options, tmp_path):
    model = adapted(**options)
    lora.save_lora(model, tmp_path / name, format="diffusers")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [
        FILE if name == "folder" else "file.safetensors"
    ]
    loaded = build()
    assert set(lora.load_lora(loaded, tmp_path / name)) == {CONV, PROJ, Q, OUT}
    close(loaded(X), model(X))
    lora.load_lora(loaded, tmp_path / name)  # into the adapter that is there
    close(loaded(X), model(X))


@pytest.mark.parametrize(
    "kind, part",
    {UNetTiny: "unet.", TransformerTiny: "transformer.", CLIPTextModelTiny: "text_encoder.", Other: ""}.items(),
)
def test_names_and_alpha_as_diffusers_has_them(kind, part, tmp_path):
    """Each tensor, and each entry of PEFT's configuration in the metadata, under the name of the pipeline's part."""
    model = adapted(kind)
    lora.save_lora(model, tmp_path, format="diffusers")
    tensors = load_file(tmp_path / FILE)
    assert tensors.keys() == {f"{part}{name}.lora_{half}.weight" for name in (CONV, PROJ, Q, OUT) for half in "AB"}
    assert tensors[f"{part}{CONV}.lora_A.weight"].shape[1:] == (3, 3, 3)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert all(key.startswith(part) for key in config)
    assert (config[part + "r"], config[part + "lora_alpha"]) == (2, 5)
    assert config[part + "rank_pattern"][Q] == 3
    loaded = build(kind)
    lora.load_lora(loaded, tmp_path)
    close(loaded(X), model(X))


def test_same_bytes_every_time(tmp_path):
    for name in "ab":
        lora.save_lora(adapted(), tmp_path / name, format="diffusers")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


def test_heads_have_no_place(tmp_path):
    model = adapted(modules_to_save=["to_k"])
    with pytest.raises(ValueError, match=r"A and B of .* alone; mid_block.attn1.to_k.\w+, .* would be lost. Save with"):
        lora.save_lora(model, tmp_path / "a", format="diffusers")
    assert not list(tmp_path.iterdir())


def halves(r=2):
    """A and B for three layers, in PEFT's layout, and the base with W + scaling B A written into it."""
    torch.manual_seed(1)
    shapes = {Q: ((r, 6), (6, r)), OUT: ((r, 6), (6, r)), PROJ: ((r, 6, 1, 1), (6, r, 1, 1))}
    return {name: tuple(torch.randn(shape) for shape in pair) for name, pair in shapes.items()}


def by_formula(factors, scalings):
    model = build()
    for name, (A, B) in factors.items():
        weight = model.get_submodule(name).weight
        weight.data += scalings[name] * (B.flatten(1).double() @ A.flatten(1).double()).view(weight.shape)
    return model(X)


ALPHAS = {
    "one alpha": [3.0, 3.0, 3.0],
    "each its own": [1.0, 4.0, 0.5],
    "some without": [1.0, None, None],
    "none": [None] * 3,
}
WRITTEN = {
    "kohya": lambda name, half: f"lora_unet_{name.replace('.', '_')}.lora_{('down', 'up')[half]}.weight",
    "diffusers": lambda name, half: f"unet.{name}.lora_{'AB'[half]}.weight",
    "one model": lambda name, half: f"{name}.lora_{'AB'[half]}.weight",
    "2023": lambda name, half: f"unet.{name}.lora.{('down', 'up')[half]}.weight",
    "2023, processors": lambda name, half: (
        f"unet.{name.replace('.to_', '.processor.to_').removesuffix('.0')}_lora.{('down', 'up')[half]}.weight"
        if ".to_" in name
        else f"unet.{name}.lora.{('down', 'up')[half]}.weight"
    ),
}  # fmt: skip


@pytest.mark.parametrize("alphas", ALPHAS.values(), ids=ALPHAS)
@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_files_of_others(written, alphas, tmp_path):
    """W + (alpha / r) B A, and W + B A where there is no alpha."""
    factors, tensors = halves(), {}
    for (name, pair), alpha in zip(factors.items(), alphas, strict=True):
        tensors |= {written(name, half): tensor for half, tensor in enumerate(pair)}
        if alpha is not None:
            tensors[
                written(name, 0).partition(".lora_down")[0].partition(".lora")[0].partition("_lora.")[0] + ".alpha"
            ] = torch.tensor(alpha)
    save_file(tensors, tmp_path / FILE)
    for place in (tmp_path, tmp_path / FILE):
        model = build()
        assert set(lora.load_lora(model, place)) == set(factors)
        scalings = {name: 1.0 if alpha is None else alpha / 2 for name, alpha in zip(factors, alphas, strict=True)}
        close(model(X), by_formula(factors, scalings))


def test_a_projection_is_a_linear_layer_or_a_convolution(tmp_path):
    """kohya's files have of either the form that the model had which they were trained on."""
    factors = halves()
    swapped = {
        name: tuple(t.flatten(1) if t.dim() == 4 else t[:, :, None, None] for t in pair)
        for name, pair in factors.items()
    }
    tensors = {
        WRITTEN["kohya"](name, half): tensor for name, pair in swapped.items() for half, tensor in enumerate(pair)
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    model = build()
    lora.load_lora(model, tmp_path / "a.safetensors")
    close(model(X), by_formula(factors, dict.fromkeys(factors, 1.0)))


@pytest.mark.parametrize("start", ["unet.", "text_encoder.", "lora_te_"])
def test_each_model_takes_its_part(start, tmp_path):
    """A file with parts for several models of a pipeline gives each what is for it."""
    factors = halves()
    ours = {WRITTEN["diffusers"](name, half): t for name, pair in factors.items() for half, t in enumerate(pair)}
    if start == "lora_te_":
        ours = {WRITTEN["kohya"](name, half): t for name, pair in factors.items() for half, t in enumerate(pair)}
        ours = {name.replace("lora_unet_", start): tensor for name, tensor in ours.items()}
    ours = {name.replace("unet.", start): tensor for name, tensor in ours.items()}
    other = "unet." if start != "unet." else "text_encoder."
    theirs = {
        f"{other}elsewhere.q.lora_A.weight": torch.ones(1, 4),
        f"{other}elsewhere.q.lora_B.weight": torch.ones(4, 1),
    }
    save_file({**ours, **theirs}, tmp_path / FILE)
    model = build()
    lora.load_lora(model, tmp_path)
    close(model(X), by_formula(factors, dict.fromkeys(factors, 1.0)))


def kohya_of(factors, start="lora_unet_"):
    return {
        WRITTEN["kohya"](n, half).replace("lora_unet_", start): t.clone()
        for n, pair in factors.items()
        for half, t in enumerate(pair)
    }


Q_KOHYA = WRITTEN["kohya"](Q, 0).partition(".")[0]
NOWHERE = {"lora_unet_none.lora_down.weight": torch.ones(1, 6), "lora_unet_none.lora_up.weight": torch.ones(6, 1)}
HALF = {"lora_unet_conv_in.lora_down.weight": torch.ones(1, 3, 3, 3)}
REFUSED = {
    "a layer that is not there": (NOWHERE, "none: the model has no such layer"),
    "half a layer": (HALF, "conv_in has an alpha or one of A and B"),
    "the other half": ({"lora_unet_conv_in.lora_up.weight": torch.ones(6, 1)}, "conv_in has an alpha or one of A"),
    "an alpha alone": ({"lora_unet_conv_in.alpha": torch.tensor(1.0)}, "conv_in has an alpha or one of A and B"),
    "DoRA": ({"lora_unet_conv_in.dora_scale": torch.ones(1)}, "conv_in.dora_scale: neither A, B nor alpha of a plain"),
    "LoHa": ({"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, "hada_w1_a: neither A, B nor alpha of a plain LoRA layer"),
    "an odd alpha": ({f"{Q_KOHYA}.alpha": torch.ones(2)}, r"alpha of a layer must be one number, .* shape \(2,\)"),
    "no finite alpha": ({f"{Q_KOHYA}.alpha": torch.tensor(float("nan"))}, "lora_alpha=nan"),
    "no tensor of a layer": ({f"{Q_KOHYA}.lora_down.weight": torch.tensor(1.0)}, "make no product of low rank"),
}  # fmt: skip


@pytest.mark.parametrize("tensors, message", REFUSED.values(), ids=REFUSED)
def test_refused_and_nothing_changed(tensors, message, tmp_path):
    save_file({**kohya_of(halves()), **tensors}, tmp_path / FILE)
    model = build()
    with pytest.raises(ValueError, match=message):
        lora.load_lora(model, tmp_path)
    assert not lora.list_adapters(model) and type(model.conv_in) is nn.Conv2d


@pytest.mark.parametrize("text", ["{", "[1]", '{"unet.r": "2"}', '{"unet.r": 2, "unet.use_dora": true}'])
def test_damaged_metadata_are_refused(text, tmp_path):
    tensors = {WRITTEN["diffusers"](n, half): t for n, pair in halves().items() for half, t in enumerate(pair)}
    save_file(tensors, tmp_path / FILE, metadata={"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match="no configuration|r='2': the rank|use_dora set"):
        lora.load_lora(build(), tmp_path)


def test_which_part_is_meant_has_to_be_clear(tmp_path):
    factors = halves()
    save_file({**kohya_of(factors, "lora_te_"), **kohya_of(factors, "lora_te2_")}, tmp_path / FILE)
    with pytest.raises(ValueError, match="adapters of 'text_encoder', 'text_encoder_2', each of which fits UNetTiny"):
        lora.load_lora(build(), tmp_path)
    other = {"elsewhere.q": (torch.ones(1, 4), torch.ones(4, 1))}
    save_file({**kohya_of(other, "lora_te_"), **kohya_of(other, "lora_te2_")}, tmp_path / FILE)
    with pytest.raises(ValueError, match="none of which fits UNetTiny"):
        lora.load_lora(build(), tmp_path)


ORIGINAL = {
    "conv_in": "input_blocks_0_0",
    "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
    "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "up_blocks.0.resnets.2.conv_shortcut": "output_blocks_2_0_skip_connection",
    "up_blocks.0.attentions.2.proj_in": "output_blocks_2_1_proj_in",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_1_conv",
    "add_embedding.linear_2": "label_emb_0_2",
}


def tree(names):
    """A module tree with a layer of each name, of two residual blocks a block."""
    root = nn.Module()
    for name in [*names, "down_blocks.0.resnets.0.conv1"]:
        parent, *path = root, *name.split(".")
        for part in path[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(path[-1], nn.Linear(2, 2))
    return root


def test_names_of_the_original_unet(tmp_path):
    """kohya's files for SDXL have them."""
    tensors = {
        f"lora_unet_{name}.lora_{half}.weight": torch.full(shape, float(i))
        for i, name in enumerate(ORIGINAL.values())
        for half, shape in (("down", (1, 2)), ("up", (2, 1)))
    }
    save_file(tensors, tmp_path / "a.safetensors")
    model = tree(ORIGINAL)
    assert set(lora.load_lora(model, tmp_path / "a.safetensors")) == set(ORIGINAL)
    for i, name in enumerate(ORIGINAL):
        assert (model.get_submodule(name).delta_weight() == i * i).all(), name


def test_two_names_that_are_one_with_underscores(tmp_path):
    """Which layer is meant cannot be told, and none is taken."""
    save_file(
        {f"lora_unet_a_b_c.lora_{half}.weight": torch.ones(2, 2) for half in ("down", "up")}, tmp_path / "a.safetensors"
    )
    with pytest.raises(ValueError, match="a_b_c: the model has no such layer"):
        lora.load_lora(tree(["a_b.c", "a.b_c"]), tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
@pytest.mark.parametrize("start", ["lora_te1_text_model_", "text_encoder.text_model."])
def test_text_encoders_with_and_without_the_text_model_around_them(start, kind, tmp_path):
    """transformers 5 has left it out of one of the classes, and the files have it."""
    transformers = pytest.importorskip("transformers")
    config = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.CLIPTextConfig(**config, num_attention_heads=2, bos_token_id=1, eos_token_id=2)
    model = getattr(transformers, kind)(config)
    layer = "encoder.layers.0.self_attn.q_proj"
    layer, halves = (layer.replace(".", "_"), ("down", "up")) if "te1" in start else (layer, "AB")
    save_file({f"{start}{layer}.lora_{half}.weight": torch.ones(8, 8) for half in halves}, tmp_path / "a.safetensors")
    (name,) = lora.load_lora(model, tmp_path / "a.safetensors")
    assert name.removeprefix("text_model.") == "encoder.layers.0.self_attn.q_proj"


def unet():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        **{"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1},
        **{"cross_attention_dim": 8, "attention_head_dim": 4},
        **{"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
        **{"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    ).eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_with_diffusers_itself(tmp_path):
    """Its model reads our file and we read what it and its pipelines write, its own conversion for kohya included."""
    base = unet()
    import diffusers
    from diffusers.utils import convert_state_dict_to_kohya
    from peft.utils import get_peft_model_state_dict

    def output(model):
        torch.manual_seed(2)
        with torch.no_grad():
            return model(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 8)).sample

    def loaded(path):
        model = copy.deepcopy(base)
        lora.load_lora(model, path)
        return output(model)

    def same(ours, theirs):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    targets = ["to_q", "to_v", "to_out.0", "proj_in", "conv1"]
    patterns = {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"conv1": 1}}
    for options in ({}, patterns):
        ours = copy.deepcopy(base)
        lora.inject_lora(ours, r=2, lora_alpha=5, target_modules=targets[: 5 if options else 4], **options)
        for parameter in ours.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        wanted = output(ours)
        assert (wanted - output(base)).abs().max() > 0.1
        lora.save_lora(ours, tmp_path / "ours", format="diffusers")
        same(loaded(tmp_path / "ours"), wanted)
        theirs = copy.deepcopy(base)
        theirs.load_lora_adapter(tmp_path / "ours" / FILE, prefix="unet", use_safetensors=True, adapter_name="a")
        same(output(theirs), wanted)
        theirs.save_lora_adapter(tmp_path / "theirs", adapter_name="a")
        same(loaded(tmp_path / "theirs"), wanted)
        layers = get_peft_model_state_dict(theirs, adapter_name="a")
        config = theirs.peft_config["a"].to_dict()
        pipeline = diffusers.StableDiffusionPipeline
        pipeline.save_lora_weights(tmp_path / "pipeline", unet_lora_layers=layers, unet_lora_adapter_metadata=config)
        same(loaded(tmp_path / "pipeline"), wanted)
        state, _, metadata = pipeline.lora_state_dict(tmp_path / "ours", return_lora_metadata=True)
        theirs = copy.deepcopy(base)
        pipeline.load_lora_into_unet(state, None, theirs, metadata=metadata)
        same(output(theirs), wanted)
    # Their reading of kohya's files loses alphas that differ from layer to layer.
    kohya = convert_state_dict_to_kohya(load_file(tmp_path / "ours" / FILE))
    kohya = {name: torch.tensor(1.5) if name.endswith(".alpha") else tensor for name, tensor in kohya.items()}
    save_file({name: tensor.contiguous() for name, tensor in kohya.items()}, tmp_path / "kohya.safetensors")
    state, alphas = pipeline.lora_state_dict(tmp_path / "kohya.safetensors", unet_config=base.config)
    theirs = copy.deepcopy(base)
    pipeline.load_lora_into_unet(state, alphas, theirs)
    same(loaded(tmp_path / "kohya.safetensors"), output(theirs))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_names_of_sdxl_as_diffusers_converts_them(tmp_path):
    """Each linear layer and convolution of its U-Net, under the original names: the same as in its pipeline."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    from loralib.diffusers_format import _original

    torch.manual_seed(0)
    base = diffusers.UNet2DConditionModel(
        **{"sample_size": 8, "block_out_channels": (8, 16, 16), "norm_num_groups": 4, "layers_per_block": 2},
        **{"cross_attention_dim": 8, "attention_head_dim": 4, "transformer_layers_per_block": (1, 2, 2)},
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        **{"addition_embed_type": "text_time", "addition_time_embed_dim": 4},
        projection_class_embeddings_input_dim=32,
    ).eval()
    modules, tensors = dict(base.named_modules()), {}
    for name, module in modules.items():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            o, *rest = module.weight.shape
            there = "lora_unet_" + _original(name, modules).replace(".", "_")
            tensors[f"{there}.lora_down.weight"] = 0.2 * torch.randn(2, *rest)
            tensors[f"{there}.lora_up.weight"] = 0.2 * torch.randn(o, 2, *([1] * len(rest[1:])))
            tensors[f"{there}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "a.safetensors")
    pipeline, theirs, ours = diffusers.StableDiffusionXLPipeline, copy.deepcopy(base), copy.deepcopy(base)
    state, alphas = pipeline.lora_state_dict(tmp_path / "a.safetensors", unet_config=base.config)
    pipeline.load_lora_into_unet(state, alphas, theirs)
    assert len(lora.load_lora(ours, tmp_path / "a.safetensors")) == len(tensors) // 3

    def output(model):
        torch.manual_seed(2)
        added = {"text_embeds": torch.randn(1, 8), "time_ids": torch.arange(6.0)[None]}
        with torch.no_grad():
            return model(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 8), added_cond_kwargs=added).sample

    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-4, atol=1e-5)
    assert (output(ours) - output(base)).abs().max() > 0.1
