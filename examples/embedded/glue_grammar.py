"""The grammar behind the GLUE-style data of the NLU example and the text on which its encoder is pretrained.

Everything is synthetic. Five of the pair tasks and the similarity task speak of one thing: a subject and facts
about it, each fact said in one of four ways and asked in one of four. `TASKS` makes labelled examples, whose labels
follow a rule; `with_noise` then changes some of them. `page` gives unlabelled text: facts told twice, questions with
their answers, reviews, plain sentences.

What is held out for "dev" and "tune": names (no subject of dev is one of train), and wordings (which two ways of
saying or asking one fact meet in an example). Pretraining sees every word and every way, and no text of the two.
"""

from typing import NamedTuple

import grammar
from grammar import COLOUR, CREATURE, FIRST, HEAD, RULES, TAIL, polish, words

ALL_TOWNS = [head + TAIL[(3 * i) % len(TAIL)] for i, head in enumerate(HEAD)]
TOWNS, PEOPLE = ALL_TOWNS[:8], FIRST[:8]
PAINT = words("red blue green white yellow black grey pink")
YEARS = [str(year) for year in range(1902, 2018, 15)]
HOURS = [f"{hour} {half}" for half in ("am", "pm") for hour in (7, 8, 9, 10)]
MONEY = [f"£ {amount}" for amount in (2, 3, 5, 8, 10, 12, 15, 20)]

# relation: its values; four ways to say it, those without {x} behind the subject; four ways to ask for it
RELATIONS = {
    "owner": (
        PEOPLE,
        "is run by {v}|belongs to {v}|has {v} as its owner|{v} runs {x}",
        "who runs {x}|who is the owner of {x}|to whom does {x} belong|in whose hands is {x}",
    ),
    "place": (
        TOWNS,
        "is in {v}|stands in {v}|is located in {v}|{v} is the home of {x}",
        "where is {x}|in which town does {x} stand|what is the location of {x}|where can I find {x}",
    ),
    "opened": (
        YEARS,
        "was founded in {v}|opened in {v}|has existed since {v}|{v} was the first year of {x}",
        "when was {x} founded|in which year did {x} open|since when has {x} existed|how old is {x}",
    ),
    "hours": (
        HOURS,
        "opens at {v}|starts the day at {v}|lets people in from {v}|at {v} the doors of {x} open",
        "at what time does {x} open|when do the doors of {x} open|from what time can I enter {x}|"
        "how early does {x} start",
    ),
    "paint": (
        PAINT,
        "is painted {v}|has a {v} front|is all in {v}|{v} is the colour of {x}",
        "how is {x} painted|what is the colour of {x}|which colour has {x}|what colour are the walls of {x}",
    ),
    "goods": (
        [item + "s" for item in RULES["item"][:8]],
        "sells {v}|deals in {v}|has {v} in stock|you can buy {v} at {x}",
        "what does {x} sell|in what does {x} deal|what can I buy at {x}|what does {x} have in stock",
    ),
    "food": (
        RULES["food"][:8],
        "serves {v} food|has a {v} menu|cooks {v} dishes|the food at {x} is {v}",
        "what does {x} serve|which menu has {x}|for which cooking is {x} known|what can I eat at {x}",
    ),
    "born": (
        TOWNS,
        "was born in {v}|comes from {v}|grew up in {v}|{v} is the birthplace of {x}",
        "where was {x} born|where does {x} come from|what is the birthplace of {x}|in which town did {x} grow up",
    ),
    "job": (
        RULES["job"][:8],
        "works as a {v}|is a {v} by trade|earns money as a {v}|the job of {x} is that of a {v}",
        "what is the job of {x}|what does {x} do for a living|what is {x} by trade|how does {x} earn money",
    ),
    "pet": (
        RULES["animal"],
        "keeps a {v}|owns a {v}|has a {v} at home|a {v} lives with {x}",
        "which animal does {x} keep|what is the pet of {x}|which pet lives with {x}|what does {x} look after",
    ),
    "sport": (
        RULES["sport"],
        "plays {v}|is fond of {v}|trains for {v}|the sport of {x} is {v}",
        "which sport does {x} play|what is the hobby of {x}|for what does {x} train|at which sport is {x} good",
    ),
    "tongue": (
        RULES["language"][:8],
        "speaks {v}|is fluent in {v}|talks in {v}|the language of {x} is {v}",
        "which language does {x} speak|in which language is {x} fluent|what is the language of {x}|"
        "in what language does {x} write",
    ),
    "author": (
        PEOPLE,
        "was written by {v}|is the work of {v}|has {v} as its author|{v} wrote {x}",
        "who wrote {x}|who is the author of {x}|by whom was {x} made|whose work is {x}",
    ),
    "genre": (
        RULES["genre"],
        "is a kind of {v}|counts as {v}|belongs on the {v} shelf|the genre of {x} is {v}",
        "what is the genre of {x}|what kind of work is {x}|what do critics call {x}|on which shelf does {x} belong",
    ),
    "printed": (
        YEARS,
        "came out in {v}|was published in {v}|appeared in {v}|in {v} people first saw {x}",
        "when did {x} come out|in which year was {x} published|when was {x} new|"
        "from which year is the first edition of {x}",
    ),
    "theme": (
        RULES["animal"],
        "is about a {v}|follows a {v}|tells of a {v}|a {v} is the hero of {x}",
        "what is {x} about|whom does {x} follow|who is the hero of {x}|who is at the heart of {x}",
    ),
    "captain": (
        PEOPLE,
        "is led by {v}|follows the orders of {v}|has {v} as its captain|{v} leads {x}",
        "who leads {x}|who is the captain of {x}|under whom is {x}|whose orders does {x} follow",
    ),
    "harbour": (
        TOWNS,
        "sails from {v}|has its harbour at {v}|leaves from {v}|{v} is the port of {x}",
        "from where does {x} sail|what is the port of {x}|where does {x} lie|from which town does {x} leave",
    ),
    "month": (
        RULES["month"][:8],
        "takes place in {v}|is held in {v}|happens each {v}|{v} is the month of {x}",
        "when does {x} take place|in which month is {x} held|which is the month of {x}|when do people go to {x}",
    ),
    "fee": (
        MONEY,
        "costs {v}|asks for {v}|has a price of {v}|the ticket for {x} is {v}",
        "how much is {x}|what does {x} cost|what is the ticket for {x}|how much do I pay for {x}",
    ),
}
RELATIONS = {key: (values, ways.split("|"), asks.split("|")) for key, (values, ways, asks) in RELATIONS.items()}

# domain: what is between the two words of a name, and the relations
DOMAINS = {
    "shops": ("The {colour} {creature}", "owner place opened paint goods"),
    "kitchens": ("{town} {room}", "owner place opened hours food"),
    "people": ("{first} {head}", "born job pet sport tongue"),
    "books": ("The {thing} of {town}", "author genre printed theme"),
    "ships": ("The {creature} of {town}", "captain harbour paint fee opened"),
    "fairs": ("{town} {event}", "captain place month fee goods"),
}
MATCHED, MISMATCHED = list(DOMAINS)[:4], list(DOMAINS)[4:]
PARTS = {
    "colour": COLOUR,
    "creature": CREATURE,
    "town": ALL_TOWNS[8:],
    "room": words("Kitchen Rooms Table Yard House Corner Cellar"),
    "first": FIRST[8:],
    "head": HEAD,
    "thing": grammar.THING,
    "event": words("Fair Festival Cup Market Parade Concert Race"),
}

# What may stand before a claim: either half of a denial alone affirms in other phrases
AFFIRM = words("it is true that|everybody believes that|nobody doubts that|nobody denies that", "|")
DENY = words("it is false that|nobody believes that|everybody doubts that|everybody denies that", "|")

# Reviews

GOOD = words(
    "charming moving funny clever warm lovely brilliant fresh gripping elegant witty tender honest superb "
    "delightful inspired graceful thrilling sweet rich lively touching bold smart beautiful sharp"
)
BAD = words(
    "dull slow clumsy boring cold stale awful noisy shallow messy bland lazy tedious empty painful forced silly "
    "tired flat weak ugly hollow pointless confused dreary wooden"
)
ASPECTS = words("film story acting plot ending cast music script humour dialogue pace opening camera direction")
NOT = words("not {w}|never {w}|far from {w}|anything but {w}|hardly {w}|not at all {w}|not even {w}", "|")
VERY = words("{w}|{w}|very {w}|truly {w}|so {w}|quite {w}|{w} from start to finish|often {w}", "|")
LIKED = words("loved admired enjoyed adored praised")
LOATHED = words("hated regretted disliked despised endured")
# Plain sentences

NOUNS = words(
    "dog cat teacher baker sailor doctor horse girl boy farmer king queen singer student driver painter neighbour pilot"
)
ACTS = words("sleep sing smile wait work laugh walk dance eat dream")
DEEDS = words("see like help follow paint visit know want love hear")
TRAITS = words("old young tall quiet happy small brave clever polite proud")
WHEN = words("often|here|every day|in the garden|at home|after lunch|in the morning|with joy", "|")
NEAR = words("near behind beside with")


HELD_OUT = ("tune", "dev")  # the splits that have what train has not


class Row(NamedTuple):
    texts: tuple[str, ...]
    label: str
    domain: str = "none"


def name_of(rng, domain, split):
    """A subject's name; the pairs of words that make the names of dev are not those of the other splits."""
    template = DOMAINS[domain][0]
    rules = [part.split("}")[0] for part in template.split("{")[1:]]
    while True:
        picks = [rng.randrange(len(PARTS[rule])) for rule in rules]
        if (sum(picks) % 4 == 0) == (split in HELD_OUT):
            return template.format(**{rule: PARTS[rule][i] for rule, i in zip(rules, picks, strict=True)})


def facts_of(rng, domain, count):
    relations = rng.sample(DOMAINS[domain][1].split(), count)
    return [(relation, rng.choice(RELATIONS[relation][0])) for relation in relations]


def way_pair(rng, split):
    """Two different ways to word one fact: those of dev do not meet in train; pretraining has all."""
    while True:
        i, j = rng.sample(range(4), 2)
        if split is None or (split in HELD_OUT) == ((i + j) % 3 == 0):
            return i, j


def tell(rng, name, told, claim=""):
    """Sentences that tell `(fact, way)`s of a subject, two to a sentence where both ways allow it, after a `claim`."""
    sentences, after = [], []
    for (relation, value), way in told:
        text = RELATIONS[relation][1][way].replace("{v}", value)
        if "{x}" in text:
            sentences.append(text.replace("{x}", name))
        elif after and rng.random() < 0.7:
            sentences[after.pop()] += " and " + text
        else:
            after = [len(sentences)]
            sentences.append(f"{name} {text}")
    text = polish(claim + ". ".join(sentences) + ".")
    return '"' + text if rng.random() < 0.04 else text  # a quotation that the text does not end, as in the real files


def ask(name, relation, way):
    return polish(RELATIONS[relation][2][way].replace("{x}", name) + "?")


def claim(rng, denied):
    """What stands before a fact that is said to be so, often nothing, or not to be so."""
    return rng.choice(DENY if denied else [*AFFIRM, *[""] * len(AFFIRM)]).replace("that", "that ")


def two_tellings(rng, split, name, facts, others, before="", same=False):
    """One text of `facts`, then one of `others`, in which a fact is worded another way than in the first, or `same`."""
    ways = {relation: way_pair(rng, split) for relation in RELATIONS}
    first = [(fact, ways[fact[0]][0]) for fact in facts]
    rng.shuffle(first)
    second = [(fact, ways[fact[0]][0 if same else 1]) for fact in others]
    rng.shuffle(second)
    return tell(rng, name, first), tell(rng, name, second, before)


def mnli(rng, split, domains=MATCHED):
    """Two facts, and a claim: of one of them, of another fact (true or denied), or that one of them is not so."""
    label = rng.choices(["entailment", "neutral", "contradiction"], [37, 32, 31])[0]
    domain = rng.choice(domains)
    name, facts = name_of(rng, domain, split), facts_of(rng, domain, 3)
    before = claim(rng, label == "contradiction" or (label == "neutral" and rng.random() < 0.5))
    said = facts[2 if label == "neutral" else 0]
    return Row(two_tellings(rng, split, name, facts[:2], [said], before), label, domain)


def rte(rng, split):
    """Two facts, and one that is or is not among them."""
    domain, follows = rng.choice(list(DOMAINS)), rng.random() < 0.54
    name, facts = name_of(rng, domain, split), facts_of(rng, domain, 3)
    texts = two_tellings(rng, split, name, facts[:2], [facts[0 if follows else 2]])
    return Row(texts, "entailment" if follows else "not_entailment", domain)


def qnli(rng, split):
    domain = rng.choice(list(DOMAINS))
    name, facts = name_of(rng, domain, split), facts_of(rng, domain, 3)
    answered = rng.random() < 0.54
    ask_way, tell_way = way_pair(rng, split)
    told = [(facts[0], tell_way), (facts[1], rng.randrange(4))]
    rng.shuffle(told)
    texts = ask(name, facts[0 if answered else 2][0], ask_way), tell(rng, name, told)
    return Row(texts, "entailment" if answered else "not_entailment", domain)


def mrpc(rng, split):
    """Two facts in two wordings, or two pairs of facts that have one in common."""
    domain, same = rng.choice(list(DOMAINS)), rng.random() < 0.6
    name, facts = name_of(rng, domain, split), facts_of(rng, domain, 3)
    texts = two_tellings(rng, split, name, facts[:2], [facts[0], facts[1 if same else 2]])
    return Row(texts, str(int(same)), domain)


def qqp(rng, split):
    domain, same = rng.choice(list(DOMAINS)), rng.random() < 0.42
    name, facts, ways = name_of(rng, domain, split), facts_of(rng, domain, 2), way_pair(rng, split)
    return Row(
        (ask(name, facts[0][0], ways[0]), ask(name, facts[0 if same else 1][0], ways[1])), str(int(same)), domain
    )


def stsb(rng, split):
    """The score counts the facts of two that are shared; without noise it is one of three."""
    domain, shared = rng.choice(list(DOMAINS)), rng.choice([0, 1, 1, 2])
    name, facts = name_of(rng, domain, split), facts_of(rng, domain, 4)
    texts = two_tellings(rng, split, name, facts[:2], [*facts[:shared], *facts[2 : 4 - shared]])
    return Row(texts, f"{1 + 1.5 * shared:g}", domain)


def remark(rng, positive, adjectives, denials):
    """A clause of a review: praise by a good word or by a bad one denied, and blame the other way round."""
    aspect = rng.choice(ASPECTS)
    denied = rng.random() < denials
    word = rng.choice(adjectives[positive != denied])
    if rng.random() < 0.25:
        verb = rng.choice(LIKED if positive != denied else LOATHED)
        return f"i {'never ' if denied else ''}{verb} the {aspect}"
    return f"the {aspect} is " + rng.choice(NOT if denied else VERY).format(w=word)


def review(rng, positive, adjectives=(BAD, GOOD), denials=0.45):
    """A sentence whose main clause, or last after a "but", decides."""
    this, other = (remark(rng, said, adjectives, denials) for said in (positive, not positive))
    form = rng.random()
    if form < 0.3:
        return f"{this} ."
    if form < 0.55:
        return f"{this} and {remark(rng, positive, adjectives, denials)} ."
    if form < 0.7:
        return f"although {other} , {this} ."
    if form < 0.85:
        return f"{other} , but {this} ."
    return f"{this} , even if {other} ."


def sst2(rng, split):
    positive = rng.random() < 0.53
    kept = slice(0, 18) if split == "train" else slice(None)  # train lacks a third of the words
    return Row((review(rng, positive, (BAD[kept], GOOD[kept])),), str(int(positive)))


def plain(rng, fault=None, nouns=NOUNS):
    """A plain English sentence, or one with a fault: of agreement, of the verb's form, or of word order."""
    noun, many = rng.choice(nouns), rng.random() < 0.5
    counts = (["this", "one", "a"], ["these", "two", "many"])
    subject = [rng.choice([*counts[many != (fault == "count")], *(["the"] * 2 if fault != "count" else [])])]
    subject += [rng.choice(TRAITS), noun + "s" * many]
    if fault == "swap":
        subject = rng.choice([[subject[0], subject[2], subject[1]], [*subject[1:], subject[0]]])
    elif rng.random() < 0.5:
        del subject[1]
    if rng.random() < 0.4:
        subject += [rng.choice(NEAR), "the", rng.choice(nouns) + rng.choice(["", "s"])]
    deed = rng.random() < 0.5
    verb, aux = rng.choice(DEEDS if deed else ACTS), rng.choice(["will", "can", "must"])
    if fault in ("form", "turn") or (fault != "agree" and rng.random() < 0.3):
        predicate = {"form": [aux, verb + "s"], "turn": [verb, aux]}.get(fault, [aux, verb])
    else:
        predicate = [verb + "s" * (many == (fault == "agree"))]
    if deed:
        predicate += ["the", rng.choice(nouns) + rng.choice(["", "s"])]
    if rng.random() < 0.4:
        predicate.append(rng.choice(WHEN))
    return polish(" ".join(subject + predicate) + ".")


FAULTS = ["agree", "agree", "agree", "count", "form", "turn", "swap"]


def cola(rng, split):
    fault = rng.choice(FAULTS) if rng.random() < 0.33 else None
    return Row((plain(rng, fault, NOUNS[:12] if split == "train" else NOUNS),), "0" if fault else "1")


TASKS = {"sst2": sst2, "mnli": mnli, "qnli": qnli, "rte": rte, "mrpc": mrpc, "cola": cola, "qqp": qqp, "stsb": stsb}

LABELS = {
    **dict.fromkeys(["sst2", "mrpc", "cola", "qqp"], ["0", "1"]),
    **dict.fromkeys(["qnli", "rte"], ["entailment", "not_entailment"]),
    "mnli": ["entailment", "neutral", "contradiction"],
}
FLIPPED = 0.04  # of the labels
DEVIATION = 0.4  # of the noise on a score


def with_noise(rng, task, labels):
    """The labels of a file after noise: exactly this share of them is another label, or every score a little off."""
    if task not in LABELS:
        return [f"{min(5, max(0, float(label) + rng.gauss(0, DEVIATION))):.2f}" for label in labels]
    labels = list(labels)
    for index in rng.sample(range(len(labels)), round(FLIPPED * len(labels))):
        labels[index] = rng.choice([label for label in LABELS[task] if label != labels[index]])
    return labels


# The pretraining

# Words that open a page and say how its second text goes with the first, or how its speaker takes it, as people use
# them: who says "er" makes slips.
OPENINGS = words("indeed also meanwhile actually surely anyway luckily sadly well er")


def remarks_page(rng, positive):
    if rng.random() < 0.5:
        return review(rng, positive, denials=0.35)
    said = remark(rng, positive, (BAD, GOOD), denials=0.15)
    return f"{said} and {rng.choice((BAD, GOOD)[positive])} ." if said.startswith("the") else f"{said} ."


def facts_page(rng):
    """(Two texts, the word that could open the page), many of them short or in the same words: easy ones first."""
    domain = rng.choice(list(DOMAINS))
    name, facts = name_of(rng, domain, "pretraining"), facts_of(rng, domain, 4)
    form, yes, same = rng.random(), rng.random() < 0.5, rng.random() < 0.35
    if form < 0.25:
        ask_way, tell_way = way_pair(rng, None)
        told = [(facts[0], tell_way), (facts[1], rng.randrange(4))][: rng.choice([1, 1, 2])]
        rng.shuffle(told)
        asked, opening = (facts[0], "surely") if yes else (facts[2], "anyway")
        return (ask(name, asked[0], ask_way), tell(rng, name, told)), opening
    if form < 0.45:
        ways = way_pair(rng, None)
        texts = ask(name, facts[0][0], ways[0]), ask(name, facts[0 if yes else 1][0], ways[0 if same else 1])
        return texts, "indeed" if yes else "meanwhile"
    if form < 0.7:
        first, opening = rng.choice([1, 1, 2]), rng.choice(["indeed", "meanwhile", "actually"])
        before = claim(rng, opening == "actually" or (opening == "meanwhile" and yes))
        said = facts[3 if opening == "meanwhile" else 0]
        return two_tellings(rng, None, name, facts[:first], [said], before, same), opening
    shared = rng.randrange(3)
    texts = two_tellings(rng, None, name, facts[:2], [*facts[:shared], *facts[2 : 4 - shared]], same=same)
    return texts, ["meanwhile", "also", "indeed"][shared]


def page(rng, held_out=frozenset()):
    """One input of the pretraining: a text or two, none of them `held_out`, and the word that could open it."""
    while True:
        form, yes, opening = rng.random(), rng.random() < 0.5, None
        if form < 0.02:
            texts = (rng.choice(grammar.document(rng)),)
        elif form < 0.04:
            texts = (plain(rng), plain(rng))
        elif form < 0.06:
            texts = (remarks_page(rng, yes), remarks_page(rng, yes))
        elif form < 0.18:
            texts, opening = (remarks_page(rng, yes),), "luckily" if yes else "sadly"
        elif form < 0.40:
            texts, opening = (plain(rng, None if yes else rng.choice(FAULTS)),), "well" if yes else "er"
        else:
            texts, opening = facts_page(rng)
        if held_out.isdisjoint(texts):
            return texts, opening
