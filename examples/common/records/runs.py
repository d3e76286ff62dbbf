"""Runs of a training script that are to be compared: made one after the other, or taken where they were made before.

Each run is a process of its own, since the peak of memory is that of a process. Two are compared only if they differ in
the method alone.
"""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

from common.cli import UserError, call
from common.files import configuration, fingerprints, sha256, weights_fingerprint

# The knobs in which methods differ, those that only the runs with adapters read, and those that say where results go
# or whether the run was cut off on the way, which changes nothing.
# Each run is held against its own knobs when it is read.
METHOD_KNOBS = {"adapt", "lr", "skip_base"}
LORA_KNOBS = {"lora_dim", "lora_alpha", "lora_dropout", "target_modules", "init_adapter"}
PLACE_KNOBS = {"output_dir", "record", "resume"}
# What a comparison does not offer: with patience two runs end at different steps; the others are for frozen weights.
NOT_COMPARED = {"patience", "fsdp", "base_dtype"}


def make_all(script, wanted, files, reuse):
    """{name: record} of the runs that {name: knobs} asks for; all of one data, {split: path}, and alike.

    With `reuse` those that have been made are taken, if they are what would be made now.
    """
    there = [name for name in wanted if reuse and result_file(wanted[name]).is_file()]
    records = {name: read_run(script, wanted[name], files) for name in there}
    require_alike(records)
    for name in there[:1]:  # the others have the same
        require_base_of_now(records[name], wanted[name])
        if len(there) < len(wanted):
            require_place_of_now(records[name], wanted[name])
    for name, knobs in wanted.items():
        if name in records:
            print(f"{name}: taken from {result_file(knobs)}")
        else:
            records[name] = make_run(script, name, knobs, files)
    require_alike(records)
    return {name: records[name] for name in wanted}


def make_run(script, name, knobs, files):
    """The record of a run that is made now."""
    print(f"{name}: running {script.name} --adapt {knobs.adapt}", flush=True)
    status = call(command(script, knobs))
    if status:
        raise UserError(
            f"{script.name} --adapt {knobs.adapt} ended with status {status}, for the reason above; runs that ended "
            "well are kept for --reuse"
        )
    return read_run(script, knobs, files)


def command(script, knobs):
    """The command line that makes a run."""
    options = []
    for name, value in dataclasses.asdict(knobs).items():
        if value is True:
            options.append(f"--{name}")
        elif value is not False and value is not None:
            options.append(f"--{name}={value}")
    return [sys.executable, str(script), *options]


def result_file(knobs):
    return Path(knobs.output_dir) / "results.json"


def read_run(script, knobs, files):
    """The record of a run; a UserError if it is not the run that these knobs and the data of now make."""
    path = result_file(knobs)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        was = identity(record["configuration"], record["data"])
        facts(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no record of {script.name} ({error!r}); run without --reuse") from error
    differing = differences(was, identity(configuration(knobs), fingerprints(files)))
    if differing:
        raise UserError(
            f"{path} holds another run than the one asked for: {differing}; run without --reuse, or repeat its knobs"
        )
    for name, fingerprint in record.get("checkpoint_sha256", {}).items():
        places = [path.parent / name, path.parent / "model" / name]
        if not any(place.is_file() and sha256(place) == fingerprint for place in places):
            raise UserError(f"{path}: beside it there is no {name} of that run; run without --reuse")
    return record


def identity(settings, data):
    """The knobs and the files that make a run, under the names that messages use."""
    unread = PLACE_KNOBS if settings.get("adapt") == "lora" else PLACE_KNOBS | LORA_KNOBS
    knobs = {f"--{name}": value for name, value in settings.items() if name not in unread}
    return {**knobs, **{f"{split} file": entry for split, entry in data.items()}}


def facts(record, free=METHOD_KNOBS | {"seed"}):
    """Everything in which the runs of a comparison must agree; the knobs in `free` may differ."""
    environment = record["environment"]
    settings = {name: value for name, value in record["configuration"].items() if name not in free}
    agreed = {
        **identity(settings, record["data"]),
        **record["counts"],
        "weights of the base": record.get("base"),
        "processes": record["processes"],
        **{name: environment[name] for name in ("device", "threads", "platform", "python")},
        **environment["versions"],
    }
    if "history" in record:
        agreed["steps"] = record["history"][-1]["step"]
    return agreed


def require_alike(records):
    """Raise a UserError if two runs differ in more than the method."""
    for one, other in itertools.combinations(records, 2):
        first, second = facts(records[one]), facts(records[other])
        common = first.keys() & second.keys()  # the base has no steps
        differing = differences(*({name: side[name] for name in common} for side in (first, second)))
        if differing:
            raise UserError(
                f"the runs {one} and {other} differ in more than the method: {differing}; run without --reuse, which "
                "makes them alike"
            )


def require_base_of_now(record, knobs):
    """Raise a UserError if the base has other weights than when the run was made."""
    was, now = record.get("base"), weights_fingerprint(knobs.model)
    if was != now:
        raise UserError(
            f"{result_file(knobs)} holds a run of a base with other weights: {was} against {now}; run without --reuse"
        )


def require_place_of_now(record, knobs):
    """Raise a UserError if a run was made on another device, or with other versions, than one made now would be."""
    from common.records import results  # seconds to import, and only who makes runs needs them
    from common.training import compute

    was = facts(record)
    now = results.environment(compute.choose_device(knobs.device))
    now = {**now, **now["versions"]}
    differing = differences(*({name: side[name] for name in was.keys() & now.keys()} for side in (was, now)))
    if differing:
        raise UserError(
            f"{result_file(knobs)} cannot stand beside a run made now: {differing}; run without --reuse, which makes "
            "them alike"
        )


def differences(one, other):
    """The names under which two dicts differ, with both values, as a text that is empty if there are none."""
    names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return ", ".join(f"{name} {one.get(name)!r} against {other.get(name)!r}" for name in names)
