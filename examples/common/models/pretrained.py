"""Models of Hugging Face, from a folder or the hub, whatever they are for."""

import importlib.util
import math
import os
import shutil
from pathlib import Path

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer

from common.cli import UserError

BASE_DTYPES = ["float32", "bfloat16", "int8", "nf4"]
# What quantises, for those that are quantised.
QUANTIZERS = {"int8": "torchao", "nf4": "bitsandbytes"}


def load(auto_class, name, kind, **options):
    """(model in float32, tokenizer, sorted names of the tensors that its weights lack) of a folder or a hub name.

    `kind` is what the model is to be, in words, for messages; `options` go to `from_pretrained`.
    """
    local = Path(name).is_dir()
    if not local:
        _require_on_hub(name)
    transformers.utils.logging.disable_progress_bar()  # of the weights' loading; downloads keep theirs
    transformers.utils.logging.set_verbosity_error()  # what the weights lack is for the caller to judge
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        model, report = auto_class.from_pretrained(name, local_files_only=local, output_loading_info=True, **options)
    except (ImportError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise UserError(f"--model {name}: cannot be loaded as a {kind}: {error}") from error
    return model.float(), tokenizer, sorted(report["missing_keys"])


def check_base_dtype(knobs):
    """Raise a UserError if --base_dtype does not go with what is trained, or needs what is not installed."""
    given = f"--base_dtype {knobs.base_dtype}"
    if knobs.base_dtype != "float32" and knobs.adapt == "full":
        raise UserError(f"{given} is for frozen weights, and --adapt full freezes none; leave one of them out")
    if knobs.base_dtype in QUANTIZERS and knobs.fsdp:
        raise UserError(f"{given} does not go with --fsdp, which divides plain tensors; take bfloat16")
    check_installed(knobs.base_dtype)


def check_installed(dtype):
    """Raise a UserError if a base in `dtype` needs what is not installed."""
    package = QUANTIZERS.get(dtype)
    if package and not importlib.util.find_spec(package):
        raise UserError(f"--base_dtype {dtype} needs {package}, which is not installed: pip install {package}")


def store_base(model, dtype):
    """Keep the weights of a model that is not adapted yet in one of BASE_DTYPES; the adapters will be float32.

    int8 has one scale for each row, nf4 one for every 64 weights, stored in eight bits themselves. Both are for the
    matrices of `nn.Linear` but the output head; the model computes in float32, or what autocast says, as before.
    """
    if dtype == "bfloat16":
        model.to(torch.bfloat16)
    if dtype not in QUANTIZERS:
        return
    head = model.get_output_embeddings()  # often the same tensor as the input embeddings
    linear = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and m is not head}
    if not linear:
        raise UserError(
            f"--base_dtype {dtype}: {QUANTIZERS[dtype]} quantises nn.Linear, and {type(model).__name__} has no such "
            "layers but its head; take bfloat16"
        )
    if dtype == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name in linear)
    else:
        for name, layer in linear.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _in_four_bits(layer))


def _in_four_bits(layer):
    from bitsandbytes.nn import LinearNF4, Params4bit

    device = layer.weight.device
    made = LinearNF4(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    made.weight = Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4", module=made)
    made.bias = layer.bias
    return made.to(device)  # quantises


def save(model, tokenizer, folder):
    """Write the folder of a model, each file whole or as it was; return the files of the weights."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        folder.mkdir(exist_ok=True)
        files = sorted(partial.iterdir())
        for file in files:
            os.replace(file, folder / file.name)
        for stale in {*folder.glob("model*.safetensors*")} - {folder / file.name for file in files}:
            stale.unlink()  # of an earlier model, cut into another number of files
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written ({error}); an earlier model is as it was") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(folder.glob("*.safetensors"))


def context_window(model):
    """The most tokens the model can read; infinite where its positions have no end."""
    for name, module in model.named_modules():
        # RoBERTa's positions begin after that of the padding.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1
    most = getattr(model.config, "max_position_embeddings", None)
    return most if most is not None and most > 0 else math.inf  # XLNet says -1


def _require_on_hub(name):
    what = "neither a folder nor a model that can be had from the Hugging Face hub"
    do = (
        "Give a folder with config.json, tokenizer and weights, or a hub name such as gpt2 (with network, or one "
        "downloaded before); the scripts of examples/embedded write the models of the default runs anew"
    )
    try:
        huggingface_hub.hf_hub_download(name, "config.json", local_files_only=True)
        return  # downloaded before
    except huggingface_hub.errors.HFValidationError:
        raise UserError(f"--model {name}: no such folder, and no hub name either. {do}") from None
    except OSError:
        pass
    try:
        # One request first: from_pretrained tries each file for half a minute when there is no network.
        huggingface_hub.model_info(name, timeout=10)
    except Exception as error:  # no common base: the hub's own errors, or those of the http client it uses
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        raise UserError(f"--model {name}: {what} ({reason}). {do}") from error
