"""Sequences and surroundings in which an adapter could be lost in silence: each is right, or refused by name.

Hooks, forwards and attributes on objects, copies and checkpoints made within disable_adapters, weights read past a
forward, names that clash, flags set while merged, offloaded bases. Run alone: `pytest tests/test_states.py`.
"""

import copy
import io
import os
import pickle
import subprocess
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from reference import randomize
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import loralib as lora

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def adapted(*layers, name="default", **options):
    model = nn.Sequential(*(layers or (nn.Linear(8, 8),)))
    lora.inject_lora(model, **{"r": 2, "target_modules": ["0"], "adapter_name": name, **options})
    return randomize(model)


def two(*layers, **options):
    """A model with the adapters a and b, b active, and the output of a."""
    model = adapted(*layers, name="a", **options)
    out = model(X).detach()
    lora.inject_lora(model, r=2, target_modules=["0"], adapter_name="b", **options)
    return randomize(model), out


def dense(layer):
    return layer.base_weight() + layer.delta_weight()


def close(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


# What others hold of a module, or put on it.


def test_attributes_hooks_and_references_survive():
    layer = nn.Linear(8, 8)
    kept, seen, layer.note = [layer], [], "mine"
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    model = adapted(layer)
    assert kept[0] is model[0] and layer.note == "mine"
    close(kept[0](X), F.linear(X, dense(layer), layer.bias))
    model(X.clone().requires_grad_()).sum().backward()
    assert seen == ["forward", "forward", "backward"]
    before = set(vars(nn.Linear(8, 8))) | {"note"}
    lora.unload(lora.unmerge_lora_weights(lora.merge_lora_weights(model)))
    assert type(layer) is nn.Linear and set(vars(layer)) == before


@pytest.mark.parametrize(
    "put",
    [
        lambda layer, plain: setattr(layer, "forward", lambda x: 10 * plain(x)),
        lambda layer, plain: setattr(layer, "forward", types.MethodType(lambda s, x: 10 * plain(x), layer)),
        lambda layer, plain: setattr(
            layer, "forward", types.MethodType(lambda s, x: 10 * F.linear(x, s.weight, s.bias), layer)
        ),
    ],
    ids=["closure", "method", "method that reads the weight"],
)
def test_a_forward_put_on_the_object_counts_with_the_update(put):
    layer = nn.Linear(8, 8)
    put(layer, layer.forward)
    model = adapted(layer)
    close(model(X), 10 * F.linear(X, dense(layer), layer.bias))
    model(X).sum().backward()
    assert layer.lora_A.grad is not None
    for state in (lora.merge_lora_weights, lora.unmerge_lora_weights):
        close(state(model)(X), 10 * F.linear(X, dense(layer), layer.bias))
    lora.unload(model)
    close(model(X), 10 * F.linear(X, layer.weight, layer.bias))


def test_hooks_of_accelerate_follow():
    hooks = pytest.importorskip("accelerate.hooks")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    for layer in model:
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook("cpu"))
    base = copy.deepcopy(model[0].weight)
    lora.inject_lora(model, r=2, target_modules=["0"], modules_to_save=["1"])
    randomize(model)
    model(X).sum().backward()
    assert model[0].lora_A.grad is not None and model[1].weight.grad is not None
    close(model[0](X), F.linear(X, base + model[0].delta_weight(), model[0].bias))
    lora.unload(model)
    close(model[0](X), F.linear(X, base, model[0].bias))
    hooks.remove_hook_from_module(model[0])
    close(model[0](X), F.linear(X, base, model[0].bias))


def test_a_forward_kept_by_a_hook_that_is_another_one():
    hooks = pytest.importorskip("accelerate.hooks")
    layer = nn.Linear(8, 8)
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook("cpu"))
    model = adapted(layer)
    close(model(X), 2 * F.linear(X, dense(layer), layer.bias))


def test_offloaded_bases_are_refused_and_the_other_order_is_right():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(8, 8))
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match="0 is offloaded by accelerate.*nothing was changed. Inject"):
        lora.inject_lora(model, r=2, target_modules=["0"])
    model, of_a = two()
    lora.set_adapter(model, "a")
    accelerate.cpu_offload(model, execution_device="cpu")
    close(model(X), of_a)
    for change in (
        lambda: lora.set_adapter(model, "b"),
        lambda: lora.save_lora(model, "x"),
        lambda: lora.unload(model),
    ):
        with pytest.raises(ValueError, match="0 is offloaded by accelerate"):
            change()


class Halved(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(x) * 0.5


class HalvedTable(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 0.5


class HalvedConv(nn.Conv1d):
    def forward(self, x):
        return F.conv1d(x, self.weight * 0.5, self.bias)


@pytest.mark.parametrize(
    "layer, x",
    [
        (Halved(8, 8), X),
        (HalvedTable(9, 4), torch.arange(9)),
        (HalvedConv(8, 4, 3), torch.randn(2, 8, 5)),
    ],
    ids=["linear", "embedding", "convolution"],
)
def test_a_subclass_with_a_forward_of_its_own_computes_with_the_sum(layer, x):
    model, plain = adapted(copy.deepcopy(layer)), copy.deepcopy(layer)
    plain.weight.data = dense(model[0]).detach().reshape(plain.weight.shape)
    close(model(x), plain(x))
    model(x).sum().backward()
    plain(x).sum().backward()
    close(model[0].delta_weight() * 0 + plain.weight.grad, plain.weight.grad)
    assert model[0].lora_A.grad is not None and model[0].lora_B.grad is not None
    close(lora.merge_lora_weights(model)(x), plain(x))
    with torch.no_grad():
        model[0].lora_B.mul_(2)
    plain.weight.data = dense(model[0]).detach().reshape(plain.weight.shape)
    close(model(x), plain(x))
    close(torch.func.functional_call(model, model.state_dict(), (x,)), plain(x))
    close(lora.merge_and_unload(model)(x), plain(x))
    assert type(model[0]) is type(layer)


def test_attention_and_the_fast_path_of_torchs_encoder():
    attention, z = nn.MultiheadAttention(8, 2, batch_first=True), X[None]
    lora.inject_lora(attention, r=2, target_modules=["out_proj"])
    randomize(attention)
    attention(z, z, z)[0].sum().backward()
    assert attention.out_proj.lora_A.grad is not None
    lora.merge_lora_weights(attention.eval())
    with torch.no_grad():
        attention.out_proj.lora_B.mul_(3)
        merged = attention(z, z, z)[0]
        close(lora.unmerge_lora_weights(attention)(z, z, z)[0], merged)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    lora.inject_lora(encoder, r=2, target_modules=["linear1", "linear2"], lora_dropout=0.5)
    randomize(encoder)
    with torch.no_grad():
        unmerged = encoder.eval()(z)
        close(lora.merge_lora_weights(encoder)(z), unmerged)
    assert not torch.equal(encoder.train()(z), encoder(z))  # dropout, in training


def test_what_peft_computes_differently_is_said(tmp_path):
    model = adapted(Halved(8, 8))
    with pytest.warns(UserWarning, match="PEFT may compute 0 differently: it adds the update to the output"):
        lora.save_lora(model, tmp_path, format="peft")


def test_routers_are_left_alone_unless_they_are_named():
    class TopRouter(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1).topk(1)

    model = nn.ModuleDict({"router": TopRouter(8, 4), "fc": nn.Linear(8, 8)})
    assert lora.inject_lora(model, r=2, target_modules="all-linear") == ["fc"]
    assert lora.inject_lora(model, r=2, target_modules=["router"], adapter_name="router") == ["router"]
    assert len(randomize(model)["router"](X)) == 2


# Names that clash.


class Scaled(nn.Module):
    scaling = 1.0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 8))
        self.scaling, self.r, self.merged = 0.5, "mine", "too"

    def forward(self, x):
        return F.linear(x, self.weight) * self.scaling


def test_a_heads_attributes_with_the_names_of_settings_stay():
    model = nn.Sequential(nn.Linear(8, 8), Scaled())
    before = model(X)
    lora.inject_lora(model, r=2, target_modules=["0"], modules_to_save=["1"])
    close(model(X), before)
    with lora.disable_adapters(model):
        close(model(X), before)
    lora.unload(model)
    assert (model[1].scaling, model[1].r, model[1].merged) == (0.5, "mine", "too")


def test_a_targets_own_names_are_refused():
    class OfClass(nn.Linear):
        scaling = 0.5

    class WithMethod(nn.Linear):
        def merge(self):
            return self.weight

    class WithModule(nn.Conv1d):
        def __init__(self):
            super().__init__(8, 8, 1)
            self.conv = nn.Identity()

    on_object = nn.Linear(8, 8)
    on_object.r = 3
    for layer, name in (
        (OfClass(8, 8), "scaling"),
        (WithMethod(8, 8), "merge"),
        (WithModule(), "conv"),
        (on_object, "r"),
    ):
        model = nn.Sequential(layer)
        with pytest.raises(TypeError, match=f"0 is a .* with attributes that a LoRA layer has too .{name}.; exclude"):
            lora.inject_lora(model, r=2, target_modules=["0"])
        assert type(model[0]) is type(layer)


class Doubled(lora.Linear):
    """A client's layer, made by hand."""

    def forward(self, x):
        return super().forward(x) * 2


def test_a_clients_subclass_keeps_its_forward():
    model = nn.Sequential(randomize(Doubled(8, 8, r=2)))
    before, base = model(X).detach(), 2 * F.linear(X, model[0].weight, model[0].bias)
    lora.inject_lora(model, r=3, target_modules=["0"], adapter_name="b")
    close(model(X), base)
    lora.set_adapter(model, "default")
    close(model(X), before)
    merged = lora.merge_and_unload(copy.deepcopy(model))
    close(merged(X), before)
    close(lora.unload(model)(X), base)
    assert type(model[0]) is Doubled and not model[0].has_adapter and not lora.list_adapters(model)


# Within disable_adapters.


def test_switching_within_disable_adapters():
    model, of_a = two()
    lora.set_adapter(model, "a")
    with lora.disable_adapters(model):
        lora.set_adapter(model, "b")
    lora.set_adapter(model, "a")
    close(model(X), of_a)
    with lora.disable_adapters(model):
        lora.unload(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("state", ["train", "eval", "merged"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_made_within_disable_adapters(how, state):
    model = adapted(nn.Linear(8, 8), nn.Linear(8, 2), modules_to_save=["1"], bias="lora_only")
    for parameter in (model[1].weight, model[1].bias, model[0].bias):
        nn.init.normal_(parameter)
    model.train(state == "train")
    if state == "merged":
        lora.merge_lora_weights(model)
    wanted = model(X).detach()
    with lora.disable_adapters(model):
        base = model(X).detach()
        if how == "deepcopy":
            other = copy.deepcopy(model)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            torch.save(model, file := io.BytesIO())
            file.seek(0)
            other = torch.load(file, weights_only=False)
    close(other(X), wanted)
    with lora.disable_adapters(other):
        close(other(X), base)
    close(model(X), wanted)
    close(lora.unload(other)(X), base)


def test_checkpoints_across_adapters_are_refused():
    """Of a head, too, and between the base within disable_adapters and an adapter; a plain one loads."""
    model, _ = two(nn.Linear(8, 8), nn.Linear(8, 8), modules_to_save=["1"])
    under_b, out = copy.deepcopy(model.state_dict()), model(X).detach()
    with lora.disable_adapters(model):
        of_base = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match="1: the checkpoint was made under the adapter 'b'"):
            model.load_state_dict(under_b)
    with pytest.raises(RuntimeError, match="1: the checkpoint was made under the adapter None .*set_adapter"):
        model.load_state_dict(of_base)
    lora.set_adapter(model, "a")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="0: the checkpoint was made under the adapter 'b'.*computes with 'a'"):
        model.load_state_dict(under_b)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    lora.set_adapter(model, "b")
    model.load_state_dict(under_b)
    close(model(X), out)


# Merged.


def test_flags_set_while_merged_hold_for_the_base():
    model = nn.Sequential(lora.Linear(8, 8, r=2)).requires_grad_(True).eval()
    model.requires_grad_(False).train()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.eval().requires_grad_(True)
    assert model.train()[0].weight.requires_grad


def test_a_trained_base_gets_its_gradient_in_eval():
    layer = randomize(lora.Linear(8, 8, r=2)).requires_grad_(True).eval()
    base = layer.base_weight()
    layer(X).sum().backward()
    assert base.grad is not None and layer.lora_A.grad is not None


def test_the_base_put_back_by_hand_stays():
    model = adapted()
    base, before = model[0].weight, model[0].weight.detach().clone()
    wanted = lora.merge_lora_weights(model.eval())(X)
    model[0].weight = base
    close(model(X), wanted)
    lora.unmerge_lora_weights(model)
    assert model[0].weight is base and torch.equal(base, before)


def test_a_shallow_copy_shares_no_state():
    layer = randomize(lora.Linear(8, 8, r=2))
    wanted = layer(X).detach()
    other = copy.copy(layer).eval()
    assert other.bias is layer.bias
    close(layer(X), wanted), close(other(X), wanted), close(layer.eval().train()(X), wanted)


def test_export_of_a_merged_layer():
    model = adapted()
    wanted = lora.merge_lora_weights(model.eval())(X)
    for strict in (False, True):
        close(torch.export.export(model, (X,), strict=strict).module()(X), wanted)


def test_two_threads_read_while_a_stale_weight_is_merged_anew():
    model = lora.merge_lora_weights(adapted().eval())
    wrong, interval = [], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            with torch.no_grad():
                model[0].lora_B.mul_(1.01)
                wanted = F.linear(X, dense(model[0]), model[0].bias)

            def read(wanted=wanted):
                for _ in range(20):
                    if not torch.allclose(model(X), wanted, atol=1e-4):
                        wrong.append(1)

            threads = [threading.Thread(target=read) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.parametrize("state", ["train", "eval", "merged"])
def test_the_weight_is_a_parameter_in_every_mode(state):
    model = adapted().train(state == "train")
    if state == "merged":
        lora.merge_lora_weights(model)
    assert type(model.get_parameter("0.weight")) is nn.Parameter
    assert set(dict(model.named_parameters())) == {"0.weight", "0.bias", "0.lora_A", "0.lora_B"}


@pytest.mark.parametrize("state", ["train", "merged"])
def test_copies_of_a_compiled_layer(state):
    """Each computes with its own weights; a compiled call would be that of the first."""
    torch.compiler.reset()
    model = adapted().train(state == "train")
    if state == "merged":
        lora.merge_lora_weights(model)
    model[0].compile(backend="eager")
    wanted = model(X).detach()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other[0].bias.data += 1
        close(other(X), wanted + 1)
    close(model(X), wanted)


def test_a_model_inside_of_a_plain_object():
    class Wrapper:
        def __init__(self, model):
            self.model, self.layers = model, list(model)

        def __call__(self, x):
            return self.layers[0](x)

    wrapper = Wrapper(nn.Sequential(nn.Linear(8, 8)))
    lora.inject_lora(wrapper.model, r=2, target_modules=["0"])
    randomize(wrapper.model)
    close(wrapper(X), F.linear(X, dense(wrapper.layers[0]), wrapper.layers[0].bias))


# Switching.


def test_the_order_of_parameters_is_the_same_in_every_process():
    code = (
        "import torch, loralib as lora\n"
        "m = torch.nn.Sequential(torch.nn.Linear(8, 8))\n"
        "for n in 'abc': lora.inject_lora(m, r=2, target_modules=['0'], adapter_name=n, bias='all')\n"
        "for n in 'bac': lora.set_adapter(m, n); print([name for name, _ in m.named_parameters()])\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
        ).stdout
        for seed in range(3)
    }
    lines = {line for output in outputs for line in output.splitlines()}
    assert len(lines) == 1, outputs


@pytest.mark.parametrize("compute", [lambda layer: prune.l1_unstructured(layer, "lora_A", 0.5)], ids=["pruned"])
def test_a_switch_that_cannot_be_made_changes_nothing(compute):
    model, _ = two()
    compute(model[0])
    before = model(X).detach()
    with pytest.raises(ValueError, match=": lora_A of .* is computed, by torch.nn.utils.prune or parametrize; remove"):
        lora.set_adapter(model, "a")
    assert lora.active_adapter(model) == "b"
    close(model(X), before)
    prune.remove(model[0], "lora_A")
    lora.set_adapter(model, "a")


def test_a_weight_that_torch_computes_after_injection():
    model = adapted()
    wanted = model(X).detach()
    weight_norm(model[0])
    for state in (model.train, model.eval, lambda: lora.merge_lora_weights(model)):
        state()
        close(model(X), wanted)
    close(lora.merge_and_unload(model)(X), wanted)
    assert hasattr(model[0], "parametrizations") and not hasattr(model[0], "lora_A")


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first, self.rnn = nn.Linear(8, 8), kind(8, 8, 2)

    def forward(self, x):
        return self.rnn(self.first(x))[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_trained_whole(kind):
    """They compute with a list of their weights that setting one through `_parameters` would not reach."""

    model, out = Recurrent(kind), {}
    base = model(X).detach()
    for seed, name in enumerate("ab"):
        lora.inject_lora(model, r=2, target_modules=["first"], modules_to_save=["rnn"], adapter_name=name)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        out[name] = model(X).detach()
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for name in "aba":
            lora.set_adapter(each, name)
            close(each(X), out[name])
            with lora.disable_adapters(each):
                close(each(X), base)
        each.double().float()
        lora.set_adapter(each, "b")
        close(each(X), out["b"])
        lora.unload(each)
        close(each(X), base)
        assert type(each.rnn) is kind
