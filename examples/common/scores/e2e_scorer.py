"""BLEU, NIST, METEOR, ROUGE-L and CIDEr as the official E2E scorer defines them, `measure_scores.py -p` of
github.com/tuetschek/e2e-metrics, which is what the LoRA repository runs too.

Each metric is a table of statistics with a row for each text and a function from sums of rows to scores. So the score
of a corpus, of one text and of a resample are the same function: of the sum of all rows, of a row, of a weighted sum.

- BLEU and NIST count the n-grams of mteval-v13a's tokens in lower case. The scorer's default, a Perl script, differs
  in NIST's brevity penalty, which takes the average reference length over all references, not over the meanings: that
  matters where their number varies and the texts are short. Texts of fewer words than an n-gram, and orders without a
  match, are counted as the Perl script counts them; the Python one lets the former take n-grams from other texts.
- METEOR 1.5, ROUGE-L and CIDEr (the clipped variant CIDEr-D, sigma 6) take the PTB tokens of Stanford CoreNLP 3.4.1 in
  lower case without punctuation. The tokenizer and METEOR are Java programs, shipped in the package pycocoevalcap.
"""

import dataclasses
import importlib.util
import math
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sacrebleu
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from common.cli import UserError

# effective_order only defines the BLEU of fewer than four words, where mteval and sacrebleu part; force: no warning
# about " ." at the end of tokenised texts.
MTEVAL_BLEU = BLEU(lowercase=True, tokenize="13a", effective_order=True, force=True)
NIST_ORDER = 5
# The brevity penalty is one half where a text has two thirds of the words of its average reference.
NIST_BETA = math.log(2) / math.log(1.5) ** 2
# METEOR 1.5 for English (Denkowski and Lavie 2014, table 1): what matches of each stage (exact, stem, synonym,
# paraphrase) weigh, content against function words (delta), recall against precision (alpha), and the penalty of order.
METEOR_STAGES, METEOR_DELTA, METEOR_ALPHA, METEOR_GAMMA, METEOR_BETA = (1.0, 0.6, 0.8, 0.6), 0.75, 0.85, 0.6, 0.2
PTB_METRICS = {"meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr"}
SIGNATURES = {
    "bleu": f"case:lc|eff:yes|tok:13a|smooth:exp|version:{sacrebleu.__version__}",  # as sacrebleu writes its own
    "nist": "mteval-v13a tokens|lower case|5-grams|average reference length of each meaning",
    "meteor": "METEOR 1.5 -l en -norm|PTB tokens",
    "rouge_l": "pycocoevalcap|PTB tokens|beta 1.2|best precision and best recall",
    "cider": "pycocoevalcap|PTB tokens|CIDEr-D, sigma 6|document frequencies of the references",
}


@dataclasses.dataclass(frozen=True)
class Statistics:
    rows: np.ndarray  # (texts, what the metric adds up)
    score: Callable[[np.ndarray], np.ndarray]  # (n, what the metric adds up) -> (n,)


def mteval_statistics(texts, references):
    """{"bleu": ..., "nist": ...} of texts that have a list of references each."""
    return {
        "bleu": Statistics(_bleu_rows(texts, references), _bleu),
        "nist": Statistics(_nist_rows(texts, references), _nist),
    }


def ptb_statistics(texts, references):
    """{"meteor": ..., "rouge_l": ..., "cider": ...} of texts that have a list of references each."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    tokenised = iter(_ptb_tokens([*texts, *(ref for refs in references for ref in refs)]))
    texts = {i: [next(tokenised)] for i in range(len(texts))}
    references = {i: [next(tokenised) for _ in refs] for i, refs in enumerate(references)}
    _, rouge = Rouge().compute_score(references, texts)
    _, cider = Cider().compute_score(references, texts)
    return {
        "meteor": Statistics(_meteor_rows(texts, references), _meteor),
        "rouge_l": Statistics(np.column_stack([100 * rouge, np.ones(len(texts))]), ratio),
        "cider": Statistics(np.column_stack([cider, np.ones(len(texts))]), ratio),
    }


def missing_for_ptb():
    """What METEOR, ROUGE-L and CIDEr need and this machine lacks, or None."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "the package pycocoevalcap (pip install pycocoevalcap)"
    try:
        subprocess.run(["java", "-version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "Java 8 or newer, the command `java` (for example apt install default-jre-headless)"
    return None


def mteval_tokens(text):
    """The tokens of mteval-v13a in lower case."""
    return Tokenizer13a()(text.lower()).split()


def ngrams(tokens, order):
    """All n-grams up to an order."""
    return [tuple(tokens[i : i + n]) for n in range(1, order + 1) for i in range(len(tokens) - n + 1)]


def ratio(sums):
    """The first column over the second."""
    return sums[:, 0] / sums[:, 1]


def _bleu_rows(texts, references):
    scores = [MTEVAL_BLEU.sentence_score(text, refs) for text, refs in zip(texts, references, strict=True)]
    return np.array([[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in scores])


def _bleu(sums):
    return np.array(
        [
            BLEU.compute_bleu(
                correct=row[2:6],
                total=row[6:],
                sys_len=row[0],
                ref_len=row[1],
                smooth_method="exp",
                effective_order=True,
            ).score
            for row in sums.tolist()
        ]
    )


def _nist_rows(texts, references):
    """Information gained by the matched n-grams of each order, n-grams of each order, average reference length."""
    references = [[mteval_tokens(ref) for ref in refs] for refs in references]
    grams = [[Counter(ngrams(ref, NIST_ORDER)) for ref in refs] for refs in references]
    seen = Counter()
    for refs in grams:
        for ref in refs:
            seen.update(ref)
    seen[()] = sum(len(ref) for refs in references for ref in refs)
    rows = []
    for text, refs, ref_grams in zip(texts, references, grams, strict=True):
        words = mteval_tokens(text)
        most = Counter()
        for ref in ref_grams:
            most |= ref
        gained = [0.0] * NIST_ORDER
        for gram, count in (Counter(ngrams(words, NIST_ORDER)) & most).items():
            # The information of a gram's last word after the others (Doddington 2002, equation 2).
            gained[len(gram) - 1] += count * math.log2(seen[gram[:-1]] / seen[gram])
        possible = [max(len(words) - n, 0) for n in range(NIST_ORDER)]
        rows.append([*gained, *possible, sum(map(len, refs)) / len(refs)])
    return np.array(rows)


def _nist(sums):
    gained, possible, length = sums[:, :NIST_ORDER], sums[:, NIST_ORDER:-1], sums[:, -1]
    with np.errstate(divide="ignore"):  # no words at all: the penalty is exp(-infinity)
        penalty = np.exp(-NIST_BETA * np.log(np.minimum(possible[:, 0] / length, 1)) ** 2)
    return penalty * (gained / np.maximum(possible, 1)).sum(axis=1)


def _meteor_rows(texts, references):
    from pycocoevalcap.meteor import meteor

    # The tokenizer has split any `|||` of a text, which separates the fields here.
    lines = [" ||| ".join(["SCORE", *references[i], *texts[i]]) for i in texts]
    jar = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
    output = _java(["-Xmx2G", "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm"], lines)
    rows = np.array([[float(number) for number in line.split()] for line in output])
    words, chunks, matches = rows[:, 0:2], rows[:, 20], rows[:, 21:23]
    # The program counts no chunk of a text that equals a reference, alone and in the sums of a corpus.
    rows[(matches == words).all(axis=1) & (chunks == 1), 20] = 0
    return rows


def _meteor(sums):
    """METEOR of the statistics that its program prints for `SCORE`, as the program itself computes it for `EVAL`.

    They add up, so this is the program's own score of a corpus too. Columns: words and function words of text and
    reference; for each stage the matched content words, then function words, of text and reference; chunks; matches.
    """
    words, function_words, chunks, matches = sums[:, 0:2], sums[:, 2:4], sums[:, 20], sums[:, 21:23]
    content, function = np.moveaxis(sums[:, 4:20].reshape(len(sums), 4, 2, 2), 2, 0)
    matched = np.einsum("s,nsk->nk", METEOR_STAGES, METEOR_DELTA * content + (1 - METEOR_DELTA) * function)
    possible = METEOR_DELTA * (words - function_words) + (1 - METEOR_DELTA) * function_words
    with np.errstate(divide="ignore", invalid="ignore"):  # without a match the score is 0
        precision, recall = (matched / possible).T
        mean = 1 / ((1 - METEOR_ALPHA) / precision + METEOR_ALPHA / recall)
        score = mean * (1 - METEOR_GAMMA * (chunks / matches.mean(axis=1)) ** METEOR_BETA)
    return 100 * np.where(matches.all(axis=1), score, 0)


def _ptb_tokens(texts):
    """The texts as PTB tokens in lower case without punctuation, joined by spaces.

    The package's own wrapper does the same through a file in its installed folder and leaves the program's chatter on
    the terminal.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    arguments = ["-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    # The tokenizer would end a line at other white space too, such as a vertical tab.
    output = _java(arguments, [" ".join(text.split()) for text in texts])
    punctuation = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in punctuation) for line in output]


def _java(arguments, lines):
    """What a Java program answers to each line."""
    text = "".join(f"{line}\n" for line in lines)
    process = subprocess.run(["java", *map(str, arguments)], input=text, capture_output=True, encoding="utf-8")
    output = process.stdout.removesuffix("\n").split("\n")
    if process.returncode or len(output) != len(lines):
        raise UserError(
            f"java {' '.join(map(str, arguments))}: status {process.returncode}, {len(output)} lines for {len(lines)}: "
            f"{process.stderr.strip()[-500:]}"
        )
    return output
