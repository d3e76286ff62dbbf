"""LoRA for PyTorch: freeze the weights W of a model and train y = W x + b + (lora_alpha / r) B A x.

>>> import torch, loralib as lora
>>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> lora.inject_lora(model, r=2, lora_alpha=4, target_modules=["0", "2"])
['0', '2']
>>> lora.count_parameters(model)
ParameterCount(trainable=104, total=444)
>>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
>>> model(torch.ones(8, 16)).sum().backward()
>>> optimizer.step()
>>> sorted(lora.lora_state_dict(model))
['0.lora_A', '0.lora_B', '2.lora_A', '2.lora_B']
>>> plain = lora.merge_and_unload(model.eval())
"""

import math
from typing import Dict, List, Optional  # noqa: UP035 (0.1.2 gave these names)

import torch
import torch.nn as nn
import torch.nn.functional as F

from loralib import layers, pretrained, utils  # noqa: F401 (pretrained registers how models are saved)
from loralib.adapters import active_adapter, delete_adapter, list_adapters
from loralib.checkpoint import load_lora, read_metadata, save_lora
from loralib.combine import combine_adapters
from loralib.core import LoRALayer
from loralib.extract import extract_lora
from loralib.inject import inject_lora
from loralib.layers import Conv1d, Conv2d, Conv3d, ConvLoRA, Embedding, Linear, MergedLinear
from loralib.loraplus import create_loraplus_optimizer
from loralib.reference import reference_model
from loralib.several import adapters_per_row, set_adapter, share_base
from loralib.utils import (
    count_parameters,
    disable_adapters,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_and_unload,
    merge_lora_weights,
    unload,
    unmerge_lora_weights,
)

__version__ = "0.3.0"

name = "lora"

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "active_adapter",
    "adapters_per_row",
    "combine_adapters",
    "count_parameters",
    "create_loraplus_optimizer",
    "delete_adapter",
    "disable_adapters",
    "extract_lora",
    "inject_lora",
    "list_adapters",
    "load_lora",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge_and_unload",
    "merge_lora_weights",
    "read_metadata",
    "reference_model",
    "save_lora",
    "set_adapter",
    "share_base",
    "unload",
    "unmerge_lora_weights",
]
# What else `from loralib import *` gives in 0.1.2, which chooses no names.
__all__ += ["Dict", "F", "List", "Optional", "layers", "math", "name", "nn", "torch", "utils"]
