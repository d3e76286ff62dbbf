"""Exchange with PEFT: what one library writes, the other computes alike, for every architecture and kind of layer.

The oracle is the real `peft`: `PeftModel.from_pretrained` on our folders, `save_pretrained` for ours to read.
Run alone: `pytest tests/test_peft.py`.
"""

import copy
import json
import tempfile
from pathlib import Path

import peft
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, BERT, DISTILBERT, T5, TEXT
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import loralib as lora

pytestmark = [
    # What PEFT calls in transformers, and what it says of Conv1D and of adapters on tied weights.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    # What save_lora says of patterns, which tests/test_exchange.py looks at.
    pytest.mark.filterwarnings("ignore:ranks or alphas differ:UserWarning"),
]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
each = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def randomize(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def close(ours, theirs, dtype):
    scale = max(1.0, theirs.abs().max().item())
    assert (ours - theirs).abs().max().item() <= TOLERANCE[dtype] * scale


def theirs_from(base, folder):
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=False).eval()


@each
@each_dtype
def test_ours_in_peft_and_back(architecture, dtype, tmp_path):
    """save_lora(format="peft") -> PeftModel.from_pretrained -> save_pretrained -> load_lora, logits equal each time."""
    base = architecture.build(dtype)
    model = copy.deepcopy(base)
    names = lora.inject_lora(model, r=2, lora_alpha=3, lora_dropout=0.1)
    randomize(model)
    wanted = architecture.output(model)
    assert (wanted - architecture.output(base)).abs().max() > 1e-3
    lora.save_lora(model, tmp_path / "ours", format="peft")
    theirs = theirs_from(base, tmp_path / "ours")
    close(wanted, architecture.output(theirs), dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        loaded = copy.deepcopy(base)
        assert lora.load_lora(loaded, tmp_path / folder) == names
        close(architecture.output(loaded), wanted, dtype)
        for name in names:
            ours, back = model.get_submodule(name), loaded.get_submodule(name)
            assert repr(back) == repr(ours) and torch.equal(back.lora_A, ours.lora_A)


@each
@each_dtype
def test_theirs_here(architecture, dtype, tmp_path):
    """A model adapted by PEFT, fused projections whole, with its ranks and alphas, computes the same here."""
    base = architecture.build(dtype)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=architecture.targets, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval()
    wanted = architecture.output(randomize(theirs))
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    names = lora.load_lora(ours, tmp_path)
    close(architecture.output(ours), wanted, dtype)
    assert len(names) == architecture.adapted
    assert not any(hasattr(ours.get_submodule(name), "enable_lora") for name in names)
    assert lora.count_parameters(ours).trainable == theirs.get_nb_trainable_parameters()[0]


OPTIONS = {
    "rank_pattern": {"rank_pattern": {"0.*query": 3, "value": 1}},
    "alpha_pattern": {"alpha_pattern": {"layer.1.attention.self.value": 5, "query": 7.5}},
    "both": {"rank_pattern": {"query": 3}, "alpha_pattern": {"value": 1}},
    "rslora": {"use_rslora": True},
    "rslora and ranks": {"use_rslora": True, "rank_pattern": {"query": 3}, "alpha_pattern": {"value": 5}},
    "all-linear": {"target_modules": "all-linear"},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["dense", "key"]},
    "exclude by expression": {"target_modules": ["query", "key"], "exclude_modules": r".*layer\.0.*"},
    "expression": {"target_modules": r".*\.layer\.1\..*(query|dense)"},
    "embeddings": {"target_modules": ["word_embeddings", "query"]},
    "all biases": {"bias": "all"},
    "biases of the adapted": {"bias": "lora_only"},
    "whole modules": {"modules_to_save": ["embeddings.LayerNorm", "0.output.dense"]},
}  # fmt: skip
PLAIN = {"r": 2, "lora_alpha": 3, "target_modules": ["query", "value"]}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_dtype
def test_options_mean_the_same(options, dtype, tmp_path):
    """The same arguments train the same tensors in both, and the files exchange both ways."""
    options = {**PLAIN, **options}
    architecture = ARCHITECTURES["BERT"]
    base = architecture.build(dtype)
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    names = lora.inject_lora(ours, **options)
    config = peft.LoraConfig(**options, init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, config, autocast_adapter_dtype=False).eval()
    assert set(names) == set(theirs.base_model.targeted_module_names)
    assert lora.count_parameters(ours).trainable == theirs.get_nb_trainable_parameters()[0]
    for name in names:
        layer, module = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        assert (layer.r, layer.scaling) == (module.r["default"], module.scaling["default"])

    lora.save_lora(randomize(ours), tmp_path / "ours", format="peft")
    wanted = architecture.output(ours)
    close(wanted, architecture.output(theirs_from(base, tmp_path / "ours")), dtype)
    randomize(theirs).save_pretrained(tmp_path / "theirs")
    for folder, output in (("theirs", architecture.output(theirs)), ("ours", wanted)):
        loaded = copy.deepcopy(base)
        assert set(lora.load_lora(loaded, tmp_path / folder)) == set(names)
        close(architecture.output(loaded), output, dtype)


CLASSIFIERS = {
    "RobertaForSequenceClassification": ("RobertaConfig", BERT, "SEQ_CLS"),
    "BertForTokenClassification": ("BertConfig", BERT, "TOKEN_CLS"),
    "DistilBertForSequenceClassification": ("DistilBertConfig", DISTILBERT, "SEQ_CLS"),
    "DebertaV2ForSequenceClassification": ("DebertaV2Config", BERT, "SEQ_CLS"),
    "LlamaForSequenceClassification": ("LlamaConfig", BERT, "SEQ_CLS"),
    "T5ForSequenceClassification": ("T5Config", T5, "SEQ_CLS"),
    "BertForQuestionAnswering": ("BertConfig", BERT, "QUESTION_ANS"),
}  # fmt: skip


@pytest.mark.parametrize("name, config, options, task", [(n, *row) for n, row in CLASSIFIERS.items()], ids=CLASSIFIERS)
def test_heads_travel(name, config, options, task, tmp_path):
    """The default head goes to PEFT and comes back; and PEFT's own, with its list of heads, comes here."""
    torch.manual_seed(0)
    base = getattr(transformers, name)(getattr(transformers, config)(**options)).double().eval()

    def output(model):
        tokens = torch.arange(10).reshape(2, 5) + 3
        tokens[:, -1] = TEXT["eos_token_id"]  # where T5 reads the class
        with torch.no_grad():
            return model(input_ids=tokens, attention_mask=torch.ones_like(tokens))[0]

    ours = copy.deepcopy(base)
    names = lora.inject_lora(ours, r=2)
    wanted = output(randomize(ours))
    lora.save_lora(ours, tmp_path / "ours", format="peft")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["task_type"] == task
    theirs = theirs_from(base, tmp_path / "ours")
    close(wanted, output(theirs), torch.float64)
    theirs.save_pretrained(tmp_path / "theirs")
    heads = ["classification_head"] if name.startswith("T5") else None
    targets = sorted({name.rpartition(".")[2] for name in names})
    config = peft.LoraConfig(task_type=task, target_modules=targets, modules_to_save=heads)
    other = randomize(peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval())
    other.save_pretrained(tmp_path / "other")
    for folder, output_of in (("theirs", theirs), ("other", other)):
        loaded = copy.deepcopy(base)
        lora.load_lora(loaded, tmp_path / folder)
        close(output(loaded), output(output_of), torch.float64)


class Convs(nn.Module):
    """One convolution of each dimension, kernels square and not, and of size 1."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 5, (3, 2), stride=(2, 1))
        self.three = nn.Conv3d(5, 4, 2)
        self.point = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = self.one(x).unsqueeze(-1).expand(-1, -1, -1, 4)
        x = self.two(x).unsqueeze(-1).expand(-1, -1, -1, -1, 3)
        return self.point(self.three(x).flatten(3))


def test_convolutions_travel(tmp_path):
    """The layouts differ; ours goes to PEFT at a higher rank, theirs comes here, and back at their own rank."""
    torch.manual_seed(0)
    base, x = Convs().double().eval(), torch.randn(2, 4, 9, dtype=torch.float64)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["one", "two", "three", "point"])
    theirs = randomize(peft.get_peft_model(copy.deepcopy(base), config).eval())
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = copy.deepcopy(base)
    lora.load_lora(loaded, tmp_path / "theirs")
    close(loaded(x), theirs(x), torch.float64)
    lora.save_lora(loaded, tmp_path / "back", format="peft")
    there, back = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "back"))
    assert there.keys() == back.keys() and all(torch.equal(there[name], back[name]) for name in there)

    ours = copy.deepcopy(base)
    lora.inject_lora(ours, r=2, lora_alpha=3, target_modules=["one", "two", "three", "point"])
    lora.save_lora(randomize(ours), tmp_path / "ours", format="peft")
    close(ours(x), theirs_from(base, tmp_path / "ours")(x), torch.float64)
    reloaded = copy.deepcopy(base)
    lora.load_lora(reloaded, tmp_path / "ours")
    close(reloaded(x), ours(x), torch.float64)


BEYOND_PEFT = {  # of a convolution: what PEFT's unmerged forward goes without
    "groups=2": (nn.Conv1d, {"groups": 2}),
    r"dilation=\(2,\)": (nn.Conv1d, {"dilation": 2}),
    r"dilation=\(1, 2\)": (nn.Conv2d, {"dilation": (1, 2), "padding": "same"}),
    "padding_mode='reflect'": (nn.Conv2d, {"padding": 1, "padding_mode": "reflect"}),
    "padding_mode='circular'": (nn.Conv3d, {"padding": "same", "padding_mode": "circular"}),
}


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning")
@pytest.mark.parametrize("what, case", BEYOND_PEFT.items(), ids=BEYOND_PEFT)
def test_a_convolution_beyond_those_of_peft_is_refused_both_ways(what, case, tmp_path):
    kind, options = case
    base = nn.Sequential(kind(4, 4, 3, **options))
    model = copy.deepcopy(base)
    lora.inject_lora(model, r=2, target_modules=["0"])
    for format in ("peft", "diffusers"):
        with pytest.raises(ValueError, match=f"0: PEFT has no equal of a LoRA convolution with {what}"):
            lora.save_lora(model, tmp_path / "a", format=format)
    assert not list(tmp_path.iterdir())
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"0: a LoRA convolution with {what} has no equal here: unmerged, PEFT"):
        lora.load_lora(base, tmp_path)
    assert type(base[0]) is kind


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 1, dilation=2),
        nn.Conv2d(4, 6, 3, padding_mode="reflect"),
        nn.Conv1d(4, 6, 3, padding="same", stride=1),
    ],
)
def test_what_makes_no_difference_to_a_convolution_is_exchanged(layer, tmp_path):
    base, ours = (nn.Sequential(copy.deepcopy(layer)).double() for _ in range(2))
    lora.inject_lora(ours, r=2, target_modules=["0"])
    nn.init.normal_(ours[0].lora_B)
    lora.save_lora(ours, tmp_path, format="peft")
    x = torch.randn(2, 4, *[5] * (layer.weight.dim() - 2), dtype=torch.float64)
    close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), ours(x), torch.float64)


def test_of_several_dropouts_peft_gets_the_largest(tmp_path):
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ours = randomize(nn.Sequential(lora.Linear(4, 4, r=2, lora_dropout=0.1), lora.Linear(4, 4, r=2, lora_dropout=0.3)))
    base.load_state_dict({key: value for key, value in ours.state_dict().items() if "lora_" not in key})
    with pytest.warns(UserWarning, match=r"of \[0.1, 0.3\] the largest was written, which matters to further training"):
        lora.save_lora(ours, tmp_path, format="peft")
    theirs, x = theirs_from(base, tmp_path), torch.randn(2, 4)
    assert theirs.peft_config["default"].lora_dropout == 0.3
    close(ours.eval()(x), theirs(x), torch.float32)


def test_layers_made_by_hand_and_differing_scales_travel(tmp_path):
    """A changed `scaling`, groups by hand and fan_in_fan_out end in one rank and one alpha, or in patterns."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12)).double()
    ours = nn.Sequential(
        lora.MergedLinear(8, 12, r=2, lora_alpha=2, enable_lora=[False, True, True]),
        lora.Linear(12, 8, r=3, lora_alpha=4, bias=True),
        lora.Linear(8, 12, r=2, lora_alpha=6),
    ).double()
    ours.load_state_dict(base.state_dict(), strict=False)
    lora.mark_only_lora_as_trainable(ours)
    randomize(ours)[2].scaling = 0.3
    x = torch.randn(5, 8, dtype=torch.float64)
    for single_rank in (False, True):
        lora.save_lora(ours, tmp_path / "a", format="peft", single_rank=single_rank)
        config = json.loads((tmp_path / "a/adapter_config.json").read_text())
        assert bool(config["rank_pattern"]) is not single_rank and bool(config["alpha_pattern"]) is not single_rank
        assert config["r"] == 4 or not single_rank
        close(ours(x), theirs_from(base, tmp_path / "a")(x), torch.float64)
        loaded = copy.deepcopy(base)
        lora.load_lora(loaded, tmp_path / "a")
        close(loaded(x), ours(x), torch.float64)


def test_single_rank_is_what_a_serving_engine_reads(tmp_path):
    """W + (alpha / r) B A with the one r and alpha of the configuration, from the bare file, is every merged weight."""
    architecture = ARCHITECTURES["GPT-2"]
    base = architecture.build(torch.float64)
    model = copy.deepcopy(base)
    options = {"rank_pattern": {"0.attn.c_attn": 3, "c_fc": 1}, "alpha_pattern": {"c_fc": 5}}
    names = lora.inject_lora(model, r=2, lora_alpha=4, target_modules=["c_attn", "c_fc"], **options)
    lora.save_lora(randomize(model), tmp_path, format="peft", single_rank=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not config["rank_pattern"] and not config["alpha_pattern"] and config["r"] == 3
    for name in names:
        A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert A.shape[0] == B.shape[1] == 3
        merged = base.get_submodule(name).weight + config["lora_alpha"] / config["r"] * (B @ A).T
        close(base.get_submodule(name).weight + model.get_submodule(name).delta_weight(), merged, torch.float64)
    close(architecture.output(theirs_from(base, tmp_path)), architecture.output(model), torch.float64)


def test_names_that_end_alike(tmp_path):
    """ "0" is also the end of "1.0": the target and its rank must not spread."""
    base = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))).double()
    model = copy.deepcopy(base)
    lora.inject_lora(model, r=1, target_modules=["0", "1.1"], exclude_modules=["1.0"], rank_pattern={"^0": 2})
    randomize(model)
    lora.save_lora(model, tmp_path, format="peft")
    x = torch.randn(3, 4, dtype=torch.float64)
    theirs = theirs_from(base, tmp_path)
    assert set(theirs.base_model.targeted_module_names) == {"0", "1.1"}
    close(model(x), theirs(x), torch.float64)


def test_upstreams_bin_inside_a_peft_folder(tmp_path):
    """PEFT before 0.6 wrote adapter_model.bin."""
    architecture = ARCHITECTURES["Llama"]
    base = architecture.build()
    model = copy.deepcopy(base)
    lora.inject_lora(model, r=2)
    lora.save_lora(randomize(model), tmp_path, format="peft")
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter_model.bin")
    weights.unlink()
    loaded = copy.deepcopy(base)
    lora.load_lora(loaded, tmp_path)
    close(architecture.output(loaded), architecture.output(model), torch.float32)


@pytest.mark.parametrize("trained", [True, False])
def test_groups_that_the_model_has_already(trained, tmp_path):
    """Into a model with its fused layers, by hand or of GPT-2, a folder goes as groups, even where B is still zero."""

    def by_hand():
        layer = lora.MergedLinear(8, 12, r=2, enable_lora=[True, True, False], group_sizes=[6, 2, 4], interleave=2)
        return nn.Sequential(layer, lora.MergedLinear(12, 12, r=1, enable_lora=[False, True, True]))

    def gpt2():
        model = ARCHITECTURES["GPT-2"].build()
        lora.inject_lora(model, r=2, enable_lora=[True, True, False])
        return model

    for build in (by_hand, gpt2):
        model, other = build(), randomize(build())
        for layer in model.modules():
            if trained and isinstance(layer, lora.MergedLinear):
                nn.init.normal_(layer.lora_B[2:])
        lora.save_lora(model, tmp_path, format="peft")
        lora.load_lora(other, tmp_path)
        wanted, found = lora.lora_state_dict(model), lora.lora_state_dict(other)
        assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["embed_tokens", "lm_head"]])
def test_embeddings_that_peft_adds_are_not_the_adapters(targets, tmp_path):
    """PEFT writes the base's embeddings beside an adapter of them; changed ones, as after a resize, do count."""
    architecture = ARCHITECTURES["Llama"]
    base = architecture.build(torch.float64)
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["norm"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval()
    theirs.save_pretrained(tmp_path / "fresh")  # where the norm is still the base's
    randomize(theirs).save_pretrained(tmp_path / "theirs")
    for folder in ("fresh", "theirs"):
        ours = copy.deepcopy(base)
        names = lora.load_lora(ours, tmp_path / folder)
        assert lora.count_parameters(ours).trainable == theirs.get_nb_trainable_parameters()[0]
    close(architecture.output(ours), architecture.output(theirs), torch.float64)
    changed = copy.deepcopy(base)
    nn.init.normal_(changed.model.embed_tokens.weight)
    assert lora.load_lora(changed, tmp_path / "theirs") == names
    close(architecture.output(changed), architecture.output(theirs), torch.float64)
    lora.save_lora(changed, tmp_path / "ours", format="peft")
    close(architecture.output(theirs_from(base, tmp_path / "ours")), architecture.output(changed), torch.float64)


def test_root_scaling_of_groups_travels(tmp_path):
    """With n groups of rank r PEFT has rank n r: alpha and scaling are still the same after a round trip."""
    architecture = ARCHITECTURES["GPT-2"]
    model = architecture.build(torch.float64)
    names = lora.inject_lora(model, r=2, lora_alpha=3, use_rslora=True)
    wanted = architecture.output(randomize(model))
    lora.save_lora(model, tmp_path, format="peft")
    close(wanted, architecture.output(theirs_from(architecture.build(torch.float64), tmp_path)), torch.float64)
    loaded = architecture.build(torch.float64)
    lora.load_lora(loaded, tmp_path)
    close(architecture.output(loaded), wanted, torch.float64)
    for name in names:
        ours, back = model.get_submodule(name), loaded.get_submodule(name)
        assert (back.r, back.scaling) == pytest.approx((ours.r, ours.scaling), rel=1e-15)
        assert back.lora_alpha == pytest.approx(3, rel=1e-15)


VALUES = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        3,
        2.5,
        1e400,
        "",
        "(",
        "all",
        [],
        [1],
        ["a", None],
        {},
        {"query": 1},
        {"(": 1},
        {"query": "x"},
    ]
)


@given(st.dictionaries(st.sampled_from(["peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "modules_to_save", "rank_pattern", "alpha_pattern", "init_lora_weights", "target_modules", "use_dora"]), VALUES, min_size=1))  # fmt: skip  # noqa: E501
def test_no_configuration_raises_anything_but_a_value_error(changes):
    """Whatever its entries: it loads, or a ValueError says why not and the model is as before."""
    base = ARCHITECTURES["BERT"].build()
    with tempfile.TemporaryDirectory() as folder:
        model = copy.deepcopy(base)
        lora.inject_lora(model, r=2)
        lora.save_lora(model, folder, format="peft")
        rewrite(**changes)(Path(folder))
        try:
            lora.load_lora(base, folder)
        except ValueError:
            assert not any(isinstance(module, lora.LoRALayer) for module in base.modules())


def rewrite(**changes):
    def change(folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))

    return change


def change_tensors(change):
    def rewritten(folder):
        tensors = change(load_file(folder / "adapter_model.safetensors"))
        save_file(tensors, folder / "adapter_model.safetensors")

    return rewritten


def drop(name, also=None):
    def change(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        full = next(key for key in tensors if key.endswith(name))
        tensor = tensors.pop(full)
        if also:
            tensors[also] = tensor
        save_file(tensors, folder / "adapter_model.safetensors")

    return change


CONFIG, WEIGHTS, UNREADABLE = "adapter_config.json", "adapter_model.safetensors", "no configuration this library reads"
REFUSED = {
    "no configuration": (lambda f: (f / CONFIG).unlink(), FileNotFoundError, "a folder without adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, "neither adapter_model.safetensors nor"),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes(b"12345678{"), ValueError, "no whole safetensors file"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), ValueError, UNREADABLE),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), ValueError, UNREADABLE),
    "deep": (lambda f: (f / CONFIG).write_text("[" * 100_000), ValueError, UNREADABLE),
    "other method": (rewrite(peft_type="IA3"), ValueError, "peft_type is 'IA3', this library reads 'LORA'"),
    "DoRA": (rewrite(use_dora=True), ValueError, "use_dora set: a variant of LoRA that this library does not have"),
    "unknown": (rewrite(use_next_idea={"a": 1}), ValueError, "use_next_idea set"),
    "PiSSA": (rewrite(init_lora_weights="pissa"), ValueError, "init_lora_weights='pissa' changed the weights"),
    "rank": (rewrite(r=3), ValueError, "the configuration says rank 3, the tensors have 2"),
    "rank as text": (rewrite(r="2"), ValueError, "r='2': the rank must be an integer"),
    "alpha": (rewrite(lora_alpha=[1]), ValueError, "lora_alpha=.*must be a number"),
    "product": (drop("query.lora_B.weight", "base_model.model.bert.x"), ValueError, "and no lora_B.weight"),
    "misshapen": (change_tensors(lambda t: {k: v[:1].clone() for k, v in t.items()}), ValueError, "make no product"),
    "no LoRA": (change_tensors(lambda t: {"x": torch.ones(1)}), ValueError, "holds no LoRA tensors"),
    "heads as numbers": (rewrite(modules_to_save=[1]), ValueError, "bias and modules_to_save must be names"),
    "pattern": (rewrite(alpha_pattern={"(": 1}), ValueError, UNREADABLE),
    "bias mode": (rewrite(bias="some"), ValueError, "bias='some': must be one of"),
    "biases missing": (rewrite(bias="all"), ValueError, "classifier.bias: missing|bias: missing in the file"),
    "head missing": (rewrite(modules_to_save=["pooler"]), ValueError, "pooler.dense.weight: missing in the file"),
    "B missing": (drop("query.lora_B.weight"), ValueError, "query has lora_A.weight and no lora_B.weight"),
    "A missing": (drop("query.lora_A.weight"), ValueError, "query.lora_B.weight: unexpected in the file"),
    "foreign tensor": (drop("query.lora_A.weight", "base_model.model.x.y"), ValueError, "x: the file saves it whole"),
}  # fmt: skip


@pytest.mark.parametrize("damage, error, message", REFUSED.values(), ids=REFUSED)
def test_refused_and_nothing_changed(damage, error, message, tmp_path):
    torch.manual_seed(0)
    base = transformers.BertModel(transformers.BertConfig(**BERT))
    model = copy.deepcopy(base)
    lora.inject_lora(model, r=2)
    lora.save_lora(model, tmp_path, format="peft")
    damage(tmp_path)
    before = {name: (id(module), type(module)) for name, module in base.named_modules()}
    with pytest.raises(error, match=message):
        lora.load_lora(base, tmp_path)
    assert {name: (id(module), type(module)) for name, module in base.named_modules()} == before
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert base.state_dict().keys() == transformers.BertModel(base.config).state_dict().keys()
