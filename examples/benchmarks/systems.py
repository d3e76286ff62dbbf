"""The rivals of the benchmark: each builds the same work, in models of real shapes with random weights."""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # PEFT would look for the base on the hub when it saves

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import loralib as lora

HERE = Path(__file__).resolve().parent
UPSTREAM = HERE / "output" / "upstream"
ALPHA = 16


@dataclass(frozen=True)
class Work:
    """What a model is, what of it is adapted, and how many tokens a step sees."""

    architecture: str = "gpt2"  # or another of ARCHITECTURES
    layers: int = 12
    batch: int = 8
    length: int = 64
    targets: str = "query, value"  # or "all-linear"
    r: int = 4
    dropout: float = 0.0
    dtype: str = "float32"  # of the base; adapters are in float32

    @property
    def title(self):
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        dtype = f", base in {self.dtype}" if self.dtype != "float32" else ""
        size = f"{self.architecture}, {self.layers} layers, {self.batch} x {self.length} tokens"
        return f"{size}: {self.targets}, r={self.r}{dropout}{dtype}"


def gpt2(work, **sizes):
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=work.layers, **sizes, **off))


def roberta(work, **sizes):
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"vocab_size": 50265, "type_vocab_size": 1} | sizes
    config = transformers.RobertaConfig(num_hidden_layers=work.layers, **sizes, **off)
    return transformers.RobertaForSequenceClassification(config)


def llama(work, **sizes):
    config = transformers.LlamaConfig(num_hidden_layers=work.layers, tie_word_embeddings=True, **sizes)
    return transformers.LlamaForCausalLM(config)


# {name: what builds the model, sizes of it}; dropout of its own would hide that of the adapter.
ARCHITECTURES = {
    "gpt2": (gpt2, {}),
    "gpt2-medium": (gpt2, {"n_embd": 1024, "n_head": 16}),
    "roberta": (roberta, {}),
    # The sizes that meta-llama/Llama-3.2-1B has in its config.json, with 16 layers.
    "llama-1b": (
        llama,
        {
            **{"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
        },
    ),
}


def base_model(work):
    torch.manual_seed(0)
    builder, sizes = ARCHITECTURES[work.architecture]
    return builder(work, **sizes).to(getattr(torch, work.dtype))


def batch_of(work, device):
    """Token ids and labels drawn at random: the time of a step does not depend on them."""
    torch.manual_seed(1)
    ids = torch.randint(5, 50000, (work.batch, work.length), device=device)
    labels = torch.randint(0, 2, (work.batch,), device=device) if work.architecture == "roberta" else ids
    return {"input_ids": ids, "labels": labels}


# What computes query and value, by the model_type of the config; in GPT-2 the layer of query, key and value.
QUERY_VALUE = {"gpt2": ["c_attn"], "roberta": ["query", "value"], "llama": ["q_proj", "v_proj"]}

# Builders of the models: base -> model to train, in place or around it.


def floor(model, work):
    """No adapter: frozen weights, and a gradient that flows to the bottom."""
    model.requires_grad_(False)
    model.enable_input_require_grads()
    return model


def full(model, work):
    return model


def ours(model, work, **more):
    targets = None if work.targets == "query, value" else work.targets
    options = {"r": work.r, "lora_alpha": ALPHA, "lora_dropout": work.dropout, "modules_to_save": [], **more}
    lora.inject_lora(model, target_modules=targets, **options)
    return model


def peft(model, work):
    from peft import LoraConfig, get_peft_model

    fused = work.architecture.startswith("gpt2")
    targets = QUERY_VALUE[model.config.model_type] if work.targets == "query, value" else work.targets
    options = {"r": work.r, "lora_alpha": ALPHA, "lora_dropout": work.dropout}
    if targets == "all-linear" and work.architecture == "roberta":
        options["exclude_modules"] = r"classifier\..*"  # which it would adapt in a model without a task_type
    return get_peft_model(model, LoraConfig(target_modules=targets, fan_in_fan_out=fused, **options))


def upstream(model, work):
    """As its README says: layers replaced by hand, then all but the adapters frozen."""
    module = load_upstream(UPSTREAM)
    options = {"r": work.r, "lora_alpha": ALPHA, "lora_dropout": work.dropout}
    for name, layer in list(model.named_modules()):
        last, transposed = name.rsplit(".", 1)[-1], isinstance(layer, Conv1D)
        if not isinstance(layer, (Conv1D, nn.Linear)) or "head" in name or "classifier" in name:
            continue
        if work.targets == "query, value" and last not in QUERY_VALUE[model.config.model_type]:
            continue
        sizes = (layer.nx, layer.nf) if transposed else (layer.in_features, layer.out_features)
        if work.targets == "query, value" and transposed:
            new = module.MergedLinear(*sizes, enable_lora=[True, False, True], fan_in_fan_out=True, **options)
        else:
            new = module.Linear(*sizes, fan_in_fan_out=transposed, bias=layer.bias is not None, **options)
        new.weight.data = layer.weight.data
        if layer.bias is not None:
            new.bias.data = layer.bias.data
        model.get_submodule(name.rsplit(".", 1)[0])._modules[last] = new
    module.mark_only_lora_as_trainable(model)
    return model


SYSTEMS: dict[str, Callable] = {"floor": floor, "ours": ours, "upstream": upstream, "peft": peft, "full": full}


def load_upstream(folder):
    """The module of upstream's package under a name of its own."""
    name = "upstream_loralib"
    if name not in sys.modules:
        path = Path(folder) / "loralib" / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(path.parent)])
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def build(system, work, device):
    with torch.device(device):  # a GPU draws a large model in a moment
        model = SYSTEMS[system](base_model(work), work)
    return model.to(device).train()


def share_frozen(models):
    """Give the models the same memory for equal frozen weights: where it lies changes what reading it costs."""
    found = {}
    for model in models:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                alike = found.setdefault((parameter.shape, parameter.dtype, parameter.device), [])
                same = next((tensor for tensor in alike if torch.equal(tensor, parameter)), None)
                if same is None:
                    alike.append(parameter.data)
                else:
                    parameter.data = same


class Step:
    """A training step: forward, backward, AdamW."""

    def __init__(self, system, work, device, autocast):
        self.model, self.batch, self.autocast = build(system, work, device), batch_of(work, device), autocast
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.called = self.model
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def forward(self):
        with torch.autocast(self.batch["input_ids"].device.type, torch.bfloat16, enabled=self.autocast):
            return self.called(**self.batch).loss

    def compile(self):
        self.called = torch.compile(self.model)

    def __call__(self):
        self.forward().backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()


# One layer


def layer_of(system, i, o, groups, r, dropout):
    """A linear layer of i to o features; with `groups` the update is of the first and the last third, as q and v."""
    torch.manual_seed(0)
    options = {"r": r, "lora_alpha": ALPHA, "lora_dropout": dropout}
    enable = {"enable_lora": [True, False, True]}
    if system in ("ours", "upstream"):
        module = lora if system == "ours" else load_upstream(UPSTREAM)
        return _frozen(module.MergedLinear(i, o, **options, **enable) if groups else module.Linear(i, o, **options))
    return _plain_or_peft(system, nn.Linear(i, o), options)


def convolution_of(system, channels, k, r):
    """A convolution with a square kernel, of as many channels as it reads."""
    torch.manual_seed(0)
    options = {"r": r * k if system == "peft_same_rank" else r, "lora_alpha": ALPHA}
    if system in ("ours", "upstream"):
        module = lora if system == "ours" else load_upstream(UPSTREAM)
        return _frozen(module.Conv2d(channels, channels, k, padding=k // 2, **options))
    return _plain_or_peft(system, nn.Conv2d(channels, channels, k, padding=k // 2), options)


def _frozen(layer):
    # The bias, too: as `mark_only_lora_as_trainable` does it, and PEFT.
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return layer


def _plain_or_peft(system, layer, options):
    if system == "floor":
        return layer.requires_grad_(False)
    if system == "full":
        return layer
    from peft import LoraConfig, inject_adapter_in_model

    parent = inject_adapter_in_model(LoraConfig(target_modules=["0"], **options), nn.Sequential(layer))
    return parent[0]
