"""`reference_model`: what a model computed then, on the same base. The oracle is a deep copy.

python -m pytest tests/test_reference.py
"""

import copy
import types

import pytest
import torch
from reference import randomize
from small_model import INDEX, TARGETS, small_model
from torch import nn

import loralib as lora


def adapted(**more):
    model = small_model()
    lora.inject_lora(model, r=2, target_modules=TARGETS, **more)
    randomize(model)
    return model.eval()


def two(model):
    lora.inject_lora(model, r=1, target_modules=["first"], adapter_name="other")
    randomize(model)
    return model


CASES = {
    "adapter": lambda: adapted(),
    "head and biases": lambda: adapted(modules_to_save=["head"], bias="all"),
    "merged": lambda: lora.merge_lora_weights(adapted()),
    "merging by eval": lambda: adapted(merge_weights=True),
    "several": lambda: two(adapted()),
    "training": lambda: adapted().train(),
    "made by hand": lambda: nn.Sequential(lora.Embedding(9, 8, r=2), lora.Linear(8, 3, r=2)),
    "no adapter": small_model,
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_it_computes_what_the_model_did(make):
    model = make()
    before = copy.deepcopy(model).eval()
    places = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    reference = lora.reference_model(model)
    merged = any(getattr(module, "merged", False) for module in model.modules())
    assert merged or {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == places
    trained = [p for p in model.parameters() if p.requires_grad]
    shared = {id(p) for p in model.parameters() if not p.requires_grad}
    if not merged:
        own = [p for p in reference.parameters() if id(p) not in shared]
        assert sum(p.numel() for p in own) == sum(p.numel() for p in trained)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model.train()(INDEX).sum().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(reference(INDEX), before(INDEX))
        assert not torch.allclose(model.eval()(INDEX), before(INDEX))
    assert not any(p.requires_grad for p in reference.parameters()) and not reference.training
    assert lora.active_adapter(reference) == lora.active_adapter(model)
    assert len(lora.list_adapters(reference)) == (1 if lora.list_adapters(model) else 0)


@pytest.mark.parametrize("make", [lambda: adapted(modules_to_save=["head"]), CASES["made by hand"]])
def test_within_disable_adapters_it_is_the_base(make):
    model = make()
    with lora.disable_adapters(model):
        expected, reference = model(INDEX), lora.reference_model(model)
    torch.testing.assert_close(reference(INDEX), expected)
    assert not torch.allclose(model(INDEX), expected) or isinstance(model, nn.Sequential)
    assert lora.list_adapters(reference) == [] and lora.list_adapters(model) == ["default"]


def test_weights_that_are_trained_in_place_are_copied():
    model = nn.Sequential(lora.Linear(4, 4, r=2), nn.Linear(4, 2))
    lora.mark_only_lora_as_trainable(model, modules_to_save=["1"])
    reference = lora.reference_model(model)
    assert reference[1].weight is not model[1].weight and reference[0].weight is model[0].weight


def test_its_adapter_can_leave_without_the_model_noticing():
    model = adapted(modules_to_save=["head"])
    expected = model(INDEX)
    lora.unload(lora.reference_model(model))
    assert torch.equal(model(INDEX), expected)


def test_a_forward_that_calls_the_model_is_refused():
    """TRL puts such a one there."""
    model = adapted()
    original = model.forward
    model.forward = types.MethodType(lambda self, x: original(x), model)
    with pytest.raises(ValueError, match="SmallModel.forward was replaced by a function that calls the model it was"):
        lora.reference_model(model)
    model.forward = original
    lora.reference_model(model)


def test_with_hooks_of_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = adapted()
    accelerate.hooks.add_hook_to_module(model.first, accelerate.hooks.ModelHook())
    reference, expected = lora.reference_model(model), model(INDEX).detach()
    nn.init.ones_(model.first.lora_B)
    assert torch.equal(reference(INDEX), expected)


def test_statistics_of_a_model_without_adapters_are_copied():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    x = torch.randn(8, 4)
    before, reference = copy.deepcopy(model).eval(), lora.reference_model(model)
    model.train()(x)
    assert torch.equal(reference(x), before(x))


@pytest.mark.parametrize("of", ["model", "reference"])
def test_merging_for_good_changes_the_one_alone(of):
    model = adapted()
    reference = lora.reference_model(model)
    expected = reference(INDEX)
    one, other = (model, reference) if of == "model" else (reference, model)
    lora.merge_and_unload(one)
    assert torch.equal(other(INDEX), expected)


def test_buffers_that_training_changes_are_copied():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("average", torch.zeros(8))

        def forward(self, x):
            if self.training:
                self.average.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            return x - self.average

    model = nn.Sequential(Average(), nn.Linear(8, 8))
    lora.inject_lora(model, r=2, target_modules=["1"])
    reference, x = lora.reference_model(model), torch.randn(2, 8)
    expected = reference(x)
    model.train()(x + 3)
    assert torch.equal(reference(x), expected)


@pytest.mark.parametrize("make", [lora.share_base, lora.reference_model])
def test_a_layer_merged_by_hand_is_unmerged_for_the_copy_alone(make):
    model = nn.Sequential(lora.Linear(8, 8, r=2))
    randomize(model)
    model[0].weight.data += model[0].delta_weight()
    model[0].merged = True
    x = torch.randn(2, 8)
    expected = model(x)
    make(model).train()
    assert torch.equal(model(x), expected)
