"""Bases whose weights are stored in few bits, of several packages: training, files, switching, unloading, dequantising.

The oracle is the plain layer on the weights that the quantised one computes with. Packages that are not installed are
skipped. Run alone: `pytest tests/test_quantized_bases.py`.
"""

import copy

import pytest
import torch
import transformers
from reference import randomize
from torch import nn
from torch.utils.checkpoint import checkpoint

import loralib as lora

WIDTH = 64


class Model(nn.Module):
    def __init__(self, quantize):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = quantize(nn.Linear(WIDTH, WIDTH)), quantize(nn.Linear(WIDTH, WIDTH, bias=False))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x, saving=False):
        run = (lambda layer, x: checkpoint(layer, x, use_reentrant=False)) if saving else (lambda layer, x: layer(x))
        return self.head(run(self.second, run(self.first, x).relu()))


def of_torchao(make):
    def quantize(layer):
        torchao = pytest.importorskip("torchao.quantization")
        holder = nn.Sequential(layer)
        torchao.quantize_(holder, make(torchao))
        return holder[0]

    return quantize


def int4(torchao):
    from torchao.quantization.granularity import PerGroup

    return torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def four_bit(kind, double):
    def quantize(layer):
        made = pytest.importorskip("bitsandbytes").nn.Linear4bit(
            WIDTH, WIDTH, layer.bias is not None, torch.float32, compress_statistics=double, quant_type=kind
        )
        made.load_state_dict(layer.state_dict(), strict=False)
        return made.to("cpu")

    return quantize


def eight_bit(layer):
    made = pytest.importorskip("bitsandbytes").nn.Linear8bitLt(
        WIDTH, WIDTH, layer.bias is not None, has_fp16_weights=False
    )
    made.load_state_dict(layer.state_dict(), strict=False)
    return made.to("cpu")


def half_quadratic(layer):
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
    return hqq.HQQLinear(layer.requires_grad_(False), config, compute_dtype=torch.float32, device="cpu")


def four_bits_in_groups(weight, group=32):
    """Codes (out, in) of 0 to 15, and for each row and group a scale and the code of zero, (out, groups)."""
    parts = weight.detach().unflatten(1, (-1, group))
    low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    scales = (high - low) / 15
    zeros = (-low / scales).round()
    codes = (parts / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return codes.flatten(1).int(), scales, zeros.int()


def packed(codes):
    """Eight rows of 4-bit codes in one of int32."""
    shifts = 4 * torch.arange(8).view(1, 8, 1)
    return (codes.long().unflatten(0, (-1, 8)) << shifts).sum(1).to(torch.int32)


def unpacked(words):
    return (words.long()[:, None] >> 4 * torch.arange(8).view(1, 8, 1) & 15).flatten(0, 1)


class BaseQuantLinear(nn.Module):
    pass


class PackableQuantLinear(BaseQuantLinear):
    """gptqmodel's `TorchLinear` as its clients see it, for machines without the package: buffers and arithmetic."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        codes, scales, zeros = four_bits_in_groups(layer.weight)
        self.register_buffer("qweight", packed(codes.T))
        self.register_buffer("qzeros", packed(zeros).T.contiguous())
        self.register_buffer("scales", scales.T.contiguous())
        self.register_buffer("g_idx", torch.arange(self.in_features, dtype=torch.int32) // 32)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def dequantize_weight(self):
        zeros, groups = unpacked(self.qzeros.T).T, self.g_idx.long()
        return self.scales[groups] * (unpacked(self.qweight) - zeros[groups])

    def forward(self, x):
        out = torch.matmul(x.reshape(-1, x.shape[-1]), self.dequantize_weight().to(x.dtype))
        out = out.reshape(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out.add_(self.bias)


def gptq(layer):
    """The layer of the package itself, which no extra of ours installs: it asks for a torch above our bound."""
    kernel = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason="gptqmodel is not installed")
    shape = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
    made = kernel.TorchLinear(bits=4, group_size=32, sym=False, desc_act=False, **shape)
    _, scales, zeros = four_bits_in_groups(layer.weight)
    with torch.no_grad():
        made.pack_original(layer.requires_grad_(False), scales, zeros, torch.arange(WIDTH, dtype=torch.int32) // 32)
    return made.float()  # the scales, which are float16 at first


class ByteLinear(nn.Linear):
    """A layer with float8 weights, as checkpoints have them: its forward widens them."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def float8(layer):
    made = ByteLinear(WIDTH, WIDTH, layer.bias is not None)
    made.load_state_dict(layer.state_dict())
    made.weight = nn.Parameter(made.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return made


QUANTIZED = {
    "torchao int8": of_torchao(lambda torchao: torchao.Int8WeightOnlyConfig()),
    "torchao int4": of_torchao(int4),
    "torchao intx": of_torchao(lambda torchao: torchao.IntxWeightOnlyConfig()),
    "bitsandbytes nf4": four_bit("nf4", False),
    "bitsandbytes nf4, twice": four_bit("nf4", True),
    "bitsandbytes fp4": four_bit("fp4", False),
    "bitsandbytes int8": eight_bit,
    "hqq": half_quadratic,
    "gptq": gptq,
    "gptq, of its interface": PackableQuantLinear,
    "float8": float8,
}
# bitsandbytes' int8 rounds the input as well, and its 4-bit layers compute in bfloat16 on a CPU in eval while the model
# has no adapters.
TOLERANCE = {"bitsandbytes int8": 0.05, **dict.fromkeys([name for name in QUANTIZED if "4" in name], 0.01)}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:MatMul8bitLt:UserWarning")


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", QUANTIZED)


def made(name):
    """The quantised model, and the plain one on the weights that it computes with."""
    model = Model(QUANTIZED[name])
    plain = lora.merge_and_unload(copy.deepcopy(model), dequantize=True)
    return model, plain


def adapted(name):
    torch.manual_seed(1)
    model, plain = made(name)
    for each in (model, plain):
        lora.inject_lora(each, r=2, target_modules=["first", "second"], modules_to_save=["head"])
    randomize(model)
    plain.load_state_dict(lora.lora_state_dict(model), strict=False)
    return model, plain, torch.randn(5, WIDTH)


def close(actual, wanted, name):
    bound = TOLERANCE.get(name, 2e-5) * (1 + wanted.abs().max().item())
    torch.testing.assert_close(actual, wanted, rtol=0, atol=bound)


def test_dequantised_is_what_it_computes_with(name):
    model, plain = made(name)
    assert type(plain.first) is type(plain.second) is nn.Linear and plain.first.weight.dtype.is_floating_point
    x = torch.randn(5, WIDTH)
    close(plain(x), model(x), name)


@pytest.mark.parametrize("saving", [False, True])
def test_outputs_and_gradients_are_those_of_the_plain_layer(name, saving):
    model, plain, x = adapted(name)
    outputs = []
    for each in (model, plain):
        given = x.clone().requires_grad_()
        out = each(given, saving)
        out.square().sum().backward()
        outputs.append((out.detach(), given.grad))
    for actual, wanted in zip(*outputs, strict=True):
        close(actual, wanted, name)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 6 and all(p.dtype == torch.float32 for p in trained.values())
    for key, parameter in trained.items():
        close(parameter.grad, plain.get_parameter(key).grad, name)


def test_eval_does_not_merge_and_merging_is_right_or_refused(name):
    model, plain, x = adapted(name)
    for module in model.modules():
        if hasattr(module, "merge_weights"):
            assert not module.merge_weights
    assert not model.eval().first.merged
    close(model(x), plain(x), name)
    with pytest.raises(ValueError, match="first: the weight is quantised .*nothing was merged.*dequantize=True"):
        lora.merge_and_unload(model)
    try:
        lora.merge_lora_weights(model)
    except ValueError as error:
        assert "first is a quantised" in str(error) and not model.first.merged
    close(model(x), plain(x), name)


@pytest.mark.parametrize("before", [False, True])
def test_the_gradient_through_layers_without_adapter_is_the_same_after_an_evaluation(name, before):
    # bitsandbytes packs 4-bit weights in that, and has no gradient for packed ones.
    gradients = []
    for evaluated in (False, True):
        model = Model(QUANTIZED[name])
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))
        if evaluated and before:
            with torch.no_grad():
                model.eval()(x)
            model.train()
        lora.inject_lora(model, r=2, target_modules=["first"])
        randomize(model)
        if evaluated and not before:
            with torch.no_grad():
                model.eval()(x)
            model.train()
        model(x).square().sum().backward()
        gradients.append(model.first.lora_B.grad)
    if before:
        close(*gradients, name)  # packing has rounded the scales
    else:
        assert torch.equal(*gradients)


def test_merged_for_good(name):
    model, plain, x = adapted(name)
    wanted = plain(x).detach()
    with torch.no_grad():
        model.eval()(x)
    merged = lora.merge_and_unload(model, dequantize=True)
    assert type(merged.first) is nn.Linear and not lora.list_adapters(merged)
    close(merged(x), wanted, name)


def test_files_switching_disabling_unloading(name, tmp_path):
    model, _, x = adapted(name)
    model.eval()
    first = model(x).detach()
    lora.save_lora(model, tmp_path / "a.safetensors")
    lora.save_lora(model, tmp_path / "peft", format="peft")
    lora.inject_lora(model, r=3, target_modules=["first"], adapter_name="other")
    randomize(model)
    other = model(x).detach()
    lora.set_adapter(model, "default")
    assert torch.equal(model(x), first)
    lora.set_adapter(model, "other")
    assert torch.equal(model(x), other)
    with lora.disable_adapters(model):
        base = model(x).detach()
    lora.unload(model)
    close(model(x), base, name)
    untouched = Model(QUANTIZED[name]).eval().requires_grad_(False)
    assert torch.equal(model(x), untouched(x))
    assert [type(m) for m in model.modules()] == [type(m) for m in untouched.modules()]
    for file in ("a.safetensors", "peft"):
        again = copy.deepcopy(model)
        lora.load_lora(again, tmp_path / file)
        close(again(x), first, name)


def test_all_linear_takes_quantised_layers(name):
    assert {"first", "second"} <= set(lora.inject_lora(Model(QUANTIZED[name]), r=2, target_modules="all-linear"))


class MarlinLinear(PackableQuantLinear):
    dequantize_weight = property()  # has none: hasattr is false


class TorchQuantEmbeddings(PackableQuantLinear):
    def forward(self, tokens):
        return nn.functional.embedding(tokens, self.dequantize_weight())


class Rotated(PackableQuantLinear):
    online_full_had = True


@pytest.mark.parametrize("cls", [MarlinLinear, Rotated])
def test_a_layer_of_gptqmodel_that_does_not_tell_its_weight_is_not_made_floating_point(cls):
    model = nn.Sequential(
        PackableQuantLinear(nn.Linear(WIDTH, WIDTH)), cls(nn.Linear(WIDTH, WIDTH)), nn.Linear(WIDTH, 2)
    )
    lora.inject_lora(model, r=2, target_modules=["0", "1", "2"], merge_weights=True)
    model.eval()
    with pytest.raises(ValueError, match=rf"^1: a {cls.__name__} of gptqmodel .*nothing was merged.*GPTQ_TORCH"):
        lora.merge_and_unload(model, dequantize=True)
    assert lora.list_adapters(model) == ["default"] and type(model[0]) is not nn.Linear and model[2].merged


def test_embeddings_of_gptqmodel_are_refused():
    model = nn.Sequential(TorchQuantEmbeddings(nn.Linear(WIDTH, WIDTH)))
    with pytest.raises(TypeError, match="0 is a TorchQuantEmbeddings, which LoRA cannot adapt"):
        lora.inject_lora(model, r=2, target_modules=["0"])


def test_parameters_are_counted_as_the_numbers_that_they_stand_for():
    model = Model(QUANTIZED["bitsandbytes nf4"])
    assert lora.count_parameters(model).total == lora.count_parameters(Model(lambda layer: layer)).total


def test_gpt2_in_four_bits_becomes_a_gpt2_again(tmp_path):
    """Its layers are `Conv1D`, whose weights lie the other way round; a saved model has to load as an ordinary one."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 64, "n_head": 2, "n_positions": 16, "vocab_size": 32}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(
        tmp_path / "base"
    )
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    load = transformers.GPT2LMHeadModel.from_pretrained
    model = load(tmp_path / "base", quantization_config=four_bits, dtype=torch.float32, device_map="cpu").eval()
    lora.inject_lora(model, r=2, target_modules=["c_attn", "c_fc"])
    randomize(model)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    plain = lora.merge_and_unload(model, dequantize=True)
    assert type(plain.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    plain.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(load(tmp_path / "merged")(input_ids=ids).logits, plain(input_ids=ids).logits)
