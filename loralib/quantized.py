"""Layers whose weight is stored in few bits: which they are, and the weight that they compute with.

They are known by their class or by the kind of their tensors, because the library imports none of the packages that
make them: torchao (tensor subclasses), bitsandbytes (`Linear4bit`, `Linear8bitLt`), HQQ (`HQQLinear`), gptqmodel (what
derives from `BaseQuantLinear`), and plain float8 tensors. An adapted one computes its own forward plus the low-rank
branch.
"""

import copy
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

_CLASSES = ("Linear4bit", "Linear8bitLt", "HQQLinear", "BaseQuantLinear")


def is_quantized(layer: nn.Module) -> bool:
    """Whether the weight of `layer` is stored in another form than as floating-point numbers of 16 bits or more.

    >>> is_quantized(nn.Linear(4, 4))
    False
    """
    if _class_of(layer):
        return True
    weight = dict(layer._parameters).get("weight")  # of a ScriptModule they are no dict
    if weight is None or weight.is_complex():
        return False
    return _knows_its_values(weight) or not weight.is_floating_point() or weight.itemsize < 2


def dequantized(layer: Any) -> Tensor:
    """Return the weight that a quantised `layer` computes with, (out_features, in_features), if it `tells` it."""
    kind, weight = _class_of(layer), layer._parameters.get("weight")
    if kind == "HQQLinear":
        return layer.dequantize()
    if kind == "BaseQuantLinear":
        return layer.dequantize_weight().detach().T.contiguous()
    if kind == "Linear4bit":
        functions, data, state = sys.modules["bitsandbytes"].functional, weight.data, weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):  # what a forward in eval on a CPU makes of it
            data, state = functions._convert_weight_packed_for_cpu_inverse(data.clone(), copy.deepcopy(state))
        return functions.dequantize_4bit(data, state)
    if kind == "Linear8bitLt":
        stored, scales = (getattr(layer.state, key) for key in ("CB", "SCB"))
        if stored is None:  # before the first forward
            stored, scales = weight.CB, weight.SCB
        if stored is None:  # before it is on its device
            return weight.data
        return stored.to(torch.float32) * scales.to(torch.float32)[:, None] / 127
    return weight.dequantize() if _knows_its_values(weight) else weight.to(torch.float32)


def tells(layer: Any) -> bool:
    """Whether the weight of a quantised `layer` can be had in floating point."""
    if _class_of(layer) != "BaseQuantLinear":
        return True
    # Only gptqmodel's GPTQ layers have the method with one meaning, (in_features, out_features); some of its kernels
    # store the weight in an order of their own and have none. And a layer may rotate its input, or add a correction.
    gptq = {cls.__name__ for cls in type(layer).__mro__} & {"GPTQQuantLinear", "PackableQuantLinear"}
    more = any(getattr(layer, key, None) for key in ("online_full_had", "online_partial_had", "adapter"))
    return bool(gptq) and not more and hasattr(layer, "dequantize_weight")


def merges(layer: nn.Module) -> bool:
    """Whether `layer` can compute with a floating-point weight in the place of its own."""
    return _class_of(layer) is None


def count(parameter: Tensor) -> int:
    """Return how many numbers a Parameter stands for: of 4-bit weights of bitsandbytes it stores two in a byte.

    >>> count(torch.zeros(2, 3))
    6
    """
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def keep_gradients(model: nn.Module) -> None:
    """Keep the 4-bit layers of bitsandbytes in `model` in the form that has a gradient, until `allow_packing`.

    On a CPU with AVX512-BF16 a forward in evaluation mode packs their weights for inference, in place. What computes
    with packed weights has no gradient (0.50): after the first validation, a training would go on without the
    gradient that comes through the base. Layers without an adapter are among them.
    """
    for layer in _four_bit(model):
        if getattr(layer, _PACKS, False):
            setattr(layer, _PACKS, False)
            vars(layer)["_packs"] = True
        state = getattr(layer._parameters["weight"], "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            layer.state_dict()  # bitsandbytes unpacks for that, in place


def allow_packing(model: nn.Module) -> None:
    """Undo `keep_gradients`."""
    for layer in _four_bit(model):
        if vars(layer).pop("_packs", False):
            setattr(layer, _PACKS, True)


_PACKS = "support_avx512bf16_for_cpu"


def _four_bit(model: nn.Module) -> list[Any]:
    if "bitsandbytes" not in sys.modules:
        return []
    return [layer for layer in model.modules() if _class_of(layer) == "Linear4bit"]


def make_float(layer: Any, weight: Tensor) -> nn.Module:
    """Return the `nn.Linear` that has `weight` and the bias of a quantised `layer`, or the `Conv1D` that it was."""
    source: Any = vars(layer).get("source_cls", nn.Linear)  # what transformers has replaced
    plain: Any
    with torch.device("meta"):
        if source.__name__ == "Conv1D":
            plain, weight = source(layer.out_features, layer.in_features), weight.T.contiguous()
        else:
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to(weight.dtype), requires_grad=layer.bias.requires_grad)
    return plain.train(layer.training)


def _class_of(layer: nn.Module) -> str | None:
    name = next((cls.__name__ for cls in type(layer).__mro__ if cls.__name__ in _CLASSES), None)
    # gptqmodel's embeddings derive from its linear layers, and take the numbers of tokens.
    return None if name == "BaseQuantLinear" and "Embedding" in type(layer).__name__ else name


def _knows_its_values(weight: Tensor) -> bool:
    return type(weight).dequantize is not Tensor.dequantize
