"""The documents say what is true: code and commands run, tables come from the result files, paths and links exist.

A block of Python runs by itself, in an empty folder or in the one it names ("python in examples/NLU"); with the long
tests where it needs a tool that need not be installed ("python slow"). A block of
commands runs in a copy of the examples: at once, with the long tests ("sh slow"), or not at all where it needs a hub,
several processes or files from elsewhere ("sh elsewhere"), and is then parsed by its script. What installs ("sh
install") is what CI does. The lines of a "text" block must be among those that the commands before it print, whatever
the digits are. Alone: `pytest tests/test_docs.py`.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "examples"))

import update_documents  # noqa: E402 (after the folder that holds it)
from common import cli  # noqa: E402
from common.records import results  # noqa: E402
from common.reports import pictures, reading, tables  # noqa: E402

GENERATED = REPOSITORY / "examples" / "COMPARISON_RESULTS.md"
DOCUMENTS = {path.name: path for path in [*update_documents.DOCUMENTS, GENERATED]}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in DOCUMENTS.items()}
README = TEXTS["README.md"]
BLOCKS = [
    (name, number, kind, text)
    for name, document in TEXTS.items()
    for number, (kind, text) in enumerate(re.findall(r"^```(\w[^\n]*)\n(.*?)^```$", document, re.DOTALL | re.M), 1)
]
PYTHON = ("python", "python slow", "python in examples/NLG", "python in examples/NLU")


def blocks(*kinds):
    """A parameter for each block that begins so; those of slow commands are marked."""
    found = [block for block in BLOCKS if block[2] in kinds]
    assert found, kinds
    return [
        pytest.param(*block, id=f"{block[0]} {block[1]}", marks=[pytest.mark.slow] if "slow" in block[2] else [])
        for block in found
    ]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a reader has: the examples and the library, without what earlier runs wrote."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "loralib"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("output", "__pycache__"))
    return folder


def test_every_block_is_of_a_kind_that_is_tested():
    assert {kind for _, _, kind, _ in BLOCKS} == {
        *(*PYTHON, "python trl", "sh", "sh slow", "sh elsewhere", "sh install", "text"),
    }


@pytest.mark.parametrize("document, number, kind, text", blocks(*PYTHON))
def test_python_runs(document, number, kind, text, checkout, tmp_path):
    """By itself, with warnings as errors, but for those of other tools."""
    for name in re.findall(r"^(?:import|from) (\w+)", text, re.M):
        if "slow" in kind and importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    folder = checkout / kind.removeprefix("python in ") if " in " in kind else tmp_path
    done = subprocess.run(
        [sys.executable, "-W", "ignore" if "slow" in kind else "error", "-c", text],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("document, number, kind, text", blocks("python trl"))
def test_python_with_trl_runs(document, number, kind, text, tmp_path):
    """The warnings are TRL's."""
    pytest.importorskip("trl")
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document, number, kind, text", blocks("sh", "sh slow"))
def test_commands_run(document, number, kind, text, checkout):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-c", text],
        **{"cwd": checkout, "env": {**os.environ, "PATH": path}, "capture_output": True, "text": True, "timeout": 900},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    following = [text for name, n, kind, text in BLOCKS if (name, n, kind) == (document, number + 1, "text")]
    printed = {re.sub(r"\d+", "0", line.rstrip()) for line in done.stdout.splitlines()}
    for line in "".join(following).splitlines():
        assert re.sub(r"\d+", "0", line.rstrip()) in printed, line


@pytest.mark.parametrize("document, number, kind, text", blocks("sh elsewhere"))
def test_commands_that_need_more_are_taken_by_their_scripts(document, number, kind, text, monkeypatch):
    folder, *lines = text.replace("\\\n", " ").strip().split("\n")
    folder = REPOSITORY / folder.removeprefix("cd ")
    monkeypatch.syspath_prepend(folder)
    for line in lines:
        words = shlex.split(line)
        script = next(index for index, word in enumerate(words) if word.endswith(".py"))
        assert words[:script] in (["python"], ["torchrun", "--nproc_per_node", "2"])
        spec = importlib.util.spec_from_file_location(f"of_docs_{Path(words[script]).stem}", folder / words[script])
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        presets = getattr(module, "PRESETS", None) or getattr(module, "presets", None)
        cli.parse_knobs(module.Knobs, "", words[script + 1 :], presets)


@pytest.mark.parametrize("path", update_documents.DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_made_from_the_results(path):
    assert update_documents.with_tables(path) == path.read_text(encoding="utf-8"), (
        "run: cd examples && python update_documents.py"
    )


def test_the_ratios_of_the_readme():
    """A range goes from the smallest to the largest ratio of the record; memory is this library's through a rival's."""
    levels = json.loads((update_documents.RESULTS / "benchmark.json").read_text(encoding="utf-8"))["levels"]
    works, rows = levels["steps"].values(), list(tables.why(update_documents.RESULTS).values())[2:]
    for column, rival in enumerate(("peft", "upstream")):
        times = sorted(work["ratios"][rival]["median"] for work in works)
        peaks = sorted(work["systems"]["ours"]["peak_bytes"] / work["systems"][rival]["peak_bytes"] for work in works)
        assert [row[column] for row in rows[:2]] == [f"{low:.2f} to {high:.2f}" for low, *_, high in (times, peaks)]
    assert [row[1] for row in rows[2:4]] == ["-", "-"]  # the run on a GPU was without 0.1.2
    assert tables._range([0.5, 0.501]) == "0.50"


def test_every_table_is_in_a_document():
    text = "".join(path.read_text(encoding="utf-8") for path in update_documents.DOCUMENTS)
    marks = {*tables.TABLES, *update_documents.MADE, *pictures.PICTURES}
    assert set(re.findall("<!-- end of (.*) -->", text)) == marks


def test_pictures_are_drawn_from_the_results():
    drawn = {f"{name}.svg": picture for name, (_, picture) in update_documents.draw().items()}
    shipped = {path.name: path.read_text(encoding="utf-8") for path in update_documents.PICTURES.iterdir()}
    assert shipped == drawn, "run: cd examples && python update_documents.py"
    for name, picture in drawn.items():
        root = ElementTree.fromstring(picture)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and len(picture) < 15_000, name
        assert root.find("{*}title").text and root.findall("{*}text")


@pytest.mark.parametrize(
    "picture, name, path, text",
    [
        ("loss_curve", "nlg_compare_lora", ["history", -1, "valid_loss"], ">0.123<"),
        ("quality_embedded", "nlg_compare_full", ["after", "bleu"], ">12.3<"),
        ("quality_embedded", "nlu_rte", ["systems", "lora", "scores", "accuracy", "mean"], ">12.3<"),
        ("quality", "nlu_sst2_minilm", ["systems", "full", "scores", "accuracy", "mean"], ">12.3<"),
    ],
)
def test_a_picture_shows_what_its_record_says(picture, name, path, text):
    records = reading.read_folder(update_documents.RESULTS)
    place = records[name]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = 12.3 if "bleu" in path else 0.123
    before, (_, after) = update_documents.draw()[picture][1], pictures.PICTURES[picture](records)
    assert text in after and text not in before


def test_a_whisker_is_as_long_as_its_interval():
    records = reading.read_folder(update_documents.RESULTS)
    records["nlu_rte"]["intervals"]["systems"]["lora"]["accuracy"] = [0.25, 0.5]
    _, picture = pictures.quality(records, synthetic=True)
    assert 'x1="265.0"' in picture and 'x2="340.0"' in picture  # 190 + 300 x 0.25 and 190 + 300 x 0.5


def test_commands_are_those_of_ci():
    """CI installs and tests with the README's words; the main job's script exists where it is said to run."""
    job, tests = (text.strip() for name, _, kind, text in BLOCKS if (name, kind) == ("README.md", "sh install"))
    ci = (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8")
    for step in tests.split(" && "):
        assert step in ci, step
    assert "cd examples/NLG && python run_training.py" in job
    assert (REPOSITORY / "examples" / "NLG" / "run_training.py").is_file()


def anchors(text):
    """What a link may name behind #: the headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_named_paths_and_links_exist(name):
    folder = DOCUMENTS[name].parent
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXTS[name]) if not link.startswith("http")]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = folder / path if path else DOCUMENTS[name]
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|\w+\.(?:py|md))`", TEXTS[name])
    for path in named:
        places = [REPOSITORY, REPOSITORY / "examples", folder, *(REPOSITORY / "examples" / n for n in ("NLG", "NLU"))]
        if path.split("/")[0] in ("loralib", "examples", "NLG", "NLU", "tests") or path.endswith((".py", ".md")):
            assert any((place / path).exists() for place in places), path


def test_the_published_identity_of_the_paper_is_right():
    for name, text in TEXTS.items():
        assert set(re.findall(r"arXiv[: ](\d{4}\.\d{5})", text)) <= {"2106.09685", "1907.11692", "2101.00190"}, name


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples" / "results").glob("*.json")), ids=lambda p: p.name)
def test_results_are_of_committed_code_and_show_no_machine_paths(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert re.fullmatch(r"[0-9a-f]{40}", record["environment"]["commit"])
    for settings in record.get("configurations", {"": record.get("configuration")}).values():
        assert not [value for value in settings.values() if str(value).startswith("/")]


def test_the_commit_of_a_record_is_that_of_the_code(tmp_path, monkeypatch):
    """A change to a script makes it dirty; a record that a run has just written does not."""

    def git(*words):
        identity = ("-c", "user.name=x", "-c", "user.email=x@x")
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *words], capture_output=True, text=True, check=True
        ).stdout

    monkeypatch.setattr(results, "REPOSITORY", tmp_path)
    assert results._commit() is None
    folder = tmp_path / "examples" / "results"
    folder.mkdir(parents=True)
    script, record = tmp_path / "script.py", folder / "record.json"
    for path in (script, record):
        path.write_text("1", encoding="utf-8")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    commit = git("rev-parse", "HEAD").strip()
    record.write_text("2", encoding="utf-8")
    (folder / "another.json").write_text("2", encoding="utf-8")
    assert results._commit() == commit
    script.write_text("2", encoding="utf-8")
    assert results._commit() == f"{commit}-dirty"


def test_script_docstrings_quote_the_default_run():
    """The figures in the scripts' docstrings are those of the default run's record."""
    record = json.loads((REPOSITORY / "examples" / "results" / "nlg_embedded.json").read_text(encoding="utf-8"))
    text = (REPOSITORY / "examples" / "NLG" / "run_training.py").read_text(encoding="utf-8")
    for title, key, factor in (("BLEU", "bleu", 1), ("slot values, %", "slot_share", 100)):
        line = re.search(rf"^ +{title} +(.*)$", text, re.M)[1].split()
        assert line[:2] == [f"{factor * record[who][key]:.1f}" for who in ("before", "after")], title
