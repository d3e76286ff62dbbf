"""Both laws after any sequence of operations, on single layers and on a model with several adapters.

How: hypothesis chooses the operations. Beside the layer or model goes an oracle, plain tensors to which each operation
is done by its meaning alone; the output has to be that of the plain torch model in float64 with W + scaling * B A
written out (law 1), and what is stored the oracle's tensors, bit for bit (law 2).
Run alone: `pytest tests/test_properties.py`; thousands of cases: `LORALIB_CASES=40 pytest tests/test_properties.py`.
"""

import contextlib
import copy
import io
import pickle
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference import (
    CASES,
    IO,
    KINDS,
    Case,
    assert_same_bits,
    delta,
    dense_forward,
    dense_weight,
    examples,
    tensors,
)
from small_model import INDEX, TARGETS, SmallModel, assert_unchanged, small_model, snapshot
from torch import nn
from torch.func import functional_call

import loralib as lora

# Both laws after any sequence of operations.


class Dense:
    """The oracle: base, bias, A, B and scaling in float64, with every conversion's rounding applied."""

    def __init__(self, case, layer):
        self.case, self.dtype, self.scaling, self.state = case, torch.float32, layer.scaling, tensors(layer)

    def convert(self, dtype):
        self.dtype = dtype
        self.state = {name: value.to(dtype).double() for name, value in self.state.items()}

    def check(self, layer, x):
        stored = layer.state_dict()
        assert stored.keys() == self.state.keys()
        for name, value in self.state.items():
            assert stored[name].dtype == self.dtype and torch.equal(stored[name].double(), value), name
        wanted = dense_forward(self.case, self.state, self.scaling, x)
        weight = dense_weight(self.case, self.state, self.scaling) if layer.merged else self.state["weight"]
        # A forward with gradients forgets the merged weight: first and last see one made before the next operation.
        for context in (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.no_grad):
            with context():
                out = layer(x.to(self.dtype) if x.is_floating_point() else x)
                read = layer.weight
            self.assert_close(out, wanted)
            self.assert_close(read, weight)

    def assert_close(self, actual, wanted):
        # The narrow dtypes have rounded x as well.
        bound = {torch.float64: 1e-12, torch.float32: 5e-5, torch.float16: 0.06, torch.bfloat16: 0.4}[self.dtype]
        torch.testing.assert_close(actual.double(), wanted, rtol=bound, atol=bound, check_layout=False)


OPERATIONS = [
    "train", "eval", "merge", "unmerge", "edit", "edit data", "base data", "replace", "scaling", "merge_weights",
    "load", "load adapter", "load assign", "float64", "bfloat16", "deepcopy", "pickle", "torch.save", "reset",
    "reset adapter", "step", "disabled", "float32", "float16", "functional_call", "file", "unload", "merge and unload",
]  # fmt: skip


def operate(name, layer, dense, number):
    """Do one operation on the layer and its meaning on the oracle; return the layer, which a copy replaces."""
    generator = torch.Generator().manual_seed(number)

    def draw(key):
        value = torch.randn(dense.state[key].shape, generator=generator, dtype=torch.float64) / 2
        if key == "lora_A" and getattr(layer, "padding_idx", None) is not None:
            value[:, layer.padding_idx] = 0
        return value.to(dense.dtype)

    def replace(**values):
        dense.state.update({key: value.double() for key, value in values.items()})

    if name in ("train", "eval"):
        getattr(layer, name)()
    elif name == "merge":
        lora.merge_lora_weights(layer)
    elif name == "unmerge":
        lora.unmerge_lora_weights(layer)
    elif name in ("edit", "edit data", "replace"):
        values = {key: draw(key) for key in ("lora_A", "lora_B")}
        for key, value in values.items():
            parameter = getattr(layer, key)
            if name == "edit":
                with torch.no_grad():
                    parameter.copy_(value)
            elif name == "edit data":
                parameter.data.copy_(value)
            else:
                setattr(layer, key, nn.Parameter(value))
        replace(**values)
    elif name == "base data":
        value, merged = draw("weight"), layer.merged
        lora.unmerge_lora_weights(layer).weight.data = value
        if merged:
            lora.merge_lora_weights(layer)
        replace(weight=value)
    elif name == "scaling":
        layer.scaling = dense.scaling = (number % 7) / 2 - 1
    elif name == "merge_weights":
        layer.merge_weights = not layer.merge_weights
    elif name.startswith("load"):
        values = {key: draw(key) for key in dense.state if name != "load adapter" or "lora_" in key}
        layer.load_state_dict({key: value.clone() for key, value in values.items()}, False, assign="assign" in name)
        replace(**values)
    elif name in ("float64", "float32", "bfloat16", "float16"):
        dtype = getattr(torch, name)
        layer.to(dtype)
        dense.convert(dtype)
    elif name == "deepcopy":
        layer = copy.deepcopy(layer)
    elif name == "pickle":
        layer = pickle.loads(pickle.dumps(layer))
    elif name == "torch.save":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        layer = torch.load(file, weights_only=False)
    elif name.startswith("reset"):
        layer.reset_parameters() if name == "reset" else layer.reset_lora_parameters()
        fresh = tensors(layer)
        assert not fresh["lora_A" if dense.case.is_embedding else "lora_B"].any()
        replace(**{key: value for key, value in fresh.items() if name == "reset" or "lora_" in key})
    elif name == "step":
        x = dense.case.inputs(dense.dtype)
        optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.01)
        lora.unmerge_lora_weights(layer)(x).sum().backward()
        optimizer.step()
        layer.zero_grad()
        replace(lora_A=layer.lora_A.detach().clone(), lora_B=layer.lora_B.detach().clone())
    elif name == "disabled":
        with lora.disable_adapters(layer):
            x = dense.case.inputs(dense.dtype)
            without = {key: value for key, value in dense.state.items() if "lora_" not in key}
            dense.assert_close(layer(x), dense_forward(dense.case, without, 0, x))
    elif name == "functional_call":
        x, values = dense.case.inputs(dense.dtype), {key: draw(key) for key in ("lora_A", "lora_B")}
        state = {**dense.state, **{key: value.double() for key, value in values.items()}}
        dense.assert_close(functional_call(layer, values, (x,)), dense_forward(dense.case, state, dense.scaling, x))
    elif name == "file":
        other = copy.deepcopy(layer)
        other.scaling = other.lora_alpha = 9
        nn.init.ones_(other.lora_A)
        with tempfile.TemporaryDirectory() as folder:
            lora.save_lora(nn.Sequential(layer), folder + "/a")
            lora.load_lora(nn.Sequential(other), folder + "/a")
        layer = other
    elif name == "unload":
        plain = lora.unload(nn.Sequential(copy.deepcopy(layer)))[0]
        wanted = {key: value for key, value in dense.state.items() if "lora_" not in key}
        if dense.case.transposed:
            wanted["weight"] = wanted["weight"].T
        assert type(plain) is type(dense.case.plain())
        assert_same_bits(tensors(plain), wanted)
    elif name == "merge and unload":
        plain, x = lora.merge_and_unload(nn.Sequential(copy.deepcopy(layer))), dense.case.inputs(dense.dtype)
        dense.assert_close(plain(x), dense_forward(dense.case, dense.state, dense.scaling, x))
    return layer


# torch itself writes to a table with max_norm.
SEQUENCES = [case for case in CASES if case.base.get("max_norm") is None]


@examples(200)
@given(st.sampled_from(SEQUENCES), st.lists(st.sampled_from(OPERATIONS), max_size=12), st.integers(0, 2**20))
def test_both_laws_after_any_sequence(case, operations, seed):
    """After every operation of a random sequence, output, stored tensors and readable weight are the oracle's."""
    torch.manual_seed(seed)
    layer = case.layer()
    dense = Dense(case, layer)
    x = case.inputs(torch.bfloat16)
    x = x.double() if x.is_floating_point() else x
    dense.check(layer, x)
    for number, name in enumerate(operations):
        layer = operate(name, layer, dense, seed + number)
        dense.check(layer, x)


@pytest.mark.parametrize("first", ["merge", "eval", "train"])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_both_laws_after_each_operation(case, name, first):
    """Every single operation, done in all three states and followed by train(), keeps both laws."""
    layer = case.layer()
    dense = Dense(case, layer)
    x = case.inputs(torch.bfloat16)
    x = x.double() if x.is_floating_point() else x
    for number, operation in enumerate([first, name, "train"]):
        layer = operate(operation, layer, dense, number)
        dense.check(layer, x)


# A model with several adapters

NAMES = ["one", "two", "three"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.6}
KIND = {
    "embed": Case("Embedding", (9, 8), ()),
    "conv": Case("Conv1d", (8, 8, 3), ()),
    "image": Case("Conv2d", (2, 4, (1, 2)), ()),
    "c_attn": Case("Linear", (8, 24), (), lora=IO),
    "first": Case("Linear", (8, 8), ()),
}
ADAPTERS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 3),
        "lora_alpha": st.sampled_from([1, 4, 0.5]),
        "target_modules": st.lists(st.sampled_from(TARGETS), min_size=1, unique=True),
        "modules_to_save": st.sampled_from([[], ["head"], ["head", "norm"]]),
        "bias": st.sampled_from(["none", "lora_only", "all"]),
        "use_rslora": st.booleans(),
        "merge_weights": st.booleans(),
    },
    optional={"enable_lora": st.sampled_from([[True, False, True], [True] * 3, [False, True, False]])},
)
SEED = st.integers(0, 2**20)
PLAIN_MODEL = small_model(torch.float64)


def is_lora(name):
    return name.endswith(("lora_A", "lora_B"))


class Oracle:
    """The base and each adapter's own tensors by state-dict name, each in the dtype in which the model has it."""

    def __init__(self, model):
        self.base = {name: t.clone() for name, t in model.state_dict().items() if not name.startswith("second.")}
        self.own, self.scaling, self.cases = {}, {}, {}
        self.active, self.disabled = None, False

    def shown(self):
        """The active adapter's tensors that are in the model: while it is disabled, its heads and biases are not."""
        own = self.own.get(self.active, {})
        return {name: tensor for name, tensor in own.items() if is_lora(name) or not self.disabled}

    def state(self):
        return {**self.base, **self.shown()}

    def put(self, values):
        """Set tensors of the model as it is now."""
        shown = self.shown().keys()
        for name, value in values.items():
            owner = self.own[self.active] if name in shown else self.base
            owner[name] = value.detach().clone().to(owner[name].dtype)

    def convert(self, dtype):
        """What is not in the model at present follows."""
        for owner in (self.base, *self.own.values()):
            owner.update({name: tensor.to(dtype) for name, tensor in owner.items()})

    def switch(self, active, disabled=False):
        self.active, self.disabled = active, disabled

    def dense(self, **given):
        """The weights of the plain model with the update in them, in float64, differentiable."""
        state = {name: tensor.double() for name, tensor in self.state().items()} | given
        plain = {name: tensor for name, tensor in state.items() if not is_lora(name)}
        if self.active is not None and not self.disabled:
            for path, case in self.cases[self.active].items():
                A, B, weight = (state[f"{path}.{key}"] for key in ("lora_A", "lora_B", "weight"))
                update = self.scaling[self.active][path] * delta(case, weight.shape, A, B)
                plain[f"{path}.weight"] = weight + update
        return plain

    def output(self, **given):
        # Tying, torch does not put back the tensors of a module that has two names.
        return functional_call(PLAIN_MODEL, self.dense(**given), (INDEX,), tie_weights=False)

    def bound(self):
        return max(BOUNDS[tensor.dtype] for tensor in self.state().values())


class Adapters(RuleBasedStateMachine):
    """Rules do one operation to the model and to the oracle; the invariants compare them."""

    @initialize(seed=SEED)
    def start(self, seed):
        torch.manual_seed(seed)
        self.model = small_model(torch.float64)
        self.oracle, self.files = Oracle(self.model), []
        self.stack = contextlib.ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))

    def teardown(self):
        if hasattr(self, "stack"):
            self.stack.close()

    has_adapter = precondition(lambda self: self.oracle.active is not None)

    @property
    def layers(self):
        return {name: m for name, m in self.model.named_modules() if isinstance(m, lora.LoRALayer)}

    def random(self, name, seed):
        like = self.oracle.state()[name]
        value = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2
        return value.to(like.dtype)

    # Making, choosing, dropping adapters

    @rule(name=st.sampled_from(NAMES), options=ADAPTERS, seed=SEED)
    def inject(self, name, options, seed):
        if "c_attn" not in options["target_modules"]:
            options = {key: value for key, value in options.items() if key != "enable_lora"}
        if name in self.oracle.own:
            self.refused(lambda: lora.inject_lora(self.model, **options, adapter_name=name), "already has LoRA layers")
            return
        names = lora.inject_lora(self.model, **options, adapter_name=name)
        assert sorted(names) == sorted(options["target_modules"])
        cases = {path: KIND[path] for path in names}
        if "enable_lora" in options:
            groups = {"enable_lora": options["enable_lora"], **IO}
            cases["c_attn"] = Case("MergedLinear", (8, 24), (), lora=groups)
        own = [n for n in self.oracle.base if n.endswith("bias") and options["bias"] == "all"]
        own += [
            f"{path}.bias" for path in {"conv", "image", "c_attn"}.intersection(names) if options["bias"] == "lora_only"
        ]
        own += [n for n in self.oracle.base if n.startswith(tuple(f"{m}." for m in options["modules_to_save"]))]
        r = options["r"]
        scaling = options["lora_alpha"] / (r**0.5 if options["use_rslora"] else r)
        self.made(name, cases, own, dict.fromkeys(names, scaling))
        for number, (path, layer) in enumerate(self.layers.items()):
            assert layer.scaling == scaling
            with torch.no_grad():
                for key in ("lora_A", "lora_B"):
                    getattr(layer, key).copy_(self.random(f"{path}.{key}", seed + number))
                    self.oracle.put({f"{path}.{key}": getattr(layer, key)})

    def made(self, name, cases, own, scaling):
        """The oracle of a new adapter: A and B as they are in the model, copies of the base's heads and biases."""
        self.oracle.switch(None)
        state = self.model.state_dict()
        tensors = {own_name: self.oracle.base[own_name] for own_name in own}
        # Heads and biases of a base in half precision are trained in float32.
        tensors = {name: t.float() if t.is_floating_point() and t.itemsize == 2 else t for name, t in tensors.items()}
        for path in cases:
            wanted = torch.promote_types(self.oracle.base[f"{path}.weight"].dtype, torch.float32)
            for key in ("lora_A", "lora_B"):
                tensors[f"{path}.{key}"] = state[f"{path}.{key}"].clone()
                assert state[f"{path}.{key}"].dtype == wanted
        self.oracle.own[name], self.oracle.cases[name], self.oracle.scaling[name] = tensors, cases, scaling
        self.oracle.switch(name)

    @rule(name=st.sampled_from(NAMES))
    def set_adapter(self, name):
        if name not in self.oracle.own:
            self.refused(lambda: lora.set_adapter(self.model, name), f"no adapter '{name}'")
            return
        lora.set_adapter(self.model, name)
        self.oracle.switch(name)

    @rule(name=st.sampled_from(NAMES))
    def delete_adapter(self, name):
        if name not in self.oracle.own or name == self.oracle.active:
            self.refused(lambda: lora.delete_adapter(self.model, name), f"adapter '{name}'")
            return
        lora.delete_adapter(self.model, name)
        del self.oracle.own[name]

    def refused(self, operation, message):
        before = snapshot(self.model)
        with pytest.raises(ValueError, match=message):
            operation()
        assert_unchanged(self.model, before)

    # Modes

    @rule(mode=st.sampled_from(["train", "eval", "merge_lora_weights", "unmerge_lora_weights"]))
    def mode(self, mode):
        getattr(self.model, mode)() if hasattr(self.model, mode) else getattr(lora, mode)(self.model)

    @rule(dtype=st.sampled_from(DTYPES))
    def convert(self, dtype):
        self.model.to(dtype)
        self.oracle.convert(dtype)

    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def copy(self, how):
        if how == "deepcopy":
            self.model = copy.deepcopy(self.model)
        elif how == "pickle":
            self.model = pickle.loads(pickle.dumps(self.model))
        else:
            torch.save(self.model, file := io.BytesIO())
            file.seek(0)
            self.model = torch.load(file, weights_only=False)

    @rule(
        inside=st.sampled_from(["nothing", "train", "eval", "merge", "convert", "save"]), dtype=st.sampled_from(DTYPES)
    )
    def disabled(self, inside, dtype):
        with lora.disable_adapters(self.model):
            self.oracle.switch(self.oracle.active, disabled=True)
            self.check()
            if inside in ("train", "eval"):
                self.mode(inside)
            elif inside == "merge":
                self.mode("merge_lora_weights")
            elif inside == "convert":
                self.convert(dtype)
            elif inside == "save" and self.oracle.active:
                self.save_to(self.folder / "disabled")
            self.check()
        self.oracle.switch(self.oracle.active)
        if inside == "save" and self.oracle.active:
            self.save_to(self.folder / "enabled")
            assert (self.folder / "disabled").read_bytes() == (self.folder / "enabled").read_bytes()

    # Values

    @rule(data=st.data(), how=st.sampled_from(["copy_", "data", "replace", "load", "assign"]), seed=SEED)
    def write(self, data, how, seed):
        """A base weight, a bias, a head, an A or B."""
        name = data.draw(st.sampled_from(sorted(self.oracle.state())))
        value = self.random(name, seed)
        path, _, key = name.rpartition(".")
        if key == "weight" and how in ("copy_", "data", "replace"):  # a merged weight is the sum
            lora.unmerge_lora_weights(self.model)
        module, parameter = self.model.get_submodule(path), dict(self.model.named_parameters())[name]
        if how == "copy_":
            with torch.no_grad():
                parameter.copy_(value)
        elif how == "data":
            parameter.data.copy_(value)
            if not is_lora(name):  # which leaves no trace
                self.model.train(self.model.training)
        elif how == "replace":
            setattr(module, key, nn.Parameter(value.clone(), parameter.requires_grad))
        else:
            self.model.load_state_dict({name: value.clone()}, strict=False, assign=how == "assign")
        self.oracle.put({name: value})

    @has_adapter
    @rule(data=st.data(), value=st.sampled_from([0.0, 0.25, -1.5]))
    def scaling(self, data, value):
        path = data.draw(st.sampled_from(sorted(self.layers)))
        self.layers[path].scaling = self.oracle.scaling[self.oracle.active][path] = value

    @has_adapter
    @rule(bias=st.sampled_from(["none", "all", "lora_only"]), saved=st.sampled_from([None, ["norm"], ["head"]]))
    def mark(self, bias, saved):
        lora.mark_only_lora_as_trainable(self.model, bias, saved)
        wanted = set(self.oracle.shown())
        for name in self.oracle.state():
            path = name.rpartition(".")[0]
            is_bias = name.endswith("bias") and (bias == "all" or (bias == "lora_only" and path in self.layers))
            if is_bias or (saved and path in saved):
                wanted.add(name)
        assert {name for name, p in self.model.named_parameters() if p.requires_grad} == wanted
        state = {n: t for n, t in lora.lora_state_dict(self.model, bias, saved).items() if not n.startswith("second.")}
        assert_same_bits(state, {name: self.oracle.state()[name] for name in wanted})

    @precondition(lambda self: all(tensor.dtype.itemsize > 2 for tensor in self.oracle.state().values()))
    @rule()
    def step(self):
        """The gradients of whatever trains are those of the dense formula; then one step of SGD."""
        lora.unmerge_lora_weights(self.model)  # a merged layer gives its adapter none
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        given = {name: p.detach().double().clone().requires_grad_() for name, p in parameters.items()}
        if not given:
            return
        self.model(INDEX).square().sum().backward()
        self.oracle.output(**given).square().sum().backward()
        bound = self.oracle.bound()
        for name, parameter in parameters.items():
            scale = given[name].grad.abs().max().item() + 1
            torch.testing.assert_close(parameter.grad.double(), given[name].grad, rtol=0, atol=10 * bound * scale)
        torch.optim.SGD(parameters.values(), lr=1e-4).step()
        self.model.zero_grad()
        self.oracle.put(parameters)

    @has_adapter
    @rule(seed=SEED)
    def functional_call(self, seed):
        names = [name for name in self.oracle.shown() if is_lora(name)]
        given = {name: self.random(name, seed + number) for number, name in enumerate(names)}
        out = functional_call(self.model, given, (INDEX,), tie_weights=False).detach()
        wanted = self.oracle.output(**{name: value.double() for name, value in given.items()})
        bound = self.oracle.bound()
        torch.testing.assert_close(out.double(), wanted, rtol=bound, atol=bound)

    # Files

    def save_to(self, path, **options):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*trained, and not in the file")  # what `mark` unfroze
            lora.save_lora(self.model, path, **options)

    @has_adapter
    @rule(format=st.sampled_from(["loralib", "peft"]))
    def save(self, format):
        path, oracle = self.folder / f"{len(self.files)}", self.oracle
        name = oracle.active
        differing = format == "peft" and len(set(oracle.scaling[name].values())) > 1
        told = pytest.warns(UserWarning, match="ranks or alphas differ") if differing else contextlib.nullcontext()
        with told:
            self.save_to(path, format=format)
        self.files.append((path, dict(oracle.own[name]), oracle.cases[name], dict(oracle.scaling[name])))

    @precondition(lambda self: self.files)
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def load(self, data, name):
        path, own, cases, scaling = data.draw(st.sampled_from(self.files))
        if name in self.oracle.own:
            there, ours = self.oracle.own[name], self.oracle.cases[name]
            same = [(p, c.lora, own[f"{p}.lora_B"].shape) for p, c in sorted(cases.items())]
            fits = same == [(p, c.lora, there[f"{p}.lora_B"].shape) for p, c in sorted(ours.items())]
            if not fits or not there.keys() <= own.keys():
                self.refused(lambda: lora.load_lora(self.model, path, adapter_name=name), "nothing was loaded")
                return
        lora.load_lora(self.model, path, adapter_name=name)
        if name in self.oracle.own:
            self.oracle.switch(name)
            missing = own.keys() - self.oracle.own[name].keys()
            self.oracle.own[name].update({key: self.oracle.base[key] for key in missing})
            self.oracle.scaling[name] = dict(scaling)
        else:
            self.made(name, cases, [key for key in own if not is_lora(key)], dict(scaling))
        for layer_path, layer in self.layers.items():
            # PEFT's file has alpha, which is rounded.
            assert layer.scaling == pytest.approx(scaling[layer_path], rel=1e-12)
            self.oracle.scaling[name][layer_path] = layer.scaling
        self.oracle.put(own)

    @rule(merge=st.booleans())
    def unload_a_copy(self, merge):
        state, oracle = snapshot(self.model), copy.copy(self.oracle)
        bound = oracle.bound()
        plain = (lora.merge_and_unload if merge else lora.unload)(copy.deepcopy(self.model))
        assert [type(m) for m in plain.modules()] == [type(m) for m in SmallModel().modules()]
        oracle.base = dict(oracle.base)
        wanted = oracle.output()
        oracle.switch(None)
        if not merge:
            assert_same_bits({n: t for n, t in plain.state_dict().items() if not n.startswith("second.")}, oracle.base)
            wanted = oracle.output()
        torch.testing.assert_close(plain(INDEX).double(), wanted, rtol=bound, atol=bound)
        assert_unchanged(self.model, state)

    # What always holds

    @invariant()
    def laws(self):
        if hasattr(self, "oracle"):
            assert lora.list_adapters(self.model) == sorted(self.oracle.own)
            assert lora.active_adapter(self.model) == self.oracle.active
            self.check()

    def check(self):
        note(f"active: {self.oracle.active} of {sorted(self.oracle.own)}")
        state = {name: tensor for name, tensor in self.model.state_dict().items() if not name.startswith("second.")}
        assert_same_bits(state, self.oracle.state())
        bound, dense, wanted = self.oracle.bound(), self.oracle.dense(), self.oracle.output()
        for context in (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.no_grad):
            with context():
                out = self.model(INDEX)
            torch.testing.assert_close(out.detach().double(), wanted, rtol=bound, atol=bound)
        for path, layer in self.layers.items():
            weight = dense[f"{path}.weight"] if layer.merged else self.oracle.base[f"{path}.weight"].double()
            torch.testing.assert_close(layer.weight.double(), weight, rtol=bound, atol=bound)


TestAdapters = Adapters.TestCase
TestAdapters.settings = examples(40, stateful_step_count=15)
