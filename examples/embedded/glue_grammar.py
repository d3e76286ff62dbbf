"""The grammar behind the GLUE-style data of the NLU example and the text on which its encoder is pretrained.

Everything is synthetic. Five of the pair tasks and the similarity task speak of one thing: a subject and facts
about it, each fact said in one of six ways and asked in one of four. `TASKS` makes labelled examples; `page`
gives unlabelled text: the same facts told twice, questions with their answers, reviews, plain sentences.

What is held out for "dev": names (no subject of dev is one of train), and wordings (which two ways of saying
or asking one fact meet in an example). Pretraining sees every word and every way, and no name of dev.
"""

from typing import NamedTuple

import grammar
from grammar import COLOUR, CREATURE, FIRST, HEAD, RULES, TAIL, polish, words

TOWNS = [head + TAIL[(3 * i) % len(TAIL)] for i, head in enumerate(HEAD)]
PAINT = words("red blue green white yellow black brown grey pink orange")
YEARS = [str(year) for year in range(1902, 2018, 5)]
HOURS = [f"{hour} {half}" for half in ("am", "pm") for hour in (5, 6, 7, 8, 9, 10)]
MONEY = [f"£ {amount}" for amount in (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30)]

# relation: its values; six ways to say it, those without {x} behind the subject; four ways to ask for it
RELATIONS = {
    "owner": (
        FIRST,
        "is run by {v}|belongs to {v}|has {v} as its owner|is in the hands of {v}|{v} runs {x}|the owner of {x} is {v}",
        "who runs {x}|who is the owner of {x}|to whom does {x} belong|in whose hands is {x}",
    ),
    "place": (
        TOWNS,
        "is in {v}|stands in {v}|is located in {v}|can be found in {v}|{v} is the home of {x}|you will find {x} in {v}",
        "where is {x}|in which town does {x} stand|what is the location of {x}|where can I find {x}",
    ),
    "opened": (
        YEARS,
        "was founded in {v}|opened in {v}|has existed since {v}|dates from {v}|{v} was the first year of {x}|"
        "the history of {x} begins in {v}",
        "when was {x} founded|in which year did {x} open|since when has {x} existed|how old is {x}",
    ),
    "closed": (
        RULES["day"],
        "is closed on {v}|does not open on {v}|rests on {v}|has no visitors on {v}|on {v} {x} is shut|"
        "{v} is the day off at {x}",
        "when is {x} closed|on which day does {x} rest|which is the day off at {x}|when is {x} shut",
    ),
    "hours": (
        HOURS,
        "opens at {v}|starts the day at {v}|lets people in from {v}|is ready at {v}|at {v} the doors of {x} open|"
        "you can enter {x} from {v}",
        "at what time does {x} open|when do the doors of {x} open|from what time can I enter {x}|"
        "how early does {x} start",
    ),
    "paint": (
        PAINT,
        "is painted {v}|has a {v} front|is all in {v}|wears {v}|{v} is the colour of {x}|the walls of {x} are {v}",
        "how is {x} painted|what is the colour of {x}|which colour has {x}|what colour are the walls of {x}",
    ),
    "goods": (
        [item + "s" for item in RULES["item"]],
        "sells {v}|deals in {v}|has {v} in stock|offers {v}|you can buy {v} at {x}|the trade of {x} is {v}",
        "what does {x} sell|in what does {x} deal|what can I buy at {x}|what does {x} have in stock",
    ),
    "food": (
        RULES["food"],
        "serves {v} food|has a {v} menu|cooks {v} dishes|is known for {v} cooking|the food at {x} is {v}|"
        "the kitchen of {x} is {v}",
        "what does {x} serve|which menu has {x}|for which cooking is {x} known|what can I eat at {x}",
    ),
    "born": (
        TOWNS,
        "was born in {v}|comes from {v}|grew up in {v}|is a native of {v}|{v} is the birthplace of {x}|"
        "the family of {x} is from {v}",
        "where was {x} born|where does {x} come from|what is the birthplace of {x}|in which town did {x} grow up",
    ),
    "job": (
        RULES["job"],
        "works as a {v}|is a {v} by trade|earns money as a {v}|became a {v}|the job of {x} is that of a {v}|"
        "they know {x} as a {v}",
        "what is the job of {x}|what does {x} do for a living|what is {x} by trade|how does {x} earn money",
    ),
    "pet": (
        RULES["animal"],
        "keeps a {v}|owns a {v}|has a {v} at home|looks after a {v}|a {v} lives with {x}|the pet of {x} is a {v}",
        "which animal does {x} keep|what is the pet of {x}|which pet lives with {x}|what does {x} look after",
    ),
    "sport": (
        RULES["sport"],
        "plays {v}|is fond of {v}|trains for {v}|is good at {v}|the sport of {x} is {v}|{v} is the hobby of {x}",
        "which sport does {x} play|what is the hobby of {x}|for what does {x} train|at which sport is {x} good",
    ),
    "tongue": (
        RULES["language"],
        "speaks {v}|is fluent in {v}|talks in {v}|writes in {v}|the language of {x} is {v}|you hear {v} when {x} talks",
        "which language does {x} speak|in which language is {x} fluent|what is the language of {x}|"
        "in what language does {x} write",
    ),
    "partner": (
        FIRST,
        "is married to {v}|shares a house with {v}|has a life with {v}|loves {v}|{v} and {x} are a couple|"
        "the partner of {x} is {v}",
        "to whom is {x} married|who shares a house with {x}|who is the partner of {x}|whom does {x} love",
    ),
    "author": (
        FIRST,
        "was written by {v}|is the work of {v}|has {v} as its author|was made by {v}|{v} wrote {x}|"
        "the author of {x} is {v}",
        "who wrote {x}|who is the author of {x}|by whom was {x} made|whose work is {x}",
    ),
    "genre": (
        RULES["genre"],
        "is a kind of {v}|counts as {v}|belongs on the {v} shelf|is pure {v}|the genre of {x} is {v}|"
        "critics call {x} a {v}",
        "what is the genre of {x}|what kind of work is {x}|what do critics call {x}|on which shelf does {x} belong",
    ),
    "printed": (
        YEARS,
        "came out in {v}|was published in {v}|appeared in {v}|was new in {v}|in {v} people first saw {x}|"
        "the first edition of {x} is from {v}",
        "when did {x} come out|in which year was {x} published|when was {x} new|"
        "from which year is the first edition of {x}",
    ),
    "theme": (
        RULES["animal"] + RULES["job"],
        "is about a {v}|follows a {v}|tells of a {v}|shows us a {v}|a {v} is the hero of {x}|"
        "at the heart of {x} is a {v}",
        "what is {x} about|whom does {x} follow|who is the hero of {x}|who is at the heart of {x}",
    ),
    "captain": (
        FIRST,
        "is led by {v}|follows the orders of {v}|has {v} as its captain|is under {v}|{v} leads {x}|"
        "the captain of {x} is {v}",
        "who leads {x}|who is the captain of {x}|under whom is {x}|whose orders does {x} follow",
    ),
    "harbour": (
        TOWNS,
        "sails from {v}|has its harbour at {v}|leaves from {v}|lies at {v}|{v} is the port of {x}|"
        "the harbour of {x} is {v}",
        "from where does {x} sail|what is the port of {x}|where does {x} lie|from which town does {x} leave",
    ),
    "month": (
        RULES["month"],
        "takes place in {v}|is held in {v}|happens each {v}|comes in {v}|{v} is the month of {x}|"
        "people go to {x} in {v}",
        "when does {x} take place|in which month is {x} held|which is the month of {x}|when do people go to {x}",
    ),
    "fee": (
        MONEY,
        "costs {v}|asks for {v}|has a price of {v}|takes {v} at the door|the ticket for {x} is {v}|you pay {v} for {x}",
        "how much is {x}|what does {x} cost|what is the ticket for {x}|how much do I pay for {x}",
    ),
}
RELATIONS = {key: (values, ways.split("|"), asks.split("|")) for key, (values, ways, asks) in RELATIONS.items()}

# domain: what is between the two words of a name, and the relations
DOMAINS = {
    "shops": ("The {colour} {creature}", "owner place opened closed hours paint goods"),
    "kitchens": ("{town} {room}", "owner place opened closed hours food"),
    "people": ("{first} {head}", "born job pet sport tongue partner"),
    "books": ("The {thing} of {town}", "author genre printed theme"),
    "ships": ("The {creature} of {town}", "captain harbour paint fee opened"),
    "fairs": ("{town} {event}", "captain place month fee goods"),
}
MATCHED, MISMATCHED = list(DOMAINS)[:4], list(DOMAINS)[4:]
PARTS = {
    "colour": COLOUR,
    "creature": CREATURE,
    "town": TOWNS,
    "room": words("Kitchen Rooms Table Yard House Corner Cellar"),
    "first": FIRST,
    "head": HEAD,
    "thing": grammar.THING,
    "event": words("Fair Festival Cup Market Parade Concert Race"),
}

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
VERDICTS = (  # said in the pretraining text only
    words("do not go|we want our money back|a waste of time|1 out of 5|we left early|avoid it", "|"),
    words("go and see it|we will see it again|worth every penny|5 out of 5|we stayed to the end|do not miss it", "|"),
)

# Plain sentences

NOUNS = words(
    "dog cat teacher baker sailor doctor horse girl boy farmer king queen singer student driver painter neighbour "
    "lawyer friend pilot poet guest bird cook"
)
ACTS = words("sleep sing smile wait work laugh walk dance eat dream swim talk shout listen rest jump")
DEEDS = words("see like help follow paint visit know want love trust hear need find meet call")
TRAITS = words("old young tall quiet happy small brave clever polite proud")
WHEN = words("often|here|every day|in the garden|at home|after lunch|in the morning|with joy", "|")
NEAR = words("near behind beside with")
REFLEXIVE = {
    "girl": "herself",
    "queen": "herself",
    "boy": "himself",
    "king": "himself",
    "dog": "itself",
    "cat": "itself",
}


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
        if (sum(picks) % 4 == 0) == (split == "dev"):
            return template.format(**{rule: PARTS[rule][i] for rule, i in zip(rules, picks, strict=True)})


def facts_of(rng, domain, count):
    relations = rng.sample(DOMAINS[domain][1].split(), count)
    return [(relation, rng.choice(RELATIONS[relation][0])) for relation in relations]


def changed(rng, fact):
    relation, value = fact
    return relation, rng.choice([other for other in RELATIONS[relation][0] if other != value])


def way_pair(rng, split, first=6, second=6):
    """Two different ways to word one fact: those of dev do not meet in train; pretraining has all."""
    while True:
        i, j = rng.randrange(first), rng.randrange(second)
        if (i != j or first != second) and split in (None, "dev" if (i + j) % 3 == 0 else "train"):
            return i, j


def tell(rng, name, told):
    """Sentences that tell `(fact, way)`s of a subject, two to a sentence where both ways allow it."""
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
    text = polish(". ".join(sentences) + ".")
    return '"' + text if rng.random() < 0.04 else text  # a quotation that the text does not end, as in the real files


def ask(name, relation, way):
    return polish(RELATIONS[relation][2][way].replace("{x}", name) + "?")


def two_tellings(rng, split, name, facts, others, extra=()):
    """One text of `facts`, then one of `others`, in which a fact is worded another way than in the first."""
    ways = {relation: way_pair(rng, split) for relation in RELATIONS}
    first = [(fact, ways[fact[0]][0]) for fact in (*facts, *extra)]
    rng.shuffle(first)
    second = [(fact, ways[fact[0]][1]) for fact in others]
    rng.shuffle(second)
    return tell(rng, name, first), tell(rng, name, second)


def inference(rng, split, follows, domains, told):
    """A text of `told` facts, and a sentence that it entails, leaves open (neutral) or contradicts; their domain."""
    domain = rng.choice(domains)
    name, facts = name_of(rng, domain, split), facts_of(rng, domain, told + 1)
    said = {"entailment": facts[0], "neutral": facts[-1], "contradiction": changed(rng, facts[0])}[follows]
    return two_tellings(rng, split, name, facts[:told], [said]), domain


def mnli(rng, split, domains=MATCHED):
    label = rng.choices(["entailment", "neutral", "contradiction"], [38, 31, 31])[0]
    texts, domain = inference(rng, split, label, domains, 2)
    return Row(texts, label, domain)


def rte(rng, split):
    follows = rng.choices(["entailment", "neutral", "contradiction"], [54, 16, 30])[0]
    texts, domain = inference(rng, split, follows, list(DOMAINS), 3)
    return Row(texts, "entailment" if follows == "entailment" else "not_entailment", domain)


def qnli(rng, split):
    domain = rng.choice(list(DOMAINS))
    name, facts = name_of(rng, domain, split), facts_of(rng, domain, 3)
    answered = rng.random() < 0.54
    ask_way, tell_way = way_pair(rng, split, 4, 6)
    told = [(facts[0], tell_way), (facts[1], rng.randrange(6))]
    rng.shuffle(told)
    texts = ask(name, facts[0 if answered else 2][0], ask_way), tell(rng, name, told)
    return Row(texts, "entailment" if answered else "not_entailment", domain)


def mrpc(rng, split):
    domain, same = rng.choice(list(DOMAINS)), rng.random() < 0.6
    name, facts = name_of(rng, domain, split), facts_of(rng, domain, 3)
    second = facts[1] if same else rng.choice([facts[2], changed(rng, facts[1]), changed(rng, facts[1])])
    return Row(two_tellings(rng, split, name, facts[:2], [facts[0], second]), str(int(same)), domain)


def qqp(rng, split):
    domain, same = rng.choice(list(DOMAINS)), rng.random() < 0.42
    name, facts, ways = name_of(rng, domain, split), facts_of(rng, domain, 2), way_pair(rng, split, 4, 4)
    asked, other = facts[0][0], (name, facts[0][0])
    if not same:
        other = rng.choice([(name, facts[1][0]), (name, facts[1][0]), (name_of(rng, domain, split), asked)])
    return Row((ask(name, asked, ways[0]), ask(*other, ways[1])), str(int(same)), domain)


def stsb(rng, split):
    """The score counts the facts of three that are shared, and a little one that has another value."""
    domain = rng.choice([domain for domain in DOMAINS if domain != "books"])  # of which too few facts are told
    name, facts = name_of(rng, domain, split), facts_of(rng, domain, 5)
    shared, altered = rng.choice([(0, 0), (0, 1), (0, 3), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0), (3, 0)])
    others = [*facts[:shared], *(changed(rng, fact) for fact in facts[shared : shared + altered])]
    others += facts[3 : 3 + min(2, 3 - len(others))]
    score = 5 * (shared + 0.3 * altered) / 3 + rng.gauss(0, 0.2)
    texts = two_tellings(rng, split, name, facts[:3], others)
    return Row(texts, f"{min(5, max(0, round(score * 5) / 5)):.3f}", domain)


def remark(rng, positive, adjectives):
    """A clause of a review: praise by a good word or by a bad one denied, and blame the other way round."""
    aspect = rng.choice(ASPECTS)
    denied = rng.random() < 0.35
    word = rng.choice(adjectives[positive != denied])
    if rng.random() < 0.25:
        verb = rng.choice(LIKED if positive != denied else LOATHED)
        return f"i {'never ' if denied else ''}{verb} the {aspect}"
    return f"the {aspect} is " + rng.choice(NOT if denied else VERY).format(w=word)


def review(rng, positive, adjectives=(BAD, GOOD)):
    """A sentence whose main clause, or last after a "but", decides."""
    this, other = remark(rng, positive, adjectives), remark(rng, not positive, adjectives)
    form = rng.random()
    if form < 0.3:
        return f"{this} ."
    if form < 0.55:
        return f"{this} and {remark(rng, positive, adjectives)} ."
    if form < 0.7:
        return f"although {other} , {this} ."
    if form < 0.85:
        return f"{other} , but {this} ."
    return f"{this} , even if {other} ."


def sst2(rng, split):
    positive = rng.random() < 0.53
    kept = {"dev": slice(None), "train": slice(0, 18)}[split]  # train lacks a third of the words
    return Row((review(rng, positive, (BAD[kept], GOOD[kept])),), str(int(positive)))


def plain(rng, fault=None, nouns=NOUNS):
    """A plain English sentence, or one with a fault: of agreement, of the verb's form, or of word order."""
    noun, many = rng.choice([*REFLEXIVE] if fault == "self" else nouns), rng.random() < 0.5
    counts = (["this", "one", "a"], ["these", "two", "many"])
    subject = [rng.choice([*counts[many != (fault == "count")], *(["the"] * 2 if fault != "count" else [])])]
    subject += [rng.choice(TRAITS), noun + "s" * many]
    if fault == "swap":
        subject = rng.choice([[subject[0], subject[2], subject[1]], [*subject[1:], subject[0]]])
    elif rng.random() < 0.5:
        del subject[1]
    if rng.random() < 0.35:
        subject += [rng.choice(NEAR), "the", rng.choice(nouns) + rng.choice(["", "s"])]
    deed = rng.random() < 0.5 or fault == "self"
    verb, aux = rng.choice(DEEDS if deed else ACTS), rng.choice(["will", "can", "must"])
    if fault in ("form", "turn") or (fault != "agree" and rng.random() < 0.3):
        predicate = {"form": [aux, verb + "s"], "turn": [verb, aux]}.get(fault, [aux, verb])
    else:
        predicate = [verb + "s" * (many == (fault == "agree"))]
    if deed and (fault == "self" or (noun in REFLEXIVE or many) and rng.random() < 0.3):
        own = REFLEXIVE.get(noun, "itself")
        predicate.append("themselves" if many != (fault == "self") else own)
    elif deed:
        predicate += ["the", rng.choice(nouns) + rng.choice(["", "s"])]
    if rng.random() < 0.4:
        predicate.append(rng.choice(WHEN))
    return polish(" ".join(subject + predicate) + ".")


FAULTS = ["agree", "agree", "count", "form", "turn", "swap", "self"]


def cola(rng, split):
    fault = rng.choice(FAULTS) if rng.random() < 0.33 else None
    return Row((plain(rng, fault, {"dev": NOUNS, "train": NOUNS[:16]}[split]),), "0" if fault else "1")


TASKS = {"sst2": sst2, "mnli": mnli, "qnli": qnli, "rte": rte, "mrpc": mrpc, "cola": cola, "qqp": qqp, "stsb": stsb}


# The pretraining

AGREED = words("Yes,|Right:|Indeed,|In other words,|That is,", "|")
OBJECTED = words("No,|Wrong:|On the contrary,|But others say that", "|")
ADDED = words("Also,|Besides,|Moreover,|And", "|")


def lowered(text):
    """A sentence behind an opening word: only a name keeps its capital."""
    return text[0].lower() + text[1:] if text.split()[0] in ("The", "At", "In", "On", "You", "People") else text


def facts_page(rng):
    domain = rng.choice(list(DOMAINS))
    name, facts = name_of(rng, domain, "pretraining"), facts_of(rng, domain, 4)
    form = rng.random()
    if form < 0.35:
        told = facts[: rng.choice([1, 2, 2, 3])]
        return two_tellings(rng, None, name, told, told)
    if form < 0.5:
        return two_tellings(rng, None, name, facts[:3], facts[: rng.choice([1, 2])])
    if form < 0.7:
        ask_way, tell_way = way_pair(rng, None, 4, 6)
        told = [(facts[0], tell_way), (facts[1], rng.randrange(6))]
        rng.shuffle(told)
        return ask(name, facts[0][0], ask_way), tell(rng, name, told)
    if form < 0.8:
        ways = way_pair(rng, None, 4, 4)
        return ask(name, facts[0][0], ways[0]), ask(name, facts[0][0], ways[1])
    opening, said = rng.choice([(AGREED, facts[0]), (OBJECTED, changed(rng, facts[0])), (ADDED, facts[3])])
    first, second = two_tellings(rng, None, name, facts[: rng.choice([1, 2, 3])], [said])
    return first, f"{rng.choice(opening)} {lowered(second)}"


def page(rng, held_out=frozenset()):
    """One input of the pretraining: a text or two, without labels and without a sentence of `held_out`."""
    while True:
        form = rng.random()
        if form < 0.12:
            texts = (rng.choice(grammar.document(rng)),)
        elif form < 0.27:
            positive = rng.random() < 0.5
            texts = [review(rng, positive), review(rng, positive)]
            if rng.random() < 0.4:
                texts[1] = rng.choice(VERDICTS[positive]) + " ."
        elif form < 0.37:
            texts = (plain(rng), plain(rng))
        else:
            texts = facts_page(rng)
        if held_out.isdisjoint(texts):
            return tuple(texts)
