"""What is around the adapted layers: tied weights, heads in half precision, running statistics, numbers of tokens."""

import copy
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

import loralib as lora

IDS = torch.tensor([[5, 3, 9, 5, 60, 1, 2], [7, 7, 0, 11, 31, 5, 8]])
SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
LLAMA = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    "Llama": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "GPT2": ("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}),
    "Bart": ("BartForConditionalGeneration", SEQ2SEQ),
    "MBart": ("MBartForConditionalGeneration", SEQ2SEQ),
    "Marian": ("MarianMTModel", SEQ2SEQ),
    "T5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 64,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
    ),
}


def _model(name, **more):
    torch.manual_seed(0)
    kind, settings = MODELS[name]
    config = getattr(transformers, f"{name}Config")(**{**settings, **more})
    return getattr(transformers, kind)(config).eval()


def _logits(model):
    labels = {"labels": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **labels).logits


def _tied(model):
    weight = model.get_output_embeddings().weight
    return [name for name, module in model.named_modules() if module._parameters.get("weight") is weight]


def _as_dense(base, weights):
    """The base with each of the tied ends a tensor of its own."""
    values = {f"{name}.weight": base.get_parameter(f"{name}.weight") for name in _tied(base)}
    values.update(weights)
    labels = {"labels": IDS} if base.config.is_encoder_decoder else {}
    return torch.func.functional_call(base, values, (), {"input_ids": IDS, **labels}, tie_weights=False).logits


@pytest.mark.filterwarnings("ignore:the merged embedding no longer equals")
@pytest.mark.parametrize("ends", ["first", "last", "all"])
@pytest.mark.parametrize("how", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_tied_weights(name, how, ends, tmp_path):
    model, base = _model(name), _model(name)
    names = _tied(model)
    assert len(names) >= 2
    chosen = {"first": names[:1], "last": names[-1:], "all": names}[ends]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        lora.inject_lora(model, r=2, **{"target_modules": [], **{how: chosen}}) if how == "target_modules" else (
            lora.inject_lora(model, r=2, target_modules=[next(iter(_linear(model)))], modules_to_save=chosen)
        )
    dense = {}
    torch.manual_seed(1)
    for end in chosen:
        module = model.get_submodule(end)
        if how == "modules_to_save":
            module.weight.normal_() if not dense else None
            dense[f"{end}.weight"] = module.weight.clone()
        else:
            module.lora_A.normal_()
            module.lora_B.normal_()
            dense[f"{end}.weight"] = base.get_parameter(f"{end}.weight") + module.delta_weight()
    if how == "modules_to_save":
        assert len({id(model.get_submodule(end).weight) for end in chosen}) == 1
    wanted = _as_dense(base, dense)

    def check(model):
        torch.testing.assert_close(_logits(model), wanted, atol=2e-5, rtol=1e-4)

    check(model)
    check(model.train().eval())
    model.tie_weights()
    check(model)
    lora.merge_lora_weights(model)
    check(model)
    model.tie_weights()
    check(model)
    lora.unmerge_lora_weights(model)
    with lora.disable_adapters(model):
        model.tie_weights()
        torch.testing.assert_close(_logits(model), _logits(base))
    check(model)
    lora.save_lora(model, tmp_path / "a.safetensors")
    again = _model(name)
    lora.load_lora(again, tmp_path / "a.safetensors")
    check(again)
    again.tie_weights()
    check(again)
    merged = lora.merge_and_unload(again)
    check(merged)
    merged.tie_weights()
    check(merged)
    merged.save_pretrained(tmp_path / "merged")
    check(type(merged).from_pretrained(tmp_path / "merged").eval())
    plain = lora.unload(model)
    torch.testing.assert_close(_logits(plain), _logits(base), rtol=0, atol=0)
    assert _tied(plain) == names


def _linear(model):
    ends = _tied(model)
    return {
        name for name, module in model.named_modules() if name.endswith(("q_proj", ".q", "c_attn")) and name not in ends
    }


@pytest.mark.parametrize("kind", ["peft", "native", "upstream"])
@torch.no_grad()
def test_a_file_with_two_values_for_a_tie_unties_it(kind, tmp_path):
    other = _model("Llama", tie_word_embeddings=False)
    other.lm_head.weight.copy_(other.model.embed_tokens.weight)
    base = _model("Llama")
    base.load_state_dict(other.state_dict())
    lora.inject_lora(other, r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    other.lm_head.weight += 1
    other.model.embed_tokens.weight -= 1
    path = tmp_path / {"peft": "folder", "native": "a.safetensors", "upstream": "a.bin"}[kind]
    if kind == "upstream":
        torch.save(lora.lora_state_dict(other), path)
    else:
        lora.save_lora(other, path, format={"peft": "peft", "native": "loralib"}[kind])
    lora.load_lora(base, path, lora_alpha=16 if kind == "upstream" else None)
    torch.testing.assert_close(_logits(base), _logits(other))
    base.tie_weights()
    torch.testing.assert_close(_logits(base), _logits(other))
    united = _model("Llama")
    lora.inject_lora(united, r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    before = _logits(united)
    with pytest.raises(ValueError, match="lm_head.weight: the model ties it to another tensor of the file"):
        lora.load_lora(united, path, lora_alpha=16 if kind == "upstream" else None)
    assert torch.equal(_logits(united), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_and_biases_of_a_half_precision_base_train_in_float32(dtype, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 2)).to(dtype)
    base = copy.deepcopy(model)
    lora.inject_lora(model, r=2, target_modules=["0"], modules_to_save=["2"], bias="all")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and len(trained) == 6
    x = torch.randn(8, 16, dtype=dtype)
    torch.testing.assert_close(model(x), base(x))
    hidden = model[:2](x)
    head = nn.functional.linear(hidden.float(), model[2].weight, model[2].bias)
    assert torch.equal(model(x), head.to(dtype)) and model(x).dtype == dtype
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5, weight_decay=0)
    for _ in range(10):
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model[2].weight != before["2.weight"]).all() and (model[0].bias != before["0.bias"]).all()
    with torch.no_grad():
        wanted = model(x)
        lora.save_lora(model, tmp_path / "a.safetensors")
        again = copy.deepcopy(base)
        lora.load_lora(again, tmp_path / "a.safetensors")
        assert torch.equal(again(x), wanted)
        with lora.disable_adapters(model):
            assert torch.equal(model(x), base(x))
        assert torch.equal(copy.deepcopy(model)(x), wanted)
        model.to(dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
        torch.testing.assert_close(model(x), wanted, rtol=1e-2, atol=1e-2)
        plain = lora.unload(model)
    assert torch.equal(plain(x), base(x)) and [type(m) for m in plain] == [type(m) for m in base]


def test_a_trained_head_of_float16_under_a_grad_scaler():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2)).half()
    lora.inject_lora(model, r=2, target_modules=["0"], modules_to_save=["1"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    scaler = torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", torch.float16):
        scaler.scale(model(torch.randn(4, 16).half()).float().sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


def test_an_embedding_of_a_half_precision_base():
    torch.manual_seed(0)
    model = _model("Llama").to(torch.bfloat16)
    base = _logits(model)
    lora.inject_lora(model, r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(_logits(model), base)
    _logits(model).float().sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
        self.spectral = nn.utils.spectral_norm(nn.Linear(4, 4))

    def forward(self, x):
        return self.spectral(self.last(self.norm(self.first(x))).mean((2, 3)))


@pytest.mark.parametrize("format", ["loralib", "peft"])
def test_running_statistics_belong_to_the_adapter(format, tmp_path):
    torch.manual_seed(0)
    base = Normed()
    model, x = copy.deepcopy(base), 3 * torch.randn(4, 3, 8, 8) + 2
    lora.inject_lora(model, r=2, target_modules=["first", "last"])
    with torch.no_grad():
        for _ in range(10):
            model.train()(x)
        trained = model.eval()(x)
        lora.save_lora(model, tmp_path / "a.safetensors", format=format)
        again = copy.deepcopy(base)
        lora.load_lora(again, tmp_path / "a.safetensors")
        assert torch.equal(again.eval()(x), trained)
        lora.inject_lora(again, r=2, target_modules=["first"], adapter_name="second")
        torch.testing.assert_close(again.eval()(x), base.eval()(x))
        lora.set_adapter(again, "default")
        assert torch.equal(again(x), trained)
        with lora.disable_adapters(again):
            torch.testing.assert_close(again(x), base(x))
        if format == "peft":
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a.safetensors").eval()
            torch.testing.assert_close(theirs(x), trained)
        torch.testing.assert_close(lora.merge_and_unload(copy.deepcopy(model))(x), trained)
        assert torch.equal(lora.unload(model)(x), base(x))
    assert all(torch.equal(first, second) for first, second in zip(model.buffers(), base.buffers(), strict=True))


def test_files_without_statistics_load(tmp_path):
    base = Normed()
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["first"]))
    model.save_pretrained(tmp_path)
    lora.load_lora(base, tmp_path)
    assert not base.norm.running_mean.any()


def test_layers_made_by_hand_save_the_statistics(tmp_path):
    def built():
        torch.manual_seed(0)
        return nn.Sequential(lora.Linear(4, 4, r=2), nn.BatchNorm1d(4))

    model, x = built(), torch.randn(8, 4) + 3
    lora.mark_only_lora_as_trainable(model)
    for _ in range(5):
        model(x)
    lora.save_lora(model, tmp_path / "a.safetensors")
    other = built()
    lora.load_lora(other, tmp_path / "a.safetensors")
    assert torch.equal(other.eval()(x), model.eval()(x)) and model[1].running_mean.any()


@pytest.mark.parametrize("held", ["lm_head", "embed_tokens", "saved", "rows"])
def test_resizing_what_an_adapter_holds_is_refused(held):
    model = _model("Llama", tie_word_embeddings=False)
    how = {
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        "rows": {"target_modules": [], "trainable_token_indices": [3]},
    }.get(held, {"target_modules": ["q_proj", held]})
    lora.inject_lora(model, r=2, **how)
    before = _logits(model)
    with pytest.raises(ValueError, match=r"holds .* of an adapter, whose size would not follow; nothing was resized"):
        model.resize_token_embeddings(70)
    assert model.resize_token_embeddings(None) is model.get_input_embeddings()
    assert torch.equal(_logits(model), before) and model.config.vocab_size == 64


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("format", ["loralib", "peft"])
def test_rows_of_a_resized_embedding_go_with_the_adapter(when, format, tmp_path):
    _model("Llama").save_pretrained(tmp_path / "base")

    def load(seed, injected):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        if injected and when == "after":
            lora.inject_lora(model, r=2, target_modules=["q_proj"])
        model.resize_token_embeddings(66, mean_resizing=False)
        if injected and when == "before":
            lora.inject_lora(model, r=2, target_modules=["q_proj"])
        return model.eval()

    model, other = load(0, True), load(1, False)
    with pytest.warns(UserWarning, match="model.embed_tokens, lm_head go with the adapter, whole"):
        lora.save_lora(model, tmp_path / "a", format=format) if format == "peft" else (
            lora.save_lora(model, tmp_path / "a.safetensors")
        )
    path = tmp_path / ("a" if format == "peft" else "a.safetensors")
    lora.load_lora(other, path)
    ids = torch.tensor([[5, 64, 65]])
    torch.testing.assert_close(other(ids).logits, model(ids).logits)
    small = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"\(66, 16\) in the file, \(64, 16\) in the model \(call model.resize_token_emb"
    ):
        lora.load_lora(small, path)


def test_a_replaced_module_is_noticed(tmp_path):
    def injected():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        lora.inject_lora(model, r=1, target_modules=["0", "1"], modules_to_save=["2"])
        lora.inject_lora(model, r=1, target_modules=["0"], adapter_name="second")
        lora.set_adapter(model, "default")
        return model

    for act in (
        lambda model: lora.save_lora(model, tmp_path / "a.safetensors"),
        lambda model: lora.set_adapter(model, "second"),
        lora.list_adapters,
    ):
        model = injected()
        model[1] = nn.Linear(4, 4).requires_grad_(False)
        with pytest.warns(UserWarning, match="^1: replaced by somebody since adapter 'default' was put there"):
            act(model)
        act(model)  # told once
        model[0].weight.data = torch.zeros(6, 4)
        with pytest.raises(
            ValueError, match=r"0.weight was \(4, 4\) when adapter '(default|second)' was put there and is \(6, 4\)"
        ):
            act(model)


def test_saving_names_adapters_that_no_gradient_reached(tmp_path):
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.table = nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(8, 4)

        def forward(self, x):
            return self.used(x)

    model = Skips()
    lora.inject_lora(model, r=1, target_modules=["used", "unused", "table"])
    lora.save_lora(model, tmp_path / "a.safetensors")  # nothing is trained yet
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    with pytest.warns(
        UserWarning, match="^unused, table: still zero, as injection made it, though others were trained"
    ):
        lora.save_lora(model, tmp_path / "a.safetensors")


def test_quantised_heads_are_refused():
    class Packed(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Packed(4, 4))
    model[1].weight = nn.Parameter(model[1].weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="the weight of 1 is quantised, and cannot be trained; load the base without"):
        lora.inject_lora(model, target_modules=["0"], modules_to_save=["1"])


@pytest.mark.parametrize("which", ["linear1", "linear2", "out_proj"])
@torch.no_grad()
def test_layers_made_by_hand_within_torchs_attention(which):
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), torch.randn(2, 5, 16)
    owner = layer.self_attn if which == "out_proj" else layer
    old = getattr(owner, which)
    new = lora.Linear(old.in_features, old.out_features, r=2, merge_weights=False)
    new.load_state_dict(old.state_dict(), strict=False)
    nn.init.normal_(new.lora_B)
    setattr(owner, which, new)
    wanted = copy.deepcopy(layer)
    merged = getattr(wanted.self_attn if which == "out_proj" else wanted, which)
    merged.weight += merged.delta_weight()
    nn.init.zeros_(merged.lora_B)
    for mode in (True, False):
        torch.testing.assert_close(layer.train(mode)(x), wanted.train(False)(x))
    assert isinstance(new.weight, nn.Parameter)


@pytest.mark.parametrize("change", [{"modules_to_save": ["embed_tokens"]}, {"target_parameters": ["lm_head.weight"]}])
def test_the_class_of_an_adapted_model_makes_plain_ones(change, tmp_path):
    model = _model("Llama")
    lora.inject_lora(model, r=2, target_modules=["q_proj"], **change)
    assert isinstance(model, transformers.LlamaForCausalLM) and type(model).__name__ == "LlamaForCausalLM"
    for other in (type(model)(model.config), type(model).from_pretrained(None, config=model.config, state_dict={})):
        assert type(other) is transformers.LlamaForCausalLM
        assert not lora.list_adapters(other)
        assert lora.inject_lora(other, r=2)
    assert type(type(model.model.embed_tokens)(4, 2)) is nn.Embedding

    class Derived(type(model)):
        pass

    assert type(Derived(model.config)) is Derived
