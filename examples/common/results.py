"""The JSON file of a run: everything needed to tell where a number comes from, written whole or not at all."""

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from common import distributed

try:
    import resource
except ImportError:  # Windows has none
    resource = None

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "examples" / "results"
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "sacrebleu", "numpy")


def write_atomically(path, content):
    """Write a file beside its place and then move it there: an earlier file stays whole until then.

    `content` is a text, or a function that writes to the binary file it is given.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode("utf-8"))
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def write_json(path, results):
    write_atomically(path, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_texts(path, meanings, texts):
    """JSONL with one {"meaning", "text"} to a line."""
    pairs = zip(meanings, texts, strict=True)
    lines = [json.dumps({"meaning": meaning, "text": text}, ensure_ascii=False) + "\n" for meaning, text in pairs]
    write_atomically(path, "".join(lines))


def begin(task, knobs, files, parameters, model):
    """The record of a training so far: what is known before the first step.

    `files` is {split: path}, `parameters` what lora.count_parameters gives.
    """
    return {
        "task": task,
        "adapt": knobs.adapt,
        "configuration": configuration(knobs),
        "data": fingerprints(files),
        "base": weights_fingerprint(knobs.model),
        "processes": distributed.processes(),
        "parameters": parameters._asdict(),
        "bytes": {"model": sum(p.numel() * p.element_size() for p in model.parameters())},
        "seconds": {},
    }


def add_training(record, outcome, device):
    """Put what a `training.Outcome` says into the record of a run."""
    record["seconds"].update(train=outcome.seconds, step=outcome.step_seconds)
    record["bytes"]["optimizer"] = outcome.optimizer_bytes
    record.update(history=outcome.history, curve=outcome.curve)
    record.update(best_step=outcome.best_step, first_step=outcome.first_step)
    record["peak_memory_bytes"] = peak_memory_bytes(device)


def add_checkpoint(record, files):
    """Put the size and the fingerprints of what was saved into the record of a run."""
    record["bytes"]["checkpoint"] = sum(path.stat().st_size for path in files)
    record["checkpoint_sha256"] = {path.name: sha256(path) for path in files}


def write_record(record, output_dir, name):
    """Write the record to output_dir and, under a name if there is one, to examples/results/."""
    write_json(output_dir / "results.json", record)
    if name:
        write_json(RESULTS / f"{name}.json", record)


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


def environment(device):
    """Where a run took place: versions, commit, device."""
    return {
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "commit": _commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def peak_memory_bytes(device):
    """The most memory the process has held, and the most that torch has held on a CUDA device."""
    peak = {"process": None}
    if resource is not None:
        # Bytes on macOS, KiB elsewhere.
        unit = 1 if sys.platform == "darwin" else 1024
        peak["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device)
    return peak


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def portable(value):
    """A knob as a result file shows it: paths relative to the repository or, outside it, without their folders."""
    if not isinstance(value, str) or not os.path.exists(value):
        return value  # no path, or a name on the hub
    path = Path(value).resolve()
    return path.relative_to(REPOSITORY).as_posix() if path.is_relative_to(REPOSITORY) else path.name


def _commit():
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--match", ""]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or no repository: an unpacked archive
