"""Reading a family's `config.json` strictly: wrong types and values are refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from collie_core.plugin import ConfigError, nearest
from collie_models.decoder.config_keys import HARMLESS, NEUTRAL

T = TypeVar("T")


class ConfigReader:
    """Typed access to a mapping of keys; `where` names the mapping in messages."""

    def __init__(self, content: Mapping[str, Any], where: str = "") -> None:
        self.content, self.where = content, where

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number; required where there is no default, null counts as absent."""
        value = self._value(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; required where there is no default, null counts as absent."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.wrong(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false; null counts as absent."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` numbers."""
        value = self._value(key, None)
        if not isinstance(value, list) or len(value) != length:
            raise self.wrong(key, f"a list of {length} numbers")
        return tuple(float(item) for item in value)

    def choice(self, key: str, known: Mapping[str, T], default: str) -> T:
        """What `known` has for the name in the key."""
        value = self._value(key, default)
        if value not in known:
            hint = nearest(str(value), known)
            raise ConfigError(f"{self.where}{key}: {value!r} is not supported{hint} ({', '.join(known)} are)")
        return known[value]

    def refuse_unless(self, key: str, *neutral: Any) -> None:
        """Refuse a key that this family does not compute, unless its value changes nothing."""
        if key in self.content and self.content[key] is not None and self.content[key] not in neutral:
            raise ConfigError(f"{self.where}{key}: {self.content[key]!r} is not supported")

    def refuse_unknown(self, own: Iterable[str], only: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse every key of a config.json that is neither read nor known to change nothing.

        own: the keys that the family reads.  only: key -> the values that are computed, or change nothing;
        these are NEUTRAL's for other keys.
        """
        own, only = set(own), {**NEUTRAL, **only}
        for key in self.content:
            if key in own or key in HARMLESS or self._of_unused_windows(key):
                continue
            if key not in only:
                hint = nearest(key, [*own, *only, *HARMLESS]) or "; take it out if it changes nothing"
                raise ConfigError(f"{self.where}unknown key {key!r}{hint}")
            self.refuse_unless(key, *only[key])

    def _of_unused_windows(self, key: str) -> bool:
        """A window that is not used, or layers that all see everything before them."""
        if key == "layer_types":
            types = self.content[key]
            return isinstance(types, list) and set(map(str, types)) <= {"full_attention"}
        return key == "sliding_window" and self.content.get("use_sliding_window") is False

    def refuse_others(self, known: Iterable[str]) -> None:
        """Refuse every key of a mapping within the config that is not known."""
        known = list(known)
        for key in self.content:
            if key not in known:
                raise ConfigError(f"{self.where}unknown key {key!r}{nearest(key, known)}")

    def token(self, key: str, default: int | None = None) -> int | None:
        """The id of a token, or what stands for it; null counts as absent.  -1 is no token."""
        value = self._value(key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.wrong(key, "the id of a token")
        return None if value is None or value < 0 else value

    def tokens(self, key: str, default: int | None = None) -> int | tuple[int, ...] | None:
        """The id of a token, or of several in a list."""
        value = self._value(key, default)
        if isinstance(value, list) and all(isinstance(item, int) for item in value):
            return tuple(value)
        return self.token(key, default)

    def wrong(self, key: str, expected: str) -> ConfigError:
        """The error for a key with a wrong value."""
        if self.content.get(key) is None:
            return ConfigError(f"{self.where}{key} is missing; expected {expected}")
        return ConfigError(f"{self.where}{key}: {self.content[key]!r} is not {expected}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.content.get(key)
        return default if value is None else value
