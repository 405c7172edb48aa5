"""What the options of several subcommands share."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import tyro
from dp_accounting import NeighboringRelation

RelationName: TypeAlias = Literal["add-or-remove-one", "replace-one", "replace-special"]


def relation(name: RelationName) -> NeighboringRelation:
    return NeighboringRelation[name.replace("-", "_").upper()]


def hint(text: str, metavar: str | None = None) -> Any:
    """Shows `(text)` in the help of an option, in the place of its default."""
    return tyro.conf.arg(help_behavior_hint=f"({text})", metavar=metavar)
