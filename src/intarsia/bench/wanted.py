"""Methods as they are written on a command line or in a config: ``shira scorer=snip density=0.01``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from intarsia import registry
from intarsia.errors import IntarsiaError
from intarsia.train.config import parse_value


def method_config(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """``"shira scorer=snip"``, ``"{name: shira, scorer: snip}"`` or a mapping -> the method's plain config, checked.

    Raises:
        IntarsiaError: for an unknown method or field, with the nearest, or a value out of range.
    """
    config = dict(given) if isinstance(given, Mapping) else _read(given)
    registry.build(config)
    return config


def _read(text: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        found = parse_value(text, f"method {text!r}")
        if not isinstance(found, dict):
            raise IntarsiaError(f"method {text!r}: expected a name and its fields, such as 'shira scorer=snip'")
        return found
    try:
        name, *fields = shlex.split(text)
    except ValueError as error:
        raise IntarsiaError(f"method {text!r}: expected a name and its fields, such as 'shira scorer=snip'") from error
    config: dict[str, Any] = {"name": name}
    for field in fields:
        key, sign, value = field.partition("=")
        if not sign:
            raise IntarsiaError(f"method {text!r}: {field!r} is no FIELD=VALUE, such as density=0.01")
        if key in config:
            raise IntarsiaError(f"method {text!r}: {key} is given twice")
        config[key] = parse_value(value, f"method {text!r}, {key}")
    return config


def label(config: Mapping[str, Any]) -> str:
    """The config as it would be written: ``shira density=0.01 scorer=snip``."""
    return " ".join([str(config["name"]), *(f"{k}={_text(v)}" for k, v in config.items() if k != "name")])


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_text(v)}" for k, v in value.items()) + "}"
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
