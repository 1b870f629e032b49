"""The schema of a run: an `experiment` part that decides the bits and an `execution` part that does not.

Unknown keys are errors. Relations between sections (levels against blocks, sharding against stages) are checked here,
so that a configuration that loads can be run. Torch-free.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from configs.corpus import CorpusConfig, TokenizerConfig
from configs.early_stopping import EarlyStoppingConfig
from configs.execution import Execution
from configs.routes import parse_route, route_name
from configs.section import Fraction, PositiveInt, Section
from configs.stages import EvaluateStage, GaterStage, PretrainStage, ReshardStage, RouterStage, Stage, TrainStage

# Names of models, and of the mixture in reports, that no baseline may have.
RESERVED = frozenset({"base", "mixture", "router", "dipaco", "dipaco-best"})
# Names of stages: a baseline is a stage of its own name.
_STAGE_NAME = re.compile(r"corpus|initialise|pretrain|shard|gater|targets|evaluate|(train|reshard)(-[0-9]+)?")
_STAGES = re.compile(r"(pretrain)?( ?shard( train( reshard train)*( gater)?( router)?)?)?( ?evaluate)?")


class ModelConfig(Section):
    """The shape of one path: a Llama causal LM (Qwen3 where `qk_norm` is on). The vocabulary is the tokenizer's."""

    blocks: PositiveInt
    hidden_size: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt | None = None
    head_size: PositiveInt | None = None
    intermediate_size: PositiveInt
    sequence_length: PositiveInt
    qk_norm: bool = False
    tie_embeddings: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    init_from: str | None = None

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def size_per_head(self) -> int:
        return self.head_size or self.hidden_size // self.heads

    @model_validator(mode="after")
    def _heads_fit(self) -> ModelConfig:
        if self.heads % self.num_kv_heads:
            raise ValueError(f"model.heads ({self.heads}) must be a multiple of model.kv_heads ({self.num_kv_heads})")
        if self.head_size is None and self.hidden_size % self.heads:
            raise ValueError(f"model.hidden_size ({self.hidden_size}) must be a multiple of model.heads ({self.heads})")
        if self.size_per_head % 2:
            raise ValueError(f"the size of a head must be even for rotary positions, not {self.size_per_head}")
        if self.sequence_length < 64:
            raise ValueError(f"model.sequence_length must be at least 64, not {self.sequence_length}")
        return self


class LevelConfig(Section):
    """One level: how many modules it offers (`path`: one per path) and which parts of the transformer they hold."""

    modules: PositiveInt | Literal["path"]
    blocks: list[Annotated[int, Field(ge=0)]] = []
    embedding: bool = False
    head: bool = False


class TopologyConfig(Section):
    """Levels in the order in which a path id names them, and how many shards (replicas) train each path."""

    levels: Annotated[list[LevelConfig], Field(min_length=1)]
    replicas: PositiveInt = 1

    @property
    def num_paths(self) -> int:
        """A level with one module per path offers no choice of its own."""
        return math.prod(level.modules for level in self.levels if isinstance(level.modules, int))


class MuonConfig(Section):
    """Of the inner optimizer `muon`, for the matrices of the blocks; weight decay is that of `inner`.

    `learning_rate`: theirs, where it is not to be that of all other tensors. It follows the same schedule.
    """

    learning_rate: Annotated[float, Field(gt=0)] | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    newton_schulz_steps: PositiveInt = 5


class InnerConfig(Section):
    """The optimizer of one path: AdamW, or Muon for the matrices of the blocks and AdamW for all other tensors.

    The learning rate is a pure function of the path's step counter: warm-up, then cosine.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    muon: MuonConfig = MuonConfig()
    learning_rate: Annotated[float, Field(gt=0)] = 4e-4
    final_learning_rate_ratio: Fraction = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: float = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    batch_rows: PositiveInt = 512
    inner_state: Literal["keep", "reset"] = "keep"
    fork_inner_state: Literal["copy", "reset"] = "copy"
    rewarm_steps: Annotated[int, Field(ge=0)] = 0
    train_on_prefix: bool = True

    @model_validator(mode="after")
    def _muon_is_chosen_where_it_is_set(self) -> InnerConfig:
        if self.optimizer != "muon" and self.muon != MuonConfig():
            raise ValueError(f"inner.muon is for optimizer 'muon', and inner.optimizer is {self.optimizer!r}")
        return self


class OuterConfig(Section):
    """The step of a module: Nesterov on the weighted mean of outer gradients, or `assign` (one contribution)."""

    kind: Literal["nesterov", "assign"] = "nesterov"
    learning_rate: Annotated[float, Field(gt=0)] = 0.7
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    rescale: Literal["none", "sqrt"] = "none"
    # How the contributions to a module become one outer gradient, where there are at least three; else it is the mean.
    average: Literal["mean", "trimmed_mean", "median"] = "mean"
    # Of trimmed_mean: the share of the weight that is left out at each end of every coordinate.
    trim_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.2

    @model_validator(mode="after")
    def _one_contribution_is_not_averaged(self) -> OuterConfig:
        if self.kind == "assign" and self.average != "mean":
            raise ValueError(f"outer.average {self.average!r} is for kind 'nesterov'; 'assign' takes one contribution")
        return self


class ShardingConfig(Section):
    """Which sequences belong to which shard."""

    kind: Literal["all", "random", "kmeans", "product-kmeans"] = "kmeans"
    prefix_tokens: PositiveInt = 32
    transform: Literal["none", "standardize", "whiten"] = "standardize"
    sample_sequences: PositiveInt = 20_000
    capacity: Annotated[float, Field(ge=1.0)] | None = None
    overlap: PositiveInt = 1


class BaselineConfig(Section):
    """The dense base continued on all data for the steps of the train stage: what the mixture is compared with."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
    outer: OuterConfig = OuterConfig(kind="assign")


class EvaluationConfig(Section):
    """What is measured, on which split. The first `prefix_tokens` of every sequence never count."""

    split: Literal["validation", "test"] = "test"
    routes: list[Annotated[str, AfterValidator(route_name)]] = [
        "sequence",
        "every:32",
        "oracle:sequence",
        "oracle:every:32",
    ]
    max_sequences: PositiveInt | None = None


class NumericsConfig(Section):
    """Belongs to the task, not to the worker: a worker that cannot honour it is not leased the task."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: PositiveInt = 1
    micro_batch_rows: PositiveInt | None = None
    compile: bool = False
    checkpoint_activations: bool = False


class Experiment(Section):
    """Everything that decides the bits of the result."""

    seed: Annotated[int, Field(ge=0)] = 0
    corpus: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig
    topology: TopologyConfig
    sharding: ShardingConfig = ShardingConfig()
    inner: InnerConfig = InnerConfig()
    outer: OuterConfig = OuterConfig()
    stages: Annotated[list[Stage], Field(min_length=1)]
    baselines: list[BaselineConfig] = []
    evaluation: EvaluationConfig = EvaluationConfig()
    # Which version of every path `best` is; null: none is kept but the last.
    early_stopping: EarlyStoppingConfig | None = None
    numerics: NumericsConfig = NumericsConfig()
    determinism: Literal["strict", "any"] = "strict"

    @property
    def pretrain(self) -> PretrainStage | None:
        return next((stage for stage in self.stages if isinstance(stage, PretrainStage)), None)

    @property
    def trains(self) -> list[TrainStage]:
        """The train stages, in their order; a re-shard stands between any two."""
        return [stage for stage in self.stages if isinstance(stage, TrainStage)]

    @property
    def reshards(self) -> list[ReshardStage]:
        return [stage for stage in self.stages if isinstance(stage, ReshardStage)]

    @property
    def gated(self) -> list[ReshardStage | GaterStage]:
        """The stages that fit a gater, in their order."""
        return [stage for stage in self.stages if isinstance(stage, ReshardStage | GaterStage)]

    @property
    def router(self) -> RouterStage | None:
        return next((stage for stage in self.stages if isinstance(stage, RouterStage)), None)

    @property
    def phases(self) -> int:
        """Phases of all train stages together: their count goes on over a re-shard."""
        return sum(stage.phases for stage in self.trains)

    @property
    def inner_steps(self) -> int:
        """Inner steps of a shard in a phase; 0 where nothing is trained but the base."""
        return self.trains[0].inner_steps if self.trains else 0

    def first_phase(self, phase: int) -> int:
        """The phase that the train stage of `phase` begins with: that of the fork, or of the last re-shard."""
        first = 0
        for stage in self.trains:
            if phase < first + stage.phases:
                break
            first += stage.phases
        return first

    @property
    def evaluates(self) -> bool:
        return any(isinstance(stage, EvaluateStage) for stage in self.stages)

    @property
    def total_steps(self) -> int:
        """Inner steps one path takes over the whole run: the horizon of the learning-rate schedule."""
        return (self.pretrain.steps if self.pretrain else 0) + self.phases * self.inner_steps

    @model_validator(mode="after")
    def _stages_in_order(self) -> Experiment:
        kinds = [stage.kind for stage in self.stages]
        if "train" in kinds and "shard" not in kinds:
            raise ValueError("stages has train without shard; add '- kind: shard' before it")
        if not _STAGES.fullmatch(" ".join(kinds)):
            raise ValueError(
                f"stages {kinds} must be some of pretrain, shard, train, evaluate in this order, each at most once; "
                "after train, pairs of reshard and train may follow, and after the last train one gater and one router"
            )
        if len({stage.inner_steps for stage in self.trains}) > 1:
            steps = ", ".join(str(stage.inner_steps) for stage in self.trains)
            raise ValueError(f"all train stages must have the same inner_steps, not {steps}: phases are of one length")
        if "shard" in kinds and self.sharding.kind in ("kmeans", "product-kmeans") and not self._has_base:
            raise ValueError(
                f"sharding.kind {self.sharding.kind!r} needs features of a trained base: "
                "add a pretrain stage or model.init_from"
            )
        if self.baselines and "train" not in kinds:
            raise ValueError("baselines continue for the steps of the train stage, and stages has none")
        return self

    @property
    def _has_base(self) -> bool:
        return self.pretrain is not None or self.model.init_from is not None

    @model_validator(mode="after")
    def _stages_that_score_have_what_they_need(self) -> Experiment:
        scoring: list[ReshardStage | GaterStage | RouterStage] = [*self.gated, *([self.router] if self.router else [])]
        if not scoring:
            return self
        kind, num_paths = scoring[0].kind, self.topology.num_paths
        if self.topology.replicas > 1 or self.sharding.kind == "all":
            raise ValueError(
                f"a {kind} stage learns which path is best at what, so it needs several paths with one "
                "shard each: set topology.replicas to 1 and sharding.kind to kmeans, product-kmeans or random"
            )
        if not self._has_base:
            raise ValueError(f"a {kind} stage starts from a trained base: add a pretrain stage or model.init_from")
        if self.corpus.splits.router == 0:
            raise ValueError(f"a {kind} stage scores the router split: set corpus.splits.router above 0")
        if num_paths < 2:
            raise ValueError(f"a {kind} stage chooses between paths, and this topology has one")
        if self.sharding.kind == "random" and any(stage.candidates for stage in self.gated[:1]):
            raise ValueError(
                f"{kind}.candidates are the nearest paths by the router so far, and random shards have none before the "
                f"first {kind}: leave it out there, or set sharding.kind to kmeans or product-kmeans"
            )
        for stage in self.gated:
            if stage.candidates is not None and not 2 <= stage.candidates <= num_paths:
                raise ValueError(f"{stage.kind}.candidates must be 2..{num_paths} (the paths), not {stage.candidates}")
        if self.router and self.tokenizer.kind == "bpe" and self.tokenizer.vocab_size < num_paths:
            raise ValueError(
                f"the router LM scores paths by tokens of its vocabulary: tokenizer.vocab_size "
                f"({self.tokenizer.vocab_size}) must be at least the number of paths ({num_paths})"
            )
        return self

    @model_validator(mode="after")
    def _routes_fit_the_paths(self) -> Experiment:
        for name in self.evaluation.routes:
            route = parse_route(name)
            route.check(self.topology.num_paths)
            if route.kind == "router" and self.router is None and self.topology.num_paths > 1:
                raise ValueError(f"route {name!r} needs a router LM: add '- kind: router' after the last train stage")
        return self

    @model_validator(mode="after")
    def _early_stopping_has_what_it_measures(self) -> Experiment:
        if self.early_stopping is None:
            return self
        if not self.trains:
            raise ValueError("early_stopping chooses among the versions of a train stage, and stages has none")
        if self.corpus.splits.stop == 0:
            raise ValueError("early_stopping measures the stop split: set corpus.splits.stop above 0")
        return self

    @model_validator(mode="after")
    def _levels_cover_the_model(self) -> Experiment:
        levels = self.topology.levels
        placed = sorted(block for level in levels for block in level.blocks)
        if placed != list(range(self.model.blocks)):
            raise ValueError(
                f"topology.levels hold blocks {placed}, but model.blocks is {self.model.blocks}: "
                f"each of 0..{self.model.blocks - 1} must stand in exactly one level"
            )
        for part in ("embedding", "head"):
            holders = [index for index, level in enumerate(levels) if getattr(level, part)]
            if len(holders) != 1:
                raise ValueError(f"exactly one level must hold the {part}; levels {holders} do")
        return self

    @model_validator(mode="after")
    def _shards_fit_the_outer_step(self) -> Experiment:
        num_paths = self.topology.num_paths
        num_shards = num_paths * self.topology.replicas
        if self.sharding.overlap > num_shards:
            raise ValueError(f"sharding.overlap ({self.sharding.overlap}) exceeds the number of shards ({num_shards})")
        if self.sharding.kind == "all" and num_shards != 1:
            raise ValueError(f"sharding.kind 'all' makes one shard, but the topology trains {num_shards}")
        if self.outer.kind == "assign" and num_shards != 1:
            raise ValueError(f"outer.kind 'assign' takes one contribution, but the topology trains {num_shards} shards")
        most = num_shards // min(
            level.modules if isinstance(level.modules, int) else num_paths for level in self.topology.levels
        )
        if self.outer.average != "mean" and most < 3:
            raise ValueError(
                f"outer.average {self.outer.average!r} needs a module with at least 3 contributions; in this topology "
                f"none has more than {most}: add replicas or paths, or use mean"
            )
        for baseline in self.baselines:
            if baseline.outer.average != "mean":
                raise ValueError(f"baseline {baseline.name!r} has one contribution; its outer.average must be mean")
        if self.sharding.prefix_tokens >= self.model.sequence_length:
            raise ValueError("sharding.prefix_tokens must be below model.sequence_length")
        names = [baseline.name for baseline in self.baselines]
        if len(set(names)) != len(names) or RESERVED & set(names):
            reserved = ", ".join(sorted(RESERVED))
            raise ValueError(f"baseline names {names} must differ from one another and from {reserved}")
        taken = [name for name in names if _STAGE_NAME.fullmatch(name)]
        if taken:
            raise ValueError(f"baseline {taken[0]!r} has the name of a stage; take another")
        return self


class Config(Section):
    """A run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    experiment: Experiment
    execution: Execution = Execution()
