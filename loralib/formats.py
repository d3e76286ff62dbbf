"""Adapter files of loralib itself and of upstream: bytes on one side, an `Adapter` on the other.

Ours is one safetensors file: the tensors under their state-dict names, and in the metadata, under the single key
"loralib", the configuration that they need as JSON. Upstream's is what `torch.save(lora_state_dict(model))` writes: the
same names, and no configuration.
"""

import contextlib
import io
import itertools
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from loralib.adapters import is_bias, own_tensors
from loralib.architectures import fused_layout, group_spec
from loralib.core import check_hyperparameters, whole
from loralib.inject import STATISTICS
from loralib.layers import as_booleans, is_conv1d
from loralib.quantized import is_quantized
from loralib.wrappers import under_names_of

METADATA_KEY = "loralib"
FORMAT_VERSION = 1
LORA_ENDINGS = (".lora_A", ".lora_B")
_SPEC_KEYS = {"r", "lora_alpha", "scaling", "lora_dropout"}
_FUSED_KEYS = {"enable_lora", "group_sizes", "interleave"}
# What checkpoints of whole models record beside their tensors: the scalings of the layers, in the order of their names.
SCALINGS = "lora_scalings"


@dataclass
class Adapter:
    """An adapter outside a model, whatever file it came from.

    Attributes:
        tensors: by state-dict name, in loralib's layout.
        layers: for each adapted layer `r`, `lora_alpha`, `scaling`, `lora_dropout`, and for a fused projection
            `enable_lora`, `group_sizes`, `interleave`.
        bias: the bias mode.
        modules_to_save: full names of the modules saved whole.
        base_model: name of the base model, if known.
        metadata: what the user wants to have with it.
        token_indices: the rows that are trained, by the full name of the table.
    """

    tensors: dict[str, Tensor]
    layers: dict[str, dict]
    bias: str = "none"
    modules_to_save: list[str] = field(default_factory=list)
    base_model: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    token_indices: dict[str, list[int]] = field(default_factory=dict)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either the earlier one or the whole new one at every moment; make its folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:  # safetensors' own save_file would make it readable to its owner alone
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a write that fails does not say of which file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return the bytes of a safetensors file; `metadata` has a single entry, as several have an order of chance."""
    # Copies, because safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return save(tensors, metadata=metadata)


def scalings_of(adapter: Adapter) -> Tensor:
    """Return what is recorded under `SCALINGS`."""
    return torch.tensor([adapter.layers[name]["scaling"] for name in sorted(adapter.layers)], dtype=torch.float64)


def write_native(path: Path, adapter: Adapter) -> None:
    """Write our own file."""
    from loralib import __version__  # this module is part of what the package imports

    config = {
        "format_version": FORMAT_VERSION,
        "loralib_version": __version__,
        "base_model": adapter.base_model,
        "bias": adapter.bias,
        "modules_to_save": adapter.modules_to_save,
        "layers": adapter.layers,
        "metadata": adapter.metadata,
        **({"token_indices": adapter.token_indices} if adapter.token_indices else {}),
    }
    write_atomically(path, to_bytes(adapter.tensors, {METADATA_KEY: json.dumps(config)}))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a safetensors file; ValueError if it is none."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    return _checked(path, tensors), metadata


def read_native(path: Path) -> Adapter:
    """Read a file of `write_native`; ValueError says what is wrong with it."""
    tensors, metadata = read_safetensors(path)
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{path} has no loralib configuration: it was not written by lora.save_lora. For an adapter of PEFT give "
            "the folder that holds adapter_config.json"
        )
    try:
        config = json.loads(metadata[METADATA_KEY])
        version = config["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version is {version!r}, this library reads {FORMAT_VERSION}")
        tokens = config.get("token_indices", {})
        if not all(isinstance(row, int) for rows in tokens.values() for row in rows):
            raise ValueError("token_indices must be whole numbers")
        if not config["layers"] and not tokens:
            raise ValueError("it names no layers")
        for spec in config["layers"].values():
            if not spec.keys() >= _SPEC_KEYS or not spec.keys() <= _SPEC_KEYS | _FUSED_KEYS:
                raise ValueError(f"a layer has {sorted(spec)}, of {sorted(_SPEC_KEYS | _FUSED_KEYS)}")
            check_hyperparameters(spec["r"], spec["lora_alpha"], spec["lora_dropout"])
            check_hyperparameters(1, spec["scaling"], 0.0)
        if not isinstance(config["modules_to_save"], list):
            raise ValueError("modules_to_save must be a list")
        if not all(isinstance(name, str) for name in (config["bias"], *config["modules_to_save"])):
            raise ValueError("bias and modules_to_save must be names")
        check_metadata(config.setdefault("metadata", {}))  # added later, and optional
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a malformed loralib configuration: {error!r}") from error
    return Adapter(
        tensors,
        config["layers"],
        config["bias"],
        config["modules_to_save"],
        config.get("base_model"),
        config["metadata"],
        tokens,
    )


def check_metadata(metadata: dict[str, str]) -> None:
    """Raise ValueError unless `metadata` is a dict of texts."""
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError(f"metadata={metadata!r}: must be a dict of texts, such as {{'task': 'sst2'}}")


def read_torch(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of `torch.save` without running code from it; ValueError if it holds others."""
    data = path.read_bytes()
    try:
        _check_unpacked_size(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of whatever kind: torch lets through what its parts raise on damaged bytes
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be read as a dict of tensors, and nothing in it was run: {reason}") from error
    for key in ("model_state_dict", "state_dict"):  # upstream's NLG scripts, Lightning
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise ValueError(f"{path} holds no dict of tensors: {type(content).__name__}")
    return _checked(path, content)


def read_upstream(
    path: Path,
    modules: dict[str, nn.Module],
    lora_alpha: float | None,
    enable_lora: Sequence[bool],
    known_groups: dict[str, dict],
) -> Adapter:
    """Read a file of `torch.save(lora_state_dict(model))`, or a checkpoint of the whole model, for one with `modules`.

    Ranks come from the shapes. `enable_lora` says which groups a file with fewer adapted groups than the layer has
    adapts, where `known_groups`, the specs of the model's own fused layers, does not.
    """
    tensors = _read_all(path)
    recorded = tensors.pop(SCALINGS, None)
    tensors, there = under_names_of(tensors, LORA_ENDINGS, modules)
    tensors = _under_first_names(path, tensors, modules)
    names = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    if not names:
        raise ValueError(f"{path} holds no adapter: no name in it ends with '.lora_A', as upstream's do")
    found = [] if recorded is None or len(recorded) != len(names) else recorded.tolist()
    scalings = dict(zip(sorted(there.get(name, name) for name in names), found, strict=False))
    if lora_alpha is None and not scalings:
        raise ValueError(
            f"{path} carries no lora_alpha, which the result depends on; pass lora_alpha=... as it was trained with "
            "(16 for the official RoBERTa-base files, 32 for the official E2E ones)"
        )
    if lora_alpha is not None and scalings:
        raise ValueError(f"lora_alpha={lora_alpha}: {path} carries its own; leave it out")
    check_hyperparameters(1, 1 if lora_alpha is None else lora_alpha, 0.0)
    enable_lora = as_booleans(enable_lora)
    # Newer upstream versions keep the convolution one level down, and name the same tensor twice.
    for name, key in itertools.product(names, ("weight", "bias")):
        inner = tensors.pop(f"{name}.conv.{key}", None)
        if inner is not None:
            tensors.setdefault(f"{name}.{key}", inner)
    if any(f"{name}.weight" in tensors for name in names):
        tensors = _without_base(path, tensors, modules, names)
    layers, problems = {}, []
    for name in names:
        A, B = tensors[name + ".lora_A"], tensors.get(name + ".lora_B")
        owner = modules.get(name.rpartition(".")[0])
        try:
            if B is None or A.dim() != 2 or B.dim() != 2 or B.shape[1] == 0:
                raise ValueError(f"{name}: lora_A and lora_B must both be there, with two axes and a rank")
            layers[name] = _spec_from_shapes(owner, name, modules.get(name), A, B, enable_lora, known_groups.get(name))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n  ".join([f"{path} cannot be read for this model:", *problems]))
    for name, spec in layers.items():
        alpha = scalings[there.get(name, name)] * spec["r"] if lora_alpha is None else lora_alpha
        spec.update(lora_alpha=alpha, scaling=alpha / spec["r"], lora_dropout=0.0)
    rest = {name for name in tensors if name.rpartition(".")[2] not in ("lora_A", "lora_B")}
    saved, bias = sort_out(rest, layers)
    return Adapter(tensors, layers, bias, saved)


def whole_checkpoint(folder: Path) -> list[Path]:
    """Return the files of a checkpoint of a whole model, as transformers and accelerate write it; [] if there is none.

    Raises:
        ValueError: an index names what is no file beside it.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
                files = [folder / name for name in names if Path(name).name == name and (folder / name).is_file()]
            except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
                raise ValueError(f"{index} is no index of a checkpoint: {error!r}") from error
            if len(files) < len(names) or not names:
                raise ValueError(f"{index} names files that are not beside it; get the whole checkpoint")
            return files
    return []


def is_whole_checkpoint(path: Path) -> bool:
    """Whether `path` is a safetensors file of a state dict with adapters in it, without our configuration."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()
            return METADATA_KEY not in (file.metadata() or {}) and any(name.endswith(".lora_A") for name in names)
    except SafetensorError:
        return False


def _read_all(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in whole_checkpoint(path) if path.is_dir() else [path]:
        tensors.update(read_safetensors(file)[0] if file.suffix == ".safetensors" else read_torch(file))
    return tensors


def _without_base(
    path: Path, tensors: dict[str, Tensor], modules: dict[str, nn.Module], names: list[str]
) -> dict[str, Tensor]:
    """Leave out what a checkpoint has of the model's base: what is left was trained, and is the adapter's.

    That are heads and biases, if they differ; another weight below an adapter is another base.
    """
    packed = tuple(f"{name}." for name, module in modules.items() if is_quantized(module))
    left: dict[str, Tensor] = {}
    of_base: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        there = own_tensors(modules[owner]).get(key) if owner in modules else None
        trained = is_bias(key) or key in ("lora_A", "lora_B")
        if name.startswith(packed) and not trained:
            continue
        (left if there is None or key in STATISTICS else of_base)[name] = tensor
    differ = {name for name, tensor in of_base.items() if not _equals(tensor, _tensor(modules, name))}
    others = sorted(differ & {f"{name}.weight" for name in names})
    if others:
        theirs, here = {of_base[name].dtype for name in others}, {_tensor(modules, name).dtype for name in others}
        types = "" if theirs == here else f", in its dtype ({_listed(theirs)} there, {_listed(here)} here)"
        raise ValueError(
            f"{path} is a checkpoint of a whole model with another base than this one: {', '.join(others[:8])} differ; "
            f"load the adapter into the base that it was trained on{types}"
        )
    heads = {name.rpartition(".")[0] for name in differ if not is_bias(name.rpartition(".")[2])}
    biases = {name.rpartition(".")[0] for name in differ} - heads
    for name, tensor in of_base.items():
        owner, _, key = name.rpartition(".")
        with_bias = bool(biases) and is_bias(key) and (owner in names or not biases <= set(names))
        if owner in heads or with_bias:
            left[name] = tensor
    return left


def _listed(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _tensor(modules: dict[str, nn.Module], name: str) -> Tensor:
    owner, _, key = name.rpartition(".")
    return own_tensors(modules[owner])[key]


def _equals(tensor: Tensor, there: Tensor) -> bool:
    same = tensor.shape == there.shape and tensor.is_floating_point() == there.is_floating_point()
    return there.is_meta or (same and torch.equal(tensor.to(there.dtype), whole(there.detach()).cpu()))


def sort_out(names: set[str], layers: dict[str, dict]) -> tuple[list[str], str]:
    """Return which modules `names`, the tensors beside the adapters, belong to, and the bias mode of what is left."""
    names = {name for name in names if name.rpartition(".")[2] not in STATISTICS}
    saved = sorted({name.rpartition(".")[0] for name in names if not is_bias(name.rpartition(".")[2])})
    owners = {name.rpartition(".")[0] for name in names} - set(saved)
    if not owners:
        return saved, "none"
    return saved, "lora_only" if owners <= layers.keys() else "all"


def _check_unpacked_size(data: bytes) -> None:
    # torch.save compresses nothing; what unpacks to more than the file is there to fill the memory.
    if not data.startswith(b"PK"):
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > len(data):
        raise ValueError(f"its {len(data):,} bytes unpack to {unpacked:,}, as those of torch.save never do")


def _checked(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    odd = [name for name, tensor in tensors.items() if not _is_stored_whole(tensor)]
    if odd:
        raise ValueError(
            f"{path}: {', '.join(odd[:8])}: no dense tensor with each of its numbers in the file; save the adapter "
            "again from dense tensors that are not expanded"
        )
    return tensors


def _is_stored_whole(tensor: Tensor) -> bool:
    # Others cannot be copied from, or show any number of elements for a few bytes.
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
        return False
    if tensor.dtype == getattr(torch, "float4_e2m1fn_x2", None):  # two in a byte, and no conversion
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _under_first_names(file: Path, tensors: dict[str, Tensor], modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    # State dicts name the tensors of a module that is used twice under both its names.
    first = {id(module): name for name, module in reversed(modules.items())}
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, dot, key = name.rpartition(".")
        other = renamed.setdefault(first.get(id(modules.get(path)), path) + dot + key, tensor)
        if tensor.is_floating_point() and tensor.float().isnan().any():
            continue  # it does not equal itself, and is refused for that where the model is looked at
        if other.dtype != tensor.dtype or not torch.equal(other, tensor):
            raise ValueError(
                f"{file}: {name} is another name of a tensor in it, with other values; which one is meant?"
            )
    return renamed


def _spec_from_shapes(
    owner: nn.Module | None,
    name: str,
    module: nn.Module | None,
    A: Tensor,
    B: Tensor,
    enable_lora: Sequence[bool],
    known: dict | None,
) -> dict:
    r = B.shape[1]
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        rows = module.kernel_size[0] if len(module.kernel_size) > 1 else 1
        return {"r": max(1, A.shape[0] // rows)}
    if known is not None:
        return {"r": r, **known}
    if owner is None or not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return {"r": r}
    layout, adapted = fused_layout(owner, name, module), A.shape[0] // max(r, 1)
    if layout is None or (adapted == 1 and B.shape[0] == sum(layout.sizes)):  # one for the whole matrix
        return {"r": r}
    sizes, turns = layout.sizes, layout.turns
    enabled = layout.enabled(enable_lora) if len(enable_lora) == 3 else list(enable_lora)
    if adapted == len(sizes):
        enabled = [True] * len(sizes)
    rows = sum(size for size, on in zip(sizes, enabled, strict=False) if on)
    if (len(enabled), sum(enabled), rows) != (len(sizes), adapted, B.shape[0]):
        raise ValueError(
            f"{name}: the file adapts {adapted} of {len(sizes)} groups, {B.shape[0]} of {sum(sizes)} rows, and does "
            f"not say which; pass enable_lora, one entry for each group ({list(enable_lora)} does not fit)"
        )
    return {"r": r, **group_spec(enabled, sizes, turns)}
