"""One adapter out of several: the dense formula in float64 for every kind of layer, and PEFT itself for every method.

Run alone: `pytest tests/test_combine.py`.
"""

import copy
import math

import peft
import pytest
import torch
import transformers
from architectures import BERT, attention
from small_model import INDEX, TARGETS, assert_unchanged, small_model, snapshot
from torch import nn
from transformers.pytorch_utils import Conv1D

import loralib as lora
from loralib.combine import METHODS

PRUNING = [method for method in METHODS if "ties" in method or "dare" in method or "prune" in method]


class Experts(nn.Module):
    """A stack of matrices, and a bare one, that no layer holds."""

    def __init__(self, transposed=False):
        super().__init__()
        self.is_transposed = transposed
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
        self.bare = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        weights = self.gate_up_proj.mT if self.is_transposed else self.gate_up_proj
        return torch.stack(
            [
                x[:, : each.shape[1]] @ each.T @ (self.bare if i else self.bare.neg())[:, : each.shape[0]].T
                if each.shape[0] == 8
                else x[:, : each.shape[1]] @ each.T
                for i, each in enumerate(weights)
            ]
        ).sum((0, 2))


def attention_kinds():
    """Linear layers of all kinds; a convolution of each number of axes, in groups, with a kernel that is no square."""
    return nn.ModuleDict({
        "linear": nn.Linear(7, 5), "conv1d": Conv1D(6, 8), "embedding": nn.Embedding(11, 6, padding_idx=0),
        "one": nn.Conv1d(4, 6, 3), "two": nn.Conv2d(4, 6, (3, 2)), "groups": nn.Conv2d(4, 6, 3, groups=2),
        "three": nn.Conv3d(2, 3, (2, 1, 3)), "rnn": nn.LSTM(5, 4), "mha": nn.MultiheadAttention(8, 2),
        "experts": Experts(), "turned": Experts(transposed=True),
    })  # fmt: skip


KINDS = ["linear", "conv1d", "embedding", "one", "two", "groups", "three"]
BARE = ["weight_ih_l0", "in_proj_weight", "gate_up_proj", "bare"]


def randomize(model, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)


def updates(model, name):
    """What adapter `name` adds to each tensor of the base, by name, from what the library merges: {} where nothing."""
    before = base_values(model)
    alone = copy.deepcopy(model)
    lora.set_adapter(alone, name)
    after = base_values(lora.merge_and_unload(alone))
    return {key: after[key] - before[key] for key in before if before[key].is_floating_point()}


def base_values(model):
    model = lora.unload(copy.deepcopy(model))
    return {key: value.double() for key, value in model.state_dict().items()}


def weighted(model, weights):
    found = {name: updates(model, name) for name in weights}
    return {key: sum(w * found[name][key] for name, w in weights.items()) for key in found[next(iter(weights))]}


def assert_equal(found, wanted, atol=1e-12):
    for key in wanted:
        torch.testing.assert_close(
            found[key], wanted[key], atol=atol, rtol=0, msg=lambda text, key=key: f"{key}: {text}"
        )


def two_adapters(model, first, second):
    for seed, (name, options) in enumerate([("a", first), ("b", second)]):
        lora.inject_lora(model, adapter_name=name, **{"modules_to_save": [], **options})
        randomize(model, seed)
    return model


# What the two adapters are given: the same, different ranks and alphas, different places, every kind of tensor.
PAIRS = {
    "alike": (small_model, {"r": 2, "target_modules": TARGETS}, {"r": 2, "target_modules": TARGETS}),
    "ranks": (small_model, {"r": 1, "lora_alpha": 3, "target_modules": TARGETS},
              {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": TARGETS}),
    "places": (small_model, {"r": 2, "target_modules": ["embed", "conv"]},
               {"r": 1, "target_modules": ["image", "first"]}),
    "heads": (small_model, {"r": 2, "target_modules": ["c_attn"], "modules_to_save": ["head"], "bias": "lora_only"},
              {"r": 2, "target_modules": ["conv"], "modules_to_save": ["head", "norm"], "bias": "all"}),
    "groups": (small_model, {"r": 2, "target_modules": ["c_attn"], "enable_lora": [True, False, True]},
               {"r": 3, "target_modules": ["c_attn"], "enable_lora": [False, True, True]}),
    "group and whole": (small_model, {"r": 2, "target_modules": ["c_attn"], "enable_lora": [True, False, True]},
                        {"r": 3, "target_modules": ["c_attn"]}),
    "rows": (small_model, {"r": 2, "target_modules": ["first"], "trainable_token_indices": {"embed": [1, 4]}},
             {"r": 2, "target_modules": ["head"], "trainable_token_indices": {"embed": [4, 7, 0]}}),
    "whole and low-rank": (small_model, {"r": 2, "target_modules": ["first"], "modules_to_save": ["head"]},
                           {"r": 2, "target_modules": ["head"]}),
    "kinds": (attention_kinds, {"r": 2, "target_modules": KINDS, "target_parameters": BARE},
              {"r": 3, "lora_alpha": 7, "target_modules": KINDS, "target_parameters": BARE}),
    "in_proj": (attention_kinds, {"r": 2, "target_parameters": ["in_proj_weight"], "enable_lora": [True, False, True]},
                {"r": 1, "target_parameters": ["in_proj_weight"]}),
}  # fmt: skip


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
def test_concatenation_is_the_dense_sum(pair, merged, tmp_path):
    make, first, second = PAIRS[pair]
    model = two_adapters(make().double(), first, second)
    if merged:
        lora.merge_lora_weights(model.eval())
    weights = {"a": 0.75, "b": -1.5}
    wanted = weighted(model, weights)
    before = {name: updates(model, name) for name in weights}
    names = lora.combine_adapters(model, list(weights), list(weights.values()), "new")
    assert lora.active_adapter(model) == "new" and lora.list_adapters(model) == ["a", "b", "new"]
    assert any(module.merged for module in model.modules() if isinstance(module, lora.LoRALayer)) == merged
    found = updates(model, "new")
    assert_equal(found, wanted)
    for name in weights:  # the others are as they were
        assert_equal(updates(model, name), before[name], 0)
    lora.save_lora(model, tmp_path / "new")
    again = make().double()
    assert lora.load_lora(again, tmp_path / "new") == names
    assert_equal(updates(again, "default"), wanted, 1e-5)  # the file is float32


def best_of_rank(matrix, r):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :r] * values[:r] @ right[:r]


# How the update of each is the product of two matrices, as the documentation says, and how many of rank 1 a rank is.
LAYOUTS = {
    "linear.weight": (lambda x: x, 1), "conv1d.weight": (lambda x: x.T, 1), "embedding.weight": (lambda x: x.T, 1),
    "one.weight": (lambda x: x.reshape(6, 12), 1), "two.weight": (lambda x: x.reshape(18, 8), 3),
    "groups.weight": (lambda x: x.reshape(9, 12), 3), "three.weight": (lambda x: x.reshape(6, 6), 2),
    "rnn.weight_ih_l0": (lambda x: x, 1), "mha.in_proj_weight": (lambda x: x, 1),
    "experts.gate_up_proj": (lambda x: x, 1), "turned.gate_up_proj": (lambda x: x.mT, 1),
}  # fmt: skip


@pytest.mark.parametrize("r", [None, 1, 2, 4, 100])
def test_svd_is_the_best_of_its_rank(r):
    make, first, second = PAIRS["kinds"]
    model = two_adapters(make().double(), first, second)
    wanted = weighted(model, {"a": 1.0, "b": -0.5})
    lora.combine_adapters(model, ["a", "b"], [1.0, -0.5], "new", "svd", r=r)
    found = updates(model, "new")
    for key, (layout, rows) in LAYOUTS.items():
        matrices = layout(wanted[key]).reshape(-1, *layout(wanted[key]).shape[-2:])
        best = torch.stack([best_of_rank(matrix, (r or 3) * rows) for matrix in matrices])
        torch.testing.assert_close(layout(found[key]).reshape(best.shape), best, atol=1e-12, rtol=0, msg=key)
    assert model.linear.r == min(r or 3, 5)


def test_svd_of_groups_is_the_best_of_each_group():
    make, first, second = PAIRS["groups"]
    model = two_adapters(make().double(), first, second)
    wanted = weighted(model, {"a": 1.0, "b": 2.0})["c_attn.weight"].T.chunk(3)
    lora.combine_adapters(model, ["a", "b"], [1.0, 2.0], "new", "svd", r=2)
    best = torch.cat([best_of_rank(group, 2) for group in wanted]).T
    torch.testing.assert_close(updates(model, "new")["c_attn.weight"], best, atol=1e-12, rtol=0)


def test_interleaved_groups():
    config = transformers.GPTNeoXConfig(**BERT)
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(config).double()
    two_adapters(model, {"r": 2, "target_modules": ["query_key_value"], "enable_lora": [True, False, True]},
                 {"r": 1, "target_modules": ["query_key_value"], "enable_lora": [True, True, False]})  # fmt: skip
    wanted = weighted(model, {"a": 0.5, "b": 2.0})
    lora.combine_adapters(model, ["a", "b"], [0.5, 2.0], "new")
    assert_equal(updates(model, "new"), wanted)


# PEFT on the same factors, method by method: also with negative weights, of layers that one of them has only.


def peft_twin():
    torch.manual_seed(0)
    base = nn.ModuleDict({
        "linear": nn.Linear(7, 5), "other": nn.Linear(6, 6), "embedding": nn.Embedding(11, 6), "conv1d": Conv1D(6, 8),
        "conv": nn.Conv2d(4, 6, 1), "wide": nn.Conv1d(4, 6, 3), "square": nn.Conv2d(4, 6, 3),
    }).double()  # fmt: skip
    return base


PEFT_TARGETS = {"a": ["linear", "other", "embedding", "conv", "wide"], "b": ["linear", "embedding", "conv", "wide"]}


def in_peft(folder, names):
    theirs = None
    for name in names:
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(peft_twin().float(), folder / name, adapter_name=name)
        else:
            theirs.load_adapter(folder / name, adapter_name=name)
    return theirs


def updates_of_peft(theirs, name):
    base = peft_twin()
    found = {}
    for path in dict(base.named_children()).keys() & theirs.base_model.model.keys():
        layer = theirs.base_model.model[path]
        if hasattr(layer, "get_delta_weight") and name in [*layer.lora_A, *layer.lora_embedding_A]:
            found[f"{path}.weight"] = layer.get_delta_weight(name).double()
    return found


@pytest.mark.parametrize("weights", [(0.7, 1.4), (1.0, -0.6)], ids=["sum", "difference"])
@pytest.mark.parametrize("method", METHODS)
def test_as_peft_has_it(method, weights, tmp_path, monkeypatch):
    model = peft_twin()
    for seed, (name, targets) in enumerate(PEFT_TARGETS.items()):
        lora.inject_lora(model, r=2, lora_alpha=3 + seed, target_modules=targets, adapter_name=name)
        randomize(model, seed)
        for parameter in model.parameters():
            parameter.data = parameter.data.float().double()  # what the file holds
        lora.save_lora(model, tmp_path / name, format="peft")
    theirs = in_peft(tmp_path, PEFT_TARGETS)
    if method.endswith("svd"):  # PEFT takes a kernel with one axis for a matrix, and torch raises
        del theirs.base_model.model["wide"]
    options = {"density": 0.6} if method in PRUNING else {}
    # PEFT draws the new adapter first, and that as it pleases.
    prune = peft.utils.merge_utils.random_pruning
    seeds = iter([3])
    monkeypatch.setattr(
        peft.utils.merge_utils,
        "random_pruning",
        lambda *args, **kw: ([*map(torch.manual_seed, seeds)], prune(*args, **kw))[1],
    )
    theirs.add_weighted_adapter(["a", "b"], list(weights), "new", combination_type=method, **options)
    torch.manual_seed(3)
    lora.combine_adapters(model, ["a", "b"], weights, "new", method, **options)
    wanted, found = updates_of_peft(theirs, "new"), updates(model, "new")
    assert len(wanted) == 4 + (not method.endswith("svd"))
    if method in ("dare_linear_svd", "dare_ties_svd"):  # its mask lies otherwise, of as many entries
        del wanted["embedding.weight"]
    assert_equal(found, wanted, 1e-5)


def test_a_different_election_as_peft(tmp_path):
    test_options = {"density": 0.5, "majority_sign_method": "frequency"}
    model = peft_twin()
    for seed, name in enumerate("abc"):
        lora.inject_lora(model, r=2, target_modules=["linear", "other"], adapter_name=name)
        randomize(model, seed)
        lora.save_lora(model, tmp_path / name, format="peft")
    theirs = in_peft(tmp_path, "abc")
    for method in ("ties", "ties_svd"):
        theirs.add_weighted_adapter(list("abc"), [1.0, 2.0, 0.5], method, combination_type=method, **test_options)
        lora.combine_adapters(model, list("abc"), [1.0, 2.0, 0.5], method, method, **test_options)
        assert_equal(updates(model, method), updates_of_peft(theirs, method), 1e-5)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
def test_what_is_combined_computes_the_same_in_peft(tmp_path):
    model = peft_twin()
    lora.inject_lora(model, r=1, lora_alpha=3, target_modules=["linear", "conv1d", "square"], adapter_name="a")
    randomize(model, 0)
    lora.inject_lora(model, r=3, target_modules=["linear", "embedding"], adapter_name="b", use_rslora=True)
    randomize(model, 1)
    lora.combine_adapters(model, ["a", "b"], [1.0, -2.0], "new")
    assert {path: layer.r for path, layer in model.named_children() if hasattr(layer, "r")} == {
        "linear": 4, "conv1d": 1, "square": 1, "embedding": 3,
    }  # fmt: skip
    lora.save_lora(model, tmp_path / "new", format="peft")
    theirs = in_peft(tmp_path, ["new"])
    found, wanted = updates_of_peft(theirs, "new"), updates(model, "new")
    assert found.keys() == {"linear.weight", "conv1d.weight", "square.weight", "embedding.weight"}
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], atol=1e-5, rtol=0, msg=key)


# What is trained whole: the method is applied to the changes.


@pytest.mark.parametrize("method", METHODS)
def test_heads_get_the_combination_of_the_changes(method):
    make, first, second = PAIRS["heads"]
    model = two_adapters(make().double(), {**first, "r": 2}, second)
    base, changes = base_values(model), {name: updates(model, name) for name in "ab"}
    density = 0.5
    lora.combine_adapters(model, ["a", "b"], [1.5, -0.5], "new", method, density=density if method in PRUNING else None,
                          generator=torch.Generator().manual_seed(1) if "dare" in method else None)  # fmt: skip
    found = updates(model, "new")
    a, b = (changes[name]["head.weight"] for name in "ab")
    if method not in PRUNING:
        torch.testing.assert_close(found["head.weight"], 1.5 * a - 0.5 * b, atol=1e-12, rtol=0)
        torch.testing.assert_close(found["norm.weight"], -0.5 * changes["b"]["norm.weight"], atol=1e-12, rtol=0)
    elif "dare" not in method:
        keep = a.numel() // 2
        a, b = (x * (x.abs() >= x.abs().flatten().sort(descending=True).values[keep - 1]) for x in (a, b))
        wanted = 1.5 * a - 0.5 * b
        if "ties" in method:
            sign = torch.where(a + b >= 0, 1, -1)
            agree = [(x.sign() == sign).double() for x in (a, b)]
            wanted = (1.5 * a * agree[0] - 0.5 * b * agree[1]) / sum(agree).clamp(min=1)
        torch.testing.assert_close(found["head.weight"], wanted, atol=1e-12, rtol=0)
    else:
        assert 0 < (found["head.weight"] == 0).sum() < a.numel()
    assert base.keys() == found.keys()


def test_dare_draws_from_the_generator_and_only_from_it():
    model = two_adapters(small_model().double(), *PAIRS["alike"][1:])
    found = []
    for number, seed in enumerate([7, 7, 8]):
        before = torch.get_rng_state()
        generator = torch.Generator().manual_seed(seed)
        lora.combine_adapters(
            model, ["a", "b"], [1, 1], f"new{number}", "dare_linear", density=0.5, generator=generator
        )
        found.append(updates(model, f"new{number}"))
        torch.set_rng_state(before)
    assert_equal(found[1], found[0], 0)
    assert not torch.equal(found[2]["first.weight"], found[0]["first.weight"])


def test_dare_is_right_on_average():
    model = nn.Sequential(nn.Linear(40, 40, bias=False))
    lora.inject_lora(model, r=2, target_modules=["0"], adapter_name="a")
    randomize(model, 0)
    wanted = updates(model, "a")["0.weight"]
    generator = torch.Generator().manual_seed(0)
    total = 0
    for number in range(60):
        lora.combine_adapters(model, ["a"], [1], f"{number}", "dare_linear_svd", r=40, density=0.5, generator=generator)
        total = total + updates(model, f"{number}")["0.weight"] / 60
    assert ((total - wanted).norm() / wanted.norm()).item() == pytest.approx(1 / math.sqrt(60), rel=0.1)


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_one_adapter_is_scaled(method):
    model = small_model().double()
    lora.inject_lora(model, r=2, lora_alpha=3, target_modules=TARGETS, adapter_name="a")
    randomize(model, 0)
    lora.combine_adapters(model, ["a"], torch.tensor([-0.5]), "new", method)
    assert_equal(updates(model, "new"), {key: -0.5 * value for key, value in updates(model, "a").items()})
    assert all(layer.r == 2 for layer in model.modules() if isinstance(layer, lora.LoRALayer))


def test_an_adapter_minus_itself_is_the_base():
    model = two_adapters(small_model().double(), *PAIRS["ranks"][1:])
    lora.combine_adapters(model, ["a", "a"], [1, -1], "none")
    with lora.disable_adapters(model):
        wanted = model(INDEX)
    torch.testing.assert_close(model(INDEX), wanted, atol=1e-12, rtol=0)


# States in which it is called.


@pytest.mark.parametrize("active", ["a", "b"])
def test_within_disable_adapters(active):
    make, first, second = PAIRS["heads"]
    model = two_adapters(make().double(), first, second)
    lora.set_adapter(model, active)
    wanted = weighted(model, {"a": 1.0, "b": 1.0})
    with lora.disable_adapters(model):
        lora.combine_adapters(model, ["a", "b"], [1, 1], "new")
    assert_equal(updates(model, "new"), wanted)
    assert lora.active_adapter(model) == "new"


def test_the_base_is_untouched_and_what_trains_is_the_new_one():
    model = two_adapters(small_model(), *PAIRS["heads"][1:])
    before = {
        key: (value, value.clone()) for key, value in copy.copy(lora.unload(copy.deepcopy(model))).state_dict().items()
    }
    lora.combine_adapters(model, ["a", "b"], [1, 1], "new")
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "weight", "bias"}  # of the head and the norm
    model(INDEX).sum().backward()
    for key, (_, value) in before.items():
        assert torch.equal(lora.unload(copy.deepcopy(model)).state_dict()[key], value), key


def test_layers_made_by_hand():
    model = nn.Sequential(
        lora.Linear(8, 6, r=2, lora_alpha=4), lora.MergedLinear(6, 9, r=1, enable_lora=[True, False, True])
    )
    randomize(model.double(), 0)
    wanted = updates(model, "default")
    lora.combine_adapters(model, ["default"], [0.5], "half")
    assert lora.list_adapters(model) == ["default", "half"]
    assert_equal(updates(model, "half"), {key: value / 2 for key, value in wanted.items()}, 1e-7)


def test_half_precision_and_a_compiled_wrapper():
    model = two_adapters(small_model(torch.bfloat16), *PAIRS["heads"][1:])
    wanted = weighted(model, {"a": 1.0, "b": 1.0})
    lora.combine_adapters(torch.compile(model, backend="eager"), ["a", "b"], [1, 1], "new")
    assert model.c_attn.lora_A.dtype == torch.float32 and model.head.weight.dtype == torch.float32
    assert_equal(updates(model, "new"), wanted, 0.1)


def test_a_quantised_base():
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    for seed, name in enumerate("ab"):
        lora.inject_lora(model, r=2, target_modules=["0", "1"], adapter_name=name)
        randomize(model, seed)
    x, outputs = torch.randn(3, 32), {}
    for name in "ab":
        lora.set_adapter(model, name)
        outputs[name] = model[0](x)
    lora.combine_adapters(model, ["a", "b"], [1, 1], "new")
    with lora.disable_adapters(model):
        plain = model[0](x)
    torch.testing.assert_close(model[0](x), outputs["a"] + outputs["b"] - plain, atol=1e-4, rtol=0)


def test_statistics_that_differ_are_the_bases_and_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4))
    for seed, name in enumerate("ab"):
        lora.inject_lora(model, r=1, target_modules=["0"], adapter_name=name)
        randomize(model, seed)
        model.train()(torch.randn(8, 3, 5))
    with pytest.warns(UserWarning, match=r"1\.running_mean.*the new adapter has the base's"):
        lora.combine_adapters(model, ["a", "b"], [1, 1], "new")
    assert torch.equal(model[1].running_mean, torch.zeros(4))


# What is refused, and that nothing has changed then.

REFUSED = {
    "a name": (["a", "c"], [1, 1], "new", {}, ValueError, "no adapter 'c'; the model has 'a', 'b'"),
    "a text": ("ab", [1, 1], "new", {}, TypeError, "must be a list of names"),
    "none": ([], [], "new", {}, ValueError, "at least one"),
    "too few": (["a", "b"], [1], "new", {}, ValueError, "one for each of"),
    "NaN": (["a", "b"], [1, math.nan], "new", {}, ValueError, "must be finite"),
    "no number": (["a", "b"], [1, "2"], "new", {}, TypeError, "'2' is no number"),
    "a boolean": (["a", "b"], [1, True], "new", {}, TypeError, "True is no number"),
    "too large": (["a", "b"], [1e300, 1], "new", {}, ValueError, "float32 cannot hold"),
    "taken": (["a", "b"], [1, 1], "a", {}, ValueError, "the model has that adapter"),
    "no new name": (["a", "b"], [1, 1], "", {}, ValueError, "must be a string that is not empty"),
    "method": (["a", "b"], [1, 1], "new", {"method": "average"}, ValueError, "must be one of 'cat', 'svd'"),
    "rank of cat": (["a", "b"], [1, 1], "new", {"r": 2}, ValueError, "has a rank of its own"),
    "rank 0": (["a", "b"], [1, 1], "new", {"method": "svd", "r": 0}, ValueError, "at least 1"),
    "no rank": (["a", "b"], [1, 1], "new", {"method": "svd", "r": 2.0}, TypeError, "must be an integer"),
    "ranks": (["a", "b"], [1, 1], "new", {"method": "linear"}, ValueError, "the ranks in embed are 1, 3"),
    "no density": (["a", "b"], [1, 1], "new", {"method": "ties"}, ValueError, "'ties' needs one"),
    "a density": (["a", "b"], [1, 1], "new", {"density": 0.5}, ValueError, "'cat' takes none"),
    "density 0": (["a", "b"], [1, 1], "new", {"method": "ties", "density": 0.0}, ValueError, "over 0"),
    "election": (["a", "b"], [1, 1], "new", {"majority_sign_method": "x"}, ValueError, "'total' or 'frequency'"),
    "generator": (["a", "b"], [1, 1], "new", {"generator": torch.Generator()}, ValueError, "draws nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    adapters, weights, name, options, error, message = REFUSED[case]
    model = two_adapters(small_model(), *PAIRS["ranks"][1:])
    before = snapshot(model)
    with pytest.raises(error, match=message):
        lora.combine_adapters(model, adapters, weights, name, **options)
    assert_unchanged(model, before)


@pytest.mark.parametrize("disabled", [False, True])
def test_an_adapter_with_nan_is_refused(disabled):
    model = two_adapters(small_model(), *PAIRS["alike"][1:])
    with torch.no_grad():
        model.first.lora_B[0, 0] = math.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"first\.lora_B of adapter 'b' holds NaN"), lora.disable_adapters(model):
        lora.combine_adapters(model, ["a", "b"], [1, 1], "new")
    model.first.lora_B.data.nan_to_num_()
    before["values"]["first.lora_B"].nan_to_num_()
    before["values"]["second.lora_B"].nan_to_num_()
    assert_unchanged(model, {**before, "parameters": snapshot(model)["parameters"]})


EXCLUDE = {
    "rows and low rank": ({"r": 1, "target_modules": ["first"], "trainable_token_indices": {"embed": [1]}},
                          {"r": 1, "target_modules": ["embed"]}, "trains rows of it"),
    "rows and whole": ({"r": 1, "target_modules": ["first"], "trainable_token_indices": {"embed": [1]}},
                       {"r": 1, "target_modules": ["first"], "modules_to_save": ["embed"]}, "trains rows of it"),
    "layer and parameter": ({"r": 1, "target_modules": ["head"]}, {"r": 1, "target_parameters": ["head.weight"]},
                            "adapts the Parameter"),
}  # fmt: skip


@pytest.mark.parametrize("case", EXCLUDE)
def test_what_excludes_each_other_is_refused(case):
    first, second, message = EXCLUDE[case]
    model = two_adapters(small_model(), first, second)
    before = dict(model.state_dict())
    with pytest.raises(ValueError, match=message):
        lora.combine_adapters(model, ["a", "b"], [1, 1], "new")
    assert (lora.list_adapters(model), lora.active_adapter(model)) == (["a", "b"], "b")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_language_model_with_tied_rows(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BERT, tie_word_embeddings=True)).double()
    options = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": []}
    two_adapters(model, {**options, "trainable_token_indices": [3, 5]}, {**options, "trainable_token_indices": [5, 9]})
    wanted = weighted(model, {"a": 1.0, "b": 0.5})
    lora.combine_adapters(model, ["a", "b"], [1, 0.5], "new")
    assert model.lm_head.lora_rows_weight is model.model.embed_tokens.lora_rows_weight
    assert_equal(updates(model, "new"), wanted)
    lora.save_lora(model, tmp_path / "new", format="peft")
    theirs = peft.PeftModel.from_pretrained(lora.unload(copy.deepcopy(model)), tmp_path / "new")
    inputs = attention()
    torch.testing.assert_close(theirs(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)
