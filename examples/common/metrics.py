"""Scores of generated texts: corpus BLEU and the share of slot values that are mentioned."""

import re
import unicodedata

from sacrebleu.metrics import BLEU

from common.e2e import slots

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


def bleu(texts, references):
    """(BLEU from 0 to 100, sacrebleu's signature) of texts that have a list of references each.

    Tokenised as mteval-v13a does, which leaves the already tokenised E2E texts alone but for rare cases and does not
    favour a model for where it puts spaces; the case counts.
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


def slot_share(texts, meanings):
    """The share of all slot values of the meanings that the texts mention, from 0 to 1.

    A value counts as mentioned where it stands literally, whatever the case, hyphens and spaces. `family friendly`
    counts by a phrase: with a negation for "no", without one for "yes". A value of two slots counts for both.
    """
    mentioned = [
        _mentions(text, *slot) for text, meaning in zip(texts, meanings, strict=True) for slot in slots(meaning)
    ]
    return sum(mentioned) / len(mentioned)


def _mentions(text, slot, value):
    text, value = _normalised(text), _normalised(value)
    if _normalised(slot) in ("family friendly", "familyfriendly", "kids friendly") and value in ("yes", "no"):
        if NOT_FAMILY_FRIENDLY.search(text):
            return value == "no"
        return value == "yes" and bool(FAMILY_FRIENDLY.search(text))
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None


def _normalised(text):
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[-‐-―]", " ", text).split())
