"""Several adapters on one base: each computes what it computes alone, in every order, and costs its own tensors only.

The oracle is a second model that has only the one adapter. Run alone: `pytest tests/test_adapters.py`.
"""

import contextlib
import copy
import io
import pickle

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, BERT, attention
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_model import INDEX, assert_unchanged, small_model, snapshot
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import loralib as lora

ROBERTA = transformers.RobertaConfig(**BERT)
# Differing ranks, targets, heads and biases, so that most slots belong to some of the adapters only.
ADAPTERS = {
    "plain": {"r": 2, "modules_to_save": []},
    "head": {"r": 3, "lora_alpha": 5, "target_modules": ["query", "key"]},
    "biases": {"r": 1, "target_modules": "all-linear", "bias": "all", "modules_to_save": ["classifier.out_proj"]},
    "own biases": {"r": 2, "use_rslora": True, "bias": "lora_only", "target_modules": ["0.output.dense", "value"]},
}


def base(dtype=torch.float64):
    torch.manual_seed(0)
    return transformers.RobertaForSequenceClassification(ROBERTA).to(dtype).eval()


def output(model):
    with torch.no_grad():
        return model(**attention()).logits


def randomize(model, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """By name: the file, the output, and the lora_state_dict of a model that has only that adapter."""
    folder, result = tmp_path_factory.mktemp("adapters"), {}
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        model = base()
        lora.inject_lora(model, **options)
        randomize(model, seed)
        lora.save_lora(model, folder / name)
        state = {key: value.clone() for key, value in lora.lora_state_dict(model).items()}
        result[name] = folder / name, output(model), state
    return result


@pytest.fixture
def several(alone):
    model = base()
    for name, (file, _, _) in alone.items():
        lora.load_lora(model, file, adapter_name=name)
    return model


def check_alone(model, alone, name):
    assert lora.active_adapter(model) == name
    torch.testing.assert_close(output(model), alone[name][1], rtol=1e-12, atol=1e-12)
    state = lora.lora_state_dict(model)
    assert state.keys() == alone[name][2].keys()
    assert all(torch.equal(state[key], alone[name][2][key]) for key in state)


def test_each_adapter_computes_what_it_computes_alone(several, alone):
    """After loading all, in both directions, merged and not; and the keys are the plain ones of the active adapter."""
    assert lora.list_adapters(several) == sorted(ADAPTERS) and lora.active_adapter(several) == list(ADAPTERS)[-1]
    for name in [*ADAPTERS, *reversed(ADAPTERS)]:
        lora.set_adapter(several, name)
        check_alone(several, alone, name)
        lora.unmerge_lora_weights(several)
        check_alone(several, alone, name)
        lora.merge_lora_weights(several)


def test_base_is_shared_and_never_written(several, alone):
    """One copy of every base tensor, bit for bit as it was; with adapters disabled the base's own output."""
    plain = base()
    shared = {id(p) for p in lora.unload(copy.deepcopy(several)).parameters()}
    assert len(shared) == len(list(plain.parameters()))
    pointers = {name: p.data_ptr() for name, p in several.named_parameters() if "query.weight" in name}
    for name in ADAPTERS:
        lora.set_adapter(several, name)
        assert {n: p.data_ptr() for n, p in several.named_parameters() if "query.weight" in n} == pointers
        with lora.disable_adapters(several):
            assert torch.equal(output(several), output(plain))
        check_alone(several, alone, name)
    lora.unload(several)
    assert all(
        torch.equal(p, q) for p, q in zip(several.state_dict().values(), plain.state_dict().values(), strict=True)
    )


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_switching_computes_and_copies_nothing(several):
    output(several)
    with Operations() as operations:
        for name in ADAPTERS:
            lora.set_adapter(several, name)
    assert set(operations.seen) <= {torch.ops.aten.detach.default}


# hypothesis prints the arguments of a test, fixtures included.
LOADED = {}


@pytest.fixture
def loaded(several, alone):
    LOADED.update(model=several, alone=alone)


@pytest.mark.usefixtures("loaded")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(["train", "eval", "merge", "unmerge", "disable", "copy", "pickle", "forward", *ADAPTERS]),
        max_size=12,
    )
)
def test_any_sequence(steps):
    """Whatever is done in between, the active adapter computes its own output; modes survive switching."""
    alone, model = LOADED["alone"], copy.deepcopy(LOADED["model"])
    for step in steps:
        if step in ADAPTERS:
            lora.set_adapter(model, step)
            assert all(module.training == model.training for module in model.modules())
        elif step in ("train", "eval"):
            model.train(step == "train")
        elif step in ("merge", "unmerge"):
            getattr(lora, f"{step}_lora_weights")(model)
        elif step == "disable":
            with lora.disable_adapters(model):
                output(model)
        elif step == "copy":
            model = copy.deepcopy(model)
        elif step == "pickle":
            model = pickle.loads(pickle.dumps(model))
        else:
            output(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):  # of the attention, in transformers 4
            module.dropout_prob = 0.0
    check_alone(model, alone, lora.active_adapter(model))


def test_training_touches_the_active_adapter_alone(several, alone):
    """Two steps with one adapter: the others and the base are as before, bit for bit, head and biases included."""
    lora.set_adapter(several, "head")
    lora.mark_only_lora_as_trainable(several)
    trained = {name for name, p in several.named_parameters() if p.requires_grad}
    assert trained == alone["head"][2].keys()
    optimizer = torch.optim.AdamW([p for p in several.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        several.train()(**attention(), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    several.eval()
    assert all(not torch.equal(lora.lora_state_dict(several)[key], alone["head"][2][key]) for key in trained)
    for name in ADAPTERS:
        if name != "head":
            lora.set_adapter(several, name)
            check_alone(several, alone, name)
    with lora.disable_adapters(several):
        assert torch.equal(output(several), output(base()))


def test_delete(several, alone):
    """The rest goes on; the slots of the deleted adapter alone are plain again, and its tensors are freed."""
    lora.set_adapter(several, "plain")
    lora.delete_adapter(several, "biases")
    assert lora.list_adapters(several) == ["head", "own biases", "plain"]
    assert type(several.roberta.embeddings.LayerNorm) is nn.LayerNorm
    assert "_slot" not in several.roberta.embeddings.LayerNorm.__dict__
    for name in ("head", "own biases", "plain"):
        lora.set_adapter(several, name)
        check_alone(several, alone, name)
    with pytest.raises(ValueError, match="adapter 'plain' is active; call lora.set_adapter.*head, own biases\\), or"):
        lora.delete_adapter(several, "plain")
    for call in (lora.set_adapter, lora.delete_adapter):
        with pytest.raises(ValueError, match="no adapter 'biases'; the model has 'head', 'own biases', 'plain'"):
            call(several, "biases")
    assert lora.list_adapters(base()) == [] and lora.active_adapter(base()) is None
    with pytest.raises(ValueError, match="no adapter 'x'; the model has none"):
        lora.set_adapter(base(), "x")


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.filterwarnings("ignore:the merged embedding")
def test_unload_and_merge_and_unload(several, alone, name):
    """unload: the very modules and Parameters that were there; merging: the active adapter's output, heads and all."""
    lora.unload(several)
    modules = {path: id(module) for path, module in several.named_modules()}
    parameters = {path: id(parameter) for path, parameter in several.named_parameters()}
    for adapter, (file, _, _) in alone.items():
        lora.load_lora(several, file, adapter_name=adapter)
    lora.set_adapter(several, name)
    merged = lora.merge_and_unload(copy.deepcopy(several))
    assert repr(merged) == repr(base()) and lora.list_adapters(merged) == []
    torch.testing.assert_close(output(merged), alone[name][1], rtol=1e-12, atol=1e-12)
    assert lora.unload(several) is several
    assert {path: id(module) for path, module in several.named_modules()} == modules
    assert {path: id(parameter) for path, parameter in several.named_parameters()} == parameters
    assert torch.equal(output(several), output(base()))


def test_what_happened_to_the_model_meanwhile_holds_for_the_inactive_too(alone):
    """Another dtype, another set of base Parameters: the adapter that comes back follows, and so does the base."""
    model = base()
    for name in ("plain", "head"):
        lora.load_lora(model, alone[name][0], adapter_name=name)
    model.to(torch.float32)
    lora.set_adapter(model, "plain")
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {torch.float32}
    torch.testing.assert_close(output(model), alone["plain"][1].float(), rtol=1e-4, atol=1e-5)
    other = randomize(base(torch.float32).requires_grad_(True), 9)
    model.load_state_dict(other.state_dict(), strict=False, assign=True)
    lora.set_adapter(model, "head")
    assert model.roberta.encoder.layer[0].output.dense.weight.data_ptr() == other.roberta.encoder.layer[0].output.dense.weight.data_ptr()  # fmt: skip  # noqa: E501
    query = "roberta.encoder.layer.0.attention.self.query"
    assert torch.equal(model.get_submodule(query)._parameters["weight"], other.get_submodule(query).weight)
    with lora.disable_adapters(model):
        assert torch.equal(model.get_submodule(query).weight, other.get_submodule(query).weight)
    lora.unload(model)
    assert torch.equal(model.get_submodule(query).weight, other.get_submodule(query).weight)


@pytest.mark.parametrize("name", ADAPTERS)
def test_saving_while_disabled_and_through_torch_save(several, alone, name, tmp_path):
    """The file of the active adapter is the same from any state, byte for byte; a pickled model keeps them all."""
    lora.set_adapter(several, name)
    lora.save_lora(several, tmp_path / "a")
    with lora.disable_adapters(several):
        lora.save_lora(several, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == alone[name][0].read_bytes()
    file = io.BytesIO()
    torch.save(several, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    for other in ADAPTERS:
        lora.set_adapter(again, other)
        check_alone(again, alone, other)


def test_loading_into_an_adapter_that_is_there(several, alone, tmp_path):
    """By name, active or not; another shape is refused, and so is a file without the adapter's head."""
    lora.set_adapter(several, "plain")
    before = lora.lora_state_dict(several)
    for seed, name in enumerate(ADAPTERS):
        model = base()
        lora.load_lora(model, alone[name][0])
        randomize(model, 20 + seed)
        lora.save_lora(model, tmp_path / name)
        lora.load_lora(several, tmp_path / name, adapter_name=name)
        assert lora.active_adapter(several) == name
        torch.testing.assert_close(output(several), output(model), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="query: r is 3 in the file, 2 in the model"):
        lora.load_lora(several, alone["head"][0], adapter_name="plain")
    model = base()
    lora.inject_lora(model, **{**ADAPTERS["head"], "modules_to_save": []})
    lora.save_lora(model, tmp_path / "headless")
    with pytest.raises(ValueError, match="classifier.dense.weight: the model's adapter has it, the file does not"):
        lora.load_lora(several, tmp_path / "headless", adapter_name="head")
    assert lora.active_adapter(several) == "own biases"
    assert before.keys() == alone["plain"][2].keys()
    # The other way round the adapter gets a head of its own, and the base keeps its.
    lora.load_lora(model, alone["head"][0])
    torch.testing.assert_close(output(model), alone["head"][1], rtol=1e-12, atol=1e-12)
    assert torch.equal(output(lora.unload(model)), output(base()))


def test_a_file_that_does_not_fit_changes_nothing(several, alone, tmp_path):
    lora.set_adapter(several, "head")
    content = alone["plain"][0].read_bytes()
    (tmp_path / "cut").write_bytes(content[:-8])
    modules = [(name, id(module)) for name, module in several.named_modules()]
    with pytest.raises(ValueError, match="no whole safetensors file"):
        lora.load_lora(several, tmp_path / "cut", adapter_name="new")
    assert [(name, id(module)) for name, module in several.named_modules()] == modules
    assert lora.list_adapters(several) == sorted(ADAPTERS)
    check_alone(several, alone, "head")


def test_injecting_a_second_adapter():
    """Under a new name it is another adapter; under the same it is refused."""
    model = base()
    lora.inject_lora(model, r=2)
    with pytest.raises(ValueError, match="already has LoRA layers of an adapter 'default' .*another adapter_name"):
        lora.inject_lora(model, r=2, target_modules=["key"])
    lora.inject_lora(model, r=4, target_modules=["key"], adapter_name="second")
    assert lora.list_adapters(model) == ["default", "second"]
    names = {name.rpartition(".")[0] for name in lora.lora_state_dict(model) if "lora_" in name}
    assert {name.rpartition(".")[2] for name in names} == {"key"}


def test_head_of_one_adapter_and_adapted_head_of_another():
    """A head that one trains whole and another adapts inside: both exist, and the base has its own."""
    model, wanted = base(), {}
    lora.inject_lora(model, r=2, modules_to_save=["classifier"], adapter_name="whole")
    options = {"target_modules": ["classifier.dense"], "modules_to_save": [], "bias": "all"}
    lora.inject_lora(model, r=2, **options, adapter_name="inside")
    for name in ("whole", "inside"):
        lora.set_adapter(model, name)
        wanted[name] = output(randomize(model, 5))
    for name in ("whole", "inside", "whole"):
        lora.set_adapter(model, name)
        torch.testing.assert_close(output(model), wanted[name])
        assert isinstance(model.classifier.dense, lora.LoRALayer) == (name == "inside")
        with lora.disable_adapters(model):
            assert torch.equal(output(model), output(base()))


def test_tied_tensors_stay_tied_within_an_adapter():
    """The bias that a language model's head has under two names is one in the adapter, and one in the base."""
    model = ARCHITECTURES["BERT"].build()
    lora.inject_lora(model, r=2, bias="all")
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias
    lora.unload(model)
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias
    gpt2 = ARCHITECTURES["GPT-2"].build()
    lora.inject_lora(gpt2, r=2, modules_to_save=["wte", "lm_head"])
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight and gpt2.lm_head.weight.requires_grad
    lora.inject_lora(lora.unload(gpt2), r=2, modules_to_save=["lm_head"])
    assert gpt2.lm_head.weight is not gpt2.transformer.wte.weight and not gpt2.transformer.wte.weight.requires_grad
    lora.unload(gpt2)
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight


def test_whole_and_by_groups_on_the_same_projection(tmp_path):
    """A dense adapter, as PEFT has it, and one of q and v: two classes of layer in one slot."""
    gpt2 = ARCHITECTURES["GPT-2"]
    model, wanted = gpt2.build(), {}
    lora.inject_lora(model, r=2, adapter_name="groups")
    lora.inject_lora(model, r=2, target_modules=["c_attn"], adapter_name="whole")
    for name in ("groups", "whole"):
        lora.set_adapter(model, name)
        randomize(model, 3)
        assert hasattr(model.transformer.h[0].attn.c_attn, "enable_lora") == (name == "groups")
        wanted[name] = gpt2.output(model)
        lora.save_lora(model, tmp_path / name, format="peft")
    for name in wanted:
        loaded = gpt2.build()
        lora.load_lora(loaded, tmp_path / name, adapter_name=name)
        torch.testing.assert_close(gpt2.output(loaded), wanted[name])


class ByHand(nn.Module):
    """As a user of upstream writes it."""

    def __init__(self):
        super().__init__()
        self.embed = lora.Embedding(10, 8, r=2)
        self.qkv = lora.MergedLinear(8, 24, r=2, enable_lora=[True, False, True], fan_in_fan_out=True)
        self.plain = lora.Linear(24, 8, r=0)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.plain(self.qkv(self.embed(x)).tanh()))


def test_layers_made_by_hand_take_other_adapters_too(tmp_path):
    """They are called "default"; a second adapter, of other rank and layers, takes turns with them."""
    torch.manual_seed(0)
    first = ByHand().eval()
    for parameter in first.parameters():
        nn.init.normal_(parameter, std=0.5)
    frozen = {key: value for key, value in first.state_dict().items() if "lora_" not in key}
    second = ByHand().eval()
    second.qkv = lora.MergedLinear(8, 24, r=3, enable_lora=[False, True, True], fan_in_fan_out=True).eval()
    second.plain = lora.Linear(24, 8, r=1).eval()
    second.load_state_dict(frozen, strict=False)
    lora.mark_only_lora_as_trainable(second)
    randomize(second, 1)
    x = torch.arange(10)
    wanted = {"default": first(x), "second": second(x)}
    lora.save_lora(second, tmp_path / "second")
    assert lora.list_adapters(first) == ["default"] and lora.active_adapter(first) == "default"
    assert lora.load_lora(first, tmp_path / "second", adapter_name="second") == ["embed", "qkv", "plain"]
    for name in ("second", "default", "second"):
        lora.set_adapter(first, name)
        torch.testing.assert_close(first(x), wanted[name])
    assert type(lora.unload(first).qkv) is nn.Linear
    torch.testing.assert_close(first.qkv.weight, frozen["qkv.weight"].T)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize("detour", ["biases", "plain"])
def test_what_is_shared_and_replaced_reaches_every_adapter(detour):
    """A bias that was replaced, also past an adapter that has that bias too; the statistics are each adapter's own."""
    torch.manual_seed(0)
    model = Normed()
    for name, bias in (("biases", "all"), ("plain", "none"), ("other", "none")):
        lora.inject_lora(model, r=1, target_modules=["first"], bias=bias, adapter_name=name)
    model.norm.bias = nn.Parameter(torch.full((4,), 7.0))
    lora.set_adapter(model, detour)
    model.double().train()(torch.randn(5, 4, dtype=torch.float64))
    for name in ("plain", "biases", "other"):
        lora.set_adapter(model, name)
        assert model.norm.weight.dtype == model.norm.running_var.dtype == torch.float64
        assert (int(model.norm.num_batches_tracked), bool(model.norm.running_mean.any())) == (name == detour,) * 2
        assert bool((model.norm.bias == 7).all()) == (name != "biases")
    base = lora.unload(model).norm
    assert base.num_batches_tracked == 0 and not base.running_mean.any() and base.bias[0] == 7


def _merge_one(model, stack):
    model.conv.merge()


def _merge_by_hand(model, stack):
    model.conv.weight.data += model.conv.delta_weight()
    model.conv.merged = True


STATES = {
    "plain": lambda model, stack: None,
    "training": lambda model, stack: model.train(),
    "merged": lambda model, stack: lora.merge_lora_weights(model),
    "one merged": _merge_one,
    "merged by hand": _merge_by_hand,
    "disabled": lambda model, stack: stack.enter_context(lora.disable_adapters(model)),
    "merged and disabled": lambda model, stack: stack.enter_context(
        lora.disable_adapters(lora.merge_lora_weights(model))
    ),
}


@pytest.mark.filterwarnings(r"ignore:state_dict\(\) of:UserWarning")
@pytest.mark.parametrize("into", ["first", "second"])
@pytest.mark.parametrize("state", STATES)
def test_a_refused_load_changes_nothing(state, into, tmp_path):
    """Into the active adapter or another one, in every state of the model, to the very Parameters."""
    torch.manual_seed(0)
    model = small_model()
    lora.inject_lora(model, target_modules=["embed"], modules_to_save=["head"], adapter_name="first")
    lora.inject_lora(model, target_modules=["conv", "c_attn"], bias="lora_only", adapter_name="second")
    randomize(model, 1)
    lora.save_lora(model, tmp_path / "second")
    other = small_model()
    lora.inject_lora(other, r=2, target_modules=["image"])
    lora.save_lora(other, tmp_path / "other")
    adapted = model(INDEX)
    with contextlib.ExitStack() as stack:
        STATES[state](model, stack)
        before, wanted = snapshot(model), model(INDEX)
        with pytest.raises(ValueError, match="nothing was loaded"):
            lora.load_lora(model, tmp_path / "other", adapter_name=into)
        assert_unchanged(model, before)
        assert torch.equal(model(INDEX), wanted)
    assert (model(INDEX) - adapted).abs().max() < 1e-5
    lora.load_lora(model, tmp_path / "second", adapter_name="second")
    assert (model(INDEX) - adapted).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{"modules_to_save": ["second"]}, {"bias": "all"}], ids=str)
@pytest.mark.parametrize("disabled", [False, True])
def test_a_refused_load_leaves_recurrent_layers_what_they_compute_with(disabled, options, tmp_path):
    """They keep their weights in a list, too."""
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.LSTM(4, 4)})
    for seed, name in enumerate(("a", "b")):
        lora.inject_lora(model, r=2, target_modules=["first"], adapter_name=name, **options)
        randomize(model, seed)
    lora.set_adapter(model, "a")
    x = torch.randn(3, 2, 4)
    with lora.disable_adapters(model) if disabled else contextlib.nullcontext():
        wanted, weights = model.second(x)[0], list(map(id, model.second._flat_weights))
        for name in "ab":
            with pytest.raises(FileNotFoundError):
                lora.load_lora(model, tmp_path / "nowhere.safetensors", adapter_name=name)
            assert torch.equal(model.second(x)[0], wanted)
            assert list(map(id, model.second._flat_weights)) == weights


def test_a_load_that_runs_out_of_memory_changes_nothing(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    lora.inject_lora(model, r=2, target_modules=["0", "1"])
    lora.save_lora(model, tmp_path / "adapter")
    randomize(model, 0)
    x, add, parts = torch.ones(1, 4), lora.inject.add_part, []
    before, wanted = snapshot(model), model(x)

    def add_part(*arguments, **options):
        parts.append(arguments)
        if len(parts) == 2:
            raise torch.OutOfMemoryError("no memory")
        return add(*arguments, **options)

    monkeypatch.setattr(lora.inject, "add_part", add_part)
    with pytest.raises(torch.OutOfMemoryError):
        lora.load_lora(model, tmp_path / "adapter", adapter_name="new")
    assert_unchanged(model, before)
    assert torch.equal(model(x), wanted)
    monkeypatch.undo()
    lora.load_lora(model, tmp_path / "adapter", adapter_name="new")
    assert lora.list_adapters(model) == ["default", "new"]
