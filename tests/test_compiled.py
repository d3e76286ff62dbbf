"""Adapted models through torch's compilers: the compiled model computes what the model does, in every state.

`torch.compile` follows the model when it is trained, merged or switched; what is exported (torch.export, ONNX, a trace,
AOTInductor) is the model as it was then. Run alone: `pytest tests/test_compiled.py -m "slow or not slow"`.
"""

import warnings

import pytest
import torch
from small_model import INDEX, TARGETS, small_model
from torch import nn

import loralib as lora


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 8, 4) / 3), nn.Parameter(torch.randn(2, 4, 8) / 3)

    def forward(self, x):
        return torch.einsum("...eo,eio->...i", torch.einsum("...i,eoi->...eo", x, self.up).tanh(), self.down)


class Block(nn.Module):
    """Indices (batch, 6) -> (batch, 6, 9): attention, fused experts, and an output layer tied to the table."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.experts = Experts()
        self.output = nn.Linear(4, 9)
        self.output.weight = self.embed.weight

    def forward(self, index):
        x = self.embed(index)
        return self.output(self.experts(x + self.attention(x, x, x, need_weights=False)[0]))


def layers():
    model = small_model()
    lora.inject_lora(model, r=2, target_modules=TARGETS, enable_lora=[True, False, True], modules_to_save=["head"])
    return model


def parameters():
    torch.manual_seed(5)
    model = Block()
    computed = ["in_proj_weight", "experts.up", "experts.down"]
    lora.inject_lora(model, r=2, target_parameters=computed, trainable_token_indices={"embed": [1, 7]})
    return model


def half():
    model = small_model(torch.bfloat16)
    lora.inject_lora(model, r=2, target_modules=["first", "c_attn"], modules_to_save=["head"], bias="all")
    return model


MODELS = {"layers": layers, "parameters": parameters, "half base, float32 head": half}
STATES = {
    "training": lambda model: model.train(),
    "eval": lambda model: model.eval(),
    "merged": lambda model: lora.merge_lora_weights(model.eval()),
    "another adapter": lambda model: lora.set_adapter(model.eval(), "other"),
}


def built(kind):
    """A model with a trained adapter, and beside it another one, of rank 1 on one layer."""
    model = MODELS[kind]()
    other = {"target_modules": ["first"]} if kind != "parameters" else {"target_parameters": ["experts.up"]}
    lora.inject_lora(model, r=1, adapter_name="other", **other)
    for name in ("other", "default"):
        lora.set_adapter(model, name)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.5)
    return model.eval()


def output(model, index=INDEX):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        return model(index).float()


def same(ours, theirs, kind, rounding=3e-2):
    tolerance = rounding if kind.startswith("half") else 1e-4
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@torch._dynamo.config.patch(recompile_limit=64)  # a graph for each state and each size
def follows(kind, **options):
    torch.compiler.reset()
    model = built(kind)
    compiled = torch.compile(model, **options)
    seen = []
    for state in (*STATES.values(), STATES["eval"]):
        lora.unmerge_lora_weights(model)
        lora.set_adapter(model, "default")
        state(model)
        for index in (INDEX, INDEX[:1], INDEX.repeat(2, 1)):
            same(output(compiled, index), output(model, index), kind)
        seen.append(output(compiled))
    assert (seen[0] - seen[3]).abs().max() > 0.05, "the adapters do not differ"
    model.train()
    grads = []
    for each in (compiled, model):
        model.zero_grad()
        each(INDEX).float().pow(2).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() and all(g is not None for g in grads[0].values())
    for name, grad in grads[0].items():
        scale = max(1.0, grads[1][name].abs().max().item())
        same(grad / scale, grads[1][name] / scale, kind, rounding=0.15)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
def test_compiled_as_one_graph(kind):
    follows(kind, backend="aot_eager", fullgraph=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"mode": "reduce-overhead"}], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_compiled_by_inductor(kind, options):
    follows(kind, **options)


def by_export(model, folder):
    return torch.export.export(model, (INDEX,)).module()


def by_trace(model, folder):
    return torch.jit.trace(model, INDEX, check_trace=not hasattr(model, "experts"))  # a check compares names of nodes


def by_onnx(model, folder):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if any(p.dtype == torch.bfloat16 for p in model.parameters()):
        pytest.skip("onnxruntime has no convolution in bfloat16")
    torch.onnx.export(model, (INDEX,), folder / "a.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(folder / "a.onnx", providers=["CPUExecutionProvider"])
    (name,) = [each.name for each in session.get_inputs()]
    return lambda index: torch.from_numpy(session.run(None, {name: index.numpy()})[0])


def by_aoti(model, folder):
    path = torch._inductor.aoti_compile_and_package(
        torch.export.export(model, (INDEX,)), package_path=str(folder / "a.pt2")
    )
    return torch._inductor.aoti_load_package(path)


WAYS = [by_export, by_trace, *(pytest.param(way, marks=pytest.mark.slow) for way in (by_onnx, by_aoti))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", [name for name in STATES if name != "training"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_exported_as_it_is(kind, way, state, tmp_path):
    """And the model goes on as it was."""
    model = built(kind)
    base = output(model)
    STATES[state](model)
    wanted = output(model)
    same(output(way(model, tmp_path)), wanted, kind)
    same(output(model), wanted, kind)
    lora.unmerge_lora_weights(model)
    lora.set_adapter(model, "default")
    same(output(model), base, kind)
