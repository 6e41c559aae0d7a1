"""One settings system for every command: typed, nested, strict.

A command's settings are a `Settings` class (pydantic). Their values come from, in this order, the defaults of
the class, a recipe (a YAML file) and `key.sub=value` words on the command line. Anything that is not a known
key with a value of the right type is refused before any work starts, with the name of the key, the value that
was given, where it was given, and what would do.
"""

import difflib
import json
import re
import sys
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic.fields import FieldInfo

from cluster.command import in_unpacked_job, log
from cluster.yaml_values import MOST_CHARACTERS, YamlTextError, read_word, read_yaml


class SettingsError(ValueError):
    """A key, a value or a combination of values that cannot be used; the message says what would do."""


class Settings(pydantic.BaseModel):
    """Base of all settings. The docstring under a field is its help text."""

    model_config = pydantic.ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    _followed: frozenset[str] = pydantic.PrivateAttr(default=frozenset())
    """Of all of a command's settings: dotted keys whose values nobody gave, and which follow from others."""

    @classmethod
    def follow(cls, recipe: Mapping[str, Any], values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
        """Values of this section that nobody gave as they are, and that follow from others.

        Args:
            recipe: the section in the recipe.
            values: the section with what the command line says, which may be anything.
            given: keys of the section that the command line names.

        Returns:
            What takes the place of the values; None takes one out.
        """
        return {}


S = TypeVar("S", bound=Settings)

_DEEPEST_KEY = 8
"""Parts of a dotted key."""
_MOST_PROBLEMS = 20
"""That are explained at once."""
_LONGEST_SHOWN = 200
"""Characters of a value in a message."""


def since(default: Any, *, absent: Any) -> Any:
    """A field that came to a settings class later, and whose default is not what was done before it was there.

    Args:
        default: what holds for what begins now.
        absent: what settings mean that were saved without it.
    """
    return pydantic.Field(default, json_schema_extra={"absent": absent})


def fill_saved(settings_type: type[Settings], saved: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Saved values with what they lack: a key that came later means what was done before it was there.

    Args:
        settings_type: the class whose values were saved.
        saved: nested JSON values.
        keys: the keys that are looked for, nested in the same way; their values do not matter.
    """
    filled = dict(saved)
    for key, wanted in keys.items():
        field = settings_type.model_fields.get(key)
        if field is None:
            continue
        inner = _settings_in(field.annotation)
        if key not in filled:
            if not field.is_required():
                filled[key] = _meaning_of_absence(field)
        elif inner is not None and isinstance(filled[key], Mapping) and isinstance(wanted, Mapping):
            filled[key] = fill_saved(inner, filled[key], wanted)
    return filled


def keep_saved(settings: S, saved: Mapping[str, Any]) -> S:
    """Settings in which each field made by `since` that nobody gave has the value that was saved, or its absence means.

    Args:
        saved: nested JSON values of the same class.
    """
    kept: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Settings):
            inner = saved.get(name)
            changed = keep_saved(value, inner if isinstance(inner, Mapping) else {})
            if changed is not value:
                kept[name] = changed
        elif _came_later(field) and name not in settings.model_fields_set:
            before = saved.get(name, _meaning_of_absence(field))
            if before != value:
                kept[name] = _valid(field, before, f"{name}, as it was saved,")
    return settings.model_copy(update=kept) if kept else settings


def _valid(field: FieldInfo, value: Any, what: str) -> Any:
    """A saved value, if the field can have it."""
    annotation: Any = field.annotation
    if field.metadata:
        annotation = typing.Annotated[(annotation, *field.metadata)]
    adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(annotation)
    try:
        return adapter.validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError as error:
        raise SettingsError(f"{what} is {_short(value)}: {error.errors()[0]['msg']}") from None


def _came_later(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and "absent" in field.json_schema_extra


def _meaning_of_absence(field: FieldInfo) -> Any:
    if isinstance(field.json_schema_extra, dict) and "absent" in field.json_schema_extra:
        return field.json_schema_extra["absent"]
    default = field.get_default(call_default_factory=True)
    return json.loads(json.dumps(default, default=lambda value: value.model_dump(mode="json")))


def load_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file into nested dictionaries.

    Raises:
        SettingsError: the file is missing, is not YAML or is not a mapping.
    """
    try:
        with path.open("rb") as file:
            content = file.read(4 * MOST_CHARACTERS + 1)
        loaded = read_yaml(content.decode("utf-8"))
    except OSError as error:
        raise SettingsError(f"recipe {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"recipe {path} is not UTF-8 text (byte {error.start})") from error
    except YamlTextError as error:
        raise SettingsError(f"recipe {path} is not valid YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise SettingsError(f"recipe {path} must be a mapping of keys to values, not a {type(loaded).__name__}")
    return loaded


def find_recipe(name: str, folder: Path) -> Path:
    """The recipe file for a path, or for the bare name of a recipe in `folder`.

    Raises:
        SettingsError: neither exists; the message lists the recipes that do.
    """
    for path in (Path(name), folder / f"{name}.yaml"):
        try:
            if path.is_file():
                return path
        except OSError:  # of a name that is too long, or a folder that may not be read
            continue
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    near = difflib.get_close_matches(name[:_LONGEST_SHOWN], known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    travels = " (what travels with a submitted job is in .rayignore)" if in_unpacked_job() else ""
    raise SettingsError(
        f"no recipe {_short(name)}{hint} Shipped recipes: {', '.join(known)}; or give a file's path{travels}"
    )


def parse_override(word: str) -> tuple[list[str], Any]:
    """Split `key.sub=value` into its dotted path and its value, read as YAML (numbers, lists, true, null).

    Raises:
        SettingsError: the word is not of that form.
    """
    key, separator, text = word.partition("=")
    path = key.split(".")
    if not separator or len(path) > _DEEPEST_KEY or not all(re.fullmatch(r"[A-Za-z_]\w*", part) for part in path):
        raise SettingsError(f"{_short(word)} is not of the form key.sub=value (see --help for the keys)")
    try:
        return path, read_word(text)
    except YamlTextError as error:
        as_text = f"{key[:_LONGEST_SHOWN]}=\"'{_short(text)[1:-1]}'\""
        raise SettingsError(
            f"the value in {_short(word)} cannot be read (as text, write {as_text}): {error}"
        ) from error


def resolve(
    settings_type: type[S],
    values: Mapping[str, Any],
    overrides: Sequence[str] = (),
    origin: str = "the recipe",
) -> S:
    """Build settings from nested values and `key.sub=value` overrides; `key=null` takes a key back to its default.

    Raises:
        SettingsError: with one line for each wrong key or value.
    """
    merged: dict[str, Any] = json.loads(json.dumps(values))
    from_command_line: dict[tuple[str, ...], str] = {}
    for word in overrides:
        path, value = parse_override(word)
        section = merged
        for part in path[:-1]:
            inner = section.setdefault(part, {})
            if not isinstance(inner, dict):
                inner = section[part] = {}
            section = inner
        if value is None and path[-1] in (_section(settings_type, path[:-1]) or Settings).model_fields:
            section.pop(path[-1], None)  # null takes a key out of the recipe: its default holds
        else:
            section[path[-1]] = value
        from_command_line[tuple(path)] = word.partition("=")[2]
    followed = frozenset(_apply_follow(settings_type, values, merged, from_command_line))
    try:
        # Validated as JSON: there strictness still lets a list stand for a tuple.
        settings = settings_type.model_validate_json(json.dumps(merged))
        settings._followed = followed
        return settings
    except pydantic.ValidationError as error:
        problems = _by_key(settings_type, error.errors(include_url=False, include_context=False))
        lines = [_explain(settings_type, problem, from_command_line, origin) for problem in problems[:_MOST_PROBLEMS]]
        if len(problems) > _MOST_PROBLEMS:
            lines.append(f"and {len(problems) - _MOST_PROBLEMS:,} more")
        raise SettingsError("\n".join(dict.fromkeys(lines))) from None


def _apply_follow(
    settings_type: type[Settings],
    recipe: Mapping[str, Any],
    merged: dict[str, Any],
    from_command_line: Mapping[tuple[str, ...], str],
    prefix: tuple[str, ...] = (),
) -> Iterator[str]:
    """Change values that follow from others (`Settings.follow`), in each section; gives their dotted keys."""
    given = {path[-1] for path in from_command_line if path[:-1] == prefix}
    for key, value in settings_type.follow(recipe, dict(merged), given).items():
        merged.pop(key, None)
        if value is not None:
            merged[key] = value
        yield ".".join((*prefix, key))
    for key, field in settings_type.model_fields.items():
        inner, section = _settings_in(field.annotation), merged.get(key)
        if inner is not None and isinstance(section, dict):
            own = recipe.get(key)
            own = own if isinstance(own, Mapping) else {}
            yield from _apply_follow(inner, own, section, from_command_line, (*prefix, key))


def keep_followed(settings: S, saved: Mapping[str, Any]) -> S:
    """Settings in which each value that follows from others is the one that was saved: the run began with it.

    Args:
        saved: nested JSON values of the same class.
    """
    for key in sorted(settings._followed):
        *sections, name = key.split(".")
        where: Any = saved
        for section in sections:
            where = where.get(section) if isinstance(where, Mapping) else None
        if isinstance(where, Mapping) and name in where:
            settings = _replaced(settings, [*sections, name], where[name], key)
    return settings


def _replaced(settings: S, path: Sequence[str], value: Any, what: str) -> S:
    inner = getattr(settings, path[0])
    if len(path) > 1:
        return settings.model_copy(update={path[0]: _replaced(inner, path[1:], value, what)})
    valid = _valid(type(settings).model_fields[path[0]], value, f"{what}, as it was saved,")
    return settings.model_copy(update={path[0]: valid})


def what_follows(settings: Settings) -> str:
    """The values that follow from others, for people: `model.heads = 9, model.mlp_dim = 2304`."""
    shown = []
    for key in sorted(settings._followed):
        value: Any = settings
        for name in key.split("."):
            value = getattr(value, name)
        shown.append(f"{key} = {json.dumps(value)}")
    return ", ".join(shown)


def _short(value: Any) -> str:
    """A value for messages: all of it unless it is very long."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python writes no number of thousands of digits
        return "a huge number"
    shown = repr(value)
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[: _LONGEST_SHOWN - 3]}..."


def _by_key(settings_type: type[Settings], problems: Sequence[Any]) -> list[dict[str, Any]]:
    """One problem for each key: pydantic tells one for each type that the value could have been of."""
    found: dict[tuple[str | int, ...], list[dict[str, Any]]] = {}
    for problem in problems:
        place, current = tuple(problem["loc"]), 1
        while current < len(place) and (
            isinstance(place[current], int) or _section(settings_type, [str(part) for part in place[:current]])
        ):
            current += 1  # what follows a key that is no section are pydantic's names of types
        found.setdefault(place[:current], []).append({**problem, "loc": place[:current]})
    from cluster.settings_help import type_name  # which needs this module

    chosen = []
    for place, here in found.items():
        if len(here) == 1:
            chosen += here
            continue
        value, types_only = here[0]["input"], ("int_type", "int_parsing", "string_type", "bool_type", "literal_error")
        own = [problem for problem in here if problem["type"] == "value_error" and isinstance(value, str)]
        bounds = [problem for problem in here if problem["type"] not in (*types_only, "value_error")]
        section = _section(settings_type, [str(part) for part in place[:-1]])
        field = section.model_fields.get(str(place[-1])) if section else None
        wanted = type_name(field.annotation) if field else "something else"
        chosen.append((own or bounds or [{**here[0], "type": "union", "msg": f"Must be {wanted}"}])[0])
    return chosen


def _explain(
    settings_type: type[Settings],
    problem: dict[str, Any],
    from_command_line: Mapping[tuple[str, ...], str],
    origin: str,
) -> str:
    location = tuple(str(part)[:_LONGEST_SHOWN] for part in problem["loc"])
    named = [path for path in from_command_line if path[: len(location)] == location or location[: len(path)] == path]
    where = "on the command line" if named else f"in {origin}"
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        section = _section(settings_type, location[:-1])
        known = sorted(section.model_fields) if section else []
        everywhere = [name for name, _ in iterate_keys(settings_type)]
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        moved = [name for name in everywhere if name.split(".")[-1] == location[-1]]
        suggestion = [".".join((*location[:-1], near[0]))] if near else moved[:1]
        hint = f"; did you mean {suggestion[0]!r}?" if suggestion else "."
        inside = f"of {'.'.join(location[:-1])!r}" if len(location) > 1 else "at the top level"
        return f"unknown key {key!r} {where}{hint} Keys {inside}: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{key!r} must be set, it has no default: give {key}=VALUE"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("value_error", "assertion_error"):
        return f"{key}: {message}" if key and not message.startswith(key) else message
    value = problem["input"]
    written = from_command_line.get(location, "")
    # As it was typed, where Python would show it otherwise.
    value_shown = _short(value) if not isinstance(value, bool | list | dict) or not written else _short(written)[1:-1]
    quoting = ""
    if problem["type"] == "string_type" and named:
        quoting = f" (as text, write {key}=\"'{_short(written)[1:-1] if written else _short(value)}'\")"
    return f"{key} = {value_shown} {where}: {message[0].lower() + message[1:]}{quoting}"


def _settings_in(annotation: Any) -> type[Settings] | None:
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Settings):
            return candidate
    return None


def _settings_in_list(annotation: Any) -> type[Settings] | None:
    for candidate in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(candidate) in (tuple, list):
            return _settings_in(candidate)
    return None


def _section(settings_type: type[Settings], path: Sequence[str]) -> type[Settings] | None:
    current: type[Settings] | None = settings_type
    for part in path:
        if part.isdigit():  # an item of a list, whose class its key has given
            continue
        if current is None or part not in current.model_fields:
            return None
        annotation = current.model_fields[part].annotation
        current = _settings_in(annotation) or _settings_in_list(annotation)
    return current


def iterate_keys(settings_type: type[Settings], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key of a settings class with its field."""
    for name, field in settings_type.model_fields.items():
        inner = _settings_in(field.annotation)
        if inner is None:
            yield prefix + name, field
        else:
            yield from iterate_keys(inner, f"{prefix}{name}.")


def parse_command(
    settings_type: type[S],
    *,
    prog: str,
    description: str,
    positionals: Sequence[str] = (),
    recipes: Path | None = None,
    argv: Sequence[str] | None = None,
) -> S:
    """Read a command line into settings: `prog [RECIPE] POSITIONALS... [KEY=VALUE...]`.

    `positionals` name top-level keys that are given as plain words, in that order; with `recipes` (the folder
    of the shipped ones) the first word is a recipe. `--help` prints every key and leaves; after a recipe, with the
    recipe's values.

    Raises:
        SettingsError: anything about the words or the values that cannot be used.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    expected = (["recipe"] if recipes is not None else []) + list(positionals)
    usage = " ".join([f"python {prog}", *(name.upper() for name in expected), "[KEY=VALUE ...]"])
    if "--help" in words or "-h" in words:
        from cluster.settings_help import help_text

        named = words[0] if recipes is not None and re.match(r"(?!-)(?![A-Za-z_][\w.]*=)", words[0]) else None
        recipe = find_recipe(named, recipes) if named is not None and recipes is not None else None
        print(help_text(settings_type, usage, description, positionals, recipes, recipe))
        raise SystemExit(0)
    for word in words:
        if word.startswith("-"):
            raise SettingsError(f"unknown option {word!r}: settings are given as KEY=VALUE\nusage: {usage}")
    if len(words) < len(expected) or any(re.match(r"^[A-Za-z_][\w.]*=", word) for word in words[: len(expected)]):
        raise SettingsError(f"{' and '.join(name.upper() for name in expected)} must be given\nusage: {usage}")
    plain, overrides = words[: len(expected)], words[len(expected) :]
    values: dict[str, Any] = {}
    origin = "the defaults"
    if recipes is not None:
        path = find_recipe(plain.pop(0), recipes)
        values, origin = load_recipe(path), str(path)
    values.update(zip(positionals, plain, strict=True))
    settings = resolve(settings_type, values, overrides, origin)
    if followed := what_follows(settings):
        log.info("%s: as follows from what the command line says; give others to have others", followed)
    return settings


def refuse_unread(settings: Settings, section: str, key: str, read: bool, names: tuple[str, ...]) -> None:
    """Refuse values that were given though nothing reads them, because of the value of `key` in the same section.

    Args:
        section: its dotted name, for the message.
        read: whether something reads `names`.

    Raises:
        SettingsError: one of them differs from its default and nothing reads it.
    """
    given = [name for name in names if getattr(settings, name) != type(settings).model_fields[name].default]
    if given and not read:
        what = ", ".join(f"{section}.{name}" for name in given)
        raise SettingsError(
            f"{what} has no effect with {section}.{key} = {getattr(settings, key)!r}: take it out "
            f"({section}.{given[0]}=null takes it out of a recipe)"
        )
