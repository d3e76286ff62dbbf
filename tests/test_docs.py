"""The documents say what is true: code blocks run, tables come from the result files, commands and paths exist.

Run alone: `pytest tests/test_docs.py`.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(REPOSITORY / "examples"))

from common import tables  # noqa: E402 (after the folder that holds it)


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run(tmp_path):
    """Each Python block of the README runs by itself, with warnings as errors."""
    assert blocks("python")
    for block in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr


def test_table_is_made_from_the_results():
    assert tables.with_figures(README) == README, "run: cd examples && python -m common.tables"


def test_commands_are_those_of_ci():
    """CI installs and tests with the README's words; the main job's script exists where it is said to run."""
    job, tests = (block.strip() for block in blocks("sh"))
    ci = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    for step in tests.split(" && "):
        assert step in ci, step
    assert "cd examples/NLG && python run_training.py" in job
    assert (REPOSITORY / "examples" / "NLG" / "run_training.py").is_file()


def test_named_paths_and_links_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    paths = [
        path for path in re.findall(r"`([\w./]+/[\w./]*)`", README) if path.split("/")[0] in ("loralib", "examples")
    ]
    assert links and len(paths) > 8
    for path in (*links, *paths):
        assert (REPOSITORY / path).exists(), path


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples" / "results").glob("*.json")), ids=lambda p: p.name)
def test_results_are_of_committed_code_and_show_no_machine_paths(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert re.fullmatch(r"[0-9a-f]{40}", record["environment"]["commit"])
    assert not [value for value in record["configuration"].values() if str(value).startswith("/")]


def test_script_docstrings_quote_the_default_run():
    """The figures in the scripts' docstrings are those of the default run's record."""
    record = json.loads((REPOSITORY / "examples" / "results" / "nlg_embedded.json").read_text(encoding="utf-8"))
    text = (REPOSITORY / "examples" / "NLG" / "run_training.py").read_text(encoding="utf-8")
    for title, key, factor in (("BLEU", "bleu", 1), ("slot values, %", "slot_share", 100)):
        line = re.search(rf"^ +{title} +(.*)$", text, re.M)[1].split()
        assert line[:2] == [f"{factor * record[who][key]:.1f}" for who in ("before", "after")], title
