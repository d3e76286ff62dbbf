"""Adapter folders as others write and read them: names, configurations, the base's path, wrappers, single ranks.

The oracle is the real `peft`, and transformers' own loading of a folder. Run alone: `pytest tests/test_exchange.py`.
"""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from torch import nn

import loralib as lora

pytestmark = [
    # What PEFT calls in transformers, and what it says of adapters on tied weights.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]
LLAMA, BERT_MODEL = ARCHITECTURES["Llama"], ARCHITECTURES["BERT"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def randomized(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def by_peft(dtype=torch.float64, **options):
    """A base, and the model that PEFT adapted."""
    torch.manual_seed(0)
    base = BERT_MODEL.build(dtype)
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": BERT_MODEL.targets, **options})
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval()
    return base, randomized(theirs)


def rename(folder, change):
    tensors = {change(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    return tensors


def configure(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_a_state_dict_of_peft_is_read(tmp_path):
    """What `torch.save` and accelerate keep of a PEFT model has the adapter's name within each name."""
    targets = ["query", "word_embeddings"]
    base, theirs = by_peft(target_modules=targets, modules_to_save=["transform.dense"], bias="lora_only")
    theirs.save_pretrained(tmp_path)
    kept = [name for name, parameter in theirs.named_parameters() if parameter.requires_grad]
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items() if name in kept}
    assert any(".modules_to_save.default." in name for name in kept) and any("_A.default.weight" in n for n in kept)
    assert any(name.endswith("lora_embedding_A.default") for name in kept) and any(".base_layer." in n for n in kept)
    save_file(state, tmp_path / WEIGHTS)
    lora.load_lora(base, tmp_path)
    close(BERT_MODEL.output(base), BERT_MODEL.output(theirs))


def test_two_adapters_in_one_file_are_refused(tmp_path):
    base, theirs = by_peft()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    named = {
        n.replace(".lora_A", f".lora_A.{k}").replace(".lora_B", f".lora_B.{k}"): t.clone()
        for k in ("a", "b")
        for n, t in tensors.items()
    }
    for both in (named, {**tensors, **{name: tensor for name, tensor in named.items() if ".a." in name}}):
        save_file(both, tmp_path / WEIGHTS)
        with pytest.raises(
            ValueError, match=r"holds several adapters \(a.* in the names of their tensors\); save each to a"
        ):
            lora.load_lora(base, tmp_path)
        assert not lora.list_adapters(base)


HARMLESS = {
    "an early PEFT": {"merge_weights": True, "enable_lora": None},
    "layers": {"layers_to_transform": [1], "layers_pattern": "layer"},
    "megatron": {"megatron_config": {"a": 1}, "megatron_core": "megatron.core"},
    "initialisation": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "loftq_config": {"loftq_bits": 4}},
    "a newer PEFT": {"use_next_idea": False, "next_config": None, "next_names": [], "next_number": 0},
    "where from": {"revision": "main", "peft_version": "0.99", "auto_mapping": {"base_model_class": "X"}},
    "only with others": {"qalora_group_size": 16, "ensure_weight_tying": True},
}


@pytest.mark.parametrize("entries", HARMLESS.values(), ids=HARMLESS)
def test_harmless_entries_are_no_error(entries, tmp_path):
    base, theirs = by_peft()
    theirs.save_pretrained(tmp_path)
    configure(tmp_path, **entries)
    lora.load_lora(base, tmp_path)
    close(BERT_MODEL.output(base), BERT_MODEL.output(theirs))


def test_notes_of_other_programs_are_named(tmp_path):
    """ms-swift writes such ones; PEFT ignores them with a warning, too."""
    base, theirs = by_peft()
    theirs.save_pretrained(tmp_path)
    configure(tmp_path, lorap_emb_lr=1e-6, model_id="x/y")
    with pytest.warns(
        UserWarning, match="lorap_emb_lr, model_id is no entry of PEFT's; it is taken for a note"
    ) as said:
        lora.load_lora(base, tmp_path)
    assert said[0].filename == __file__
    close(BERT_MODEL.output(base), BERT_MODEL.output(theirs))


VARIANTS = {
    "use_dora": True,
    "lora_bias": 1,
    "alora_invocation_tokens": [5],
    "layer_replication": [[0, 2]],
    "kasa_config": {"a": 1},
    "velora_config": {"num_groups": 2},  # its files hold more than A and B
    "use_next_idea": True,
    "next_tokens": [1],
    "next_config": {"a": 0},
}


@pytest.mark.parametrize("key", VARIANTS)
def test_what_changes_the_computation_is_refused_by_name(key, tmp_path):
    base, theirs = by_peft()
    theirs.save_pretrained(tmp_path)
    configure(tmp_path, **{key: VARIANTS[key]})
    with pytest.raises(ValueError, match=f"{key} set: a variant of LoRA that this library does not have"):
        lora.load_lora(base, tmp_path)
    assert not lora.list_adapters(base)


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": 1},
        {"layers_to_transform": [0], "layers_pattern": "layer"},
        {"layers_to_transform": [0, 1], "layers_pattern": ["layer"], "rank_pattern": {"layer.1.*query": 3}},
        {"init_lora_weights": "mica"},
    ],
    ids=["one layer", "pattern", "several", "MiCA"],
)
def test_options_of_training_that_a_trained_adapter_does_not_need(options, tmp_path):
    """The layers that PEFT chose are those in the file; how an adapter began and was trained is past."""
    base, theirs = by_peft(torch.float32, **options)
    theirs.save_pretrained(tmp_path)
    names = lora.load_lora(base, tmp_path)
    assert set(names) == set(theirs.base_model.targeted_module_names)
    torch.testing.assert_close(BERT_MODEL.output(base), BERT_MODEL.output(theirs), rtol=1e-4, atol=1e-4)


PLACES = {
    "as it was": ("", lambda base: base),
    "DistributedDataParallel": ("module.", lambda base: base),
    "torch.compile": ("_orig_mod.", lambda base: base),
    "both, and Lightning": ("model.module._orig_mod.", lambda base: base),
    "sentence-transformers": ("0.auto_model.", lambda base: base),
    "into Lightning": ("", lambda base: holder("model", base)),
    "into sentence-transformers": ("", lambda base: nn.Sequential(holder("auto_model", base))),
    "from one to another": ("0.auto_model.", lambda base: holder("model", base)),
}


def holder(name, base):
    module = nn.Module()
    setattr(module, name, base)
    return module


@pytest.mark.parametrize("prefix, place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("form", ["peft", "loralib", "upstream"])
def test_wrappers_do_not_tell_names_apart(prefix, place, form, tmp_path):
    """The adapter, with a rank, alpha and head of some layers given by their names there, computes the same here."""
    base = BERT_MODEL.build(torch.float64)
    saved = copy.deepcopy(base)
    only = "bert.encoder.layer.1.attention.self.query"
    patterns = {"rank_pattern": {only: 3}, "alpha_pattern": {only: 9}} if form != "upstream" else {}
    names = lora.inject_lora(saved, r=2, lora_alpha=4, modules_to_save=["transform"], **patterns)
    wanted = BERT_MODEL.output(randomized(saved))
    path, alpha = tmp_path / "adapter", {}
    if form == "peft":
        with pytest.warns(UserWarning, match="ranks or alphas differ"):
            lora.save_lora(saved, path, format="peft")
        first = "base_model.model."
        rename(path, lambda name: first + prefix + name.removeprefix(first))
        renamed = {f"^{prefix}{only}".replace(".", r"\."): 0}
        configure(path, rank_pattern=dict.fromkeys(renamed, 3), alpha_pattern=dict.fromkeys(renamed, 9))
    elif form == "loralib":
        source = base
        for part in reversed(prefix.split(".")[:-1]):
            source = holder(part, source)
        lora.inject_lora(
            source,
            r=2,
            lora_alpha=4,
            target_modules=[f"{prefix}{name}" for name in names],
            modules_to_save=[f"{prefix}cls.predictions.transform"],
            **patterns,
        )
        source.load_state_dict({prefix + name: tensor for name, tensor in saved.state_dict().items()})
        lora.save_lora(source, path)
        lora.unload(source)
    else:
        path, alpha = tmp_path / "adapter.bin", {"lora_alpha": 4}
        torch.save({prefix + name: tensor for name, tensor in lora.lora_state_dict(saved).items()}, path)
    model = place(base)
    inside = next(name for name, module in model.named_modules() if module is base)
    loaded = lora.load_lora(model, path, **alpha)
    assert loaded == [f"{inside}.{name}" if inside else name for name in names]
    close(BERT_MODEL.output(base), wanted)
    lora.load_lora(model, path, **alpha)  # again, into what is there now
    close(BERT_MODEL.output(base), wanted)


class Towers(nn.Module):
    """Without `model` and `module` the first layers of the two have the same name."""

    def __init__(self):
        super().__init__()
        self.model, self.module = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
        self.text = nn.Sequential(nn.Linear(4, 4))


@pytest.mark.parametrize(
    "names", [["model.text.0", "audio.0"], ["0", "model.text.0"]], ids=["no counterpart", "one of several"]
)
def test_no_name_is_guessed(names, tmp_path):
    """Where a layer has no counterpart the names stay those of the file, and the error lists them all."""
    tensors = {
        f"{name}.lora_{half}": torch.ones(4, 1) if half == "B" else torch.ones(1, 4) for name in names for half in "AB"
    }
    torch.save(tensors, tmp_path / "a.bin")
    model = Towers()
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        lora.load_lora(model, tmp_path / "a.bin", lora_alpha=1)
    assert all(f"{name}: the model has no such layer" in str(error.value) for name in names)


def test_two_layers_do_not_become_one(tmp_path):
    """ "model.0" and "module.0" would both be "0"."""
    tensors = {
        f"{name}.0.lora_{half}": torch.ones(4, 1) if half == "B" else torch.ones(1, 4)
        for name in ("model", "module")
        for half in "AB"
    }
    torch.save(tensors, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="model.0: the model has no such layer\n  module.0: the model has no such"):
        lora.load_lora(nn.Sequential(nn.Linear(4, 4)), tmp_path / "a.bin", lora_alpha=1)


@pytest.mark.parametrize("form", ["peft", "loralib"])
def test_compiled_parts_leave_no_trace_in_files(form, tmp_path):
    """`torch.compile` around a block: the file is that of the plain model, and goes into either."""

    def build(compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
        return nn.Sequential(torch.compile(model[0], backend="eager"), model[1]) if compiled else model

    model = build(compiled=True)
    lora.inject_lora(model, r=2, target_modules=["0._orig_mod"], modules_to_save=["1"])
    wanted = randomized(model)(torch.ones(1, 4).double())
    lora.save_lora(model, tmp_path / "adapter", format=form)
    file = tmp_path / "adapter" / WEIGHTS if form == "peft" else tmp_path / "adapter"
    assert not any("_orig_mod" in name for name in load_file(file))
    for into in (model, build(compiled=True), build(compiled=False)):
        lora.load_lora(into, tmp_path / "adapter")
        close(into(torch.ones(1, 4).double()), wanted)


def test_files_of_transformers_4_for_a_vision_language_model(tmp_path):
    """Its names had `model` in another place."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(vocab_size=64, **small),
        vision_config=transformers.CLIPVisionConfig(image_size=28, patch_size=14, **small),
        image_token_index=60,
    )
    base = transformers.LlavaForConditionalGeneration(config).eval()
    theirs = copy.deepcopy(base)
    names = lora.inject_lora(theirs, r=2, target_modules=r".*language_model.*q_proj")
    lora.save_lora(randomized(theirs), tmp_path, format="peft")
    renamed = rename(tmp_path, lambda name: name.replace("model.model.language_model.", "model.language_model.model."))
    assert "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight" in renamed
    assert lora.load_lora(base, tmp_path) == names
    tokens = torch.arange(6)[None]
    torch.testing.assert_close(base(input_ids=tokens).logits, theirs(input_ids=tokens).logits)


def test_the_folder_finds_its_base(tmp_path):
    """`from_pretrained` of the folder builds the base from where it was, as given, and puts the adapter in."""
    torch.manual_seed(0)
    LLAMA.build().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora.inject_lora(model, r=4)
    lora.save_lora(randomized(model), tmp_path / "adapter", format="peft")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(LLAMA.output(again), LLAMA.output(model.eval()))
    assert (LLAMA.output(again) - LLAMA.output(lora.unload(model))).abs().max() > 1e-3


def test_our_own_file_has_no_folder_of_this_machine(tmp_path):
    model = LLAMA.build()
    model.config._name_or_path = str(tmp_path)
    lora.inject_lora(model, r=2)
    lora.save_lora(model, tmp_path / "a.safetensors")
    assert str(tmp_path.parent).encode() not in (tmp_path / "a.safetensors").read_bytes()
    lora.save_lora(model, tmp_path / "a.safetensors", base_model="user/base")
    assert b"user/base" in (tmp_path / "a.safetensors").read_bytes()


@pytest.mark.parametrize("base_model", ["user/base", Path("some") / "folder"])
def test_the_base_can_be_named(base_model, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    lora.inject_lora(model, r=2, target_modules=["0"])
    lora.save_lora(model, tmp_path / "plain", format="peft")
    assert json.loads((tmp_path / "plain" / CONFIG).read_text())["base_model_name_or_path"] is None
    lora.save_lora(model, tmp_path / "named", format="peft", base_model=base_model)
    assert json.loads((tmp_path / "named" / CONFIG).read_text())["base_model_name_or_path"] == str(base_model)


@pytest.mark.parametrize("base_model", [None, "user/base", '/a "path": with # marks'])
def test_model_card(base_model, tmp_path):
    """The front matter is what the Hub reads; a card that is there is somebody's work and stays."""
    from huggingface_hub import ModelCard

    model = nn.Sequential(nn.Linear(4, 4))
    lora.inject_lora(model, r=2, target_modules=["0"])
    lora.save_lora(model, tmp_path, format="peft", base_model=base_model)
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data
    assert (data.base_model, data.library_name, data.tags) == (base_model, "peft", ["lora"])
    assert (base_model or "# LoRA adapter") in card.text
    (tmp_path / "README.md").write_text("mine")
    lora.save_lora(model, tmp_path, format="peft")
    assert (tmp_path / "README.md").read_text() == "mine"


SCALES = {
    "ranks": ({"rank_pattern": {"query": 4}}, ["query"]),
    "alphas": ({"alpha_pattern": {"value": 1}}, ["value"]),
    "ranks, by the root": ({"rank_pattern": {"query": 4}, "use_rslora": True}, ["query"]),
    "both, in proportion": ({"rank_pattern": {"query": 4}, "alpha_pattern": {"query": 8}}, []),
    "one of each": ({}, []),
    "one of each, by the root": ({"use_rslora": True}, []),
}


@pytest.mark.parametrize("options, wrong", SCALES.values(), ids=SCALES)
def test_engines_that_read_one_rank_and_alpha_are_warned_of(options, wrong, tmp_path, recwarn):
    """Exactly for the layers whose scaling is not what `r` and `lora_alpha` say, and not with single_rank=True."""
    model = BERT_MODEL.build()
    names = lora.inject_lora(model, r=2, lora_alpha=4, target_modules=["query", "value", "key"], **options)
    lora.save_lora(model, tmp_path, format="peft")
    config = json.loads((tmp_path / CONFIG).read_text())
    engine = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
    scaled_wrongly = [name for name in names if model.get_submodule(name).scaling != pytest.approx(engine)]
    assert {name.rpartition(".")[2] for name in scaled_wrongly} == set(wrong)
    texts = [str(warning.message) for warning in recwarn.list if "vLLM" in str(warning.message)]
    assert len(texts) == bool(wrong)
    for text in texts:
        assert f"would scale {', '.join(scaled_wrongly)} wrongly" in text and "single_rank=True" in text
    recwarn.clear()
    lora.save_lora(model, tmp_path, format="peft", single_rank=True)
    assert not recwarn.list
