"""The stages that a run is a list of. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.section import PositiveInt, Section


class PretrainStage(Section):
    """Train the dense base for `steps`, in tasks of `inner_steps`; every path starts from it."""

    kind: Literal["pretrain"]
    steps: PositiveInt
    inner_steps: PositiveInt

    @model_validator(mode="after")
    def _whole_tasks(self) -> PretrainStage:
        if self.steps % self.inner_steps:
            raise ValueError(
                f"pretrain.steps ({self.steps}) must be a multiple of its inner_steps ({self.inner_steps})"
            )
        return self


class ShardStage(Section):
    """Compute features, fit the router and give every training sequence its shard (experiment.sharding)."""

    kind: Literal["shard"]


class TrainStage(Section):
    """`phases` phases of `inner_steps` inner steps a shard, each followed by one outer step a module."""

    kind: Literal["train"]
    phases: PositiveInt
    inner_steps: PositiveInt


class GaterConfig(Section):
    """The gater: multinomial logistic regression of the best path on z (DiPaCo, arXiv 2403.10616, Sec 2.4.2)."""

    transform: Literal["none", "standardize", "whiten"] = "standardize"
    # Times half the sum of the squared weights, beside the summed cross entropy: the larger, the flatter the posterior.
    regularization: Annotated[float, Field(gt=0)] = 1.0
    # No path is the label of more than this many times its fair share of router sequences; null: the plain best path.
    capacity: Annotated[float, Field(ge=1.0)] | None = 1.25
    # Shift the classes so that the gater hands out the shares that the labels have: no path starves.
    match_labels: bool = True
    # Learn every path in the share softmax(-loss / temperature) of a sequence (nats), and not its best one alone: what
    # a sequence loses hardly by says little. Such labels are neither capped nor matched.
    temperature: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _soft_labels_are_as_they_are(self) -> Self:
        if self.temperature is not None and (self.capacity is not None or self.match_labels):
            raise ValueError(
                "gater.temperature makes soft labels, which are neither capped nor matched: set gater.capacity to null "
                "and gater.match_labels to false, or gater.temperature to null"
            )
        return self


class InferenceGaterConfig(GaterConfig):
    """The gater of the final paths: nothing is trained on what it hands out, so no path needs its share."""

    capacity: Annotated[float, Field(ge=1.0)] | None = None
    match_labels: bool = False
    temperature: Annotated[float, Field(gt=0)] | None = 30.0


class _GatedStage(Section):
    """Score the router split under every path and fit a gater to what they are best at."""

    # Of each token file of the router split, scored under every path; null: all of them.
    max_sequences: PositiveInt | None = None
    # Score each sequence under its so many nearest paths only, by the router so far; null: under all paths.
    candidates: PositiveInt | None = None


class ReshardStage(_GatedStage):
    """Fit the gater and give every training sequence its shard anew, for the train stage that follows."""

    kind: Literal["reshard"]
    gater: GaterConfig = GaterConfig()


class GaterStage(_GatedStage):
    """Fit the gater to the trained paths, for inference; shards stay as they were trained on."""

    kind: Literal["gater"]
    gater: InferenceGaterConfig = InferenceGaterConfig()


class RouterStage(Section):
    """Train the router LM: the base, on which path is best for the next `window` tokens (DiPaCo Sec 2.4.3 and 7.2.2).

    It takes `steps` in tasks of `inner_steps` on the router split, without warm-up, its rate falling to zero.
    """

    kind: Literal["router"]
    steps: PositiveInt
    inner_steps: PositiveInt
    # Tokens ahead that a path is best for; one router serves every interval of `router:W`.
    window: PositiveInt = 64
    # Of each token file of the router split, scored under every path token by token and trained on; null: as many as
    # a record of 128 MiB holds.
    max_sequences: PositiveInt | None = None

    @model_validator(mode="after")
    def _whole_tasks(self) -> RouterStage:
        if self.steps % self.inner_steps:
            raise ValueError(f"router.steps ({self.steps}) must be a multiple of its inner_steps ({self.inner_steps})")
        return self


class EvaluateStage(Section):
    """Perplexity of the held-out split for every model and route; writes the report."""

    kind: Literal["evaluate"]


Stage = Annotated[
    PretrainStage | ShardStage | TrainStage | ReshardStage | GaterStage | RouterStage | EvaluateStage,
    Field(discriminator="kind"),
]
