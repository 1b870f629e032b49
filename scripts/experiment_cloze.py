"""The cloze of the experiment: what a table asks of `dipaco cloze` for every cell that it reports, and what was found.

It is reported, and chooses nothing. A finished cell without it stays finished: it is measured on the run that is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from configs.section import Section
from dipaco.cloze_items import ClozeForm
from dipaco.cloze_routes import depends_on_the_context_alone
from dipaco.cloze_score import KEYS

Count = Annotated[int, Field(ge=1)]
Numbers = dict[str, float | None]
_ASKED = "asked"


class Cloze(Section):
    """At most so many items, and the tokens of a context and of every ending."""

    items: Count
    context_tokens: Count
    ending_tokens: Count

    @property
    def form(self) -> ClozeForm:
        return ClozeForm(self.items, self.context_tokens, self.ending_tokens)

    def words(self, split: str, routes: Iterable[str]) -> list[str]:
        """The options of `dipaco cloze`; `routes` in the words of `dipaco evaluate`."""
        words = ["--split", split, "--items", str(self.items)]
        words += ["--context", str(self.context_tokens), "--ending", str(self.ending_tokens)]
        return words + [word for route in causal(routes) for word in ("--route", route)]

    def asked(self, split: str, routes: Iterable[str]) -> dict[str, Any]:
        """What is kept beside the answer, so that another question is not taken for answered."""
        return {"split": split, "routes": causal(routes), **self.model_dump()}


def causal(routes: Iterable[str]) -> list[str]:
    """The routes that can answer before they have seen the ending."""
    return [route for route in routes if depends_on_the_context_alone(route)]


@dataclass(frozen=True, slots=True)
class FoundCloze:
    """What `dipaco cloze --json` found, with what was `asked`."""

    document: Mapping[str, Any]

    @classmethod
    def kept(cls, found: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
        """As it is written beside a cell."""
        return {**found, _ASKED: asked}

    def answers(self, cloze: Cloze, split: str, routes: Iterable[str]) -> bool:
        """Whether this was asked, by all of these routes at least."""
        asked, wanted = dict(self.document.get(_ASKED, {})), cloze.asked(split, routes)
        return set(wanted.pop("routes")) <= set(asked.pop("routes", [])) and asked == wanted

    @property
    def items_digest(self) -> str:
        return str(self.document["items_digest"])

    def numbers(self, model: str, routes: Sequence[str]) -> Numbers | None:
        """KEYS of a model, means over the routes, of which a baseline has none; None where they were not all measured.

        The mean of standard errors on the same items is an upper bound of that of the mean.
        """
        return _numbers(self.document, model, routes)

    def by_domain(self, model: str, routes: Sequence[str]) -> dict[str, Numbers]:
        """The same by domain."""
        domains = {name: _numbers(part, model, routes) for name, part in self.document["per_domain"].items()}
        return {name: numbers for name, numbers in domains.items() if numbers is not None}


def _numbers(part: Mapping[str, Any], model: str, routes: Sequence[str]) -> Numbers | None:
    measured: Numbers = {}
    for key in KEYS:
        of_model = part[key].get(model)
        values = [of_model.get(route) for route in routes] if isinstance(of_model, dict) else [of_model]
        known = [value for value in values if value is not None]
        measured[key] = sum(known) / len(known) if known and len(known) == len(values) else None
    return None if measured["accuracy"] is None else measured
