"""Folders of pictures with settings of their own: what a plan's [data] says, as one list for wizard and engine."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crumb.profiles.checks import checked, from_text, nearest, setting
from crumb.profiles.errors import RequestError

if TYPE_CHECKING:
    from crumb.profiles.plan import Plan

INHERITED = ("repeats", "trigger", "class_word", "flip", "masked_loss", "shuffle_captions", "keep_tokens", "tag_dropout",
             "caption_dropout", "caption_prefix", "caption_suffix")
"""Settings of the plan that a subset may give anew; each is a field of Subset, too."""

CAPTION_SETTINGS = ("trigger", "shuffle_captions", "keep_tokens", "tag_dropout", "caption_dropout", "caption_prefix",
                    "caption_suffix")
"""Those that the texts of captions depend on."""

Fields = Mapping[str, dataclasses.Field]


@dataclass(frozen=True, kw_only=True)
class Subset:
    """One folder and what holds for its pictures."""

    images: str = setting("subset", "Folder of pictures")
    repeats: int
    trigger: str
    class_word: str
    flip: bool
    masked_loss: str
    shuffle_captions: bool = False
    keep_tokens: int = 1
    tag_dropout: float = 0.0
    caption_dropout: float = 0.0
    caption_prefix: str = ""
    caption_suffix: str = ""
    regularization: bool = setting("subset", "Its pictures show what must not be forgotten, not what is taught", False)
    loss_weight: float = setting("subset", "What the loss of its pictures counts", 1.0, low=0, high=100)

    @property
    def captions_vary(self) -> bool:
        """Whether one caption can become several texts."""
        return self.shuffle_captions or self.tag_dropout > 0


def effective_subsets(plan: "Plan") -> list[Subset]:
    """The plan's own folder, its subsets, its regularization folder; Picture.subset is an index into this list.

    What a subset leaves open is the plan's own value. Regularization pictures get no trigger word and, left open, no
    mask; their repeats only weigh them against each other, since their views are as many as those of training pictures.
    """
    subsets = [Subset(images=plan.images, **{name: getattr(plan, name) for name in INHERITED})]
    tables = [*plan.subsets]
    if plan.regularization:
        tables.append({"images": plan.regularization, "regularization": True})
    for table in tables:
        of_plan = dataclasses.asdict(subsets[0])
        if table.get("regularization"):
            of_plan |= {"repeats": 1, "trigger": "", "masked_loss": "off", "loss_weight": plan.prior_loss_weight}
        subsets.append(Subset(**of_plan | table))
    return subsets


def check_subsets(tables: Sequence[Mapping[str, Any]], plan_fields: Fields) -> list[dict[str, Any]]:
    """The tables with every value checked as the plan's are; RequestError names the table by its number and folder."""
    return [_checked_table(table, f"subsets, table {number}", plan_fields) for number, table in enumerate(tables, start=1)]


def subset_from_text(text: str, plan_fields: Fields) -> dict[str, Any]:
    """`images=DIR,repeats=3,flip=true` as a table; a comma within a folder's name is no separator."""
    fields, table = _fields(plan_fields), {}
    for part in re.split(r",(?=\s*[a-z_]+\s*=)", text):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise RequestError(f"--subset {text}: there is no '=' in {part!r}. Write it as --subset images=DIR,repeats=3.")
        table[key] = from_text(fields[key], value) if key in fields else value
    return _checked_table(table, f"--subset {text}", plan_fields)


def subset_as_text(table: Mapping[str, Any]) -> str:
    """The other way round."""
    return ",".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in table.items())


def _fields(plan_fields: Fields) -> dict[str, dataclasses.Field]:
    return {field.name: plan_fields[field.name] if field.name in INHERITED else field for field in dataclasses.fields(Subset)}


def _checked_table(table: Mapping[str, Any], where: str, plan_fields: Fields) -> dict[str, Any]:
    fields = _fields(plan_fields)
    for key in table:
        if key not in fields:
            raise RequestError(f"{where}: unknown key {key!r}; it takes {', '.join(fields)}." + nearest(key, fields))
    if not table.get("images"):
        raise RequestError(f"{where}: images is missing. Name the folder of its pictures.")
    try:
        values = {key: checked(fields[key], value) for key, value in table.items()}
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None
    if values.get("regularization") and values.get("trigger"):
        raise RequestError(f"{where}: trigger is {values['trigger']!r}, but regularization pictures show the subject's kind "
                           f"without it. Leave trigger out, or set regularization = false.")
    return values
