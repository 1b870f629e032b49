"""The schema of a run: an `experiment` part that decides the bits and an `execution` part that does not.

Unknown keys are errors. Relations between sections (levels against blocks, sharding against stages) are checked here,
so that a configuration that loads can be run. Torch-free.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of the configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class InstalledSource(Section):
    """The embedded default: text that pip has already put on the machine (prose, code, headers, licences)."""

    kind: Literal["installed"] = "installed"
    characters_per_domain: PositiveInt = 2_000_000


class FilesSource(Section):
    """Files or globs of .jsonl[.gz|.zst], .parquet or .txt, in the order of their sorted paths."""

    kind: Literal["files"]
    paths: Annotated[list[str], Field(min_length=1)]
    text_field: str = "text"
    domain_field: str | None = "domain"
    group_field: str | None = None


class HuggingFaceSource(Section):
    """A Hugging Face dataset by name, streamed (extra `hf`)."""

    kind: Literal["hf"]
    name: str
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    domain_field: str | None = None
    group_field: str | None = None
    max_documents: PositiveInt | None = None


class SplitsConfig(Section):
    """Shares of the documents, by hash of the normalised text (or of its group); what is left over is `train`."""

    router: Fraction = 0.02
    stop: Fraction = 0.02
    validation: Fraction = 0.03
    test: Fraction = 0.05

    @model_validator(mode="after")
    def _leave_something_to_train_on(self) -> SplitsConfig:
        held_out = self.router + self.stop + self.validation + self.test
        if held_out >= 0.9:
            raise ValueError(f"the held-out splits take {held_out:.2f} of the documents; leave at least 0.1 for train")
        return self


class CorpusConfig(Section):
    """Where documents come from and how they are cut into splits and document ranges."""

    source: Annotated[InstalledSource | FilesSource | HuggingFaceSource, Field(discriminator="kind")] = (
        InstalledSource()
    )
    splits: SplitsConfig = SplitsConfig()
    min_document_characters: PositiveInt = 200
    range_characters: PositiveInt = 4_000_000
    deduplicate: bool = True


class TokenizerConfig(Section):
    """`bpe` trains byte-level BPE on a sample of the train split, `bytes` needs nothing, `file` is a tokenizer.json."""

    kind: Literal["bpe", "bytes", "file"] = "bpe"
    vocab_size: PositiveInt = 1024
    sample_characters: PositiveInt = 4_000_000
    path: str | None = None

    @model_validator(mode="after")
    def _path_only_for_files(self) -> TokenizerConfig:
        if (self.kind == "file") != (self.path is not None):
            raise ValueError("tokenizer.path is needed by kind 'file' and by no other kind")
        return self


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


class InnerConfig(Section):
    """AdamW on one path. The learning rate is a pure function of the path's step counter: warm-up, then cosine."""

    optimizer: Literal["adamw"] = "adamw"
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


class EvaluateStage(Section):
    """Perplexity of the held-out split for every model and route; writes the report."""

    kind: Literal["evaluate"]


Stage = Annotated[PretrainStage | ShardStage | TrainStage | EvaluateStage, Field(discriminator="kind")]


class BaselineConfig(Section):
    """The dense base continued on all data for the steps of the train stage: what the mixture is compared with."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
    outer: OuterConfig = OuterConfig(kind="assign")


class EvaluationConfig(Section):
    """What is measured, on which split. The first `prefix_tokens` of every sequence never count."""

    split: Literal["validation", "test"] = "test"
    routes: list[Annotated[str, Field(pattern=r"^(sequence|oracle:sequence|(oracle:)?every:[1-9]\d*)$")]] = [
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
    numerics: NumericsConfig = NumericsConfig()
    determinism: Literal["strict", "any"] = "strict"

    @property
    def pretrain(self) -> PretrainStage | None:
        return next((stage for stage in self.stages if isinstance(stage, PretrainStage)), None)

    @property
    def train(self) -> TrainStage | None:
        return next((stage for stage in self.stages if isinstance(stage, TrainStage)), None)

    @property
    def evaluates(self) -> bool:
        return any(isinstance(stage, EvaluateStage) for stage in self.stages)

    @property
    def total_steps(self) -> int:
        """Inner steps one path takes over the whole run: the horizon of the learning-rate schedule."""
        pretrain, train = self.pretrain, self.train
        return (pretrain.steps if pretrain else 0) + (train.phases * train.inner_steps if train else 0)

    @model_validator(mode="after")
    def _stages_in_order(self) -> Experiment:
        order = ["pretrain", "shard", "train", "evaluate"]
        kinds = [stage.kind for stage in self.stages]
        if kinds != sorted(set(kinds), key=order.index):
            raise ValueError(f"stages {kinds} must be a selection of {order}, each at most once and in this order")
        if "train" in kinds and "shard" not in kinds:
            raise ValueError("stages has train without shard; add '- kind: shard' before it")
        if "shard" in kinds and self.sharding.kind in ("kmeans", "product-kmeans"):
            if "pretrain" not in kinds and self.model.init_from is None:
                raise ValueError(
                    f"sharding.kind {self.sharding.kind!r} needs features of a trained base: "
                    "add a pretrain stage or model.init_from"
                )
        if self.baselines and "train" not in kinds:
            raise ValueError("baselines continue for the steps of the train stage, and stages has none")
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
        num_paths = 1
        for level in self.topology.levels:
            num_paths *= level.modules if isinstance(level.modules, int) else 1
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
        if len(set(names)) != len(names) or {"base", "mixture"} & set(names):
            raise ValueError(f"baseline names {names} must differ from one another and from 'base' and 'mixture'")
        return self


class Execution(Section):
    """How the run is carried out; none of it changes a bit of the result, all of it may change on resume."""

    heartbeat_s: Annotated[float, Field(gt=0)] = 2.0
    lease_s: Annotated[float, Field(gt=0)] = 12.0
    chunk_bytes: Annotated[int, Field(ge=1024, le=3 * 1024 * 1024)] = 1024 * 1024
    cache_bytes: PositiveInt = 20 * 1024**3
    keep_versions: Annotated[int, Field(ge=1)] = 2
    max_attempts: PositiveInt = 3
    # Keep the partial progress of TRAIN tasks, as often as its measured cost allows (at most 5 % of a task's time).
    checkpoints: bool = True
    # Seconds from SIGTERM until a worker must be gone, unless it was started with --grace-s.
    grace_s: Annotated[float, Field(ge=0)] = 10.0
    low_disk_bytes: Annotated[int, Field(ge=0)] = 64 * 1024**2
    require_worker_certificates: bool = False
    log_bytes: Annotated[int, Field(ge=4096)] = 64 * 1024**2
    log_files: Annotated[int, Field(ge=2)] = 8
    quarantine_factor: Annotated[float, Field(gt=1)] | None = 10.0
    audit_share: Fraction = 0.0
    # Workers (names, or those of their certificates) whose ban ends when the coordinator starts.
    unban: list[str] = []

    @model_validator(mode="after")
    def _leases_outlast_heartbeats(self) -> Execution:
        if self.lease_s < 3 * self.heartbeat_s:
            raise ValueError(
                f"execution.lease_s ({self.lease_s:g}) must be at least 3 times heartbeat_s ({self.heartbeat_s:g}), "
                "or a lease ends before its worker is heard of"
            )
        return self


class Config(Section):
    """A run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    experiment: Experiment
    execution: Execution = Execution()
