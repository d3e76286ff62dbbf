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
