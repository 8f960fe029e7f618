# Copyright 2026 The lalm authors. Licensed under the Apache License, Version 2.0.
"""Recipe files and flags -> argument dataclasses; flags win over the recipe."""

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import yaml
from transformers import HfArgumentParser

import lalm
from lalm.errors import UserError, nearest_hint, one_line
from lalm.training.argument_checks import check_finite
from lalm.training.flag_names import name_hint

TOO_DEEP = "nests too deep, or refers to itself; write its values out"
DEEPEST, LARGEST = 20, 100_000


class QuietParser(HfArgumentParser):
    """`HfArgumentParser` whose complaints are one `UserError` instead of a page of usage."""

    def error(self, message: str):
        raise UserError(message)


def field_names(classes: Sequence[Any]) -> list[str]:
    """Return every name that a recipe or a flag may carry."""
    return [item.name for cls in classes for item in fields(cls) if item.init]


def recipe_folder() -> Path:
    """Return the folder of our recipes: in the package if lalm is installed, next to it in a clone."""
    package = Path(lalm.__file__).resolve().parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def find_recipe(name: str) -> str:
    """Return the path of a recipe, given as a path or as the name of one of ours.

    Raises:
        UserError: there is neither; the nearest name is given.
    """
    if Path(name).exists():
        return name
    ours = {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}
    plain = name.removeprefix("recipes/").removesuffix(".yaml")
    if plain in ours:
        return str(ours[plain])
    raise UserError(
        f"cannot read the recipe {name}: there is no such file{nearest_hint(plain, list(ours))}; ours are "
        f"{', '.join(ours)}"
    )


def read_recipe(path: str, known: Sequence[str], depth: int = 0) -> dict:
    """Read a YAML or JSON recipe; its keys are the names of the flags.

    `based_on` names another recipe, by its path from the folder of this one. What this one says replaces what that one
    says, key by key, inside of mappings too.

    Raises:
        UserError: the file is missing or broken, or a key is no argument (the nearest one is named).
    """
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"cannot read the recipe {path}: it is no regular file")
    try:
        text = Path(path).read_text(encoding="utf-8")
        recipe = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"the recipe {path} {TOO_DEEP}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"the recipe {path} is not valid {'JSON' if path.endswith('.json') else 'YAML'}: {one_line(error)}"
        ) from None
    if not isinstance(recipe, dict):
        raise UserError(f"the recipe {path} must hold 'name: value' lines")
    if is_too_deep(recipe):
        raise UserError(f"the recipe {path} {TOO_DEEP}")
    base = recipe.pop("based_on", None)
    for key in recipe:
        if key not in known:
            raise UserError(f"the recipe {path} has an unknown field '{key}'{name_hint(str(key), known)}")
    if base is None:
        return recipe
    if not isinstance(base, str) or depth == DEEPEST:
        raise UserError(f"the recipe {path}: based_on must be the path of a recipe that is not based on this one")
    return _merge(read_recipe(str(Path(path).parent / base), known, depth + 1), recipe)


def _merge(base: dict, recipe: dict) -> dict:
    merged = base | recipe
    for key in base.keys() & recipe.keys():
        if isinstance(base[key], dict) and isinstance(recipe[key], dict):
            merged[key] = base[key] | recipe[key]
    return merged


def is_too_deep(value: Any) -> bool:
    """Tell whether a value nests deeper, or holds more, than any recipe: YAML lets a value hold itself."""
    left, seen = [(value, 0)], 0
    while left:
        item, depth = left.pop()
        seen += 1
        if depth > DEEPEST or seen > LARGEST:
            return True
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple, set)) else ()
        left += [(part, depth + 1) for part in inner]
    return False


def parse_value(text: str, flag: str = "--config_overrides"):
    """Read an override's value: JSON where it is JSON (also Python's True, False, None), plain text otherwise."""
    try:
        return {"None": None, "True": True, "False": False}[text]
    except KeyError:
        pass
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{flag}: '{text[:20]}...' {TOO_DEEP}") from None
    except ValueError:
        if text[:1] in '[{"':
            raise UserError(f"{flag}: '{text}' is not valid JSON") from None
        return text


def split_overrides(text: str) -> list[str]:
    """Split ``a=1,b=[1,2]`` at the commas outside of brackets and quotes."""
    parts, depth, quoted, start = [], 0, False, 0
    for i, character in enumerate(text):
        if character == '"':
            quoted = not quoted
        elif not quoted:
            depth += (character in "[{") - (character in "]}")
            if character == "," and depth == 0:
                parts.append(text[start:i])
                start = i + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def parse_overrides(items: list[str] | dict | None, flag: str = "--config_overrides") -> dict:
    """Turn ``["hidden_size=64", "full_attention_layers=[1],window=null"]``, JSON objects or a mapping into a dict."""
    if isinstance(items, dict):
        return dict(items)
    overrides: dict = {}
    for item in items or []:
        if item.lstrip().startswith("{"):
            overrides.update(parse_value(item, flag))
            continue
        for part in split_overrides(item):
            key, equals, value = part.partition("=")
            if not equals:
                raise UserError(f"{flag}: '{part}' is not of the form key=value")
            overrides[key.strip()] = parse_value(value.strip(), flag)
    return overrides


def recipe_to_flags(recipe: dict) -> list[str]:
    """Write a recipe as flags, so that the parser checks the types of both alike. A null keeps the default."""
    flags = []
    for key, value in recipe.items():
        if isinstance(value, list):
            flags += [f"--{key}", *(str(item) for item in value)]
        elif isinstance(value, dict):
            flags.append(f"--{key}={json.dumps(value)}")
        elif value is not None:
            flags.append(f"--{key}={str(value).lower() if isinstance(value, bool) else value}")
    return flags


def parse_dataclasses(
    classes: Sequence[Any], argv: list[str], script: str, reconcile: Callable[[dict, set[str]], dict] | None = None
) -> tuple:
    """Parse ``[recipe.yaml] --flag value ...`` into one instance of each dataclass; flags win over the recipe.

    A class with the fields `config_overrides` and `overrides` gets the recipe's config overrides, with the flags'
    merged over them, in the latter.

    Args:
        reconcile: given the recipe and the names of the flags, returns what still applies of the recipe.

    Raises:
        UserError: unknown names (the nearest one is given), wrong types, contradictory options.
    """
    known = field_names(classes)
    recipe: dict = {}
    if argv and not argv[0].startswith("-"):
        recipe, argv = read_recipe(find_recipe(argv[0]), known), argv[1:]
    given = {flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in argv if flag.startswith("--")}
    recipe = reconcile(recipe, given) if reconcile else recipe
    recipe_overrides = recipe.pop("config_overrides", None)
    if isinstance(recipe_overrides, str):
        recipe_overrides = [recipe_overrides]
    parser = QuietParser(cast(Any, tuple(classes)), allow_abbrev=False, prog=script)
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            recipe_to_flags(recipe) + argv, return_remaining_strings=True, look_for_args_file=False
        )
        for arguments in parsed:
            check_finite(arguments)
    except UserError:
        raise
    except Exception as error:
        # a dataclass checks itself: what it raises is about the arguments, of whatever type
        raise UserError(one_line(error)) from error
    if rest:
        name = rest[0].partition("=")[0].lstrip("-").replace("-", "_")
        raise UserError(f"unknown argument '{rest[0]}'{name_hint(name, known)}")
    for arguments in cast(list[Any], parsed):
        if hasattr(arguments, "config_overrides"):
            arguments.overrides = {
                **parse_overrides(recipe_overrides),
                **parse_overrides(arguments.config_overrides),
            }
    return tuple(parsed)
