"""The adapter nearest to a full fine-tune: against the singular values of the dense change, in float64.

Run alone: `pytest tests/test_extract.py`.
"""

import copy
import re

import pytest
import torch
import transformers
from architectures import BART, BERT, SHORT, attention
from small_model import INDEX, assert_unchanged, small_model, snapshot
from test_combine import KINDS, LAYOUTS, assert_equal, attention_kinds, base_values, best_of_rank, randomize, updates
from torch import nn

import loralib as lora

MIXTRAL = {**BERT, "num_local_experts": 3, "num_key_value_heads": 2, "experts_implementation": "eager"}


def tuned_of(model, only="", seed=1):
    """A copy of the model with every tensor changed whose name holds `only`."""
    tuned = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if only in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return tuned


def changes(model, tuned):
    base, after = base_values(model), base_values(tuned)
    return {key: after[key] - base[key] for key in base}


@pytest.mark.parametrize("r", [1, 2])
def test_each_kind_is_the_best_of_its_rank(r, tmp_path):
    model = attention_kinds().double()
    tuned = tuned_of(model)
    wanted = changes(model, tuned)
    extraction = lora.extract_lora(model, tuned, r=r)
    assert not extraction.left_out
    assert set(KINDS) < extraction.layers.keys() and {"rnn.bias_ih_l0", "linear.bias"} < extraction.saved.keys()
    found = updates(model, "default")
    for key, (layout, rows) in LAYOUTS.items():
        matrices = layout(wanted[key]).reshape(-1, *layout(wanted[key]).shape[-2:])
        best = torch.stack([best_of_rank(matrix, r * rows) for matrix in matrices])
        torch.testing.assert_close(layout(found[key]).reshape(best.shape), best, atol=1e-12, rtol=0, msg=key)
        told = extraction.layers[key.removesuffix(".weight")]
        assert told.change == pytest.approx(wanted[key].norm().item())
        assert told.energy == pytest.approx((best.norm() / wanted[key].norm()).item() ** 2)
        assert told.r == r
    for key in extraction.saved:
        torch.testing.assert_close(found[key], wanted[key], atol=1e-12, rtol=0, msg=key)
    total = sum(value.norm() ** 2 for value in wanted.values())
    missed = sum((found[key] - wanted[key]).norm() ** 2 for key in wanted)
    assert extraction.energy == pytest.approx(1 - (missed / total).item())
    lora.save_lora(model, tmp_path / "adapter")
    again = attention_kinds()
    again.load_state_dict(lora.unload(copy.deepcopy(model)).state_dict())
    lora.load_lora(again.double(), tmp_path / "adapter")
    assert_equal(updates(again, "default"), found, 1e-5)


@pytest.mark.parametrize("kind", ["GPT2", "Roberta", "Bart", "Mixtral"])
def test_at_full_rank_the_model_computes_as_the_fine_tune(kind, tmp_path):
    options = {
        "GPT2": ("GPT2LMHeadModel", "GPT2Config", SHORT),
        "Roberta": ("RobertaForSequenceClassification", "RobertaConfig", BERT),
        "Bart": ("BartForConditionalGeneration", "BartConfig", BART),
        "Mixtral": ("MixtralForCausalLM", "MixtralConfig", MIXTRAL),
    }[kind]  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, options[0])(getattr(transformers, options[1])(**options[2])).double().eval()
    tuned = tuned_of(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    extraction = lora.extract_lora(model, tuned, energy=1)
    assert not extraction.left_out and extraction.energy == pytest.approx(1)
    inputs = attention()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, tuned(**inputs).logits, atol=1e-8, rtol=0)
        lora.save_lora(model, tmp_path / "adapter")
        again = lora.unload(model)
        for key, value in again.state_dict().items():
            assert torch.equal(value, before[key]), key
        lora.load_lora(again, tmp_path / "adapter")
        torch.testing.assert_close(again(**inputs).logits, tuned(**inputs).logits, atol=1e-4, rtol=0)


def test_the_smallest_rank_that_holds_the_energy():
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Conv2d(4, 6, 3, bias=False)).double()
    tuned = copy.deepcopy(model)
    left, right = (torch.linalg.qr(torch.randn(n, 5, dtype=torch.float64)).Q for n in (5, 6))
    with torch.no_grad():
        tuned[0].weight += left * torch.tensor([4.0, 2, 1, 0, 0]) @ right.T  # squares 16, 4, 1 of 21
        tuned[1].weight += 1
    for energy, r in [(16 / 21 - 1e-9, 1), (16 / 21 + 1e-9, 2), (20 / 21 - 1e-9, 2), (0.999, 3), (1, 3)]:
        extraction = lora.extract_lora(copy.deepcopy(model), tuned, energy=energy)
        assert (extraction.layers["0"].r, extraction.layers["1"].r) == (r, 1), energy
        assert extraction.layers["0"].energy >= energy - 1e-12


def test_groups():
    model = small_model(torch.float64)
    tuned = tuned_of(model, "c_attn.weight")
    wanted = changes(model, tuned)["c_attn.weight"].T.chunk(3)
    extraction = lora.extract_lora(model, tuned, r=2, enable_lora=[True, False, True])
    best = [best_of_rank(group, 2) for group in wanted]
    torch.testing.assert_close(updates(model, "default")["c_attn.weight"],
                               torch.cat([best[0], 0 * best[1], best[2]]).T, atol=1e-12, rtol=0)  # fmt: skip
    share = (best[0].norm() ** 2 + best[2].norm() ** 2) / torch.cat(wanted).norm() ** 2
    assert extraction.layers["c_attn"].energy == pytest.approx(share.item())


@pytest.mark.parametrize("how", ["state dict", "without the tied name", "parallel", "compiled", "half"])
def test_forms_of_the_tuned(how):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHORT)).eval()
    tuned = tuned_of(model)
    wanted = tuned(**attention()).logits
    given = {
        "state dict": lambda: tuned.state_dict(),
        "without the tied name": lambda: {k: v for k, v in tuned.state_dict().items() if k != "lm_head.weight"},
        "parallel": lambda: {f"module.{k}": v for k, v in tuned.state_dict().items()},
        "compiled": lambda: torch.compile(tuned, backend="eager"),
        "half": lambda: tuned.bfloat16(),
    }[how]()
    extraction = lora.extract_lora(model, given, r=16)
    assert {"transformer.wte", "lm_head"} < extraction.layers.keys()
    torch.testing.assert_close(model(**attention()).logits, wanted, atol=0.2 if how == "half" else 1e-4, rtol=0)


def test_what_is_tied_in_the_base_and_not_in_the_tuned():
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHORT)).eval()
    tuned = copy.deepcopy(model)
    tuned.lm_head.weight = nn.Parameter(torch.randn(50, 16))
    wanted = tuned(**attention()).logits
    for options in ({}, {"modules_to_save": ["lm_head"], "target_modules": ["lm_head", "wte"]}):
        again = copy.deepcopy(model)
        tuned.transformer.wte.weight.data.add_(0.0 if not options else 1.0)
        wanted = tuned(**attention()).logits
        lora.extract_lora(again, tuned, r=16, **options)
        torch.testing.assert_close(again(**attention()).logits, wanted, atol=1e-4, rtol=0)


def test_what_is_not_extracted_is_named():
    model = small_model(torch.float64)
    tuned = tuned_of(model)
    with pytest.warns(
        UserWarning, match=r"not in the adapter, though the models differ there: conv\.weight, image"
    ) as told:
        extraction = lora.extract_lora(model, tuned, r=1, target_modules=["embed", "first"], modules_to_save=["head"])
    assert told[0].filename == __file__
    assert extraction.left_out.keys() == {"conv.weight", "image.weight", "c_attn.weight"}
    assert extraction.layers.keys() == {"embed", "first"} and "head.weight" in extraction.saved
    assert f"{extraction.energy:.1%} of the change" in str(told[0].message)
    shown = str(extraction)
    assert re.search(r"c_attn\.weight +left out +\d+\.\d+ +0\.0%", shown) and len(set(map(len, shown.split("\n")))) == 1


def test_only_what_differs_gets_something():
    model = small_model(torch.float64)
    extraction = lora.extract_lora(model, tuned_of(model, "first"), r=2, target_modules=["first", "conv"])
    assert extraction.layers.keys() == {"first"} and not extraction.saved and not extraction.left_out
    assert type(model.conv) is nn.Conv1d and [n for n, p in model.named_parameters() if p.requires_grad] == [
        "first.lora_A", "first.lora_B",
    ]  # fmt: skip


def test_targets_are_named_as_for_inject_lora():
    model = small_model(torch.float64)
    tuned = tuned_of(model)
    for options, layers in [
        ({"target_modules": "all-linear", "modules_to_save": ["head"]}, {"c_attn", "first"}),
        ({"target_modules": r"c_.*|first", "exclude_modules": ["first"], "modules_to_save": ["head"]}, {"c_attn"}),
        ({"target_parameters": ["head.weight"]}, {"head.weight"}),
        ({"exclude_modules": ["embed"]}, {"conv", "image", "c_attn", "first", "head"}),
    ]:
        with pytest.warns(UserWarning, match="not in the adapter"):
            extraction = lora.extract_lora(copy.deepcopy(model), tuned, r=1, **options)
        assert extraction.layers.keys() == layers


def test_a_parametrized_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, 2))
    tuned = tuned_of(model)
    extraction = lora.extract_lora(model, tuned, r=5)
    assert not extraction.left_out
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), tuned(x), atol=1e-5, rtol=0)


def test_beside_another_adapter_merged():
    model = small_model(torch.float64)
    tuned = tuned_of(model)
    plain = base_values(model)
    lora.inject_lora(model, r=2, target_modules=["first", "embed"], adapter_name="a", modules_to_save=["head"])
    randomize(model, 3)
    lora.merge_lora_weights(model)
    before = updates(model, "a")
    lora.extract_lora(model, tuned, r=8, adapter_name="full")
    torch.testing.assert_close(model(INDEX), tuned(INDEX), atol=1e-10, rtol=0)
    assert_equal(updates(model, "a"), before, 0)
    assert_equal(base_values(model), plain, 0)
    lora.combine_adapters(model, ["full", "a"], [1.0, 0.5], "both")
    wanted = {key: value + 0.5 * before[key] for key, value in updates(model, "full").items()}
    assert_equal(updates(model, "both"), wanted)


def test_a_quantised_base_gets_its_error_back():
    torchao = pytest.importorskip("torchao.quantization")
    tuned = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4))
    model = copy.deepcopy(tuned)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    lora.extract_lora(model, tuned, energy=1)
    x = torch.randn(3, 32)
    torch.testing.assert_close(model(x), tuned(x), atol=1e-4, rtol=0)


def test_norms_with_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)).eval()
    tuned = tuned_of(model)
    tuned.train()(torch.randn(8, 3, 5))
    tuned.eval()
    extraction = lora.extract_lora(model, tuned, r=3)
    assert not extraction.left_out
    x = torch.randn(8, 3, 5)
    torch.testing.assert_close(model(x), tuned(x), atol=1e-5, rtol=0)


REFUSED = {
    "neither": ({}, "give one of the two"),
    "both": ({"r": 1, "energy": 0.5}, "give one of the two"),
    "rank": ({"r": 0}, "at least 1"),
    "energy": ({"energy": 1.5}, "at most 1"),
    "three": ({"r": 1, "enable_lora": [True]}, "must be three booleans"),
    "name": ({"r": 1, "adapter_name": ""}, "a string that is not empty"),
    "target": ({"r": 1, "target_modules": ["query"]}, "nothing in the model is called 'query'"),
    "norm": ({"r": 1, "target_modules": ["norm"]}, "which LoRA cannot adapt"),
    "groups": (
        {"r": 1, "target_modules": ["first"], "enable_lora": [True, False, True]},
        "none of the targets is a fused",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    options, message = REFUSED[case]
    model = small_model()
    tuned, before = tuned_of(model), snapshot(model)
    with pytest.raises((ValueError, TypeError), match=message):
        lora.extract_lora(model, tuned, **options)
    assert_unchanged(model, before)


def _with_adapter(model):
    lora.inject_lora(model, r=1, target_modules=["first"])
    return model


def _resized(model):
    model.embed = nn.Embedding(12, 8)
    return model


def _nan(model):
    model.first.weight.data[0, 0] = float("nan")
    return model


TUNED = {
    "the same": (lambda model: model, ValueError, "nothing to extract"),
    "adapters": (_with_adapter, ValueError, r"tuned has LoRA layers \(first\): merge a copy"),
    "another size": (_resized, ValueError, r"embed.weight: \(12, 8\) in tuned, \(9, 8\) in the base"),
    "NaN": (_nan, ValueError, "first.weight: NaN or infinity in tuned"),
    "names": (lambda model: {"first.weight": model.first.weight, "x.y": model.first.weight}, ValueError,
              r"embed.weight: missing in tuned(.|\n)*x.y: unexpected in tuned"),
    "meta": (lambda model: model.to("meta"), ValueError, "on the meta device"),
    "a path": (lambda model: "model.safetensors", TypeError, "must be a model or its state dict"),
}  # fmt: skip


@pytest.mark.parametrize("case", TUNED)
def test_a_tuned_that_does_not_fit(case):
    change, error, message = TUNED[case]
    model = small_model()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        lora.extract_lora(model, change(small_model()), r=1)
    assert_unchanged(model, before)


def test_the_head_of_a_classifier_is_kept_whole():
    torch.manual_seed(0)
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**BERT))
    extraction = lora.extract_lora(model, tuned_of(model), r=1)
    assert {"classifier.dense.weight", "classifier.out_proj.bias"} < extraction.saved.keys()
    assert not any("classifier" in name for name in extraction.layers)
