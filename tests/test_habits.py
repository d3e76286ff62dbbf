"""What goes wrong by habit, in notebooks and from other libraries: the error says what to do.

Run alone: `pytest tests/test_habits.py`.
"""

import copy
import importlib
import json
import pickle
import sys

import pytest
import torch
import transformers
from torch import nn

import loralib as lora


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


INPLACE = "change the model in place and return the names of the adapted layers: write lora.inject_lora"
USES = {
    "called": lambda model: model(torch.ones(1, 4)),
    "parameters": lambda model: model.parameters(),
    "train": lambda model: model.train(),
    "to": lambda model: model.to("cpu"),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("how", ["inject", "load"])
def test_the_result_is_no_model(use, how, tmp_path):
    """`model = lora.inject_lora(model)`, as get_peft_model is used."""
    model = build()
    result = lora.inject_lora(model, r=2, target_modules=["0"])
    if how == "load":
        lora.save_lora(model, tmp_path / "a")
        result = lora.load_lora(model, tmp_path / "a")
    with pytest.raises((AttributeError, TypeError), match=INPLACE):
        use(result)


def test_the_result_is_a_list_for_all_else():
    result = lora.inject_lora(build(), r=2, target_modules=["0"])
    assert result == ["0"] and isinstance(result, list) and repr(result) == "['0']" and result + ["1"] == ["0", "1"]
    assert json.dumps(result) == '["0"]' and sorted(result) == ["0"]
    for again in (copy.copy(result), copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert again == ["0"]
    assert not hasattr(result, "parameters")


def test_the_summary_has_the_percentage():
    model = build()
    lora.inject_lora(model, r=1, target_modules=["0"])
    count = lora.count_parameters(model)
    assert (count.trainable, count.total) == (8, 38) and count.percentage == pytest.approx(100 * 8 / 38)
    assert str(count) == "8 of 38 parameters are trained (21.05 %)" and repr(count).startswith("ParameterCount(")
    assert str(lora.count_parameters(nn.Identity())) == "0 of 0 parameters are trained (0.00 %)"


@pytest.mark.parametrize("into", ["base", "the adapter", "beside another", "by hand"])
@pytest.mark.parametrize("form", ["loralib", "peft"])
def test_an_adapter_that_is_not_trained(form, into, tmp_path):
    """Adapter, head and base are frozen, and stay so when adapters are switched."""
    source = build()
    head = {} if into == "by hand" else {"modules_to_save": ["1"]}
    lora.inject_lora(source, r=2, target_modules=["0"], **head)
    lora.save_lora(source, tmp_path / "a", format=form)
    model, name = build(), "default"
    if into == "by hand":
        model[0] = lora.Linear(4, 4, r=2)
        lora.mark_only_lora_as_trainable(model)
    elif into == "the adapter":
        lora.inject_lora(model, r=2, target_modules=["0"], **head)
    elif into == "beside another":
        lora.inject_lora(model, r=3, target_modules=["0"], adapter_name="trained")
        name = "reference"
    lora.load_lora(model, tmp_path / "a", name, trainable=False)
    assert lora.count_parameters(model).trainable == 0
    if into == "beside another":
        lora.set_adapter(model, "trained")
        assert lora.count_parameters(model).trainable == 24
        lora.set_adapter(model, "reference")
        assert lora.count_parameters(model).trainable == 0
    if into == "base":
        again = build()
        lora.load_lora(again, tmp_path / "a")
        assert lora.count_parameters(again).trainable == 16 + 10


@pytest.fixture
def anew():
    """loralib imported again, and back to the first import afterwards."""
    first = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "loralib"}
    yield importlib.import_module("loralib")
    for name in [name for name in sys.modules if name.partition(".")[0] == "loralib"]:
        del sys.modules[name]
    sys.modules.update(first)


AFTER = {
    "save": lambda again, model, path: again.save_lora(model, path),
    "load": lambda again, model, path: again.load_lora(model, path),
    "inject": lambda again, model, path: again.inject_lora(model, target_modules=["1"]),
    "merge": lambda again, model, path: again.merge_lora_weights(model),
    "merge and unload": lambda again, model, path: again.merge_and_unload(model),
    "unload": lambda again, model, path: again.unload(model),
    "unmerge": lambda again, model, path: again.unmerge_lora_weights(model),
    "disable": lambda again, model, path: again.disable_adapters(model).__enter__(),
}


@pytest.mark.parametrize("use", AFTER.values(), ids=AFTER)
@pytest.mark.parametrize("by_hand", [True, False])
def test_layers_of_an_earlier_import_are_not_taken_for_plain_ones(by_hand, use, anew, tmp_path):
    model = build()
    if by_hand:
        model[0] = lora.Linear(4, 4, r=2)
    else:
        lora.inject_lora(model, r=2, target_modules=["0"])
    lora.save_lora(model, tmp_path / "a")
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"has a Linear of an earlier import of loralib.*Restart the notebook's"):
        use(anew, model, tmp_path / "a")
    assert [type(module) for module in model.modules()] == classes
    assert lora.list_adapters(model) == ["default"] and anew.inject_lora(build(), r=1, target_modules=["1"]) == ["1"]


def test_reloading_the_package_alone_does_no_harm(tmp_path):
    model = build()
    lora.inject_lora(model, r=2, target_modules=["0"])
    importlib.reload(lora)
    lora.save_lora(model, tmp_path / "a")
    assert lora.load_lora(build(), tmp_path / "a") == ["0"]


class Linear(nn.Module):
    """Another library's, with the name of torch's."""


def test_a_class_that_is_called_like_torchs_is_named_in_full():
    model = nn.Sequential(nn.ModuleDict({"attention": Linear()}))
    with pytest.raises(TypeError, match=r"^0.attention is a test_habits.Linear, which LoRA cannot adapt; nn.Linear, "):
        lora.inject_lora(model, r=2, target_modules=["attention"])


def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))


def roberta():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(vocab_size=32, **sizes))


ARGUMENTS = {  # what is injected, with what, and what the message says
    "underscore": (llama, {"target_modules": "all_linear"}, 'did you mean target_modules="all-linear"?'),
    "in a list": (llama, {"target_modules": ["all-linear"]}, 'did you mean target_modules="all-linear"?'),
    "large": (llama, {"target_modules": "All-Linear"}, 'did you mean target_modules="all-linear"?'),
    "nothing fused": (llama, {"enable_lora": [False, True, False]}, "none of the targets is a fused projection whose"),
    "name of the base": (llama, {"adapter_name": "__base__"}, "that is the base, among the names for the rows of a"),
    "within a head": (
        roberta,
        {"target_modules": ["query", "classifier.dense"]},
        "'classifier.dense' is in classifier, which is trained whole; leave it out, or pass modules_to_save=[]",
    ),
}


@pytest.mark.parametrize("build, options, message", ARGUMENTS.values(), ids=ARGUMENTS)
def test_an_argument_that_is_not_meant_so(build, options, message):
    model = build()
    with pytest.raises(ValueError) as caught:
        lora.inject_lora(model, **options)
    assert message in str(caught.value) and not lora.list_adapters(model)


def test_a_block_is_no_layer():
    with pytest.raises(TypeError, match="self_attn is a LlamaAttention, which LoRA cannot adapt; .* Name the layers"):
        lora.inject_lora(llama(), target_modules=["self_attn"])
    with pytest.raises(TypeError, match=r"r=\.\.\.: the rank must be an integer, not LoraConfig"):
        lora.inject_lora(llama(), pytest.importorskip("peft").LoraConfig(r=4))


def test_files_that_are_not_there(tmp_path):
    model = build()
    with pytest.raises(FileNotFoundError, match=r"typo\.bin: no such adapter file"):
        lora.load_lora(model, tmp_path / "typo.bin", lora_alpha=16)
    lora.inject_lora(model, r=2, target_modules=["0"])
    lora.save_lora(model, tmp_path / "adapter.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no adapter of PEFT; give the file, one of adapter\.safetensors"):
        lora.load_lora(build(), tmp_path)
    with pytest.raises(ValueError, match="new/ is a folder; give the name of a file"):
        lora.save_lora(model, f"{tmp_path}/new/")
    assert not (tmp_path / "new").exists()


def test_adapters_of_peft_are_saved_by_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install -e '.[test]'")
    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="those of PEFT are saved by its own save_pretrained"):
        lora.save_lora(model, tmp_path / "a.safetensors")


@pytest.mark.filterwarnings("ignore")  # of the tiny configuration
@pytest.mark.parametrize("how", ["given", "positional", "in a block"])
def test_generate_is_told_of_every_prompt(how):
    """Too few names would look like those of beams."""
    model = llama().eval()
    for name in "ab":
        lora.inject_lora(model, r=2, adapter_name=name)
    ids = torch.arange(1, 9).reshape(4, 2)
    with pytest.raises(ValueError, match="2 names of adapters for a batch of 4: give one for each row"):
        if how == "in a block":
            with lora.adapters_per_row(model, ["a", "b"]):
                model.generate(ids, max_new_tokens=1)
        elif how == "positional":
            model.generate(ids, adapter_names=["a", "b"], max_new_tokens=1)
        else:
            model.generate(input_ids=ids.repeat_interleave(1, 0), adapter_names=["a", "b"], max_new_tokens=1)
    with pytest.raises(ValueError, match="1 names of adapters for a batch of 4: give one for each row"):
        model.generate(ids, adapter_names=["a"], max_new_tokens=1)
    model.generate(ids[:1], adapter_names=["a"], num_beams=3, max_new_tokens=2)
