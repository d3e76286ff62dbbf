"""Make the tables and pictures of the documents anew, from results/*.json and from docstrings.

    cd examples
    python update_documents.py

Rewrites, in README.md and in the tutorials beside this script, what stands between the marks `<!-- NAME -->` and
`<!-- end of NAME -->` of each table and picture, and draws the pictures, pictures/*.svg. COMPARISON_RESULTS.py --write
makes its own document.
"""

import argparse
import ast
import inspect
import os
import re
import sys
from pathlib import Path

from common.cli import run
from common.files import REPOSITORY, RESULTS, write_atomically
from common.reports import pictures, reading, tables

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # this checkout's loralib
import loralib as lora

HERE = Path(__file__).resolve().parent
PICTURES = HERE / "pictures"
DOCUMENTS = [
    REPOSITORY / "README.md",
    *(path for path in sorted(HERE.glob("*.md")) if path.name != "COMPARISON_RESULTS.md"),
]


def commands():
    """A row for each script: the first line of its docstring."""
    rows = {"": ["what it does"], "---": ["---"]}
    for path in [*sorted(HERE.glob("*/*.py")), *sorted(HERE.glob("*.py"))]:
        if path.parent.name != "common" and "__main__" in path.read_text(encoding="utf-8"):
            said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).split("\n\n")[0]
            rows[f"`{path.relative_to(REPOSITORY).as_posix()}`"] = [" ".join(said.split())]
    return rows


def api():
    """A row for each public name of the library: the first sentence of its docstring."""
    rows = {"": ["what it is"], "---": ["---"]}
    for name in lora.__all__:
        member = getattr(lora, name)
        if not getattr(member, "__module__", "").startswith("loralib."):  # of 0.1.2's star import
            continue
        said = " ".join(inspect.getdoc(member).split("\n\n")[0].split()).replace("|", "\\|")
        parameters = list(inspect.signature(member).parameters.values())
        by_name = [a for a in parameters if a.kind is a.KEYWORD_ONLY]
        shown = [_argument(a) for a in parameters]
        if by_name and not any(a.kind is a.VAR_POSITIONAL for a in parameters):
            shown.insert(parameters.index(by_name[0]), "*")
        arguments = ", ".join(shown)
        rows[f"`{name}({arguments})`"] = [said]
    return rows


def _argument(parameter):
    """A parameter as in a call: its name, and what it is by default."""
    star = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
    return f"{star}{parameter.name}{default}"


MADE = {"commands": commands, "api": api}


def draw(folder=RESULTS):
    """{name of a picture: (its title, the text of its SVG file)}."""
    records = reading.read_folder(folder)
    return {name: picture(records) for name, picture in pictures.PICTURES.items()}


def with_tables(document, folder=RESULTS):
    """The text of a document with the tables and pictures whose marks it has."""
    text, drawn = document.read_text(encoding="utf-8"), draw(folder)
    for name in re.findall(r"^<!-- end of (\w+) -->$", text, re.M):
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        before, rest = text.split(begin)
        if name in drawn:
            made = f"![{drawn[name][0]}](examples/pictures/{name}.svg)\n"
        else:
            made = tables.markdown(tables.in_lists(MADE[name]() if name in MADE else tables.TABLES[name](folder)))
        for place in (RESULTS, PICTURES):
            made = made.replace(f"](examples/{place.name}/", f"]({os.path.relpath(place, document.parent)}/")
        text = before + begin + made + end + rest.split(end)[1]
    return text


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    made = {PICTURES / f"{name}.svg": svg for name, (_, svg) in draw().items()}
    made |= {path: with_tables(path) for path in DOCUMENTS}
    for path, text in made.items():
        write_atomically(path, text)


if __name__ == "__main__":
    run(main)
