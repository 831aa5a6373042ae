"""What can truthfully be said in English about a drawn scene: captions, references, questions, comparisons.

Every sentence is built from the predicates of :mod:`xvlm.data.scene_words`. Where one answers None, as a person might
argue, nothing is asserted, and another object that might answer to a reference makes it ambiguous, so it is not used.
"""

import itertools
import re
import string
from functools import cached_property
from random import Random
from typing import NamedTuple

from xvlm.data.scene_words import (
    COLOURS,
    COMPARISONS,
    FRAMES,
    NOUNS,
    NUMBERS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZES,
    SUPERLATIVES,
    TEXTURES,
    VALUES,
    ZONES,
    Attributes,
    Layout,
    article,
    enumeration,
    is_extreme,
    matches,
    number_word,
    parts_of,
    place,
    plural,
    relation_holds,
    zone_holds,
)
from xvlm.data.scene_words import HELD_OUT as HELD_OUT


class Reference(NamedTuple):
    """A phrase that fits exactly one object of its scene; ``kind`` is attribute, relation, superlative or position.

    ``attributes`` are those said of the object itself; ``minimal``: leaving any one out would be ambiguous.
    """

    text: str
    kind: str
    attributes: Attributes
    minimal: bool = False


class Speaker:
    """Says varied, true things about one layout.

    Args:
        layout: the scene.
        random: decides what is said and how.
        unseen: whether held-out combinations may be named at all. Where they are never drawn they must not be named as
            absent either, or a model learns that they do not exist.
    """

    def __init__(self, layout: Layout, random: Random, unseen: bool):
        self.layout = layout
        self.things = layout.things
        self.random = random
        self.unseen = unseen

    # Words

    def phrase(self, said: Attributes) -> str:
        """ "small red disc", without an article."""
        return " ".join(filter(None, (*said[:3], said.shape or self.random.choice(NOUNS))))

    def plural(self, said: Attributes) -> str:
        return plural(self.phrase(said))

    def frame(self, name: str, **words: str) -> str:
        return self.random.choice(FRAMES[name]).format(**words)

    def count(self, said: Attributes) -> int:
        return sum(matches(said, thing.attributes) for thing in self.things)

    def partly(self, index: int, most: int) -> Attributes:
        """One to ``most`` of an object's attributes."""
        words = self.things[index].attributes
        kept = self.random.sample(Attributes._fields, self.random.randint(1, most))
        return Attributes(**{name: getattr(words, name) for name in kept})

    def absent(self, most: int) -> Attributes:
        """Attributes that fit no object: some of an object's, with one exchanged for another value of its kind."""
        while True:
            said = self.partly(self.random.randrange(len(self.things)), most)
            name = self.random.choice([name for name, word in said._asdict().items() if word])
            said = said._replace(**{name: self.random.choice(VALUES[name])})
            if not self.count(said) and (self.unseen or not said.held_out):
                return said

    # References

    @cached_property
    def references(self) -> list[list[Reference]]:
        """Per object every reference at hand; the full description is always among them."""
        return [
            [*self.by_attributes(i), *self.by_relation(i), *self.by_superlative(i), *self.by_position(i)]
            for i in range(len(self.things))
        ]

    @cached_property
    def distinct(self) -> list[list[Attributes]]:
        """Per object the parts of its attributes that fit no other object, fewest words first."""
        every = [parts_of(thing.attributes) for thing in self.things]
        common: dict[Attributes, int] = {}
        for said in itertools.chain.from_iterable(every):
            common[said] = common.get(said, 0) + 1
        return [[said for said in parts if common[said] == 1] for parts in every]

    def by_attributes(self, index: int) -> list[Reference]:
        found = []
        for said in self.distinct[index]:
            minimal = not any(matches(fewer, said) for fewer in self.distinct[index] if fewer != said)
            adjectives = [word for word in said[:3] if word]
            text = f"the {self.phrase(said)}"
            if len(adjectives) > 1 and self.random.random() < 0.15:
                noun = said.shape or self.random.choice(NOUNS)
                text = self.frame("adjectives", noun=noun, adjectives=enumeration(adjectives))
            found.append(Reference(text, "attribute", said, minimal))
        return found

    def subjects(self, index: int) -> list[Attributes]:
        """Short phrases that fit the object and at least one other, to be made unique by a relation or a place."""
        words = self.things[index].attributes
        parts = [Attributes(), *(said for said in parts_of(words) if sum(map(bool, said)) <= 2)]
        return [said for said in parts if said not in self.distinct[index]]

    def by_relation(self, index: int) -> list[Reference]:
        found = []
        for relation, anchor in itertools.product(RELATIONS, range(len(self.things))):
            if anchor == index or not relation_holds(self.layout, relation, index, anchor):
                continue
            rivals = [
                thing.attributes
                for i, thing in enumerate(self.things)
                if i not in (index, anchor) and relation_holds(self.layout, relation, i, anchor) is not False
            ]
            subjects = [s for s in self.subjects(index) if not any(matches(s, rival) for rival in rivals)]
            if subjects:
                subject = self.random.choice(subjects)
                words = self.random.choice(RELATIONS[relation])
                text = f"the {self.phrase(subject)} {words} {self.name(anchor)}"
                found.append(Reference(text, "relation", subject))
        return found

    def by_superlative(self, index: int) -> list[Reference]:
        found = []
        for superlative, said in itertools.product(SUPERLATIVES, self.subjects(index)):
            others = [t for i, t in enumerate(self.things) if i != index and matches(said, t.attributes)]
            if said.size and superlative in ("largest", "smallest"):
                continue
            if is_extreme(superlative, self.things[index], others):
                words = self.random.choice(SUPERLATIVES[superlative])
                found.append(Reference(f"the {words} {self.phrase(said)}", "superlative", said))
        return found

    def by_position(self, index: int) -> list[Reference]:
        found = []
        for zone in ZONES:
            if not zone_holds(zone, self.things[index]):
                continue
            for said in self.subjects(index):
                rivals = (t for i, t in enumerate(self.things) if i != index and matches(said, t.attributes))
                if all(zone_holds(zone, rival) is False for rival in rivals):
                    text = f"the {self.phrase(said)} {self.random.choice(ZONES[zone])}"
                    found.append(Reference(text, "position", said))
        return found

    def name(self, index: int) -> str:
        """A short unique name by attributes alone, with the shape where that is unique."""
        named = [said for said in self.distinct[index] if said.shape] or self.distinct[index]
        shortest = [said for said in named if sum(map(bool, said)) == sum(map(bool, named[0]))]
        return f"the {self.phrase(self.random.choice(shortest))}"

    def descriptions(self, index: int) -> list[str]:
        """Two to four references to one object: a full, a minimal one, and others at random."""
        attribute = [ref for ref in self.references[index] if ref.kind == "attribute"]
        others = [ref for ref in self.references[index] if ref.kind != "attribute"]
        minimal = self.random.choice([ref for ref in attribute if ref.minimal])
        texts = [attribute[-1].text, minimal.text]
        for kind in self.random.sample(("relation", "superlative", "position"), self.random.randint(1, 3)):
            texts += [ref.text for ref in self.random.sample(others, len(others)) if ref.kind == kind][:1]
        texts = list(dict.fromkeys(texts))[:4]
        return texts if len(texts) > 1 else [*texts, texts[0].removeprefix("the ")]

    def group(self) -> tuple[str, list[int]] | None:
        """A phrase for two or more objects that are not all of the scene, and which; None where nothing is shared."""
        shared = {said for i in range(len(self.things)) for said in self.subjects(i) if any(said)}
        candidates = [said for said in sorted(shared) if 1 < self.count(said) < len(self.things)]
        if not candidates:
            return None
        said = self.random.choice(candidates)
        members = [i for i, thing in enumerate(self.things) if matches(said, thing.attributes)]
        frame = "pair" if len(members) == 2 else "group"
        return self.frame(frame, count=number_word(len(members)), things=self.plural(said)), members

    def expressions(self) -> list[tuple[int, Reference]]:
        """Three to six references and the objects they name, kinds and objects evenly mixed."""
        pool = [(i, ref) for i, refs in enumerate(self.references) for ref in refs]
        self.random.shuffle(pool)
        used: dict[int | str, int] = {}
        chosen = []
        for _ in range(min(self.random.randint(3, 6), len(pool))):
            best = min(pool, key=lambda pair: used.get(pair[0], 0) + used.get(pair[1].kind, 0))
            pool.remove(best)
            chosen.append(best)
            for key in (best[0], best[1].kind):
                used[key] = used.get(key, 0) + 1
        return chosen

    def absent_expressions(self) -> list[tuple[str, Attributes]]:
        """One or two near misses: what would name an object if one of its attributes were another."""
        said = [self.absent(3) for _ in range(self.random.randint(1, 2))]
        return [(f"the {self.phrase(one)}", one) for one in dict.fromkeys(said)]

    # Captions

    def captions(self) -> list[str]:
        """Three to five captions, the first one complete: size, colour, texture and shape of every object."""
        others = [self.partial, self.counting, self.exactly, self.negation, self.relation, self.extreme]
        chosen = self.random.sample(others, self.random.randint(2, 4))
        return [self.complete(), *(say() or self.partial() for say in chosen)]

    def complete(self) -> str:
        order = self.random.sample(range(len(self.things)), len(self.things))
        parts = []
        for index in order:
            said = self.things[index].attributes
            leave_out = said.texture == "plain" and self.random.random() < 0.85
            parts.append(article(self.phrase(said._replace(texture="") if leave_out else said)))
        spare = (30 if len(order) <= 4 else 38) - len(" ".join(parts).split()) - 5
        for position in self.random.sample(range(len(order)), len(order)):
            where = self.where(order[position], order[position - 1] if position else None)
            if where and len(where.split()) <= spare:
                spare -= len(where.split())
                parts[position] += f" {where}"
        return self.frame("complete", things=enumeration(parts))

    def where(self, index: int, before: int | None) -> str | None:
        """Where an object is in the image, or relative to the one just named ("it")."""
        options = [zone for zone in ZONES if zone_holds(zone, self.things[index])][:1]
        phrases = [self.random.choice(ZONES[zone]) for zone in options]
        if before is not None:
            relations = [name for name in RELATIONS if relation_holds(self.layout, name, index, before)]
            phrases += [f"{self.random.choice(RELATIONS[name])} it" for name in relations]
        return self.random.choice(phrases) if phrases else None

    def partial(self) -> str:
        count = self.random.randint(1, max(1, len(self.things) - 1))
        chosen = self.random.sample(range(len(self.things)), min(count, 3))
        return self.frame("partial", things=enumeration([article(self.phrase(self.partly(i, 3))) for i in chosen]))

    def counting(self) -> str:
        index = self.random.randrange(len(self.things))
        name = self.random.choice(("colour", "texture", "size"))
        value = getattr(self.things[index].attributes, name)
        count = self.count(Attributes(**{name: value}))
        total, named = number_word(len(self.things)), number_word(count)
        return self.frame("counting", total=total, count=named, value=value, be="is" if count == 1 else "are")

    def exactly(self) -> str:
        said = self.partly(self.random.randrange(len(self.things)), 2)
        count = self.count(said)
        things = self.phrase(said) if count == 1 else self.plural(said)
        return self.frame("exactly", count=number_word(count), things=things, be="is" if count == 1 else "are")

    def negation(self) -> str:
        absent = self.phrase(self.absent(2))
        present = article(self.phrase(self.partly(self.random.randrange(len(self.things)), 3)))
        return self.frame("negation", absent=absent, a_absent=article(absent), present=present)

    def related(self) -> tuple[int, str, int] | None:
        """An object, a relation that holds, and the object it holds to."""
        pairs = list(itertools.permutations(range(len(self.things)), 2))
        found = [(i, name, j) for i, j in pairs for name in RELATIONS if relation_holds(self.layout, name, i, j)]
        return self.random.choice(found) if found else None

    def relation(self) -> str | None:
        if not (found := self.related()):
            return None
        subject, name, anchor = found
        relation = self.random.choice(RELATIONS[name])
        return self.frame("relation", subject=self.name(subject), relation=relation, anchor=self.name(anchor))

    def extreme(self) -> str | None:
        found = [(i, ref) for i, refs in enumerate(self.references) for ref in refs if ref.kind == "superlative"]
        if not found:
            return None
        index, reference = self.random.choice(found)
        own = self.things[index].attributes
        news = own._replace(**{name: "" for name, word in reference.attributes._asdict().items() if word})
        news = news._replace(texture="" if news.texture == "plain" else news.texture)
        return self.frame("extreme", subject=reference.text, thing=article(self.phrase(news)))

    # Questions

    def questions(self) -> list[tuple[str, str, str]]:
        """Four questions at most: text, answer, kind."""
        open_ended = [lambda name=name: self.attribute_question(name) for name in VALUES]
        open_ended += [self.count_question, self.where_question]
        asked = [self.yes_no_question] * self.random.randint(1, 2)
        asked += self.random.sample(open_ended, 4 - len(asked))
        return list(dict.fromkeys(ask() or self.count_question() for ask in asked))

    def attribute_question(self, name: str) -> tuple[str, str, str] | None:
        index = self.random.randrange(len(self.things))
        fitting = [ref for ref in self.references[index] if not getattr(ref.attributes, name)]
        if not fitting:
            return None
        answer = getattr(self.things[index].attributes, name)
        return self.frame(name, subject=self.random.choice(fitting).text), answer, name

    def count_question(self) -> tuple[str, str, str]:
        index = self.random.randrange(len(self.things))
        said = self.absent(2) if self.random.random() < 0.2 else self.partly(index, 2)
        return self.frame("count", things=self.plural(said)), str(self.count(said)), "count"

    def where_question(self) -> tuple[str, str, str] | None:
        index = self.random.randrange(len(self.things))
        answer = place(self.things[index])
        return (self.frame("where", subject=self.name(index)), answer, "where") if answer else None

    def yes_no_question(self) -> tuple[str, str, str]:
        truth = self.random.random() < 0.5
        ask = self.random.choice((self.exists_text, self.attribute_text, self.relation_text))
        return ask(truth) or self.exists_text(truth), "yes" if truth else "no", "yes/no"

    def exists_text(self, truth: bool) -> str:
        said = self.partly(self.random.randrange(len(self.things)), 3) if truth else self.absent(3)
        return self.frame("exists", a_thing=article(self.phrase(said)))

    def attribute_text(self, truth: bool) -> str | None:
        index = self.random.randrange(len(self.things))
        name = self.random.choice(("colour", "texture", "size"))
        own = self.things[index].attributes
        values = [value for value in VALUES[name] if (value == getattr(own, name)) == truth]
        value = self.random.choice(values)
        fitting = [ref for ref in self.references[index] if not getattr(ref.attributes, name)]
        if not fitting or (own._replace(**{name: value}).held_out and not self.unseen):
            return None
        return self.frame("attribute", subject=self.random.choice(fitting).text, value=value)

    def relation_text(self, truth: bool) -> str | None:
        if not (found := self.related()):
            return None
        subject, name, anchor = found
        relation = self.random.choice(RELATIONS[name if truth else OPPOSITE[name]])
        return self.frame("related", subject=self.name(subject), relation=relation, anchor=self.name(anchor))

    # Two images

    def statements(self, other: "Speaker") -> list[tuple[str, bool]]:
        """Up to four sentences about this image (left) and another (right), true or false with equal chance."""
        said = [self.statement(other, self.random.random() < 0.5) for _ in range(4)]
        return list(dict.fromkeys(filter(None, said)))

    def statement(self, other: "Speaker", label: bool) -> tuple[str, bool] | None:
        for frame, judge in self.random.sample(COMPARISONS, len(COMPARISONS)):
            for _ in range(4):
                speaker = self.random.choice((self, other))
                near_miss = self.random.random() < 0.3
                said = speaker.absent(2) if near_miss else speaker.partly(self.random.randrange(len(speaker.things)), 2)
                left, right = self.count(said), other.count(said)
                number = max(2, left + right + (0 if label else self.random.choice((-1, 1))))
                trivial = left + right == 0 and "neither" not in frame
                forbidden = said.held_out and not (self.unseen and other.unseen)
                if judge(left, right, number) == label and not trivial and not forbidden:
                    thing = self.phrase(said)
                    words = {"things": plural(thing), "a_thing": article(thing), "number": number_word(number)}
                    return frame.format(**words), label
        return None


def vocabulary() -> list[str]:
    """Lines of a WordPiece vocabulary: BERT's special tokens, every word said here, and pieces for any other word.

    The pieces are ASCII letters, digits (also as continuations) and punctuation, so that plain English has no [UNK].
    """
    texts = [*itertools.chain.from_iterable(FRAMES.values()), *(frame for frame, _ in COMPARISONS)]
    texts += itertools.chain.from_iterable((*RELATIONS.values(), *ZONES.values(), *SUPERLATIVES.values()))
    texts += [
        *SIZES,
        *COLOURS,
        *TEXTURES,
        *NUMBERS,
        *(form for noun in (*SHAPES, *NOUNS) for form in (noun, plural(noun))),
    ]
    words = sorted(set(re.findall("[a-z]+", re.sub(r"{\w+}", " ", " ".join(texts)))))
    letters = string.ascii_lowercase + string.digits
    pieces = [*letters, *(f"##{letter}" for letter in letters), *string.punctuation]
    return list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *pieces]))
