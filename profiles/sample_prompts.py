"""Sample prompts with options of their own at the end, in sd-scripts' syntax: a red apple --n blurry --w 832 --h 1216.

Torch-free, so that a wrong one is refused when the plan is checked, hours before its first picture.
"""

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from crumb.profiles.errors import RequestError

if TYPE_CHECKING:  # plan.py checks its prompts by this module
    from crumb.profiles.plan import Plan

OPTION = re.compile(r"(?:^|\s)--(?=\w)")
"""Where an option starts; a dash within a word or before a blank is text."""


@dataclass(frozen=True)
class SamplePrompt:
    """All that one sample picture depends on beside the network. Sides in pixels."""

    text: str
    negative: str
    seed: int
    width: int
    height: int
    guidance: float
    steps: int


@dataclass(frozen=True)
class Number:
    """What a numeric option may be, and an example."""

    field: str
    type: type
    low: int
    high: int
    example: float
    multiple: int = 1

    @property
    def allowed(self) -> str:
        kind = f"a multiple of {self.multiple}" if self.multiple > 1 else "a whole number" if self.type is int else "a number"
        return f"{kind} from {self.low} to {self.high}"


NUMBERS = {
    "d": Number("seed", int, 0, 2**31 - 1, 42),
    "w": Number("width", int, 64, 2048, 832, 64),
    "h": Number("height", int, 64, 2048, 1216, 64),
    "l": Number("guidance", float, 1, 30, 5.5),
    "s": Number("steps", int, 1, 200, 24),
}
OPTIONS = "--n negative prompt, --d seed, --w width, --h height, --l guidance, --s steps"


def sample_prompts(plan: "Plan") -> list[SamplePrompt]:
    """The plan's sample prompts; what they leave open comes from the plan, and each has a seed of its own."""
    return parse_sample_prompts(plan.sample_prompts, plan)


def parse_sample_prompts(lines: list[str], plan: "Plan") -> list[SamplePrompt]:
    """The same for other lines, such as those of `crumb sheet --prompts`."""
    default = SamplePrompt("", plan.sample_negative, plan.seed, plan.resolution, plan.resolution, plan.sample_guidance,
                           plan.sample_steps)
    return [parse_sample_prompt(line, replace(default, seed=plan.seed + index)) for index, line in enumerate(lines)]


def parse_sample_prompt(line: str, default: SamplePrompt) -> SamplePrompt:
    """One line; RequestError that names the prompt, the option, what is allowed and the mend."""
    text, *options = OPTION.split(line)
    given: dict[str, Any] = {}
    for option in options:
        name, value = (*option.split(maxsplit=1), "")[:2]
        field, parsed = _parse_option(line, name.lower(), value.strip())
        if field in given:
            raise _mistake(line, f"it says --{name} twice. Leave one of them.")
        given[field] = parsed
    return replace(default, text=text.strip(), **given)


def texts_of(prompts: list[SamplePrompt]) -> list[str]:
    """Every text that has to be encoded for these."""
    return [text for prompt in prompts for text in (prompt.text, prompt.negative)]


def with_steps(line: str, steps: int) -> str:
    """The line with other --s."""
    text, *options = (part.strip() for part in OPTION.split(line))
    kept = [option for option in options if option.split()[0].lower() != "s"]
    return " --".join([text, *kept, f"s {steps}"]).strip()


def without_options(text: str) -> str:
    """The text before what would be read as options: captions may hold such, copied from other programs' prompts."""
    return OPTION.split(text, maxsplit=1)[0].strip()


def _parse_option(line: str, name: str, value: str) -> tuple[str, Any]:
    """The field of SamplePrompt that an option sets, and its value."""
    if name == "n":
        return "negative", value
    if name not in NUMBERS:
        raise _mistake(line, f"there is no option --{name}. It takes {OPTIONS}; put a blank after -- where it is text.")
    number = NUMBERS[name]
    try:
        parsed = number.type(value)
    except ValueError:
        raise _mistake(line, f"--{name} ({number.field}) is {value or 'empty'}; it must be {number.allowed}, "
                             f"such as --{name} {number.example}.") from None
    if not number.low <= parsed <= number.high or (number.multiple > 1 and parsed % number.multiple):  # NaN fails this too
        raise _mistake(line, f"--{name} ({number.field}) is {value}; it must be {number.allowed}. "
                             f"Use --{name} {_near(number, parsed)}.")
    return number.field, parsed


def _near(number: Number, value: float) -> int:
    """The allowed whole number next to `value`."""
    within = max(number.low, min(value, number.high))  # in this order NaN becomes the lowest
    return round(within / number.multiple) * number.multiple


def _mistake(line: str, what: str) -> RequestError:
    return RequestError(f"sample prompt {line!r}: {what}")
