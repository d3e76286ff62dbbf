"""One test (or group) for every defect of the original loralib that this one must not inherit, rows 1 to 30.

How: each test does what a user of upstream did and asserts the right result; on loralib 0.1.2 every row fails.
Run alone: `pytest tests/test_defects.py`; one row: `pytest tests/test_defects.py -k row_17`.
"""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from reference import (
    CONV,
    EMBEDDING,
    KINDS,
    LINEAR,
    MERGED,
    QV,
    assert_close,
    assert_laws,
    assert_same_bits,
    expected,
    kaiming_bound,
    randomize,
    snapshot,
)
from safetensors.torch import save
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import loralib as lora

each_kind = pytest.mark.parametrize("case", KINDS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
no_linear = pytest.mark.parametrize("case", [LINEAR[0], MERGED[0], EMBEDDING[0]], ids=str)


def base_weight(layer):
    """The stored base weight; upstream's convolutions keep it one level down."""
    state = layer.state_dict()
    return state["weight"] if "weight" in state else state["conv.weight"]


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@each_kind
def test_row_01_train_and_eval_return_the_layer(case):
    """`layer.eval()` and `layer.train()` return the layer, so that calls can be chained."""
    layer = case.fresh()
    assert layer.eval() is layer and layer.train() is layer and layer.train(False) is layer


@each_kind
def test_row_02_layers_can_be_pickled(case):
    """A layer without dropout survives pickle, torch.save and deepcopy."""
    layer, x = case.layer(), case.inputs()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for copied in (pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False), copy.deepcopy(layer)):
        assert torch.equal(copied(x), layer(x))


@each_dtype
@each_kind
def test_row_03_merging_does_not_drift(case, dtype):
    """After many merges of changing, also large, adapters the base weight is the same to the last bit."""
    if case.is_embedding and "max_norm" in case.base:
        pytest.skip("torch bounds the rows in place")
    layer, x = case.layer(dtype), case.inputs(dtype)
    base = base_weight(layer).clone()
    for toggle in range(40):
        randomize(layer, scale=100.0 if toggle == 20 else 1.0)
        layer.eval()
        with torch.no_grad():
            layer(x)
        layer.train()
    assert torch.equal(base_weight(layer), base)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@each_kind
def test_row_04_nan_adapter_does_not_destroy_the_base(case, value):
    """Merging an adapter with NaN or inf leaves the base weight alone; a good adapter works again afterwards."""
    layer, x = case.layer(), case.inputs()
    base = base_weight(layer).clone()
    good = layer.lora_B.detach().clone()
    with torch.no_grad():
        layer.lora_B[0, 0] = value
        layer.eval()
        layer(x)
        layer.train()
        layer.lora_B.copy_(good)
    assert_laws(case, layer, base, x)


@each_kind
def test_row_05_eval_inside_autocast_is_exact(case):
    """eval() under autocast merges in full precision and leaves the base weight exact."""
    layer, x = case.layer(), case.inputs()
    base = base_weight(layer).clone()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        layer.eval()
        layer(x)
    with torch.no_grad():
        assert_close(layer(x), expected(case, layer, x))
    layer.train()
    assert torch.equal(base_weight(layer), base)


@each_kind
def test_row_06_state_dict_in_eval_holds_the_base(case):
    """A full state dict saved in eval mode has the base weight: loaded elsewhere, the update counts once."""
    layer, x = case.layer(), case.inputs()
    wanted, before = expected(case, layer, x), snapshot(layer)
    layer.eval()
    with torch.no_grad():
        layer(x)
    assert_same_bits(layer.state_dict(), before)
    other = case.fresh()
    other.load_state_dict(layer.state_dict())
    assert_close(other.eval()(x), wanted)


@pytest.mark.parametrize("what", ["adapter", "all"])
@each_kind
def test_row_07_loading_in_eval_mode(case, what):
    """An adapter or a full checkpoint loaded into a model in eval mode counts at once and harms nothing later."""
    source, layer, x = case.layer(), case.layer().eval(), case.inputs()
    with torch.no_grad():
        layer(x)
    state = {k: v for k, v in source.state_dict().items() if what == "all" or "lora_" in k}
    base = base_weight(source if what == "all" else layer).clone()
    layer.load_state_dict(state, strict=False)
    assert_laws(case, layer, base, x)
    layer.train()
    assert_laws(case, layer, base, x)


@pytest.mark.parametrize("what", ["lora_A", "lora_B", "data", "scaling"])
@each_kind
def test_row_08_editing_while_merged(case, what):
    """A, B or `scaling` changed while merged take effect at once, and unmerging gives back the base."""
    layer, x = case.layer(), case.inputs()
    base = base_weight(layer).clone()
    layer.eval()
    with torch.no_grad():
        layer(x)
        if what == "scaling":
            layer.scaling *= 3
        elif what == "data":
            layer.lora_B.data.mul_(-2)
        else:
            getattr(layer, what).mul_(-2)
    assert_laws(case, layer, base, x)
    layer.train()
    assert_laws(case, layer, base, x)


@pytest.mark.parametrize("case", [case for case in KINDS if not case.is_embedding], ids=str)
def test_row_09_eval_between_forward_and_backward(case):
    """Gradients are right when the layer goes to eval mode between forward and backward."""
    layer, x = case.layer(), case.inputs()
    x.requires_grad_()
    reference = torch.autograd.grad(expected(case, layer, x).pow(2).sum(), x)[0]
    loss = layer(x).pow(2).sum()
    layer.eval()
    loss.backward()
    torch.testing.assert_close(x.grad, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CONV, ids=str)
def test_row_10_every_convolution_works(case, mode):
    """Conv1d and Conv3d with kernels beyond 1, tuple and non-square kernels, in training and evaluation."""
    layer, x = case.layer(), case.inputs()
    layer.train(mode == "train")
    assert_close(layer(x), expected(case, layer, x))


@pytest.mark.parametrize("case", [CONV[1], CONV[6], CONV[12]], ids=str)
def test_row_11_convolution_state_dicts(case):
    """A conv layer loads plain torch keys and both upstream forms, and stores every tensor once."""
    plain, layer, x = case.plain(torch.float32), case.fresh(), case.inputs()
    names = set(plain.state_dict())
    missing = layer.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) == {"lora_A", "lora_B"}
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-6, atol=1e-6)
    assert set(layer.state_dict()) == names | {"lora_A", "lora_B"}

    nested = {f"conv.{key}": value for key, value in plain.state_dict().items()}  # 0.1.2
    for form in (nested, nested | {"weight": plain.weight.data}):  # upstream's main writes the weight twice
        model = nn.Sequential(case.fresh())
        state = {f"0.{key}": value for key, value in form.items()} | {
            f"0.{key}": value for key, value in case.layer().state_dict().items() if "lora_" in key
        }
        kept = dict(state)
        model.load_state_dict(state, strict=True)
        assert torch.equal(model[0].weight, plain.weight) and state.keys() == kept.keys()


@pytest.mark.parametrize("case", [CONV[0], CONV[6], CONV[12]], ids=str)
def test_row_12_convolution_dropout_and_bias(case):
    """Conv uses `lora_dropout` in training only, and `lora_only` trains and saves its bias."""
    layer, x = case.layer(lora_dropout=1.0), case.inputs()
    assert torch.equal(layer(x), case.plain(torch.float32)._conv_forward(x, base_weight(layer), layer.bias))
    assert_close(layer.eval()(x), expected(case, layer, x))
    model = nn.Sequential(case.fresh())
    lora.mark_only_lora_as_trainable(model, bias="lora_only")
    assert trained(model) == set(lora.lora_state_dict(model, bias="lora_only")) == {"0.lora_A", "0.lora_B", "0.bias"}


@pytest.mark.parametrize("enable", [None, [False], [False, False, False]], ids=str)
def test_row_13_merged_linear_with_nothing_enabled(enable):
    """A `MergedLinear` with no group enabled, its own default, is a plain linear layer."""
    layer = lora.MergedLinear(4, 6, r=2, **({} if enable is None else {"enable_lora": enable}))
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias)) and set(layer.state_dict()) == {
        "weight",
        "bias",
    }
    assert torch.equal(layer.eval()(x), F.linear(x, layer.weight, layer.bias)) and layer.weight.requires_grad


def test_row_14_enable_lora_takes_booleans_only():
    """`enable_lora=[1, 0, 1]` is refused rather than read as indices."""
    with pytest.raises(TypeError, match=r"enable_lora=\[1, 0, 1\].*\[True, False, True\]"):
        lora.MergedLinear(4, 6, r=2, enable_lora=[1, 0, 1])


@pytest.mark.parametrize("case", [*KINDS, MERGED[2]], ids=str)
def test_row_15_construction_on_the_meta_device(case):
    """A layer made on the meta device, emptied to a CPU and loaded computes as the original in both modes."""
    source, x = case.layer(), case.inputs()
    wanted = expected(case, source, x)
    with torch.device("meta"):
        layer = case.fresh()
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    assert_close(layer(x), wanted)
    layer.eval()
    assert_close(layer(x), wanted)


def test_row_16_flops_of_merged_linear():
    """A forward costs the base product and the two narrow ones; a training step 2.0x the base forward and those."""
    d, r, tokens = 128, 4, 32
    layer = randomize(lora.MergedLinear(d, 3 * d, r=r, enable_lora=QV))
    x = torch.randn(tokens, d, requires_grad=True)
    base, narrow = 2 * tokens * d * 3 * d, 2 * tokens * 2 * r * (d + 3 * d)
    with FlopCounterMode(display=False) as forward:
        out = layer(x)
    assert forward.get_total_flops() <= base + narrow
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() <= base + 2 * narrow


@pytest.mark.parametrize("case", [*LINEAR[:1], LINEAR[2], MERGED[0], MERGED[1]], ids=str)
def test_row_16_no_dense_tensor_kept_for_backward(case):
    """Besides the weight itself, nothing of its shape is kept for backward."""
    layer, x = case.layer(), case.inputs().requires_grad_()
    shapes = {tuple(layer.weight.shape), tuple(layer.weight.T.shape)}
    dense = []

    def pack(tensor):
        if tuple(tensor.shape) in shapes and tensor.data_ptr() != layer.weight.data_ptr():
            dense.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert not dense


def test_row_17_embedding_with_max_norm_leaves_the_adapter_alone():
    """`max_norm` bounds the rows of the base and never writes to lora_A."""
    layer = randomize(lora.Embedding(9, 4, r=2, max_norm=0.1), scale=10)
    before = layer.lora_A.detach().clone()
    layer(torch.arange(9)).sum().backward()
    assert torch.equal(layer.lora_A, before) and layer.lora_A.grad is not None


def test_row_17_sparse_embedding_trains():
    """`sparse=True` works in backward, with dense gradients for the adapter."""
    layer = randomize(lora.Embedding(9, 4, r=2, sparse=True))
    layer(torch.tensor([1, 1, 3])).sum().backward()
    assert not layer.lora_A.grad.is_sparse and layer.lora_A.grad[:, [1, 3]].abs().sum() > 0


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_kind
def test_row_18_float32_adapter_on_a_half_precision_base(case, dtype, mode):
    """The forward returns the base's dtype, the gradients of the adapter are float32, in both modes."""
    layer, x = case.layer(dtype).train(mode == "train"), case.inputs(dtype)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    out = layer(x)
    assert out.dtype == dtype and layer.lora_A.dtype == torch.float32
    assert_close(out, expected(case, layer, x))
    if mode == "train":  # a merged layer gives its adapter no gradient, as upstream
        out.float().sum().backward()
        assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("case", [LINEAR[2], MERGED[1]], ids=str)
def test_row_19_fan_in_fan_out_is_contiguous(case):
    """A transposed weight is contiguous, so that safetensors takes it."""
    layer = case.fresh()
    assert layer.weight.is_contiguous() and save(layer.state_dict())


@pytest.mark.parametrize("make", [lora.Linear, lora.MergedLinear], ids=["Linear", "MergedLinear"])
def test_row_19_fan_in_fan_out_draws_with_the_right_fan_in(make):
    """reset_parameters() of a transposed layer takes the fan-in from in_features."""
    layer = make(4, 900, r=2, fan_in_fan_out=True)
    layer.reset_parameters()
    bound = kaiming_bound(4)
    assert 0.9 * bound < layer.weight.abs().max() <= bound
    assert 0.9 * bound < layer.bias.abs().max() <= bound


@no_linear
def test_row_20_vmap_over_adapters(case):
    """torch.func.vmap over stacked adapters gives each one's output."""
    layers, x = [case.layer() for _ in range(3)], case.inputs()
    for layer in layers[1:]:
        layer.weight = layers[0].weight
    base = {name: value.detach() for name, value in layers[0].named_parameters() if "lora_" not in name}
    stacked = {name: torch.stack([getattr(layer, name).detach() for layer in layers]) for name in ("lora_A", "lora_B")}
    out = torch.vmap(lambda adapter: torch.func.functional_call(layers[0], {**base, **adapter}, (x,)))(stacked)
    for got, layer in zip(out, layers, strict=True):
        wanted = expected(case, layer, x) if "bias" not in base else _with_bias(case, layer, x, base["bias"])
        assert_close(got, wanted)


def _with_bias(case, layer, x, bias):
    with torch.no_grad():
        layer.bias.copy_(bias)
    return expected(case, layer, x)


def test_row_21_mark_switches_adapters_back_on():
    """Adapters train again after `requires_grad_(False)` on the whole model."""
    model = nn.Sequential(lora.Linear(4, 6, r=2), nn.Linear(6, 2)).requires_grad_(False)
    lora.mark_only_lora_as_trainable(model)
    assert trained(model) == {"0.lora_A", "0.lora_B"}


def tiny_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    model.encoder.block[0].layer[0].SelfAttention.q = lora.Linear(8, 8, r=2, bias=False)
    return model


class OldGPT2Attention(nn.Module):
    """The attention of GPT-2 as transformers had it up to 4.5x: its causal mask is a buffer called `bias`."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.ones(4, 4, dtype=torch.bool).tril())
        self.c_attn = lora.MergedLinear(8, 24, r=2, enable_lora=QV)


def test_row_22_bias_all_means_parameters_called_bias():
    """`bias='all'` leaves T5's relative_attention_bias.weight frozen and GPT-2's mask buffer out of the file."""
    model = tiny_t5()
    assert any("relative_attention_bias.weight" in name for name, _ in model.named_parameters())
    lora.mark_only_lora_as_trainable(model, bias="all")
    assert not [name for name in trained(model) if "lora_" not in name]
    assert not [name for name in lora.lora_state_dict(model, bias="all") if "lora_" not in name]
    attention = OldGPT2Attention()
    names = {"c_attn.lora_A", "c_attn.lora_B", "c_attn.bias"}
    lora.mark_only_lora_as_trainable(attention, bias="all")
    assert set(lora.lora_state_dict(attention, bias="all")) == trained(attention) == names


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_row_23_saved_is_what_is_trained(bias):
    """In every bias mode the saved names are the trained ones, the bias of an r=0 layer included."""
    model = nn.Sequential(lora.Linear(4, 4, r=2), lora.Linear(4, 4), lora.Conv1d(4, 4, 1, r=1), nn.Linear(4, 4))
    lora.mark_only_lora_as_trainable(model, bias=bias)
    saved = set(lora.lora_state_dict(model, bias=bias))
    assert saved == trained(model)
    assert ("1.bias" in saved) == (bias != "none") and ("3.bias" in saved) == (bias == "all")


@pytest.mark.parametrize("call", ["mark_only_lora_as_trainable", "lora_state_dict"])
@pytest.mark.parametrize("bias", ["lora", "", None, True], ids=repr)
def test_row_24_wrong_bias_changes_nothing(bias, call):
    """A wrong `bias=` says what came and what is allowed, before anything is frozen."""
    model = nn.Sequential(lora.Linear(4, 4, r=2), nn.Linear(4, 4))
    before = trained(model)
    with pytest.raises(ValueError, match="none.*all.*lora_only") as error:
        getattr(lora, call)(model, bias=bias)
    assert repr(bias) in str(error.value) and trained(model) == before


def test_row_25_a_name_belongs_to_an_adapter_if_a_part_of_it_begins_so():
    """`lora_net.weight` and `lora_gain` are trained and saved, as client code relies on; `explora_head` is not."""
    model = nn.ModuleDict({"explora_head": nn.Linear(4, 2), "lora_net": nn.Linear(4, 2), "fc": lora.Linear(4, 2, r=1)})
    model["fc"].lora_gain = nn.Parameter(torch.ones(1))
    lora.mark_only_lora_as_trainable(model)
    own = {"lora_net.weight", "lora_net.bias", "fc.lora_A", "fc.lora_B", "fc.lora_gain"}
    assert trained(model) == set(lora.lora_state_dict(model)) == own


def test_row_26_merging_leaves_tied_weights_alone():
    """Merging an embedding whose table is also the output layer's weight does not change the output layer."""
    embedding, head = randomize(lora.Embedding(9, 4, r=2)), nn.Linear(4, 9, bias=False)
    head.weight = embedding._parameters["weight"]
    before, x = head.weight.detach().clone(), torch.randn(2, 4)
    wanted = head(x)
    with torch.no_grad():
        embedding.eval()(torch.arange(9))
    assert torch.equal(head.weight, before) and torch.equal(head(x), wanted)


@each_kind
def test_row_27_functional_call_in_eval_uses_the_given_adapter(case):
    """torch.func.functional_call on a layer in eval mode computes with the adapter it is given."""
    layer, other, x = case.layer(), case.layer(), case.inputs()
    given = {name: value.detach().clone() for name, value in other.named_parameters() if "lora_" in name}
    layer.eval()
    with torch.no_grad():
        layer(x)
        out = torch.func.functional_call(layer, given, (x,))
    layer.train()
    layer.load_state_dict({**layer.state_dict(), **given})
    assert_close(out, expected(case, layer, x))


@each_kind
def test_row_28_switching_merge_weights_off_while_merged(case):
    """train() unmerges also when `merge_weights` was switched off in between."""
    layer, x = case.layer(), case.inputs()
    base = base_weight(layer).clone()
    layer.eval()
    with torch.no_grad():
        layer(x)
    layer.merge_weights = False
    layer.train()
    assert not layer.merged
    with torch.no_grad():
        layer.lora_B.mul_(2)
    assert_laws(case, layer, base, x)
    assert torch.equal(layer.weight, base)


each_constructor = pytest.mark.parametrize(
    "kind, args",
    [("Linear", (4, 6)), ("MergedLinear", (4, 6)), ("Embedding", (9, 4)), ("Conv1d", (4, 6, 1)), ("Conv2d", (4, 6, 3))],
)


@each_constructor
def test_row_29_rank_zero_has_a_scaling(kind, args):
    """A layer with r=0 has a `scaling`, 0.0, as code that reads it on every layer expects."""
    assert getattr(lora, kind)(*args).scaling == 0


@each_constructor
def test_row_29_negative_rank_is_refused(kind, args):
    """A negative rank raises, and the message says what is allowed."""
    with pytest.raises(ValueError, match="r=-1: the rank must be 0.*or a positive integer"):
        getattr(lora, kind)(*args, r=-1)


@each_constructor
def test_row_29_repr_shows_rank_and_alpha(kind, args):
    """`repr` shows rank and alpha."""
    assert "r=3, lora_alpha=5" in repr(getattr(lora, kind)(*args, r=3, lora_alpha=5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@each_kind
def test_row_30_moving_while_merged_keeps_the_laws(case, dtype):
    """A dtype change while merged converts the base and the adapter, not the merged weight."""
    layer = case.layer()
    base = base_weight(layer).to(dtype)
    layer.eval()
    with torch.no_grad():
        layer(case.inputs())
    layer.to(dtype)
    assert_laws(case, layer, base)
    layer.train()
    assert_laws(case, layer, base)


@each_kind
def test_row_30_reset_while_merged_keeps_the_laws(case):
    """reset_parameters() while merged draws a new base and a zero update, and both laws hold afterwards."""
    layer, x = case.layer(), case.inputs()
    layer.eval()
    with torch.no_grad():
        layer(x)
    before = base_weight(layer).clone()
    layer.reset_parameters()
    base = base_weight(layer).clone()
    assert torch.equal(layer.weight, base) and not torch.equal(base, before)
    assert_laws(case, layer, base, x)
    randomize(layer)
    layer.train()
    assert_laws(case, layer, base, x)
