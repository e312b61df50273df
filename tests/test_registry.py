"""Names that stand for objects, ours and those of packages that are installed beside cogsym."""

from __future__ import annotations

from pathlib import Path

import pytest
from packages import install

from cogsym.errors import CogsymError
from cogsym.registry import Registry

GROUP = "cogsym.fruits"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_what_is_registered_is_found_in_its_order() -> None:
    fruits = Registry[int]("fruit", GROUP)
    for i, name in enumerate(("pear", "apple", "fig")):
        fruits.register(name, i)
    assert list(fruits) == ["pear", "apple", "fig"] and len(fruits) == 3
    assert fruits["apple"] == 1 and "apple" in fruits and "plum" not in fruits and None not in fruits


def test_a_misspelt_name_is_told_and_guessed() -> None:
    fruits = Registry[int]("fruit", GROUP)
    fruits.register("pear", 0)
    fruits.register("apple", 1)
    with pytest.raises(CogsymError) as caught:
        fruits["aple"]
    assert str(caught.value) == "The fruit 'aple' is unknown, expected one of pear, apple; did you mean apple?"
    with pytest.raises(CogsymError) as caught:
        fruits["quince"]
    assert str(caught.value) == "The fruit 'quince' is unknown, expected one of pear, apple."


def test_a_name_is_given_once() -> None:
    fruits = Registry[int]("fruit", GROUP)
    fruits.register("pear", 0)
    with pytest.raises(CogsymError, match="fruit 'pear' is registered already; choose another name"):
        fruits.register("pear", 0)
    assert fruits["pear"] == 0


def test_an_object_that_is_refused_is_not_there() -> None:
    def check(name: str, size: int) -> None:
        if size < 1:
            raise CogsymError(f"The fruit {name} has the size {size}, expected 1 or more.")

    fruits = Registry[int]("fruit", GROUP, check)
    with pytest.raises(CogsymError, match="size 0, expected 1 or more"):
        fruits.register("pear", 0)
    assert "pear" not in fruits


def test_entry_points_are_imported_when_they_are_asked_for(site: Path) -> None:
    install(site, "orchard_a", {GROUP: {"plum": "orchard_a:PLUM"}}, "PLUM = 7\n")
    install(site, "orchard_b", {GROUP: {"cherry": "orchard_b:CHERRY"}}, "raise RuntimeError('no\\ncherries')\n")
    fruits = Registry[int]("fruit", GROUP)
    fruits.register("pear", 0)
    assert set(fruits) == {"pear", "plum", "cherry"} and next(iter(fruits)) == "pear"
    assert "cherry" in fruits and fruits["plum"] == 7 and fruits["plum"] == 7
    with pytest.raises(CogsymError) as caught:
        fruits["cherry"]
    assert str(caught.value) == (
        "The fruit 'cherry' of the package orchard_b does not load (RuntimeError: no cherries); repair or uninstall "
        "that package."
    )


def test_a_package_may_not_take_a_name_that_there_is(site: Path) -> None:
    install(site, "orchard_c", {GROUP: {"pear": "orchard_c:PEAR"}}, "PEAR = 7\n")
    fruits = Registry[int]("fruit", GROUP)
    fruits.register("pear", 0)
    assert fruits["pear"] == 0
    with pytest.raises(CogsymError, match="package orchard_c has the fruit 'pear' and there is one of this name"):
        fruits["plum"]


def test_two_packages_may_not_have_the_same_name(site: Path) -> None:
    install(site, "orchard_d", {GROUP: {"plum": "orchard_d:PLUM"}}, "PLUM = 7\n")
    install(site, "orchard_e", {GROUP: {"plum": "orchard_e:PLUM"}}, "PLUM = 8\n")
    with pytest.raises(CogsymError, match="there is one of this name already"):
        Registry[int]("fruit", GROUP)["plum"]
