"""LoRA+: the groups of the optimizer are PEFT's, Parameter by Parameter.

Run alone: `pytest tests/test_loraplus.py`.
"""

import copy

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer as theirs_create
from torch import nn

import loralib as lora

RATES = {"lr": 1e-3, "loraplus_lr_ratio": 16.0}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.fc = nn.Embedding(10, 8), nn.Conv1d(8, 8, 3), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)


def grouped(optimizer, model):
    """By Parameter, under our names, the rate and the decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)].removeprefix("base_model.model.")
            for theirs, ours in ((".modules_to_save.default", ""), (".base_layer", ""), (".default.weight", "")):
                name = name.replace(theirs, ours)
            name = name.replace("lora_embedding_A.default", "lora_A").replace("lora_embedding_B.default", "lora_B")
            found[name] = (group["lr"], group["weight_decay"])
    return found


OPTIONS = {
    "plain": {},
    "biases": {"bias": "all"},
    "heads": {"modules_to_save": ["head", "norm"]},
    "decay": {"bias": "lora_only", "modules_to_save": ["norm"], "loraplus_weight_decay": 0.1},
    "embeddings": {"loraplus_lr_embedding": 3e-5, "loraplus_weight_decay": 0.2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_groups_are_those_of_peft(options):
    inject = {key: value for key, value in options.items() if not key.startswith("loraplus")}
    given = {
        **RATES,
        **{key: value for key, value in options.items() if key.startswith("loraplus")},
        "betas": (0.8, 0.9),
    }
    base = Model()
    ours = copy.deepcopy(base)
    lora.inject_lora(ours, r=2, target_modules=["embed", "conv", "fc"], **inject)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["embed", "conv", "fc"], **inject))
    optimizer = lora.create_loraplus_optimizer(ours, torch.optim.AdamW, **given)
    reference = theirs_create(theirs, torch.optim.AdamW, **given)
    assert grouped(optimizer, ours) == grouped(reference, theirs)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults == reference.defaults
    assert len(optimizer.param_groups) == len(reference.param_groups)  # a scheduler's state fits both


def test_a_step(tmp_path):
    """SGD with one rate for A and another for B: each moves by its own, by the literal formula."""
    layer = lora.Linear(4, 4, r=2, bias=False)
    nn.init.normal_(layer.lora_B)
    lora.mark_only_lora_as_trainable(layer)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    optimizer = lora.create_loraplus_optimizer(layer, torch.optim.SGD, lr=0.5, loraplus_lr_ratio=4)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.lora_A, before["lora_A"] - 0.5 * layer.lora_A.grad)
    torch.testing.assert_close(layer.lora_B, before["lora_B"] - 2.0 * layer.lora_B.grad)
    assert torch.equal(layer.weight, before["weight"])


def test_nothing_to_train():
    model = Model().requires_grad_(False)
    with pytest.raises(ValueError, match="Model trains nothing; call lora.inject_lora"):
        lora.create_loraplus_optimizer(model, torch.optim.AdamW, **RATES)
