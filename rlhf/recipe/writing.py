"""Recipes written back, and which of their fields decide whether a stage is stale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from rlhf.recipe.model import ModelSection
from rlhf.recipe.reading import StrictDumper
from rlhf.recipe.whole import Recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; reading it gives an equal recipe.

    With `base` it has no section `model`: the architecture is the base's.
    """
    plain = _plain(recipe)
    if recipe.base is not None and recipe.model == ModelSection():
        del plain["model"]
    text: str = yaml.dump(plain, Dumper=StrictDumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def _plain(section: BaseModel) -> dict[str, Any]:
    """The values of a section by their keys; a null that is the default is left out."""
    found: dict[str, Any] = {}
    dumped = section.model_dump(mode="json", by_alias=True)
    for name, field in type(section).model_fields.items():
        key, value = field.alias or name, getattr(section, name)
        if isinstance(value, BaseModel):
            found[key] = _plain(value)
        elif isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in value):
            found[key] = [_plain(item) for item in value]
        elif value is not None or field.default is not None:
            found[key] = dumped[key]
    return found


def result_fields(section: BaseModel) -> dict[str, Any]:
    """The flat `a.b.c: value` pairs of a section that change its stage's result."""
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("changes_result") is False:
            continue
        value = getattr(section, name)
        key = field.alias or name
        if isinstance(value, BaseModel):
            found |= {f"{key}.{inner}": v for inner, v in result_fields(value).items()}
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            defaults = {k: f.default for k, f in type(value[0]).model_fields.items()}
            found[key] = [{k: v for k, v in result_fields(item).items() if v != defaults.get(k)} for item in value]
        elif isinstance(value, tuple):
            found[key] = list(value)
        else:
            found[key] = value
    return found


def fields_at_default(section: BaseModel) -> set[str]:
    """The keys of `result_fields` whose values nobody had to give."""
    found: set[str] = set()
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), field.alias or name
        if isinstance(value, BaseModel):
            # a section that is only there when somebody writes it is never at its default
            found |= {f"{key}.{inner}" for inner in fields_at_default(value)} if field.default is not None else set()
        elif value == field.default:
            found.add(key)
    return found


def newer_keys(keys: set[str], was: Mapping[str, Any]) -> set[str]:
    """Those of the keys that an older version of a section's `result_fields` didn't know.

    `a.b.c` was known where `a.b` is there: then nothing stood in the place of that section.
    """

    def known(key: str) -> bool:
        parts = key.split(".")
        return any(".".join(parts[: length + 1]) in was for length in range(len(parts)))

    return {key for key in keys if not known(key)}
