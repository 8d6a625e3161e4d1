"""What a derivation is: values with the rule behind each, and the warnings beside them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Derived:
    """One value, the rule that gave it, and the reason as a person reads it."""

    value: Any
    rule: str
    reason: str


@dataclass
class Derivation:
    """Values as they are put in, one after the other; what the person fixed wins, and later rules see it."""

    overrides: dict[str, Any]
    values: dict[str, Derived] = field(default_factory=dict)
    warnings: list[dict[str, str]] = field(default_factory=list)

    def put(self, name: str, value: Any, rule: str, reason: str) -> None:
        if name in self.overrides:
            self.values[name] = Derived(self.overrides[name], "", "set by you")
        else:
            self.values[name] = Derived(value, rule, reason)

    def value(self, name: str) -> Any:
        return self.values[name].value

    def warn(self, rule: str, text: str) -> None:
        self.warnings.append({"rule": rule, "text": text})
