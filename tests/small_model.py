"""A small model with a layer of every kind that adapters go into, and what of a model must not change by accident."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import loralib as lora


class SmallModel(nn.Module):
    """Indices (batch, 6) -> (batch, 3); `second` is `first` under another name."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.image = nn.Conv2d(2, 4, (1, 2))
        self.c_attn = Conv1D(24, 8)
        self.norm = nn.LayerNorm(8)
        self.first = nn.Linear(8, 8, bias=False)
        self.second = self.first
        self.head = nn.Linear(8, 3)

    def forward(self, index):
        x = self.conv(self.embed(index).mT).mT.contiguous()
        image = self.image(x.unflatten(2, (2, 4)).transpose(1, 2))  # (batch, 4, 6, 3)
        q, k, v = self.c_attn(x).chunk(3, 2)
        x = self.norm(q + k.tanh() * v + image.mean((1, 3))[..., None])
        return self.head(self.second(self.first(x).tanh()).mean(1))


INDEX = torch.arange(12).reshape(2, 6) * 5 % 9
TARGETS = ["embed", "conv", "image", "c_attn", "first"]


def small_model(dtype=torch.float32):
    torch.manual_seed(5)
    return SmallModel().to(dtype).eval()


def snapshot(model):
    """All that loading could change: objects, values, modes, what trains, adapters."""
    return {
        "modules": [
            (name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)
        ],
        "parameters": [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "layers": [(m.r, m.lora_alpha, m.scaling, m.merged) for m in model.modules() if isinstance(m, lora.LoRALayer)],
        "adapters": (lora.list_adapters(model), lora.active_adapter(model)),
    }


def assert_unchanged(model, before):
    now = snapshot(model)
    values, wanted = now.pop("values"), {**before}
    assert now == {key: value for key, value in wanted.items() if key != "values"}
    for name, value in before["values"].items():
        assert torch.equal(values[name], value), name
