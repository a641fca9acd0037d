"""Recipes read from YAML with `key=value` overrides; errors name file, key, what was expected and the nearest name."""

from __future__ import annotations

import difflib
import json
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rlhf.errors import RecipeError
from rlhf.recipe.whole import Recipe


def load_recipe(name_or_path: str, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Reads a shipped recipe by name or any recipe by path, applies the overrides and checks everything.

    Raises RecipeError with the file, the key, what was expected and the nearest right name.
    """
    path = find_recipe(name_or_path)
    raw = _read_recipe(path)
    for override in overrides:
        _apply(raw, override)
    return parse_recipe(raw, f"{path} with {' '.join(overrides)}" if overrides else str(path))


def parse_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """A Recipe from the plain values of a YAML file; `where` is named in errors."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{where}:\n" + "\n".join(f"  {_explain(e)}" for e in _causes(error.errors()))) from None


def _causes(errors: Sequence[Any]) -> list[Any]:
    """The errors less those that only follow: a list whose one item is wrong is not empty besides."""
    places = [error["loc"] for error in errors]

    def follows(error: Any) -> bool:
        here = error["loc"]
        return error["type"] == "too_short" and any(len(p) > len(here) and p[: len(here)] == here for p in places)

    return [error for error in errors if not follows(error)]


def shipped_recipes() -> list[Path]:
    """The recipes that come with the package, the quickstart first."""
    folder = Path(__file__).resolve().parents[2] / "recipes"
    return sorted(folder.glob("*.yaml"), key=lambda p: (p.stem != "quickstart", p.stem))


def known_base(name: str) -> dict[str, Any] | None:
    """The configuration of a base that a shipped recipe names by its hub id, as far as shapes go; None for others.

    So what a recipe needs can be told where the hub is out of reach.
    """
    path = shipped_recipes()[0].parent / "bases" / f"{name.replace('/', '--')}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def find_recipe(name_or_path: str) -> Path:
    """The file of a shipped recipe's name, or the path itself."""
    for path in shipped_recipes():
        if path.stem == name_or_path:
            return path
    path = Path(name_or_path)
    try:
        if path.is_dir():
            raise RecipeError(f"{path} is a directory, not a recipe file")
        exists = path.exists()
        if exists and not path.is_file() and path != Path(os.devnull):
            raise RecipeError(f"{path} is no plain file, so not a recipe")
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise RecipeError(f"no recipe file {name_or_path[:100]}: {error}") from None
    if not exists:
        names = [p.stem for p in shipped_recipes()]
        raise RecipeError(f"no recipe file {path}, and no shipped recipe has that name" + _nearest(name_or_path, names))
    return path


MAX_RECIPE_BYTES = 1_000_000


def _read_recipe(path: Path) -> dict[str, Any]:
    raw = read_yaml(path, "recipe")
    if raw is None:
        raise RecipeError(f"{path}: empty; a recipe has at least `name` and a section for each of its `stages`")
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, not a {type(raw).__name__}")
    return raw


def read_yaml(path: Path, what: str) -> Any:
    """The plain values of a YAML file: no tags, no key twice. Raises RecipeError, which says that it is no `what`."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: can't be read: {error.strerror}") from None
    if len(data) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_RECIPE_BYTES:,} bytes, so not a {what}")
    try:
        text = data.decode("utf-8-sig")
        return yaml.load(text, Loader=StrictLoader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}), so not a {what}") from None
    except yaml.YAMLError as error:
        why = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
        raise RecipeError(f"{path}: not valid YAML: {why}") from None
    except (ValueError, RecursionError) as error:  # a date out of range, a thousand brackets
        raise RecipeError(f"{path}: not valid YAML: {error or 'nested too deeply'}") from None


_SCALARS = {  # what counts as more than text, as YAML 1.2 has it: no 1:30, no 010, no yes; 1e-4 is a number
    "tag:yaml.org,2002:bool": ("^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "tag:yaml.org,2002:int": ("^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"^(?:[-+]?(?:[0-9][0-9_]*)?\.?[0-9_]+(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*\.(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
}


def _resolve_as_we_do(kind: Any) -> None:
    """Gives a loader or dumper our rules for plain scalars."""
    kind.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if tag not in _SCALARS]
        for first, rules in kind.yaml_implicit_resolvers.items()
    }
    for tag in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
        pattern, firsts = _SCALARS[tag]
        kind.add_implicit_resolver(tag, re.compile(pattern), list(firsts))


class StrictLoader(yaml.SafeLoader):
    """YAML's safe part; a key that comes twice is an error."""


class StrictDumper(yaml.SafeDumper):
    """Writes what `StrictLoader` reads back: text that looks like a number is quoted."""


_resolve_as_we_do(StrictLoader)
_resolve_as_we_do(StrictDumper)


def _no_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", key_node.start_mark)
        seen.add(key)
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicates)


def _apply(raw: dict[str, Any], override: str) -> None:
    """Sets one `a.b.c=value` in the plain values; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: expected key=value, for example ppo.kl.coefficient=0.1")
    try:
        value = yaml.load(text, Loader=StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RecipeError(f"override {override!r}: {text!r} is not a YAML value") from None
    *parents, last = key.split(".")
    place = raw
    for parent in parents:
        inner = place.get(parent)
        if inner is not None and not isinstance(inner, dict):
            raise RecipeError(f"override {override!r}: {parent} is not a section")
        inner = place[parent] = dict(inner or {})  # a copy: an anchor may have made it part of another section too
        place = inner
    place[last] = value


def _explain(error: Any) -> str:
    """One line for one pydantic error: key, what is wrong, what was expected, the nearest right name."""
    location: tuple[int | str, ...] = error["loc"]
    key = ".".join(str(part) for part in location) or "recipe"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        return f"{key}: unknown key" + _nearest(str(location[-1]), known)
    if error["type"] == "missing":
        return f"{key}: missing, and it has no default"
    if error["type"] == "value_error":
        return f"{key}: {message}" if location else message
    if error["type"] == "tuple_type":
        message = "must be a list"
    if error["type"] == "model_type":
        message = "must be a section, with keys such as " + ", ".join(_fields_at(location)[:4])
    given = error.get("input")
    shown = repr(given) if not isinstance(given, dict | list) else f"a {type(given).__name__}"
    return f"{key}: {message[0].lower() + message[1:]} (given: {shown[:80]})" + _nearest_choice(given, error)


def _nearest_choice(given: Any, error: Any) -> str:
    expected = str((error.get("ctx") or {}).get("expected", ""))
    if error["type"] != "literal_error" or not isinstance(given, str):
        return ""
    return _nearest(given[:100], re.findall(r"'([^']+)'", expected))


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known here: {', '.join(known)}" if known else ""


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys that the section at this place of a recipe has."""
    model: type[BaseModel] | None = Recipe
    for part in location:
        if isinstance(part, int) or model is None:
            continue
        by_key = {field.alias or name: field for name, field in model.model_fields.items()}
        field = by_key.get(part)
        model = _section_in(field.annotation) if field else None
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section inside an annotation such as `SftSection | None` or `tuple[Source, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        for inner in typing.get_args(annotation):
            found = _section_in(inner)
            if found:
                return found
    return None
