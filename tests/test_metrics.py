"""Scores of generated texts: the official E2E metrics, slots, distinct n-grams, intervals, prediction files.

Oracles: mteval's BLEU and NIST written out, values by hand, values that other projects publish, and the wrappers of
pycocoevalcap, whose programs our METEOR, ROUGE-L and CIDEr share, in a process of their own (they leave files open).
Alone: `pytest tests/test_metrics.py` (about a minute, most of it METEOR loading its tables; without Java
a few seconds).
"""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sacrebleu

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples" / "NLG" / "data"
REAL_DATA = ROOT.parent / "shared" / "data" / "e2e"
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "benchmarks")]

import metric_check  # noqa: E402
from common import cli  # noqa: E402
from common.data import e2e  # noqa: E402
from common.scores import e2e_scorer, text_scores  # noqa: E402

MISSING = e2e_scorer.missing_for_ptb()
needs_java = pytest.mark.skipif(MISSING is not None, reason=f"METEOR, ROUGE-L and CIDEr need {MISSING}")
needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"the official E2E files are not in {REAL_DATA}")

MEANINGS = [
    "name : Quince | Type : pub | food : Thai | price : cheap | area : old town",
    "name : The Tamarind Yard | food : Italian | family friendly : no | near : Café Luna",
    "name : Rook | Type : pub | customer rating : low | near : station",
    "name : Harbour Light | price : £ 20 - 25 | customer rating : 5 out of 5",
    "name : The Old Mill | Type : coffee shop | price : high | near : canal",
    "name : Rook | Type : pub",
    "name : Rook | food : Thai",
]
# A text that equals a reference and an empty one beside the outputs of the check table.
TEXTS = [*metric_check.CHECKS[0]["texts"], "Rook is a pub.", ""]
REFERENCES = [*metric_check.CHECKS[0]["references"], ["Rook is a pub.", "The pub Rook"], ["Rook has Thai food."]]
BETTER = ["Quince is a cheap Thai pub in the old town.", "The Tamarind Yard serves Italian food near Café Luna."]
BETTER += ["Rook is a pub near the station with a low rating.", *TEXTS[3:6], "Rook has Thai food."]


# BLEU and NIST


def words_of(text):
    return text.lower().split()


def grams_of(text, n):
    words = words_of(text)
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def literal_bleu(texts, references):
    """Papineni et al. 2002, with the closest reference length, written out; every n-gram order must match once."""
    log_precision, length, closest = 0.0, 0, 0
    for text, refs in zip(texts, references, strict=True):
        words = len(text.split())
        length += words
        closest += min((abs(len(ref.split()) - words), len(ref.split())) for ref in refs)[1]
    for n in range(1, 5):
        matched = total = 0
        for text, refs in zip(texts, references, strict=True):
            counts, *limits = (grams_of(t, n) for t in (text, *refs))
            matched += sum(min(count, max(limit[gram] for limit in limits)) for gram, count in counts.items())
            total += sum(counts.values())
        log_precision += math.log(matched / total) / 4
    return 100 * math.exp(min(0.0, 1 - closest / length) + log_precision)


def literal_nist(texts, references):
    """Doddington 2002, equations 2 and 3, as mteval-v13a has them: matches clipped by the most of any reference."""
    everything = [ref for refs in references for ref in refs]
    score = 0.0
    for n in range(1, 6):
        longer = sum((grams_of(ref, n) for ref in everything), Counter())
        shorter = sum((grams_of(ref, n - 1) for ref in everything), Counter()) if n > 1 else None
        gained = total = 0
        for text, refs in zip(texts, references, strict=True):
            for gram, count in grams_of(text, n).items():
                total += count
                matched = min(count, max(grams_of(ref, n)[gram] for ref in refs))
                if matched:
                    before = shorter[gram[:-1]] if n > 1 else sum(longer.values())
                    gained += matched * math.log(before / longer[gram]) / math.log(2)
        score += gained / max(total, 1)
    length = sum(sum(len(words_of(ref)) for ref in refs) / len(refs) for refs in references)
    ratio = min(1.0, sum(len(words_of(text)) for text in texts) / length)
    return score * math.exp(math.log(0.5) * (math.log(ratio) / math.log(1.5)) ** 2)


def mteval(texts, references):
    return {
        name: statistics.score(statistics.rows.sum(axis=0, keepdims=True))[0]
        for name, statistics in e2e_scorer.mteval_statistics(texts, references).items()
    }


BLEU_CASES = {
    "perfect, by one of several": (["a b c d e"], [["x y z", "a b c d e"]], 100.0),
    # 4 of 5, 3 of 4, 2 of 3, 1 of 2; as long as the reference: (1/5)^(1/4)
    "by hand": (["a b c d x"], [["a b c d e"]], 100 * (1 / 5) ** 0.25),
    # Precisions 1; 4 words against 5: exp(1 - 5/4)
    "brevity": (["a b c d"], [["a b c d e"]], 100 * math.exp(-0.25)),
    "as many references as there are, here 3 and 1": (
        ["the mill is a pub near ranch .", "cocum is a cheap coffee shop ."],
        [
            ["the mill is near ranch .", "a pub near ranch is the mill .", "the mill ."],
            ["cocum is a cheap coffee bar ."],
        ],
        None,
    ),
}


@pytest.mark.parametrize("texts, references, expected", BLEU_CASES.values(), ids=BLEU_CASES)
def test_bleu(texts, references, expected):
    score, signature = text_scores.bleu(texts, references)
    assert score == pytest.approx(literal_bleu(texts, references), abs=1e-9)
    assert mteval(texts, references)["bleu"] == pytest.approx(score, abs=1e-9)
    if expected is not None:
        assert score == pytest.approx(expected, abs=1e-9)
    assert re.search(r"nrefs:(1|2|var)\|case:mixed\|.*tok:13a", signature)


def test_case_counts_for_sacrebleu_alone():
    texts, references = ["a b c d X"], [["a b c d x"]]
    assert text_scores.bleu(texts, references)[0] == pytest.approx(100 * (1 / 5) ** 0.25)
    assert mteval(texts, references)["bleu"] == pytest.approx(100)


def test_bleu_of_fewer_than_four_words_counts_the_orders_there_are():
    # 2 of 3 words, 1 of 2 pairs, no three in a row: 1/2 of 1, as mteval smooths
    assert mteval(["a b x"], [["a b c"]])["bleu"] == pytest.approx(100 * (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3))


def test_bleu_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no texts"):
        text_scores.bleu([], [])


NIST_CASES = {
    # Two words of information log2(2/1) each, the second follows the first always: (1 + 1) / 2 + 0 / 1
    "by hand": (["a b"], [["a b"]], 1.0),
    # log2(3/1) each, times one half: two thirds of the reference's words
    "brevity": (["a b"], [["a b c"]], math.log2(3) / 2),
    # Of four words a and b come once each, in two references; no pair of words matches
    "matches by all references": (["a b"], [["a c", "d b"]], 2.0),
    # log2(4/2) for the one a of three that a reference has, which has it once more than any other
    "clipped by the most of one": (["a a a"], [["a", "b", "a c"]], 1 / 3),
    # 4 words against 2 + (2 + 6) / 2, so one half; by the average over all references it would be 4 against 20/3
    "average length of each meaning": (["a b", "c d"], [["a b"], ["c d", "e f g h i j"]], math.log2(10) / 2),
    "case does not count, marks are words": (["A b."], [["a b ."]], math.log2(3)),
    "longer than the reference": (["a b c d"], [["a b"]], 2 / 4),
    "no words": (["", "a"], [["a b"], ["a"]], None),
    # log2(5/2) twice and log2(5/1) twice over 4 words, log2(2/1) twice over 2 pairs; 4 words of 5
    "a text too short for a pair": (
        ["a b", "a c", ""],
        [["a b"], ["a c"], ["d"]],
        (math.log2(25 / 2) / 2 + 1) * math.exp(math.log(0.5) * (math.log(4 / 5) / math.log(1.5)) ** 2),
    ),
    "several": (
        ["the mill is a pub near ranch .", "cocum is a cheap coffee shop ."],
        [["the mill is near ranch .", "a pub near ranch is the mill , a mill ."], ["cocum is a coffee shop ."]],
        None,
    ),
}


@pytest.mark.parametrize("texts, references, expected", NIST_CASES.values(), ids=NIST_CASES)
def test_nist(texts, references, expected):
    score = mteval(texts, references)["nist"]
    if expected is not None:
        assert score == pytest.approx(expected, abs=1e-12)
    if not any("." in text for text in texts) or expected is None:  # the literal one splits at spaces alone
        assert score == pytest.approx(literal_nist(texts, references), abs=1e-12)


def test_nist_of_nothing_but_empty_texts_is_zero():
    assert mteval(["", ""], [["a b"], ["c"]])["nist"] == 0
    assert mteval(["", ""], [["a b"], ["c"]])["bleu"] == 0


# METEOR, ROUGE-L and CIDEr


@pytest.fixture(scope="module")
def scores():
    return text_scores.score(TEXTS, REFERENCES, MEANINGS)


@pytest.fixture(scope="module")
def wrapped():
    """What pycocoevalcap's own classes say of TEXTS: {metric: (score of all, score of each)}."""
    program = """
import json, sys
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
texts, references = json.load(sys.stdin)
tokenise = PTBTokenizer().tokenize
references = tokenise({i: [{"caption": ref} for ref in refs] for i, refs in enumerate(references)})
texts = tokenise({i: [{"caption": text}] for i, text in enumerate(texts)})
answers = {}
for name, scorer in {"meteor": Meteor(), "rouge_l": Rouge(), "cider": Cider()}.items():
    score, each = scorer.compute_score(references, texts)
    answers[name] = [float(score), list(map(float, each))]
print(json.dumps(answers))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps([TEXTS, REFERENCES]),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


SCALE = {"meteor": 100, "rouge_l": 100, "cider": 1}


@needs_java
@pytest.mark.parametrize("name", SCALE)
def test_corpus_and_sentences_by_the_wrappers(scores, wrapped, name):
    score, each = wrapped[name]
    assert scores[name] == pytest.approx(SCALE[name] * score, abs=1e-9)
    ours = text_scores.per_sentence(TEXTS, REFERENCES, MEANINGS)[name]
    assert ours == pytest.approx([SCALE[name] * value for value in each], abs=1e-9)
    assert ours[6] == 0 and ours[5] == pytest.approx(10 if name == "cider" else 100, rel=0.7)


@needs_java
def test_published_and_official_values():
    rows = metric_check.check_table()
    assert {row["metric"] for row in rows} == {"bleu", "nist", "meteor", "rouge_l", "cider", "sacrebleu"}
    for row in rows:
        printed = 1e-9 if row["outputs"] in ("fixed outputs", "It is a guide to action") else 1e-4
        assert row["ours"] == pytest.approx(row["official"], abs=printed), row
    record = json.loads((ROOT / "examples" / "results" / "metric_check.json").read_text(encoding="utf-8"))
    assert record["configuration"] == e2e_scorer.SIGNATURES | {"bleu": record["configuration"]["bleu"]}
    assert [row["ours"] for row in record["rows"]] == pytest.approx([row["ours"] for row in rows], abs=1e-9)


@needs_java
def test_odd_white_space_and_bars_stay_within_their_text():
    """A vertical tab ends a line for the tokenizer, three bars end a field for METEOR: neither may shift the texts."""
    texts = ["a\x0bb\u2028c ||| d\n", "e f", "a b c | | | d", "e f"]
    references = [["a b c d"], ["e\x85f", "g\r\nh ||| i"], ["a b c d"], ["e f", "g h | | | i"]]
    for statistics in e2e_scorer.ptb_statistics(texts, references).values():
        assert statistics.rows[:2].tolist() == statistics.rows[2:].tolist()
        assert statistics.score(statistics.rows)[1] == statistics.score(statistics.rows).max() > 0


def without_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    return "Java 8 or newer, the command `java`"


def without_pycocoevalcap(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    return "the package pycocoevalcap (pip install pycocoevalcap)"


@pytest.mark.parametrize("take_away", [without_java, without_pycocoevalcap])
def test_what_cannot_be_measured_is_none_with_a_reason(monkeypatch, tmp_path, take_away):
    pytest.importorskip("pycocoevalcap.meteor", reason="the reason is then always the package")
    needed = take_away(monkeypatch, tmp_path)
    texts, references, meanings = (
        ["a b .", "c"],
        [["a b ."], ["d", "c"]],
        ["name : a b", f"name : {take_away.__name__}"],
    )
    scores = text_scores.score(texts, references, meanings)
    for key, name in {"meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr"}.items():
        assert scores[key] is None
        assert scores["not_measured"][key].startswith(f"not measured: {name} needs {needed}")
    assert scores["nist"] > 0 and scores["slot_share"] == 0.5 and len(scores["not_measured"]) == 3
    each = text_scores.per_sentence(texts, references, meanings)
    assert each["meteor"] is None and len(each["bleu"]) == 2
    assert text_scores.wins(each, each)["cider"] is None
    intervals = text_scores.bootstrap({"a": texts, "b": texts}, references, meanings, resamples=5)
    assert intervals["systems"]["a"]["rouge_l"] is None and intervals["differences"]["b - a"]["meteor"] is None
    with pytest.raises(cli.UserError, match=re.escape(f"the check of METEOR, ROUGE-L and CIDEr needs {needed}")):
        metric_check.check_table()
    json.dumps(scores, allow_nan=False)


@pytest.mark.skipif(os.name == "nt", reason="the program that stands for a broken Java is a shell script")
@pytest.mark.parametrize(
    "action, message",
    [("cat; echo no memory >&2; exit 1", "1, 2 lines for 2: no memory"), ("cat; echo more", "0, 3 lines for 2: ")],
)
def test_a_failing_java_is_an_error_not_another_number(monkeypatch, tmp_path, action, message):
    pytest.importorskip("pycocoevalcap.meteor", reason="its folder names the programs")
    java = tmp_path / "java"
    java.write_text(f'#!/bin/sh\n[ "$1" = -version ] && exit 0\n{action}\n')
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert e2e_scorer.missing_for_ptb() is None
    with pytest.raises(cli.UserError, match=f"^java -cp .*PTBTokenizer.*: status {message}"):
        e2e_scorer.ptb_statistics(["a"], [["a"]])


# Slots


@pytest.mark.parametrize(
    "slot, value, text, mentioned",
    [
        ("name", "The Mill", "the mill is a pub .", True),
        ("name", "The Mill", "The Miller is a pub .", False),
        ("near", "Café Rouge", "It is near café rouge.", True),
        ("near", "Café Rouge", "It is near Cafe Rouge .", False),
        ("food", "Fast food", "It serves fast - food .", True),
        ("food", "Fast food", "It serves fast-food .", True),
        ("price", "£ 20 - 25", "It costs £ 20- 25 .", True),
        ("price", "£ 20 - 25", "It costs £20-25.", True),
        ("priceRange", "£20-25", "It costs £ 20 - 25 .", True),
        ("price", "£ 20 - 25", "It costs £ 20 - 250 .", False),
        ("price", "less than £ 20", "It costs  less than £ 20", True),
        ("customer rating", "5 out of 5", "rated 15 out of 5", False),
        ("family friendly", "yes", "It is family friendly .", True),
        ("familyFriendly", "yes", "It is family friendly .", True),
        ("familyFriendly", "no", "It is family friendly .", False),
        ("family friendly", "yes", "A Family - Friendly pub", True),
        ("family friendly", "yes", "Children are welcome .", True),
        ("family friendly", "yes", "It is kids-friendly .", True),
        ("family friendly", "yes", "It is not cheap and family friendly .", True),
        ("family friendly", "yes", "It is not family friendly .", False),
        ("family friendly", "yes", "yes", False),
        ("family friendly", "no", "It is not a family - friendly pub .", True),
        ("family friendly", "no", "a non child friendly pub", True),
        ("family friendly", "no", "It isn 't kid friendly .", True),
        ("family friendly", "no", "It isn't very child-friendly .", True),
        ("family friendly", "no", "Kids are not welcome .", True),
        ("family friendly", "no", "It has no children friendly area .", True),
        ("family friendly", "no", "It is family friendly .", False),
        ("family friendly", "no", "There is no food . It is family friendly .", False),
        ("family friendly", "no", "no", False),
    ],
)
def test_slot_value_is_mentioned(slot, value, text, mentioned):
    assert text_scores.slot_share([text], [f"{slot} : {value}"]) == float(mentioned)
    assert text_scores.slot_error_rate([text], [f"{slot} : {value}"]) == float(not mentioned)


def test_slot_scores_count_values_over_all_texts():
    meanings = ["name : A | food : B | near : C", "name : D"]
    assert text_scores.slot_share(["A has B .", "nothing"], meanings) == 2 / 4
    assert text_scores.slot_error_rate(["A has B .", "nothing"], meanings) == 2 / 4
    for share in (text_scores.slot_share, text_scores.slot_error_rate):
        with pytest.raises(ValueError):
            share(["A"], meanings)


# The other meanings say which values there are: two names, "Indian" within a place, "high" and "low" of two slots.
OTHERS = [
    "name : Rook | eatType : pub | food : Indian | priceRange : high | customer rating : low | familyFriendly : yes",
    "name : Old Mill | eatType : coffee shop | food : Thai | priceRange : £20-25 | customer rating : high",
    "near : Raja Indian Cuisine | priceRange : low",
]


@pytest.mark.parametrize(
    "meaning, text, errors",
    [
        ("name : Rook", "Rook.", 0),
        ("name : Rook", "A place.", 1),
        ("name : Rook", "Rook is a pub.", 1),
        ("name : Rook", "Rook is a cheap place.", 0),  # no slot has this value
        ("name : Rook", "The Rooks Indianapolis public", 1),  # no value, and no part of a word is one
        ("name : Rook", "Rook, a pub, serves Thai and Indian food.", 3),
        ("name : Rook", "Rook, a pub, is a pub.", 1),
        ("name : Rook", "Rook is near Old Mill.", 1),
        ("name : Rook | food : Thai", "Rook has Indian food.", 1),  # replaced: one error
        ("name : Rook | food : Thai", "Rook has Thai and Indian food.", 1),  # added
        ("name : Rook | food : Thai", "Rook is a pub.", 2),  # missing, and added
        ("name : Rook | food : Thai", "Old Mill has Indian food.", 2),  # both replaced
        ("near : Raja Indian Cuisine", "It is near Raja Indian Cuisine.", 0),
        ("near : Raja Indian Cuisine", "It has Indian food near Raja Indian Cuisine.", 1),
        ("food : Indian", "Indian food near Raja Indian Cuisine.", 1),
        ("name : Rook | priceRange : low", "Rook has a low rating.", 0),  # whose value it is cannot be told
        ("name : Rook | priceRange : low", "Rook has high prices.", 1),
        ("name : Rook | customer rating : high", "Rook has low prices and a low rating.", 1),
        ("name : Rook | priceRange : £20-25", "Rook costs £ 20 - 25 .", 0),
        ("name : Rook", "Rook costs £ 20 - 25 .", 1),
        ("name : Rook", "Rook is family-friendly.", 1),
        ("name : Rook", "Rook is not family-friendly.", 1),
        ("name : Rook", "Rook, yes, has no parking.", 0),
        ("name : Rook | familyFriendly : yes", "Rook is family-friendly.", 0),
        ("name : Rook | familyFriendly : yes", "Rook is not family-friendly.", 1),
        ("name : Rook | family friendly : no", "Rook is not family-friendly.", 0),
    ],
)
def test_slot_errors(meaning, text, errors):
    perfect = ["Rook, a pub, has Indian food at high prices and a low rating. It is family-friendly."]
    perfect += ["Old Mill, a coffee shop, has Thai food at £20-25 and a high rating.", "Near Raja Indian Cuisine, low."]
    assert text_scores.slot_error_rate(perfect, OTHERS) == 0
    slots = sum(len(e2e.slots(each)) for each in (meaning, *OTHERS))
    assert text_scores.slot_error_rate([text, *perfect], [meaning, *OTHERS]) == errors / slots


def test_family_statements_are_no_error_where_no_meaning_has_the_slot():
    assert text_scores.slot_error_rate(["Rook is family-friendly."], ["name : Rook"]) == 0


def test_shipped_references_mention_every_value():
    meanings, texts = zip(*e2e.read_pairs(DATA / "test.txt"), strict=True)
    assert text_scores.slot_share(texts, meanings) == 1.0


@needs_real_data
def test_people_mention_most_but_not_all_slot_values():
    """The reference point of the slot scores: neither near zero (a broken matcher) nor perfect."""
    meanings, texts = zip(*e2e.read_pairs(REAL_DATA / "test.txt"), strict=True)
    share, errors = text_scores.slot_share(texts, meanings), text_scores.slot_error_rate(texts, meanings)
    assert 0.6 < share < 0.95
    # Few values are added, some missing ones are replaced.
    assert 1 - share <= errors < 1.2 * (1 - share)


# Distinct n-grams


def test_distinct_ngrams(scores):
    words = [["a", "b", "a"], ["a", "b"], []]
    assert text_scores.distinct(words, 1) == 2 / 5
    assert text_scores.distinct(words, 2) == 2 / 3  # a b, b a, a b
    assert text_scores.distinct([["a"], []], 2) == 0
    words = [e2e_scorer.mteval_tokens(text) for text in TEXTS]
    assert words[0][-2:] == ["town", "."] and words[4][0] == "the"
    assert (scores["distinct_1"], scores["distinct_2"]) == tuple(text_scores.distinct(words, n) for n in (1, 2))


# All scores of a system, intervals, wins


def test_scores_have_their_scales_and_say_how_they_are_made(scores):
    assert set(scores) == {*text_scores.METRICS, "distinct_1", "distinct_2", "sacrebleu", "signature", "not_measured"}
    statistics = mteval(TEXTS, REFERENCES)
    assert (scores["bleu"], scores["nist"]) == (statistics["bleu"], statistics["nist"])
    assert scores["slot_share"] == text_scores.slot_share(TEXTS, MEANINGS)
    assert scores["slot_error_rate"] == text_scores.slot_error_rate(TEXTS, MEANINGS)
    assert (scores["sacrebleu"], scores["signature"]["sacrebleu"]) == text_scores.bleu(TEXTS, REFERENCES)
    assert f"case:lc|eff:yes|tok:13a|smooth:exp|version:{sacrebleu.__version__}" == scores["signature"]["bleu"]
    assert MISSING is not None or not scores["not_measured"]
    json.dumps(scores, allow_nan=False)


@pytest.mark.parametrize(
    "texts, references, meanings, message",
    [
        ([], [], [], "0 texts, 0 lists of references, 0 meanings"),
        (["a"], [["a"], ["b"]], ["name : a"], "1 texts, 2 lists of references, 1 meanings"),
        (["a"], [["a"]], ["name : a", "name : b"], "1 texts, 1 lists of references, 2 meanings"),
        (["a"], [[]], ["name : a"], "without references"),
        (["a"], [["a", " "]], ["name : a"], "an empty reference"),
    ],
)
def test_what_cannot_be_scored(texts, references, meanings, message):
    for function in (text_scores.score, text_scores.per_sentence):
        with pytest.raises(ValueError, match=message):
            function(texts, references, meanings)
    with pytest.raises(ValueError, match=message) if meanings else pytest.raises(ZeroDivisionError):
        text_scores.bootstrap({"a": texts}, references, meanings)


def test_sentences_are_scored_as_if_alone():
    each = text_scores.per_sentence(TEXTS, REFERENCES, MEANINGS)
    for i, (text, refs) in enumerate(zip(TEXTS, REFERENCES, strict=True)):
        alone = sacrebleu.sentence_bleu(text, refs, lowercase=True).score
        assert each["bleu"][i] == pytest.approx(alone, abs=1e-9)
        mentioned = text_scores.slot_share(TEXTS[i : i + 1], MEANINGS[i : i + 1])
        assert each["slot_share"][i] == mentioned
    assert len(each["nist"]) == len(TEXTS) and each["nist"][6] == 0


def drawn_meanings(seed):
    """The meanings of the first resample, each as often as it is drawn."""
    counts = np.random.default_rng(seed).multinomial(len(MEANINGS), [1 / len(MEANINGS)] * len(MEANINGS), size=1)[0]
    return [i for i, count in enumerate(counts) for _ in range(count)]


def test_a_resample_is_scored_as_a_corpus_of_its_texts():
    """With one resample both ends of the interval are its score: that of a corpus in which meanings are repeated."""
    drawn = drawn_meanings(seed=0)
    assert len(set(drawn)) < len(drawn) == len(MEANINGS)
    texts, references, meanings = ([values[i] for i in drawn] for values in (TEXTS, REFERENCES, MEANINGS))
    ends = text_scores.bootstrap({"a": TEXTS}, REFERENCES, MEANINGS, resamples=1, seed=0)["systems"]["a"]
    assert all(value is None or value[0] == value[1] for value in ends.values())
    assert ends["bleu"][0] == pytest.approx(mteval(texts, references)["bleu"], abs=1e-9)
    assert ends["slot_share"][0] == text_scores.slot_share(texts, meanings)
    each = text_scores.per_sentence(TEXTS, REFERENCES, MEANINGS)
    counts = [len(e2e.slots(meaning)) for meaning in MEANINGS]
    errors = sum(each["slot_error_rate"][i] * counts[i] for i in drawn)  # which values there are is a matter of all
    assert ends["slot_error_rate"][0] == pytest.approx(errors / sum(counts[i] for i in drawn))
    if MISSING is None:
        for name in ("rouge_l", "cider"):
            assert ends[name][0] == pytest.approx(np.mean([each[name][i] for i in drawn]))
        meteor = e2e_scorer.ptb_statistics(texts, references)["meteor"]
        assert ends["meteor"][0] == pytest.approx(meteor.score(meteor.rows.sum(axis=0, keepdims=True))[0])


def test_a_resample_keeps_the_information_of_all_references():
    """Of four words "d" is one and "a" three: log2(4/1) and log2(4/3), whichever of the meanings are drawn."""
    texts, references, meanings = ["a", "d"], [["a a a"], ["d"]], ["name : a", "name : d"]
    values = set()
    for seed in range(10):
        ends = text_scores.bootstrap({"x": texts}, references, meanings, resamples=1, seed=seed)["systems"]["x"]["nist"]
        values.add(round(ends[0], 9))
    penalty = [math.exp(math.log(0.5) * (math.log(ratio) / math.log(1.5)) ** 2) for ratio in (1 / 3, 2 / 4, 1)]
    rare, common = 2.0, math.log2(4 / 3)
    assert values == {round(penalty[0] * common, 9), round(penalty[1] * (common + rare) / 2, 9), rare}


def test_intervals_are_fixed_by_the_seed_and_paired():
    systems = {"first": TEXTS, "second": BETTER, "third": TEXTS}
    found = text_scores.bootstrap(systems, REFERENCES, MEANINGS, resamples=400, seed=3)
    assert found == text_scores.bootstrap(systems, REFERENCES, MEANINGS, resamples=400, seed=3)
    other = text_scores.bootstrap(systems, REFERENCES, MEANINGS, resamples=400, seed=4)
    assert found["systems"]["first"]["bleu"] != other["systems"]["first"]["bleu"]
    assert (found["resamples"], found["seed"]) == (400, 3)
    assert list(found["differences"]) == ["second - first", "third - first", "third - second"]
    scores = text_scores.score(TEXTS, REFERENCES, MEANINGS)
    for name in text_scores.METRICS:
        if scores[name] is None:
            continue
        low, high = found["systems"]["first"][name]
        assert low < scores[name] < high, name
        assert found["differences"]["third - first"][name] == [0, 0]
        # The same resamples for both: narrower than of two systems drawn apart.
        first, second, between = (np.ptp(found["systems"][s][name]) for s in ("first", "second", "third"))
        assert np.ptp(found["differences"]["second - first"][name]) < np.hypot(first, max(second, between)) * 1.2, name
    one = text_scores.bootstrap(systems, REFERENCES, MEANINGS, resamples=1, seed=3)
    for name in ("bleu", "nist", "slot_error_rate"):
        first, second = (one["systems"][system][name][0] for system in ("first", "second"))
        assert one["differences"]["second - first"][name][0] == second - first != 0
    json.dumps(found, allow_nan=False)


def test_wins_count_fewer_errors_as_better():
    blank = dict.fromkeys(text_scores.METRICS)
    first = blank | {"bleu": [1.0, 2.0, 3.0, 3.0], "slot_error_rate": [0.0, 0.5, 0.5, 0.1]}
    second = blank | {"bleu": [2.0, 1.0, 1.0, 3.0], "slot_error_rate": [0.5, 0.0, 0.0, 0.0]}
    assert text_scores.wins(first, second) == blank | {
        "bleu": {"first": 0.5, "second": 0.25, "tie": 0.25},
        "slot_error_rate": {"first": 0.25, "second": 0.75, "tie": 0.0},
    }


# Prediction files

ASKED = ["name : A", "name : B | food : C"]
GOOD_FILES = {
    "one text to a line": "Text of A .\n B , with C \n",
    "no newline at the end": "Text of A .\nB , with C",
    "the other line ends and a mark of UTF-8": b"\xef\xbb\xbfText of A .\r\nB , with C\r\n",
    "by meaning, in another order": "name : B | food : C||B , with C\nname : A|| Text of A . \n",
    "JSONL": '{"text": "B , with C", "meaning": "name : B | food : C", "n": 1}\n'
    '{"meaning": "name : A", "text": "Text of A ."}',
}


def written(folder, content):
    path = folder / "texts"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("content", GOOD_FILES.values(), ids=GOOD_FILES)
def test_prediction_files(tmp_path, content):
    assert text_scores.read_predictions(written(tmp_path, content), ASKED) == ["Text of A .", "B , with C"]


@pytest.mark.parametrize(
    "content, texts",
    [
        ("a\u2028b\x85c\n\n", ["a\u2028b\x85c", ""]),
        ("name : A||\nname : B | food : C||x || y\n", ["", "x || y"]),
        ('{"meaning": "name : A", "text": ""}\n{"meaning": "name : B | food : C", "text": "x\\ny"}', ["", "x\ny"]),
    ],
)
def test_texts_may_be_empty_or_odd(tmp_path, content, texts):
    assert text_scores.read_predictions(written(tmp_path, content), ASKED) == texts


@pytest.mark.parametrize(
    "content, message",
    [
        ("", ": the file is empty; expected are texts for 2 meanings"),
        ("a\n", ", line 1: the file ends after 1 texts, expected is one for each of the 2 distinct meanings"),
        ("a\nb\nc\n", ", line 3: the file ends after 3 texts"),
        (b"a\nb\xe9\n", ", line 2: not UTF-8"),
        ("name : A||a\nb\n", ", line 2: no `||`, but the first line has one"),
        ("name : A||a\nname : D||b\n", ", line 2: the meaning 'name : D' is none of the 2 to be scored"),
        ("name : A||a\nname : A||b\n", ", line 2: a second text for 'name : A'"),
        (
            "name : A||a\n",
            ", line 1: the file ends without a text for 1 of the 2 meanings, the first of them 'name : B",
        ),
        ('{"meaning": "name : A", "text": "a"}\nname : B', ", line 2: no JSON (Expecting value)"),
        ('{"meaning": "name : A"}\n', ', line 1: \'{"meaning": "name : A"}\'; expected is {"meaning": '),
        ('{"meaning": "name : A", "text": null}\n', ", line 1: "),
        ('{"meaning": "name : A", "text": "a"}\n["name : B | food : C", "b"]\n', ", line 2: "),
        ('{"meaning": "name : A", "text": "a"}\n', ", line 1: the file ends without a text for 1 of the 2"),
        ('{"meaning": "name : D", "text": "a"}\n', ", line 1: the meaning 'name : D' is none of"),
    ],
)
def test_ill_formed_prediction_files_are_named_with_their_line(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(cli.UserError) as error:
        text_scores.read_predictions(path, ASKED)
    assert str(error.value).startswith(f"{path}{message}")


def test_a_missing_prediction_file(tmp_path):
    with pytest.raises(cli.UserError, match="nothing.txt: no such file of predictions; run_inference.py --output_file"):
        text_scores.read_predictions(tmp_path / "nothing.txt", ASKED)
