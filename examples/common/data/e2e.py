"""E2E files, UTF-8, in either of their official forms, told apart by the suffix of the name.

Lines:          name : Blue Spice | Type : coffee shop | price : £ 20 - 25||Blue Spice isn 't cheap .
CSV (`.csv`):   mr,ref
                "name[Blue Spice], eatType[coffee shop], priceRange[£20-25]",Blue Spice isn't cheap.

A row is a meaning representation and one reference text; a meaning with several references takes several rows.

What is read from a CSV file is what the line form says, so that prompts, grouping and slot scores are the same: three
slots have other names, and values and references are tokenised. Compared row by row, devset.csv gives valid.txt but
for one reference of 4,672, and testset_w_refs.csv the meanings of all 4,693 rows of test.txt. 126 references there
differ because that file was tokenised otherwise than the other two ("is n't", "5-star" for "isn 't", "5 - star"):
from CSV files the test references come in the form of the training texts.
"""

import csv
import re
from pathlib import Path

from common.cli import UserError, as_user_error
from common.data.lines import decoded

OFFICIAL_NAMES = {
    "lines": {"train": "train.txt", "valid": "valid.txt", "test": "test.txt"},
    "csv": {"train": "trainset.csv", "valid": "devset.csv", "test": "testset_w_refs.csv"},
}
LINE_FORM = "name : Blue Spice | food : English||Blue Spice serves English food ."
CSV_FORM = '"name[Blue Spice], food[English]",Blue Spice serves English food.'
CSV_COLUMNS = ["mr", "ref"]
CSV_SLOT = re.compile(r"([^][|:]*[^][|:\s])\[\s*([^][|\s][^][|]*)\]")
LINE_SLOT_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
# What stands alone: several full stops, and one except before a word or digit ("30.99"); a hyphen within a word;
# a quotation mark, but no apostrophe; any other mark.
MARKS = re.compile(r"\.{2,}|\.(?!\w)|(?<=\w)-(?=\w)|(?<!\w)'|'(?!\w)|[^\w\s.'-]")
APOSTROPHE = re.compile(r"(?<=\w)'(?=\w)")


def find_files(data_dir, names=None):
    """{split: path} of the E2E files in a folder.

    `names` says which of "train", "valid" and "test" are wanted, by default all, and what each is called: None stands
    for the official name in the form in which all such are there, the line form first.
    """
    folder = Path(data_dir)
    names = names or dict.fromkeys(OFFICIAL_NAMES["lines"])
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of E2E files; check --data_dir")
    wanted = [split for split, name in names.items() if name is None]
    for official in OFFICIAL_NAMES.values():
        if all((folder / official[split]).is_file() for split in wanted):
            return {split: folder / (name or official[split]) for split, name in names.items()}
    forms = [[official[split] for split in wanted] for official in OFFICIAL_NAMES.values()]
    missing = [name for form in forms for name in form if not (folder / name).is_file()]
    raise UserError(
        f"{folder}: needed are {' or '.join(', '.join(form) for form in forms)}; missing: {', '.join(missing)}. "
        "examples/NLG/download_data.py gets the official files; files of other names are named one by one "
        f"({', '.join(f'--{split}_file' for split in wanted)})"
    )


def read_pairs(path):
    """The (meaning, reference) pairs of an E2E file in its order."""
    if _is_csv(path):
        return [_csv_pair(row, where) for row, where in _csv_rows(path, [CSV_COLUMNS])]
    return [_line_pair(line, where) for line, where in _lines(path)]


def read_meanings(path):
    """The distinct meanings of a file in its order.

    Its lines are meanings in either form or E2E lines, its CSV columns `mr` or `mr,ref`; references are ignored.
    """
    if _is_csv(path):
        meanings = [_csv_meaning(row[0], where) for row, where in _csv_rows(path, [CSV_COLUMNS[:1], CSV_COLUMNS])]
    else:
        meanings = [read_meaning(line.split("||")[0], where) for line, where in _lines(path)]
    return list(dict.fromkeys(meanings))


def read_meaning(text, where):
    """A meaning as the files have it, given as `slot : value | slot : value` or as `slot[value], slot[value]`."""
    in_brackets = "[" in text and " : " not in text.partition("[")[0]  # a value may hold either mark
    return _csv_meaning(text, where) if in_brackets else _line_meaning(text, where)


def written_together(meanings):
    """The values whose marks do not stand apart, as they do in the official lines and in what is read from CSV."""
    values = dict.fromkeys(value for meaning in meanings for _, value in slots(meaning))
    return [value for value in values if value not in (tokenise(value), tokenise(value.replace(" '", "'")))]


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


def tokenise(text):
    """Text with its marks set apart as in the official training lines: "isn't £20-25." is "isn 't £ 20 - 25 ."."""
    return " ".join(APOSTROPHE.sub(" '", MARKS.sub(r" \g<0> ", text)).split())


def _line_meaning(text, where):
    meaning = text.strip()
    check_meaning(meaning, where)
    return meaning


def _line_pair(line, where):
    parts = line.split("||")
    if len(parts) != 2:
        raise UserError(f"{where}: expected one `||` between meaning and reference, as in: {LINE_FORM}")
    meaning = _line_meaning(parts[0], where)
    reference = parts[1].strip()  # the official references end with a space, which is not part of the text
    if not reference:
        raise UserError(f"{where}: the reference after `||` is empty; expected for example: {LINE_FORM}")
    return meaning, reference


def _csv_meaning(text, where):
    if not text.strip():
        raise UserError(f"{where}: the meaning is empty; expected for example: {CSV_FORM}")
    fields = []
    for field in re.split(r"(?<=\])\s*,", text):  # a comma within a value stays
        slot = CSV_SLOT.fullmatch(field.strip())
        if not slot:
            raise UserError(
                f"{where}: {field.strip()!r} is no `slot[value]`; slots are separated by `, `, and neither half may be "
                "empty or hold a bracket or `|`"
            )
        name, value = slot.groups()
        fields.append(f"{LINE_SLOT_NAMES.get(name, name)} : {tokenise(value)}")
    return " | ".join(fields)


def _csv_pair(row, where):
    meaning, reference = _csv_meaning(row[0], where), tokenise(row[1])
    if not reference:
        raise UserError(f"{where}: the reference is empty; expected for example: {CSV_FORM}")
    return meaning, reference


def _is_csv(path):
    return Path(path).suffix.lower() == ".csv"


def _csv_rows(path, headers):
    """Each row below the header, which is one of `headers`, and its place ("file, line 3", "file, lines 3 to 5")."""
    records = _csv_records(path)
    header, where = next(records)  # an empty file has none, and has been refused
    columns = [name.strip().lower() for name in header]
    if columns not in headers:
        expected = " or ".join(f"`{','.join(names)}`" for names in headers)
        raise UserError(
            f"{where}: the header must be {expected}, not `{','.join(header)}`; rename the columns, or add a header "
            "above the rows"
        )
    row = None
    for row, where in records:
        if len(row) != len(columns):
            raise UserError(
                f"{where}: {len(row)} fields where `{','.join(columns)}` are needed; a field that holds a comma stands "
                f"in quotes, as in: {CSV_FORM}"
            )
        yield row, where
    if row is None:
        raise UserError(f"{path}: no row below the header; expected for example: {CSV_FORM}")


def _csv_records(path):
    reader = csv.reader((line + "\n" for line, _ in _lines(path)), strict=True)
    first = 1
    try:
        for row in reader:
            yield row, _place(path, first, reader.line_num)
            first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{_place(path, first, reader.line_num)}: broken CSV ({error}); a field that holds a comma, a quote or a "
            'line break stands in quotes, each quote in it doubled: "a ""b"" c"'
        ) from error


def _place(path, first, last):
    return f"{path}, line {first}" if first == last else f"{path}, lines {first} to {last}"


def _lines(path):
    """Each line of a file and its place ("file, line 3")."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such data file; a file in E2E form is needed (`meaning||reference` lines, or CSV with columns "
            "`mr,ref`). Check --data_dir and the file names; examples/NLG/download_data.py gets the official files, "
            "examples/embedded/make_data.py writes those of the default run anew"
        )
    with as_user_error(OSError):
        content = path.read_bytes()
    form = f"the header `{','.join(CSV_COLUMNS)}` and rows such as: {CSV_FORM}" if _is_csv(path) else LINE_FORM
    return decoded(content, path, form)
