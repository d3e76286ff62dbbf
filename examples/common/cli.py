"""A dataclass of knobs as command-line options, and the one place where errors become messages and exit statuses."""

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import signal
import subprocess
import sys
import tempfile
import types
import typing
from pathlib import Path

from common import stopping


class UserError(Exception):
    """Something the user can put right; the message says what came, what is allowed and what to do."""


@contextlib.contextmanager
def as_user_error(*kinds):
    """Within the block, exceptions of these kinds are the user's to put right: their message is enough."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


def run(main, under_torchrun=False):
    """Call `main()`; exit with status 2 and one message after a UserError, with 130 after Ctrl-C, 143 after SIGTERM.

    Where nobody reads the output any more, with 141 and without a word. What is for one process is refused in several.
    """
    with stopping.ended_by_its_reader():
        status = 0
        try:
            with stopping.terminable():
                if os.environ.get("WORLD_SIZE", "1") != "1" and not under_torchrun:
                    raise UserError(f"{Path(sys.argv[0]).name} is one process; start it with python, not with torchrun")
                main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
        except stopping.Stopped as stop:
            if str(stop):
                print(f"\n{stop}", file=sys.stderr)
            status = 128 + stop.signum
        except KeyboardInterrupt:
            # Files are written beside their target and then moved, so what exists is whole.
            print("\ninterrupted; no file was left half-written", file=sys.stderr)
            status = 128 + signal.SIGINT
        if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
            # fully_shard keeps gloo's threads alive to the end. One that still holds a tensor of the last exchange when
            # Python is being taken down aborts the process (pytorch pull request 179291), after all was well.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        if status:
            sys.exit(status)


def call(words, **options):
    """The exit status of a process that prints where this one does; a reader that left it has left this one, too."""
    status = subprocess.run(words, **options).returncode
    if status == stopping.UNREAD:
        raise BrokenPipeError
    return status


def knob(default, reason, choices=None):
    """A field of a dataclass of knobs: its default, the line that --help shows, and what it may be if not anything."""
    return dataclasses.field(default=default, metadata={"help": reason, "choices": choices and list(choices)})


def parse_knobs(knobs_class, description, arguments=None, presets=None):
    """The knobs from the command line: every field of the dataclass is an option of its name and type."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",  # all of them are listed below the description
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --seed is not --seeds
    )
    kinds = typing.get_type_hints(knobs_class)
    for field in dataclasses.fields(knobs_class):
        kind = kinds[field.name]
        if isinstance(kind, types.UnionType):  # `int | None`: the option takes the first, its absence means None
            kind = typing.get_args(kind)[0]
        text = field.metadata["help"].replace("%", "%%")
        options = {
            "default": argparse.SUPPRESS
        }  # only what is given: a preset fills in the rest before the defaults do
        if kind is bool:
            parser.add_argument(f"--{field.name}", action="store_true", help=text, **options)
            continue
        if field.default is not None:
            text += f" (default: {field.default})".replace("%", "%%")
        if typing.get_origin(kind) is tuple:  # `tuple[str, str]`: two words, of one type
            options["nargs"] = len(typing.get_args(kind))
            kind = typing.get_args(kind)[0]
        parser.add_argument(f"--{field.name}", type=kind, choices=field.metadata["choices"], help=text, **options)
    return fill_in(knobs_class, vars(parser.parse_args(arguments)), presets)


def fill_in(knobs_class, given, presets=None):
    """An instance of the dataclass: what was given, else what the preset named in it says, else the defaults.

    `presets` is {name: {knob: value}}, or a function that gives that for the knobs given.
    """
    known = {field.name: field for field in dataclasses.fields(knobs_class)}
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(name, known)
            raise UserError(f"{name}={value!r}: no such knob; " + (f"{close[0]}?" if close else ", ".join(known)))
        choices = known[name].metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"--{name} {value}: must be one of {', '.join(choices)}")
    if callable(presets):  # where they depend on another knob
        presets = presets(given)
    preset = presets[given.get("preset", known["preset"].default)] if presets else {}
    return knobs_class(**{**preset, **given})


def require_positive(knobs, *names):
    """Raise a UserError for the first of these knobs that is set and not a number above zero."""
    for name in names:
        value = getattr(knobs, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value}: must be above 0")


def require_not_negative(knobs, *names):
    """The same for those that may be zero."""
    for name in names:
        value = getattr(knobs, name)
        if not 0 <= value < math.inf:
            raise UserError(f"--{name} {value}: must be at least 0")


def require_share(knobs, *names):
    """The same for those that say how much of something, never all of it."""
    for name in names:
        value = getattr(knobs, name)
        if not 0 <= value < 1:
            raise UserError(f"--{name} {value}: must be at least 0 and below 1")


def given(knobs, *names):
    """Those of the knobs that are set, which by default are None or off."""
    return [name for name in names if getattr(knobs, name) is not None and getattr(knobs, name) is not False]


def refuse_together(knobs, excluded):
    """Raise a UserError for knobs that do not go with another: {option: (whether it is there, names of knobs)}."""
    for option, (there, others) in excluded.items():
        for other in given(knobs, *others):
            if there:
                raise UserError(f"{option} does not go with --{other}; leave one of them out")


def make_output_folder(path):
    """The folder that --output_dir names, made and tried before the work rather than after it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"--output_dir {path}: cannot be written to ({error.strerror}); give another folder") from error
    return Path(path)


def make_place_for(path, option):
    """The folder of a file to be written, made before the work rather than after it."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{option} {path}: a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written there ({error.strerror}); give another place") from error
