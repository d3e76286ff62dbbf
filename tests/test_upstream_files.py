"""Files of upstream: what `torch.save(loralib.lora_state_dict(model))` wrote, read without running anything in them.

The files are built by name and shape as FORMATS describes them; the oracle is the dense formula. Run alone:
`pytest tests/test_upstream_files.py`.
"""

import os

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, BERT, HEADS, LAYERS, SHORT, H, attention
from torch import nn

import loralib as lora

GPT2 = ARCHITECTURES["GPT-2"]


def roberta():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**BERT, num_labels=3)
    return transformers.RobertaForSequenceClassification(config).double().eval()


def official(r=2, h=H):
    """The layout of roberta_base_lora_mnli.bin, at the size of the tiny model."""
    torch.manual_seed(1)
    tensors = {}
    for layer in range(LAYERS):
        for name in ("query", "value"):
            path = f"roberta.encoder.layer.{layer}.attention.self.{name}"
            tensors[f"{path}.lora_A"] = torch.randn(r, h)
            tensors[f"{path}.lora_B"] = torch.randn(h, r)
    tensors |= {"classifier.dense.weight": torch.randn(h, h), "classifier.dense.bias": torch.randn(h)}
    tensors |= {"classifier.out_proj.weight": torch.randn(3, h), "classifier.out_proj.bias": torch.randn(3)}
    return tensors


def merged_by_hand(model, tensors, scaling):
    """The base with W + scaling * B A written into it."""
    for name, tensor in tensors.items():
        if name.endswith(".lora_A"):
            path = name.removesuffix(".lora_A")
            model.get_submodule(path).weight.data += scaling * (tensors[path + ".lora_B"].double() @ tensor.double())
        elif not name.endswith(".lora_B"):
            model.get_parameter(name).data.copy_(tensor)
    return model


def logits(model):
    with torch.no_grad():
        return model(**attention()).logits


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_official_roberta_layout(tmp_path, suffix):
    """Ranks from the shapes, alpha from the caller, the classifier from the file; the base keeps its own."""
    path = tmp_path / f"roberta{suffix}"
    torch.save(official(), path)
    model = roberta()
    names = lora.load_lora(model, path, lora_alpha=16)
    assert len(names) == 2 * LAYERS and {model.get_submodule(name).scaling for name in names} == {8.0}
    torch.testing.assert_close(logits(model), logits(merged_by_hand(roberta(), official(), 8.0)), rtol=1e-9, atol=1e-9)
    assert lora.lora_state_dict(model).keys() == official().keys()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == official().keys()
    assert torch.equal(logits(lora.unload(model)), logits(roberta()))


def test_official_size():
    """At the size of roberta-base the layout has the 52 tensors and 887,811 parameters of the published file."""
    tensors = official(r=8, h=768)
    adapters = sum(t.numel() for name, t in tensors.items() if "lora_" in name) // LAYERS * 12
    assert (len(tensors) - 4) // LAYERS * 12 + 4 == 52
    assert adapters + sum(t.numel() for name, t in tensors.items() if "lora_" not in name) == 887_811


def test_alpha_has_to_be_given(tmp_path):
    path = tmp_path / "roberta.bin"
    torch.save(official(), path)
    model = roberta()
    with pytest.raises(ValueError, match="carries no lora_alpha, .* pass lora_alpha=.*16 for the official RoBERTa"):
        lora.load_lora(model, path)
    lora.load_lora(model, path, lora_alpha=16)
    lora.save_lora(model, tmp_path / "ours.safetensors")
    with pytest.raises(ValueError, match="lora_alpha=16: .*ours.safetensors carries its own"):
        lora.load_lora(roberta(), tmp_path / "ours.safetensors", lora_alpha=16)


@pytest.mark.parametrize("name, scaling", [("mrpc", 4.0), ("mnli", 8.0)])
def test_several_official_files_on_one_base(tmp_path, name, scaling):
    """Each with its head; in a model that a native adapter with the same head was loaded into."""
    path = tmp_path / "task.bin"
    torch.save(official(), path)
    model = roberta()
    lora.inject_lora(model, r=4, adapter_name="own")
    lora.load_lora(model, path, adapter_name=name, lora_alpha=2 * scaling)
    lora.set_adapter(model, "own")
    torch.testing.assert_close(logits(model), logits(roberta()))
    lora.set_adapter(model, name)
    wanted = logits(merged_by_hand(roberta(), official(), scaling))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-9, atol=1e-9)


def gpt2_file(enable_lora, path, wrap=lambda tensors: tensors):
    """A file of upstream's NLG scripts, from layers made by hand as they make them; and the adapted model's output."""
    model = GPT2.build()
    lora.inject_lora(model, r=2, lora_alpha=4, enable_lora=enable_lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    torch.save(wrap(lora.lora_state_dict(model)), path)
    return GPT2.output(model)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: {"model_state_dict": tensors},
        lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
    ],
    ids=["bare", "in model_state_dict", "from DistributedDataParallel"],
)
def test_gpt2_files(tmp_path, wrap):
    """MergedLinear of q and v, as the E2E recipe has it, in the three forms it is found in."""
    wanted = gpt2_file([True, False, True], tmp_path / "a.pt", wrap)
    model = GPT2.build()
    lora.load_lora(model, tmp_path / "a.pt", lora_alpha=4)
    assert model.transformer.h[0].attn.c_attn.enable_lora == [True, False, True]
    torch.testing.assert_close(GPT2.output(model), wanted)


def test_groups_that_the_shapes_leave_open(tmp_path):
    """All three need no word; one or another two do; a model with layers of its own has said it already."""
    wanted = gpt2_file([True, True, True], tmp_path / "a.pt")
    model = GPT2.build()
    lora.load_lora(model, tmp_path / "a.pt", lora_alpha=4)
    torch.testing.assert_close(GPT2.output(model), wanted)

    wanted = gpt2_file([False, True, True], tmp_path / "b.pt")
    lora.load_lora(GPT2.build(), tmp_path / "b.pt", lora_alpha=4)  # taken for q and v, which is documented
    model = GPT2.build()
    lora.load_lora(model, tmp_path / "b.pt", lora_alpha=4, enable_lora=[False, True, True])
    torch.testing.assert_close(GPT2.output(model), wanted)
    model = GPT2.build()
    lora.inject_lora(model, r=2, lora_alpha=1, enable_lora=[False, True, True])
    lora.load_lora(model, tmp_path / "b.pt", lora_alpha=4)
    torch.testing.assert_close(GPT2.output(model), wanted)

    gpt2_file([False, False, True], tmp_path / "c.pt")
    with pytest.raises(
        ValueError, match="adapts 1 of 3 groups, 16 of 48 rows, .* pass enable_lora, one entry for each"
    ):
        lora.load_lora(GPT2.build(), tmp_path / "c.pt", lora_alpha=4)
    model = GPT2.build()
    lora.load_lora(model, tmp_path / "c.pt", lora_alpha=4, enable_lora=[False, False, True])
    assert model.transformer.h[0].attn.c_attn.enable_lora == [False, False, True]
    with pytest.raises(ValueError, match="adapts 2 of 3 groups, 32 of 48 rows, .*.True, False, False. does not fit"):
        lora.load_lora(GPT2.build(), tmp_path / "b.pt", lora_alpha=4, enable_lora=[True, False, False])


class Convs(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.conv = kind(4, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.norm(self.conv(self.embed(x).permute(0, 3, 1, 2))).mean((2, 3)))


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("newer", [False, True])
def test_convolutions_embeddings_and_biases(tmp_path, bias, newer):
    """Conv2d keeps its bias one level down (0.1.2), or under both names (main branch); ranks from all shapes."""
    torch.manual_seed(0)
    base = Convs(nn.Conv2d).eval()
    tensors = {
        "embed.lora_A": torch.randn(3, 10),
        "embed.lora_B": torch.randn(4, 3),
        "conv.lora_A": torch.randn(2 * 3, 4 * 3),
        "conv.lora_B": torch.randn(6 * 3, 2 * 3),
    }
    if bias != "none":
        tensors["conv.conv.bias"] = torch.randn(6)
    if bias == "all":
        tensors |= {"norm.bias": torch.randn(6), "head.bias": torch.randn(2)}
    if newer and bias != "none":
        tensors["conv.bias"] = tensors["conv.conv.bias"]
    torch.save(tensors, tmp_path / "a.pt")
    wanted = Convs(nn.Conv2d).eval()
    wanted.load_state_dict(base.state_dict())
    wanted.embed.weight.data += 6 / 3 * (tensors["embed.lora_B"] @ tensors["embed.lora_A"]).T
    wanted.conv.weight.data += 6 / 2 * (tensors["conv.lora_B"] @ tensors["conv.lora_A"]).view(6, 4, 3, 3)
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            wanted.get_parameter(name.replace("conv.conv", "conv")).data.copy_(tensor)
    x = torch.arange(32).reshape(2, 4, 4) % 10
    assert lora.load_lora(base, tmp_path / "a.pt", lora_alpha=6) == ["embed", "conv"]
    torch.testing.assert_close(base(x), wanted(x))
    assert (base.embed.r, base.conv.r) == (3, 2)


class Code:
    """What a malicious file would run on unpickling."""

    def __reduce__(self):
        return os.system, ("touch executed",)


MALICIOUS = {
    "code": lambda path: torch.save({"a.lora_A": Code()}, path),
    "code, legacy": lambda path: torch.save({"a.lora_A": Code()}, path, _use_new_zipfile_serialization=False),
    "a model": lambda path: torch.save(nn.Linear(2, 2), path),
    "truncated": lambda path: (torch.save(official(), path), path.write_bytes(path.read_bytes()[:-200])),
    "cut early": lambda path: (torch.save(official(), path), path.write_bytes(path.read_bytes()[:50])),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("lora"),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 8),
}
FOREIGN = {
    "a list": (lambda: [torch.ones(2)], "holds no dict of tensors: list"),
    "numbers": (lambda: {"a.lora_A": 1}, "holds no dict of tensors"),
    "no adapter": (lambda: {"a.weight": torch.ones(2, 2)}, "holds no adapter: no name in it ends with '.lora_A'"),
    "nothing": (dict, "holds no adapter"),
    "no B": (lambda: {"a.lora_A": torch.ones(2, 2)}, "a: lora_A and lora_B must both be there"),
    "one axis": (lambda: {"a.lora_A": torch.ones(2), "a.lora_B": torch.ones(2, 2)}, "with two axes"),
    "a whole model": (
        lambda: {**official(), "roberta.encoder.layer.0.attention.self.query.weight": torch.ones(H, H)},
        "query.weight differ; load the adapter into the base that it was trained on",
    ),
}


@pytest.mark.parametrize("write", MALICIOUS.values(), ids=MALICIOUS)
@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.safetensors", "peft/adapter_model.bin"])
def test_nothing_is_executed(tmp_path, monkeypatch, write, name):
    """Pickles with code, damaged and foreign files: a ValueError that names the file, and an untouched model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    write(tmp_path / name)
    model = roberta()
    before = {path: id(module) for path, module in model.named_modules()}
    path = tmp_path / "peft" if name.startswith("peft") else tmp_path / name
    alpha = None if name.startswith("peft") or name.endswith("safetensors") else 16
    with pytest.raises(ValueError, match="cannot be read as a dict of tensors, and nothing in it|no whole safetensors"):
        lora.load_lora(model, path, lora_alpha=alpha)
    assert not (tmp_path / "executed").exists()
    assert {path: id(module) for path, module in model.named_modules()} == before


def test_the_malicious_file_is_one(tmp_path, monkeypatch):
    """Read with pickle, it runs: the test above would see it."""
    monkeypatch.chdir(tmp_path)
    MALICIOUS["code"](tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("content, message", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files(tmp_path, content, message):
    torch.save(content(), tmp_path / "a.bin")
    with pytest.raises(ValueError, match=message):
        lora.load_lora(roberta(), tmp_path / "a.bin", lora_alpha=16)


def test_every_misfit_in_one_error(tmp_path):
    """A layer that does not exist, a shape of another model, a head of other classes, half a head."""
    tensors = official()
    tensors["roberta.encoder.layer.7.attention.self.query.lora_A"] = torch.ones(2, H)
    tensors["roberta.encoder.layer.7.attention.self.query.lora_B"] = torch.ones(H, 2)
    tensors["roberta.encoder.layer.0.attention.self.value.lora_B"] = torch.ones(H + 1, 2)
    tensors["classifier.out_proj.weight"] = torch.ones(2, H)
    del tensors["classifier.dense.bias"]
    torch.save(tensors, tmp_path / "a.bin")
    model = roberta()
    with pytest.raises(ValueError, match="nothing was loaded") as caught:
        lora.load_lora(model, tmp_path / "a.bin", lora_alpha=16)
    for part in (
        "layer.7.attention.self.query: the model has no such layer",
        "layer.7.attention.self.query.lora_A: unexpected in the file",
        "layer.0.attention.self.value.lora_B: (17, 2) in the file, (16, 2) in the model",
        "classifier.out_proj.weight: (2, 16) in the file, (3, 16) in the model",
        "classifier.dense.bias: missing in the file",
    ):
        assert part in str(caught.value)
    assert not any(isinstance(module, lora.LoRALayer) for module in model.modules())


def test_every_unreadable_layer_in_one_error(tmp_path):
    """What cannot be told from the shapes, half a layer and rank 0, which would divide by zero."""
    gpt2_file([False, False, True], tmp_path / "a.pt")
    tensors = torch.load(tmp_path / "a.pt", weights_only=True)
    tensors["alone.lora_A"] = torch.ones(2, 4)
    tensors["none.lora_A"], tensors["none.lora_B"] = torch.ones(0, 4), torch.ones(4, 0)
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt cannot be read for this model:") as caught:
        lora.load_lora(GPT2.build(), tmp_path / "a.pt", lora_alpha=4)
    for part in (
        "transformer.h.0.attn.c_attn: the file adapts 1 of 3 groups",
        "transformer.h.1.attn.c_attn: the file adapts 1 of 3 groups",
        "alone: lora_A and lora_B must both be there, with two axes and a rank",
        "none: lora_A and lora_B must both be there, with two axes and a rank",
    ):
        assert part in str(caught.value)


def test_cross_attention_of_gpt2(tmp_path):
    """Two groups, k and v: q and v by default means v there, of which the shapes say nothing; told, it loads."""
    config = transformers.GPT2Config(**{**SHORT, "n_head": HEADS}, add_cross_attention=True)
    model = transformers.GPT2LMHeadModel(config)
    lora.inject_lora(model, r=2)
    torch.save(lora.lora_state_dict(model), tmp_path / "a.pt")
    plain = transformers.GPT2LMHeadModel(config)
    lora.load_lora(plain, tmp_path / "a.pt", lora_alpha=16)
    assert plain.transformer.h[0].crossattention.c_attn.enable_lora == [False, True]
