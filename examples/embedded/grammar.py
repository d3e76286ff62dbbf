"""The grammar behind the model and the data that ship with the NLG example: tables first, then their readers.

Everything it writes is synthetic. `restaurant_split` gives E2E meanings with their references; `document`
gives pages of the many-domain English on which the base is pretrained. The two share words, names and
phrases, but no page has a restaurant in a record: going from an E2E meaning to text is left to the adapter.

Templates: `[a|b]` picks a side, `{word}` expands a rule, `{hero:person}` expands it once and repeats it.
"""

import re


def words(text, separator=None):
    return text.split(separator)


FIRST = words(
    "Ada Anton Beatrix Bruno Celia Cyril Dora Edwin Elsa Farid Gita Hana Hugo Ines Ivor Jonas Kira "
    "Leila Lorenz Mabel Milo Nadia Nils Odette Oskar Petra Priya Quentin Rosa Rufus Sana Selma Tariq "
    "Thea Ulla Viktor Wanda Yusuf Zelda"
)
HEAD = words(
    "Alder Ash Bram Brindle Cal Dor Dun Ember Fal Fen Gar Hal Hart Hazel Kel Kes Lang Lin Mar Mere "
    "Nor Oak Pel Pend Quill Rav Ros Sal Shel Stan Tam Thorn Tol Ulver Ven Wend Wes Whit Yar Zan"
)
TAIL = words("bourne bridge bury by combe dale den ford gate ham ley low mere mont more ridge stead stow ton wick")
CREATURE = words("Badger Bison Crane Curlew Fox Hare Heron Lantern Lynx Magpie Otter Owl Pheasant Raven Stag Swift")
COLOUR = words("Amber Brass Copper Crimson Golden Green Ivory Marble Painted Quiet Scarlet Silver Tin Velvet")
THING = words("Anchor Bell Clock Candle Feather Garden Island Kite Ladder Letter Mirror Orchard River Storm Window")

# The restaurant domain: slots in E2E order, their values, and every way to say each.

VENUES = words(
    "The Copper Ibis;The Quiet Harbour;Saffron Lane;Marigold Rooms;The Tin Partridge;Tolliver's;"
    "Juniper & Rye;Nettlebed;The Velvet Moth;Casa Ondina;Plum Street;The Paper Lantern;"
    "Barley Hall;The Long Spoon;Pepperwick;Oriole;The Blue Thimble;Kettle and Thyme;Mosswood;"
    "The Idle Fox;Tamarind Yard;Quince;The Salted Fig;Lumen;Ember & Oak;The Sleepy Magpie;"
    "Old Bell Kitchen;Zaranda;The Glass Onion Loft;Fennimore's;Harrow Table;The Ninth Ladder",
    ";",
)
LANDMARKS = words(
    "Ferris Court;Kestrel Cinema;The Old Brewhouse;Linden Gallery;Hartley Station;"
    "The Corn Exchange;Willow Baths;Pemberley Market;Dunmore Library;The Clock Tower;"
    "Orchard Theatre;Sable Bridge;The Tram Museum;Caravel Hotel",
    ";",
)
SLOTS = {
    "name": VENUES,
    "Type": ["restaurant", "pub", "coffee shop", "bistro", "tea room"],
    "food": words("Greek Thai Mexican Lebanese Polish Korean Spanish Turkish Indian vegan"),
    "price": ["cheap", "moderate", "high", "less than £ 15", "£ 15 - 25", "more than £ 40"],
    "customer rating": ["low", "average", "high", "2 out of 5", "4 out of 5"],
    "area": ["city centre", "old town", "harbour quarter", "mill district"],
    "family friendly": ["yes", "no"],
    "near": LANDMARKS,
}
FAMILY = {  # the only realisations of `family friendly`: before a noun, and after "is"
    "yes": (["family friendly", "child friendly"], ["family friendly", "kid friendly", "child friendly"]),
    "no": ([], ["not family friendly", "not child friendly", "not kid friendly"]),
}
WORDY = {"cheap", "moderate", "high", "low", "average"}  # said before the noun, as amounts are said after it
AFTER = {  # said behind a noun
    "food": ["serving {food} food", "serving {food} food", "that serves {food} food"],
    "price": {True: ["with {price} prices", "in the {price} price range"], False: ["with prices of {price}"]},
    "customer rating": {
        True: ["with a {customer rating} customer rating"],
        False: ["with a customer rating of {customer rating}", "rated {customer rating}"],
    },
    "area": ["in the {area}", "in the {area} area"],
    "near": ["near {near}", "near {near}", "close to {near}"],
    "family friendly": ["that is {family}"],
}
CLAUSE = {  # said after "it", one or two to a sentence
    "food": ["serves {food} food", "serves {food} food", "offers {food} food"],
    "price": {
        True: ["has {price} prices", "has a {price} price range"],
        False: ["has a price range of {price}"],
    },
    "customer rating": {
        True: ["has a {customer rating} customer rating", "has a {customer rating} rating from customers"],
        False: ["has a customer rating of {customer rating}", "is rated {customer rating} by customers"],
    },
    "area": ["is located in the {area}", "is in the {area}", "is in the {area} area"],
    "near": ["is near {near}", "is located near {near}", "is close to {near}"],
    "family friendly": ["is {family}"],
}
ALONE = {  # whole sentences
    "food": ["the food is {food}"],
    "price": {True: ["the prices are {price}", "the price range is {price}"], False: ["prices are {price}"]},
    "customer rating": ["the customer rating is {customer rating}"],
    "area": ["you can find it in the {area}"],
    "near": ["you can find it near {near}"],
    "family friendly": ["this {kind} is {family}", "{name} is {family}"],
}
OPENINGS = [
    *["{name} is a {noun} {after}"] * 7,
    *["there is a {noun} called {name} {after}"] * 2,
    "{name} , located {place} , is a {noun}",
    "{name} is a {noun} located {place}",
    "{place} , there is a {noun} called {name}",
    "the {noun} {name} is {place}",
]


def _say(rng, table, slot, meaning):
    ways = table[slot]
    if isinstance(ways, dict):
        ways = ways[meaning[slot] in WORDY]
    return rng.choice(ways)


def reference(rng, meaning):
    """One to four E2E-tokenised sentences that mention every slot value of `meaning` literally."""
    kind = noun = meaning.get("Type", "place")
    bound, left = {**meaning, "kind": kind}, [slot for slot in CLAUSE if slot in meaning]
    if "food" in left and rng.random() < 0.75:
        noun = "{food} " + noun
        left.remove("food")
    if "family friendly" in left:
        before, after = FAMILY[meaning["family friendly"]]
        bound["family"] = rng.choice(after)
        if before and rng.random() < 0.2:
            noun = rng.choice(before) + " " + noun
            left.remove("family friendly")
    here = [slot for slot in ("area", "near") if slot in left]
    opening = rng.choice(OPENINGS if here else [text for text in OPENINGS if "{after}" in text])
    first = here if here and ("{place}" in opening or rng.random() < 0.7) else left[: rng.choice([1, 2, 3])]
    after = also(" ".join(_say(rng, AFTER, slot, meaning) for slot in first))
    sentences = [opening.replace("{noun}", noun).replace("{after}", after).replace("{place}", after)]
    rest = [slot for slot in left if slot not in first]
    while rest:
        said = rest[: 2 if rng.random() < 0.8 else 1]
        if len(said) == 1 and rng.random() < 0.4:
            sentences.append(_say(rng, ALONE, rest[0], meaning))
        else:
            sentences.append("it " + " and ".join(_say(rng, CLAUSE, slot, meaning) for slot in said))
        rest = rest[len(said) :]
    return polish(" . ".join(sentences).format_map(bound) + " .")


def meaning_text(meaning):
    return " | ".join(f"{slot} : {value}" for slot, value in meaning.items())


def restaurant_split(rng, meanings, references, taken):
    """E2E lines of `meanings` meanings not in `taken`, which grows; `references` is (fewest, most)."""
    lines = []
    while meanings:
        others = rng.sample(list(SLOTS)[1:], rng.choice([2, 2, 3, 3, 4, 4, 5, 6, 7]))
        meaning = {slot: rng.choice(SLOTS[slot]) for slot in SLOTS if slot == "name" or slot in others}
        context = meaning_text(meaning)
        if context in taken:
            continue
        taken.add(context)
        wanted, texts = rng.randint(*references), []
        for _ in range(50):  # a short meaning may have fewer wordings than are wanted
            text = reference(rng, meaning)
            if len(texts) < wanted and text not in texts:
                texts.append(text)
        lines += [f"{context}||{text} \n" for text in texts]
        meanings -= 1
    return lines


# The many-domain English of the pretraining.

RULES = {
    "first": FIRST,
    "surname": ["{place}", "{head}{tail}", "{head}er", "{head}ow"],
    "person": ["{first} {surname}"],
    "head": HEAD,
    "tail": TAIL,
    "place": ["{head}{tail}"],
    "creature": CREATURE,
    "colour": COLOUR,
    "thing": THING,
    "street": ["{place} [Street|Road|Lane|Square]"],
    "venue": VENUES,
    "landmark": LANDMARKS,
    "sight": [
        "{landmark}",
        "{landmark}",
        "{place} [Hotel|Station|Library|Bridge|Market|Park|Theatre|Museum]",
    ],
    "spot": ["{venue}", "{venue}", "[The |]{colour} {creature}", "{place} [Kitchen|Rooms|Table|Yard]"],
    "eatery": SLOTS["Type"] + ["café", "diner"],
    "food": SLOTS["food"] + ["French", "Dutch", "Moroccan", "Swedish"],
    "area": SLOTS["area"] + ["market square", "university district", "north side", "suburbs", "town centre"],
    "digit": list("123456789"),
    "num": ["{digit}", "{digit}{digit}", "{digit}0", "{digit}{digit}0"],
    "year": ["19{digit}{digit}", "20[0|1]{digit}", "18{digit}{digit}"],
    "time": ["{digit} [am|pm]", "1[0|1|2] [am|pm]", "{digit} : [15|30|45]"],
    "money": [
        "£ {num}",
        "less than £ {num}",
        "more than £ {num}",
        "£ {digit} - {digit}0",
        "£ {digit}{digit} - {digit}0",
    ],
    "level": ["low", "average", "high", "cheap", "moderate"],
    "score": ["{digit} out of 5", "{digit} out of 10", "low", "average", "high", "good", "poor"],
    "day": words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "month": words("January March April June July September October November"),
    "season": words("spring summer autumn winter"),
    "mood": words("tired happy quiet hungry nervous proud curious late early cold"),
    "good": words("good fine lovely kind pleasant charming excellent"),
    "bad": words("bad slow dull noisy poor cold disappointing"),
    "dish": words("soup|bread|fish pie|roast lamb|lentil stew|apple cake|rice|dumplings|salad|noodles|toast", "|"),
    "item": words("umbrella|lamp|bicycle|coat|map|kettle|clock|violin|notebook|suitcase|camera|chair", "|"),
    "ingredient": words("onion flour butter garlic rice lemon pepper salt milk honey ginger carrots beans"),
    "job": words("teacher baker doctor sailor painter engineer gardener printer nurse lawyer cook driver"),
    "animal": words("dog cat horse parrot goat rabbit duck"),
    "sky": words("sunny cloudy rainy windy foggy stormy clear snowy"),
    "sport": words("football|tennis|rowing|hockey|chess|rugby|cricket|swimming", "|"),
    "language": words("French Polish Greek Hindi Dutch Arabic Korean Spanish Welsh Turkish"),
    "genre": words("comedy|drama|thriller|mystery|romance|western|history|adventure", "|"),
    "friendly": ["[not |]{kin} friendly", "{kin} friendly", "not {kin} friendly", "non {kin} friendly"],
    "kin": ["family", "child", "kid", "dog", "cyclist", "student", "visitor"],
}

# noun, name, then attributes: names of the key / values / said after a noun / said after "it".
# What is said of a "yes" and of a "no" is separated by " // ".
ATTRIBUTES = {
    "built": "opened/year/built/founded;{year};built in {v};was built in {v}",
    "owner": "owner/keeper/manager/run by;{person};run by {v};belongs to {v}",
    "where": "place/town/location/city;{place};in {v};is located in {v}",
    "part": "district/area/part of town;{area};in the {v}[| area];is in the {v}",
    "beside": "beside/close to/nearby;{sight};[near|close to] {v};is [near|close to|located near] {v}",
    "cost": "fee/cost/price/ticket;{money};with prices of {v};has a price range of {v}",
    "level": "prices/cost;{level};with [a {v} price range|{v} prices];has [a {v} price range|{v} prices]",
    "score": "rating/score/grade;{score};with a [visitor |]rating of {v};has a [guest |]rating of {v}",
    "rated": "rating/score/grade;{level};with a {v} [visitor|guest] rating;has a {v} [visitor|guest] rating",
    "kin": "child friendly/kids/for families/children;yes|no;"
    "that is [family|kid] friendly // that is not [child|family] friendly;"
    "is [child|kid] friendly // is not [family|kid] friendly",
    "dogs": "dogs/pets/dog friendly;yes|no;that is dog friendly // that is not dog friendly;"
    "welcomes dogs // does not welcome dogs",
    "wifi": "wifi/internet/lift/parking;yes|no;with wifi // without wifi;has free wifi // has no wifi",
    "author": "author/by/made by/director;{person};by {v};was made by {v}",
    "genre": "genre/kind/type/style;{genre};of the {v} kind;is a work of {v}",
    "length": "length/size/count;{num} minutes;of {v};lasts for {v}",
    "language": "language/in/tongue;{language};in {v};was written in {v}",
    "tongue": "language/speaks;{language};who speaks {v};speaks {v}",
    "opens": "opens/hours/from/time;{time};that opens at {v};opens at {v}",
    "day": "day/when/date;[{day}|{digit} {month}];on {v};is held on {v}",
    "colour": "colour/paint/finish;{colour};in {v};comes in {v}",
    "weight": "weight/mass/load;{num} [kilos|grams|tons];weighing {v};weighs {v}",
    "job": "job/work/trade;{job};working as a {v};works as a {v}",
    "pet": "pet/animal;{animal};with a {v};keeps a {v}",
    "born": "born/year;{year};born in {v};was born in {v}",
    "teams": "against/visitors/opponent;{place} [United|Town|Rovers];against {v};is played against {v}",
    "cuts": "teaches/food/serves;{food};teaching {v} cooking;teaches {v} cooking",
    "shelf": "stock/sells/goods;{item}s;selling {v};sells {v}",
}
DOMAINS = [
    (
        "hotel|inn|guest house|hostel",
        "[[The |]{colour} {creature}|{place} [Lodge|House|Court]|{sight}]",
        "where part beside cost level score rated kin dogs wifi built owner",
    ),
    (
        "museum|gallery|library",
        "[{place} [Museum|Gallery|Library]|The {thing} [Museum|Rooms]]",
        "where part beside cost score rated kin opens built wifi owner",
    ),
    (
        "film|play|opera",
        "[The {colour} {thing}|The {thing} of {place}|{place}]",
        "author genre length language built score rated kin",
    ),
    (
        "book|novel|poem",
        "[The {thing} of {place}|{colour} {thing}|{person}]",
        "author genre language built score cost",
    ),
    (
        "shop|bookshop|market|bakery",
        "[{place} [Stores|Supplies]|The {colour} {thing}|{surname}'s]",
        "where part beside level rated opens owner shelf dogs kin wifi",
    ),
    (
        "park|garden|beach|zoo",
        "[{place} [Park|Gardens|Beach]|The {creature} [Park|Garden]]",
        "where part beside cost score rated kin dogs opens built",
    ),
    (
        "train|ferry|boat|bus",
        "[{place} [Express|Queen|Flyer]|The {colour} {creature}|{first} {place}]",
        "day opens cost wifi dogs colour weight built rated",
    ),
    (
        "match|race|final",
        "[{place} [Cup|Shield]|The {colour} {thing}]",
        "teams day where beside cost score kin",
    ),
    ("neighbour|friend|cousin", "[{person}|{first}]", "job pet born where beside part tongue"),
    (
        "class|workshop|course",
        "[{thing}s with {first}|The {colour} {thing}|{place} School]",
        "cuts day opens cost level rated part beside where kin",
    ),
    (
        "lamp|clock|bicycle|coat|violin",
        "[{place}|The {thing}|{colour} {num}]",
        "colour weight cost level score built author",
    ),
]
STATEMENTS = [
    *["{name} is a {noun} {after}"] * 3,
    *["there is a {noun} called {name} {after}"] * 2,
    "a {noun} called {name} {clause}",
    "{after} , you will find the {noun} {name}",
    "the {noun} {name} {clause}",
    "we went to see {name} , a {noun} {after}",
    "have you heard of {name} ? it is a {noun} {after}",
]
RECORDS = {  # one field, what joins the fields, what goes around; not the "key : value | key : value" of E2E
    "lines": ("{k}: {v}", "\n", "{}"),
    "equals": ("{k} = {v}", "; ", "{}"),
    "arrows": ("{k} -> {v}", ", ", "{}"),
    "dashes": ("- {k} : {v}", "\n", "{}"),
    "brackets": ("({k} {v})", " ", "({})"),
    "tags": ("<{k}> {v} </{k}>", " ", "{}"),
    "slashes": ("{k} / {v}", " / ", "{}"),
    "commas": ("{k} : {v}", " , ", "{}"),
    "cells": ("{v}", " | ", "| {} |"),
    "values": ("{v}", " , ", "{}"),
    "json": ('"{k}": "{v}"', ", ", "{{{}}}"),
}

# A template to a paragraph, under the name of its style. Restaurants occur here, as people mention them.
PARAGRAPHS = r"""
# diary
[On|Last] {day} {a:person} and I went to {s:spot}, a {eatery} [near|close to] {sight}. [The {food} food
was {good}|We had the {dish}, and it was {good}], but the service was {bad}. {a} paid £ {num}. [We
walked home past {landmark}|{s} is [family|child] friendly, so we will bring the children next time|It
is not [kid|child] friendly, so the children stayed at home].

{month} {num}. [{sky} morning|A {sky} day]. {a:person} came to see me in {p:place} and brought a
{i:item}. I put the {i} beside the window. Tomorrow {a} leaves {p} for {place}, and I will be {mood}
again.

# review
{s:spot}: {good} food, {bad} service. We ate {dish} and {dish}. [The prices are {level}|Less than £
{num} for two]. [{n:digit} out of 5|The rating is {level}, and I agree]. {s} is in the {area},
[near|close to] {sight}.

I did not like {s:spot}. [It calls itself a {eatery} serving {food} food|They say it serves {food}
food], but the {dish} was {bad}. My friend {a:person} says that {a} would go back, because {s} is
{friendly}.

The {b:thing} of {place} is a {good} book about a {job} called {a:person}. {a} loses a {i:item}, and the
{i} is found in {place} by {c:person}. The {b} is a sign of {season}. [I read it twice|{c} is my
favourite].

# letter
Dear {a:first},\n[Thank you|Many thanks] for the {i:item}. The {i} arrived on {day}. I am {mood}. [Shall
we have lunch at {s:spot}? There is a {food} {eatery} near {landmark}, called {spot}, if {s} is closed|I
have a new {animal}, and we walk to {sight} every {day}].\n[Yours|Love], {first}

To {a:person}, {street}, {p:place}.\nYour {i:item} is ready. Please bring £ {n:num} to our shop in {p}
before {t:time} on {d:day}. Without the £ {n} we cannot give back the {i}. On {d} we close at
{t}.\n{person}

# story
Once there was a {j:job} called {a:first} who lived in {p:place} with a {m:animal}. The {m} was
{o:mood}, and so was {a}. One {season} the {m} ran away to {q:place}. {a} took a {item} and went from
{p} to {q}. In {q} {a} met {b:person}, who had found the {m}. {b} said that the {m} was no longer {o}.
So {a} and the {m} went home to {p}.

{a:first} and {b:first} both wanted the {i:item}. {a} offered £ {n:num}, and {b} offered £ {m:num}. The
{job} [took the £ {n} from {a}|took the £ {m} from {b}], and gave the {i} to [{a}|{b}]. [The other went
to {spot} for {dish}|Nobody was {mood}].

# dialogue
{a:first}: Where is {s:spot}?\n{b:first}: {s} is in the {r:area}, near {l:landmark}.\n{a}: In the {r}?
Not in {place}?\n{b}: No, {a}, it is near {l}.[\n{a}: Thank you, {b}.|\n{a}: Is it {f:friendly}?\n{b}:
Yes, it is {f}.]

{a:first}: What did {c:person} bring?\n{b:first}: A {i:item} and a {j:item}.\n{a}: Whose {i} was
it?\n{b}: The {i} was from {p:place}, and so was {c}.\n{a}: I have never been to {p}.

# notice
NOTICE. The {n:day} market in {p:place} [moves to {q:street}|is closed]. [From {t:time} please use
{q:street}|Come to {p} before {t:time}]. Ask {a:person}. Signed, {a}.

Lost near {l:landmark}: one {c:colour} {i:item}. If you find the {i}, bring it to {spot} or to
{a:person} at {street}. The {c} {i} was a gift. {a} is {mood}.

Wanted: a {j:job} in {p:place}. The {j} will work with {a:person} from {t:time} every {day}. Write to
{a}, {street}, {p}.

# weather
Weather for {p:place}. {d:day} will be {w:sky}, with {n:num} degrees by {time}. After a {w} {d} expect a
{sky} evening in {p}. [Around {landmark} it may be {sky}|The {season} has been {sky}].

# cooking
For the {d:dish} take [2|3|5] [cups|spoons] of {x:ingredient}, {y:ingredient} and {z:ingredient}. Cook
the {y} with the {z}. Add the {x}. [Serve the {d} hot|Leave the {d} for {num} minutes].

# sports
{p:place} won the {s:sport} {n:digit} to {m:digit} against {q:place}. {a:person} of {p} said that {q}
played a {good} game. [It is the first time that {p} beat {q} in {month}|{a} will leave {p} for
{place}].

# list
To buy: {x:ingredient}, {y:ingredient}, {z:ingredient}, a {i:item}. Bought: {x}, {y}, {z}. [Missing: the
{i}|The {i} was too dear].

Count: {a:first}, {b:first}, {c:first}, {d:first}. Again: {a}, {b}, {c}, {d}. Backwards: {d}, {c}, {b},
{a}.

{a:place} {x:num}\n{b:place} {y:num}\n{c:place} {z:num}\n[{a} {x}|{b} {y}|{c} {z}]\n[{b} {y}|{c} {z}|{a}
{x}]

# town
In {p:place} the {area} is full of places to eat. {s:spot} [is known for its {dish}|serves {food} food
to {mood} people], while {t:spot}, close to {l:landmark}, is {friendly}. [Prices at {s} are {level}|{t}
has a {level} price range]. [People who live near {l} prefer {t}|{s} and {t} are both {good}].

# people
{a:person} was born in {p:place} in {y:year}. [As a {job}, {a} moved to {q:place}|{a} became a {job} in
{q:place}] and wrote The {t:thing}. [The {t} was printed in {q}|After The {t} came The {colour}
{thing}]. {a} often ate at {spot}, a {eatery} in the {area}.
"""
PROSE = {
    style: [" ".join(template.split("\n")).replace("\\n", "\n") for template in templates.strip().split("\n\n")]
    for style, templates in (part.split("\n", 1) for part in PARAGRAPHS.split("\n# ")[1:])
}


def pick(text, rng):
    """Replaces every innermost [a|b] by one of its sides until none is left."""
    while "[" in text:
        text = re.sub(r"\[([^\[\]]*)\]", lambda found: rng.choice(found[1].split("|")), text)
    return text


def expand(text, rng, bound=None):
    """Expands a template; `bound` remembers what {hero:rule} gave, for the later {hero}."""
    bound = {} if bound is None else bound

    def put(found):
        name, rule = found[1], found[2]
        if name in bound:
            return bound[name]
        value = expand(rng.choice(RULES[rule or name]), rng)
        if rule:
            bound[name] = value
        return value

    return re.sub(r"\{([\w ]+)(?::(\w+))?\}", put, pick(text, rng))


def also(text):
    """Joins two neighbouring phrases with "with" by "and"."""
    return re.sub(r"(\bwith(?: \S+){1,5}) with ", r"\1 and ", text)


def polish(text):
    """Capitals at the start of sentences, and "an" before a vowel."""
    text = re.sub(r"\b([Aa]) (?=[aeioAEIO])", r"\1n ", text)
    return re.sub(r"(^|[.?] )([a-z])", lambda found: found[1] + found[2].upper(), text)


def spaced(text):
    """Punctuation set apart by spaces, as in E2E."""
    return re.sub(r" +", " ", re.sub(r"([.,?:])(?=\s|$)", r" \1", text))


def closed(text):
    return re.sub(r" ([.,?])", r"\1", text)


def subject(rng):
    """A thing of some domain: noun, name, and facts as (key, value, said after a noun, said after "it")."""
    nouns, names, attributes = rng.choice(DOMAINS)
    noun, name = rng.choice(nouns.split("|")), expand(names, rng)
    attributes = attributes.split()
    facts = []
    for attribute in rng.sample(attributes, rng.randint(2, min(6, len(attributes)))):
        keys, values, *ways = ATTRIBUTES[attribute].split(";")
        if values == "yes|no":
            value = rng.choice(["yes", "no"])
            ways = [way.split(" // ")[value == "no"] for way in ways]
        else:
            value = expand(values, rng)
        ways = [pick(way, rng).replace("{v}", value) for way in ways]
        facts.append((rng.choice(keys.split("/")), value, *ways))
    return noun, name, facts


def prose(rng, noun, name, facts):
    """Says every fact of a subject: the first ones behind the noun, the others one or two to a sentence."""
    opening, cut = rng.choice(STATEMENTS), rng.randint(1, min(3, len(facts)))
    if opening.startswith("{after}") and not facts[0][2].startswith(("in ", "near ", "close ")):
        opening = STATEMENTS[0]
    if "{clause}" in opening:
        cut = 1
    after = also(" ".join(fact[2] for fact in facts[:cut]))
    sentences = [opening.format(name=name, noun=noun, after=after, clause=facts[0][3])]
    while cut < len(facts):
        take = rng.choice([1, 2, 2])
        who = rng.choice(["it", "it", "it", name]) if noun not in ("neighbour", "friend", "cousin") else name
        sentences.append(f"{who} " + " and ".join(fact[3] for fact in facts[cut : cut + take]))
        cut += take
    return polish(" . ".join(sentences) + " .")


def record(rng, noun, name, facts):
    field, between, around = RECORDS[rng.choice(list(RECORDS))]
    rows = [(rng.choice(["name", "title", "called", noun]), name)]
    rows += [("kind", noun)] * (rng.random() < 0.6) + [fact[:2] for fact in facts]
    rows = [(key.capitalize(), value) for key, value in rows] if rng.random() < 0.2 else rows
    return around.format(between.join(field.format(k=key, v=value) for key, value in rows))


def repeated(rng):
    """A list of values said twice: the plainest lesson in copying."""
    rules = rng.choices(["person", "place", "spot", "sight", "money", "item", "food", "time"], k=rng.randint(2, 6))
    said = rng.choice([", ", " ; ", "\n", " and "]).join(expand(f"{{{rule}}}", rng) for rule in rules)
    return said + rng.choice(["\n", " . Again : ", " = "]) + said


def document(rng):
    """One text of the pretraining, as the list of its pages, which follow each other in the corpus.

    A record and its prose mostly share a page. What follows a record on a page of its own is another record
    of the same thing, questions about it, or something else, and only rarely its prose: that is the task of
    E2E, left to be learnt, but to look back across the end of a page is not.
    """
    form = rng.random()
    if form < 0.25:
        text = expand(rng.choice(PROSE[rng.choice(list(PROSE))]), rng)
        return [polish(spaced(text) if rng.random() < 0.4 else text)]
    if form < 0.31:
        return [repeated(rng)]
    noun, name, facts = subject(rng)
    text, data = prose(rng, noun, name, facts), record(rng, noun, name, facts)
    text = text if rng.random() < 0.7 else closed(text)
    asked = rng.sample(facts, rng.randint(1, len(facts)))
    answers = "\n".join(f"{key} of {name} ? {value}" for key, value, *_ in asked)
    if form < 0.37:
        return [rng.choice([data, text]) + "\n" + answers]
    if form < 0.41:
        return [text + "\n" + data]
    if form < 0.73:
        return [data + rng.choice(["\n", "\n\n", " => ", " : ", "\nIn words : "]) + text]
    if form < 0.86:
        return [data, record(rng, noun, name, rng.sample(facts, len(facts)))]
    if form < 0.92:
        return [data, answers]
    if form < 0.96:
        return [data]
    return [data, " " + closed(text)]
