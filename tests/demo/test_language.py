import math
import random
from itertools import islice

import pytest

from cogsym.demo import language
from cogsym.demo.language import Meaning, NounPhrase, base_sentence, new_sentence

FARMERS = Meaning(NounPhrase("farmer", True, "old"), "carry", "future", NounPhrase("basket", True), ("near", "river"))


def some_meanings(split: str, seed: int, count: int = 500) -> list[Meaning]:
    return list(islice(language.meanings(split, seed), count))


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


def test_new_sentence_has_its_own_order_and_affixes() -> None:
    stem = language.new_stems()
    # Place with its suffix, subject and adjective with the same prefix, object, then subject-tense-object-verb.
    words = [
        f"pa{stem['river']}ke",
        f"ba{stem['farmer']}",
        f"ba{stem['old']}",
        f"ta{stem['basket']}",
        f"basata{stem['carry']}.",
    ]
    assert new_sentence(FARMERS).split() == words
    assert new_sentence(FARMERS) == "papezike bagizi babema tazura basatasiko."


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        (NounPhrase("farmer", False, "old"), "mogizi mobema modiwaki."),
        (NounPhrase("farmer", True, "old"), "bagizi babema badiwaki."),
        (NounPhrase("dog", False), "neviko nediwaki."),
        (NounPhrase("dog", True), "ziviko zidiwaki."),
    ],
)
def test_class_and_number_agree_on_noun_adjective_and_verb(subject: NounPhrase, expected: str) -> None:
    assert new_sentence(Meaning(subject, "fall", "past")) == expected


def test_streams_depend_on_split_and_seed_alone() -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    assert some_meanings("train", seed) == some_meanings("train", seed)
    assert some_meanings("train", seed) != some_meanings("train", seed + 1)
    with pytest.raises(ValueError, match="expected one of train, dev, test"):
        next(language.meanings("valid", 0))


def test_splits_are_disjoint_for_any_seed() -> None:
    seeds = random.sample(range(10**6), 3)
    print("seeds", seeds)
    sets = [set(some_meanings(split, seed, 3000)) for split, seed in zip(language.SPLITS, seeds, strict=True)]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_a_sentence_has_one_meaning_in_either_language() -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    meanings = set(some_meanings("train", seed, 20_000))
    assert len({new_sentence(meaning) for meaning in meanings}) == len(meanings)
    forms = [base_sentence(meaning, *form) for meaning in meanings for form in language.base_forms(meaning)]
    assert len(set(forms)) == len(forms)


def test_parallel_sentences_change_together() -> None:
    """What changes in the meaning changes both sentences, in the words that carry it and nowhere else."""
    past = Meaning(FARMERS.subject, "carry", "past", FARMERS.object, FARMERS.place)
    assert base_sentence(past).split()[:3] == base_sentence(FARMERS).split()[:3]
    assert new_sentence(past).split()[:-1] == new_sentence(FARMERS).split()[:-1]
    assert new_sentence(past).split()[-1] == "baditasiko."


def test_surprisal_is_the_logarithm_of_the_frequency() -> None:
    rng = random.Random(random.randrange(10**6))
    drawn = [language.sample_meaning(rng) for _ in range(40_000)]
    # Importance sampling: the mean of 1 / p over draws counts the meanings that can be drawn.
    bare = [m for m in drawn if m.object is None and m.place is None and m.subject.adjective is None]
    count = sum(2 ** language.surprisal(m) for m in bare) / len(drawn)
    expected = sum(
        len(language.NOUNS[kind]) * 2 * 3
        for verb in language.VERBS.values()
        if not verb.objects
        for kind in verb.subjects
    )
    assert count == pytest.approx(expected, rel=0.1)


def test_distractors_differ_from_the_truth_and_from_each_other() -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    for meaning in some_meanings("test", seed, 300):
        wrong = language.distractors(meaning, rng)
        assert len({meaning, *wrong}) == 4
        for other in wrong:
            slots = ("verb", "tense", "subject", "object", "place")
            assert sum(getattr(meaning, slot) != getattr(other, slot) for slot in slots) == 1
            assert math.isfinite(language.surprisal(other))
            assert base_sentence(other) != base_sentence(meaning)
