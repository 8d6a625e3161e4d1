"""One setting: how it is declared, what values it takes and how they are written, and the sentence for others."""

import dataclasses
import difflib
import tomllib
from dataclasses import field
from typing import Any

import tomlkit

from crumb.profiles.errors import RequestError

_TYPE_WORDS = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text in quotes",
    list: "a list of texts", dict: "a table of arguments",
}


def setting(section: str, help: str, default: Any = dataclasses.MISSING, *, choices=None, low=None, high=None, items=str):
    """A dataclass field that carries its own help and limits; `items` is the type of what a list holds."""
    metadata = {"section": section, "help": help, "choices": choices, "low": low, "high": high, "items": items}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def from_text(setting: dataclasses.Field, text: str) -> Any:
    """A value typed on a command line; text needs no quotes."""
    if setting.type is str:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if setting.type is list and setting.metadata["items"] is str:
            return [text]
        raise RequestError(f"{setting.name} is {text!r}; it must be {_words_for(setting)}.") from None


def checked(setting: dataclasses.Field, value: Any) -> Any:
    """The value, of the setting's type and within its limits; else a RequestError that says what is allowed."""
    wanted = setting.type
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    wrong_type = not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool)
    if wrong_type or (wanted is list and not all(isinstance(item, setting.metadata["items"]) for item in value)):
        raise RequestError(f"{setting.name} is {value!r}; it must be {_words_for(setting)}.")
    if wanted is str and any(ord(letter) < 32 for letter in value):
        raise RequestError(f"{setting.name} holds a control character; use plain text on one line.")
    choices, low, high = (setting.metadata[key] for key in ("choices", "low", "high"))
    if choices and value not in choices:
        raise RequestError(f"{setting.name} is {value!r}; it must be one of {', '.join(map(str, choices))}."
                           + nearest(value, choices))
    if low is not None and not low <= value <= high:  # NaN fails this too
        raise RequestError(f"{setting.name} is {value!r}; it must be between {low} and {high}.")
    return value


def toml_value(value: Any, one_line: bool = False) -> tomlkit.items.Item:
    """A setting's value as it stands in the file: tables within one line, a list of tables a line each."""
    if isinstance(value, dict):
        inline = tomlkit.inline_table()
        inline.update(value)
        return inline
    if isinstance(value, list) and value and isinstance(value[0], dict):
        tables = tomlkit.array()
        tables.extend(toml_value(table) for table in value)
        return tables.multiline(not one_line)
    return tomlkit.item(value)


def nearest(word: Any, known) -> str:
    """" Did you mean ...?", or "" where nothing known is like it."""
    match = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def _words_for(setting: dataclasses.Field) -> str:
    return "a list of tables" if setting.metadata["items"] is dict else _TYPE_WORDS[setting.type]
