"""Several adapters in one forward: each row of a batch under its own, or all rows under the sum of some.

The oracle is each row alone, under its adapter; and PEFT. Every architecture of transformers is tried with `-m slow`.
Run alone: `pytest tests/test_several.py`.
"""

import copy
import pickle
import threading

import every_architecture as every
import peft
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import loralib as lora

NAMES = ("a", None, "b", "a")
X = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[1, 2, 3, 4], [5, 0, 7, 8], [1, 9, 3, 0], [2, 2, 3, 3]])


def with_adapters(model, targets, names="ab", **options):
    """The model with adapters of different ranks, and with heads and biases of their own that differ."""
    for number, name in enumerate(names):
        lora.inject_lora(model, r=2 + number, target_modules=targets, adapter_name=name, lora_alpha=3, **options)
        with torch.no_grad():
            for place in filter(None, (vars(module).get("_place") for module in model.modules())):
                for key, tensor in place.tensors(place_of(model, place), name).items() if name in place.parts else ():
                    if tensor.is_floating_point():
                        tensor.normal_(std=0.3) if key.startswith("lora_") else tensor.add_(
                            0.5 * torch.rand_like(tensor)
                        )
    return model.eval()


def place_of(model, place):
    return next(module for module in model.modules() if vars(module).get("_place") is place)


def alone(model, call, names=NAMES):
    """What `call(i)` gives for each row with its adapter in the usual way."""
    outputs = []
    for i, name in enumerate(names):
        if name is None:
            with lora.disable_adapters(model), torch.no_grad():
                outputs.append(call(i))
        else:
            lora.set_adapter(model, name)
            with torch.no_grad():
                outputs.append(call(i))
    return outputs


def close(actual, wanted):
    scale = wanted.abs().max().item()
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5 * scale)


class Called(nn.Module):
    """A module made of parts, and of what is done with them."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.run(self, x)


def route(self, x):
    tokens = x.reshape(-1, 8)
    chosen, result = self.gate(tokens).argmax(-1), torch.zeros_like(tokens)
    for number, expert in enumerate(self.experts if hasattr(self, "experts") else self.others):
        its = (chosen == number).nonzero().flatten()
        result.index_copy_(0, its, expert(tokens[its]))
    return result.view_as(x)


def experts():
    return nn.ModuleList(nn.Linear(8, 8) for _ in range(3))


def attention(batch_first):
    return Called(
        lambda self, x: self.out(self.attend(x, x, x)[0]) if batch_first else time_first(self, x),
        attend=nn.MultiheadAttention(8, 2, batch_first=batch_first),
        out=nn.Linear(8, 8),
    )


def time_first(self, x):
    x = x.transpose(0, 1)
    return self.out(self.attend(x, x, x)[0]).transpose(0, 1)


def recurrent(batch_first):
    def forward(self, x):
        y = self.rnn(x if batch_first else x.transpose(0, 1))[0]
        return self.out(y if batch_first else y.transpose(0, 1))

    return Called(forward, rnn=nn.LSTM(8, 8, 2, batch_first=batch_first), out=nn.Linear(8, 8))


RIGHT = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), X, ["0", "1"], {}),
    "merged": (lambda: nn.Sequential(nn.Linear(8, 8)), X, ["0"], {"merge_weights": True}),
    "heads": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)),
        X,
        ["0"],
        {"modules_to_save": ["1", "2"]},
    ),
    "biases": (lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)), X, ["0"], {"bias": "all"}),
    "embedding": (lambda: nn.Sequential(nn.Embedding(10, 8, 0), nn.Linear(8, 8)), IDS, ["0", "1"], {}),
    "bounded": (lambda: nn.Sequential(nn.Embedding(10, 8, max_norm=0.5), nn.Linear(8, 8)), IDS, ["0"], {}),
    "tokens": (lambda: nn.Sequential(nn.Embedding(10, 8)), IDS, [], {"trainable_token_indices": {"0": [1, 2]}}),
    "conv": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, padding=1, padding_mode="reflect")), IMAGES, ["0"], {}),
    "statistics": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)), IMAGES, ["0"], {}),
    "windows": (lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(8, 8), nn.Unflatten(0, (-1, 4))), X, ["1"], {}),
    "time first": (
        lambda: Called(lambda self, x: self.a(x.transpose(0, 1)).transpose(0, 1), a=nn.Linear(8, 8)),
        X,
        ["a"],
        {},
    ),
    "positions": (
        lambda: Called(lambda self, x: x + self.a(torch.arange(4)[None]), a=nn.Embedding(4, 8)),
        X,
        ["a"],
        {},
    ),
    "experts": (lambda: nn.Sequential(Called(route, gate=nn.Linear(8, 3), experts=experts())), X, r".*experts\.\d", {}),
    "attention": (lambda: attention(True), X, ["out_proj", "out"], {"target_parameters": ["in_proj_weight"]}),
    "attention, time first": (lambda: attention(False), X, ["out_proj"], {"target_parameters": ["in_proj_weight"]}),
    "recurrent": (lambda: recurrent(True), X, ["out"], {"target_parameters": ["weight_ih_l0", "weight_hh_l1"]}),
    "recurrent, time first": (lambda: recurrent(False), X, ["out"], {"target_parameters": ["weight_hh_l0"]}),
    "torch's encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        X,
        ["linear1", "out_proj"],
        {},
    ),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("kind", RIGHT)
def test_each_row_is_what_it_is_alone(kind):
    torch.manual_seed(0)
    make, x, targets, options = RIGHT[kind]
    model = with_adapters(make(), targets, **options)
    wanted = torch.cat(alone(model, lambda i: model(x[i : i + 1])))
    active, kinds = lora.active_adapter(model), [type(module) for module in model.modules()]
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode(), lora.adapters_per_row(model, NAMES):
            close(model(x).detach(), wanted)
    assert lora.active_adapter(model) == active and [type(module) for module in model.modules()] == kinds
    with torch.no_grad(), lora.adapters_per_row(model, NAMES[::-1]):  # what was found out about rows holds
        close(model(x.flip(0)), wanted.flip(0))


REFUSED = {
    "flat, time first": (
        lambda: Called(lambda self, x: self.a(x.transpose(0, 1).reshape(-1, 8)).view(4, -1, 8), a=nn.Linear(8, 8)),
        "a is given (16, 8) for a batch of 4 rows",
    ),
    "positions without an axis for rows": (
        lambda: Called(lambda self, x: x + self.a(torch.eye(4, 8)), a=nn.Linear(8, 8)),
        "a is given (4, 8) for a batch of 4 rows",
    ),
    "chosen tokens": (
        lambda: nn.Sequential(
            Called(route, gate=nn.Linear(8, 3), others=nn.ModuleList([*experts()[:2], nn.Linear(8, 8)]))
        ),
        "0.others.0 is given",
    ),
    "a mean over the batch": (
        lambda: Called(lambda self, x: self.a(x - x.mean(0)), a=nn.Linear(8, 8)),
        "a is given (4, 4, 8) for a batch of 4 rows",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_rows_that_cannot_be_told_apart_are_refused(kind):
    torch.manual_seed(0)
    make, message = REFUSED[kind]
    model = make()
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "gate" not in name]
    model = with_adapters(model, targets)
    with lora.adapters_per_row(model, NAMES), torch.no_grad():
        with pytest.raises(ValueError, match="which of it is whose cannot be told") as error:
            model(X)
        assert message in str(error.value)


def some_tokens(self, x):
    kept = x[..., 0] > -5
    result = torch.zeros_like(x)
    result[kept] = self.a(x[kept])
    return result


def of_lengths(*lengths):
    x = torch.randn(len(lengths), max(lengths), 8, generator=torch.Generator().manual_seed(2))
    for row, length in enumerate(lengths):
        x[row, length:, 0] = -10
    return x


@pytest.mark.parametrize("lengths", [[(4, 3, 5, 4)], [(4, 4, 4, 4), (6, 2, 4, 4)], [(4, 4, 4, 4), (2, 1, 2, 3)]])
def test_tokens_of_rows_of_different_lengths_are_refused(lengths):
    model = with_adapters(Called(some_tokens, a=nn.Linear(8, 8)), ["a"])
    with lora.adapters_per_row(model, NAMES), torch.no_grad():
        for right in lengths[:-1]:
            model(of_lengths(*right))
        with pytest.raises(ValueError, match=r"^a .*which .* whose cannot be told"):
            model(of_lengths(*lengths[-1]))


class WithAFlag(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x, time_first=None):
        return self.a(x.transpose(0, 1)).transpose(0, 1) if time_first else self.a(x)


@pytest.mark.parametrize("before", [{}, {"time_first": False}])
def test_another_way_to_call_the_model_is_tried_anew(before):
    model = with_adapters(WithAFlag(), ["a"])
    wanted = torch.cat(alone(model, lambda i: model(X[i : i + 1])))
    with lora.adapters_per_row(model, NAMES), torch.no_grad():
        for flags in (before, {"time_first": True}, before):
            close(model(X, **flags), wanted)


def test_windows_of_images_of_any_size():
    model = with_adapters(nn.Sequential(nn.Flatten(0, 1), nn.Linear(8, 8)), ["1"])
    for time in (1, 3, 1, 2, 4):
        x = torch.randn(4, time, 8)
        rows = []
        for row, name in zip(x, NAMES, strict=True):
            if name is None:
                with lora.disable_adapters(model):
                    rows.append(model[1](row))
            else:
                lora.set_adapter(model, name)
                rows.append(model[1](row))
        wanted = torch.stack(rows)
        with lora.adapters_per_row(model, NAMES):
            close(model(x), wanted.flatten(0, 1))


def test_a_layer_called_past_the_model():
    model = two()
    with lora.adapters_per_row(model, NAMES), torch.no_grad():
        wanted = model(X)
        hidden = model[1](model[0](X))
        close(model[2](hidden), wanted)
        with pytest.raises(ValueError, match=r"2 got \(16, 8\) for a batch of 4"):
            model[2](hidden.flatten(0, 1))


def two():
    torch.manual_seed(0)
    return with_adapters(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), ["0", "2"])


def test_what_changes_a_model_is_refused_within_a_block(tmp_path):
    model = two()
    wanted = model(X)
    with lora.adapters_per_row(model, NAMES):
        for call in (
            lambda: lora.set_adapter(model, "a"),
            lambda: lora.adapters_per_row(model, NAMES).__enter__(),
            lambda: lora.inject_lora(model, target_modules=["0"], adapter_name="c"),
            lambda: lora.merge_lora_weights(model),
            lambda: lora.merge_and_unload(model),
            lambda: lora.unload(model),
            lambda: lora.delete_adapter(model, "a"),
            lambda: lora.lora_state_dict(model),
            lambda: lora.save_lora(model, tmp_path / "a.safetensors"),
            lambda: lora.share_base(model),
            lambda: model.state_dict(),
            lambda: copy.deepcopy(model),
            lambda: pickle.dumps(model),
        ):
            with pytest.raises(ValueError, match="each row has an adapter of its own just now"):
                call()
        with pytest.raises(ValueError, match="4 names of adapters for a batch of 8: give one for each row"):
            model(torch.cat([X, X]))
        with lora.disable_adapters(model):
            base = model(X)
        assert lora.active_adapter(model) is None
    with lora.disable_adapters(model):
        assert torch.equal(model(X), base)
        with pytest.raises(ValueError, match=r"choose adapters outside of lora\.disable_adapters"):
            lora.adapters_per_row(model, NAMES).__enter__()
    assert torch.equal(model(X), wanted)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("ab", "must be a list"),
        ([], "must be a list"),
        (["a", "c"], "no adapter 'c'"),
        ([3, "a"], "no adapter 3"),
        ([["a", "a"]], "a sum is of different adapters"),
    ],
)
def test_names_that_mean_nothing(names, message):
    with pytest.raises(ValueError, match=message):
        lora.adapters_per_row(two(), names).__enter__()


def test_a_block_ends_as_it_began():
    model = lora.merge_lora_weights(two())
    merged = model(X)
    with pytest.raises(KeyError), lora.adapters_per_row(model, NAMES):
        raise KeyError
    assert model[0].merged and torch.equal(model(X), merged) and lora.active_adapter(model) == "b"


def test_gradients_are_each_adapters_own():
    model, gradients = two(), {}
    with lora.adapters_per_row(model, NAMES):
        model(X).square().sum().backward()
    for name in "ab":
        lora.set_adapter(model, name)
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients, before = [parameter.grad for parameter in own], [setattr(p, "grad", None) for p in own]
        model(X[[i for i, other in enumerate(NAMES) if other == name]]).square().sum().backward()
        assert len(before) == 4
        for parameter, gradient in zip(own, gradients, strict=True):
            close(gradient, parameter.grad)


def test_dropout_is_refused_in_training():
    model = with_adapters(nn.Sequential(nn.Linear(8, 8)), ["0"], lora_dropout=0.5)
    with lora.adapters_per_row(model, NAMES):
        model(X)
        model.train()
        with pytest.raises(RuntimeError, match="0 is in training mode, and an adapter has lora_dropout"):
            model(X)


def test_what_has_changed_since_is_seen():
    model = two()
    with torch.no_grad(), lora.adapters_per_row(model, NAMES):
        model(X)
    lora.set_adapter(model, "a")
    with torch.no_grad():
        model[0].lora_B.mul_(2)
        wanted = model(X[:1])
        with lora.adapters_per_row(model, NAMES):
            close(model(X)[:1], wanted)
            model.double()
            close(model(X.double())[:1], wanted.double())
        model[0].lora_B.data.mul_(2)  # which leaves no trace
        wanted = model(X[:1].double())
        with lora.adapters_per_row(model, NAMES):
            close(model(X.double())[:1], wanted)


def test_a_base_in_four_bits():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install '.[test]'")
    torch.manual_seed(0)
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32), nn.Tanh())
    model, x = with_adapters(model.to("cpu"), ["0"]), torch.randn(4, 3, 64)
    wanted = torch.cat(alone(model, lambda i: model(x[i : i + 1])))
    with torch.no_grad(), lora.adapters_per_row(model, NAMES):
        close(model(x), wanted)


def test_half_precision_and_autocast():
    model = two()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = torch.cat(alone(model, lambda i: model(X[i : i + 1])))
        with torch.no_grad(), lora.adapters_per_row(model, NAMES):
            assert (model(X) - wanted).abs().max() < 0.02 * wanted.abs().max()
    model, x = two().bfloat16(), X.bfloat16()
    wanted = torch.cat(alone(model, lambda i: model(x[i : i + 1])))
    with torch.no_grad(), lora.adapters_per_row(model, NAMES):
        assert (model(x) - wanted).abs().max() < 0.02 * wanted.abs().max()


# Sums.


def test_a_sum_is_the_sum_of_the_updates(tmp_path):
    model = two()
    lora.save_lora(model, tmp_path / "adapter")
    layers = {}
    for name in "ab":
        lora.set_adapter(model, name)
        layers[name] = [model[i].delta_weight().double() for i in (0, 2)]
    weights = [model[i].weight.double() + layers["a"][k] + layers["b"][k] for k, i in enumerate((0, 2))]
    first = torch.tanh(nn.functional.linear(X.double(), weights[0], model[0].bias.double()))
    wanted = nn.functional.linear(first, weights[1], model[2].bias.double()).float()
    lora.set_adapter(model, ["a", "b"])
    assert lora.active_adapter(model) == ["a", "b"]
    close(model(X), wanted)
    for call in (
        lambda: lora.merge_lora_weights(model),
        lambda: model.state_dict(),
        lambda: lora.adapters_per_row(model, NAMES).__enter__(),
        lambda: lora.inject_lora(model, target_modules=["0"], adapter_name="c"),
        lambda: lora.load_lora(model, tmp_path / "adapter", adapter_name="a"),
        lambda: lora.load_lora(model, tmp_path / "adapter", adapter_name="c"),
    ):
        with pytest.raises(ValueError, match="the model computes with the sum of 'a' and 'b'"):
            call()
    with pytest.raises(ValueError, match="no adapter 'c'"):
        lora.set_adapter(model, ["a", "c"])
    close(model(X), wanted)
    lora.set_adapter(model, "a")
    with torch.no_grad(), lora.adapters_per_row(model, ["b", ["a", "b"], None, "a"]):
        close(model(X)[1], wanted[1])


def test_a_sum_of_convolutions_and_heads():
    make = RIGHT["conv"][0]
    torch.manual_seed(0)
    model = with_adapters(make(), ["0"])
    one, other = alone(model, lambda i: model(IMAGES), "ab")
    with lora.disable_adapters(model):
        base = model(IMAGES)
    lora.set_adapter(model, ["a", "b"])
    close(model(IMAGES), one + other - base)
    model = with_adapters(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), ["0"], modules_to_save=["1"])
    with pytest.raises(ValueError, match=r"1: 'a' and 'b' have both something there \(bias, weight\)"):
        lora.set_adapter(model, ["a", "b"])
    assert lora.active_adapter(model) == "b"


# Models of transformers.


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, pad_token_id=0, eos_token_id=None, bos_token_id=1))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_gives_the_same(tmp_path):
    ids, names = torch.randint(1, 64, (4, 5)), ["sst2", "__base__", "mrpc", "sst2"]
    ours, theirs = with_adapters(llama(), ["q_proj", "down_proj"], ["sst2", "mrpc"]), None
    for name in ("sst2", "mrpc"):
        lora.set_adapter(ours, name)
        lora.save_lora(ours, tmp_path / name, format="peft")
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / name, adapter_name=name).eval()
        else:
            theirs.load_adapter(tmp_path / name, adapter_name=name)
    with torch.no_grad():
        wanted = theirs(input_ids=ids, adapter_names=names).logits
        close(ours(input_ids=ids, adapter_names=names).logits, wanted)
        close(ours.lm_head(ours.model(input_ids=ids, adapter_names=names).last_hidden_state), wanted)
        with lora.adapters_per_row(ours, names):
            past = ours(ids[:, :3], use_cache=True).past_key_values
            close(ours(ids[:, 3:], past_key_values=past).logits, wanted[:, 3:])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["decoder", "encoder and decoder"])
def test_generate(kind, beams):
    ids = torch.randint(1, 64, (4, 5))
    if kind == "decoder":
        model = with_adapters(llama(), ["q_proj", "v_proj", "embed_tokens"])
    else:
        torch.manual_seed(0)
        config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        config.decoder_start_token_id, config.eos_token_id = 0, None
        model = with_adapters(T5ForConditionalGeneration(config), ["q", "v", "wo"])
    options = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False}
    wanted = torch.cat(alone(model, lambda i: model.generate(ids[i : i + 1], **options)))
    assert torch.equal(model.generate(ids, adapter_names=list(NAMES), **options), wanted)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_is_refused():
    model = with_adapters(llama(), ["q_proj"]).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="gradient checkpointing computes anew in the backward pass"):
        model(torch.randint(1, 64, (4, 5)), adapter_names=NAMES)


class Anything(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, **more):
        assert not more
        return self.layer(x)


def test_adapter_names_are_not_swallowed():
    model = with_adapters(Anything(), ["layer"])
    wanted = torch.cat(alone(model, lambda i: model(X[i : i + 1])))
    close(model(X, adapter_names=NAMES).detach(), wanted)
    close(model(X[3:], adapter_names=None).detach(), wanted[3:])


def test_compiled_once_for_all_assignments():
    torch.manual_seed(0)
    model = with_adapters(nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 4)), ["0", "1", "2"])
    torch._dynamo.reset()
    compiled, graphs = torch.compile(model, backend="aot_eager", fullgraph=True), torch._dynamo.utils.counters["stats"]
    made = []
    with torch.no_grad():
        for names in (NAMES, ["b", "a", None, "b"], ["b", "b", "a", None]):
            with lora.adapters_per_row(model, names):
                wanted = model(IDS)
                close(compiled(IDS), wanted)
            made.append(graphs["unique_graphs"])
    assert len(set(made)) == 1
    model = with_adapters(nn.Sequential(nn.Conv2d(4, 8, 3)), ["0"])
    with lora.adapters_per_row(model, NAMES), torch.no_grad():
        wanted = model(IMAGES)
        close(torch.compile(model, backend="eager")(IMAGES), wanted)  # not compiled there
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"which torch\.compile would do anew for each assignment"):
            torch.compile(model, backend="eager", fullgraph=True)(IMAGES)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
@pytest.mark.parametrize("compiled", [False, True])
def test_what_was_trained_is_seen_without_gradients(compiled):
    model = two()
    call = torch.compile(model, backend="eager") if compiled else model
    lora.set_adapter(model, ["a", "b"])
    with torch.no_grad():
        call(X)
    tensors = [tensor for part in vars(model[0])["_place"].parts.values() for tensor in part.tensors.values()]
    optimizer = torch.optim.SGD(tensors, lr=0.1)
    call(X).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        found = call(X)
    close(found, model(X).detach())


def test_parts_that_are_called_past_the_forward_are_refused():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def other(self, x):
            return self.layer(x) * self.layer.weight.mean()

        def forward(self, x):
            return x

    owner = Owner()
    for forward in (lambda self, x: self.a(self.a.other(x)), lambda self, x: self.a(x) * self.a.layer.weight.mean()):
        model = with_adapters(Called(forward, a=copy.deepcopy(owner)), ["layer"])
        past = pytest.raises(ValueError, match="a Linear in a is used past the forward of that")
        with lora.adapters_per_row(model, NAMES), torch.no_grad(), past:
            model(X)


# Threads.


def test_threads_on_one_base():
    one = two()
    other = lora.share_base(one)
    assert other[0].weight is one[0].weight and other[0].lora_A is not one[0].lora_A
    lora.set_adapter(one, "a")
    wanted, wrong = {one: one(X), other: other(X)}, []

    def serve(model, name, another):
        for _ in range(100):
            lora.set_adapter(model, another)
            with torch.no_grad(), lora.adapters_per_row(model, NAMES):
                model(X)
            lora.set_adapter(model, name)
            if not torch.equal(model(X), wanted[model]):
                wrong.append(name)

    threads = [threading.Thread(target=serve, args=each) for each in ((one, "a", "b"), (other, "b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", ["heads", "biases", "attention", "recurrent", "tokens", "conv", "merged"])
def test_merging_a_copy_for_good_leaves_the_others(kind):
    torch.manual_seed(0)
    make, x, targets, options = RIGHT[kind]
    model = with_adapters(make(), targets, **options)
    with torch.no_grad():
        wanted = model(x)
        one = lora.share_base(model)
        two = lora.share_base(one)
        close(lora.merge_and_unload(one)(x), wanted)
        assert torch.equal(model(x), wanted) and torch.equal(two(x), wanted)


def test_a_copy_that_is_merged_for_good_still_shares_the_rest():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    lora.inject_lora(model, r=2, target_modules=["0"], bias="lora_only")
    one = lora.share_base(model)
    lora.merge_and_unload(one)
    assert one[2].weight is model[0].weight and one[0].bias is not model[0].bias


# Every architecture.


def mixed(kind, name):
    """ "right", "refused: ..." or what is wrong with rows under default adapters; None if the model does not run."""
    model = every.with_weights(kind, name)
    with torch.no_grad():
        ran = model and every.taken(model)
    if ran is None:
        return None
    given = ran[0]
    try:
        model = with_adapters(model, None)
    except (TypeError, ValueError):
        return None
    rows = [{key: value[i : i + 1] for key, value in given.items()} for i in range(2)]
    with torch.no_grad():
        try:
            with lora.adapters_per_row(model, ["a", "b"]):
                outputs = every.run(model, given)
        except ValueError as error:
            return f"refused: {error}"
        lone = alone(model, lambda i: every.run(model, rows[i]), "ab")
        together = alone(model, lambda i: every.run(model, given), "ab")  # what other rows do to a row in the base
    for k, output in enumerate(outputs):
        for i in range(2):
            one = lone[i][k]
            if output.dim() and len(output) == 2 * len(one) and one.numel():
                size = len(one)
                own, usual = (x[i * size : (i + 1) * size] for x in (output, together[i][k]))
                if (own - one).abs().max() > 1e-4 * one.abs().max() + 2 * (usual - one).abs().max():
                    return f"row {i} of output {k} is not what it is alone"
    return "right"


def test_positions_that_are_given_later():
    """The same for all rows at first, each row's own in another call."""
    model, ids = with_adapters(small_gpt2(), ["wpe", "c_attn"]), torch.randint(1, 64, (4, 5))
    wanted = torch.cat(alone(model, lambda i: model(ids[i : i + 1]).logits))
    with torch.no_grad(), lora.adapters_per_row(model, NAMES):
        close(model(ids).logits, wanted)
        close(model(ids, position_ids=torch.arange(5).expand(4, 5)).logits, wanted)
        close(model(ids).logits, wanted)


def small_gpt2():
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


FAST = ["gpt2", "switch_transformers", "fsmt", "mixtral", "squeezebert", "albert"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FAST)
def test_some_architectures(kind):
    """Positions, experts, time first, fused experts, a convolution, a layer that is used twice."""
    name = next(name for _, each, name in every.architectures() if each == kind)
    assert mixed(kind, name) == "right"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_architecture():
    found = {}
    for _, kind, name in every.architectures():
        found[kind, name] = mixed(kind, name)
    wrong = {each: result for each, result in found.items() if result and result != "right"}
    print(f"{sum(result == 'right' for result in found.values())} right")
    print("\n".join(f"{kind} {name}: {result}" for (kind, name), result in wrong.items()))
    assert {kind for kind, _ in wrong} <= {"perceiver"} and all(each.startswith("refused") for each in wrong.values())


class Ways(nn.Module):
    """Calls a layer in ways that lay the rows of a batch otherwise: as they are, time first, flattened time first."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x, way=0, options=None, lengths=None):
        assert lengths is None or len(lengths) == len(x)
        way = options["way"] if options else way
        if way == 2:
            return self.a(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], -1)).transpose(0, 1)
        if way == 3:
            return self.a(x.flip(0)).flip(0)
        return self.a(input=x.transpose(0, way)).transpose(0, way)


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    {
        "a number": ((X, 0), (X, 1), False),
        "a number within": ((X, 0, {"way": 0}), (X, 0, {"way": 1}), False),
        "rows that are all alike": ((0 * X, 2), (X, 2), True),
        "a large offset": ((1e4 + X, 3), (1e4 + X, 3), True),
        "a trial that fails": ((X, 0), (X, 1, None, [4] * 4), True),
    }.values(),
)
def test_what_was_tried_for_one_call_is_not_taken_for_another(first, second, refused):
    model = with_adapters(Ways(), ["a"])
    with torch.no_grad(), lora.adapters_per_row(model, NAMES):
        if refused:
            with pytest.raises(ValueError, match="which (rows|of it) (are|is) whose"):
                model(*first)
                model(*second)
            return
        model(*first)
        got = model(*second)
    close(got, torch.stack(alone(model, lambda i: model.a(X[i]))))


def test_rows_of_padded_texts_are_found_anew_in_each_call():
    """Padding is taken out before the layer: as many tokens in all, but not for each row."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            there = x[..., 0] > -5
            return torch.zeros_like(x).masked_scatter(there[..., None], self.a(x[there]))

    model = with_adapters(Packed(), ["a"])

    def texts(*lengths):
        x = torch.randn(4, 6, 8)
        for row, length in zip(x, lengths, strict=True):
            row[length:, 0] = -10
        return x

    with torch.no_grad(), lora.adapters_per_row(model, NAMES):
        x = texts(3, 3, 3, 3)
        got = model(x)
        with pytest.raises(ValueError, match="which of it is whose"):
            model(texts(2, 4, 3, 3))
    close(got, torch.stack(alone(model, lambda i: model(x[i : i + 1])[0])))


@pytest.mark.parametrize("change", [torch.Tensor.neg_, lambda B: B.copy_(B.flip(0).clone())])
def test_writes_through_data_that_keep_the_norm_are_seen(change):
    model = with_adapters(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), ["0"])
    with torch.no_grad(), lora.adapters_per_row(model, NAMES):
        model(X)
    lora.set_adapter(model, "a")
    change(model[0].lora_B.data)
    wanted = torch.stack(alone(model, lambda i: model(X[i])))
    with torch.no_grad(), lora.adapters_per_row(model, NAMES):
        close(model(X), wanted)
