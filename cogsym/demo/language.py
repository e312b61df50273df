"""Small generated languages: a sentence for a meaning (`cogsym.demo.semantics`) in each of them.

The base language is simple English: articles, subject-verb-object, number and tense, places, and three ways to reorder
a sentence (passive, place first, both).

The invented languages are a family (`Grammar`). They share their sounds (syllables of a consonant and a vowel) and
their way of building words, after the Bantu languages; each has its own words, markers and word order:

- every noun belongs to a class with one marker for the singular and one for the plural, which its adjective repeats;
- the verb carries the class and number of the subject, the tense, and the class and number of the object;
- a preposition is a marker on the noun of the place; there are no articles.

`TAVOSI` is the language that the demo adapts to; the base model has seen sentences of `RELATIVES` only, which share no
word with it by design, only by chance.

    the old farmers will carry the baskets near the river.
    mosugeni gefada gesoma donaru gesodozado.
"""

import random
from dataclasses import dataclass
from functools import cache

from cogsym.demo.semantics import (
    ADJECTIVES,
    IRREGULAR_PLURALS,
    KIND_OF,
    KINDS,
    PREPOSITIONS,
    TENSES,
    VERBS,
    Meaning,
    NounPhrase,
    Verb,
)


def base_forms(meaning: Meaning) -> tuple[tuple[bool, bool], ...]:
    """The (passive, place first) forms in which the base language can say `meaning`, the plain one first."""
    passives = (False, True) if meaning.object else (False,)
    fronted = (False, True) if meaning.place else (False,)
    return tuple((passive, front) for passive in passives for front in fronted)


def base_sentence(meaning: Meaning, passive: bool = False, place_first: bool = False) -> str:
    """`meaning` in the base language, e.g. "the old farmers will carry the baskets near the river."."""
    verb, subject, direct_object = VERBS[meaning.verb], meaning.subject, meaning.object
    if passive:
        if direct_object is None:
            raise ValueError(f"{meaning.verb!r} has no object here, so it has no passive")
        clause = [_english(direct_object), _be(meaning.tense, direct_object.plural), verb.participle]
        clause += ["by", _english(subject)]
    else:
        clause = [_english(subject), _english_verb(verb, meaning.tense, subject.plural)]
        clause += [_english(direct_object)] if direct_object else []
    if meaning.place:
        place = f"{meaning.place[0]} the {meaning.place[1]}"
        clause.insert(0 if place_first else len(clause), place)
    return " ".join(clause) + "."


def _english(phrase: NounPhrase) -> str:
    noun = IRREGULAR_PLURALS.get(phrase.noun, phrase.noun + "s") if phrase.plural else phrase.noun
    return f"the {phrase.adjective} {noun}" if phrase.adjective else f"the {noun}"


def _english_verb(verb: Verb, tense: str, plural: bool) -> str:
    if tense == "past":
        return verb.past
    if tense == "future":
        return f"will {verb.base}"
    if plural:
        return verb.base
    if verb.base.endswith("ry"):
        return verb.base[:-1] + "ies"
    return verb.base + ("es" if verb.base.endswith("sh") else "s")


def _be(tense: str, plural: bool) -> str:
    return {"past": ("was", "were"), "present": ("is", "are"), "future": ("will be", "will be")}[tense][plural]


CONSONANTS = tuple("b d f g h j k l m n p r s t v w z".split())
VOWELS = tuple("a e i o u".split())
SYLLABLES = tuple(consonant + vowel for consonant in CONSONANTS for vowel in VOWELS)
SLOTS = ("place", "subject", "object", "verb")
VERB_PARTS = ("subject", "tense", "object", "stem")


@dataclass(frozen=True)
class Grammar:
    """An invented language: word order by its fields, words and markers by its seed.

    Attributes:
        name: what the language is called.
        seed: of the words and markers.
        order: the order of the parts of a sentence, a permutation of `SLOTS`.
        verb_parts: the order of the parts of a verb, a permutation of `VERB_PARTS`.
        adjective_first: the adjective stands before its noun, not after it.
        suffixes: class markers stand after the stem, not before it.
    """

    name: str
    seed: int
    order: tuple[str, ...]
    verb_parts: tuple[str, ...]
    adjective_first: bool
    suffixes: bool


@dataclass(frozen=True)
class Lexicon:
    """The words of an invented language.

    Attributes:
        stems: of each English noun, adjective and verb: two syllables, all different.
        classes: of each kind of noun, the singular and the plural marker: one syllable, all different.
        tenses, cases: the markers of tenses and of prepositions, likewise.
    """

    stems: dict[str, str]
    classes: dict[str, tuple[str, str]]
    tenses: dict[str, str]
    cases: dict[str, str]


@cache
def lexicon(seed: int) -> Lexicon:
    """Draw the words of a language."""
    rng = random.Random(f"lexicon {seed}")
    lemmas = (*KIND_OF, *ADJECTIVES, *VERBS)
    stems = rng.sample([first + second for first in SYLLABLES for second in SYLLABLES], len(lemmas))
    markers = iter(rng.sample(SYLLABLES, 2 * len(KINDS) + len(TENSES) + len(PREPOSITIONS)))
    return Lexicon(
        stems=dict(zip(lemmas, stems, strict=True)),
        classes={kind: (next(markers), next(markers)) for kind in KINDS},
        tenses={tense: next(markers) for tense in TENSES},
        cases={preposition: next(markers) for preposition in PREPOSITIONS},
    )


def invented_sentence(meaning: Meaning, grammar: Grammar) -> str:
    """`meaning` in an invented language."""
    words = lexicon(grammar.seed)

    def marked(stem: str, marker: str) -> str:
        return stem + marker if grammar.suffixes else marker + stem

    def marker(phrase: NounPhrase) -> str:
        return words.classes[KIND_OF[phrase.noun]][phrase.plural]

    def phrase_words(phrase: NounPhrase) -> str:
        noun = marked(words.stems[phrase.noun], marker(phrase))
        if phrase.adjective is None:
            return noun
        adjective = marked(words.stems[phrase.adjective], marker(phrase))
        return f"{adjective} {noun}" if grammar.adjective_first else f"{noun} {adjective}"

    verb = {
        "subject": marker(meaning.subject),
        "tense": words.tenses[meaning.tense],
        "object": marker(meaning.object) if meaning.object else "",
        "stem": words.stems[meaning.verb],
    }
    parts = {
        "subject": phrase_words(meaning.subject),
        "object": phrase_words(meaning.object) if meaning.object else "",
        "verb": "".join(verb[part] for part in grammar.verb_parts),
        "place": "",
    }
    if meaning.place:
        preposition, noun = meaning.place
        parts["place"] = marked(words.stems[noun], words.classes["place"][0]) + words.cases[preposition]
    return " ".join(parts[slot] for slot in grammar.order if parts[slot]) + "."


TAVOSI = Grammar(
    "Tavosi",
    seed=0,
    order=("place", "subject", "object", "verb"),
    verb_parts=("subject", "tense", "object", "stem"),
    adjective_first=False,
    suffixes=False,
)


def _relative(seed: int) -> Grammar:
    rng = random.Random(f"grammar {seed}")
    return Grammar(
        f"relative {seed}",
        seed,
        order=tuple(rng.sample(SLOTS, len(SLOTS))),
        verb_parts=tuple(rng.sample(VERB_PARTS, len(VERB_PARTS))),
        adjective_first=rng.random() < 0.5,
        suffixes=rng.random() < 0.5,
    )


RELATIVES = tuple(_relative(seed) for seed in range(1, 7))


def pair(left: str, right: str) -> str:
    """Two sentences with the same meaning as one document."""
    return f"{left} = {right}"
