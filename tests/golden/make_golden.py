"""Make upstream_0_1_2.safetensors: what the original loralib 0.1.2 computes, for tests/test_parity.py.

    pip install --no-deps --target DIR loralib==0.1.2
    python tests/golden/make_golden.py --upstream DIR

The package is imported under another name, so that this repository's loralib can be installed beside it. For every
layer in `LAYERS`: initial values after `torch.manual_seed(SEED)`, an input, a non-zero B, the output in training, the
gradients of sum(output * probe), the merged weight and the output in evaluation. The metadata hold, as JSON, how the
file was made and upstream's state-dict and `lora_state_dict` keys. Runs differ in the date alone.
"""

import argparse
import datetime
import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

SEED = 7
FILE = Path(__file__).with_name("upstream_0_1_2.safetensors")
QV = [True, False, True]

# name: (class, arguments, keyword arguments, shape of the input or, for an embedding, the indices)
LAYERS = {
    "linear": ("Linear", (6, 10), {"r": 4, "lora_alpha": 8}, (3, 6)),
    "linear_io": ("Linear", (6, 10), {"r": 4, "lora_alpha": 8, "fan_in_fan_out": True}, (3, 6)),
    "linear_r0": ("Linear", (6, 10), {}, (3, 6)),
    "merged": ("MergedLinear", (6, 12), {"r": 2, "lora_alpha": 3, "enable_lora": QV}, (2, 3, 6)),
    "merged_io": (
        "MergedLinear",
        (6, 12),
        {"r": 2, "lora_alpha": 3, "enable_lora": QV, "fan_in_fan_out": True},
        (2, 3, 6),
    ),
    "embedding": ("Embedding", (9, 4), {"r": 2, "lora_alpha": 3, "padding_idx": 2}, [[1, 2, 8], [0, 2, 1]]),
    "conv2d": ("Conv2d", (4, 6, 3), {"r": 2, "lora_alpha": 3, "padding": 1}, (2, 4, 5, 5)),
    "conv2d_k1": ("Conv2d", (4, 6, 1), {"r": 2, "lora_alpha": 3}, (2, 4, 5, 5)),
    "conv2d_groups": ("Conv2d", (4, 6, 3), {"r": 2, "lora_alpha": 3, "groups": 2}, (2, 4, 5, 5)),
    "conv1d_k1": ("Conv1d", (4, 6, 1), {"r": 2, "lora_alpha": 3}, (2, 4, 7)),
}


def load_upstream(directory: Path):
    package = directory / "loralib"
    spec = importlib.util.spec_from_file_location("loralib_0_1_2", package / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def measure(library, name: str) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """Return the tensors and the state-dict shapes of one layer; also used to measure this repository's layers."""
    kind, args, kwargs, inputs = LAYERS[name]
    torch.manual_seed(SEED)
    layer = getattr(library, kind)(*args, **kwargs)
    shapes = {key: list(value.shape) for key, value in layer.state_dict().items()}
    values = {f"init.{key}": value.clone() for key, value in layer.state_dict().items()}

    generator = torch.Generator().manual_seed(SEED)
    x = torch.tensor(inputs) if isinstance(inputs, list) else torch.randn(inputs, generator=generator)
    if kind != "Embedding":
        x.requires_grad_()
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if kind == "Embedding":
            layer.lora_A[:, kwargs["padding_idx"]] = 0  # as training leaves it
    values["x"] = x.detach().clone()
    out = layer(x)
    probe = torch.randn(out.shape, generator=generator)
    (out * probe).sum().backward()
    values |= {"probe": probe, "out_train": out.detach()}
    gradients = {key: parameter.grad for key, parameter in layer.named_parameters()} | {"input": x.grad}
    values |= {f"grad.{key}": value for key, value in gradients.items() if value is not None}
    layer.eval()
    merged = layer.conv.weight if hasattr(layer, "conv") else layer.weight
    with torch.no_grad():
        values |= {"weight_eval": merged.detach().clone(), "out_eval": layer(x)}
    values |= {f"adapter.{key}": p.detach().clone() for key, p in layer.named_parameters() if "lora_" in key}
    return {key: value.contiguous() for key, value in values.items()}, shapes


def make_model(library) -> nn.Module:
    """A model with every kind of layer, for the keys that `lora_state_dict` saves."""
    model = nn.ModuleDict({name: getattr(library, kind)(*args, **kw) for name, (kind, args, kw, _) in LAYERS.items()})
    model["norm"], model["head"] = nn.LayerNorm(6), nn.Linear(6, 2)
    return model


def keys_saved(library) -> dict[str, list[str]]:
    model = make_model(library)
    return {bias: sorted(library.lora_state_dict(model, bias=bias)) for bias in ("none", "all", "lora_only")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path, required=True, help="a pip --target folder with loralib 0.1.2")
    args = parser.parse_args()
    upstream = load_upstream(args.upstream)

    values, shapes = {}, {}
    for name in LAYERS:
        found, shapes[name] = measure(upstream, name)
        values |= {f"{name}/{key}": value for key, value in found.items()}
    about = {
        "how": "python tests/golden/make_golden.py --upstream DIR, DIR from pip install --target DIR loralib==0.1.2",
        "when": datetime.date.today().isoformat(),
        "versions": {"loralib": "0.1.2", "torch": torch.__version__, "python": sys.version.split()[0]},
        "seed": SEED,
        "state_dict": shapes,
        "lora_state_dict": keys_saved(upstream),
    }
    # One entry: safetensors writes several in no fixed order.
    save_file(values, FILE, metadata={"about": json.dumps(about)})
    print(f"{FILE.name}: {len(values)} tensors, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
