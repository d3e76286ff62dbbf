"""The lines of a text file, with their places for messages."""

import codecs

from common.cli import UserError


def decoded(content, path, expected):
    """Each line of a file's bytes and its place ("file, line 3"); a UserError if it is empty, or no UTF-8 text."""
    # Split as bytes: str.splitlines would also split at characters that may stand inside a text.
    lines = content.removeprefix(codecs.BOM_UTF8).removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise UserError(f"{path}: the file is empty; expected {expected}")
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if b"\0" in line:
            raise UserError(f"{where}: a NUL byte, so this is not UTF-8 text; save the file as UTF-8")
        try:
            yield line.decode("utf-8").removesuffix("\r"), where
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
