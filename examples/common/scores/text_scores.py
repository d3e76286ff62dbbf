"""Scores of generated texts: the official E2E metrics, slot values mentioned, missing and made up, distinct n-grams."""

import functools
import itertools
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
from sacrebleu.metrics import BLEU

from common.cli import UserError, as_user_error
from common.data.e2e import slots
from common.data.lines import decoded
from common.scores import e2e_scorer
from common.scores.e2e_scorer import PTB_METRICS, Statistics
from common.scores.intervals import differences, intervals

METRICS = ("bleu", "nist", "meteor", "rouge_l", "cider", "slot_error_rate", "slot_share")
LOWER_IS_BETTER = ("slot_error_rate",)

FAMILY = r"(?:famil(?:y|ies)|child(?:ren)?|kids?)"
FRIENDLY = r"(?:friendly|welcome)"
NEGATION = r"(?:\b(?:not|non|no|never)|n ?['’]t)"
# Up to two words may stand between the parts ("not a very family friendly", "children are always welcome"), but no
# "and" or "but": in "not cheap and family friendly" the negation is about something else.
BETWEEN = r"(?: (?!and\b|but\b)\w+){0,2} "
FAMILY_FRIENDLY = re.compile(rf"\b{FAMILY}{BETWEEN}{FRIENDLY}\b")
NOT_FAMILY_FRIENDLY = re.compile(
    rf"{NEGATION}{BETWEEN}{FAMILY}{BETWEEN}{FRIENDLY}\b|\b{FAMILY}(?: \w+)? (?:not|never) {FRIENDLY}\b"
)
FAMILY_SLOTS = ("family friendly", "familyfriendly", "kids friendly")


def score(texts, references, meanings):
    """The scores of texts, one for each meaning, which has a list of references.

    As the paper prints them: "bleu", "meteor" and "rouge_l" from 0 to 100; "nist" and "cider" as they are. Then
    "slot_error_rate" and "slot_share"; "distinct_1" and "distinct_2", the share of the 1- and 2-grams of all texts that
    are different ones; "sacrebleu", the BLEU where case counts. "signature" says how each is made, and "not_measured"
    why a score is None.
    """
    statistics, not_measured = _statistics(texts, references, meanings)
    scores = {name: None if name in not_measured else float(of_corpus(statistics[name])) for name in METRICS}
    scores["sacrebleu"], signature = bleu(texts, references)
    words = [e2e_scorer.mteval_tokens(text) for text in texts]
    return {
        **scores,
        "distinct_1": distinct(words, 1),
        "distinct_2": distinct(words, 2),
        "signature": {**e2e_scorer.SIGNATURES, "sacrebleu": signature},
        "not_measured": not_measured,
    }


def per_sentence(texts, references, meanings):
    """{metric: its value for each text}, None where it is not measured.

    The BLEU of a sentence is sacrebleu's smoothed one; NIST and CIDEr weigh n-grams by all references of all meanings.
    """
    statistics, not_measured = _statistics(texts, references, meanings)
    return {
        name: None if name in not_measured else statistics[name].score(statistics[name].rows).tolist()
        for name in METRICS
    }


def wins(first, second):
    """{metric: the shares of the meanings on which "first" and "second" are better, and "tie"}, from per_sentence."""
    shares = {}
    for name in METRICS:
        if first[name] is None or second[name] is None:
            shares[name] = None
            continue
        difference = np.subtract(first[name], second[name]) * (-1 if name in LOWER_IS_BETTER else 1)
        shares[name] = {
            "first": float((difference > 0).mean()),
            "second": float((difference < 0).mean()),
            "tie": float((difference == 0).mean()),
        }
    return shares


def bootstrap(texts_by_system, references, meanings, resamples=1000, seed=110):
    """95% intervals over resamples of the meanings (Koehn 2004): of each system, and of each later minus each earlier.

    Every resample is drawn once for all systems and scored from sums of the statistics of its texts, which is exact for
    all metrics, METEOR's program included, with one convention: the information of n-grams (NIST) and their document
    frequencies (CIDEr) stay those of all references, the measure that is not resampled. Distinct n-grams have no
    interval: a resample repeats texts, and so has fewer of them than any sample of that size.
    """
    generator = np.random.default_rng(seed)
    count = len(meanings)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
    values = {}
    for system, texts in texts_by_system.items():
        statistics, not_measured = _statistics(texts, references, meanings)
        values[system] = {
            name: None if name in not_measured else statistics[name].score(drawn @ statistics[name].rows)
            for name in METRICS
        }
    return {
        "resamples": resamples,
        "seed": seed,
        "systems": intervals(values),
        "differences": intervals(differences(values)),
    }


def bleu(texts, references):
    """(BLEU from 0 to 100, sacrebleu's signature) of texts that have a list of references each.

    Tokenised as mteval-v13a does, which leaves the already tokenised E2E texts alone but for rare cases and does not
    favour a model for where it puts spaces. The case counts: that alone is other than in the "bleu" of `score`.
    """
    if not texts:
        raise ValueError("no texts to score")
    # sacrebleu wants the i-th reference of every text in the i-th list; None where a text has fewer. An empty string
    # would count as a reference of no words and wrongly take part in the brevity penalty.
    most = max(map(len, references))
    columns = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    metric = BLEU(tokenize="13a", force=True)  # force: no warning about " ." at the end of tokenised texts
    score = metric.corpus_score(texts, columns).score
    return score, str(metric.get_signature())


def distinct(texts, order):
    """The share of the n-grams of an order in all texts, lists of words, that are different ones; 0 without any."""
    grams = [gram for words in texts for gram in e2e_scorer.ngrams(words, order) if len(gram) == order]
    return len(set(grams)) / len(grams) if grams else 0.0


def slot_share(texts, meanings):
    """The share of all slot values of the meanings that the texts mention, from 0 to 1.

    A value counts as mentioned where it stands literally, whatever the case, hyphens and spaces. `family friendly`
    counts by a phrase: with a negation for "no", without one for "yes". A value of two slots counts for both.
    """
    return float(of_corpus(_slot_statistics(texts, meanings)["slot_share"]))


def slot_error_rate(texts, meanings):
    """Errors over the number of slots of the meanings, 0 at best: values missing, replaced or added.

    As in Dusek, Howcroft and Rieser 2019, but for literal mentions (`slot_share`): a value that is not mentioned is an
    error; and so is a value that the text mentions beside those of its meaning, unless it replaces a missing value of
    the same slot, which is one error together. The values that can be added are those of all slots of all `meanings`;
    for `family friendly` any statement about it. People's texts err too, by this count: compare with theirs.
    """
    return float(of_corpus(_slot_statistics(texts, meanings)["slot_error_rate"]))


def read_predictions(path, meanings):
    """The texts of a prediction file in the order of the distinct meanings.

    One text to a line in that order; or lines `meaning||text`; or JSONL with "meaning" and "text", as run_inference.py
    writes it. The first line tells which. Texts may be empty.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of predictions; run_inference.py --output_file writes one")
    expected = f"are texts for {len(meanings)} meanings"
    with as_user_error(OSError):
        content = path.read_bytes()
    lines = [(line.strip(), where) for line, where in decoded(content, path, expected)]
    first = lines[0][0]
    if first.startswith("{"):
        return _by_meaning(path, [(*_json_pair(line, where), where) for line, where in lines], meanings)
    if "||" in first:
        return _by_meaning(path, [(*_line_pair(line, where), where) for line, where in lines], meanings)
    if len(lines) != len(meanings):
        raise UserError(
            f"{path}, line {len(lines)}: the file ends after {len(lines)} texts, expected is one for each of the "
            f"{len(meanings)} distinct meanings; or write lines `meaning||text`"
        )
    return [line for line, _ in lines]


def _line_pair(line, where):
    meaning, bars, text = line.partition("||")
    if not bars:
        raise UserError(f"{where}: no `||`, but the first line has one; expected is `meaning||text` in every line")
    return meaning.strip(), text.strip()


def _json_pair(line, where):
    expected = 'expected is {"meaning": "...", "text": "..."} in every line'
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: no JSON ({error.msg}); {expected}") from error
    pair = [record.get(key) for key in ("meaning", "text")] if isinstance(record, dict) else [None]
    if not all(isinstance(part, str) for part in pair):
        raise UserError(f"{where}: {line[:80]!r}; {expected}")
    return [part.strip() for part in pair]


def _by_meaning(path, triples, meanings):
    texts = {}
    known = set(meanings)
    for meaning, text, where in triples:
        if meaning not in known:
            raise UserError(f"{where}: the meaning {meaning!r} is none of the {len(meanings)} to be scored")
        if meaning in texts:
            raise UserError(f"{where}: a second text for {meaning!r}; expected is one for each distinct meaning")
        texts[meaning] = text
    missing = [meaning for meaning in meanings if meaning not in texts]
    if missing:
        raise UserError(
            f"{path}, line {len(triples)}: the file ends without a text for {len(missing)} of the {len(meanings)} "
            f"meanings, the first of them {missing[0]!r}"
        )
    return [texts[meaning] for meaning in meanings]


def _statistics(texts, references, meanings):
    """({metric: Statistics}, {metric: why it is not measured})."""
    if not len(texts) == len(references) == len(meanings) > 0:
        raise ValueError(
            f"{len(texts)} texts, {len(references)} lists of references, {len(meanings)} meanings to score"
        )
    if not all(refs and all(ref.strip() for ref in refs) for refs in references):
        raise ValueError("a meaning without references, or an empty reference")
    return _measured(tuple(texts), tuple(map(tuple, references)), tuple(meanings))


@functools.lru_cache(maxsize=8)  # score, per_sentence and bootstrap of the same texts start METEOR once
def _measured(texts, references, meanings):
    statistics = e2e_scorer.mteval_statistics(texts, references) | _slot_statistics(texts, meanings)
    missing = e2e_scorer.missing_for_ptb()
    if missing is None:
        return statistics | e2e_scorer.ptb_statistics(texts, references), {}
    return statistics, {key: f"not measured: {name} needs {missing}" for key, name in PTB_METRICS.items()}


def of_corpus(statistics):
    """The score of all texts together, of the `e2e_scorer.Statistics` of one metric."""
    return statistics.score(statistics.rows.sum(axis=0, keepdims=True))[0]


def _slot_statistics(texts, meanings):
    """{"slot_share": mentioned values and slots, "slot_error_rate": errors and slots} of each text."""
    meanings = [[(_normalised(slot), _normalised(value)) for slot, value in slots(meaning)] for meaning in meanings]
    slots_of_value = {}
    for slot, value in itertools.chain(*meanings):
        slots_of_value.setdefault(value, set()).add(slot)
    rows = []
    for text, meaning in zip(texts, meanings, strict=True):
        text = _normalised(text)
        missing = [slot for slot, value in meaning if not _mentions(text, slot, value)]
        added = _added(text, meaning, missing, slots_of_value)
        rows.append([len(meaning) - len(missing), len(missing) + added, len(meaning)])
    rows = np.array(rows, dtype=float)
    return {
        "slot_share": Statistics(rows[:, [0, 2]], e2e_scorer.ratio),
        "slot_error_rate": Statistics(rows[:, [1, 2]], e2e_scorer.ratio),
    }


def _added(text, meaning, missing, slots_of_value):
    """How many values the text mentions beside those of its meaning and those in place of a missing one."""
    family_is_a_slot = any(slot in FAMILY_SLOTS for values in slots_of_value.values() for slot in values)
    family_is_meant = any(slot in FAMILY_SLOTS for slot, _ in meaning)
    added = int(family_is_a_slot and not family_is_meant and _family(text) is not None)
    unreplaced = list(missing)
    own = {value for _, value in meaning}
    # Longer values first, and each taken out: "Raja Indian Cuisine" is no Indian food.
    for value in sorted(slots_of_value.keys() - {"yes", "no"}, key=len, reverse=True):
        text, mentions = _literal(value).subn("|", text)
        if not mentions or value in own:
            continue
        replaced = next((slot for slot in unreplaced if slot in slots_of_value[value]), None)
        if replaced is None:
            added += 1
        else:
            unreplaced.remove(replaced)
    return added


def _mentions(text, slot, value):
    if slot in FAMILY_SLOTS and value in ("yes", "no"):
        return _family(text) == value
    return _literal(value).search(text) is not None


def _family(text):
    """What a text says about families: "yes", "no" or None."""
    if NOT_FAMILY_FRIENDLY.search(text):
        return "no"
    return "yes" if FAMILY_FRIENDLY.search(text) else None


@functools.cache
def _literal(value):
    return re.compile(rf"(?<!\w){re.escape(value)}(?!\w)")


def _normalised(text):
    text = unicodedata.normalize("NFKC", text).casefold()
    # "£20-25" in the CSV form is "£ 20 - 25" in the other.
    return " ".join(re.sub(r"[-‐-―]", " ", text).replace("£", "£ ").split())
