"""Parameters that are no layers: fused experts, in_proj_weight, recurrent weights, rows of tables."""

import copy
import io

import peft
import pytest
import torch
import transformers
from torch import nn

import loralib as lora
from loralib.parameters import Parameters, Sum

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MOE = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 1}
IDS = torch.tensor([[5, 3, 9, 5, 60, 1, 2], [7, 7, 0, 11, 31, 5, 8]])


def _transformer(name, **settings):
    config = getattr(transformers, f"{name}Config")(**settings)
    kind = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
    return kind(config).eval(), lambda model: model(input_ids=IDS).logits


def _experts(name, implementation="eager", **more):
    model, run = _transformer(name, **{**MOE, **more})
    if implementation:
        model.set_experts_implementation(implementation)
    return model, run


class Attention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True, **settings), nn.Linear(8, 3)
        self.width = settings.get("kdim", 8)

    def forward(self, x):
        other = x if self.width == 8 else x[..., : self.width]
        return self.last(self.attention(x, other, other, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.last = kind(8, 6, num_layers=2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.layer(x)[0])


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(64, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.table(x))


def _own(model, shape=(2, 5, 8)):
    x = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).view(shape).sin()
    return model, lambda model: model(x)


GATE_UP = ["experts.gate_up_proj", "experts.down_proj"]
CASES = {
    **{
        f"Mixtral-{how}": (lambda how=how: _experts("Mixtral", how, num_local_experts=4), GATE_UP)
        for how in ("eager", "batched_mm", "grouped_mm")
    },
    **{
        f"GptOss-{how}": (lambda how=how: _experts("GptOss", how, num_local_experts=4, head_dim=8), GATE_UP)
        for how in ("eager", "batched_mm", "grouped_mm")
    },
    "Qwen3Moe": (
        lambda: _experts("Qwen3Moe", num_experts=4, moe_intermediate_size=8, head_dim=8, num_experts_per_tok=2),
        GATE_UP,
    ),
    "Olmoe": (lambda: _experts("Olmoe", num_experts=4, num_experts_per_tok=2), GATE_UP),
    "DeepseekV3": (
        lambda: _experts(
            "DeepseekV3",
            n_routed_experts=4,
            moe_intermediate_size=8,
            first_k_dense_replace=0,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            num_key_value_heads=2,
            kv_lora_rank=4,
            q_lora_rank=4,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=4,
        ),
        GATE_UP,
    ),
    "Dbrx": (
        lambda: _transformer(
            "Dbrx",
            d_model=16,
            n_heads=2,
            n_layers=1,
            max_seq_len=16,
            vocab_size=64,
            ffn_config={"ffn_hidden_size": 8, "moe_num_experts": 4, "moe_top_k": 2},
            attn_config={"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ),
        ["mlp.w1", "mlp.v1", "mlp.w2"],
    ),
    "XLNet": (
        lambda: _transformer("XLNet", vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=24),
        ["rel_attn.q", "rel_attn.v"],
    ),
    "attention": (lambda: _own(Attention()), ["in_proj_weight"]),
    "attention-of-others": (lambda: _own(Attention(kdim=4, vdim=4)), ["q_proj_weight", "v_proj_weight"]),
    "LSTM": (lambda: _own(Recurrent(nn.LSTM)), ["weight_ih_l0", "weight_hh_l1"]),
    "GRU": (lambda: _own(Recurrent(nn.GRU)), ["weight_ih_l1"]),
    "embedding": (lambda: (Table(), lambda model: model(IDS)), ["table.weight"]),
}


def _made(case, **settings):
    torch.manual_seed(0)
    model, run = CASES[case][0]()
    if "grouped_mm" not in case:  # which takes no doubles
        model.double()
    base = copy.deepcopy(model)
    names = lora.inject_lora(model, **{"r": 2, "lora_alpha": 3, "target_parameters": CASES[case][1], **settings})
    torch.manual_seed(1)
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(tensor, std=0.3)
    return model, base, run, names


def _formula(model, base, names):
    """By the letter: W + scaling * B A, expert by expert."""
    result = {}
    for name in names:
        path, _, key = name.rpartition(".")
        module, weight = model.get_submodule(path), base.get_parameter(name)
        A, B = module._parameters[f"lora_A_{key}"], module._parameters[f"lora_B_{key}"]
        update = module.lora_parameters[key]
        if weight.dim() == 2:
            delta = B @ A
        else:
            experts, r = weight.shape[0], update.r
            each = [B[:, e::experts] @ A[e * r : (e + 1) * r] for e in range(experts)]
            delta = torch.stack([part.T if getattr(module, "is_transposed", False) else part for part in each])
        result[name] = weight.detach() + 1.5 * delta
    return result


def _with(base, weights, run):
    if isinstance(getattr(base, "layer", None), nn.RNNBase):  # functional_call does not reach its list of weights
        flat = [weights.get(f"layer.{key}", base.layer._parameters[key]) for key in base.layer._flat_weights_names]
        kept, base.layer._flat_weights = base.layer._flat_weights, flat
        result = run(base)
        base.layer._flat_weights = kept
        return result
    return run(lambda *args, **kwargs: torch.func.functional_call(base, weights, args, kwargs))


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_the_dense_formulas(case):
    model, base, run, names = _made(case)
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert len(trained) == 2 * len(names)

    wanted = _with(base, _formula(model, base, names), run)
    torch.testing.assert_close(run(model), wanted)
    assert (wanted - run(base)).abs().max() > 1e-3
    weights = torch.linspace(-1, 1, wanted.numel(), dtype=wanted.dtype).view_as(wanted)
    right = torch.autograd.grad((wanted * weights).sum(), list(trained.values()))
    ours = torch.autograd.grad((run(model) * weights).sum(), list(trained.values()))
    for name, first, second in zip(trained, ours, right, strict=True):
        torch.testing.assert_close(first, second, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_every_state_computes_the_same(case):
    model, base, run, names = _made(case)
    with torch.no_grad():
        wanted, plain = run(model), run(base)

        def check(model, wanted=wanted):
            torch.testing.assert_close(run(model), wanted)

        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        lora.merge_lora_weights(model)
        check(model)
        check(copy.deepcopy(model))
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        with lora.disable_adapters(model):
            check(model, plain)
        check(model)
        for tensor in (tensor for name, tensor in model.named_parameters() if "lora_B" in name):
            tensor.data.mul_(2)  # leaves no trace
        doubled = run(model)
        assert (doubled - wanted).abs().max() > 1e-4
        check(lora.unmerge_lora_weights(model), doubled)
        model.load_state_dict(state)
        check(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        check(torch.load(buffer, weights_only=False))
        if "grouped_mm" not in case:
            check(model.float().double(), wanted=run(model.double()))
        check(lora.merge_and_unload(copy.deepcopy(model)), wanted=run(model))
        model.load_state_dict(state)
        check(lora.unload(model), plain)
        assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, Parameters) for module in model.modules())
    assert {type(module) for module in model.modules()} == {type(module) for module in base.modules()}


@pytest.mark.parametrize("case", ["Mixtral-eager", "GptOss-grouped_mm", "attention", "LSTM", "embedding"])
def test_files_and_several_adapters(case, tmp_path):
    model, base, run, names = _made(case)
    with torch.no_grad():
        wanted = run(model)
        lora.save_lora(model, tmp_path / "first.safetensors")
        second = lora.inject_lora(model, r=1, target_parameters=names[:1], adapter_name="second")
        assert second == names[:1]
        torch.testing.assert_close(run(model), run(base))
        lora.set_adapter(model, "default")
        torch.testing.assert_close(run(model), wanted)
        other = copy.deepcopy(base)
        assert lora.load_lora(other, tmp_path / "first.safetensors") == names
        torch.testing.assert_close(run(other), wanted)
        lora.load_lora(model, tmp_path / "first.safetensors", adapter_name="third")
        torch.testing.assert_close(run(model), wanted)
        with pytest.raises(
            ValueError, match=f"(?s){names[-1]}: the file adapts it, the model does not|r is 2 in the file, 1"
        ):
            lora.load_lora(model, tmp_path / "first.safetensors", adapter_name="second")


def test_rank_pattern_rslora_and_exclusions():
    torch.manual_seed(0)
    model, _ = _experts("Mixtral", num_local_experts=4)
    names = lora.inject_lora(
        model,
        r=2,
        target_modules=["q_proj"],
        target_parameters=GATE_UP,
        rank_pattern={"experts.down_proj": 4},
        use_rslora=True,
    )
    experts = model.model.layers[0].mlp.experts
    assert names == [
        "model.layers.0.self_attn.q_proj",
        *(f"model.layers.0.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj")),
    ]
    assert experts.lora_A_gate_up_proj.shape == (8, 16) and experts.lora_A_down_proj.shape == (16, 24)
    assert experts.lora_parameters["down_proj"].scaling == 16 / 4**0.5
    assert "gate_up_proj: r=2, lora_alpha=16, down_proj: r=4" in repr(experts)


REFUSED = {
    "nothing": (
        {"target_parameters": ["experts.up"]},
        ValueError,
        "nothing in the model is called 'experts.up'; the model has down_proj",
    ),
    "whole": (
        {"target_parameters": ["embed_tokens.weight"], "modules_to_save": ["embed_tokens"]},
        ValueError,
        "model.embed_tokens.weight is trained whole; name it once",
    ),
    "both": (
        {"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]},
        ValueError,
        "its module is a target, too; name one of the two",
    ),
    "vector": ({"target_parameters": ["norm.weight"]}, TypeError, r"has 1 axes, \(16,\); LoRA adapts matrices"),
    "rank": ({"target_parameters": GATE_UP, "r": 17}, ValueError, "r=17: .* at most 16 here"),
    "layout": (
        {"target_parameters": GATE_UP, "enable_lora": [True, False, True]},
        ValueError,
        "none of the targets is a fused",
    ),
    "row": ({"trainable_token_indices": [64]}, ValueError, "embed_tokens has rows 0 to 63, not 64 to 64"),
    "rows": ({"trainable_token_indices": [3, 3]}, ValueError, "must be an embedding and rows, once each"),
    "no table": ({"trainable_token_indices": {"q_proj": [3]}}, ValueError, "q_proj, a Linear, .* must be an embedding"),
    "saved table": (
        {"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]},
        ValueError,
        "model.embed_tokens is trained whole",
    ),
    "adapted table": (
        {"trainable_token_indices": [3], "target_modules": ["embed_tokens"]},
        ValueError,
        "model.embed_tokens.weight: its module is a target, too",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_changes(case):
    settings, error, message = REFUSED[case]
    model, _ = _experts("Mixtral", num_local_experts=4)
    before = {name: (id(tensor), tensor.requires_grad) for name, tensor in model.named_parameters()}
    with pytest.raises(error, match=f"(?s){message}"):
        lora.inject_lora(model, **settings)
    assert before == {name: (id(tensor), tensor.requires_grad) for name, tensor in model.named_parameters()}
    assert not lora.list_adapters(model)


def test_dropout_does_not_reach_parameters():
    model, _ = _experts("Mixtral", num_local_experts=4)
    with pytest.warns(UserWarning, match="lora_dropout does nothing in model.layers.0.mlp.experts.down_proj"):
        lora.inject_lora(model, r=2, lora_dropout=0.1, target_modules=["q_proj"], target_parameters=["down_proj"])


def test_experts_that_no_token_chose_are_not_computed(monkeypatch):
    model, base, run, _ = _made("Mixtral-eager")
    monkeypatch.setattr(Sum, "value", lambda self: pytest.fail("a whole sum was formed"))
    run(model).sum().backward()


def test_query_and_value_of_in_proj_weight():
    torch.manual_seed(0)
    model, run = _own(Attention())
    base = copy.deepcopy(model.double())
    lora.inject_lora(model, r=2, target_parameters=["in_proj_weight"], enable_lora=[True, False, True])
    attention = model.attention
    assert attention.lora_A_in_proj_weight.shape == (4, 8) and attention.lora_B_in_proj_weight.shape == (16, 2)
    nn.init.normal_(attention.lora_B_in_proj_weight)
    A, B = attention.lora_A_in_proj_weight.chunk(2), attention.lora_B_in_proj_weight.chunk(2)
    delta = 8 * torch.cat([B[0] @ A[0], torch.zeros(8, 8), B[1] @ A[1]])
    wanted = _with(base, {"attention.in_proj_weight": base.attention.in_proj_weight + delta}, run)
    torch.testing.assert_close(run(model), wanted)
    torch.testing.assert_close(attention.delta_weight("in_proj_weight"), delta)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_tokens(tied, tmp_path):
    torch.manual_seed(0)
    model, run = _transformer("Llama", **SMALL, intermediate_size=24, tie_word_embeddings=tied)
    base = copy.deepcopy(model)
    lora.inject_lora(model, target_modules=[], trainable_token_indices=[5, 1])
    table = model.model.embed_tokens
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.embed_tokens.lora_rows_weight"]
    torch.testing.assert_close(run(model), run(base))
    assert torch.equal(table.lora_rows_weight, base.model.embed_tokens.weight[[5, 1]])
    table.lora_rows_weight.data.normal_()
    with torch.no_grad():
        base.model.embed_tokens.weight[[5, 1]] = table.lora_rows_weight
        wanted = run(base)
        torch.testing.assert_close(run(model), wanted)
        model.eval()
        torch.testing.assert_close(run(lora.merge_lora_weights(model)), wanted)
        lora.unmerge_lora_weights(model)
        lora.save_lora(model, tmp_path / "rows.safetensors")
        again, _ = _transformer("Llama", **SMALL, intermediate_size=24, tie_word_embeddings=tied)
        again.load_state_dict({**base.state_dict()})
        again.model.embed_tokens.weight[[5, 1]] = 0
        lora.load_lora(again, tmp_path / "rows.safetensors")
        torch.testing.assert_close(run(again), wanted)
        merged = lora.merge_and_unload(model)
        torch.testing.assert_close(run(merged), wanted)
        assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
        assert merged.config.tie_word_embeddings == tied


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", ["Mixtral-grouped_mm", "attention"])
def test_checkpointing_and_compile(case, compiled):
    model, _, run, names = _made(case)
    wanted = run(model)
    wanted.sum().backward()
    grads = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
    model.zero_grad()
    if compiled:
        torch._dynamo.reset()
        result = run(torch.compile(model, backend="aot_eager"))
    else:
        result = torch.utils.checkpoint.checkpoint(run, model, use_reentrant=False)
    result.sum().backward()
    torch.testing.assert_close(result, wanted)
    assert len(grads) == 2 * len(names)
    for name, tensor in grads.items():
        torch.testing.assert_close(model.get_parameter(name).grad, tensor, msg=name)


def test_the_default_of_torchs_attention_is_query_and_value():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2).eval()
    names = lora.inject_lora(model, r=2)
    assert names == [f"layers.{i}.self_attn.in_proj_weight" for i in (0, 1)]
    assert model.layers[0].self_attn.lora_parameters["in_proj_weight"].enable_lora == [True, False, True]
    for layer in model.layers:
        nn.init.normal_(layer.self_attn.lora_B_in_proj_weight)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        wanted = model.train()(x)
        for act in (lambda: model.eval(), lambda: lora.merge_lora_weights(model), lambda: lora.merge_and_unload(model)):
            act()
            torch.testing.assert_close(model(x), wanted)
    parted = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
    assert lora.inject_lora(parted, r=2) == ["q_proj_weight", "v_proj_weight"]
    lora.merge_and_unload(parted)


def test_all_linear_is_every_matrix_and_names_what_it_leaves_out():
    model, _ = _experts("Mixtral", num_local_experts=4)
    names = lora.inject_lora(model, r=2, target_modules="all-linear")
    layer = "model.layers.0."
    attention = [f"{layer}self_attn.{name}_proj" for name in "qkvo"]
    assert names == attention + [f"{layer}mlp.experts.{name}_proj" for name in ("gate_up", "down")]
    again, _ = _experts("Mixtral", num_local_experts=4)
    assert lora.inject_lora(again, r=2, target_modules="all-linear-peft") == attention
    third, _ = _experts("Mixtral", num_local_experts=4)
    assert (
        lora.inject_lora(third, r=2, target_modules="all-linear", exclude_modules=["experts.down_proj"]) == names[:-1]
    )
    other, _ = CASES["XLNet"][0]()
    with pytest.warns(UserWarning, match=r"all-linear leaves out transformer.layer.0.rel_attn.q, .*: \d\d% of"):
        lora.inject_lora(other, r=2, target_modules="all-linear")
    encoder = nn.TransformerEncoderLayer(16, 2, 32)
    found = lora.inject_lora(encoder, r=2, target_modules="all-linear")
    assert found == ["self_attn.out_proj", "linear1", "linear2", "self_attn.in_proj_weight"]
    recurrent = Recurrent(nn.LSTM)
    wanted = ["last", *(f"layer.weight_{kind}_l{i}" for i in (0, 1) for kind in ("ih", "hh"))]
    assert lora.inject_lora(recurrent, r=2, target_modules="all-linear") == wanted


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1)


def test_all_linear_does_not_stop_at_a_layer_that_it_cannot_adapt():
    class Clashing(nn.Linear):
        scaling = 2

        def forward(self, x):
            return super().forward(x) * self.scaling

    model = nn.Sequential(nn.Linear(4, 4), Clashing(4, 4), Router(4, 4))
    with pytest.warns(UserWarning, match="all-linear leaves out 1.weight, 1.bias: 33% of the parameters"):
        assert lora.inject_lora(model, r=2, target_modules="all-linear") == ["0"]


def test_what_is_written_into_a_computed_parameter_is_not_lost_in_silence():
    model, _ = _experts("Mixtral", num_local_experts=4)
    lora.inject_lora(model, r=2, target_parameters=GATE_UP, trainable_token_indices=[62, 63])
    table, experts = model.get_input_embeddings(), model.model.layers[0].mlp.experts
    for merged in (False, True):
        if merged:
            lora.merge_lora_weights(model)
        with torch.no_grad():
            for write in (
                lambda: table.weight.__setitem__(slice(62, None), 5.0),
                lambda: table.weight[62:].fill_(5.0),
                lambda: table.weight.data[62].zero_(),
                lambda: nn.init.zeros_(experts.gate_up_proj),
                lambda: experts.gate_up_proj.data.mul_(2),
            ):
                with pytest.raises(RuntimeError, match="would write into a Parameter that is computed from the base"):
                    write()
            assert type(table.weight * 2) is torch.Tensor and table.weight[62:].shape == (2, 16)
            assert table.weight.dtype == torch.float32 and table.weight.shape[0] == 64


def test_replicas_are_as_nn_DataParallel_makes_them():
    model, run = _experts("Mixtral", num_local_experts=4)
    lora.inject_lora(model, r=2, target_parameters=GATE_UP, target_modules=["q_proj"], modules_to_save=["lm_head"])
    for module in model.modules():
        replica = module._replicate_for_data_parallel()
        assert type(replica) is type(module)


def test_peft_has_no_equal_of_these(tmp_path):
    recurrent = nn.GRU(8, 6)
    lora.inject_lora(recurrent, r=2, target_parameters=["weight_ih_l0"])
    with pytest.raises(ValueError, match="PEFT wraps the module .* cannot wrap the model itself; save with format='lo"):
        lora.save_lora(recurrent, tmp_path / "a", format="peft")
    lora.save_lora(recurrent, tmp_path / "a.safetensors")
    lora.load_lora(nn.GRU(8, 6), tmp_path / "a.safetensors")
    model, _ = _own(Attention())
    lora.inject_lora(model, r=2, target_parameters=["in_proj_weight"], modules_to_save=["out_proj"])
    with pytest.raises(ValueError, match="cannot save attention.out_proj within it"):
        lora.save_lora(model, tmp_path / "b", format="peft")
    with pytest.raises(ValueError, match="attention.in_proj_weight is a Parameter of a larger module"):
        lora.save_lora(model, tmp_path / "c", format="diffusers")


def test_the_rest_of_a_wrapped_module_reaches_peft(tmp_path):
    torch.manual_seed(0)
    model, run = _own(Attention().double())
    base = copy.deepcopy(model)
    lora.inject_lora(model, r=2, target_parameters=["in_proj_weight"], target_modules=["last"], bias="all")
    for tensor in model.parameters():
        if tensor.requires_grad:
            nn.init.normal_(tensor, std=0.3)
    with torch.no_grad():
        lora.save_lora(model, tmp_path, format="peft", single_rank=True)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        torch.testing.assert_close(run(theirs), run(model))
        lora.load_lora(base, tmp_path)
        torch.testing.assert_close(run(base), run(model))


@pytest.mark.parametrize("kind", ["native", "peft"])
def test_names_of_wrappers_match_for_experts_and_rows(kind, tmp_path):
    torch.manual_seed(0)
    model, _ = _experts("Mixtral", num_local_experts=4)
    base = copy.deepcopy(model)
    outer = nn.Sequential()
    outer.module = model
    lora.inject_lora(outer, r=2, target_parameters=GATE_UP, trainable_token_indices={"embed_tokens": [5]})
    for tensor in model.parameters():
        if tensor.requires_grad:
            nn.init.normal_(tensor, std=0.3)
    path = tmp_path / ("folder" if kind == "peft" else "a.safetensors")
    lora.save_lora(outer, path, format="peft" if kind == "peft" else "loralib")
    lora.load_lora(base, path)
    with torch.no_grad():
        torch.testing.assert_close(base(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_rows_outside_of_the_table_change_nothing(tmp_path):
    model, _ = _transformer("Llama", **SMALL, intermediate_size=24)
    lora.inject_lora(model, target_modules=[], trainable_token_indices=[63])
    lora.save_lora(model, tmp_path / "a.safetensors")
    small, _ = _transformer("Llama", **{**SMALL, "vocab_size": 32}, intermediate_size=24)
    with pytest.raises(ValueError, match="rows 63 to 63 of model.embed_tokens: the model has 32 rows"):
        lora.load_lora(small, tmp_path / "a.safetensors")
    assert not lora.list_adapters(small) and all(p.requires_grad for p in small.parameters())
    other, _ = _transformer("Llama", **SMALL, intermediate_size=24)
    lora.inject_lora(other, target_modules=[], trainable_token_indices=[7])
    with pytest.raises(RuntimeError, match=r"the checkpoint has the rows {'weight': \[63\]}, the model trains"):
        other.load_state_dict(model.state_dict())


def test_peft_leaves_out_the_bias_of_a_tied_head_where_rows_are_trained(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**size, vocab_size=64)).eval()
    base = copy.deepcopy(model)
    lora.inject_lora(model, r=2, target_modules=["query"], trainable_token_indices=[5])
    with pytest.warns(UserWarning, match="PEFT may compute cls.predictions.decoder differently"):
        lora.save_lora(model, tmp_path, format="peft")
    with pytest.warns(UserWarning, match="cls.predictions.decoder has a bias, which PEFT leaves out"):
        lora.load_lora(base, tmp_path)


def test_a_table_beside_a_shared_one_is_named():
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    )
    with pytest.warns(UserWarning, match="shared is tied to encoder.embed_tokens, decoder.embed_tokens, which compute"):
        lora.inject_lora(model, r=2, target_modules=["shared", "q"])


def test_only_rows_through_peft(tmp_path):
    model, run = _transformer("Llama", **SMALL, intermediate_size=24)
    base = copy.deepcopy(model)
    lora.inject_lora(model, target_modules=[], trainable_token_indices=[5])
    nn.init.normal_(model.model.embed_tokens.lora_rows_weight)
    with pytest.warns(UserWarning, match="reads no adapter of token rows alone; lora.load_lora reads the folder"):
        lora.save_lora(model, tmp_path, format="peft")
    lora.load_lora(base, tmp_path)
    assert torch.equal(run(base), run(model))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_rows_come_in_addition_to_the_layers_as_in_peft(tmp_path):
    model, _ = _transformer("Llama", **SMALL, intermediate_size=24)
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install -e '.[test]'")
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, trainable_token_indices=[5]))
    names = lora.inject_lora(model, r=2, trainable_token_indices=[5])
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "v_proj"}
    assert lora.count_parameters(model).trainable == theirs.get_nb_trainable_parameters()[0]
    plain = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"no default target_modules .*; target_modules=\[\] trains the rows"):
        lora.inject_lora(plain, trainable_token_indices={"0": [1]})
