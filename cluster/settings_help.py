"""The text of --help: what a command does, its recipes, and every key with its type, default and meaning."""

import json
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.command import EXIT_STATUSES
from cluster.settings import Settings, iterate_keys, load_recipe

_MISSING = object()


def help_text(
    settings_type: type[Settings],
    usage: str,
    description: str,
    positionals: Sequence[str],
    recipes: Path | None,
    recipe: Path | None = None,
) -> str:
    """The whole text.

    Args:
        positionals: keys that are given as plain words, which the description explains.
        recipes: folder of the shipped ones.
        recipe: the one that the command line names: its comment is shown, and its values as the defaults.

    Raises:
        SettingsError: the recipe cannot be read.
    """
    lines = [f"usage: {usage}", "", textwrap.dedent(description).strip(), ""]
    values: Mapping[str, Any] = {}
    if recipe is not None:
        values = load_recipe(recipe)
        lines += [f"recipe {recipe}:", *_comment(recipe), ""]
    elif recipes is not None:
        lines.append("recipes (a name from this list, or the path of your own file; RECIPE --help shows its values):")
        for path in sorted(recipes.glob("*.yaml")):
            lines.append(f"  {path.stem:<28} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
        lines.append("")
    lines.append("settings (give any of them as KEY=VALUE; KEY=null takes one back to its default):")
    section = ""
    for key, field in iterate_keys(settings_type):
        if key in positionals:
            continue
        if (inside := key.rpartition(".")[0].partition(".")[0]) != section:
            section = inside
            about = _about(settings_type, section) if section else ""
            lines += ["", f" {section}: {about}"] if about else [""]
        if (given := _value_at(values, key)) is not _MISSING:
            default = f"{_written(given)} by the recipe"
            if not field.is_required():
                default += f" (default {_written(field.get_default(call_default_factory=True))})"
        elif field.is_required():
            default = "must be set"
        else:
            default = f"default {_written(field.get_default(call_default_factory=True))}"
        lines.append(f"  {key}  <{type_name(field.annotation)}>  {default}")
        lines.extend(textwrap.wrap(field.description or "", 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join([*lines, "", EXIT_STATUSES])


def _comment(recipe: Path) -> Iterator[str]:
    """The comment that a recipe begins with."""
    for line in recipe.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            return
        yield f"  {line.removeprefix('#').removeprefix(' ')}".rstrip()


def _about(settings_type: type[Settings], section: str) -> str:
    annotation = settings_type.model_fields[section].annotation
    found = [kind for kind in (annotation, *typing.get_args(annotation)) if isinstance(kind, type)]
    return next((kind.__doc__ or "" for kind in found if issubclass(kind, Settings)), "").partition("\n")[0]


def _value_at(values: Mapping[str, Any], key: str) -> Any:
    current: Any = values
    for part in key.split("."):
        if not isinstance(current, Mapping) or part not in current:
            return _MISSING
        current = current[part]
    return current


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        names = ("null" if argument is type(None) else type_name(argument) for argument in arguments)
        return "|".join(names)
    if origin in (tuple, list):
        return f"list of {type_name(arguments[0])}" if arguments else "list"
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return "{" + ", ".join(annotation.model_fields) + "}"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true|false"}.get(
        getattr(annotation, "__name__", str(annotation)), getattr(annotation, "__name__", str(annotation))
    )
