"""E2E files: one `slot : value | slot : value||sentence` to a line, UTF-8.

The part before `||` is the meaning representation, the part after it one reference text. A meaning with several
references takes several lines.
"""

import codecs
from pathlib import Path

from common.cli import UserError

LINE_FORM = "name : Blue Spice | food : English||Blue Spice serves English food ."


def read_pairs(path):
    """The (meaning, reference) pairs of an E2E file in its order."""
    return [_pair(line, where) for line, where in _lines(path)]


def read_meanings(path):
    """The distinct meanings of a file in its order; its lines are meanings or E2E lines, whose reference is ignored."""
    meanings = []
    for line, where in _lines(path):
        meaning = line.split("||")[0].strip()
        check_meaning(meaning, where)
        meanings.append(meaning)
    return list(dict.fromkeys(meanings))


def group_references(pairs):
    """{meaning: [its references]}, both in the order of the pairs."""
    groups = {}
    for meaning, reference in pairs:
        groups.setdefault(meaning, []).append(reference)
    return groups


def slots(meaning):
    """The (slot, value) pairs of a meaning."""
    return [tuple(part.strip() for part in field.split(" : ", 1)) for field in meaning.split("|")]


def check_meaning(meaning, where):
    """Raise a UserError that begins with `where` unless `meaning` is `slot : value | slot : value`."""
    if not meaning:
        raise UserError(f"{where}: the meaning is empty; expected for example: {LINE_FORM.split('||')[0]}")
    for field in meaning.split("|"):
        # The ends stay, so that a field with only one half has no " : " once they are off.
        if " : " not in field.strip():
            raise UserError(f"{where}: {field.strip()!r} is no `slot : value`; slots are separated by ` | `")


def _pair(line, where):
    parts = [part.strip() for part in line.split("||")]
    if len(parts) != 2:
        raise UserError(f"{where}: expected one `||` between meaning and reference, as in: {LINE_FORM}")
    meaning, reference = parts  # the official references end with a space, which is not part of the text
    check_meaning(meaning, where)
    if not reference:
        raise UserError(f"{where}: the reference after `||` is empty; expected for example: {LINE_FORM}")
    return meaning, reference


def _lines(path):
    """Each line of a file and its place ("file, line 3")."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such data file; a file in E2E form is needed (one `meaning||reference` to a line). Check "
            "--data_dir and the file names; examples/embedded/make_data.py writes the files of the default run anew"
        )
    with path.open("rb") as file:
        content = file.read()
    # Split as bytes: str.splitlines would also split at characters that may stand inside a text.
    lines = content.removeprefix(codecs.BOM_UTF8).removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise UserError(f"{path}: the file is empty; expected lines such as: {LINE_FORM}")
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            yield line.decode("utf-8").removesuffix("\r"), where
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
