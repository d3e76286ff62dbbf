"""Adapters from the Hugging Face Hub, through huggingface_hub, which the library does without otherwise."""

import importlib
import re
from pathlib import Path

from loralib.diffusers_format import FILE
from loralib.peft_format import CONFIG, OLD_WEIGHTS, WEIGHTS

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
UPSTREAM_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_FILES = [CONFIG, WEIGHTS, OLD_WEIGHTS, FILE]


def local_path(path: str, revision: str | None) -> Path:
    """Return `path` itself if it is on this machine or cannot be on the Hub; else the folder that its adapter is
    downloaded to.

    Raises:
        FileNotFoundError: huggingface_hub is not installed or cannot get the repository.
        ValueError: there is a `revision`, which `path` cannot have.
    """
    here = Path(path)
    if here.exists() or not _REPOSITORY.fullmatch(path) or here.suffix in (".safetensors", *UPSTREAM_SUFFIXES):
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for an adapter on the Hub ('user/name'), which {path} is not")
        return here
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise FileNotFoundError(
            f"{path}: no such file or folder; if it is the name of an adapter on the Hub: pip install huggingface_hub"
        ) from error
    try:
        return Path(hub.snapshot_download(path, revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError) as error:  # what the Hub, the network and the cache answer
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{path}: no such file or folder here, and from the Hub: {reason}") from error
