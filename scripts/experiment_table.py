"""The tables of the experiment: one frozen experiment, and rows that change a few of its keys.

A table is a YAML file in configs/experiments/. Everything that a number depends on stands in it before the first look
at the test split: model, tokens, grids, seeds, budgets, and among which rows and routes validation chooses.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, model_validator

from configs.complaint import complaint
from configs.load import InvalidConfig, mapping_in, text_of
from configs.routes import UnknownRoute, parse_route, route_name
from configs.schema import Config, Experiment
from configs.section import Section
from dipaco.ending import Refused
from model.topology import Topology
from scripts.experiment_cloze import Cloze

BASE_BUDGET = "base"
DIPACO, BEST = "dipaco", "dipaco-best"
"""What a run's topology describes, as evaluations name it: its last version, and that of early stopping."""
MIXTURES = (DIPACO, BEST)
RANDOM = "random"
"""The route of a mixture without a router: for every sequence a path drawn at random (its expected loss)."""
UNROUTED = "none"
"""The route of a model of one path."""

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]


def _route(name: str) -> str:
    return name if name == RANDOM else route_name(name)


RouteName = Annotated[str, AfterValidator(_route)]


class Row(Section):
    """One line of the table: keys of the experiment that differ, the model that is measured and by which routes.

    `model` is a mixture or the name of a baseline. Rows of equal keys are one run. `tuned_as` names the learning rate
    that the row takes over; the first route is the one by which rows are compared.
    """

    name: Name
    label: str
    compute: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    model: str = DIPACO
    tuned_as: str | None = None
    routes: Annotated[list[RouteName], Field(min_length=1)] | None = None


class Tune(Section):
    """One grid of learning rates for everybody: name of a choice -> the row whose validation perplexity decides it."""

    learning_rates: Annotated[list[Positive], Field(min_length=1)]
    seed: Seed
    choices: Annotated[dict[Name, Name], Field(min_length=1)]


class Budget(Section):
    """Factors of the steps of the pretrain stage, of the phases, and of the inner steps of a phase."""

    pretrain: Positive = 1.0
    phases: Positive = 1.0
    inner_steps: Positive = 1.0


class Headline(Section):
    """What validation chooses among for the reported variant and its route, and where that one is measured besides.

    Of the routes those count by which the chosen row is measured.

    The chosen row and the `references` are run with `seeds`, and at other `budgets` with `budget_seeds`.
    """

    candidates: Annotated[list[Name], Field(min_length=1)]
    routes: list[RouteName] = Field(default_factory=list)
    references: list[Name] = Field(default_factory=list)
    seeds: list[Seed] = Field(default_factory=list)
    budgets: list[Name] = Field(default_factory=list)
    budget_seeds: list[Seed] = Field(default_factory=list)


class Cost(Section):
    """For estimates only, in core-seconds: one step of the frozen experiment, giving every training sequence its shard
    by features (once, and once a re-shard), and the rest of a run: corpus, tokens, processes. `characters`: of the
    whole corpus, from which the number of token files of a split follows; without it they count as one."""

    step_s: Positive
    assign_s: Annotated[float, Field(ge=0)] = 0.0
    other_s: Annotated[float, Field(ge=0)] = 0.0
    characters: Annotated[int, Field(ge=0)] = 0


class Table(Section):
    """A table; `reference` is the row whose perplexity the ratios are of. Without `cloze` none is measured."""

    name: Name
    title: str
    levels: str
    experiment: Experiment
    seeds: Annotated[list[Seed], Field(min_length=1)]
    routes: Annotated[list[RouteName], Field(min_length=1)]
    reference: Name
    rows: Annotated[list[Row], Field(min_length=1)]
    tune: Tune | None = None
    budgets: dict[Name, Budget] = Field(default_factory=dict)
    headline: Headline | None = None
    cloze: Cloze | None = None
    cost: Cost

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    @model_validator(mode="after")
    def _names_are_known(self) -> Table:
        names = [row.name for row in self.rows]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"row {twice[0]!r} stands there twice")
        asked = [("reference", self.reference)]
        asked += [(f"tune.choices.{choice}", name) for choice, name in (self.tune.choices if self.tune else {}).items()]
        if self.headline is not None:
            asked += [("headline.candidates", name) for name in self.headline.candidates]
            asked += [("headline.references", name) for name in self.headline.references]
        for key, name in asked:
            if name not in names:
                raise ValueError(f"{key} names {name!r}, which is no row")
        choices = set(self.tune.choices) if self.tune else set()
        for row in self.rows:
            if row.tuned_as is not None and row.tuned_as not in choices:
                raise ValueError(f"row {row.name!r} is tuned as {row.tuned_as!r}, which tune.choices does not have")
        if BASE_BUDGET in self.budgets:
            raise ValueError(f"budget {BASE_BUDGET!r} is the experiment as it stands; give another name")
        for budget in self.headline.budgets if self.headline else []:
            if budget not in self.budgets:
                raise ValueError(f"headline.budgets names {budget!r}, which budgets does not have")
        return self


def load_table(path: Path) -> Table:
    """The table in a YAML file, named after the file; every cell is a run that could begin. Raises InvalidConfig."""
    data = {"name": path.stem} | mapping_in(text_of(path), str(path))
    try:
        table = Table.model_validate(data)
    except ValidationError as error:
        raise InvalidConfig(f"{path}: {complaint(error.errors(), data)}") from None
    try:
        _check(table)
    except (InvalidConfig, UnknownRoute) as error:
        raise InvalidConfig(f"{path}: {error}") from None
    return table


def configured(table: Table, row: Row, seed: int, budget: str, learning_rate: float | None) -> Config:
    """The run of one cell; raises InvalidConfig. Without a learning rate the experiment's (or the row's) stands."""
    experiment = table.experiment.model_dump(mode="json")
    experiment["seed"] = seed
    for key, value in row.overrides.items():
        _put(experiment, key, deepcopy(value), row.name)
    if learning_rate is not None:
        experiment["inner"]["learning_rate"] = learning_rate
    if budget != BASE_BUDGET:
        _scale(experiment["stages"], table.budgets[budget], f"row {row.name!r} at budget {budget!r}")
    data = {"name": f"{table.name}-{row.name}-{budget}-{seed}", "experiment": experiment}
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise InvalidConfig(f"row {row.name!r}: {complaint(error.errors(), data)}") from None


def routes_of(table: Table, row: Row, config: Config) -> tuple[str, ...]:
    """The routes by which a row is measured, the one that it is compared by first."""
    if row.model not in MIXTURES or Topology.from_config(config.experiment.topology).num_paths == 1:
        return (UNROUTED,)
    return tuple(row.routes or table.routes)


def _put(experiment: dict[str, Any], key: str, value: Any, row: str) -> None:
    *parents, last = key.split(".")
    section: Any = experiment
    for parent in parents:
        section = section.get(parent) if isinstance(section, dict) else None
    if not isinstance(section, dict):
        raise InvalidConfig(f"row {row!r}: there is no section experiment.{'.'.join(parents)} to put {last!r} in")
    section[last] = value


def _scale(stages: list[dict[str, Any]], budget: Budget, where: str) -> None:
    for stage in stages:
        if stage["kind"] == "pretrain":
            stage["steps"] = _whole(stage["steps"], budget.pretrain, f"{where}: pretrain.steps")
        if stage["kind"] == "train":
            stage["phases"] = _whole(stage["phases"], budget.phases, f"{where}: train.phases")
            stage["inner_steps"] = _whole(stage["inner_steps"], budget.inner_steps, f"{where}: train.inner_steps")


def _whole(count: int, factor: float, what: str) -> int:
    scaled = round(count * factor)
    if scaled < 1 or abs(scaled - count * factor) > 1e-9:
        raise InvalidConfig(f"{what} would be {count} x {factor:g}, which is no whole number")
    return scaled


def _check(table: Table) -> None:
    """Build every row at every budget that it may be run at, and hold its routes against what it has."""
    if table.cloze is not None:
        try:
            table.cloze.form.check(table.experiment.sharding.prefix_tokens, table.experiment.model.sequence_length)
        except Refused as error:
            raise InvalidConfig(f"cloze: {error}") from None
    headline = table.headline
    scaled = {*headline.candidates, *headline.references} if headline else set()
    for row in table.rows:
        budgets = [BASE_BUDGET, *(headline.budgets if headline and row.name in scaled else [])]
        for budget in budgets:
            config = configured(table, row, table.seeds[0], budget, None)
        _check_the_measure(table, row, config)
        _check_routes(table, row, config)
        models = [DIPACO] if config.experiment.early_stopping is None else list(MIXTURES)
        models += [baseline.name for baseline in config.experiment.baselines]
        if row.model not in models:
            raise InvalidConfig(f"row {row.name!r} measures model {row.model!r}; its run has {', '.join(models)}")
    if headline is not None:
        candidates = [table.row(name) for name in headline.candidates]
        runs = [configured(table, row, table.seeds[0], BASE_BUDGET, None) for row in candidates]
        known = {route for row, run in zip(candidates, runs, strict=True) for route in routes_of(table, row, run)}
        for route in headline.routes:
            if route not in known:
                raise InvalidConfig(f"headline.routes has {route!r}, by which no candidate is measured")


def _check_the_measure(table: Table, row: Row, config: Config) -> None:
    """What is read and how it is measured is the same for everybody."""
    frozen, own = (_measure(each) for each in (table.experiment, config.experiment))
    for key, value in own.items():
        if value != frozen[key]:
            raise InvalidConfig(
                f"row {row.name!r} has another {key} than the table: perplexities would not be comparable "
                f"({value} instead of {frozen[key]})"
            )


def _measure(experiment: Experiment) -> dict[str, object]:
    return {
        "corpus": experiment.corpus,
        "tokenizer": experiment.tokenizer,
        "model.sequence_length": experiment.model.sequence_length,
        "sharding.prefix_tokens": experiment.sharding.prefix_tokens,
        "evaluation": experiment.evaluation,
    }


def _check_routes(table: Table, row: Row, config: Config) -> None:
    experiment = config.experiment
    num_paths = Topology.from_config(experiment.topology).num_paths
    routed = experiment.sharding.kind not in ("all", "random") or bool(experiment.gated)
    for name in routes_of(table, row, config):
        if name in (UNROUTED, RANDOM):
            continue
        route = parse_route(name)
        route.check(num_paths)
        if route.needs_router and not routed:
            raise InvalidConfig(f"row {row.name!r} has no router, which route {name!r} needs; take {RANDOM} or oracles")
        if route.kind == "router" and experiment.router is None:
            raise InvalidConfig(f"row {row.name!r} has no router stage, which route {name!r} needs")
