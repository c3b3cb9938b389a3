"""Where the other rooms of the house are found: callbacks/, data/, configs/ and scripts/."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from stasc.errors import UserError

_PACKAGE = Path(__file__).parent

HOUSE = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
"""The folder of all rooms: the repository. A wheel has them in ``stasc``, to meet nobody else's ``data``."""

OWN_PACKAGES = ("callbacks", "data")
"""What is imported by these names is always ours."""


class OwnPackages:
    """Finds our packages before Python looks anywhere else: the user's folder may have a ``data/`` too."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """How to load one of our packages; None for all other modules, which are found as always."""
        return PathFinder.find_spec(name, [str(HOUSE)]) if name in OWN_PACKAGES else None


def config_file(name: str) -> str:
    """The path of a config that comes with the program, by its name, such as ``quickstart``.

    A file of this name in the working folder comes first; a path with a suffix stays as it is.

    Raises:
        UserError: There is no config of this name.
    """
    if not re.fullmatch(r"\w[\w/-]*", name) or Path(name).is_file():
        return name
    configs = HOUSE / "configs"
    packaged = configs / f"{name}.yaml"
    if not packaged.is_file():
        raise UserError(
            f"there is no config {name}: give a file, or the name of one in {configs}, such as quickstart."
        )
    return str(packaged)
