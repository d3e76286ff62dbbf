"""The model and the data that ship with the NLG example, and the scripts that made them.

The scripts are called as functions on a temporary folder and compared with what is shipped; the shipped base
is loaded as any Hugging Face folder. Alone: `pytest tests/test_embedded.py` (about 20 seconds on 2 cores).
"""

import hashlib
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL, DATA = EXAMPLES / "NLG" / "model", EXAMPLES / "NLG" / "data"
sys.path.insert(0, str(EXAMPLES / "embedded"))

import grammar  # noqa: E402
import make_data  # noqa: E402
import make_model  # noqa: E402

SPLITS = ["train", "valid", "test"]


@pytest.fixture(autouse=True)
def torch_settings():
    """make_model fixes the threads and the determinism of the whole process; other tests get theirs back."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def report():
    return json.loads((MODEL / "pretraining.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def lines(split):
    """(meaning, text) of every line of a shipped file, the meaning as a dict."""
    rows = []
    for line in (DATA / f"{split}.txt").read_text(encoding="utf-8").splitlines():
        context, text = line.split("||")
        rows.append((dict(field.split(" : ") for field in context.split(" | ")), text))
    return rows


def plain(text):
    return " ".join(re.split(r"[\s-]+", text.lower()))


def mentions(text, slot, value):
    if slot != "family friendly":
        return re.search(rf"(?<!\w){re.escape(plain(value))}(?!\w)", plain(text)) is not None
    found = re.search(r"\b(not |non )?(family|child|kids?) (friendly|welcome)\b", plain(text))
    return found is not None and (found[1] is None) == (value == "yes")


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_remaking_the_data_gives_the_shipped_bytes(tmp_path):
    make_data.make_data(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(f"{split}.txt" for split in SPLITS)
    for split in SPLITS:
        assert (tmp_path / f"{split}.txt").read_bytes() == (DATA / f"{split}.txt").read_bytes()


def test_another_seed_gives_other_data(tmp_path):
    make_data.make_data(tmp_path, seed=make_data.SEED + 1)
    for split in SPLITS:
        assert (tmp_path / f"{split}.txt").read_bytes() != (DATA / f"{split}.txt").read_bytes()


def test_no_meaning_is_in_two_splits_or_in_two_places_of_one():
    met = set()
    for split in SPLITS:
        contexts = [grammar.meaning_text(meaning) for meaning, _ in lines(split)]
        groups = [now for before, now in zip([None, *contexts], contexts, strict=False) if now != before]
        assert len(groups) == len(set(groups)) == make_data.SPLITS[split][0]
        assert met.isdisjoint(groups)
        met.update(groups)


@pytest.mark.parametrize("split", SPLITS)
def test_every_reference_mentions_every_value(split):
    for meaning, text in lines(split):
        for slot, value in meaning.items():
            assert mentions(text, slot, value), (slot, value, text)


@pytest.mark.parametrize("split", SPLITS)
def test_lines_are_written_as_in_e2e(split):
    rows = (DATA / f"{split}.txt").read_text(encoding="utf-8").split("\n")
    assert rows.pop() == ""
    for row in rows:
        assert re.fullmatch(r"name : [^|]+( \| [^|]+ : [^|]+)+\|\|[A-Z][^|]* \. ", row), row
        names = [field.split(" : ")[0] for field in row.split("||")[0].split(" | ")]
        assert names == [slot for slot in grammar.SLOTS if slot in names]


@pytest.mark.parametrize(
    ("text", "slot", "value", "found"),
    [
        ("It is not family friendly .", "family friendly", "no", True),
        ("It is not family friendly .", "family friendly", "yes", False),
        ("A child-friendly pub .", "family friendly", "yes", True),
        ("A child-friendly pub .", "family friendly", "no", False),
        ("A pub .", "family friendly", "no", False),
        ("A moderately priced pub .", "price", "moderate", False),
        ("Prices are £ 15 - 25 .", "price", "£ 15 - 25", True),
    ],
)
def test_the_check_of_mentions_itself(text, slot, value, found):
    assert mentions(text, slot, value) is found


def test_sizes():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 5_000_000
    assert sum(file.stat().st_size for file in DATA.glob("*.txt")) <= 1_500_000
    assert 2000 <= len(lines("train")) <= 4000


def test_the_folder_is_ordinary_hugging_face(model, tokenizer, report):
    assert (type(model).__name__, model.config.model_type) == ("GPT2LMHeadModel", "gpt2")
    assert type(tokenizer).__name__.startswith("GPT2Tokenizer")
    assert model.dtype == torch.float32
    assert model.num_parameters() == report["parameters"]
    assert len(tokenizer) == model.config.vocab_size
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert end == tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert end == model.config.eos_token_id == model.generation_config.eos_token_id
    assert tokenizer("A pub.<|endoftext|>")["input_ids"].count(end) == 1  # the text's own, and none added


@pytest.mark.parametrize(
    "text",
    [
        "name : Quince | price : £ 15 - 25||Quince is a tea room . ",
        " two  spaces, a\ttab\nand a line",
        "naïve Ωmega 日本 \U0001f600",
        "",
    ],
)
def test_the_tokenizer_round_trips(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.unk_token_id not in ids


def test_the_pretraining_text_has_no_record_of_a_restaurant():
    rng = random.Random(make_model.SEED)
    for _ in range(5000):
        text = "\n".join(grammar.document(rng))
        assert "||" not in text
        assert not re.search(r"[a-z] : [^|\n]* \| ", text), text  # the E2E format, whatever the domain
    for _ in range(5000):
        noun, name, facts = grammar.subject(rng)
        data = grammar.record(rng, noun, name, facts)
        assert not [venue for venue in grammar.VENUES if venue in data], data
        assert noun not in grammar.SLOTS["Type"]


@pytest.mark.slow
def test_pretraining_repeats_to_the_bit_and_depends_on_the_seed(tmp_path):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        made = make_model.make_model(tmp_path / folder, steps=2, seed=seed)
        assert made["weights_sha256"] == sha256(tmp_path / folder / "model.safetensors")
        assert (made["seed"], made["steps"]) == (seed, 2)
    names = sorted(file.name for file in MODEL.iterdir())
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == names
    assert not list(tmp_path.glob("*.partial"))
    for name in set(names) - {"pretraining.json"}:
        assert sha256(tmp_path / "a" / name) == sha256(tmp_path / "b" / name), name
    assert sha256(tmp_path / "a" / "model.safetensors") != sha256(tmp_path / "c" / "model.safetensors")


def test_the_shipped_tokenizer_is_the_one_the_script_makes(tokenizer):
    made = make_model.train_tokenizer(random.Random(make_model.SEED))
    assert made.get_vocab() == tokenizer.get_vocab()


def test_the_shipped_weights_are_those_of_the_report(report):
    assert sha256(MODEL / "model.safetensors") == report["weights_sha256"]
    assert (report["seed"], report["steps"]) == (make_model.SEED, make_model.STEPS)


def test_the_heldout_perplexity_is_that_of_the_report(model, tokenizer, report):
    perplexity = make_model.heldout_perplexity(model, tokenizer, report["seed"])
    assert perplexity == pytest.approx(report["heldout_perplexity"], rel=1e-3)
