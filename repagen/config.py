"""Configurations: a YAML preset or file and `key=value` overrides, merged by OmegaConf onto typed dataclasses.

A schema is a dataclass whose fields are `bool`, `int`, `float`, `str`, `Literal[...]`, `X | None`, unions of these,
`list[X]`, `dict[str, Any]` or further dataclasses. A field without a default is required. A schema may define
`validate(self) -> None`, which raises a `UserError` that starts with the field's name; the loader adds where it
stands. Nothing is converted in silence: `no` is not the text "no", 1.5 is not an int, `${...}` is refused, and so is
every key that the schema does not have.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from repagen.errors import UserError

Schema = TypeVar("Schema")

_MAXIMUM_BYTES = 1_000_000
_MAXIMUM_DEPTH = 32
_REQUIRED = object()


PRESETS = "repagen.configs"
"""Package of the training presets."""


def preset_names(presets: str = PRESETS) -> list[str]:
    """Names of the presets in a package of YAML files, sorted."""
    entries = importlib.resources.files(presets).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def load_config(
    schema: type[Schema], name_or_path: str | Path, overrides: Sequence[str] = (), *, presets: str = PRESETS
) -> Schema:
    """Read a preset or a YAML file, apply `key=value` overrides, and build the typed configuration.

    Args:
        schema: the dataclass to build.
        name_or_path: a preset's name (see `preset_names`), or the path of a YAML file.
        overrides: `section.key=value` words; the value is YAML, list entries are addressed by number
            (`alignment.targets.0.block=4`).
        presets: package that holds the presets.

    Raises:
        UserError: for an unknown, missing, repeated or ill-typed key, an interpolation or an unreadable file; the
            message names `file:key` and the nearest key that exists.
    """
    origin, tree, overridden = _merge(name_or_path, overrides, presets)
    return _Builder(schema, origin, overridden).build(tree)


def read_preset(name_or_path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain content of a preset or YAML file after `key=value` overrides, unchecked by any schema.

    Raises:
        UserError: for an unreadable file or word.
    """
    return _merge(name_or_path, overrides, PRESETS)[1]


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts and lists of plain values, ready for JSON, YAML or comparison."""
    return dataclasses.asdict(config)


def save_config(config: Any, path: Path) -> None:
    """Write the resolved configuration, every default spelled out, as YAML that `load_config` reads back."""
    path.write_text(yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict of dotted keys: {"a": {"b": [1]}} => {"a.b.0": 1}. Empty ones stay values."""
    if isinstance(tree, Mapping) and tree:
        items: Iterator[tuple[Any, Any]] = iter(tree.items())
    elif isinstance(tree, list) and tree:
        items = iter(enumerate(tree))
    else:
        return {prefix: tree}
    return {key: value for name, child in items for key, value in flatten(child, _join(prefix, name)).items()}


def value_at(flat: Mapping[str, Any], key: str) -> Any:
    """What `flatten` made of a key's value, put together where it is several entries; None where there is none."""
    below = {name.removeprefix(f"{key}."): value for name, value in flat.items() if name.startswith(f"{key}.")}
    return flat.get(key, below or None)


def require(condition: bool, key: str, given: object, allowed: str) -> None:
    """For a schema's `validate`: raise a `UserError` about the field `key` unless the condition holds."""
    if not condition:
        raise UserError(f"{key}: must be {allowed}, got {_shown(given)}")


def build_value(kind: Any, value: Any, key: str) -> Any:
    """Check a value against a type annotation as `load_config` does for the field `key`; for a schema's `validate`."""
    try:
        return _Builder(object, "", ()).value(kind, value, key)
    except UserError as error:
        raise UserError(str(error).removeprefix(":")) from None


def _merge(name_or_path: str | Path, overrides: Sequence[str], presets: str) -> tuple[str, Any, tuple[str, ...]]:
    """=> (how messages call the file, its content with the overrides, their keys)."""
    origin, text = _read(name_or_path, presets)
    tree = _parse(text, origin)
    overridden = {key: _apply_override(tree, key, value) for key, value in _split_overrides(overrides)}
    return origin, OmegaConf.to_container(tree, resolve=False), tuple(overridden)


# --- reading -------------------------------------------------------------------------------------------------------


def _read(name_or_path: str | Path, presets: str) -> tuple[str, str]:
    """=> (how messages call the file, its text)."""
    names = preset_names(presets)
    path: Any = Path(name_or_path)
    if str(name_or_path) in names:
        path = importlib.resources.files(presets) / f"{name_or_path}.yaml"
    elif not path.is_file():
        raise UserError(
            f"no configuration named {str(name_or_path)!r}{nearest(str(name_or_path), names)}: it is neither a file "
            f"nor a preset; presets: {', '.join(names)}"
        )
    content = path.read_bytes()
    if len(content) > _MAXIMUM_BYTES:
        raise UserError(f"{path.name}: {len(content)} bytes is too large for a configuration")
    try:
        return path.name, content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from None


def _parse(text: str, origin: str) -> DictConfig:
    try:
        _refuse_deep_nesting(text, origin)
        tree = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, " if mark else ""
        raise UserError(f"{origin}: {where}{getattr(error, 'problem', None) or error}") from None
    except OmegaConfBaseException as error:  # a malformed ${...}; a well-formed one is refused when its key is built
        raise UserError(f"{origin}:{error.full_key}: {str(error).splitlines()[0]}") from None
    except AssertionError:
        raise UserError(
            f"{origin}: a configuration is a mapping of keys to values, not {text.strip()[:40]!r}"
        ) from None
    if not isinstance(tree, DictConfig):
        raise UserError(f"{origin}: a configuration is a mapping of keys to values, not a list")
    return tree


def _refuse_deep_nesting(text: str, origin: str) -> None:
    """Bound the recursion of everything that follows; the event stream itself does not recurse."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{origin}: line {event.start_mark.line + 1}, aliases (*{event.anchor}) are not allowed")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAXIMUM_DEPTH:
            raise UserError(
                f"{origin}: line {event.start_mark.line + 1}, nested more than {_MAXIMUM_DEPTH} levels deep"
            )


def _split_overrides(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    seen = set()
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not all(part.isidentifier() or part.isdigit() for part in key.split(".")):
            raise UserError(
                f"command line: {word!r} is not of the form section.key=value; names of one's own that are no "
                "identifier stand in braces: 'section={\"a name\": value}'"
            )
        if key in seen:
            raise UserError(f"command line:{key}: given twice")
        seen.add(key)
        yield key, value


def _apply_override(tree: DictConfig, key: str, text: str) -> str:
    where = f"command line:{key}"
    if "${" in text:
        raise UserError(f"{where}: interpolation is not allowed, got {text!r}; write the value itself")
    value = _parse(f"value: {text}" if text else "value: ''", where)
    if list(value) != ["value"]:
        raise UserError(f"{where}: cannot read {text!r} as one value")
    try:
        OmegaConf.update(tree, key, value["value"], merge=False)
    except (OmegaConfBaseException, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{where}: no such entry ({str(error).splitlines()[0]})") from None
    return key


# --- building ------------------------------------------------------------------------------------------------------


def _completed(field: dataclasses.Field[Any], value: Any) -> Any:
    """A section with the keys it leaves out, where its field has a default of its own rather than its schema's."""
    if not isinstance(value, dict) or field.default_factory is dataclasses.MISSING:
        return value
    default = field.default_factory()
    return {**to_plain(default), **value} if dataclasses.is_dataclass(default) else value


class _Builder:
    """Builds one schema from a plain tree and names `origin:key` in everything it refuses."""

    def __init__(self, schema: type, origin: str, overridden: tuple[str, ...]) -> None:
        self.schema = schema
        self.origin = origin
        self.overridden = overridden

    def build(self, tree: Any) -> Any:
        config = self.value(self.schema, tree, "")
        self._validate(config, "")
        return config

    def _refuse(self, path: str, message: str) -> typing.NoReturn:
        from_command_line = any(path == key or path.startswith(f"{key}.") for key in self.overridden)
        place = "command line" if from_command_line else self.origin
        raise UserError(f"{place}:{path}: {message}" if path else f"{place}: {message}")

    def _refuse_field(self, path: str, error: UserError) -> typing.NoReturn:
        """Refuse what a schema at `path` said of one of its fields, `field: message`, or of itself."""
        key, colon, message = str(error).partition(": ")
        if not colon or not all(part.isidentifier() or part.isdigit() for part in key.split(".")):
            self._refuse(path, str(error))
        self._refuse(key if path and key.startswith(f"{path}.") else _join(path, key), message)

    def value(self, kind: Any, value: Any, path: str) -> Any:
        if isinstance(value, str) and "${" in value:
            self._refuse(path, f"interpolation is not allowed, got {value!r}; write the value itself")
        if isinstance(value, float) and not math.isfinite(value):
            self._refuse(path, f"expected a finite number, got {value}")
        if dataclasses.is_dataclass(kind):
            return self._dataclass(typing.cast(type, kind), value, path)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (Union, types.UnionType):
            return self._union(kind, arguments, value, path)
        if origin is Literal:
            return self._choice(arguments, value, path)
        if origin is list:
            return self._list(arguments[0], value, path)
        if origin is tuple:
            entries = self._list(Any, value, path)
            if len(entries) != len(arguments):
                self._refuse(path, f"expected {len(arguments)} entries, got {_shown(value)}")
            return tuple(self.value(*pair, path) for pair in zip(arguments, entries, strict=True))
        if origin is dict:
            return self._dict(value, path)
        return self._scalar(kind, value, path)

    def _dataclass(self, kind: type, value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            self._refuse(path, f"expected a section with keys {', '.join(_field_names(kind))}, got {_shown(value)}")
        hints = typing.get_type_hints(kind)
        fields = {field.name: field for field in dataclasses.fields(kind)}
        for name in value:
            if name not in fields:
                self._refuse_unknown(kind, str(name), path)
        arguments = {}
        for name, field in fields.items():
            if name in value and value[name] != "???":  # OmegaConf's mark of a value that the user has to give
                arguments[name] = self.value(hints[name], _completed(field, value[name]), _join(path, name))
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                self._refuse(
                    _join(path, name), f"a value is required; add it to the file or pass {_join(path, name)}=..."
                )
        try:
            return kind(**arguments)
        except UserError as error:
            self._refuse_field(path, error)

    def _refuse_unknown(self, kind: type, name: str, path: str) -> typing.NoReturn:
        known = _field_names(kind)
        hint = nearest(name, known)
        if not hint:
            elsewhere = [key for key in _all_keys(self.schema) if key.rpartition(".")[2] == name]
            hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else f"; known here: {', '.join(known)}"
        self._refuse(_join(path, name), f"unknown key{hint}")

    def _union(self, kind: Any, arguments: tuple[Any, ...], value: Any, path: str) -> Any:
        if value is None and type(None) in arguments:
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        if len(kinds) == 1:
            return self.value(kinds[0], value, path)
        for argument in kinds:
            try:
                return self.value(argument, value, path)
            except UserError:
                continue
        self._refuse(path, f"expected {_described(kind)}, got {_shown(value)}")

    def _choice(self, allowed: tuple[Any, ...], value: Any, path: str) -> Any:
        if value not in allowed or type(value) not in {type(choice) for choice in allowed}:
            near = nearest(str(value), [str(choice) for choice in allowed])
            self._refuse(path, f"expected one of {', '.join(map(str, allowed))}, got {_shown(value)}{near}")
        return value

    def _list(self, kind: Any, value: Any, path: str) -> list[Any]:
        if not isinstance(value, list):
            self._refuse(path, f"expected a list, got {_shown(value)}")
        return [self.value(kind, entry, _join(path, index)) for index, entry in enumerate(value)]

    def _dict(self, value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._refuse(path, f"expected a mapping of names to values, got {_shown(value)}")
        for key, entry in flatten(value).items():
            self.value(Any, entry, _join(path, key))
        return {str(key): entry for key, entry in value.items()}

    def _scalar(self, kind: Any, value: Any, path: str) -> Any:
        if kind is Any:
            return value
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            hint = "; write it in quotes" if kind is str and value is not None else ""
            self._refuse(path, f"expected {_described(kind)}, got {_shown(value)}{hint}")
        return value

    def _validate(self, value: Any, path: str) -> None:
        if isinstance(value, list):
            for index, entry in enumerate(value):
                self._validate(entry, _join(path, index))
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                self._validate(getattr(value, field.name), _join(path, field.name))
            if hasattr(value, "validate"):
                self._run_validation(value, path)

    def _run_validation(self, value: Any, path: str) -> None:
        try:
            value.validate()
        except UserError as error:
            self._refuse_field(path, error)


# --- words ---------------------------------------------------------------------------------------------------------


def _join(prefix: str, name: object) -> str:
    return f"{prefix}.{name}" if prefix else str(name)


def _field_names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _all_keys(kind: type, prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for name in _field_names(kind):
        yield _join(prefix, name)
        if dataclasses.is_dataclass(hints[name]):
            yield from _all_keys(typing.cast(type, hints[name]), _join(prefix, name))


def nearest(word: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown word: a near one that exists, or nothing."""
    matches = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


def _described(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return ", ".join(map(str, arguments))
    return " or ".join(map(_described, arguments)) if arguments else _KIND_NAMES.get(kind, str(kind))


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
