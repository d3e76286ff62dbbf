"""What is done to a whole model: choose what trains, save it, merge, unload, disable, count.

How: small models with every kind of layer, ties and nesting, and tiny Hugging Face models built from a configuration;
outputs are compared with the dense formulas of reference.py and stored tensors bit for bit. Run alone:
`pytest tests/test_utils.py`.
"""

import copy

import pytest
import torch
from reference import CASES, IO, KINDS, QV, assert_close, assert_same_bits, expected, randomize, snapshot
from torch import nn

import loralib as lora

BIAS = ["none", "all", "lora_only"]
MERGING = ["merge_lora_weights", "merge_and_unload"]


class Attention(nn.Module):
    """A block with the names that have misled upstream: a buffer `bias`, `bias_k`, `debiasing`, `lora_net`, r=0."""

    def __init__(self):
        super().__init__()
        self.qkv = lora.MergedLinear(4, 12, r=2, lora_alpha=3, enable_lora=QV, **IO)
        self.out = lora.Linear(4, 4)
        self.plain = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.lora_net = nn.Linear(4, 4)
        self.relative_attention_bias = nn.Embedding(3, 4)
        self.register_buffer("bias", torch.ones(2, 2))
        self.gate_bias = nn.Parameter(torch.zeros(4))
        self.debiasing = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.lora_net(self.out(self.qkv(x)[..., 8:])) + self.gate_bias + self.debiasing


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = lora.Embedding(9, 4, r=2, lora_alpha=3)
        self.conv = lora.Conv1d(4, 4, 3, r=1, padding=1)
        self.attention = Attention()
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), lora.Linear(4, 9, r=2, bias=False))

    def forward(self, index):
        x = self.attention(self.conv(self.embed(index).mT).mT)
        return self.head(x.flatten(0, -2))


INDEX = torch.tensor([[1, 2, 3, 3], [8, 0, 1, 4]])
ADAPTERS = {f"{name}.lora_{ab}" for name in ("embed", "conv", "attention.qkv", "head.2") for ab in "AB"}
# By the rule of 0.1.2 a name with a part that begins with `lora_` is an adapter's.
NAMED_LORA = {"attention.lora_net.weight", "attention.lora_net.bias"}
LORA_BIASES = {"conv.bias", "attention.qkv.bias", "attention.out.bias"}
OTHER_BIASES = {
    "attention.plain.in_proj_bias",
    "attention.plain.bias_k",
    "attention.plain.bias_v",
    "attention.plain.out_proj.bias",
    "attention.gate_bias",
    "head.0.bias",
    "head.1.bias",
}
BY_MODE = {"none": set(), "lora_only": LORA_BIASES, "all": LORA_BIASES | OTHER_BIASES}
# modules_to_save, the parameters it adds, the buffers it saves as well
TO_SAVE = {
    "nothing": (None, set(), set()),
    "suffix": (["lora_net"], {"attention.lora_net.weight", "attention.lora_net.bias"}, set()),
    "full name": (["attention.lora_net"], {"attention.lora_net.weight", "attention.lora_net.bias"}, set()),
    "two": (["head.0", "relative_attention_bias"], {"head.0.weight", "head.0.bias"}, set()),
    "buffers": (
        ["head.1"],
        {"head.1.weight", "head.1.bias"},
        {"head.1.running_mean", "head.1.running_var", "head.1.num_batches_tracked"},
    ),
}
TO_SAVE["two"][1].add("attention.relative_attention_bias.weight")


def make_model():
    return randomize(Model()).eval()


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, lora.LoRALayer)]


# Choosing and saving.


@pytest.mark.parametrize("save", TO_SAVE)
@pytest.mark.parametrize("bias", BIAS)
def test_saved_is_what_is_trained(bias, save):
    """The trained parameters are exactly the listed ones, and exactly they (and their buffers) are saved."""
    modules, parameters, buffers = TO_SAVE[save]
    model = make_model()
    assert lora.mark_only_lora_as_trainable(model, bias=bias, modules_to_save=modules) is None
    assert trained(model) == ADAPTERS | NAMED_LORA | BY_MODE[bias] | parameters
    saved = lora.lora_state_dict(model, bias=bias, modules_to_save=modules)
    assert set(saved) == trained(model) | buffers
    full = model.state_dict()
    assert all(saved[name].data_ptr() == full[name].data_ptr() for name in saved)


@pytest.mark.parametrize("bias", BIAS)
def test_saved_adapter_restores_the_trained_model(bias):
    """What was trained and saved, loaded into the untrained model, gives the trained model's output."""
    model = make_model()
    untrained = copy.deepcopy(model)
    lora.mark_only_lora_as_trainable(model, bias=bias, modules_to_save=["head.0"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(INDEX).pow(2).mean().backward()
        optimizer.step()
    saved = lora.lora_state_dict(model, bias=bias, modules_to_save=["head.0"])
    assert not torch.allclose(untrained(INDEX), model(INDEX))
    assert not untrained.load_state_dict(saved, strict=False).unexpected_keys
    with torch.no_grad():
        assert torch.equal(untrained(INDEX), model(INDEX))


def test_marking_again_changes_the_choice():
    """The last call counts, whatever was trained before."""
    model = make_model()
    lora.mark_only_lora_as_trainable(model, bias="all", modules_to_save=["head"])
    lora.mark_only_lora_as_trainable(model)
    assert trained(model) == ADAPTERS | NAMED_LORA


@pytest.mark.parametrize("call", [lora.mark_only_lora_as_trainable, lora.lora_state_dict])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bias": "lora"}, "bias='lora'.*'none', 'all', 'lora_only'"),
        ({"bias": None}, "bias=None.*'none', 'all', 'lora_only'"),
        ({"modules_to_save": ["clasifier"]}, "modules_to_save.*clasifier"),
        ({"modules_to_save": ["head", "ora_net"]}, "modules_to_save.*ora_net.*did you mean.*lora_net"),
        ({"bias": "all", "modules_to_save": ["head.7"]}, "modules_to_save.*head.7"),
    ],
)
def test_wrong_arguments_change_nothing(call, arguments, message):
    """A wrong bias or a name that matches nothing raises ValueError before anything is changed."""
    model = make_model()
    before = trained(model)
    with pytest.raises(ValueError, match=message):
        call(model, **arguments)
    assert trained(model) == before


def test_model_without_lora_layers_warns():
    """A model without LoRA layers is frozen whole, with a warning that names it."""
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="Sequential has no LoRA layers"):
        lora.mark_only_lora_as_trainable(model)
    assert not trained(model) and lora.lora_state_dict(model) == {}


def test_root_module_may_be_a_lora_layer():
    """Every function takes a LoRA layer itself; names then have no prefix."""
    layer = randomize(lora.Linear(4, 6, r=2))
    lora.mark_only_lora_as_trainable(layer, bias="lora_only")
    assert trained(layer) == set(lora.lora_state_dict(layer, bias="lora_only")) == {"lora_A", "lora_B", "bias"}
    x = torch.randn(2, 4)
    wanted = layer(x)
    assert lora.merge_lora_weights(layer) is layer and layer.merged
    assert lora.unmerge_lora_weights(layer) is layer and not layer.merged
    plain = lora.merge_and_unload(layer)
    assert type(plain) is nn.Linear
    assert_close(plain(x), wanted)


# Hugging Face models.


def gpt2(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**{"vocab_size": 20, "n_positions": 16, "n_embd": 8, "n_layer": 2, **options}))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def test_known_architecture_is_injected_with_a_warning():
    """A Hugging Face model without LoRA layers gets its default adapters, and the warning says so."""
    model = gpt2(n_embd=32, n_head=4)
    with pytest.warns(UserWarning, match="injected the default adapters.*2 layers"):
        lora.mark_only_lora_as_trainable(model)
    names = {f"transformer.h.{i}.attn.c_attn.lora_{ab}" for i in range(2) for ab in "AB"}
    assert trained(model) == set(lora.lora_state_dict(model)) == names


def test_wrong_bias_injects_nothing():
    """A wrong bias leaves a model without LoRA layers as it was."""
    model = gpt2(n_head=2)
    with pytest.raises(ValueError, match="bias='some'"):
        lora.mark_only_lora_as_trainable(model, bias="some")
    assert not lora_layers(model) and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("bias", BIAS)
@pytest.mark.parametrize("make, targets", [(t5, ["q", "v"]), (lambda: gpt2(n_head=2), ["c_attn"])], ids=["t5", "gpt2"])
def test_bias_modes_on_hugging_face_models(make, targets, bias):
    """T5's relative_attention_bias.weight never counts as a bias, GPT-2's biases do, and no buffer is saved."""
    model = make()
    lora.inject_lora(model, r=2, target_modules=targets)
    lora.mark_only_lora_as_trainable(model, bias=bias)
    saved = lora.lora_state_dict(model, bias=bias)
    assert set(saved) == trained(model) and not any("relative" in name for name in saved)
    others = {name for name in saved if not name.endswith(("lora_A", "lora_B"))}
    has_bias = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    wanted = {"none": set(), "all": has_bias, "lora_only": {name for name in has_bias if "c_attn" in name}}
    assert others == wanted[bias]


def test_count_of_gpt2():
    """The paper's GPT-2 has 124,439,808 parameters, its tied table counted once; rank 4 on q and v adds 147,456."""
    with torch.device("meta"):
        model = gpt2(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12)
        assert lora.count_parameters(model) == (124_439_808, 124_439_808)
        lora.inject_lora(model, r=4, target_modules=["c_attn"])
    count = lora.count_parameters(model)
    assert (count.trainable, count.total) == (147_456, 124_439_808 + 147_456)


def test_count_follows_requires_grad():
    """Frozen parameters count in `total` only, a shared Parameter once."""
    one, two = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
    two.weight = one.weight
    one.bias.requires_grad = False
    assert lora.count_parameters(nn.Sequential(one, two)) == (9, 12)
    assert lora.count_parameters(nn.Sequential()) == (0, 0)


@pytest.mark.parametrize("function", ["merge_and_unload", "unload"])
def test_unloading_an_injected_model_restores_its_classes(function):
    """After injection and unloading every module has its first class, and unload gives back every bit."""
    model = gpt2(n_head=2).eval()
    before, classes = snapshot(model), [(name, type(module)) for name, module in model.named_modules()]
    tokens = torch.randint(0, 20, (2, 5))
    with torch.no_grad():
        plain = model(tokens).logits
        lora.inject_lora(model, r=2, target_modules=["c_attn", "c_proj"])
        randomize(model)
        adapted = model(tokens).logits
        assert not torch.allclose(plain, adapted)
        assert getattr(lora, function)(model) is model
        assert [(name, type(module)) for name, module in model.named_modules()] == classes
        if function == "unload":
            assert_same_bits(model.state_dict(), before)
            assert torch.equal(model(tokens).logits, plain)
        else:
            assert model.state_dict().keys() == before.keys()
            torch.testing.assert_close(model(tokens).logits, adapted, rtol=1e-4, atol=1e-4)


def test_unloading_a_tied_embedding_keeps_the_output_layer():
    """Merging the adapter of GPT-2's token table leaves lm_head.weight, tied to it before, bit for bit."""
    model = gpt2(n_head=2)
    lora.inject_lora(model, r=2, target_modules=["wte"])
    randomize(model)
    model.eval()
    tokens, head = torch.randint(0, 20, (2, 5)), model.lm_head.weight.detach().clone()
    with torch.no_grad():
        wanted = model(tokens).logits
        with pytest.warns(UserWarning, match="tie_word_embeddings"):
            lora.merge_and_unload(model)
        torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.lm_head.weight, head) and not torch.equal(model.transformer.wte.weight, head)


# Merging.


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_and_unload_every_layer(case, mode):
    """The plain layer computes what the LoRA layer did, in the same mode, with a plain class and no LoRA tensors."""
    layer, x = case.layer().train(mode == "train"), case.inputs()
    wanted = expected(case, layer, x)
    model = lora.merge_and_unload(nn.Sequential(layer))
    assert type(model[0]).__module__.startswith("torch.nn") and model[0].training == (mode == "train")
    assert set(model.state_dict()) <= {"0.weight", "0.bias"}
    if case.base.get("max_norm") is None:  # the plain layer would bound the merged rows
        assert_close(model[0](x.clone()), wanted)


@pytest.mark.parametrize("state", ["train", "eval", "merged"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_unload_gives_back_the_base(case, state):
    """unload from any state gives the plain class on the same Parameter, every bit of the base in it.

    nn.Linear has no transposed form, so the transposed weight of a layer that was not injected is copied.
    """
    layer = case.layer().train(state == "train")
    if state == "merged":
        lora.merge_lora_weights(layer.train())
    parameter, base = layer.base_weight(), layer.state_dict()["weight"].clone()
    plain = lora.unload(layer)
    assert type(plain).__module__.startswith("torch.nn")
    assert torch.equal(plain.weight, base.T if case.transposed else base) and plain.weight.is_contiguous()
    assert case.transposed or plain.weight is parameter


def test_merging_and_unmerging_a_model():
    """merge and unmerge return the model, keep its mode and output, and leave every stored bit."""
    model = make_model()
    before = snapshot(model)
    with torch.no_grad():
        wanted = lora.unmerge_lora_weights(model)(INDEX)
        for mode in (False, True):
            for layer in lora_layers(model.train(mode)):
                layer.train(mode)
            model.head[1].eval()
            assert lora.merge_lora_weights(model) is model and all(layer.merged for layer in lora_layers(model))
            torch.testing.assert_close(model(INDEX), wanted, rtol=1e-4, atol=1e-4)
            assert lora.unmerge_lora_weights(model) is model and not any(layer.merged for layer in lora_layers(model))
            assert torch.equal(model(INDEX), wanted)
            assert model.training == mode
    assert_same_bits(model.state_dict(), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", sorted(ADAPTERS))
@pytest.mark.parametrize("function", MERGING)
def test_nan_adapter_is_refused(function, name, value):
    """Merging a NaN or infinite adapter raises, naming the parameter, with nothing changed."""
    model = make_model().train()
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity".replace(".", r"\.")):
        getattr(lora, function)(model)
    assert len(lora_layers(model)) == 5 and not any(layer.merged for layer in lora_layers(model))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(9), before[key].nan_to_num(9)), key


@pytest.mark.parametrize("first", [True, False], ids=["lora first", "plain first"])
def test_merge_and_unload_with_tied_weights(first):
    """A weight that another module uses too keeps its value there; the adapted layer gets its own."""
    tied, plain = randomize(lora.Linear(4, 4, r=2)), nn.Linear(4, 4)
    plain.weight = tied.weight
    before, x = plain.weight.detach().clone(), torch.randn(2, 4)
    wanted = tied(x)
    model = nn.ModuleList([tied, plain] if first else [plain, tied])
    lora.merge_and_unload(model)
    assert torch.equal(plain.weight, before)
    assert_close(model[0 if first else 1](x), wanted)


def test_two_adapted_layers_on_one_weight():
    """Two LoRA layers with different adapters on one weight each keep their own output."""
    one, two, x = randomize(lora.Linear(4, 4, r=2)), randomize(lora.Linear(4, 4, r=2)), torch.randn(2, 4)
    two.weight = one.weight
    wanted = one(x), two(x)
    model = lora.merge_and_unload(nn.ModuleList([one, two]))
    assert_close(model[0](x), wanted[0])
    assert_close(model[1](x), wanted[1])


def test_a_module_used_twice_stays_one_module():
    """A LoRA layer registered under two names becomes one plain layer under both, merged once."""
    layer, x = randomize(lora.Linear(4, 4, r=2)), torch.randn(2, 4)
    wanted = layer(layer(x))
    model = lora.merge_and_unload(nn.Sequential(layer, layer))
    assert model[0] is model[1] and type(model[0]) is nn.Linear
    assert_close(model(x), wanted)


# Disabling.


@pytest.mark.parametrize("state", ["train", "eval", "merged"])
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_disable_adapters(case, state):
    """Within the block the base alone computes, merged or not; afterwards the update is back."""
    layer, x = case.layer().train(state == "train"), case.inputs()
    if state == "merged":
        lora.merge_lora_weights(layer.train())
    without = case.fresh(r=0)
    without.load_state_dict({name: value for name, value in layer.state_dict().items() if "lora_" not in name})
    with torch.no_grad():
        wanted, base = expected(case, layer, x), without(x)
        assert_close(layer(x), wanted)
        with lora.disable_adapters(layer):
            assert_close(layer(x), base)
            assert torch.equal(layer.weight, without.weight)
            with lora.disable_adapters(layer):
                assert_close(layer(x), base)
            assert_close(layer(x), base)
            layer.train(not layer.training)
            assert_close(layer(x), base)
        assert_close(layer(x), wanted)


def test_disable_adapters_ends_with_an_exception():
    """An exception inside the block passes on, and the adapters are back."""
    model = make_model()
    wanted = model(INDEX)
    with pytest.raises(KeyError, match="stop"), lora.disable_adapters(model):
        raise KeyError("stop")
    assert torch.equal(model(INDEX), wanted)
    with lora.disable_adapters(model):
        assert not torch.allclose(model(INDEX), wanted)


def test_disabled_adapters_get_no_gradient():
    """A backward within the block reaches what stays in use and leaves the adapters without gradient."""
    model = make_model()
    with lora.disable_adapters(model):
        model(INDEX).sum().backward()
    assert all(model.get_parameter(name).grad is None for name in ADAPTERS)
    assert model.head[0].weight.grad is not None


def test_public_names():
    """`__all__` is sorted and complete: each name exists and has a docstring."""
    own = [name for name in lora.__all__ if getattr(getattr(lora, name), "__module__", "").startswith("loralib.")]
    assert own == sorted(own) and lora.__all__[: len(own)] == own
    assert all(getattr(lora, name).__doc__ for name in own)
