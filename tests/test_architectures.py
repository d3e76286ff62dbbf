"""The table of architectures: what the default injection finds, and that fused projections get q and v alone.

The oracle for fused projections is each model's own code, or a literal copy of the line that splits its output.
Run alone: `pytest tests/test_architectures.py`.
"""

import copy
import warnings

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, BERT, DISTILBERT, HEADS, LLAMA, SHORT, T5, TEXT, VIT, WHISPER, H, R
from torch import nn

import loralib as lora
from loralib.architectures import default_modules_to_save, find_query_and_value

each = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)


def randomize(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)


@each
def test_default_injection(architecture):
    """The right layers, the number of parameters counted by hand, outputs unchanged, and unchanged after unloading."""
    model = architecture.build()
    wanted = architecture.output(model.requires_grad_(False))
    names = lora.inject_lora(model, r=R)
    assert {name.rpartition(".")[2] for name in names} == set(architecture.targets) and len(
        names
    ) == architecture.adapted
    assert lora.count_parameters(model).trainable == architecture.trained
    torch.testing.assert_close(architecture.output(model), wanted)
    randomize(model)
    unmerged = architecture.output(lora.unmerge_lora_weights(model))
    assert not torch.allclose(unmerged, wanted, atol=1e-3)
    torch.testing.assert_close(architecture.output(lora.merge_lora_weights(model)), unmerged)
    assert torch.equal(architecture.output(lora.unload(model)), wanted)


def by_thirds(_, y):
    return y.chunk(3, dim=-1)


def by_one_key_head(_, y):
    return y.split([H, H // HEADS, H // HEADS], dim=-1)


def of_each_head(_, y):
    return y.view(*y.shape[:2], HEADS, 3 * H // HEADS).chunk(3, dim=-1)


FUSED = {
    "GPT-2": by_thirds,
    "GPT-NeoX": of_each_head,
    "Falcon, one key head": lambda owner, y: owner._split_heads(y),
    "Falcon, a key head each": lambda owner, y: owner._split_heads(y),
    "Falcon, two key heads": lambda owner, y: owner._split_heads(y),
    "Bloom": lambda owner, y: owner._reshape(y),
    "MPT": by_thirds,
    "Phi-3": lambda _, y: y.split([H, H // 2, H // 2], dim=-1),
    "BigCode, one key head": by_one_key_head,
    "BigCode, a key head each": of_each_head,
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("enable_lora", [[True, False, True], [False, True, False], [True, True, True]])
def test_fused_projection_adapts_exactly_the_groups(name, enable_lora):
    """Row by row: a group that is enabled gets scaling * B A of its own A and B, the others nothing."""
    architecture = ARCHITECTURES[name]
    model = architecture.build(torch.float64)
    names = lora.inject_lora(model, r=R, lora_alpha=3, enable_lora=enable_lora)
    randomize(model)
    layer = model.get_submodule(names[-1])
    assert layer.enable_lora == enable_lora and str(enable_lora) in repr(layer)
    delta = layer.delta_weight()
    delta = delta.T if layer.fan_in_fan_out else delta
    owner = model.get_submodule(names[-1].rpartition(".")[0])
    rows = torch.arange(len(delta)).view(1, 1, -1)
    # A key head that several query heads share comes out several times.
    groups = [torch.unique(group).sort().values for group in FUSED[name](owner, rows)]
    assert sum(map(len, groups)) == len(delta)
    A, B = list(layer.lora_A.split(R)), layer.lora_B
    for group, enabled in zip(groups, enable_lora, strict=True):
        own = torch.zeros(len(group), H, dtype=torch.float64)
        if enabled:
            own, B = 1.5 * B[: len(group)] @ A.pop(0), B[len(group) :]
        torch.testing.assert_close(delta[group], own, rtol=0, atol=1e-12)
    assert len(B) == 0


@pytest.mark.parametrize("name", ["GPT-NeoX", "Falcon, two key heads", "Phi-3", "GPT-2"])
def test_named_fused_projection_is_adapted_whole(name):
    """A name means what it means in PEFT; `enable_lora` asks for groups."""
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    names = lora.inject_lora(model, r=R, target_modules=architecture.targets)
    assert not any(hasattr(model.get_submodule(name), "enable_lora") for name in names)
    model = lora.unload(model)
    lora.inject_lora(model, r=R, target_modules=architecture.targets, enable_lora=[True, False, True])
    assert all(hasattr(model.get_submodule(name), "enable_lora") for name in names)


HEADS_OF = {
    "BertForSequenceClassification": ("BertConfig", BERT, ["classifier"]),
    "BertForTokenClassification": ("BertConfig", BERT, ["classifier"]),
    "RobertaForSequenceClassification": ("RobertaConfig", BERT, ["classifier"]),
    "RobertaForTokenClassification": ("RobertaConfig", BERT, ["classifier"]),
    "DistilBertForSequenceClassification": ("DistilBertConfig", DISTILBERT, ["pre_classifier", "classifier"]),
    "DebertaV2ForSequenceClassification": ("DebertaV2Config", BERT, ["pooler", "classifier"]),
    "AlbertForSequenceClassification": ("AlbertConfig", BERT, ["classifier"]),
    "ElectraForSequenceClassification": ("ElectraConfig", BERT, ["classifier"]),
    "GPT2ForSequenceClassification": ("GPT2Config", SHORT, ["score"]),
    "GPT2ForTokenClassification": ("GPT2Config", SHORT, ["classifier"]),
    "LlamaForSequenceClassification": ("LlamaConfig", BERT, ["score"]),
    "GPTNeoXForSequenceClassification": ("GPTNeoXConfig", BERT, ["score"]),
    "T5ForSequenceClassification": ("T5Config", T5, ["classification_head"]),
    "T5ForTokenClassification": ("T5Config", T5, ["classifier"]),
    "ViTForImageClassification": ("ViTConfig", VIT, ["classifier"]),
    "BertForQuestionAnswering": ("BertConfig", BERT, ["qa_outputs"]),
    "T5ForQuestionAnswering": ("T5Config", T5, ["qa_outputs"]),
    "BertForMultipleChoice": ("BertConfig", BERT, ["classifier"]),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", VIT, ["cls_classifier", "distillation_classifier"]),
    "SiglipForImageClassification": ("SiglipConfig", {"vision_config": VIT, "text_config": BERT}, ["classifier"]),
    "WhisperForAudioClassification": ("WhisperConfig", WHISPER, ["projector", "classifier"]),
    "BertForMaskedLM": ("BertConfig", BERT, []),
    "GPT2LMHeadModel": ("GPT2Config", SHORT, []),
}  # fmt: skip


@pytest.mark.parametrize("name, config, options, heads", [(name, *row) for name, row in HEADS_OF.items()], ids=HEADS_OF)
def test_heads_of_classifiers_are_trained_and_saved(name, config, options, heads):
    """The head, and nothing else beside the adapters; [] switches it off."""
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    if name == "SiglipForImageClassification" and transformers.__version__ < "5":
        pytest.skip("the head of this class cannot be told in transformers 4, which an error says")
    lora.inject_lora(model, r=R)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    beside = {name for name in trained if not name.endswith(("lora_A", "lora_B"))}
    wanted = {name for name, _ in model.named_parameters() if name.startswith(tuple(head + "." for head in heads))}
    assert beside == wanted and bool(wanted) == bool(heads)
    assert set(lora.lora_state_dict(model)) == trained
    lora.inject_lora(lora.unload(model), r=R, modules_to_save=[])
    assert all(name.endswith(("lora_A", "lora_B")) for name, p in model.named_parameters() if p.requires_grad)


def test_head_that_cannot_be_told_from_the_rest_is_asked_for():
    """Nothing in it is a pretrained model; a guess would train the encoder whole."""

    class SomeForSequenceClassification(nn.Module):
        base_model_prefix = "model"

        def __init__(self):
            super().__init__()
            self.encoder, self.classifier = nn.Linear(4, 4), nn.Linear(4, 2)

    with pytest.raises(ValueError, match="has no 'model', so its head .*encoder, classifier.*modules_to_save="):
        lora.inject_lora(SomeForSequenceClassification(), r=R, target_modules=["encoder"])
    lora.inject_lora(SomeForSequenceClassification(), r=R, target_modules=["encoder"], modules_to_save=["classifier"])


def test_head_of_bare_parameters_is_asked_about():
    """Nothing can name it, and it would stay as it was drawn."""
    model = transformers.TapasForQuestionAnswering(transformers.TapasConfig(**BERT, type_vocab_sizes=[2] * 7))
    with pytest.raises(ValueError, match=r"head of Tapas\w+ is output_weights, .*pass modules_to_save=\[\]"):
        lora.inject_lora(model, r=R)
    assert lora.inject_lora(model, r=R, modules_to_save=[])


def layers(*names):
    return nn.ModuleDict({name: nn.Linear(4, 4) for name in names})


# By the names of siblings, which of them are adapted.
SIBLINGS = {
    "of transformers": (["q_proj", "k_proj", "v_proj", "o_proj"], ["q_proj", "v_proj"]),
    "of Meta": (["wq", "wk", "wv", "wo"], ["wq", "wv"]),
    "two of a kind": (
        ["query", "key", "value", "query_global", "key_global", "value_global"],
        ["query", "value", "query_global", "value_global"],
    ),
    "fused": (["qkv", "proj"], ["qkv"]),
    "fused by long names": (["query_key_value", "dense"], ["query_key_value"]),
    "key and value in one": (["to_q", "to_kv", "to_out"], ["to_q", "to_kv"]),
    "latent": (["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"], ["q_b_proj", "kv_b_proj"]),
    "no value": (["q_proj", "k_proj", "out_proj"], []),
    "parts of words": (["keyboard", "valued", "queryset"], []),
}


@pytest.mark.parametrize("names, wanted", SIBLINGS.values(), ids=SIBLINGS)
def test_query_and_value_are_told_by_their_siblings(names, wanted):
    """In any model, of transformers or not, at any depth."""
    model = nn.Sequential(layers("up", "down"), nn.ModuleDict({"attention": layers(*names)}))
    assert find_query_and_value(model) == [f"1.attention.{name}" for name in wanted]
    if wanted:
        assert lora.inject_lora(model, r=1) == [f"1.attention.{name}" for name in wanted]


def test_wrapped_projections():
    """A projection with its norm, as in LeViT."""
    named = {name: nn.ModuleDict({"linear": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)}) for name in "qkv"}
    assert find_query_and_value(nn.ModuleDict(named)) == ["q.linear", "v.linear"]


def test_of_several_towers_the_language_model_is_adapted():
    text, vision = transformers.LlamaConfig(**LLAMA), transformers.CLIPVisionConfig(**VIT)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))
    names = lora.inject_lora(model, r=R)
    assert len(names) == 4 and all("language_model" in name for name in names)
    assert len(lora.inject_lora(transformers.CLIPVisionModel(vision), r=R)) == 4  # alone it is adapted itself


MAMBA = {"hidden_size": H, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 2, **TEXT}
XLNET = {"d_model": H, "n_layer": 1, "n_head": HEADS, "d_inner": 32, **TEXT}
WITHOUT = {
    "MambaForCausalLM": ("MambaConfig", MAMBA, "MambaForCausalLM: it has no query and value; .*'all-linear'"),
    "XLNetLMHeadModel": ("XLNetConfig", XLNET, "are Parameters of XLNetRelativeAttention, not layers; .*'all-linear'"),
}


@pytest.mark.parametrize("name, config, options, message", [(name, *row) for name, row in WITHOUT.items()], ids=WITHOUT)
def test_without_a_query_and_a_value_targets_are_asked_for(name, config, options, message):
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    with pytest.raises(ValueError, match=message):
        lora.inject_lora(model, r=R)
    with pytest.warns(UserWarning, match="no LoRA layers: it is frozen"):
        lora.mark_only_lora_as_trainable(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "all-linear leaves out", UserWarning)
        assert lora.inject_lora(model, r=R, target_modules="all-linear")


def poolformer():
    options = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_labels": 3}
    return transformers.PoolFormerForImageClassification(transformers.PoolFormerConfig(**options)).eval()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_head_means_no_inner_module_of_the_same_name(tmp_path):
    """PoolFormer has norms in its blocks, which PEFT would look for in the folder: it gets those of the base."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install -e '.[test]'")
    base, x = poolformer(), {"pixel_values": torch.randn(2, 3, 64, 64)}
    model = copy.deepcopy(base)
    assert default_modules_to_save(model) == ["norm", "classifier"]
    lora.inject_lora(model, r=1, target_modules=r".*output\.conv1")
    beside = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert {name.rpartition(".")[0] for name in beside} == {"norm", "classifier"}
    randomize(model)
    lora.save_lora(model, tmp_path, format="peft")
    wanted = model(**x).logits
    torch.testing.assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(**x).logits, wanted)
    lora.load_lora(base, tmp_path)
    torch.testing.assert_close(base.eval()(**x).logits, wanted)


ALL_LINEAR = {
    "GPT-2": 2 * 4,
    "Llama": 2 * 7,
    "BERT": 2 * 6 + 1,  # and the transform of its language model's head
    "T5": 2 * (4 + 2) + 2 * (8 + 2),
    "Falcon, two key heads": 2 * 4,
    "Bloom": 2 * 4,
    "ViT": 2 * 6 + 1,  # and the pooler
}


@pytest.mark.parametrize("name, layers", ALL_LINEAR.items(), ids=ALL_LINEAR)
def test_all_linear(name, layers):
    """Every linear layer, the whole of each, but not what ends the model."""
    model = ARCHITECTURES[name].build()
    names = lora.inject_lora(model, r=R, target_modules="all-linear")
    assert len(names) == layers and not {"lm_head", "cls.predictions.decoder"} & set(names)
    assert not any(hasattr(model.get_submodule(name), "enable_lora") for name in names)


def test_all_linear_leaves_the_head_of_a_classifier_alone():
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**BERT))
    for modules_to_save in (None, []):
        names = lora.inject_lora(model, r=R, target_modules="all-linear", modules_to_save=modules_to_save)
        assert len(names) == 12 and not any(name.startswith("classifier") for name in names)
        lora.unload(model)


def test_counts_of_the_real_models():
    """The figures of FORMATS.md for gpt2 and roberta-base, on the meta device, where weights cost nothing."""
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config())
        roberta = transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
        )
    assert lora.count_parameters(gpt2).total == 124_439_808
    lora.inject_lora(gpt2, r=4)
    assert lora.count_parameters(gpt2).trainable == 147_456
    assert lora.count_parameters(roberta).total == 124_647_170
    lora.inject_lora(roberta, r=8)
    assert lora.count_parameters(roberta).trainable == 294_912 + 592_130
