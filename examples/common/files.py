"""Files and their fingerprints, as the records of runs have them; in a module of its own, which reads without torch."""

import contextlib
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from common.cli import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "examples" / "results"


def write_atomically(path, content):
    """Write a file beside its place and then move it there: an earlier file stays whole until then.

    `content` is a text, or a function that writes to the binary file it is given. A UserError says why it failed.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except Exception as error:
        reason = error
        while reason is not None and not isinstance(reason, OSError):  # torch.save ends with an error of its own
            reason = reason.__context__
        if reason is None:
            raise
        why = reason.strerror or reason
        raise UserError(f"{path} cannot be written ({why}); an earlier file is as it was") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_json(path, results):
    write_atomically(path, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def configuration(knobs):
    """The knobs as a result file shows them."""
    return {name: portable(value) for name, value in asdict(knobs).items()}


def fingerprints(files):
    """{name: file name and SHA-256} of {name: path}."""
    return {name: {"file": path.name, "sha256": sha256(path)} for name, path in files.items()}


def weights_fingerprint(name):
    """{file name: SHA-256} of an adapter file or of the weights in a folder; None for a model of the hub."""
    path = Path(name)
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    return {file.name: sha256(file) for file in files}


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def portable(value):
    """A knob as a result file shows it: paths relative to the repository or, outside it, without their folders."""
    if not isinstance(value, str) or not (os.path.isabs(value) or os.path.exists(value)):
        return value  # no path, or a name on the hub
    path = Path(value).resolve()
    return path.relative_to(REPOSITORY).as_posix() if path.is_relative_to(REPOSITORY) else path.name
