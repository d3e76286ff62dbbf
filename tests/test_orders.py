"""Calls in unusual orders, and models that do unusual things: the right numbers, or an error that names the cause.

The oracle is the same model done in a plain order, or a copy made before. Run alone: `pytest tests/test_orders.py`.
"""

import contextlib
import copy
import json
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import fusion, parametrizations, prune
from torch.utils.checkpoint import checkpoint

import loralib as lora

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(10)


def small(**layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def drawn(model, names=("a",), targets=("0",), **options):
    """The model with adapters, all of whose numbers are random."""
    torch.manual_seed(1)
    for name in names:
        lora.inject_lora(model, r=2, target_modules=list(targets), adapter_name=name, **options)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
    return model


def close(one, other, within=1e-5):
    return bool((one - other).abs().max() <= within)


# Within disable_adapters.

WITHIN = {
    "switch": lambda model: lora.set_adapter(model, "b"),
    "inject": lambda model: lora.inject_lora(model, r=2, target_modules=["0"], adapter_name="c"),
    "combine": lambda model: lora.combine_adapters(model, ["a", "b"], [1, 1], "c"),
    "unload": lora.unload,
    "nothing": lambda model: None,
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("what", WITHIN)
def test_the_base_stays_whatever_is_done_while_adapters_are_disabled(what, merged):
    model = small()
    base = copy.deepcopy(model).eval()
    drawn(model, "ba", modules_to_save=["2"])
    if merged:
        lora.merge_lora_weights(model.eval())
    with lora.disable_adapters(model):
        WITHIN[what](model)
    lora.unload(model)
    assert all(torch.equal(one, base.state_dict()[key]) for key, one in model.state_dict().items())


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", "ab")
def test_what_is_switched_on_while_adapters_are_disabled_computes_whole(name, merged):
    model = drawn(small(), "ba", modules_to_save=["2"])
    lora.set_adapter(model, name)
    wanted = model(X)
    lora.set_adapter(model, "a")
    if merged:
        lora.merge_lora_weights(model.eval())
    with lora.disable_adapters(model):
        lora.set_adapter(model, name)
        assert close(model(X), wanted)
    assert close(model(X), wanted)


def test_a_layer_by_hand_that_was_set_to_eval_while_disabled_is_not_subtracted_from():
    model = nn.Sequential(lora.Linear(8, 8, r=2), nn.Linear(8, 2))
    nn.init.normal_(model[0].lora_B)
    weight = model[0].weight.detach().clone()
    with lora.disable_adapters(model):
        model.eval()
        lora.inject_lora(model, r=2, target_modules=["0"], adapter_name="b")
    lora.set_adapter(model, "default")
    assert torch.equal(lora.unload(model)[0].weight, weight)


def test_a_forward_in_training_mode_while_disabled_leaves_the_statistics_of_the_base():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    before = copy.deepcopy(model.state_dict())
    lora.inject_lora(model, r=2, target_modules=["0"])
    with lora.disable_adapters(model.train()):
        model(X)
    lora.unload(model)
    assert all(torch.equal(one, before[key]) for key, one in model.state_dict().items())


def test_marking_while_disabled_marks_the_adapters_head_and_not_the_bases():
    model = drawn(small(), modules_to_save=["2"])
    with lora.disable_adapters(model):
        lora.mark_only_lora_as_trainable(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "0.lora_A", "0.lora_B", "2.weight", "2.bias"
    ]  # fmt: skip
    assert not any(parameter.requires_grad for parameter in lora.unload(model).parameters())


# Shared bases.


@pytest.mark.parametrize("share", [lora.share_base, lora.reference_model])
def test_writing_into_a_merged_weight_writes_into_one_model_alone(share):
    model = drawn(small())
    other = share(model).eval()
    theirs = other(X)
    lora.merge_lora_weights(model.eval())
    model[0].weight.data.mul_(2)
    mine = model(X)
    assert close(lora.unmerge_lora_weights(model)(X), mine) and torch.equal(other(X), theirs)


@pytest.mark.parametrize("tied", [False, True])
def test_loading_into_a_copy_of_layers_by_hand_leaves_the_shared_base(tied, tmp_path):
    def by_hand():
        model = nn.Sequential(lora.Linear(8, 8, r=2), nn.Linear(8, 8), nn.Linear(8, 8))
        if tied:
            model[2].weight = model[1].weight
        return model

    lora.save_lora(by_hand(), tmp_path / "a.safetensors", modules_to_save=["1"], bias="all")
    model = by_hand()
    other, wanted = lora.share_base(model), model(X)
    lora.load_lora(other, tmp_path / "a.safetensors")
    assert torch.equal(model(X), wanted) and not torch.equal(other(X), wanted)
    assert (other[2].weight is other[1].weight) == tied


# Weights that are read past the forward of their layer.


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.by_name = nn.ModuleDict({"a": nn.Linear(8, 8)})

    def forward(self, x):
        for layer in self.layers:
            x = F.linear(x, layer.weight, layer.bias)
        return F.linear(x, self.by_name["a"].weight)


class Subscript(Loop):
    def forward(self, x):
        assert self.layers[0].weight.dtype == x.dtype
        return F.linear(x, self.layers[0].weight.T) + self.layers[1](x)


class Named(Loop):
    def forward(self, x):
        return F.linear(x, getattr(self.layers[0], "weight")) + getattr(self.by_name, "a").weight.sum()  # noqa: B009


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(10, 8)

    def get_logits(self, hidden):
        return F.linear(hidden, self.emb.weight)

    def forward(self, ids):
        return self.get_logits(self.emb(ids))


class Entities(Tied):
    def score_entities(self, hidden):
        return hidden @ self.emb.weight.T

    def forward(self, ids):
        return self.score_entities(self.emb(ids))


class Local(Tied):
    def forward(self, ids):
        table = self.emb
        return F.linear(table(ids), table.weight)


def head(table, hidden):
    return F.linear(hidden, table.weight)


class Helper(Tied):
    def forward(self, ids):
        return head(self.emb, self.emb(ids))


READ = {
    "a loop": (Loop, ["0", "1", "a"], X),
    "a subscript": (Subscript, ["0", "1"], X),
    "by name": (Named, ["0", "a"], X),
    "get_": (Tied, ["emb"], IDS),
    "entities": (Entities, ["emb"], IDS),
    "a local": (Local, ["emb"], IDS),
    "a helper": (Helper, ["emb"], IDS),
}


@pytest.mark.parametrize("case", READ)
def test_a_weight_that_others_read_is_the_sum(case):
    cls, targets, x = READ[case]
    torch.manual_seed(0)
    model = drawn(cls(), targets=targets)
    got = model(x)
    got.sum().backward()
    adapter = [p for name, p in model.named_parameters() if "lora_" in name]
    assert all(p.grad is not None and p.grad.any() for p in adapter)
    merged = lora.merge_lora_weights(copy.deepcopy(model).eval())(x)
    plain = lora.merge_and_unload(copy.deepcopy(model))(x)
    scale = float(plain.abs().max())
    assert close(got, plain, 1e-5 * scale) and close(merged, plain, 1e-5 * scale)
    with lora.disable_adapters(model):
        disabled = model(x)
    assert torch.equal(lora.unload(model)(x), disabled)


@pytest.mark.parametrize("case", READ)
def test_rows_of_a_weight_that_others_read_are_refused(case):
    cls, targets, x = READ[case]
    model = drawn(cls(), "ab", targets).eval()
    with pytest.raises(ValueError, match="read.*past its forward"), torch.no_grad():  # noqa: PT012, SIM117
        with lora.adapters_per_row(model, ["a", "b"] * (len(x) // 2) + ["a"] * (len(x) % 2)):
            model(x)


def test_outside_of_forwards_the_weight_is_the_base():
    model = drawn(small())
    assert model[0].weight is model[0]._parameters["weight"] and isinstance(model[0].weight, nn.Parameter)


# What is tied.


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(self.mid(self.emb(ids)))


def test_combining_gives_tied_tensors_the_values_of_each():
    model = Table()
    weight = model.emb.weight.detach().clone()
    for name, end, change in (("e", "emb", 1), ("h", "head", -2)):
        lora.inject_lora(model, r=2, target_modules=["mid"], modules_to_save=[end], adapter_name=name)
        getattr(model, end).weight.data.add_(change)
    lora.combine_adapters(model, ["e", "h"], [1.0, 1.0], "both")
    assert close(model.emb.weight, weight + 1) and close(model.head.weight, weight - 2)


def test_combining_what_was_extracted_of_an_untied_model_computes_the_same():
    model, tuned = Table(), Table()
    tuned.load_state_dict(model.state_dict())
    tuned.head.weight = nn.Parameter(tuned.head.weight.detach() + torch.randn(10, 4))
    tuned.mid.weight.data.add_(torch.randn(4, 4))
    lora.extract_lora(model, tuned, r=2, target_modules=["mid"], modules_to_save=["emb", "head"], adapter_name="a")
    wanted = model(IDS)
    lora.combine_adapters(model, ["a"], [1.0], "b")
    assert close(model(IDS), wanted)


# Recurrent layers keep their weights in a list, too.


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.lstm(x)[0])


@pytest.mark.parametrize("then", ["switch", "unload", "merge"])
def test_biases_of_recurrent_layers_go_with_their_adapter(then):
    model = Recurrent()
    base = model(X)
    lora.inject_lora(model, r=2, target_parameters=["weight_hh_l0"], bias="lora_only", adapter_name="a")
    model.lstm.bias_ih_l0.data.add_(1)
    adapted = copy.deepcopy(model)(X)
    if then == "switch":
        lora.inject_lora(model, r=2, target_modules=["out"], adapter_name="b")
    elif then == "unload":
        lora.unload(model)
    else:
        lora.merge_and_unload(model).requires_grad_(True)
        model(X).sum().backward()
        assert model.lstm.bias_ih_l0.grad.any()
    assert close(model(X), adapted if then == "merge" else base)


# Weights that torch.nn.utils computes.

COMPUTED = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "weight norm with hooks": lambda layer: nn.utils.weight_norm(layer),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("how", COMPUTED)
def test_what_computes_its_weight_is_not_merged_for_good(how, merged):
    model = drawn(small(), targets=["0", "2"])
    COMPUTED[how](model[2])
    model.eval()
    if merged:
        model[0].merge()
    before, wanted = {key: value.clone() for key, value in model.state_dict().items()}, model(X)
    with pytest.raises(ValueError, match=r"2\.weight is computed by torch.nn.utils"):
        lora.merge_and_unload(model)
    assert model[0].merged == merged and lora.list_adapters(model) == ["a"]
    assert torch.equal(model(X), wanted)
    assert all(torch.equal(one, before[key]) for key, one in model.state_dict().items())


def test_a_weight_norm_that_takes_what_it_is_to_be_is_merged():
    model = drawn(small()).eval()
    parametrizations.weight_norm(model[0])
    wanted = model(X)
    assert close(lora.merge_and_unload(model)(X), wanted)


# Forwards that gradient checkpointing computes anew in the backward pass.


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.reentrant = small(), None

    def forward(self, x):
        if self.reentrant is None:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def away(model):
    lora.set_adapter(model, "b")
    model(X.clone().requires_grad_())
    lora.set_adapter(model, "a")


def disabled(model):
    with torch.no_grad(), lora.disable_adapters(model):
        model(X.clone().requires_grad_())


BETWEEN = {  # forward and backward: what is done, and whether the state is another one after it
    "nothing": (lambda model: None, False),
    "away and back": (away, False),
    "disabled and back": (disabled, False),
    "merged and back": (lambda model: lora.unmerge_lora_weights(lora.merge_lora_weights(model)), False),
    "switched": (lambda model: lora.set_adapter(model, "b"), True),
    "merged": (lora.merge_lora_weights, True),
    "reloaded": (lambda model: (lora.set_adapter(model, "b"), lora.delete_adapter(model, "a")), True),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("what", BETWEEN)
def test_what_is_computed_anew_is_computed_with_the_same_adapter(what, reentrant):
    between, differs = BETWEEN[what]
    gradients = []
    for model in (Blocks(), Blocks()):
        drawn(model, "ba", ["0", "2"])
        model.reentrant = reentrant if gradients else None
        trained, x = model.inner[0].lora_A, X.clone().requires_grad_()
        loss = model(x).pow(2).sum()
        between(model)
        with (
            pytest.raises(RuntimeError, match="computes a forward anew .* Call backward")
            if differs and (gradients)
            else contextlib.nullcontext()
        ):
            loss.backward()
        gradients.append((trained.grad, x.grad))
    if not differs:
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_losses_of_two_adapters_are_not_mixed_up(reentrant):
    model = drawn(Blocks(), "ab", ["0", "2"])
    model.reentrant = reentrant
    loss = 0
    for name in "ab":
        lora.set_adapter(model, name)
        loss = loss + model(X.clone().requires_grad_()).pow(2).sum()
    with pytest.raises(RuntimeError, match="the gradients would be of another adapter"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_by_hand_that_eval_merges_is_not_computed_anew(reentrant):
    torch.manual_seed(0)
    layer = lora.Linear(8, 8, r=2)
    nn.init.normal_(layer.lora_B)
    loss = checkpoint(layer, X.clone().requires_grad_(), use_reentrant=reentrant).sum()
    layer.eval()
    with pytest.raises(RuntimeError, match="computes a forward anew"):
        loss.backward()


# Weights that are read by others than their forward.


def test_a_hook_of_a_layer_reads_the_sum():
    model = drawn(small())
    seen = []
    model[0].register_forward_hook(lambda layer, x, y: seen.append((F.linear(x[0], layer.weight, layer.bias), y)))
    model(X)
    assert close(*seen[0])


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(x))


def fused_loss(self, x):
    return F.linear(self.body(x), self.head.weight, self.head.bias)


@pytest.mark.parametrize("place", ["instance", "class", "a function of nobody"])
@pytest.mark.parametrize("first", [True, False])
def test_a_forward_that_was_replaced_reads_the_sum(place, first, monkeypatch):
    """By kernels that fuse the head with the loss, for example, under any name."""
    torch.manual_seed(0)
    model = Head()

    def replace():
        if place == "instance":
            model.forward = types.MethodType(fused_loss, model)
        elif place == "class":
            monkeypatch.setattr(Head, "forward", fused_loss)
        else:
            model.forward = lambda x: fused_loss(model, x)

    if first:
        replace()
    drawn(model, targets=["head"])
    wanted = model.head(model.body(X))
    if not first:
        replace()
    assert close(model(X), wanted)
    assert close(lora.merge_lora_weights(model)(X), wanted)


def test_a_batch_norm_is_fused_into_the_sum_or_not_at_all():
    model = drawn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    with pytest.raises(ValueError, match="a batch norm would be fused into the base alone; call lora.merge_lora"):
        fusion.fuse_conv_bn_eval(*model)
    images = torch.randn(2, 3, 5, 5)
    wanted = model(images)
    assert close(fusion.fuse_conv_bn_eval(*lora.merge_lora_weights(model))(images), wanted, 1e-4)


# Checkpoints of the base.


def test_a_checkpoint_of_the_base_is_loaded_into_the_base():
    def base():
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    pretrained, model = base(), base()
    for _ in range(9):
        pretrained(3 + torch.randn(9, 8))
    lora.inject_lora(model, r=2, target_modules=["0"], modules_to_save=["2"], bias="all")
    model.load_state_dict(pretrained.state_dict(), strict=False)
    wanted = pretrained.eval()(X)
    assert torch.equal(model.eval()(X), wanted)
    with lora.disable_adapters(model):
        assert torch.equal(model(X), wanted)
    assert torch.equal(lora.unload(model)(X), wanted)


@pytest.mark.parametrize("part", ["adapted model", "head", "one of the head"])
def test_a_checkpoint_of_the_adapted_model_or_a_head_leaves_the_base(part):
    model = drawn(small(), modules_to_save=["2"])
    state, base = copy.deepcopy(model.state_dict()), small().state_dict()
    if part != "adapted model":
        names = ["2.weight", "2.bias"] if part == "head" else ["2.bias"]
        state = {name: torch.randn_like(base[name]) for name in names}
    model.load_state_dict(state, strict=False)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    head = nn.Linear(8, 2)
    model[2].load_state_dict(head.state_dict())
    assert torch.equal(model[2].weight, head.weight)
    assert all(torch.equal(one, base[key]) for key, one in lora.unload(model).state_dict().items())


# Arguments.


@pytest.mark.parametrize("argument", ["target_modules", "modules_to_save", "exclude_modules"])
def test_names_that_come_once_are_refused(argument):
    model = small()
    given = {"target_modules": ["0", "2"], argument: (name for name in ["2"])}
    with pytest.raises(TypeError, match=f"{argument}=.*: must be a list of names"):
        lora.inject_lora(model, r=2, **given)
    assert lora.list_adapters(model) == []


def test_a_layer_with_an_adapter_of_its_own_is_refused():
    class Own(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

        def forward(self, x):
            return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T

    with pytest.raises(TypeError, match=r"0 is a Own with attributes that a LoRA layer has too \(lora_A, lora_B\)"):
        lora.inject_lora(nn.Sequential(Own()), r=2, target_modules=["0"])


def test_nothing_left_to_adapt_is_an_error():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match="nothing is left to adapt after exclude_modules"):
        lora.inject_lora(model, r=2, target_parameters=["in_proj_weight"], exclude_modules=["in_proj_weight"])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rows_of_one_table_are_given_once():
    model = nn.ModuleDict({"enc": nn.Embedding(9, 4), "dec": nn.Embedding(9, 4)})
    model["dec"].weight = model["enc"].weight
    with pytest.raises(ValueError, match="dec and enc are one table; give all rows under one name"):
        lora.inject_lora(model, target_modules=[], trainable_token_indices={"enc": [1, 2], "dec": [3]})


def test_a_module_under_two_names():
    def twice():
        model = nn.ModuleDict({"a": nn.Linear(8, 8)})
        model["b"] = model["a"]
        return model

    with pytest.raises(ValueError, match="b is a by another name, which is adapted; name it once"):
        lora.inject_lora(twice(), r=2, target_modules=["a"], modules_to_save=["b"])
    assert lora.inject_lora(twice(), r=2, target_modules=["b"]) == ["a"]


@pytest.mark.parametrize(
    "options",
    [
        {"r": np.int64(2), "lora_alpha": np.float32(4), "lora_dropout": np.float32(0.25)},
        {"r": 2, "lora_alpha": torch.tensor(4.0), "rank_pattern": {"0": np.int64(1)}},
        {"r": 2, "lora_alpha": np.int32(4), "alpha_pattern": {"0": np.float64(3)}},
    ],
    ids=str,
)
@pytest.mark.parametrize("format", ["loralib", "peft"])
def test_numbers_of_numpy_and_torch_are_saved(options, format, tmp_path):
    model = small()
    lora.inject_lora(model, target_modules=["0"], **options)
    lora.save_lora(model, tmp_path / "adapter", format=format)
    assert lora.load_lora(small(), tmp_path / "adapter") == ["0"]
    by_hand = nn.Sequential(lora.Linear(8, 8, r=np.int64(2), lora_alpha=np.float32(4)))
    json.dumps([by_hand[0].r, by_hand[0].lora_alpha])


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.pth", "a.ckpt"])
def test_a_file_that_could_not_be_read_again_is_not_written(name, tmp_path):
    with pytest.raises(ValueError, match="files of that ending are pickles"):
        lora.save_lora(drawn(small()), tmp_path / name)
    assert not list(tmp_path.iterdir())


# Classes that are known by their name.


def conv1d(activation):
    class Conv1D(nn.Module):
        """As in the code of GPT-2 that people copy."""

        def __init__(self):
            super().__init__()
            self.nf, self.weight, self.bias = 8, nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.zeros(8))

        def forward(self, x):
            return activation(torch.addmm(self.bias, x, self.weight))

    return Conv1D()


@pytest.mark.parametrize("activation", [lambda x: x, torch.relu])
def test_a_conv1d_of_somebody_elses_computes_what_it_computes(activation):
    torch.manual_seed(0)
    model = nn.Sequential(conv1d(activation))
    base = model(X)
    drawn(model, "ab")
    with lora.disable_adapters(model):
        assert close(model(X), base)
    wanted = activation(X @ (model[0]._parameters["weight"] + 8 * model[0].lora_B.mm(model[0].lora_A).T))
    assert close(model(X), wanted, 1e-3)
    assert close(lora.merge_and_unload(model)(X), wanted, 1e-3)


def test_complex_weights_are_not_quantised():
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64))
    drawn(model)
    x = torch.randn(3, 8, dtype=torch.complex64)
    wanted = model(x)
    assert close(lora.merge_lora_weights(model.eval())(x), wanted, 1e-4)
    assert lora.merge_and_unload(model)[0].weight.dtype == torch.complex64 and close(model(x), wanted, 1e-4)


@pytest.mark.parametrize("layer", [nn.Embedding(16, 16), nn.Conv1d(8, 8, 3)])
def test_a_quantised_layer_that_is_no_matrix_is_named(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), False)
    with pytest.raises(TypeError, match=f"0 is a .*{type(layer).__name__}, which LoRA cannot adapt"):
        lora.inject_lora(nn.Sequential(layer), r=2, target_modules=["0"])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_module_beside_the_target():
    model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.ReLU()))
    drawn(model)
    wanted = model(X)
    assert close(lora.merge_and_unload(model)(X), wanted)


# Rows of a batch.


def test_a_batch_that_is_repeated_as_a_whole_is_no_beams():
    class Guided(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return self.a(x)

        def generate(self, x, repeat):
            return self(repeat(x))

    model = drawn(Guided(), "ab", ["a"]).eval()
    with torch.no_grad():
        with lora.adapters_per_row(model, ["a", "b"]):
            beams = model.generate(X[:2], lambda x: x.repeat_interleave(2, 0))
        for row, name in enumerate("ab"):
            lora.set_adapter(model, name)
            assert close(beams[2 * row : 2 * row + 2], model(X[[row, row]]))
        for repeat in (lambda x: x.repeat(2, 1), lambda x: torch.cat([x, 0 * x])):
            message = "batch of 4, whose rows are not each repeated in place"
            with lora.adapters_per_row(model, ["a", "b"]), pytest.raises(ValueError, match=message):
                model.generate(X[:2], repeat)


@pytest.mark.parametrize("buffer", [True, False])
def test_what_a_model_remembers_is_not_changed_by_finding_out_whose_rows_are_which(buffer):
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            if buffer:
                self.register_buffer("state", torch.zeros(1, 8))
            else:
                self.state = torch.zeros(1, 8)

        def forward(self, x):
            state = 0.5 * self.state + self.a(x).mean(0, keepdim=True)
            if buffer:
                self.state.copy_(state)
            else:
                self.state = state
            return self.a(x) + self.state

    model = drawn(Remembers(), "ab", ["a"]).eval()
    with torch.no_grad():
        outputs = []
        for row, name in enumerate("ab"):
            lora.set_adapter(model, name)
            outputs.append(model.a(X[row]))
        outputs = torch.stack(outputs)
        with lora.adapters_per_row(model, ["a", "b"]):
            got = [model(X[:2]), model(X[:2])]
    mean = outputs.mean(0)
    assert close(got[0], outputs + mean) and close(got[1], outputs + 1.5 * mean)


# What is lost without a word.


def test_what_was_trained_beside_the_adapter_is_named_when_it_is_saved(tmp_path):
    model = drawn(small())
    model[2].requires_grad_(True)
    with pytest.warns(UserWarning, match=r"2\.bias, 2\.weight: trained, and not in the file"):
        lora.save_lora(model, tmp_path / "a.safetensors")
    lora.save_lora(model, tmp_path / "b.safetensors", modules_to_save=["2"])


def test_statistics_that_a_file_lacks_are_the_bases(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    model = base()
    lora.inject_lora(model, r=2, target_modules=["0"])
    lora.save_lora(drawn(base()), tmp_path / "file", format="peft")
    with contextlib.suppress(FileNotFoundError):
        path = tmp_path / "file" / "adapter_model.safetensors"
        from safetensors.torch import load_file, save_file

        save_file({key: t for key, t in load_file(path).items() if "lora_" in key}, path)
    model.train()(3 + X)
    lora.load_lora(model, tmp_path / "file")
    fresh = base()
    lora.load_lora(fresh, tmp_path / "file")
    assert torch.equal(model.eval()(X), fresh.eval()(X))


def test_each_warning_of_state_dict_is_given_once(monkeypatch):
    monkeypatch.setattr(lora.core, "_told", set())
    model = drawn(small(), "ab")
    with pytest.warns(UserWarning, match="none of the others"):
        model.state_dict()
    lora.merge_lora_weights(model.eval())
    with pytest.warns(UserWarning, match="of a merged layer"):
        model.state_dict()
    model.state_dict()


# Errors that come late.


def test_an_injection_that_fails_on_the_way_changes_nothing():
    class Head(nn.Linear):
        def __init_subclass__(cls, key):
            super().__init_subclass__()

    model = nn.Sequential(nn.Linear(8, 8), Head(8, 2))
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(TypeError):
        lora.inject_lora(model, r=2, target_modules=["0"], modules_to_save=["1"])
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert lora.list_adapters(model) == [] and type(model[0]) is nn.Linear
    assert lora.inject_lora(model, r=2, target_modules=["0"]) == ["0"]


def test_wrappers_neither_hide_nor_invent_what_was_replaced():
    model = drawn(small(), "ab")
    wrapped = nn.DataParallel(model)
    lora.delete_adapter(wrapped, "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lora.list_adapters(model) == lora.list_adapters(wrapped) == ["b"]
    model[0] = nn.Linear(8, 8)
    with pytest.warns(UserWarning, match="0: replaced by somebody since adapter 'b'"):
        lora.list_adapters(wrapped)


@pytest.mark.parametrize(
    ("make", "options", "call"),
    {
        "attention": (lambda: nn.MultiheadAttention(8, 2), {"bias": "all"}, lambda m, x: m(x, x, x)[0]),
        "whole attention": (
            lambda: nn.MultiheadAttention(8, 2),
            {"modules_to_save": ["inner"], "target_modules": ["other"]},
            lambda m, x: m(x, x, x)[0],
        ),
        "encoder": (
            lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0),
            {"bias": "all", "target_modules": ["linear1"]},
            lambda m, x: m(x),
        ),
        "batch norm": (
            lambda: nn.BatchNorm1d(3),
            {"modules_to_save": ["inner"], "target_modules": ["other"]},
            lambda m, x: m(x),
        ),
    }.values(),
    ids=["attention", "whole attention", "encoder", "batch norm"],
)
@pytest.mark.filterwarnings("ignore:.*is trained in torch.bfloat16:UserWarning")
@pytest.mark.filterwarnings("ignore:.*nested_tensor.*:UserWarning")
def test_what_others_read_of_a_half_precision_module_keeps_its_dtype(make, options, call):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.other = make(), nn.Linear(8, 8)

        def forward(self, x):
            return self.other(call(self.inner, x))

    torch.manual_seed(0)
    model = Outer().to(torch.bfloat16)
    base, x = copy.deepcopy(model).eval(), torch.randn(2, 3, 8, dtype=torch.bfloat16)
    lora.inject_lora(model, r=2, **{"target_modules": ["out_proj"], **options})
    model.train()(x).sum().backward()
    model.zero_grad()
    model.eval()
    if not isinstance(model.inner, nn.BatchNorm1d):
        with torch.no_grad():
            assert close(model(x).float(), base(x).float(), 0.05)
    assert model(x).dtype == torch.bfloat16


def test_what_comes_after_distributed_data_parallel_is_refused(tmp_path):
    """Its gradients would not be exchanged; what is there already can be loaded again, and what is frozen can come."""
    path = tmp_path / "a.safetensors"
    model = drawn(small(), "ab")
    lora.save_lora(model, path)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        wanted = wrapped(X)
        for call in (
            lambda: lora.inject_lora(wrapped, r=2, target_modules=["0"], adapter_name="c"),
            lambda: lora.load_lora(wrapped, path, adapter_name="c"),
            lambda: lora.set_adapter(wrapped, "a"),
        ):
            with pytest.raises(ValueError, match="DistributedDataParallel exchanges the gradients of what was trained"):
                call()
        assert lora.list_adapters(model) == ["a", "b"] and torch.equal(wrapped(X), wanted)
        lora.set_adapter(wrapped, "b")
        assert lora.load_lora(wrapped, path) == ["0"]
        lora.load_lora(wrapped, path, adapter_name="frozen", trainable=False)
    finally:
        torch.distributed.destroy_process_group()


# Layers by hand.


@pytest.mark.parametrize("how", [prune.random_unstructured, parametrizations.weight_norm])
def test_an_adapter_that_is_computed_is_neither_saved_nor_loaded_nor_merged(how, tmp_path):
    def made():
        torch.manual_seed(0)
        layer = lora.Linear(8, 8, r=2)
        nn.init.normal_(layer.lora_B)
        return nn.Sequential(layer)

    lora.save_lora(made(), tmp_path / "a.safetensors")
    model = made()
    how(model[0], "lora_B", **({"amount": 0.5} if how is prune.random_unstructured else {}))
    wanted = model(X)
    for call in (
        lambda: lora.save_lora(model, tmp_path / "b.safetensors"),
        lambda: lora.load_lora(model, tmp_path / "a.safetensors"),
        lambda: lora.merge_and_unload(model),
    ):
        with pytest.raises(ValueError, match="lora_B of 0 is computed, by torch.nn.utils.prune or parametrize"):
            call()
    assert torch.equal(model(X), wanted) and not (tmp_path / "b.safetensors").exists()


class Own(nn.Linear, lora.LoRALayer):
    def __init__(self):
        nn.Linear.__init__(self, 8, 8)
        lora.LoRALayer.__init__(self, r=2, lora_alpha=4, lora_dropout=0.0, merge_weights=True)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))


def test_a_layer_of_ones_own_is_named_that_a_file_leaves_out(tmp_path):
    model = nn.Sequential(Own(), lora.Linear(8, 8, r=2))
    lora.mark_only_lora_as_trainable(model)
    with pytest.warns(UserWarning, match=r"0\.lora_A, 0\.lora_B: trained, and not in the file"):
        lora.save_lora(model, tmp_path / "a.safetensors")


@pytest.mark.parametrize("format", ["loralib", "peft"])
def test_a_scaling_that_is_a_tensor_is_saved_as_its_number(format, tmp_path):
    model, other = (nn.Sequential(nn.Linear(8, 8)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    drawn(model)
    model[0].scaling = torch.tensor(3.0)
    path = tmp_path / "a"
    lora.save_lora(model, path, format=format)
    lora.load_lora(other, path)
    assert close(other(X), model(X)) and other[0].scaling == 3
    model[0].scaling = nn.Parameter(torch.tensor(3.0))
    with pytest.raises(ValueError, match="its scaling trains or has several values"):
        lora.save_lora(model, tmp_path / "b", format=format)


# Gradients of before.


@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_optimizer_of_before_does_not_move_the_base(set_to_none):
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(X).sum().backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    model(X).sum().backward()
    drawn(model)
    before = model[0].weight.clone()
    for _ in range(2):
        model(X).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert torch.equal(model[0].weight, before)


def test_gradients_that_the_counts_of_tokens_scale():
    """Of trained rows, and of the rows of a batch: as of nn.Embedding, and as of each adapter alone."""
    ids = torch.tensor([[1, 1, 1, 2]])
    table = nn.Sequential(nn.Embedding(10, 3, scale_grad_by_freq=True))
    other = copy.deepcopy(table)
    other(ids).sum().backward()
    lora.inject_lora(table, target_modules=[], trainable_token_indices={"0": [2, 1]})
    table(ids).sum().backward()
    assert torch.equal(table[0].lora_rows_weight.grad, other[0].weight.grad[[2, 1]])
    model = drawn(nn.Sequential(nn.Embedding(10, 4, scale_grad_by_freq=True), nn.Linear(4, 2)), "ab")
    found = {}
    for name in "ab":
        lora.set_adapter(model, name)
        found[name] = model[0].lora_A
        model(ids).sum().backward()
    alone = {name: tensor.grad.clone() for name, tensor in found.items()}
    for tensor in found.values():
        tensor.grad = None
    with lora.adapters_per_row(model, ["a", "b"]):
        model(ids.expand(2, 4)).sum().backward()
    assert all(close(tensor.grad, alone[name]) for name, tensor in found.items())
    with pytest.raises(ValueError, match="that does not add up; choose one of them"):
        lora.set_adapter(model, ["a", "b"])


# Settings of a convolution, on the layer and on what 0.1.2 has within it.


@pytest.mark.parametrize("where", ["layer", "conv"])
@pytest.mark.parametrize("made", ["by hand", "injected"])
@pytest.mark.parametrize(
    "name, value, options", [("stride", (2, 2), {}), ("dilation", (2, 2), {}), ("padding", (1, 1), {"padding": 1})]
)
def test_a_setting_of_a_convolution_counts_in_every_mode(where, made, name, value, options):
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.manual_seed(0)
    if made == "by hand":
        layer = lora.Conv2d(3, 4, 3, r=2, padding=1).double()
        nn.init.normal_(layer.lora_B)
    else:
        layer = drawn(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).double())[0]
    assert layer.conv.padding == (1, 1)
    setattr(layer if where == "layer" else layer.conv, name, value)
    settings = {"padding": (1, 1), **options, name: value}
    base = layer.base_weight().detach()
    wanted = F.conv2d(images, base + layer.delta_weight(), layer.bias, **settings)
    assert close(layer(images), wanted)
    layer.eval()
    assert close(layer(images), wanted)
    layer.merge()
    assert close(layer(images), wanted)
    with lora.disable_adapters(layer):
        assert close(layer(images), F.conv2d(images, base, layer.bias, **settings))


def test_a_convolution_with_a_forward_of_its_own_is_injected_or_refused():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match="has a forward of its own, which ConvLoRA would leave out; lora.inject_lora"):
        lora.ConvLoRA(Doubled, 3, 4, 3, r=2)
    model, images = drawn(nn.Sequential(Doubled(3, 4, 3)).double()), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    weight = model[0].base_weight() + model[0].delta_weight()
    assert close(model(images), 2 * F.conv2d(images, weight, model[0].bias))
