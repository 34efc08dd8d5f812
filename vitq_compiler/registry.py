"""The file name is the registry.

``passes/insert_qdq.py`` holds the class ``InsertQdq`` and is called ``insert-qdq`` everywhere else: in recipes, on the
command line, in reports. Adding a file adds the name. Listing reads a folder and imports nothing; loading imports one
module. Files that start with an underscore are private and have no name.

A package is named as it is below ``vitq_compiler`` (``"passes"``); a name with a dot is taken as it is (``"mine.passes"``).
"""

import difflib
import importlib
import importlib.util
import pkgutil
from typing import Any

from vitq_compiler.errors import RecipeError


def names(package: str) -> tuple[str, ...]:
    """Every name in the package, kebab-case, sorted; nothing is imported."""
    spec = importlib.util.find_spec(_dotted(package))
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"no package {_dotted(package)}")
    files = (info.name for info in pkgutil.iter_modules(spec.submodule_search_locations))
    return tuple(sorted(file.replace("_", "-") for file in files if not file.startswith("_")))


def load(package: str, name: str) -> type[Any]:
    """The class of that name; only its own module is imported.

    Raises:
        RecipeError: no file has that name; the message says which names are near.
    """
    known = names(package)
    if name not in known:
        kind = package.rpartition(".")[2]
        near = [f'"{other}"' for other in difflib.get_close_matches(name.lower().replace("_", "-"), known)]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise RecipeError(f'no "{name}" in {kind}; {hint}`vitq-compile --list-{kind}` prints them all')
    module = importlib.import_module(f"{_dotted(package)}.{name.replace('-', '_')}")
    found: type[Any] = getattr(module, class_name(name))
    return found


def class_name(name: str) -> str:
    """``insert-qdq`` -> ``InsertQdq``: each word capitalized, acronyms too."""
    return "".join(word.capitalize() for word in name.split("-"))


def _dotted(package: str) -> str:
    return package if "." in package else f"vitq_compiler.{package}"
