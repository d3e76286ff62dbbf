"""LoRA+ (Hayou et al., arXiv 2402.12354): B learns at a higher rate than A, by a fixed ratio."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from loralib.core import Adapted

__all__ = ["create_loraplus_optimizer"]


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """Return an optimizer that trains `lora_B` with a higher learning rate than `lora_A`, as in LoRA+.

    Names, groups and defaults are those of `peft.optimizers.create_loraplus_optimizer`.

    >>> import torch, loralib as lora
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    >>> names = lora.inject_lora(model, r=2, target_modules=["0"], modules_to_save=["1"])
    >>> optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    >>> [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
    [(0.0001, 1), (1e-06, 0), (0.0016, 1), (0.0016, 2)]

    Args:
        model: a model with LoRA layers.
        optimizer_cls: a class of optimizers, such as `torch.optim.AdamW`.
        lr: the rate of `lora_A` and of the matrices that are trained whole.
        loraplus_lr_ratio: the rate of `lora_B`, and of trained vectors (biases, the weights of norms), divided by
            `lr`; at least 1 in the paper.
        loraplus_weight_decay: for everything except biases and the Parameters of `nn.LayerNorm`, which have none.
        loraplus_lr_embedding: the rate of A and B of embeddings.
        kwargs: what else `optimizer_cls` takes.

    Raises:
        ValueError: `model` trains nothing.
    """
    a: list[nn.Parameter] = []
    embeddings: list[nn.Parameter] = []
    b: list[nn.Parameter] = []
    b_without_decay: list[nn.Parameter] = []
    owners = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        path, _, key = name.rpartition(".")
        if not parameter.requires_grad:
            continue
        if key in ("lora_A", "lora_B") and isinstance(owners[path], Adapted) and isinstance(owners[path], nn.Embedding):
            embeddings.append(parameter)
        elif "lora_B" not in name and parameter.ndim != 1:
            a.append(parameter)
        elif "bias" in name or isinstance(owners[path], nn.LayerNorm):
            b_without_decay.append(parameter)
        else:
            b.append(parameter)
    if not (a or embeddings or b or b_without_decay):
        raise ValueError(f"{type(model).__name__} trains nothing; call lora.inject_lora(model, ...) first")
    decay, high = loraplus_weight_decay, lr * loraplus_lr_ratio
    groups = [
        {"params": a, "weight_decay": decay, "lr": lr},
        {"params": embeddings, "weight_decay": decay, "lr": loraplus_lr_embedding},
        {"params": b, "weight_decay": decay, "lr": high},
        {"params": b_without_decay, "weight_decay": 0.0, "lr": high},
    ]
    return optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]
