"""Names that stand for objects: those that come with cogsym, and those that other packages add.

A package adds an object by calling the register function of a registry when it is imported, or without being imported,
by an entry point of the registry's group, whose name is the object's name and whose value is the object:

    [project.entry-points."cogsym.actions"]
    revert_mlp = "my_package:REVERT_MLP"
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from cogsym.errors import CogsymError

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects of one sort by name. Iterating gives the names, in the order of registration and then of entry points.

    An entry point is imported when its object is asked for and not before.
    """

    def __init__(self, sort: str, group: str, check: Callable[[str, T], None] = lambda name, obj: None) -> None:
        """Start empty.

        Args:
            sort: what one is called in messages, such as "action".
            group: of the entry points, such as "cogsym.actions".
            check: raises CogsymError where an object may not have this name; it is not among the others yet.
        """
        self.sort, self.group, self._check = sort, group, check
        self._objects: dict[str, T] = {}

    def register(self, name: str, obj: T) -> None:
        """Add an object.

        Raises:
            CogsymError: there is one of this name, or it is not as it should be.
        """
        if name in self._objects:
            raise CogsymError(f"The {self.sort} {name!r} is registered already; choose another name for the new one.")
        self._check(name, obj)
        self._objects[name] = obj

    def __getitem__(self, name: str) -> T:
        """The object of a name.

        Raises:
            CogsymError: there is none, or the package that has it does not load.
        """
        if name not in self._objects:
            if name not in self._offered:
                raise unknown(self.sort, name, self)
            self.register(name, self._load(self._offered[name]))
        return self._objects[name]

    def __contains__(self, name: object) -> bool:
        return name in self._objects or name in self._offered

    def __iter__(self) -> Iterator[str]:
        return iter(list(dict.fromkeys([*self._objects, *self._offered])))

    def __len__(self) -> int:
        return len(list(iter(self)))

    @cached_property
    def _offered(self) -> dict[str, EntryPoint]:
        """The entry points of other packages, looked for once, when a name is not among the objects or all are named.

        Raises:
            CogsymError: two packages, or a package and cogsym, have the same name for an object.
        """
        offered: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            if point.name in self._objects or offered.get(point.name, point).value != point.value:
                raise CogsymError(
                    f"The package {_package(point)} has the {self.sort} {point.name!r} and there is one of this name "
                    "already; uninstall it, or rename its entry point."
                )
            offered[point.name] = point
        return offered

    def _load(self, point: EntryPoint) -> T:
        try:
            return point.load()
        except Exception as error:
            raise CogsymError(
                f"The {self.sort} {point.name!r} of the package {_package(point)} does not load "
                f"({type(error).__name__}: {' '.join(str(error).split())}); repair or uninstall that package."
            ) from error


def unknown(sort: str, name: object, known: Iterable[str], where: str = "") -> CogsymError:
    """The error about a name that stands for nothing, with those that do and, where one is like it, a suggestion.

    Args:
        sort: what it was to be the name of, such as "action".
        name: the name.
        known: the names that there are.
        where: where it stands, such as " of task xcopa".
    """
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    suggestion = f"; did you mean {close[0]}?" if close else "."
    return CogsymError(f"The {sort} {name!r}{where} is unknown, expected one of {', '.join(names)}{suggestion}")


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value
