"""Properties of the layers: what every layer case computes, in every state, and what it refuses.

How: the table in reference.py times one test per property, the oracle being the plain torch layer in float64 with
W + scaling * B A written out. Random sequences of operations are in test_properties.py. Run alone:
`pytest tests/test_layers.py`; with the compiled ones: `pytest tests/test_layers.py -m "slow or not slow"`.
"""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from reference import (
    ALPHA,
    CASES,
    CONV,
    EMBEDDING,
    IO,
    KINDS,
    LINEAR,
    MERGED,
    NOTHING_ENABLED,
    QV,
    Case,
    R,
    assert_close,
    assert_laws,
    assert_same_bits,
    dense_forward,
    dense_weight,
    expected,
    randomize,
    snapshot,
    tensors,
)
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import loralib as lora

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_kind = pytest.mark.parametrize("case", KINDS, ids=str)
each_mode = pytest.mark.parametrize("mode", ["train", "eval"])
STATES = ["train", "eval", "merged in training", "unmerged in eval"]
each_state = pytest.mark.parametrize("state", STATES)
# A merged layer gives its adapter no gradient, as in 0.1.2.
UNMERGED = ["train", "unmerged in eval"]
each_unmerged = pytest.mark.parametrize("state", UNMERGED)


def put(layer, state):
    layer.train("train" in state)
    if state == "merged in training":
        lora.merge_lora_weights(layer)
    elif state == "unmerged in eval":
        lora.unmerge_lora_weights(layer)
    assert layer.merged == (state in ("eval", "merged in training"))
    return layer


LORA = ("lora_A", "lora_B")


# Forward.


@pytest.mark.parametrize("case", CASES + NOTHING_ENABLED, ids=str)
def test_fresh_layer_equals_its_base(case):
    """A new layer computes what the plain torch layer with its weights does, in training and evaluation."""
    layer, x = case.fresh(torch.float64), case.inputs(torch.float64)
    state = {name: value for name, value in tensors(layer).items() if "lora_" not in name}
    if case.base.get("max_norm") is None:
        plain = case.plain()
        plain.load_state_dict(state if not case.transposed else {**state, "weight": state["weight"].T})
        assert_close(layer(x), plain(x))
    wanted = dense_forward(case, state, 0.0, x)
    assert_close(layer(x), wanted)
    assert_close(layer.eval()(x), wanted)
    assert layer.delta_weight().abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_case
def test_forward_equals_the_dense_formula(case, dtype):
    """In all four states, with and without gradients, forward is W + scaling * B A; the state dict never changes."""
    layer, x = case.layer(dtype), case.inputs(dtype)
    wanted, before = expected(case, layer, x), snapshot(layer)
    for state in STATES:
        put(layer, state)
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                out = layer(x)
            assert out.dtype == dtype
            assert_close(out, wanted)
    if case.base.get("max_norm") is None:
        assert_same_bits(layer.state_dict(), before)


@each_case
def test_weight_reads_as_the_merged_value(case):
    """`weight` is W + scaling * B A while merged and W itself otherwise; `delta_weight()` is the difference."""
    layer = case.layer(torch.float64)
    state = tensors(layer)
    merged = dense_weight(case, state, ALPHA / R)
    assert torch.equal(layer.weight, state["weight"]) and isinstance(layer.weight, nn.Parameter)
    assert_close(layer.eval().weight, merged)
    assert_close(layer.delta_weight(), merged - dense_weight(case, {"weight": state["weight"]}, 0))
    with lora.disable_adapters(layer):
        assert torch.equal(layer.weight, state["weight"])
    assert torch.equal(layer.train().weight, state["weight"])


@pytest.mark.parametrize("case", [case for case in KINDS if not case.is_embedding], ids=str)
def test_dropout_concerns_the_update_in_training_only(case):
    """The low-rank branch sees what its dropout leaves, the base sees x; evaluation and merging drop nothing."""
    layer, x = case.layer(torch.float64, lora_dropout=0.4), case.inputs(torch.float64)
    state = tensors(layer)
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    dropped = layer.lora_dropout(x)
    without = {name: value for name, value in state.items() if "lora_" not in name}
    update = dense_forward(case, state, layer.scaling, dropped) - dense_forward(case, without, 0, dropped)
    assert_close(out, dense_forward(case, without, 0, x) + update)
    for quiet in STATES[1:]:
        assert_close(put(layer, quiet)(x), expected(case, layer, x))


@each_kind
def test_forward_leaves_its_input_alone(case):
    """No forward writes to its input or returns a view of the weight."""
    layer, x = case.layer(), case.inputs()
    before = x.clone()
    for state in STATES:
        put(layer, state)(x)
    assert torch.equal(x, before)


def test_embedding_with_max_norm_bounds_the_base_rows_as_torch_does():
    """A looked-up row of the stored table is bounded in place in training, exactly as nn.Embedding does it."""
    case = EMBEDDING[2]
    layer, plain, index = case.layer(), case.plain(torch.float32), torch.tensor([1, 4])
    plain.load_state_dict({"weight": layer.state_dict()["weight"]})
    layer(index), plain(index)
    assert torch.equal(layer.weight, plain.weight)


def test_embedding_from_pretrained_keeps_the_table():
    """`from_pretrained` gives a layer on that table."""
    table = torch.randn(9, 4)
    layer = lora.Embedding.from_pretrained(table.clone())
    assert torch.equal(layer.weight, table) and torch.equal(layer(torch.arange(9)), table)


# Gradients.


@each_kind
@pytest.mark.parametrize("state", ["eval", "merged in training"])
def test_a_merged_layer_gives_its_adapter_no_gradient(case, state):
    """As in 0.1.2: a frozen model in eval is free of autograd, so that `model(x).numpy()` works."""
    layer, x = case.fresh(), case.inputs()
    lora.mark_only_lora_as_trainable(layer)
    out = put(layer, state)(x)
    assert not out.requires_grad and out.numpy().shape == tuple(out.shape)


@each_unmerged
@each_case
def test_gradients_equal_those_of_the_dense_formula(case, state):
    """A, B, bias and input get autograd's gradients of the dense formula, in training and evaluation; W gets none."""
    layer, x = put(case.layer(torch.float64), state), case.inputs(torch.float64)
    if not case.is_embedding:
        x.requires_grad_()
    out = layer(x)
    probe = torch.randn_like(out)
    out.backward(probe)

    # In B, torch's scale_grad_by_freq has no part: it scales the gradient of looked-up rows, which are A's.
    def gradient(case):
        state = {name: value.requires_grad_(name != "weight") for name, value in tensors(layer).items()}
        given_x = x.detach().clone().requires_grad_() if x.is_floating_point() else x
        dense_forward(case, state, layer.scaling, given_x).backward(probe)
        return {name: value.grad for name, value in state.items()} | {"input": given_x.grad}

    wanted = gradient(case)
    if case.base.get("scale_grad_by_freq"):
        wanted["lora_B"] = gradient(EMBEDDING[0])["lora_B"]
    got = {name: parameter.grad for name, parameter in layer.named_parameters()} | {"input": x.grad}
    assert {name for name, grad in got.items() if grad is not None} == {
        name for name, grad in wanted.items() if grad is not None
    }
    for name, grad in got.items():
        if grad is not None:
            torch.testing.assert_close(grad, wanted[name], rtol=1e-10, atol=1e-10, msg=f"{name} of {case}")


@pytest.mark.parametrize("case", [EMBEDDING[0], *[case for case in KINDS if not case.is_embedding]], ids=str)
def test_gradcheck(case):
    """Analytic gradients of A and B equal finite differences, in training and evaluation."""
    layer, x = case.layer(torch.float64), case.inputs(torch.float64)

    def output(A, B):
        return functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    given_tensors = [layer.lora_A.detach().requires_grad_(), layer.lora_B.detach().requires_grad_()]
    assert torch.autograd.gradcheck(output, given_tensors)
    layer.eval()
    assert torch.autograd.gradcheck(output, given_tensors)


@each_kind
def test_only_the_adapter_requires_gradients(case):
    """The constructor freezes the weight alone, as upstream does; r=0 freezes nothing."""
    frozen = {name for name, parameter in case.fresh().named_parameters() if not parameter.requires_grad}
    assert frozen == {"weight"}
    assert all(parameter.requires_grad for parameter in case.fresh(r=0).parameters())


@each_unmerged
@each_kind
def test_a_step_counts_at_once(case, state):
    """An optimizer step on the adapter changes the next output."""
    layer, x = put(case.layer(), state), case.inputs()
    base = layer.state_dict()["weight"].clone()
    with torch.no_grad():
        layer(x)
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=0.1)
    for _ in range(3):
        before = layer.lora_B.detach().clone()
        optimizer.zero_grad()
        layer(x).pow(2).sum().backward()
        optimizer.step()
        assert not torch.equal(layer.lora_B, before)
        assert_laws(case, layer, base, x)


@pytest.mark.parametrize("reentrant", [True, False])
@each_unmerged
@each_kind
def test_gradient_checkpointing(case, state, reentrant):
    """Both kinds of torch.utils.checkpoint give the gradients of a plain backward."""
    layer = put(case.layer(torch.float64), state)
    x = case.inputs(torch.float64)
    plain = torch.autograd.grad(layer(x).sum(), [layer.lora_A, layer.lora_B])
    if case.is_embedding and reentrant:  # needs an input with a gradient
        weight = torch.ones((), dtype=torch.float64, requires_grad=True)
        out = checkpoint(lambda one: layer(x) * one, weight, use_reentrant=True)
    else:
        out = checkpoint(layer, x if case.is_embedding else x.requires_grad_(), use_reentrant=reentrant)
    out.sum().backward()
    assert torch.equal(layer.lora_A.grad, plain[0]) and torch.equal(layer.lora_B.grad, plain[1])


@pytest.mark.parametrize("case", [LINEAR[0]], ids=str)
def test_base_written_through_data_while_merged(case):
    """A base weight overwritten through `.data`, which torch does not count, is seen by the next eval()."""
    layer, x = case.layer().eval(), case.inputs()
    with torch.no_grad():
        layer(x)
        layer._aside.base.data.mul_(0.5)  # as whoever shares it may do
        layer.eval()
        assert_close(layer(x), expected(case, layer, x))


class Same(nn.Module):
    def forward(self, value):
        return value * 1


@each_state
@each_kind
def test_adapter_as_a_computed_attribute(case, state):
    """An adapter that torch.nn.utils.parametrize computes is used as a Parameter would be."""
    layer, x = case.layer(), case.inputs()
    wanted = expected(case, layer, x)
    for name in ("lora_A", "lora_B"):
        register_parametrization(layer, name, Same())
    layer.train("train" in state)  # it stays unmerged: nothing would tell a merged weight that it is stale
    assert not lora.merge_lora_weights(layer).merged
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert_close(layer(x), wanted)


@each_mode
@each_kind
def test_replica_of_data_parallel(case, mode):
    """nn.DataParallel's replicas hold plain tensors in place of Parameters; they compute with the adapter too."""
    layer, x = case.layer().train(mode == "train"), case.inputs()
    with torch.no_grad():
        wanted = expected(case, layer, x)
        layer(x)
        replica = layer._replicate_for_data_parallel()
        for name, parameter in layer._parameters.items():  # as torch.nn.parallel.replicate does
            setattr(replica, name, None if parameter is None else parameter * 1)
        assert_close(replica(x), wanted)


@each_kind
def test_merged_weight_made_in_inference_mode_is_usable_outside(case):
    """A weight first merged in inference mode works under autograd and no_grad afterwards."""
    layer, x = case.layer().eval(), case.inputs()
    with torch.inference_mode():
        layer(x)
    with torch.no_grad():
        assert_close(layer(x), expected(case, layer, x))
    layer.lora_A.requires_grad_(False), layer.lora_B.requires_grad_(False)
    if not case.is_embedding:
        given_x = case.inputs().requires_grad_()
        layer(given_x).sum().backward()
        assert given_x.grad is not None


@each_kind
def test_layer_made_in_inference_mode(case):
    """A layer constructed and merged inside inference mode computes as any other."""
    with torch.inference_mode():
        layer, x = case.layer(), case.inputs()
        for state in STATES:
            assert_close(put(layer, state)(x), expected(case, layer, x))


@each_kind
def test_weights_shared_by_two_layers(case):
    """Of two layers on one weight Parameter, merging one leaves the other's output and the Parameter alone."""
    one, two, x = case.layer(), case.layer(), case.inputs()
    two.weight = one.weight
    wanted = expected(case, one, x), expected(case, two, x)
    base = one.weight.detach().clone()
    one.eval()
    with torch.no_grad():
        assert_close(one(x), wanted[0])
        assert_close(two(x), wanted[1])
    assert torch.equal(two.weight, base) and one.train().weight is two.weight


def test_merge_weights_false_never_merges():
    """With `merge_weights=False` eval() leaves the layer unmerged, and the output is the same."""
    for case in KINDS:
        layer, x = case.layer(merge_weights=False).eval(), case.inputs()
        assert not layer.merged and layer.weight is layer._parameters["weight"]
        assert_close(layer(x), expected(case, layer, x))


@each_kind
def test_rank_zero_is_the_plain_layer(case):
    """With r=0 there are no LoRA tensors, and every state computes the plain layer."""
    layer, x = case.fresh(r=0), case.inputs()
    assert not layer.has_adapter and set(layer.state_dict()) <= {"weight", "bias"}
    for mode in (False, True):
        assert_close(layer.train(mode)(x), expected(case, layer, x))
    lora.unmerge_lora_weights(lora.merge_lora_weights(layer))


# Mixed precision.


@each_state
@each_kind
def test_autocast(case, state):
    """Under bf16 autocast every state is right to bf16, the gradients are float32, and nothing stored changes."""
    layer, x = case.layer(), case.inputs()
    wanted, before = expected(case, layer, x), snapshot(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        put(layer, state)
        out = layer(x)
        with torch.no_grad():
            assert_close(layer(x), wanted, torch.bfloat16)
    assert_close(out, wanted, torch.bfloat16)
    if state in UNMERGED:
        out.float().sum().backward()
        assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    with torch.no_grad():
        assert_close(layer(x), wanted)
    assert_same_bits(layer.state_dict(), before)


@pytest.mark.parametrize("case", [LINEAR[0], LINEAR[2], MERGED[1]], ids=str)
def test_autocast_rounds_the_input_once(case):
    """For the base and for A, and to the dtype that was asked for."""
    layer, x = case.layer(), case.inputs()
    rounded = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function is torch.ops.aten._to_copy.default and arguments[0].shape[-1] == x.shape[-1]:
                rounded.append(arguments[0].numel())
            return function(*arguments, **(keywords or {}))

    with torch.autocast("cpu", dtype=torch.float16), Seen():
        out = layer(x)
    assert out.dtype == torch.float16 and rounded.count(x.numel()) == 1
    assert_close(out, expected(case, layer, x))


@each_state
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_case
def test_float32_adapter_on_a_half_precision_base(case, dtype, state):
    """Forward and backward work in every state, and the output has the base's dtype."""
    layer, x = case.layer(dtype), case.inputs(dtype)
    layer.lora_A = nn.Parameter(layer.lora_A.detach().float())
    layer.lora_B = nn.Parameter(layer.lora_B.detach().float())
    put(layer, state)
    out = layer(x)
    assert out.dtype == dtype
    assert_close(out, expected(case, layer, x))
    if state in UNMERGED:
        out.float().sum().backward()
        assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


# torch.func and torch.compile.


@each_state
@each_kind
def test_functional_call_uses_what_it_is_given(case, state):
    """functional_call computes with the given adapter and base, and leaves the layer as it was."""
    layer, other, x = put(case.layer(), state), case.layer(), case.inputs()
    wanted, given_tensors = expected(case, other, x), {k: v.detach() for k, v in other.named_parameters()}
    own, before = expected(case, layer, x), snapshot(layer)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            if state in UNMERGED:
                assert_close(functional_call(layer, given_tensors, (x,)), wanted)
            else:  # is that weight another base, or merged as well?
                with pytest.raises(RuntimeError, match="merged, and was given another weight.*unmerge_lora_weights"):
                    functional_call(layer, given_tensors, (x,))
            for names in (["lora_A", "lora_B"], ["weight", "lora_A", "lora_B"]):
                mixed = {**{k: v.detach() for k, v in layer.named_parameters()}, **{k: given_tensors[k] for k in LORA}}
                mixed = {name: mixed[name] for name in names}
                given_adapter = case.layer()
                given_adapter.load_state_dict({**layer.state_dict(), **{k: given_tensors[k] for k in LORA}})
                assert_close(functional_call(layer, mixed, (x,)), expected(case, given_adapter, x))
            assert_close(layer(x), own)
    assert_same_bits(layer.state_dict(), before)


@each_unmerged
@each_kind
def test_vmap_over_stacked_layers(case, state):
    """stack_module_state and vmap give each layer's own output."""
    layers, x = [put(case.layer(), state) for _ in range(3)], case.inputs()
    parameters, buffers = stack_module_state(layers)
    template = copy.deepcopy(layers[0])
    out = torch.vmap(lambda p, b: functional_call(template, (p, b), (x,)))(parameters, buffers)
    for got, layer in zip(out, layers, strict=True):
        assert_close(got, expected(case, layer, x))


@each_unmerged
@each_kind
def test_per_sample_gradients(case, state):
    """vmap(grad) over samples gives the gradient of each sample alone."""
    layer = put(case.layer(torch.float64), state)
    x = case.inputs(torch.float64)
    x = x if x.dim() == len(case.shape) else x[None]
    adapter = {name: p.detach() for name, p in layer.named_parameters() if "lora_" in name}

    def loss(adapter, sample):
        return functional_call(layer, adapter, (sample[None],)).pow(2).sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(adapter, x)
    for index, sample in enumerate(x):
        wanted = torch.autograd.grad(layer(sample[None]).pow(2).sum(), [layer.lora_A, layer.lora_B])
        torch.testing.assert_close(got["lora_A"][index], wanted[0])
        torch.testing.assert_close(got["lora_B"][index], wanted[1])


def test_dropout_is_that_of_torch():
    """`nn.Dropout`, with its masks; for p = 0 a plain function, which can be replaced."""
    layer, x = lora.Linear(5, 7, r=2, lora_dropout=0.4), torch.randn(3, 5)
    assert type(layer.lora_dropout) is nn.Dropout
    randomize(layer)
    torch.manual_seed(3)
    out = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.4)
    assert_close(out, layer(x * 0) + x @ layer.weight.T + layer.scaling * dropped @ layer.lora_A.T @ layer.lora_B.T)
    plain = lora.Linear(5, 7, r=2)
    assert not list(plain.children()) and plain.lora_dropout(x) is x
    plain.lora_dropout = nn.Dropout(1.0)
    assert torch.equal(randomize(plain)(x), F.linear(x, plain.weight, plain.bias))
    plain.lora_dropout = None
    plain = lora.Linear(5, 7, r=2)
    plain.lora_dropout = lambda x: 2 * x
    randomize(plain)
    assert_close(
        plain(x) - F.linear(x, plain.weight, plain.bias), 2 * plain.scaling * x @ plain.lora_A.T @ plain.lora_B.T
    )


@each_state
@each_kind
def test_compiled_as_one_graph(case, state):
    """torch.compile(fullgraph=True) takes forward and backward in every state, and follows changes of the adapter."""
    layer, x = put(case.layer(), state), case.inputs()
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    out = compiled(x)
    assert_close(out, expected(case, layer, x))
    out.sum().backward()
    twin = lora.unmerge_lora_weights(copy.deepcopy(layer))
    reference = torch.autograd.grad(twin(x).sum(), [twin.lora_A, twin.lora_B])
    assert_close(layer.lora_A.grad, reference[0]), assert_close(layer.lora_B.grad, reference[1])
    randomize(layer)
    layer.scaling = 0.5
    with torch.no_grad():
        assert_close(compiled(x), expected(case, layer, x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("case", [LINEAR[0], MERGED[0], EMBEDDING[0], CONV[6]], ids=str)
def test_compiled_by_inductor(case):
    """Inductor's kernels, which once dropped the scaling, compute the same output and gradients."""
    layer, x = case.layer(), case.inputs()
    torch.compiler.reset()
    out = torch.compile(layer, fullgraph=True)(x)
    assert_close(out, expected(case, layer, x))
    out.sum().backward()
    reference = torch.autograd.grad(layer(x).sum(), [layer.lora_A, layer.lora_B])
    assert_close(layer.lora_A.grad, reference[0]), assert_close(layer.lora_B.grad, reference[1])


# Construction, copies, repr.


@each_case
def test_meta_device(case):
    """A layer made on the meta device has the same keys and shapes, also of its output, and works once loaded."""
    source = case.layer()
    with torch.device("meta"):
        layer = case.fresh()
    assert all(value.is_meta for value in layer.state_dict().values())
    assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in source.state_dict().items()}
    x = case.inputs()
    assert layer(x.to("meta")).shape == source(x).shape
    layer.load_state_dict(source.state_dict(), assign=True)
    for state in STATES:
        assert_close(put(layer, state)(x), expected(case, source, x))


@each_state
@each_case
def test_copies_compute_the_same_and_share_nothing(case, state):
    """deepcopy, pickle and torch.save give equal, independent layers in the same state."""
    layer, x = put(case.layer(), state), case.inputs()
    with torch.no_grad():
        layer(x)
    wanted, file = expected(case, layer, x), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert (other.merged, other.training, repr(other)) == (layer.merged, layer.training, repr(layer))
        assert_same_bits(other.state_dict(), layer.state_dict())
        with torch.no_grad():
            assert_close(other(x), wanted)
            randomize(other)
            assert_close(layer(x), wanted)
            assert_close(other(x), expected(case, other, x))


def test_a_pickled_merged_layer_does_not_carry_the_merged_weight():
    """The file of a merged layer is no larger than that of an unmerged one."""
    layer = lora.Linear(64, 64, r=1)
    unmerged = len(pickle.dumps(layer))
    layer.eval()
    assert layer.weight is not None and len(pickle.dumps(layer)) < unmerged + 1000


REPR = {
    "in_features=4, out_features=6, bias=True, r=2, lora_alpha=4": lambda: lora.Linear(4, 6, 2, 4),
    "fan_in_fan_out=True": lambda: lora.Linear(4, 6, r=2, fan_in_fan_out=True),
    "r=2, lora_alpha=4, enable_lora=[True, False, True]": lambda: lora.MergedLinear(4, 6, 2, 4, enable_lora=QV),
    "9, 4, r=2, lora_alpha=4": lambda: lora.Embedding(9, 4, 2, 4),
    "4, 6, kernel_size=(3, 3), stride=(1, 1), r=2, lora_alpha=4": lambda: lora.Conv2d(4, 6, 3, 2, 4),
    "(lora_dropout): Dropout(p=0.1, inplace=False)": lambda: lora.Conv1d(4, 6, 3, 2, 4, 0.1),
}


@pytest.mark.parametrize("text", REPR)
def test_repr(text):
    """`repr` shows rank, alpha, groups, dropout, and whether the layer is merged."""
    layer = REPR[text]()
    assert text in repr(layer) and "merged" not in repr(layer).replace("MergedLinear", "")
    assert "merged" in repr(layer.eval()).replace("MergedLinear", "")


@each_kind
def test_attributes_that_upstream_code_reads(case):
    """Names, order and classes that users of 0.1.2 rely on."""
    layer = case.fresh()
    assert (layer.r, layer.lora_alpha, layer.scaling, layer.merged, layer.merge_weights) == (R, 5, 5 / R, False, True)
    assert isinstance(layer, (type(case.plain()), lora.LoRALayer)) and isinstance(layer, type(case.plain()))
    assert set(dict(layer.named_parameters())) - {"bias"} == {"weight", "lora_A", "lora_B"}


def test_argument_order_is_upstreams():
    """Positional arguments mean what they mean in 0.1.2."""
    layer = lora.Linear(4, 6, 2, 3, 0.5, True, False)
    assert (layer.r, layer.lora_alpha, layer.lora_dropout.p) == (2, 3, 0.5)
    assert (layer.fan_in_fan_out, layer.merge_weights) == (True, False)
    layer = lora.MergedLinear(4, 6, 2, 3, 0.5, QV, True, False)
    assert (layer.enable_lora, layer.fan_in_fan_out, layer.merge_weights) == (QV, True, False)
    assert not lora.Embedding(9, 4, 2, 3, False).merge_weights
    layer = lora.Conv2d(4, 6, 3, 2, 3, 0.5, False)
    assert (layer.r, layer.lora_alpha, layer.lora_dropout.p, layer.merge_weights) == (2, 3, 0.5, False)


CONSTRUCTORS = {"Linear": (4, 6), "MergedLinear": (4, 6), "Embedding": (9, 4), "Conv1d": (4, 6, 3), "Conv2d": (4, 6, 3)}
REFUSED = [
    ({"r": -1}, ValueError, "r=-1: the rank must be 0 .* or a positive integer"),
    ({"r": 1.5}, TypeError, "r=1.5: the rank must be an integer, not float"),
    ({"r": True}, TypeError, "r=True: the rank must be an integer, not bool"),
    ({"r": "2"}, TypeError, "r='2': the rank must be an integer, not str"),
    ({"r": None}, TypeError, "r=None: the rank must be an integer"),
    ({"r": 2, "lora_alpha": float("nan")}, ValueError, "lora_alpha=nan: must be finite"),
    ({"r": 2, "lora_alpha": float("inf")}, ValueError, "lora_alpha=inf: must be finite"),
    ({"r": 2, "lora_alpha": "16"}, TypeError, "lora_alpha='16': must be a number, not str"),
    ({"r": 2, "lora_alpha": True}, TypeError, "lora_alpha=True: must be a number, not bool"),
]
REFUSED_DROPOUT = [
    ({"lora_dropout": 1.5}, ValueError, "lora_dropout=1.5: must be a probability between 0 and 1"),
    ({"lora_dropout": -0.1}, ValueError, "lora_dropout=-0.1: must be a probability"),
    ({"lora_dropout": float("nan")}, ValueError, "lora_dropout=nan: must be a probability"),
    ({"lora_dropout": "0.1"}, TypeError, "lora_dropout='0.1': must be a number, not str"),
    ({"lora_dropout": None}, TypeError, "lora_dropout=None: must be a number"),
]
REFUSED_ENABLE = [
    ({"enable_lora": [1, 0, 1]}, TypeError, r"enable_lora=\[1, 0, 1\].*True or False.*\[True, False, True\]"),
    ({"enable_lora": "101"}, TypeError, "enable_lora='101': must be a list of booleans"),
    ({"enable_lora": True}, TypeError, "enable_lora=True: must be a list of booleans"),
    ({"enable_lora": None}, TypeError, "enable_lora=None: must be a list of booleans"),
    ({"enable_lora": []}, ValueError, r"enable_lora=\[\]: its length must divide out_features=6"),
    ({"enable_lora": [True] * 4}, ValueError, "its length must divide out_features=6, one entry per group"),
    (
        {"enable_lora": [True], "group_sizes": [2, 4]},
        ValueError,
        r"group_sizes=\[2, 4\]: must be one positive size for",
    ),
    ({"enable_lora": [True] * 2, "group_sizes": [2, 3]}, ValueError, "enable_lora, 6 .out_features. in all"),
    ({"enable_lora": [True] * 2, "group_sizes": [7, -1]}, ValueError, "must be one positive size"),
    ({"enable_lora": [True] * 2, "group_sizes": [3.0, 3.0]}, TypeError, "every entry must be an integer"),
    ({"enable_lora": [True] * 2, "interleave": 2}, ValueError, r"interleave=2: must divide every size .*\[3, 3\]"),
    ({"enable_lora": [True] * 2, "interleave": 0}, ValueError, "interleave=0: must be at least 1"),
    ({"enable_lora": [True] * 2, "interleave": 1.5}, TypeError, "interleave=1.5: must be an integer, not float"),
]


@pytest.mark.parametrize(
    "kind, arguments, error, message",
    [(kind, *row) for kind in CONSTRUCTORS for row in REFUSED]
    + [(kind, *row) for kind in CONSTRUCTORS if kind != "Embedding" for row in REFUSED_DROPOUT]
    + [("MergedLinear", *row) for row in REFUSED_ENABLE],
)
def test_refused_arguments(kind, arguments, error, message):
    """A wrong argument raises, saying what came and what is allowed, before any random number is drawn."""
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        getattr(lora, kind)(*CONSTRUCTORS[kind], **arguments)
    assert torch.equal(torch.get_rng_state(), before)


def test_arguments_are_copied():
    """A list given as `enable_lora` can be changed afterwards; tuples are taken too."""
    enable = [True, False, True]
    layer = lora.MergedLinear(4, 6, r=2, enable_lora=enable)
    enable[1] = True
    assert layer.enable_lora == QV and lora.MergedLinear(4, 6, r=2, enable_lora=(True, False, True)).enable_lora == QV


def test_numpy_integers_are_ranks():
    """A rank from numpy, as configurations often hold, is an integer."""
    numpy = pytest.importorskip("numpy")
    assert lora.Linear(4, 6, r=numpy.int64(2), lora_alpha=numpy.float32(4)).scaling == 2


def test_zero_alpha_is_no_update():
    """`lora_alpha=0` gives the base."""
    case = Case("Linear", (5, 7), (4, 5), lora={"lora_alpha": 0, **IO})
    layer, x = case.layer(), case.inputs()
    assert torch.equal(layer(x), F.linear(x, layer.weight.T, layer.bias))


@pytest.mark.parametrize(
    ("conv", "channels", "kernel", "options"),
    [
        ("Conv1d", 5, 3, {"padding": 1}),
        ("Conv2d", 1, 3, {}),
        ("Conv2d", 4, 3, {"padding": 1, "stride": 2}),
        ("Conv2d", 6, 3, {"padding": 1, "padding_mode": "reflect"}),
        ("Conv2d", 5, (2, 3), {"dilation": 2}),
        ("Conv2d", 5, (3, 1), {"bias": False}),
        ("Conv2d", 5, (1, 3), {}),
        ("Conv2d", 16, 7, {"padding": "same"}),
        ("Conv3d", 5, (3, 2, 1), {}),
    ],
)
def test_the_narrow_branch_of_a_convolution_is_the_sum(monkeypatch, conv, channels, kernel, options):
    """It is taken where it has less to compute; here it is asked for, also where channels do not divide by rows."""
    monkeypatch.setattr(lora.layers.Kernel, "_narrow_is_cheaper", lambda self, x: True)
    torch.manual_seed(0)
    dimensions = int(conv[4])
    plain = getattr(nn, conv)(channels, 7, kernel, **options)
    kernels = kernel if isinstance(kernel, tuple) else (kernel,) * dimensions
    if len(set(kernels)) == 1:
        layer = getattr(lora, conv)(channels, 7, kernel, r=3, lora_alpha=5, **options)
    else:
        layer = nn.Sequential(copy.deepcopy(plain))
        lora.inject_lora(layer, r=3, lora_alpha=5, target_modules=["0"])
        layer = layer[0]
    layer, plain = layer.double(), plain.double()
    plain.load_state_dict({key: value for key, value in layer.state_dict().items() if "lora_" not in key})
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, channels, *[9, 10, 8][:dimensions], dtype=torch.float64, requires_grad=True)
    y = layer(x)
    grads = torch.autograd.grad(y.square().sum(), (x, layer.lora_A, layer.lora_B))
    delta = (layer.lora_B @ layer.lora_A).view(plain.weight.shape) * 5 / 3
    wanted = torch.func.functional_call(plain, {"weight": plain.weight.detach() + delta}, (x,))
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(layer(x[0]), wanted[0])  # without a batch
    torch.testing.assert_close(grads, torch.autograd.grad(wanted.square().sum(), (x, layer.lora_A, layer.lora_B)))


def test_wide_convolutions_of_few_places_take_the_narrow_branch():
    wide, slim = lora.Conv2d(512, 512, 7, r=8, padding=3, device="meta"), lora.Conv2d(32, 32, 7, r=8, padding=3)
    assert wide._narrow_is_cheaper(torch.empty(4, 512, 8, 8, device="meta"))
    assert not slim._narrow_is_cheaper(torch.empty(4, 32, 32, 32))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("mode", ["train", "eval", "merged"])
@pytest.mark.parametrize("make", [lambda: lora.Linear(6, 4, r=2), lambda: lora.Conv2d(6, 4, 3, r=2, padding=1)])
def test_a_scaling_that_is_a_tensor(make, mode, shape):
    """In every state; it trains where the adapter does."""
    layer = randomize(make()).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64) if layer.weight.dim() == 4 else torch.randn(2, 6).double()
    update = layer.delta_weight() / layer.scaling
    layer.scaling = torch.tensor(0.7, dtype=torch.float64).reshape(shape).requires_grad_(mode == "train")
    weight = layer.weight.detach() + 0.7 * update
    wanted = F.conv2d(x, weight, layer.bias, padding=1) if x.dim() == 4 else F.linear(x, weight, layer.bias)
    lora.merge_lora_weights(layer) if mode == "merged" else layer.train(mode == "train")
    out = layer(x)
    assert_close(out, wanted)
    if mode == "train":
        out.square().sum().backward()
        assert layer.scaling.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(0, 6), (0, 5, 6), (2, 0, 6)])
def test_a_batch_without_rows(shape):
    layer = lora.Linear(6, 9, r=2)
    x = torch.zeros(shape, requires_grad=True)
    out = layer(x)
    assert out.shape == (*shape[:-1], 9)
    out.sum().backward()
    assert x.grad.shape == shape


def test_vmap_over_B_alone():
    layer = randomize(lora.Linear(6, 9, r=2))
    x, Bs = torch.randn(4, 6), torch.randn(3, 9, 2)
    with torch.no_grad():
        got = torch.vmap(lambda B: functional_call(layer, {"lora_B": B}, (x,)))(Bs)
        for B, each in zip(Bs, got, strict=True):
            torch.testing.assert_close(each, functional_call(layer, {"lora_B": B}, (x,)))
