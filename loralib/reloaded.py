"""Models whose LoRA layers were made before loralib was imported anew, as happens in notebooks."""

from collections.abc import Iterable

from torch import nn

from loralib.core import InPlace, LoRALayer


def check_not_reloaded(modules: Iterable[nn.Module]) -> None:
    """Raise ValueError if a module is of a class of another import of this library, and would be taken for plain."""
    for kind in {type(module) for module in modules}:
        if not issubclass(kind, (InPlace, LoRALayer)) and any(cls.__module__ == "loralib.core" for cls in kind.__mro__):
            raise ValueError(
                f"the model has a {kind.__name__} of an earlier import of loralib, whose adapter is not seen since "
                "it was imported again (importlib.reload, %autoreload); nothing was changed. Restart the notebook's "
                "kernel, or build the model anew and load the adapter then"
            )
