"""Adapter files of diffusers, and those of kohya's scripts, which it reads too, as an `Adapter`.

One safetensors file holds the adapters of one or several parts of a pipeline:

| written by        | a name in it                                                           | the alpha              |
|-------------------|------------------------------------------------------------------------|------------------------|
| diffusers         | `unet.mid_block.attentions.0.proj_in.lora_A.weight`                    | in the metadata        |
| diffusers of 2023 | `unet.....attn1.processor.to_q_lora.down.weight`, `....lora.up.weight` | `....alpha`, or none   |
| kohya's scripts   | `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight`            | `lora_unet_.....alpha` |
| the same for SDXL | `lora_unet_middle_block_1_proj_in.lora_down.weight`                    | `lora_unet_.....alpha` |

The last has the names of the original U-Net, before diffusers. The part is "" where a file is of one model alone. The
metadata have under "lora_adapter_metadata" the configuration of PEFT as JSON, every key with the name of its part
before it. Without any alpha the scaling is 1, as in diffusers.
"""

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from loralib.core import Adapted, check_hyperparameters
from loralib.formats import METADATA_KEY, Adapter, read_safetensors, to_bytes, write_atomically
from loralib.peft_format import PREFIX, layer_from_peft, read_config, to_peft

FILE = "pytorch_lora_weights.safetensors"
_CONFIG_KEY = "lora_adapter_metadata"
_PARTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
_HALVES = {"lora_A": 0, "lora_B": 1, "down": 0, "up": 1}
_HALF = re.compile(r"(.+?)\.(?:lora_|lora\.|lora_linear_layer\.)?(lora_[AB]|down|up)\.weight")


def diffusers_file(path: Path) -> Path:
    """Return the file that `path`, the name of a safetensors file or of a folder, means."""
    return path if path.suffix == ".safetensors" else path / FILE


def is_of_diffusers(path: Path) -> bool:
    """Whether a file is a safetensors file with names of diffusers' or kohya's."""
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
    except (OSError, SafetensorError):
        return False
    ours = METADATA_KEY in metadata or any(name.startswith(PREFIX) for name in names)
    return not ours and any(_HALF.fullmatch(name) for name in names)


def write_diffusers(
    path: Path, adapter: Adapter, model: nn.Module, modules: dict[str, nn.Module], layers: dict[str, Adapted]
) -> None:
    """Write the file that `load_lora_weights` of a pipeline and `load_lora_adapter` of a model read, atomically.

    Args:
        path: a safetensors file, or a folder, made if it does not exist.
        adapter: what to write.
        model: its class tells the part of the pipeline.
        modules: the modules of the model without adapters, by name.
        layers: its LoRA layers.
    """
    bare = [name for name in layers if name not in modules]
    if bare:
        raise ValueError(
            f"diffusers reads A and B of linear layers and convolutions alone, and {', '.join(bare[:8])} is a "
            "Parameter of a larger module. Save with format='peft' or 'loralib'"
        )
    tensors, config = to_peft(adapter, model, modules, layers, single_rank=False)
    rest = [name.removeprefix(PREFIX) for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if rest:
        raise ValueError(
            f"diffusers reads A and B of linear layers and convolutions alone; {', '.join(rest[:8])} would be lost. "
            "Save with format='peft' or 'loralib'"
        )
    part = _part(model)
    dot = part and part + "."
    named = {dot + name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    text = json.dumps({dot + key: value for key, value in config.items()})
    file = diffusers_file(path)
    write_atomically(file, to_bytes(named, {_CONFIG_KEY: text}))


def read_diffusers(path: Path, modules: dict[str, nn.Module], known_groups: dict[str, dict]) -> Adapter:
    """Read the part of a file that is for a model with `modules`; ValueError says what cannot be read.

    `known_groups` are the specs of the fused layers that the model has already, empty for a layer that is not fused.
    """
    tensors, metadata = read_safetensors(path)
    parts: dict[str, dict[str, list]] = {}  # for each part and layer A, B, and alpha
    unknown = []
    known = _known_names(modules)
    for key, tensor in tensors.items():
        half = _HALF.fullmatch(key)
        if half is None and not key.endswith(".alpha"):
            unknown.append(key)
            continue
        part, name = _split(half[1] if half else key.removesuffix(".alpha"), modules, known)
        entry = parts.setdefault(part, {}).setdefault(name, [None, None, None])
        entry[2 if half is None else _HALVES[half[2]]] = tensor
    if unknown:
        raise ValueError(f"{path}: {', '.join(unknown[:8])}: neither A, B nor alpha of a plain LoRA layer")
    part = _choose(path, parts, modules)
    config = _config(path, metadata, part)
    adapter = Adapter({}, {})
    for name, (A, B, alpha) in parts[part].items():
        if A is None or B is None:
            raise ValueError(f"{path}: {name} has an alpha or one of A and B, and not both")
        A, B = _as_in(modules.get(name), A), _as_in(modules.get(name), B)
        try:
            own = config or _plain_config(A.shape[0] if A.dim() else 0, alpha)
            adapter.layers[name], A, B = layer_from_peft(name, name, modules, A, B, own, known_groups.get(name))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        adapter.tensors[f"{name}.lora_A"], adapter.tensors[f"{name}.lora_B"] = A, B
    return adapter


def _part(model: nn.Module) -> str:
    kind = type(model).__name__
    if kind.startswith("UNet"):
        return "unet"
    if kind.startswith("CLIPTextModel"):
        return "text_encoder"
    return "transformer" if "Transformer" in kind else ""


def _split(name: str, modules: dict[str, nn.Module], known: dict[str, str]) -> tuple[str, str]:
    """The part of the pipeline, and the name within it, as the model has it."""
    for start, part in _KOHYA.items():
        if name.startswith(start):
            rest = name.removeprefix(start)
            return part, known.get(rest, rest)
    first, _, rest = name.partition(".")
    part, name = (first, rest) if first in _PARTS else ("", name)
    processor = re.fullmatch(r"(.+)\.processor\.(to_[a-z]+)(?:_lora)?", name)
    if processor:
        name = f"{processor[1]}.{processor[2]}" + (".0" if processor[2] == "to_out" else "")
    return part, name if name in modules else known.get(name.replace(".", "_"), name)


# What the original U-Net calls the layers of a residual block, and those outside of all blocks.
_ORIGINAL = {
    **{"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"},
    "conv_shortcut": "skip_connection",
}
_ORIGINAL_ENDS = {
    **{"conv_in": "input_blocks.0.0", "conv_out": "out.2"},
    **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
    **{"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"},
}


def _known_names(modules: dict[str, nn.Module]) -> dict[str, str]:
    """The names of the model by those that files have for them, written with underscores."""
    names: dict[str, set[str]] = {}
    for name in modules:
        each_name = [name, _original(name, modules)]
        if _part(modules[""]) == "text_encoder":  # whose layers are not within a `text_model` since transformers 5
            each_name.append(name.removeprefix("text_model.") if "text_model" in modules else f"text_model.{name}")
        for each in each_name:
            names.setdefault(each.replace(".", "_"), set()).add(name)
    return {each: meant.pop() for each, meant in names.items() if len(meant) == 1}


def _original(name: str, modules: dict[str, nn.Module]) -> str:
    """What the original U-Net calls a layer of diffusers'; there every layer of a block is a block of its own."""
    block = re.match(
        r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.", name
    )
    if block is None:
        return _ORIGINAL_ENDS.get(name, name)
    way, index, kind, layer, rest = *block.groups(), name[block.end() :]
    rest = _ORIGINAL.get(rest, rest) if kind == "resnets" else rest
    if way is None:
        return f"middle_block.{2 * int(layer) + (kind == 'attentions')}.{rest}"
    # One more in each block than residual blocks go down: it changes the size.
    depth = len(modules["down_blocks.0.resnets"]._modules) if "down_blocks.0.resnets" in modules else 1
    first = int(index) * (depth + 1) + (way == "down")
    if kind == "downsamplers":
        return f"input_blocks.{first + depth}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + depth}.{1 + (f'up_blocks.{index}.attentions' in modules)}.{rest}"
    return f"{'input' if way == 'down' else 'output'}_blocks.{first + int(layer)}.{int(kind == 'attentions')}.{rest}"


def _choose(path: Path, parts: dict[str, dict], modules: dict[str, nn.Module]) -> str:
    fitting = [part for part, layers in parts.items() if layers.keys() <= modules.keys()]
    expected = _part(modules[""])
    if len(fitting) == 1:
        return fitting[0]
    if expected in (fitting or parts):
        return expected
    if len(parts) == 1:
        return next(iter(parts))  # what does not fit is listed where it is compared with the model
    found, what = sorted(fitting or parts), "each of which fits" if fitting else "none of which fits"
    raise ValueError(
        f"{path} holds adapters of {', '.join(map(repr, found))}, {what} {type(modules['']).__name__}; "
        "give the model that one of them was trained on, or write that part to a file of its own"
    )


def _config(path: Path, metadata: dict[str, str], part: str) -> dict | None:
    if _CONFIG_KEY not in metadata:
        return None
    try:
        entries = json.loads(metadata[_CONFIG_KEY])
        dot = part and part + "."
        own = {key.removeprefix(dot): value for key, value in entries.items() if key.startswith(dot)}
    except (AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: {_CONFIG_KEY} is no configuration: {error}") from error
    return read_config(path, json.dumps({"peft_type": "LORA", **own})) if own else None


def _plain_config(r: int, alpha: Tensor | None) -> dict:
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"the alpha of a layer must be one number, and one has the shape {tuple(alpha.shape)}")
    lora_alpha = r if alpha is None else alpha.item()
    check_hyperparameters(1, lora_alpha, 0.0)
    return {
        **{"r": r, "lora_alpha": lora_alpha, "lora_dropout": 0.0, "use_rslora": False},
        **{"rank_pattern": {}, "alpha_pattern": {}},
    }


def _as_in(module: nn.Module | None, tensor: Tensor) -> Tensor:
    # A projection of the channels is a linear layer in some models and a convolution of size 1 in others.
    if isinstance(module, nn.Linear) and tensor.dim() > 2 and tensor[0, 0].numel() == 1:
        return tensor.flatten(1)
    return tensor
