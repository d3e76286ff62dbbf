"""The JSON file of a run: everything needed to tell where a number comes from, written whole or not at all."""

import json
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from common.files import (
    REPOSITORY,
    RESULTS,
    configuration,
    fingerprints,
    sha256,
    weights_fingerprint,
    write_atomically,
    write_json,
)
from common.training import distributed, memory

try:
    import resource
except ImportError:  # Windows has none
    resource = None

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "sacrebleu", "numpy")


def write_texts(path, meanings, texts):
    """JSONL with one {"meaning", "text"} to a line."""
    pairs = zip(meanings, texts, strict=True)
    lines = [json.dumps({"meaning": meaning, "text": text}, ensure_ascii=False) + "\n" for meaning, text in pairs]
    write_atomically(path, "".join(lines))


def begin(task, knobs, files, parameters, model, device):
    """The record of a training so far: what is known before the first step, which code it is of included.

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
        "bytes": {"model": sum(map(_stored_bytes, model.parameters()))},
        "seconds": {},
        "environment": environment(device),
    }


def _stored_bytes(parameter):
    # Of a tensor that several processes divide, all of it.
    parts = [parameter] if isinstance(parameter, DTensor) else memory.plain_tensors(parameter)
    return sum(part.nbytes for part in parts)


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


def environment(device):
    """Where a run took place: versions, commit, device."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def peak_memory_bytes(device):
    """The most memory the process has held, and the most that torch has held on a CUDA device."""
    peak = {"process": None}
    status = Path("/proc/self/status")
    # Of Linux, whose getrusage begins with what the parent process held. Some sandboxes have the file without the line.
    most = status.is_file() and re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.M)
    if most:
        peak["process"] = 1024 * int(most[1])
    elif resource is not None:
        # Bytes on macOS, KiB elsewhere.
        unit = 1 if sys.platform == "darwin" else 1024
        peak["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device)
    return peak


def _version(package):
    """None for one that is not installed, as of those that only some scripts need."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit():
    """The commit that the code is of, "-dirty" if a file of it was changed since; records are no code."""

    def git(*words):
        return subprocess.run(["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)examples/results")
        return git("rev-parse", "HEAD").strip() + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or no repository: an unpacked archive
