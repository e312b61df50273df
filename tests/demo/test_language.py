import math
import random
from itertools import islice

import pytest

from cogsym.demo import language, semantics
from cogsym.demo.language import TAVOSI, base_sentence, invented_sentence
from cogsym.demo.semantics import Meaning, NounPhrase

FARMERS = Meaning(NounPhrase("farmer", True, "old"), "carry", "future", NounPhrase("basket", True), ("near", "river"))


def tavosi(meaning: Meaning) -> str:
    return invented_sentence(meaning, TAVOSI)


def some_meanings(split: str, seed: int, count: int = 500) -> list[Meaning]:
    return list(islice(semantics.meanings(split, seed), count))


def test_the_example_at_the_head_of_the_module_is_one() -> None:
    assert f"    {base_sentence(FARMERS)}\n    {tavosi(FARMERS)}\n" in (language.__doc__ or "")


def test_base_sentence_by_value() -> None:
    assert base_sentence(FARMERS) == "the old farmers will carry the baskets near the river."
    assert base_sentence(FARMERS, passive=True) == "the baskets will be carried by the old farmers near the river."
    assert base_sentence(FARMERS, place_first=True) == "near the river the old farmers will carry the baskets."
    fish = Meaning(NounPhrase("woman", False), "wash", "present", NounPhrase("fish", True, "red"))
    assert base_sentence(fish) == "the woman washes the red fishes."
    assert base_sentence(fish, passive=True) == "the red fishes are washed by the woman."
    child = Meaning(NounPhrase("child", True), "run", "past")
    assert base_sentence(child) == "the children ran."
    with pytest.raises(ValueError, match="no passive"):
        base_sentence(child, passive=True)


def test_tavosi_by_value() -> None:
    assert tavosi(FARMERS) == "mosugeni gefada gesoma donaru gesodozado."
    # Place with its case, subject and adjective with the same prefix, object, then subject-tense-object-verb.
    words = language.lexicon(TAVOSI.seed)
    stem = words.stems
    (_, people), (_, things) = words.classes["person"], words.classes["thing"]
    assert tavosi(FARMERS).split() == [
        words.classes["place"][0] + stem["river"] + words.cases["near"],
        people + stem["farmer"],
        people + stem["old"],
        things + stem["basket"],
        people + words.tenses["future"] + things + stem["carry"] + ".",
    ]


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        (NounPhrase("farmer", False, "old"), "bifada bisoma bidujowa."),
        (NounPhrase("farmer", True, "old"), "gefada gesoma gedujowa."),
        (NounPhrase("dog", False), "vusage vudujowa."),
        (NounPhrase("dog", True), "wosage wodujowa."),
    ],
)
def test_class_and_number_agree_on_noun_adjective_and_verb(subject: NounPhrase, expected: str) -> None:
    assert tavosi(Meaning(subject, "fall", "past")) == expected


def test_another_grammar_of_the_family() -> None:
    grammar = language.Grammar(
        "test",
        TAVOSI.seed,
        order=("verb", "object", "place", "subject"),
        verb_parts=("stem", "object", "tense", "subject"),
        adjective_first=True,
        suffixes=True,
    )
    assert invented_sentence(FARMERS, grammar) == "zadodosoge narudo sugemoni somage fadage."


def test_relatives_differ_from_tavosi_in_words_and_structure() -> None:
    structures = {(g.order, g.verb_parts, g.adjective_first, g.suffixes) for g in (TAVOSI, *language.RELATIVES)}
    assert len(structures) == 1 + len(language.RELATIVES)
    ours = language.lexicon(TAVOSI.seed).stems
    for relative in language.RELATIVES:
        theirs = language.lexicon(relative.seed).stems
        assert sum(ours[lemma] == theirs[lemma] for lemma in ours) <= 1


def test_streams_depend_on_split_and_seed_alone() -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    assert some_meanings("train", seed) == some_meanings("train", seed)
    assert some_meanings("train", seed) != some_meanings("train", seed + 1)
    with pytest.raises(ValueError, match="expected one of train, dev, test"):
        next(semantics.meanings("valid", 0))


def test_splits_are_disjoint_for_any_seed() -> None:
    seeds = random.sample(range(10**6), 3)
    print("seeds", seeds)
    sets = [set(some_meanings(split, seed, 3000)) for split, seed in zip(semantics.SPLITS, seeds, strict=True)]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_a_sentence_has_one_meaning_in_either_language() -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    meanings = set(some_meanings("train", seed, 20_000))
    assert len({tavosi(meaning) for meaning in meanings}) == len(meanings)
    forms = [base_sentence(meaning, *form) for meaning in meanings for form in language.base_forms(meaning)]
    assert len(set(forms)) == len(forms)


def test_parallel_sentences_change_together() -> None:
    """What changes in the meaning changes both sentences, in the words that carry it and nowhere else."""
    past = Meaning(FARMERS.subject, "carry", "past", FARMERS.object, FARMERS.place)
    assert base_sentence(past).split()[:3] == base_sentence(FARMERS).split()[:3]
    assert tavosi(past).split()[:-1] == tavosi(FARMERS).split()[:-1]
    assert tavosi(past).split()[-1] == "gedudozado."


def test_surprisal_is_the_logarithm_of_the_frequency() -> None:
    rng = random.Random(random.randrange(10**6))
    drawn = [semantics.sample_meaning(rng) for _ in range(40_000)]
    # Importance sampling: the mean of 1 / p over draws counts the meanings that can be drawn.
    bare = [m for m in drawn if m.object is None and m.place is None and m.subject.adjective is None]
    count = sum(2 ** semantics.surprisal(m) for m in bare) / len(drawn)
    expected = sum(
        len(semantics.NOUNS[kind]) * 2 * 3
        for verb in semantics.VERBS.values()
        if not verb.objects
        for kind in verb.subjects
    )
    assert count == pytest.approx(expected, rel=0.1)


def test_distractors_differ_from_the_truth_and_from_each_other() -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    for meaning in some_meanings("test", seed, 300):
        wrong = semantics.distractors(meaning, rng)
        assert len({meaning, *wrong}) == 4
        for other in wrong:
            slots = ("verb", "tense", "subject", "object", "place")
            assert sum(getattr(meaning, slot) != getattr(other, slot) for slot in slots) == 1
            assert math.isfinite(semantics.surprisal(other))
            assert base_sentence(other) != base_sentence(meaning)
