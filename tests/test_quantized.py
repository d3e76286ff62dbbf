"""LoRA on int8 weights of torchao: trains, matches the dequantised formula, is saved, switched and taken off again.

Run alone: `pytest tests/test_quantized.py`.
"""

import copy

import pytest
import torch
from architectures import ARCHITECTURES
from torch import nn

import loralib as lora

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install '.[test]'")

LLAMA = ARCHITECTURES["Llama"]


def quantized(build=LLAMA.build):
    model = build()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def dequantized(model):
    """The same model with the weights that int8 stands for, in floating point."""
    plain = LLAMA.build()
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            weight = model.get_submodule(name).weight
            assert type(weight).__name__ == "Int8Tensor"
            module.weight = nn.Parameter(weight.dequantize())
    return plain


def randomize(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_outputs_and_gradients_are_those_of_the_dequantised_formula(targets):
    model = quantized()
    plain = dequantized(model)
    for each in (model, plain):
        names = lora.inject_lora(each, r=2, target_modules=targets)
    randomize(model)
    plain.load_state_dict(lora.lora_state_dict(model), strict=False)
    outputs = []
    for each in (model.train(), plain.train()):
        loss = each(**LLAMA.inputs(), labels=LLAMA.inputs()["input_ids"]).loss
        loss.backward()
        outputs.append(loss)
    torch.testing.assert_close(*outputs)
    for name in names:
        ours, wanted = model.get_submodule(name), plain.get_submodule(name)
        for part in ("lora_A", "lora_B"):
            torch.testing.assert_close(getattr(ours, part).grad, getattr(wanted, part).grad, rtol=1e-4, atol=1e-6)
        assert ours.weight.grad is None


def test_training_lowers_the_loss_and_leaves_the_weights():
    model = quantized()
    lora.inject_lora(model, r=2)
    before = [module.weight.dequantize().clone() for module in model.modules() if isinstance(module, nn.Linear)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**LLAMA.inputs(), labels=LLAMA.inputs()["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = [module.weight.dequantize() for module in model.modules() if isinstance(module, nn.Linear)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_eval_does_not_merge_and_merging_for_good_is_refused():
    """A merged copy would be in floating point, four times the size; asked for by hand it is exact."""
    model = quantized()
    names = lora.inject_lora(model, r=2)
    randomize(model)
    wanted = LLAMA.output(model.eval())
    layer = model.get_submodule(names[0])
    assert not layer.merged
    with pytest.raises(ValueError, match=f"{names[0]}: the weight is quantised .Int8Tensor.*nothing was merged"):
        lora.merge_and_unload(model)
    torch.testing.assert_close(LLAMA.output(lora.merge_lora_weights(model)), wanted)
    assert layer.weight.dtype == torch.float32 and type(layer.weight) is nn.Parameter


def test_files_and_unloading(tmp_path):
    model = quantized()
    plain = LLAMA.output(model)
    types = {name: type(module) for name, module in model.named_modules()}
    weights = {name: id(parameter) for name, parameter in model.named_parameters()}
    lora.inject_lora(model, r=2)
    randomize(model)
    wanted = LLAMA.output(model)
    lora.save_lora(model, tmp_path / "a.safetensors")
    lora.save_lora(model, tmp_path / "peft", format="peft")
    lora.unload(model)
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == weights
    assert torch.equal(LLAMA.output(model), plain)
    for path in ("a.safetensors", "peft"):
        loaded = copy.deepcopy(model)
        lora.load_lora(loaded, tmp_path / path)
        assert torch.equal(LLAMA.output(loaded), wanted)
