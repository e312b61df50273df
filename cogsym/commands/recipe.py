"""Recipes: the options of a command in a YAML file, as the command itself declares them."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
import yaml
from typer.core import TyperCommand

from cogsym import user_files
from cogsym.commands.options import key_of, option_of
from cogsym.errors import CogsymError, RunStopped, SettingError
from cogsym.registry import unknown

_SUFFIXES = (".yaml", ".yml")
_FILE = f"{__name__}.file"  # of the recipe, in a context's meta
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


@dataclass(frozen=True)
class _Option:
    """An option, or the argument, of a command: its key in a recipe, and what the command declares of it."""

    name: str
    key: str
    kind: Any
    default: Any
    help: str
    panel: str

    @property
    def expected(self) -> str:
        """What its value is, in words."""
        if get_origin(self.kind) is list:
            return "a text or a list of texts"
        if issubclass(self.kind, Enum):
            *first, last = (str(choice.value) for choice in self.kind)
            return f"{', '.join(first)} or {last}" if first else last
        return _EXPECTED[self.kind]

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is inspect.Parameter.empty

    @property
    def shown(self) -> Any:
        """Its default, as a recipe has it."""
        if isinstance(self.default, Enum):
            return self.default.value
        return None if self.required else self.default

    def read(self, value: Any, file: Path) -> Any:
        """The value of its key in a file, if it is of the option's type.

        Raises:
            CogsymError: it is not.
        """
        if get_origin(self.kind) is list:
            value = [value] if isinstance(value, str) else value
            fits = isinstance(value, list) and all(isinstance(text, str) for text in value)
        elif issubclass(self.kind, Enum):
            fits = value in [choice.value for choice in self.kind]
        elif self.kind is float:
            value = _number(value)
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        else:
            fits = type(value) is (str if self.kind is Path else self.kind)
        if not fits:
            quotes = "; put it in quotes" if self.kind in (str, Path) else ""
            raise CogsymError(f"{self.key} in {file} is {value!r}, expected {self.expected}{quotes}.")
        return value


class RecipeCommand(TyperCommand):
    """A command whose argument MODEL may be a recipe; what is wrong in that is said to be there."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except RunStopped:
            raise
        except CogsymError as error:
            file = ctx.meta.get(_FILE)
            if not file:
                raise
            if not isinstance(error, SettingError):
                raise CogsymError(f"{file}: {error}") from error
            name = {option.key: option.name for option in _options(self)}.get(key_of(option_of(error.name)))
            source = name and ctx.get_parameter_source(name)
            if source and source.name == "DEFAULT_MAP":
                raise CogsymError(f"{key_of(option_of(error.name))} in {file} {error.problem}") from error
            raise


def _from_recipe(ctx: typer.Context, model: str) -> str:
    """The model that is named; of a recipe its own, and what it says is the default of each option."""
    file = Path(model)
    if file.suffix not in _SUFFIXES or file.is_dir():
        return model
    given = user_files.read(file)
    if not isinstance(given, dict):
        raise CogsymError(f"{file} holds a {type(given).__name__}, expected options, such as `steps: 100`.")
    options = {option.key: option for option in _options(ctx.command)}
    for key in given:
        if key not in options:
            raise unknown("key", key, options, f" in {file}")
    read = {options[key].name: options[key].read(value, file) for key, value in given.items() if value is not None}
    if "model" not in read:
        raise CogsymError(f"model in {file} is not given, expected a model folder or the id of a model on the hub.")
    ctx.default_map, ctx.meta[_FILE] = read, file
    return read["model"]


# Eager: what a recipe says is there before the options ask for their defaults.
Model = Annotated[
    str,
    typer.Argument(
        help="A model folder (safetensors) or the id of a model on the hub.", callback=_from_recipe, is_eager=True
    ),
]


def printed(command: Any) -> str:
    """A recipe with every option of a command at its default.

    Args:
        command: as `typer.main.get_command` gives it.
    """
    lines = _comment(
        f"A recipe for `cogsym {command.name}`: every option, with its default. Change what you want to, leave out the "
        f"rest, and run `cogsym {command.name} recipe.yaml`. An option that is typed behind it wins over the one here; "
        "paths are from the folder in which the command is run."
    )
    options = _options(command)
    for panel in dict.fromkeys(option.panel for option in options):
        lines += ["", *_comment(panel.upper())] if panel else []
        for option in options:
            if option.panel == panel:
                lines += ["", *_comment(f"{option.help} ({option.expected}{'; to be given' * option.required})")]
                lines += yaml.safe_dump({option.key: option.shown}, allow_unicode=True).splitlines()
    return "\n".join(lines)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 98, break_long_words=False, break_on_hyphens=False)]


def _options(command: Any) -> list[_Option]:
    """The options of a command in the order of its declaration."""
    function: Callable[..., Any] = inspect.unwrap(command.callback)
    hints = get_type_hints(function, include_extras=True)
    parameters = {parameter.name: parameter for parameter in command.params}
    found = []
    for name, of_function in inspect.signature(function).parameters.items():
        kind, declared, *_ = get_args(hints[name])
        if isinstance(kind, UnionType):
            kind = next(part for part in get_args(kind) if part is not NoneType)
        key, panel = key_of(parameters[name].opts[0]), declared.rich_help_panel or ""
        found.append(_Option(name, key, kind, of_function.default, declared.help, panel))
    return found


def _number(value: Any) -> Any:
    """A number that YAML reads as a text, such as 3e-4, and all else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
