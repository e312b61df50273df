"""JSON and YAML that a user writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from cogsym.errors import CogsymError
from cogsym.records import check_file

SUFFIXES = (".yaml", ".yml", ".json")


def read(path: Path) -> Any:
    """What a file with one of `SUFFIXES` holds.

    Raises:
        CogsymError: it cannot be read, or is not what its name says.
    """
    check_file(path)
    try:
        text = path.read_text("utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise CogsymError(f"{path} cannot be read ({error.strerror or error}).") from error
    except (ValueError, yaml.YAMLError) as error:
        raise CogsymError(f"{path} is not {path.suffix[1:]}: {' '.join(str(error).split())}.") from error
