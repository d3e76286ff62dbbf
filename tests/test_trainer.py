"""A model with adapters in the hands of `transformers.Trainer`, and what its own `save_pretrained` does.

    python -m pytest tests/test_trainer.py

The oracles are the model in memory, the uninterrupted training, and PEFT in the same runs
(examples/benchmarks/integrations_trainer.py).
"""

import contextlib
import copy
import json
import logging
import os
import pickle
import sys

import peft
import pytest
import torch
import transformers
from nlg_models import ROOT
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, RobertaConfig

import loralib as lora
from loralib.formats import SCALINGS

sys.path.append(str(ROOT / "examples" / "benchmarks"))
import integrations_trainer as runs  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*adapter 'default' is saved:UserWarning"),
]
IDS = torch.stack([row["input_ids"] for row in runs.sentences()])
PEFTS = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
SMALL = {**runs.SMALL, "intermediate_size": 64, "pad_token_id": 0}
ROBERTA = RobertaConfig(**SMALL, max_position_embeddings=20, num_labels=2)
LLAMA = LlamaConfig(**SMALL)


@pytest.fixture
def base(tmp_path):
    return runs.base(tmp_path, AutoModelForSequenceClassification, ROBERTA)


def classifier(base, **more):
    return runs.adapt("loralib", AutoModelForSequenceClassification.from_pretrained(base), **more)


def draw(model):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def trainer(model, folder, **more):
    arguments = runs.arguments(transformers.TrainingArguments, str(folder), **more)
    data = runs.sentences()
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)


@torch.no_grad()
def output(model):
    return model.eval()(IDS).logits


@pytest.mark.parametrize("system", ["loralib", "peft"])
@pytest.mark.parametrize("tool", ["Trainer", "Seq2SeqTrainer"])
def test_trainers_train_save_reload_and_resume(tool, system, tmp_path):
    row = runs.RUNS[tool](system, tmp_path)
    assert row["trains"] and row["reload_difference"] == 0 and row["resume_difference"] == 0
    assert row["checkpoint_bytes"] < row["model_bytes"] / 3


def test_what_is_saved_loads_everywhere(base, tmp_path):
    """Case tools/01: from_pretrained, a pipeline, PEFT and load_lora compute what the model in memory does."""
    model = draw(classifier(base))
    trainer(model, tmp_path / "run").save_model(tmp_path / "saved")
    folder, expected = tmp_path / "saved", output(model)
    assert {path.name for path in folder.iterdir()} == PEFTS | {"model.safetensors", "training_args.bin"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < (base / "model.safetensors").stat().st_size / 2
    assert torch.equal(output(AutoModelForSequenceClassification.from_pretrained(folder)), expected)
    again = AutoModelForSequenceClassification.from_pretrained(base)
    lora.load_lora(again, folder)
    assert torch.equal(output(again), expected)
    again = AutoModelForSequenceClassification.from_pretrained(base)
    assert torch.equal(output(peft.PeftModel.from_pretrained(again, folder)), expected)
    pipe = transformers.pipeline("text-classification", str(folder), tokenizer=runs.tokenizer(), top_k=None)
    with torch.no_grad():
        probabilities = model(**runs.tokenizer()("the red cat", return_tensors="pt")).logits.softmax(-1)[0]
    scores = [each["score"] for each in pipe(["the red cat"])[0]]
    assert sorted(scores) == pytest.approx(sorted(probabilities.tolist()))


@pytest.mark.parametrize("save_only_model", [False, True])
def test_the_best_model_is_loaded_at_the_end(base, tmp_path, save_only_model, caplog):
    scores = iter([1.0, 0.0])
    run = trainer(
        classifier(base),
        tmp_path / "run",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        eval_strategy="steps",
        eval_steps=3,
        save_only_model=save_only_model,
    )
    run.compute_metrics = lambda _: {"score": next(scores)}
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-3") and "keys" not in caplog.text
    best = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-3")
    last = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-6")
    assert torch.equal(output(run.model), output(best)) and not torch.equal(output(best), output(last))


RESUMED = {
    "alpha": ({"lora_alpha": 16}, "query: scaled by 2 in the checkpoint, by 4 in the model"),
    "scaling": ({"use_rslora": True}, "query: scaled by 2 in the checkpoint, by 4 in the model"),
    "rank": ({"r": 2, "lora_alpha": 4}, "size mismatch for .*lora_A"),
    "layers": ({"target_modules": ["query"]}, "another adapter than .*\n  4 layers in the checkpoint, 2 in the model"),
    "head": ({"modules_to_save": ["classifier", "LayerNorm"]}, r"another adapter than .*LayerNorm.bias: not in the"),
}


@pytest.mark.parametrize("changed, message", RESUMED.values(), ids=RESUMED)
def test_another_adapter_cannot_resume(base, tmp_path, changed, message):
    draw(classifier(base)).save_pretrained(tmp_path / "saved")
    model = AutoModelForSequenceClassification.from_pretrained(base)
    lora.inject_lora(model, **{"r": 4, "lora_alpha": 8, **changed})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){message}"):
        trainer(model, tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "saved"))
    if "r" not in changed:
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def quantized(kind):
    if kind == "int8":
        torchao = pytest.importorskip("torchao.quantization")
        return transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_bases_train_and_resume(kind, tmp_path):
    """Cases tools/02 and reports/11; no base beside the adapter in the folder."""
    path = runs.base(tmp_path, AutoModelForCausalLM, LlamaConfig(**{**SMALL, "hidden_size": 64}))
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]

    def load():
        return AutoModelForCausalLM.from_pretrained(path, quantization_config=quantized(kind), device_map="cpu")

    def train(folder, **more):
        model = runs.adapt("loralib", load())
        arguments = runs.arguments(transformers.TrainingArguments, str(tmp_path / folder))
        transformers.Trainer(model, arguments, train_dataset=rows).train(**more)
        return model

    whole = train("whole")
    resumed = train("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    again = load()
    lora.load_lora(again, tmp_path / "whole" / "checkpoint-6")
    assert torch.equal(output(resumed), output(whole)) and torch.equal(output(again), output(whole))
    assert not (tmp_path / "whole" / "checkpoint-6" / "config.json").exists()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(base, tmp_path, reentrant):
    kind = "activation" if hasattr(transformers.TrainingArguments, "activation_checkpointing") else "gradient"
    results = []
    for more in ({}, {f"{kind}_checkpointing": True, f"{kind}_checkpointing_kwargs": {"use_reentrant": reentrant}}):
        run = trainer(classifier(base, target_modules=["query", "value"]), tmp_path / "run", **more)
        run.train()
        results.append(runs.trained(run.model))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_images_reach_the_first_layers_through_checkpoints():
    """Models without token ids have no input that needs a gradient: transformers asks whether adapters are there."""
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    model = transformers.ViTForImageClassification(config)
    lora.inject_lora(model, r=2)
    name = "activation_checkpointing_enable"  # the name since transformers 5
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")({"use_reentrant": True})
    model.train()(torch.randn(2, 3, 8, 8)).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


# Where the base is.


def test_a_base_that_is_nowhere_else_is_saved_too(tmp_path):
    """Case tools/01 as it stands: a model from a configuration."""
    model = draw(runs.adapt("loralib", AutoModelForCausalLM.from_config(LLAMA)))
    for _ in range(2):  # again into the same folder
        draw(model)
        model.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} >= PEFTS | {"model.safetensors", "config.json"}
        assert torch.equal(output(AutoModelForCausalLM.from_pretrained(tmp_path)), output(model))
        again = AutoModelForCausalLM.from_config(LLAMA)
        again.load_state_dict({key: tensor for key, tensor in model.state_dict().items() if "lora" not in key})
        assert lora.load_lora(copy.deepcopy(again), tmp_path) == lora.load_lora(again, tmp_path / "model.safetensors")
        assert torch.equal(output(again), output(model))
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    state, results = copy.deepcopy(model.state_dict()), []
    for resume in (None, str(tmp_path / "run" / "checkpoint-3")):
        model.load_state_dict(state)
        arguments = runs.arguments(transformers.TrainingArguments, str(tmp_path / "run"))
        transformers.Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        results.append(output(model))
    assert torch.equal(*results)


def test_the_folder_of_the_base_keeps_its_weights(base):
    before = (base / "model.safetensors").read_bytes()
    model = draw(classifier(base))
    model.save_pretrained(base)
    assert (base / "model.safetensors").read_bytes() == before
    assert torch.equal(output(AutoModelForSequenceClassification.from_pretrained(base)), output(model))


def test_an_earlier_whole_model_in_the_folder_is_replaced(base, tmp_path):
    AutoModelForSequenceClassification.from_config(ROBERTA).save_pretrained(tmp_path / "old")
    model = draw(classifier(base))
    model.save_pretrained(tmp_path / "old")
    assert torch.equal(output(AutoModelForSequenceClassification.from_pretrained(tmp_path / "old")), output(model))


def merged_before(model):
    lora.merge_and_unload(draw(classifier_of(model)))
    return classifier_of(copy.deepcopy(model))


def unfrozen(model):
    model = classifier_of(model)
    for part in (model.roberta.encoder.layer[0].output.LayerNorm, model.roberta.encoder.layer[1].attention.self.query):
        part.requires_grad_(True)
    return model


def classifier_of(model):
    lora.inject_lora(model, r=2)
    return model


@pytest.mark.parametrize("change", [merged_before, unfrozen])
def test_what_the_base_does_not_have_is_saved(base, tmp_path, change):
    """An earlier adapter that was merged; layers that were unfrozen by hand."""
    model = draw(change(AutoModelForSequenceClassification.from_pretrained(base)))
    said = pytest.warns(UserWarning, match="LayerNorm, .*query: trained, and goes with the adapter, whole")
    with said if change is unfrozen else contextlib.nullcontext():
        model.save_pretrained(tmp_path / "saved")
    assert torch.equal(output(AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")), output(model))
    resumed = AutoModelForSequenceClassification.from_pretrained(base)
    resumed = unfrozen(resumed) if change is unfrozen else classifier_of(resumed)
    result = resumed.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"), strict=False)
    assert torch.equal(output(resumed), output(model)) and not result.missing_keys and not result.unexpected_keys
    if change is unfrozen:
        again = AutoModelForSequenceClassification.from_pretrained(base)
        lora.load_lora(again, tmp_path / "saved")
        assert torch.equal(output(again), output(model))
    else:
        lora.save_lora(model, tmp_path / "peft", format="peft")
        assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_a_pooler_that_the_base_does_not_have_is_trained(tmp_path):
    """Each load draws it anew."""
    config = transformers.BertConfig(**SMALL)
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers before version 5 does not tell what it drew")
    path = runs.base(tmp_path, transformers.AutoModelForMaskedLM, config)
    model = classifier(path)
    assert (
        model.bert.pooler.dense.weight.requires_grad and not model.bert.embeddings.word_embeddings.weight.requires_grad
    )
    draw(model).save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(path)
    lora.load_lora(again, tmp_path / "saved")
    for each in (again, AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")):
        assert torch.equal(output(each), output(model))
    lora.merge_and_unload(model).save_pretrained(tmp_path / "whole")  # which has one
    assert not classifier(tmp_path / "whole").bert.pooler.dense.weight.requires_grad


@pytest.mark.parametrize("form", ["of transformers", "of PEFT"])
def test_adapters_of_peft_in_the_model_are_refused(base, tmp_path, form):
    """Nothing that is saved of ours would hold them."""
    draw(classifier(base)).save_pretrained(tmp_path / "saved")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved" if form == "of transformers" else base
    )
    if form == "of PEFT":
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    for put in (
        lambda: lora.inject_lora(model, target_modules=["key"]),
        lambda: lora.load_lora(model, tmp_path / "saved"),
    ):
        with pytest.raises(
            ValueError, match="has an adapter of PEFT in it .*; nothing was changed. Load the base alone"
        ):
            put()


# States.

STATES = {
    "training": lambda model: model.train(),
    "merged": lora.merge_lora_weights,
    "merging by eval": lambda model: model.eval(),
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_saving_in_every_state(base, tmp_path, change):
    model = draw(classifier(base, merge_weights=change is STATES["merging by eval"]).train())
    expected = output(model)
    changed = change(model.train())
    (model if changed is None else changed).save_pretrained(tmp_path / "saved")
    reloaded = output(AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved"))
    torch.testing.assert_close(reloaded, expected, rtol=1e-5, atol=1e-6)
    with lora.disable_adapters(model):
        model.save_pretrained(tmp_path / "disabled")
    for name in ("adapter_model.safetensors", "adapter_config.json", "model.safetensors"):
        assert (tmp_path / "disabled" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_of_several_adapters_the_active_one_is_saved(base, tmp_path):
    model = draw(classifier(base))
    lora.inject_lora(model, r=2, adapter_name="other")
    draw(model)
    with pytest.warns(UserWarning, match="the active adapter, 'other', is saved, and not default; save each after"):
        model.save_pretrained(tmp_path / "saved")
    assert torch.equal(output(AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")), output(model))


def test_a_state_dict_that_is_given_counts(base, tmp_path):
    """As accelerate gives it, with the names that torch.compile makes: an average of weights, say."""
    model = draw(classifier(base))
    given = {
        f"_orig_mod.{name}": tensor / 2 if "lora_B" in name else tensor for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(tmp_path / "saved", state_dict=given)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(tensor, given[name]) for name, tensor in stored.items() if name != "lora_scalings")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.div_(2)
    assert torch.equal(output(AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")), output(model))
    with pytest.raises(ValueError, match="state_dict has no .*lora_A, .*, which the adapter has; nothing was written"):
        model.save_pretrained(tmp_path / "none", state_dict={"a": IDS})
    assert not (tmp_path / "none").exists()


def test_other_processes_write_nothing(base, tmp_path):
    classifier(base).save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="distributed_checkpoint=True: an adapter is saved whole"):
        classifier(base).save_pretrained(tmp_path / "saved", distributed_checkpoint=True)


def test_weights_that_deepspeed_partitions_are_refused(base, tmp_path, monkeypatch):
    """DeepSpeed itself is not installed here: it marks its Parameters with an `ds_id`."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    model, plain = draw(classifier(base)), AutoModelForSequenceClassification.from_pretrained(base)
    whole = model.state_dict()
    for each in (model, plain):
        each.classifier.out_proj.weight.ds_id = 1
    for call in (lambda: model.save_pretrained(tmp_path / "saved"), lambda: lora.inject_lora(plain)):
        with pytest.raises(ValueError, match="partitioned by DeepSpeed .*; nothing was done. Use ZeRO-2, or"):
            call()
    model.save_pretrained(tmp_path / "saved", state_dict=whole)  # as accelerate puts it together


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def test_models_within_models_save_their_adapters(base, tmp_path):
    """A wrapper of any kind; and the pretrained part of a classifier, without its head."""
    wrapper = Around(AutoModelForSequenceClassification.from_pretrained(base))
    lora.inject_lora(wrapper, r=2, target_modules=["query"])
    draw(wrapper).inner.save_pretrained(tmp_path / "saved")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(output(reloaded), output(wrapper.inner))
    wrapper.inner.roberta.save_pretrained(tmp_path / "part")
    part = transformers.AutoModel.from_pretrained(tmp_path / "part", add_pooling_layer=False).eval()
    with torch.no_grad():
        expected = wrapper.inner.roberta(IDS).last_hidden_state
        assert torch.equal(part(IDS).last_hidden_state, expected)
    lora.unload(wrapper)
    wrapper.inner.save_pretrained(tmp_path / "plain")
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {"config.json", "model.safetensors"}


def test_models_without_adapters_are_saved_whole(base, tmp_path):
    model = lora.merge_and_unload(draw(classifier(base)))
    model.save_pretrained(tmp_path / "merged")
    assert type(model) is transformers.RobertaForSequenceClassification and not model._hf_peft_config_loaded
    assert torch.equal(output(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")), output(model))
    by_hand = AutoModelForSequenceClassification.from_pretrained(base)
    by_hand.classifier.dense = lora.Linear(32, 32, r=2)
    lora.mark_only_lora_as_trainable(by_hand)
    by_hand.save_pretrained(tmp_path / "by hand")  # for classes that are written with their layers, as in 0.1.2
    assert load_file(tmp_path / "by hand" / "model.safetensors").keys() == by_hand.state_dict().keys()


def test_transformers_knows_the_class(base):
    """Its registries go by the name of a class, and its switches by the source."""
    model, plain = classifier(base), transformers.RobertaForSequenceClassification
    assert str(type(model)) == str(plain) and str(type(model.roberta)) == str(transformers.RobertaModel)
    states = [m.eval()(IDS, output_hidden_states=True).hidden_states for m in (model, lora.unload(model))]
    assert len(states[0]) == len(states[1]) == 3
    lora.inject_lora(model)
    assert model._can_set_attn_implementation()
    model.set_attn_implementation("eager")


@pytest.mark.parametrize(
    "name", ["add_adapter", "disable_adapters", "load_adapter", "set_adapter", "active_adapters", "dequantize"]
)
def test_methods_for_adapters_of_peft_are_refused(base, name):
    model = classifier(base)
    with pytest.raises(
        ValueError, match=f"{name} does not know the adapters of this model, .* loralib's: use .*lora\\."
    ):
        getattr(model, name)("x")
    with pytest.raises((ValueError, TypeError, OSError)) as caught:
        getattr(lora.unload(model), name)("x")
    assert "loralib" not in str(caught.value)


def test_classes_that_would_lose_the_adapter_refuse(tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    class OnTheHub(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

    model = OnTheHub()
    lora.inject_lora(model, r=2, target_modules=["layer"])
    with pytest.raises(ValueError, match="save_pretrained of huggingface_hub would write the adapter under names"):
        model.save_pretrained(tmp_path / "a")
    assert not os.listdir(tmp_path)
    lora.unload(model).save_pretrained(tmp_path / "a")


def test_pushing_pushes_the_adapter(base, monkeypatch):
    """`push_to_hub` saves with save_pretrained, into a folder of its own."""
    pushed = {}
    hub = sys.modules[type(classifier(base)).push_to_hub.__wrapped__.__module__]
    monkeypatch.setattr(
        hub, "hf_api", lambda: type("Api", (), {"create_repo": lambda *_, **__: type("R", (), {"repo_id": "u/n"})})()
    )
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: type("C", (), {"save": lambda *_: None}))
    model = draw(classifier(base))
    monkeypatch.setattr(
        type(model),
        "_upload_modified_files",
        lambda self, folder, *_, **__: pushed.update(
            json.loads((runs.Path(folder) / "adapter_config.json").read_text())
        ),
    )
    model.push_to_hub("u/n")
    assert pushed["r"] == 4


def _copy_a_layer(model):
    layers = model.roberta.encoder.layer
    layers.append(copy.deepcopy(layers[-1]))


def _another_table(model):
    table = model.roberta.embeddings.word_embeddings
    table.weight = nn.Parameter(table.weight.data.clone())


def _another_matrix(model):
    dense = model.roberta.encoder.layer[0].output.dense
    model.roberta.encoder.layer[0].output.dense = nn.Linear(dense.in_features, dense.out_features)


def _assigned(model):
    model.roberta.load_state_dict(model.roberta.state_dict(), assign=True)


@pytest.mark.parametrize("change", [_copy_a_layer, _another_table, _another_matrix, _assigned])
def test_what_a_user_puts_into_a_loaded_model_was_not_drawn_by_transformers(change, base):
    """Only the head and the layers of LoRA train."""
    model = AutoModelForSequenceClassification.from_pretrained(base)
    change(model)
    lora.inject_lora(model, r=2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or name.startswith("classifier.") for name in trained), trained


def test_a_whole_checkpoint_is_loaded_strictly(base, tmp_path):
    """One tensor of the base that is missing does not make it a checkpoint of the adapter alone."""
    model = draw(classifier(base))
    scalings = torch.tensor([layer.scaling for layer in _layers(model)], dtype=torch.float64)
    state = {**model.state_dict(), SCALINGS: scalings}
    fresh = classifier(base)
    assert fresh.load_state_dict(state, strict=True).missing_keys == []
    assert torch.equal(fresh.eval()(IDS).logits, model(IDS).logits)
    state["bogus"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="bogus"):
        classifier(base).load_state_dict(state, strict=True)
    del state["bogus"], state["roberta.encoder.layer.0.output.dense.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.output\.dense\.weight"):
        classifier(base).load_state_dict(state, strict=True)
    adapter = {key: tensor for key, tensor in state.items() if "lora" in key or key.startswith("classifier.")}
    assert classifier(base).load_state_dict(adapter, strict=True).missing_keys == []
    with pytest.raises(RuntimeError, match="bogus: in the checkpoint, and not in RobertaFor.*; nothing was loaded"):
        classifier(base).load_state_dict({**adapter, "bogus": torch.zeros(1)}, strict=True)


def _layers(model):
    return [module for _, module in sorted(model.named_modules()) if isinstance(module, lora.LoRALayer)]


def test_the_bias_of_one_adapted_layer_that_trains_goes_with_the_adapter(base, tmp_path):
    model = classifier(base)
    bias = model.roberta.encoder.layer[0].attention.self.query.bias
    bias.requires_grad_(True)
    draw(model)
    model.save_pretrained(tmp_path / "saved")
    fresh = AutoModelForSequenceClassification.from_pretrained(base)
    lora.load_lora(fresh, tmp_path / "saved")
    assert torch.equal(fresh.eval()(IDS).logits, model(IDS).logits)
    reader = peft.PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base), tmp_path / "saved"
    )
    assert (reader.eval()(IDS).logits - model(IDS).logits).abs().max() < 1e-5


def test_what_cannot_be_saved_with_the_adapter_is_named(tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {**small, "image_size": 8, "patch_size": 4}
    text = {**small, "vocab_size": 50, "max_position_embeddings": 8}
    clip = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=8)
    transformers.CLIPModel(clip).save_pretrained(tmp_path / "clip")
    model = transformers.CLIPModel.from_pretrained(tmp_path / "clip")
    lora.inject_lora(model, r=2, target_modules=["q_proj"])
    model.logit_scale.requires_grad_(True)
    with pytest.raises(ValueError, match="logit_scale of the CLIPModel itself: trained, but cannot be saved with the"):
        model.save_pretrained(tmp_path / "saved")
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**image))
    vit.save_pretrained(tmp_path / "vit")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "vit")
    lora.inject_lora(model, r=2, target_modules=["projection"])
    model.vit.embeddings.cls_token.requires_grad_(True)
    with pytest.raises(ValueError, match=r"cls_token of vit\.embeddings: trained.*patch_embeddings\.projection"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.vit.embeddings.cls_token.requires_grad_(False)
    model.save_pretrained(tmp_path / "saved")
