"""A dataclass of knobs as command-line options, and the one place where errors become messages and exit statuses."""

import argparse
import contextlib
import dataclasses
import sys
import types
import typing


class UserError(Exception):
    """Something the user can put right; the message says what came, what is allowed and what to do."""


@contextlib.contextmanager
def as_user_error(*kinds):
    """Within the block, exceptions of these kinds are the user's to put right: their message is enough."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


def run(main):
    """Call `main()`; exit with status 2 and one message after a UserError, with 130 after Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        # Files are written beside their target and then moved, so what exists is whole.
        print("\ninterrupted; no file was left half-written", file=sys.stderr)
        sys.exit(130)


def knob(default, reason):
    """A field of a dataclass of knobs: its default and the line that --help shows."""
    return dataclasses.field(default=default, metadata={"help": reason})


def parse_knobs(knobs_class, description, arguments=None):
    """The knobs from the command line: every field of the dataclass is an option of its name, type and default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = typing.get_type_hints(knobs_class)
    for field in dataclasses.fields(knobs_class):
        kind = kinds[field.name]
        if isinstance(kind, types.UnionType):  # `int | None`: the option takes the first, its absence means None
            kind = typing.get_args(kind)[0]
        text = field.metadata["help"].replace("%", "%%")
        if kind is bool:
            parser.add_argument(f"--{field.name}", action="store_true", help=text)
            continue
        shown = "" if field.default is None else " (default: %(default)s)"
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=text + shown)
    return knobs_class(**vars(parser.parse_args(arguments)))


def require_positive(knobs, *names):
    """Raise a UserError for the first of these knobs that is set and not above zero (NaN is not)."""
    for name in names:
        value = getattr(knobs, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value}: must be above 0")
