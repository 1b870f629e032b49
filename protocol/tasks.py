"""What a lease asks for and what a worker answers: task specs, their results, and what a worker is able to do.

The coordinator writes specs and reads results, the worker the reverse; both sides validate with pydantic, so a
malformed message is one clear error. Travels as msgpack inside the .proto's `spec`, `result` and `capabilities` fields.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import msgpack
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, model_validator

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
# What a worker says that it counted: sums over many tasks still fit 64 bits.
Counted = Annotated[int, Field(ge=0, lt=2**48)]


class MalformedMessage(ValueError):
    """Bytes on the wire that are not the message they claim to be."""


class Message(BaseModel):
    """A frozen wire record; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class BlobRef(Message):
    """A blob by content: SHA-256 of its bytes, and its size in bytes."""

    digest: Digest
    size: Count


class ModuleRef(Message):
    """One version of a module and where it lives (`endpoint` empty: at the coordinator)."""

    module_id: str
    version: Count
    blob: BlobRef
    endpoint: str = ""


class Numerics(Message):
    """How a task must be computed. `auto` device and dtype are resolved by the worker from its own hardware."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = 1
    micro_batch_rows: int | None = None
    compile: bool = False
    checkpoint_activations: bool = False


class PathRef(Message):
    """A path to compose: the model it belongs to and one module a level."""

    model: str
    path_index: Count
    modules: list[ModuleRef]


class PackSpec(Message):
    """`tokenize`: a range of documents (text blob) to a token file. `gather`: a shard's sequences from token files.

    Output `tokens`: a token file.
    """

    kind: Literal["pack"] = "pack"
    mode: Literal["tokenize", "gather"]
    tokenizer: BlobRef | None = None
    text: BlobRef | None = None
    range_index: Count = 0
    files: list[BlobRef] = []
    manifest: BlobRef | None = None
    required_bytes: Count = 0


class FeaturizeSpec(Message):
    """Features z of the sequences of one token file under the base path, and what the router makes of them.

    `sample`: output `features`, a seeded sample of z. `assign`: output `assignments`, the `top_n` shards of every
    sequence. `route`: output `routes`, the path of every evaluated sequence and of its chunks for each interval
    (tokens). `look`: output `routes`, the same by the router LM, which stands in `base` and reads the whole text.
    """

    kind: Literal["featurize"] = "featurize"
    mode: Literal["sample", "assign", "route", "look"]
    base: PathRef
    tokens: BlobRef
    prefix_tokens: int
    numerics: Numerics
    sample_share: float = 1.0
    seed: int = 0
    router: BlobRef | None = None
    top_n: int = 1
    intervals: list[int] = []
    max_sequences: int | None = None
    required_bytes: Count = 0


class Checkpoint(Message):
    """Partial progress of a TRAIN task: what its first `steps` steps have come to.

    The blob holds float32 tensors `p.<tensor>` (parameters), `m.<tensor>` and `v.<tensor>` (of the inner optimizer; v
    of AdamW alone); the sums and the losses of the steps are those of TaskResult. Whoever goes on from it ends with
    the same bits.
    """

    blob: BlobRef
    steps: Annotated[Counted, Field(gt=0)]
    tokens: Counted
    sequences: Counted
    loss_sum: FiniteFloat
    step_losses: list[FiniteFloat]
    seconds: Annotated[FiniteFloat, Field(ge=0)]

    @model_validator(mode="after")
    def _one_loss_a_step(self) -> Self:
        if len(self.step_losses) != self.steps:
            raise ValueError(f"{len(self.step_losses)} losses of {self.steps} steps")
        return self


class TrainSpec(Message):
    """`steps` inner steps of one shard on its path, from module versions and the shard's inner state.

    `first_step` is the path's step counter (learning rate), `shard_step` the steps already done in the shard (data
    cursor), `resume` the progress of an earlier holder to go on from. `objective`: `lm` predicts the next token,
    `router` the path in `targets`, token files of path indices that stand in the places of the shard's tokens. Outputs:
    one contribution per module id (start minus end; for `assign` the end itself), and `inner_state` where kept.
    """

    kind: Literal["train"] = "train"
    path: PathRef
    shard: Count
    tokens: list[BlobRef]
    inner_state: BlobRef | None
    adam_step: Count
    phase: Count
    first_step: Count
    steps: int
    total_steps: int
    shard_step: Count
    order_seed: Count
    outer: Literal["nesterov", "assign"]
    numerics: Numerics
    resume: Checkpoint | None = None
    required_bytes: Count = 0
    objective: Literal["lm", "router"] = "lm"
    targets: list[BlobRef] = []


class EvaluateSpec(Message):
    """Losses of the evaluated sequences of one token file under one path, by chunk of `chunk_tokens` after the prefix.

    Output `losses`. `selection` (uint32 positions in the file) limits it to some sequences. Where `tokenizer` is set,
    the UTF-8 bytes that the counted tokens stand for are counted too.
    """

    kind: Literal["evaluate"] = "evaluate"
    path: PathRef
    tokens: BlobRef
    prefix_tokens: int
    chunk_tokens: int
    numerics: Numerics
    max_sequences: int | None = None
    selection: BlobRef | None = None
    tokenizer: BlobRef | None = None
    required_bytes: Count = 0


TaskSpec = Annotated[PackSpec | FeaturizeSpec | TrainSpec | EvaluateSpec, Field(discriminator="kind")]


class TaskResult(Message):
    """Outputs by name, counted quantities, and the numbers that go into metrics.

    `loss_sum` in nats over `tokens` target tokens; `step_losses` is the mean loss of each inner step. All of
    them, and `seconds`, cover the whole task; `resumed_steps` and `resumed_seconds` are the part taken over from a
    checkpoint; `reused`: they are those of an earlier computation, and this one took no time.
    """

    outputs: dict[str, BlobRef]
    tokens: Counted = 0
    sequences: Counted = 0
    steps: Counted = 0
    loss_sum: FiniteFloat = 0.0
    step_losses: list[FiniteFloat] = []
    seconds: FiniteFloat = 0.0
    resumed_steps: Counted = 0
    resumed_seconds: FiniteFloat = 0.0
    reused: bool = False
    fetched_bytes: dict[str, Counted] = {}


class Capabilities(Message):
    """What a worker offers: devices by preference, memory free for a task in bytes, threads and fingerprint class."""

    devices: list[Literal["cpu", "cuda", "mps"]]
    memory_bytes: Count
    threads: int
    fingerprint: str
    pid: int = 0
    host: str = ""


_SPEC: TypeAdapter[PackSpec | FeaturizeSpec | TrainSpec | EvaluateSpec] = TypeAdapter(TaskSpec)


def encode(message: Message) -> bytes:
    """The msgpack form of a message."""
    packed: bytes = msgpack.packb(message.model_dump(mode="json"))
    return packed


def unpack(data: bytes) -> Any:
    """The plain value in a msgpack message, in which no length may exceed the message; raises MalformedMessage."""
    try:
        return msgpack.unpackb(data, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise MalformedMessage(f"not a msgpack message: {error}") from None


def parse_spec(document: Any) -> PackSpec | FeaturizeSpec | TrainSpec | EvaluateSpec:
    """A task spec from plain data; raises MalformedMessage."""
    try:
        return _SPEC.validate_python(document)
    except ValidationError as error:
        raise MalformedMessage(f"malformed task spec: {error}") from None


def decode_spec(data: bytes) -> PackSpec | FeaturizeSpec | TrainSpec | EvaluateSpec:
    """The task spec in a lease; raises MalformedMessage."""
    return parse_spec(unpack(data))


def decode_result(data: bytes) -> TaskResult:
    """The result a worker submits; raises MalformedMessage."""
    try:
        return TaskResult.model_validate(unpack(data))
    except ValidationError as error:
        raise MalformedMessage(f"malformed task result: {error}") from None


def decode_checkpoint(data: bytes) -> Checkpoint:
    """The partial progress a worker hands in; raises MalformedMessage."""
    try:
        return Checkpoint.model_validate(unpack(data))
    except ValidationError as error:
        raise MalformedMessage(f"malformed checkpoint: {error}") from None


def decode_capabilities(data: bytes) -> Capabilities:
    """What a worker announces; raises MalformedMessage."""
    try:
        return Capabilities.model_validate(unpack(data))
    except ValidationError as error:
        raise MalformedMessage(f"malformed capabilities: {error}") from None
