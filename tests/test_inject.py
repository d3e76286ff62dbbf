"""Injection into existing models: what is replaced, shared, frozen and refused.

Tiny Hugging Face models built from configurations; the oracle is the model before injection.
Run alone: `pytest tests/test_inject.py`.
"""

import copy
import subprocess
import sys

import pytest
import torch
from architectures import BERT
from torch import nn
from torch.nn.utils import prune
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import loralib as lora

TOKENS = torch.arange(24).reshape(2, 12) % 50
SIZES = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2(**options):
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=32, **SIZES, **options))


def llama():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **SIZES
    )
    return LlamaForCausalLM(config)


def bert():
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, pad_token_id=0
    )
    return BertModel(config, add_pooling_layer=False)


class Small(nn.Module):
    """One layer of every plain kind, and one module under two names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8, padding_idx=1)
        self.conv = nn.Conv1d(8, 8, 3, padding="same", padding_mode="circular", bias=False)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6, bias=False))
        self.again = self.inner[0]

    def forward(self, x):
        x = self.conv(self.embed(x).transpose(1, 2)).transpose(1, 2)
        return self.inner(self.again(x))


def output(model):
    with torch.no_grad():
        out = model(TOKENS)
    return out if isinstance(out, torch.Tensor) else out[0]


def randomize(model):
    for module in model.modules():
        if isinstance(module, lora.LoRALayer):
            nn.init.normal_(module.lora_A, std=0.3)
            nn.init.normal_(module.lora_B, std=0.3)


ALL_OF_SMALL = ["embed", "conv", "inner.0", "2"]
# fmt: off
MODELS = {
    "gpt2": (gpt2, None, ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]),
    "gpt2 mlp": (
        gpt2,
        ["c_fc", "mlp.c_proj"],
        [f"transformer.h.{i}.mlp.{c}" for i in (0, 1) for c in ("c_fc", "c_proj")],
    ),
    "gpt2 wte": (gpt2, ["wte"], ["transformer.wte"]),
    "llama": (llama, None, [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]),
    "bert": (bert, None, [f"encoder.layer.{i}.attention.self.{p}" for i in (0, 1) for p in ("query", "value")]),
    "regular expression": (
        bert,
        r"encoder\.layer\.1\..*(key|query)",
        [f"encoder.layer.1.attention.self.{p}" for p in ("query", "key")],
    ),
    "every kind": (Small, ALL_OF_SMALL, ["embed", "conv", "inner.0", "inner.2"]),
}
# fmt: on
each_model = pytest.mark.parametrize("build, targets, names", MODELS.values(), ids=MODELS)


@each_model
def test_what_is_replaced_shared_and_frozen(build, targets, names):
    """Injection changes neither outputs, nor Parameter objects, nor their keys; only the adapters train."""
    model = build().train()
    before, keys = dict(model.named_parameters()), set(model.state_dict())
    wanted = output(model.eval())
    model.train()
    assert lora.inject_lora(model, r=2, target_modules=targets) == names
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    adapters = {f"{name}.{part}" for name in names for part in ("lora_A", "lora_B")}
    assert set(after) - set(before) == adapters
    assert {name for name, parameter in after.items() if parameter.requires_grad} == adapters
    assert keys <= set(model.state_dict())
    assert all(model.get_submodule(name).training and not model.get_submodule(name).merged for name in names)
    torch.testing.assert_close(output(lora.unmerge_lora_weights(model.eval())), wanted)
    torch.testing.assert_close(output(lora.merge_lora_weights(model)), wanted)


@each_model
def test_unload_gives_the_plain_model_back(build, targets, names):
    """unload: original classes, settings, Parameter objects, outputs; merge_and_unload: the adapted outputs."""
    model = build().eval().requires_grad_(False)  # torch chooses another kernel for a frozen weight
    wanted, printed, before = output(model), repr(model), dict(model.named_parameters())
    lora.inject_lora(model, r=2, target_modules=targets)
    randomize(model)
    adapted = output(model)
    assert not torch.allclose(adapted, wanted, atol=1e-3)
    merged = lora.merge_and_unload(copy.deepcopy(model)) if targets != ["wte"] else None
    if merged is not None:
        assert repr(merged) == printed
        torch.testing.assert_close(output(merged), adapted)
    assert lora.unload(model) is model
    assert repr(model) == printed and torch.equal(output(model), wanted)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == {
        name: id(parameter) for name, parameter in before.items()
    }


def test_merging_an_embedding_with_max_norm():
    """The base rows are bounded, their update is not: the plain layer must not bound the sum."""
    model, rows = nn.Sequential(nn.Embedding(10, 4, max_norm=0.5)).eval(), torch.arange(10)
    lora.inject_lora(model, r=2, target_modules=["0"])
    randomize(model)
    adapted = model(rows)
    torch.testing.assert_close(lora.merge_and_unload(model)(rows), adapted)


def test_merging_a_tied_embedding_unties_and_says_so():
    """The adapted wte gets its own merged weight, lm_head keeps the base, and a reload must not tie them again."""
    model = gpt2().eval()
    base = model.lm_head.weight.detach().clone()
    lora.inject_lora(model, r=2, target_modules=["wte"])
    randomize(model)
    adapted = output(model)
    with pytest.warns(UserWarning, match="set config.tie_word_embeddings to False"):
        lora.merge_and_unload(model)
    assert torch.equal(model.lm_head.weight, base) and model.lm_head.weight is not model.transformer.wte.weight
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(output(model), adapted)


@pytest.mark.parametrize(
    "enable_lora, grouped, trainable",
    [
        ((True, False, True), True, 2 * 2 * (2 * 32 + 2 * 32)),
        ((True, True, True), True, 2 * 2 * (3 * 32 + 3 * 32)),
        (None, False, 2 * 2 * (32 + 96)),
    ],
)
def test_fused_projection(enable_lora, grouped, trainable):
    """c_attn is adapted as q, k, v apart, or as a whole; k is untouched by default."""
    model = gpt2()
    lora.inject_lora(model, r=2, target_modules=["c_attn"], enable_lora=enable_lora)
    layer = model.transformer.h[0].attn.c_attn
    assert hasattr(layer, "enable_lora") == grouped and layer.fan_in_fan_out
    assert lora.count_parameters(model).trainable == trainable
    randomize(model)
    delta = layer.delta_weight()
    touched = [bool(delta[:, i * 32 : (i + 1) * 32].any()) for i in range(3)]
    assert touched == list(enable_lora or (True, True, True))


def test_cross_attention_of_gpt2_adapts_the_value():
    """The two-part c_attn of cross-attention holds k and v."""
    model = gpt2(add_cross_attention=True)
    lora.inject_lora(model, r=2)
    assert model.transformer.h[0].attn.c_attn.enable_lora == [True, False, True]
    assert model.transformer.h[0].crossattention.c_attn.enable_lora == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_adapters_are_float32_or_wider(dtype):
    model = gpt2().to(dtype)
    lora.inject_lora(model, r=2)
    assert model.transformer.h[0].attn.c_attn.lora_A.dtype == torch.promote_types(dtype, torch.float32)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert model.transformer.h[0].attn.c_attn.lora_B.grad.abs().sum() > 0


def test_one_layer_under_two_names_stays_one():
    model = Small()
    lora.inject_lora(model, r=2, target_modules=["inner.0"])
    assert isinstance(model.again, lora.Linear) and model.again is model.inner[0]


def test_injection_draws_only_the_adapters():
    """The random state moves by the adapters alone, and the same seed gives the same adapters."""
    drawn = []
    for _ in range(2):
        model = gpt2()
        torch.manual_seed(1)
        lora.inject_lora(model, r=2)
        drawn.append((lora.lora_state_dict(model), torch.rand(1)))
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert all(torch.equal(drawn[0][0][name], drawn[1][0][name]) for name in drawn[0][0])
    torch.manual_seed(1)
    for layer in (model.transformer.h[0].attn.c_attn, model.transformer.h[1].attn.c_attn):
        nn.init.kaiming_uniform_(torch.empty_like(layer.lora_A), a=5**0.5)
    assert torch.equal(torch.rand(1), drawn[0][1])


def test_injection_on_the_meta_device_costs_nothing_and_materialises():
    with torch.device("meta"):
        model = gpt2()
    lora.inject_lora(model, r=2)
    assert all(parameter.is_meta for parameter in model.parameters())


REFUSED = {
    "no match": (gpt2, {"target_modules": ["c_atn"]}, ValueError, "nothing in .* 'c_atn'; did you mean .*c_attn"),
    "partly": (gpt2, {"target_modules": ["c_attn", "query"]}, ValueError, "nothing in the model is called 'query'"),
    "empty": (gpt2, {"target_modules": []}, ValueError, r"target_modules=\[\] names nothing"),
    "no names": (gpt2, {"target_modules": [1]}, TypeError, "must be a list of names, or a regular expression"),
    "one number": (gpt2, {"exclude_modules": 3}, TypeError, "exclude_modules=3: must be a list of names"),
    "a name as a string": (gpt2, {"target_modules": "c_attn"}, ValueError, "a string is a regular expression"),
    "bad expression": (gpt2, {"target_modules": "("}, ValueError, "is no regular expression"),
    "container": (gpt2, {"target_modules": ["attn"]}, TypeError, "transformer.h.0.attn is a GPT2Attention, which"),
    "norm": (gpt2, {"target_modules": ["ln_f"]}, TypeError, "transformer.ln_f is a LayerNorm, which"),
    "another": (lambda: nn.Sequential(nn.Bilinear(4, 4, 4)), {"target_modules": ["0"]}, TypeError, "0 is a Bilinear"),
    "architecture": (Small, {}, ValueError, "no default target_modules for Small"),
    "pattern that is none": (gpt2, {"rank_pattern": {"(": 2}}, ValueError, "'\\(' is no regular expression"),
    "rank 0": (gpt2, {"r": 0}, ValueError, "r=0: the rank to inject must be at least 1"),
    "rank -1": (gpt2, {"r": -1}, ValueError, "r=-1"),
    "rank 2.0": (gpt2, {"r": 2.0}, TypeError, "r=2.0: the rank must be an integer"),
    "rank 33": (gpt2, {"r": 33}, ValueError, "r=33: .* at most 32 here"),
    "dropout": (gpt2, {"lora_dropout": 2}, ValueError, "lora_dropout=2"),
    "enable_lora": (gpt2, {"enable_lora": [1, 0, 1]}, TypeError, "every entry must be True or False"),
    "two groups": (gpt2, {"enable_lora": [True, True]}, ValueError, "must be three booleans, for q, k and v"),
    "four groups": (gpt2, {"enable_lora": [True] * 4}, ValueError, "must be three booleans, for q, k and v"),
    "no group": (gpt2, {"enable_lora": [False] * 3}, ValueError, "h.0.attn.c_attn would get no adapter: r=8, enable_"),
    "adapter name": (gpt2, {"adapter_name": ""}, ValueError, "adapter_name='': must be a string that is not empty"),
    "weight norm": (
        lambda: nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
        {"target_modules": ["0"]},
        TypeError,
        "0 is a ParametrizedLinear whose weight is computed, which LoRA cannot adapt",
    ),
    "pruned": (
        lambda: nn.Sequential(prune.identity(nn.Linear(4, 4), "weight")),
        {"target_modules": ["0"]},
        TypeError,
        "0 is a Linear whose weight is computed, which LoRA cannot adapt",
    ),
    "enable_lora without groups": (
        llama,
        {"target_modules": ["q_proj"], "enable_lora": [True, False, True]},
        ValueError,
        r"enable_lora=\[True, False, True\]: none of the targets is a fused projection",
    ),
    "exclude nothing": (gpt2, {"exclude_modules": ["c_fcc"]}, ValueError, "exclude_modules=.*; did you mean .*c_fc"),
    "exclude all": (
        gpt2,
        {"target_modules": ["c_fc"], "exclude_modules": ["mlp.c_fc"]},
        ValueError,
        "nothing is left of transformer.h.0.mlp.c_fc, transformer.h.1.mlp.c_fc after exclude_modules=",
    ),
    "inside a head": (
        gpt2,
        {"target_modules": ["c_fc"], "modules_to_save": ["mlp"]},
        ValueError,
        "nothing is left of .* trained whole, transformer.h.0.mlp, transformer.h.1.mlp; modules_to_save",
    ),
    "head": (gpt2, {"modules_to_save": ["lm_heat"]}, ValueError, "modules_to_save=.*'lm_heat'; did you mean lm_head"),
    "rank pattern": (gpt2, {"rank_pattern": {"c_atn": 2}}, ValueError, "'c_atn' applies to none .*h.0.attn.c_attn"),
    "shadowed pattern": (
        gpt2,
        {"alpha_pattern": {"c_attn": 2, "0.attn.c_attn": 3}},
        ValueError,
        "alpha_pattern: '0.attn.c_attn' applies to none of the targets, or a pattern before it always does",
    ),
    "rank in a pattern": (gpt2, {"rank_pattern": {"c_attn": 2.5}}, TypeError, "r=2.5: the rank must be an integer"),
    "rank 0 in a pattern": (gpt2, {"rank_pattern": {"c_attn": 0}}, ValueError, "r=0: the rank to inject must be"),
    "rank 33 in a pattern": (gpt2, {"rank_pattern": {"0.attn.c_attn": 33}}, ValueError, "r=33: .* at most 32 here"),
    "alpha in a pattern": (gpt2, {"alpha_pattern": {"c_attn": "4"}}, TypeError, "lora_alpha='4': must be a number"),
    "bias": (gpt2, {"bias": "some"}, ValueError, "bias='some': must be one of 'none', 'all', 'lora_only'"),
}  # fmt: skip


@pytest.mark.parametrize("build, arguments, error, message", REFUSED.values(), ids=REFUSED)
def test_refused_and_nothing_changed(build, arguments, error, message):
    model = build()
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        lora.inject_lora(model, **arguments)
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_injecting_twice_and_into_a_bare_layer_is_refused():
    model = gpt2()
    lora.inject_lora(model, r=2)
    with pytest.raises(ValueError, match="already has LoRA layers .*c_attn.*; call lora.unload"):
        lora.inject_lora(model, r=2, target_modules=["c_fc"])
    with pytest.raises(ValueError, match="nothing in the model"):
        lora.inject_lora(nn.Linear(4, 4), r=2, target_modules=["weight"])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_a_hugging_face_model(use_reentrant):
    """Both kinds give the gradients of a run without; the reentrant kind needs inputs that require gradients."""
    model = gpt2()
    lora.inject_lora(model, r=2)
    randomize(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            # The name before transformers 5.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        torch.manual_seed(3)
        model.eval() if not checkpointing else model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_a_step_of_training_then_generation_merged_and_not():
    model = gpt2()
    lora.inject_lora(model, r=4, lora_alpha=32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    merged = lora.merge_lora_weights(model.eval()).generate(TOKENS, **settings)
    assert model.transformer.h[0].attn.c_attn.merged
    unmerged = lora.unmerge_lora_weights(model).generate(TOKENS, **settings)
    assert torch.equal(merged, unmerged)


def test_ranks_alphas_and_scalings():
    """The first matching pattern counts, by full name, last parts or expression; use_rslora divides by the root."""
    model = llama()
    names = lora.inject_lora(
        model,
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "k_proj"],
        exclude_modules=r".*1\.self_attn\.k_proj",
        rank_pattern={"model.layers.0.self_attn.q_proj": 2, r"layers\.\d\.self_attn\.[qk]_proj": 3},
        alpha_pattern={"v_proj": 2},
        use_rslora=True,
    )
    got = {
        name[13:]: (layer.r, layer.lora_alpha, layer.scaling) for name in names for layer in [model.get_submodule(name)]
    }
    assert got == {
        "0.self_attn.q_proj": (2, 8, 8 / 2**0.5),
        "0.self_attn.k_proj": (3, 8, 8 / 3**0.5),
        "0.self_attn.v_proj": (4, 2, 1.0),
        "1.self_attn.q_proj": (3, 8, 8 / 3**0.5),
        "1.self_attn.v_proj": (4, 2, 1.0),
    }
    assert "scaling=5.65685" in repr(model.model.layers[0].self_attn.q_proj)
    assert "scaling" not in repr(nn.Sequential(lora.Linear(4, 4, r=2)))


@pytest.mark.parametrize("bias, wanted", [("none", 0), ("lora_only", 4), ("all", None)])
def test_biases_are_trained_in_copies(bias, wanted):
    """Only what the mode names trains; unloading gives the base's own back, bit for bit, whatever they became."""
    model = bert()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    lora.inject_lora(model, r=2, bias=bias)
    trained = {
        name for name, p in model.named_parameters() if p.requires_grad and not name.endswith(("lora_A", "lora_B"))
    }
    assert all(name.endswith("bias") for name in trained)
    assert len(trained) == (sum(name.endswith("bias") for name in before) if wanted is None else wanted)
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(1.0)
    lora.unload(model)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: i for name, (i, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in model.named_parameters())


def test_hooks_go_with_the_layer_and_come_back():
    """Forward and backward, from before and from meanwhile; a handle removes its hook wherever the layer is."""
    model, seen, x = nn.Sequential(nn.Linear(4, 4)), [], torch.ones(1, 4, requires_grad=True)
    handle = model[0].register_forward_hook(lambda *_: seen.append("removed"))
    model[0].register_forward_pre_hook(lambda *_, **__: seen.append("before"), with_kwargs=True)
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    lora.inject_lora(model, r=2, target_modules=["0"])
    model[0].register_forward_hook(lambda *_: seen.append("meanwhile"))
    model(x).sum().backward()
    assert seen == ["before", "removed", "meanwhile", "backward"]
    handle.remove()
    lora.unload(model)(x).sum().backward()
    assert seen[4:] == ["before", "meanwhile", "backward"]


@pytest.mark.parametrize("padding", [None, torch.tensor([[False] * 3, [False, False, True]])])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_the_fast_path_of_torchs_encoder_computes_with_the_update(padding):
    """In eval it reads the weights and never calls the adapted layers: unmerged, what it reads is the sum."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 3, 8)
    kept = slice(None) if padding is None else ~padding
    for merge_weights in (False, True):
        lora.inject_lora(model, r=2, target_modules=["linear1", "linear2"], merge_weights=merge_weights)
        randomize(model)
        wanted = model.train()(x, src_key_padding_mask=padding).detach()
        with torch.no_grad():
            found = copy.deepcopy(model.eval())(x, src_key_padding_mask=padding)
        torch.testing.assert_close(found[kept], wanted[kept])
        lora.unload(model)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))])
def test_wrapped_models_are_adapted_and_saved_as_the_model_inside(wrap, tmp_path):
    """With its default targets and its head; the files have its names, whichever way they go."""
    model = RobertaForSequenceClassification(RobertaConfig(**BERT))
    wrapped, base = wrap(model), copy.deepcopy(model)
    names = lora.inject_lora(wrapped, r=2)
    assert len(names) == 4 and type(model.get_submodule(names[0])) is lora.Linear
    assert model.classifier.dense.weight.requires_grad
    lora.save_lora(wrapped, tmp_path / "a")
    assert lora.load_lora(base, tmp_path / "a") == names
    assert lora.load_lora(wrapped, tmp_path / "a") == names


def test_adapting_one_of_two_tied_layers_leaves_the_other():
    """wte is tied to lm_head: adapted, saved whole or merged, the other one computes as before."""
    for options in ({"target_modules": ["wte"]}, {"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}):
        model = gpt2().eval()
        weight = model.lm_head.weight.detach().clone()
        lora.inject_lora(model, r=2, **options)
        other = model.lm_head if options.get("target_modules") == ["wte"] else model.transformer.wte
        plain = output(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        assert not torch.allclose(output(model), plain, atol=1e-3)
        assert torch.equal(other.weight, weight)
        lora.unload(model)
        assert model.lm_head.weight is model.transformer.wte.weight and torch.equal(model.lm_head.weight, weight)


def test_a_layer_that_is_used_in_three_places_is_one_adapter(tmp_path):
    """Names of the same module: reported, counted and saved once."""
    model = Small()
    model.third = model.inner
    assert lora.inject_lora(model, r=2, target_modules=["inner.0"], bias="all") == ["inner.0"]
    randomize(model)
    wanted = output(model.eval())
    lora.save_lora(model, tmp_path / "a.safetensors")
    loaded = Small()
    loaded.load_state_dict(lora.unload(model).state_dict(), strict=False)
    loaded.third = loaded.inner
    lora.load_lora(loaded, tmp_path / "a.safetensors")
    torch.testing.assert_close(output(loaded.eval()), wanted)


IMPORT = """
import sys, torch
before = set(sys.modules)
import loralib
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def test_importing_needs_torch_and_safetensors_only():
    printed = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "['loralib', 'safetensors']"
