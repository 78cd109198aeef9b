"""How settings are written, read and checked: the one place where text becomes a configuration.

TOML has nested tables (``[train] rounds = 60``); ``--set`` and Flower's run config have dotted keys (``train.rounds``).
``read`` lays all of them over each other and validates the result once.

Neither TOML nor Flower's run config has a null. A setting that may be unset is ``None`` in Python and has a word for
that in text (``Unset``): ``default`` leaves it to the strategy, ``none`` switches it off, a path is empty.
"""

import os
import shlex
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar, cast

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from fedmaestro.errors import UserError, check_name, reason_of, shown
from fedmaestro.places import absolute, exists, read_file

Value = bool | int | float | str
"""What a setting's text form can be, in TOML, on the command line and in Flower's run config."""

Positive = Annotated[int, Field(ge=1, le=10**9)]
"""Anything above would be a time, or a memory, that nobody has."""

LONGEST_TEXT = 4096
"""Characters of a setting."""


HeldOut = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)]
"""How many examples are held out: a number, or below 1 a share of all."""


@dataclass(frozen=True)
class Unset:
    """Annotation of a setting ``T | None``: the word that stands for ``None`` in text."""

    word: str

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(
            lambda value: None if value == self.word else value,
            handler(source),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: self.word if value is None else value
            ),
        )


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(absolute(path))


PathSetting = Annotated[str | None, AfterValidator(_absolute), Unset("")]
"""A path, absolute once it is read: hosts may run in another working directory."""


NumbersSetting = Annotated[str, BeforeValidator(lambda x: str(x) if type(x) is int else x)]
"""Whole numbers, separated by spaces; one of them may be given as a number."""


UseSetting = Annotated[str, AfterValidator(lambda use: located_use(use, Path.cwd()))]
"""Files and modules of user code, separated by spaces; files are absolute once it is read."""


def located_use(use: str, folder: Path) -> str:
    """Return ``use`` with absolute files: those that are not yet lie relative to ``folder``."""
    try:
        words = shlex.split(use)
    except ValueError as error:
        raise UserError(f"use = {use!r}: {error}: quote a path that holds a space or a quote") from None
    files = {word: str(absolute(word, folder)) for word in words if is_file_name(word)}
    return shlex.join(files.get(word, word) for word in words)


FilesSetting = Annotated[str, AfterValidator(lambda files: located_files(files, Path.cwd()))]
"""Files and folders, separated by spaces; those that are there are absolute once it is read."""


def located_files(files: str, folder: Path) -> str:
    """Return ``files`` with absolute paths where they are there, relative to ``folder``; names on the hub stay."""
    try:
        words = shlex.split(files)
    except ValueError as error:
        raise UserError(f"data.file = {files!r}: {error}: quote a path that holds a space or a quote") from None
    found = [absolute(word, folder) for word in words]
    return shlex.join(str(path) if exists(path) else word for path, word in zip(found, words, strict=True))


def is_file_name(word: str) -> bool:
    """Return whether a word of ``use`` names a file, and not a module."""
    return word.endswith(".py") or "/" in word or os.sep in word


def kebab(name: str) -> str:
    """Return a field's name as settings spell it."""
    return name.replace("_", "-")


class Table(BaseModel):
    """A table of settings: frozen, strict about names, kebab-case in text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=kebab, validate_by_name=False, allow_inf_nan=False
    )


class Settings(Table):
    """A whole configuration: what one TOML file can hold."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Settings that had another name once: old key to new key."""

    def flat(self) -> dict[str, Value]:
        """Return the text form under dotted keys: ``{"seed": 0, "data.name": "digits", …}``."""
        return flatten(self.model_dump(by_alias=True))

    def get(self, key: str) -> Any:
        """Return the value of a dotted key; None where it is unset."""
        value: Any = self
        for name in key.split("."):
            value = getattr(value, name.replace("-", "_"))
        return value

    def to_toml(self) -> str:
        """Return the TOML with every setting."""
        return tomli_w.dumps(self.model_dump(by_alias=True))

    def changed(self, settings: Mapping[str, Any], where: str = "the overrides") -> Self:
        """Return a copy with other values under these dotted keys; ``where`` they come from is for messages."""
        return read(type(self), self, settings, where)


Schema = TypeVar("Schema", bound=Settings)


@dataclass(frozen=True, kw_only=True)
class Described:
    """One setting as ``fedmaestro list settings`` shows it."""

    key: str
    default: Value
    """In text."""
    meaning: str
    needs: str | None
    """What a value other than zero or unset needs of the run (``Field(json_schema_extra={"needs": …})``)."""


def describe(schema: type[Settings]) -> list[Described]:
    """Return every setting of a schema, in its order."""
    defaults = schema().flat()
    return [
        Described(
            key=key,
            default=defaults[key],
            meaning=info.description or "",
            needs=cast(dict[str, str], info.json_schema_extra or {}).get("needs"),
        )
        for key, info in _fields(schema)
    ]


def _fields(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, info in schema.model_fields.items():
        key = prefix + kebab(name)
        if isinstance(info.default, BaseModel):
            yield from _fields(type(info.default), f"{key}.")
        else:
            yield key, info


def flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """Turn nested tables into dotted keys."""
    flat: dict[str, Value] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read(
    schema: type[Schema],
    source: str | Path | Schema | None = None,
    settings: Mapping[str, Any] | None = None,
    where: str = "the overrides",
) -> Schema:
    """Return the configuration of a TOML file with other settings laid over it.

    Args:
        schema: what both are written in.
        source: the file, or a configuration; None: all defaults.
        settings: dotted keys and their values.
        where: what ``settings`` are, for messages.

    Raises:
        UserError: an unreadable file, the first unknown key (with the nearest valid one) or the first value that is
            out of bounds, in one line.
    """
    if isinstance(source, Settings):
        tables, file = source.model_dump(by_alias=True), ""
    else:
        tables, file = ({}, "") if source is None else (_read_toml(source), str(source))
    known = dict(_fields(schema))
    _check_keys(schema, known, flatten(tables), file)
    if isinstance(tables.get("use"), str) and file:
        tables["use"] = located_use(tables["use"], absolute(file).parent)
    if isinstance(data := tables.get("data"), dict) and isinstance(data.get("file"), str) and file:
        data["file"] = located_files(data["file"], absolute(file).parent)
    if isinstance(fleet := tables.get("fleet"), dict) and isinstance(fleet.get("file"), str) and fleet["file"] and file:
        beside = absolute(fleet["file"], absolute(file).parent)
        fleet["file"] = str(beside) if exists(beside) else fleet["file"]
    settings = dict(settings or {})
    _check_keys(schema, known, settings, where)
    _check_text(flatten(tables), file)
    _check_text(settings, where)
    for key, value in settings.items():
        *path, last = key.split(".")
        table = tables
        for name in path:
            table = table.setdefault(name, {})
        table[last] = value
    try:
        return schema.model_validate(tables, strict=True)
    except ValidationError as error:
        raise _refusal(error, known, dict.fromkeys(settings, where), file) from None


def _refusal(
    error: ValidationError, known: Mapping[str, FieldInfo], origins: Mapping[str, str], file: str
) -> UserError:
    """Return what to say of the first setting that is wrong: all that it could have been."""
    first, *others = error.errors()
    if isinstance(reason := first.get("ctx", {}).get("error"), UserError):  # of a rule about several settings
        return reason
    key = _key_of(first["loc"], known)
    reasons = [reason_of(x) for x in (first, *others) if _key_of(x["loc"], known) == key]
    marks = known[key].metadata if key in known else []
    words = [repr(mark.word) for mark in marks if isinstance(mark, Unset) and mark.word]
    said = ", or ".join(dict.fromkeys([*reasons, *words]))
    return UserError(f"setting {key} = {shown(first['input'])}{_in(origins.get(key, file))}: {said}")


def _key_of(location: Sequence[int | str], known: Collection[str]) -> str:
    """Return the setting at a place in the schema; where it is a union, places lie below it."""
    keys = [".".join(map(str, location[:end])) for end in range(1, len(location) + 1)]
    return next((key for key in keys if key in known), keys[-1])


def _check_keys(schema: type[Settings], known: Mapping[str, FieldInfo], keys: Mapping[str, Any], where: str) -> None:
    for key in keys:
        if key in schema.renamed:
            raise UserError(f"setting {key!r}{_in(where)} has another name now: {schema.renamed[key]}")
        check_name("setting", key, known, _in(where))


def _check_text(settings: Mapping[str, Any], where: str) -> None:
    """Refuse texts that are neither a name nor a path anywhere."""
    for key, value in settings.items():
        if isinstance(value, str):
            if "\0" in value or len(value) > LONGEST_TEXT:
                why = "holds a NUL" if "\0" in value else f"has {len(value):,} characters, more than {LONGEST_TEXT:,}"
                raise UserError(f"setting {key} = {shown(value)}{_in(where)}: the text {why}")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise UserError(f"setting {key} = {value!a:.80}{_in(where)}: the text is not valid UTF-8") from None


def _in(where: str) -> str:
    return f" in {where}" if where else ""


def _read_toml(path: str | Path) -> dict[str, Any]:
    try:
        # With or without a byte-order mark, which some editors put in front.
        return tomllib.loads(read_file(path).decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the experiment {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOML, UTF-8, or an integer of thousands of digits
        raise UserError(f"{path} is not valid TOML: {error}") from None


def parse_assignment(text: str) -> tuple[str, Value]:
    """Parse ``train.rounds=5`` of ``--set``: the value is TOML, or else a plain string."""
    key, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"--set {shown(text)}: write KEY=VALUE, for example train.rounds=5")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    except (ValueError, RecursionError) as error:
        raise UserError(f"--set {shown(text)}: the value cannot be read: {error}") from None
    if isinstance(parsed, Value):
        return key.strip(), parsed
    raise UserError(f"--set {shown(text)}: the value must be a string, a number or a boolean")
