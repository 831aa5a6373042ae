"""Kinds of texts, told by their words: so that numbers can be given for each kind, on any data.

Lists of words, and nothing that understands them: "orange" is a colour in "an orange on a plate" too. A text may be of
several kinds.
"""

import re

_SIDE = "left|right|top|bottom|upper|lower"
_NUMBER = "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen"

# Which of two pictures is meant (NLVR2) is no place in one.
_PICTURE = re.compile(rf"\b({_SIDE}|first|second) (image|picture|photo)s?\b|\bthan (in |on )?the ({_SIDE}) one\b")

RULES = {
    # To another thing. Comes first: what it matches says no place ("left of the dog").
    "relation": re.compile(
        r"\b((left|right|side|front|back|top) of|next to|close to|closest to|nearest to|beside|besides|between|behind|"
        r"above|below|beneath|under|underneath|over|inside|outside|against|across from|facing|"
        rf"near(?! the ({_SIDE}|middle|cent[er]+|corner|edge))|"
        r"hidden by|covered by|covering|touching|holding|carrying|wearing|riding)\b"
    ),
    # In the picture.
    "position": re.compile(
        rf"\b({_SIDE}|middle|cent(er|re)|central|corner|edge|foreground|background|front|back|far|"
        r"(left|right|top|bottom|front|back|fore)most|highest|lowest|where)\b"
    ),
    "attribute": re.compile(
        r"\b(red|orange|yellow|green|cyan|blue|purple|violet|pink|black|white|gr[ae]y|brown|tan|beige|gold|golden|silver|"
        r"blonde?|dark|light|bright|colou?r(ed|ful|s)?|striped|stripes|dotted|dots|spotted|checked|checkered|plaid|"
        r"plain|pattern(ed)?|wooden|wood|metal|glass|plastic|leather|brick|stone|shape)\b"
    ),
    "size": re.compile(
        r"\b(small|smaller|smallest|little|tiny|medium|large|larger|largest|big|bigger|biggest|huge|giant|tall|taller|"
        r"tallest|short|shorter|shortest|long|longer|longest|wide|wider|widest|narrow|thin|thick|size)\b"
    ),
    "count": re.compile(
        rf"\b(\d+|zero|{_NUMBER}|both|pair|several|many|number of|more|fewer|exactly|total|"
        r"(only|just|at least|at most) one|one of)\b"
    ),
    "negation": re.compile(r"\b(no|not|none|never|neither|nor|nothing|nobody|without|cannot)\b|n't\b"),
}
OTHER = "other"


def kinds(text: str) -> tuple[str, ...]:
    """The kinds of :data:`RULES` that a text is of, in their order; ``other`` where it is of none."""
    rest, found = _PICTURE.sub(" ", " ".join(text.lower().split())), []
    for kind, rule in RULES.items():
        if rule.search(rest):
            found.append(kind)
        if kind == "relation":
            rest = rule.sub(" ", rest)
    return tuple(found) or (OTHER,)
