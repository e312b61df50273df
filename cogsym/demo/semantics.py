"""What the demo's sentences say: meanings, in no language, with the probability of each.

A meaning falls into train, dev or test by a hash of its content, so the sets are disjoint whatever the seed. The
probability of each meaning is known (`surprisal`), and with it the fewest bits any model can need per sentence.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

KINDS = ("person", "animal", "food", "thing", "place")
TENSES = ("past", "present", "future")
SPLITS = ("train", "dev", "test")

NOUNS: dict[str, tuple[str, ...]] = {
    "person": ("farmer", "teacher", "doctor", "king", "child", "woman", "man", "girl"),
    "animal": ("dog", "cat", "horse", "goat", "lion", "bird", "snake", "cow"),
    "food": ("apple", "banana", "cake", "egg", "potato", "fish"),
    "thing": ("book", "basket", "boat", "drum", "hat", "knife", "lamp", "box"),
    "place": ("river", "market", "school", "forest", "house", "bridge"),
}
IRREGULAR_PLURALS = {
    "child": "children",
    "woman": "women",
    "man": "men",
    "fish": "fishes",
    "potato": "potatoes",
    "box": "boxes",
    "knife": "knives",
}
ADJECTIVES = ("big", "small", "old", "new", "red", "black", "good", "strange")
PREPOSITIONS = ("near", "in", "behind")


@dataclass(frozen=True)
class Verb:
    """An English verb with its forms and the kinds of nouns it goes with (no `objects`: intransitive)."""

    base: str
    past: str
    participle: str
    subjects: tuple[str, ...]
    objects: tuple[str, ...] = ()


def _verbs() -> tuple[Verb, ...]:
    living, people = ("person", "animal"), ("person",)
    anything, portable = ("person", "animal", "food", "thing"), ("food", "thing")
    return (
        Verb("see", "saw", "seen", living, anything),
        Verb("find", "found", "found", living, anything),
        Verb("follow", "followed", "followed", living, living),
        Verb("fear", "feared", "feared", living, living),
        Verb("love", "loved", "loved", people, anything),
        Verb("wash", "washed", "washed", people, anything),
        Verb("eat", "ate", "eaten", living, ("food",)),
        Verb("cook", "cooked", "cooked", people, ("food",)),
        Verb("carry", "carried", "carried", living, portable),
        Verb("buy", "bought", "bought", people, portable),
        Verb("hide", "hid", "hidden", living, portable),
        Verb("break", "broke", "broken", living, ("thing",)),
        Verb("sleep", "slept", "slept", living),
        Verb("run", "ran", "run", living),
        Verb("sing", "sang", "sung", living),
        Verb("fall", "fell", "fallen", living),
        Verb("wait", "waited", "waited", living),
        Verb("laugh", "laughed", "laughed", living),
    )


VERBS = {verb.base: verb for verb in _verbs()}
TRANSITIVE = tuple(name for name, verb in VERBS.items() if verb.objects)
INTRANSITIVE = tuple(name for name, verb in VERBS.items() if not verb.objects)
KIND_OF = {noun: kind for kind in KINDS for noun in NOUNS[kind]}

P_TRANSITIVE, P_PLURAL, P_ADJECTIVE, P_PLACE = 0.75, 0.5, 0.3, 0.4


@dataclass(frozen=True)
class NounPhrase:
    """A noun with its number and perhaps an adjective."""

    noun: str
    plural: bool
    adjective: str | None = None


@dataclass(frozen=True)
class Meaning:
    """What a sentence says, in no language; `place` is (preposition, noun)."""

    subject: NounPhrase
    verb: str
    tense: str
    object: NounPhrase | None = None
    place: tuple[str, str] | None = None


def sample_meaning(rng: random.Random) -> Meaning:
    """Draw one meaning; `surprisal` gives the probability of each."""
    verb = VERBS[rng.choice(TRANSITIVE if rng.random() < P_TRANSITIVE else INTRANSITIVE)]
    subject = _sample_noun_phrase(rng, verb.subjects)
    tense = rng.choice(TENSES)
    direct_object = _sample_noun_phrase(rng, verb.objects) if verb.objects else None
    place = (rng.choice(PREPOSITIONS), rng.choice(NOUNS["place"])) if rng.random() < P_PLACE else None
    return Meaning(subject, verb.base, tense, direct_object, place)


def _sample_noun_phrase(rng: random.Random, kinds: tuple[str, ...]) -> NounPhrase:
    noun = rng.choice(NOUNS[rng.choice(kinds)])
    plural = rng.random() < P_PLURAL
    return NounPhrase(noun, plural, rng.choice(ADJECTIVES) if rng.random() < P_ADJECTIVE else None)


def surprisal(meaning: Meaning) -> float:
    """-log2 of the probability that `sample_meaning` draws `meaning`, in bits."""
    verb = VERBS[meaning.verb]
    transitive = meaning.object is not None
    p = P_TRANSITIVE / len(TRANSITIVE) if transitive else (1 - P_TRANSITIVE) / len(INTRANSITIVE)
    p *= _noun_phrase_probability(meaning.subject, verb.subjects) / len(TENSES)
    if meaning.object is not None:
        p *= _noun_phrase_probability(meaning.object, verb.objects)
    p *= P_PLACE / len(PREPOSITIONS) / len(NOUNS["place"]) if meaning.place else 1 - P_PLACE
    return -math.log2(p)


def _noun_phrase_probability(phrase: NounPhrase, kinds: tuple[str, ...]) -> float:
    p = 1 / len(kinds) / len(NOUNS[KIND_OF[phrase.noun]])
    p *= P_PLURAL if phrase.plural else 1 - P_PLURAL
    return p * (P_ADJECTIVE / len(ADJECTIVES) if phrase.adjective else 1 - P_ADJECTIVE)


def split_of(meaning: Meaning) -> str:
    """The set a meaning belongs to, by a hash of its content: 90 % train, 5 % dev, 5 % test."""
    digest = hashlib.blake2b(repr(meaning).encode(), digest_size=4).digest()
    bucket = int.from_bytes(digest, "little") % 20
    return {0: "dev", 1: "test"}.get(bucket, "train")


def meanings(split: str, seed: int) -> Iterator[Meaning]:
    """An endless stream of meanings of one split; the stream is a function of `split` and `seed`.

    Raises ValueError for a split that is not in `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split} {seed}")
    while True:
        meaning = sample_meaning(rng)
        if split_of(meaning) == split:
            yield meaning


def distractors(meaning: Meaning, rng: random.Random, count: int = 3) -> list[Meaning]:
    """`count` different meanings that differ from `meaning` in one slot each, as far as possible a different slot each.

    A noun, verb or adjective is replaced by another of the same kind, so the sentence stays plausible.
    """
    changes = [
        change
        for change in (_other_tense, _other_verb, _other_place, *_phrase_changes("subject"), *_phrase_changes("object"))
        if change(meaning, rng) is not None
    ]
    rng.shuffle(changes)
    found: list[Meaning] = []
    while len(found) < count:
        for change in changes:
            other = change(meaning, rng)
            if other is not None and other not in found and len(found) < count:
                found.append(other)
    return found


Change = Callable[[Meaning, random.Random], Meaning | None]


def _another(rng: random.Random, options: tuple[str, ...], current: str) -> str:
    return rng.choice([option for option in options if option != current])


def _other_tense(meaning: Meaning, rng: random.Random) -> Meaning:
    return replace(meaning, tense=_another(rng, TENSES, meaning.tense))


def _other_verb(meaning: Meaning, rng: random.Random) -> Meaning | None:
    subject = KIND_OF[meaning.subject.noun]
    object_kind = KIND_OF[meaning.object.noun] if meaning.object else None
    fitting = tuple(
        name
        for name, verb in VERBS.items()
        if subject in verb.subjects and (object_kind in verb.objects if object_kind else not verb.objects)
    )
    return replace(meaning, verb=_another(rng, fitting, meaning.verb))


def _other_place(meaning: Meaning, rng: random.Random) -> Meaning | None:
    if meaning.place is None:
        return None
    preposition, noun = meaning.place
    if rng.random() < 0.5:
        return replace(meaning, place=(_another(rng, PREPOSITIONS, preposition), noun))
    return replace(meaning, place=(preposition, _another(rng, NOUNS["place"], noun)))


def _phrase_changes(slot: str) -> tuple[Change, Change, Change]:
    def phrase_of(meaning: Meaning) -> NounPhrase | None:
        return meaning.subject if slot == "subject" else meaning.object

    def put(meaning: Meaning, phrase: NounPhrase) -> Meaning:
        return replace(meaning, subject=phrase) if slot == "subject" else replace(meaning, object=phrase)

    def other_noun(meaning: Meaning, rng: random.Random) -> Meaning | None:
        phrase = phrase_of(meaning)
        if phrase is None:
            return None
        return put(meaning, replace(phrase, noun=_another(rng, NOUNS[KIND_OF[phrase.noun]], phrase.noun)))

    def other_number(meaning: Meaning, rng: random.Random) -> Meaning | None:
        phrase = phrase_of(meaning)
        return None if phrase is None else put(meaning, replace(phrase, plural=not phrase.plural))

    def other_adjective(meaning: Meaning, rng: random.Random) -> Meaning | None:
        phrase = phrase_of(meaning)
        if phrase is None or phrase.adjective is None:
            return None
        return put(meaning, replace(phrase, adjective=_another(rng, ADJECTIVES, phrase.adjective)))

    return other_noun, other_number, other_adjective
