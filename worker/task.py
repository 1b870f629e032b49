"""Any kind of task: which blobs it needs, how it is run on local files, and what its outputs are called on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from configs.schema import Experiment
from model import tensor_file
from protocol.tasks import BlobRef, EvaluateSpec, FeaturizeSpec, PackSpec, PathRef, TrainSpec
from protocol.tensors import UploadHeader
from worker.checkpoints import Checkpoints
from worker.outcome import Progress, TaskOutcome

AnySpec = PackSpec | FeaturizeSpec | TrainSpec | EvaluateSpec
OutputKind = Literal["module", "inner_state", "checkpoint", "record", "tokens"]

EMBEDDING = "model.embed_tokens.weight"


def inputs(spec: AnySpec) -> dict[str, list[BlobRef]]:
    """The blobs that a task reads, by what their bytes count as: modules, inner_state, checkpoints, other."""
    if isinstance(spec, TrainSpec):
        if spec.resume is not None:  # it holds the inner state, further on
            state = {"checkpoints": [spec.resume.blob]}
        else:
            state = {"inner_state": _present(spec.inner_state)}
        return {"modules": _modules(spec.path), **state, "other": [*spec.tokens, *spec.targets]}
    if isinstance(spec, FeaturizeSpec):
        return {"modules": _modules(spec.base), "other": _present(spec.tokens, spec.router)}
    if isinstance(spec, EvaluateSpec):
        return {"modules": _modules(spec.path), "other": _present(spec.tokens, spec.selection, spec.tokenizer)}
    return {"other": [*_present(spec.tokenizer, spec.text, spec.manifest), *spec.files]}


def run_task(
    spec: AnySpec,
    experiment: Experiment,
    files: Mapping[str, Path],
    out_dir: Path,
    progress: Progress,
    checkpoints: Checkpoints | None = None,
) -> TaskOutcome:
    """Run the task on local files, given by digest; raises what its kind raises. torch is imported here if needed."""
    if isinstance(spec, PackSpec):
        from worker.pack import run_pack

        texts = [_file(files, blob) for blob in (spec.tokenizer, spec.text)]
        parts = [files[blob.digest] for blob in spec.files]
        return run_pack(spec, experiment, texts[0], texts[1], parts, _file(files, spec.manifest), out_dir)
    ref = spec.base if isinstance(spec, FeaturizeSpec) else spec.path
    modules = {module.module_id: files[module.blob.digest] for module in ref.modules}
    vocab_size = vocab_size_of(modules)
    if isinstance(spec, TrainSpec):
        from worker.train import run_train

        tokens = [files[blob.digest] for blob in spec.tokens]
        state = None if spec.resume else _file(files, spec.inner_state)
        targets = [files[blob.digest] for blob in spec.targets]
        return run_train(spec, experiment, vocab_size, modules, tokens, state, out_dir, progress, checkpoints, targets)
    token_file = files[spec.tokens.digest]
    if isinstance(spec, FeaturizeSpec):
        from worker.featurize import run_featurize

        router = _file(files, spec.router)
        return run_featurize(spec, experiment, vocab_size, modules, token_file, router, out_dir, progress)
    from worker.evaluate import run_evaluate

    records = (_file(files, spec.selection), _file(files, spec.tokenizer))
    return run_evaluate(spec, experiment, vocab_size, modules, token_file, *records, out_dir, progress)


def vocab_size_of(module_paths: Mapping[str, Path]) -> int:
    """The size of the vocabulary, from the module that holds the embedding; raises TensorMismatch where none does."""
    for path in module_paths.values():
        shapes = tensor_file.shapes(path)
        if EMBEDDING in shapes:
            return shapes[EMBEDDING][0]
    raise tensor_file.TensorMismatch(f"none of the modules {sorted(module_paths)} holds {EMBEDDING}")


def upload_header(task_id: str, fence: int, spec: AnySpec, name: str, path: Path, blob: BlobRef) -> UploadHeader:
    """What announces one output."""
    kind = _output_kind(spec, name)
    shapes = tensor_file.shapes(path) if kind in ("module", "inner_state", "checkpoint") else {}
    return UploadHeader(
        task_id=task_id,
        fence=fence,
        output=name,
        kind=kind,
        tensors=[(tensor, "float32", list(shape)) for tensor, shape in shapes.items()],
        digest=blob.digest,
        size=blob.size,
    )


def is_input_of_later_tasks(spec: AnySpec, name: str) -> bool:
    """Whether an output is a blob that later tasks read as it is: worth keeping in the cache."""
    kind = _output_kind(spec, name)
    if kind == "module":
        return isinstance(spec, TrainSpec) and spec.outer == "assign"
    return kind in ("inner_state", "tokens")


def _output_kind(spec: AnySpec, name: str) -> OutputKind:
    if isinstance(spec, TrainSpec):
        named: dict[str, OutputKind] = {"inner_state": "inner_state", "checkpoint": "checkpoint"}
        return named.get(name, "module")
    return "tokens" if isinstance(spec, PackSpec) else "record"


def _modules(path: PathRef) -> list[BlobRef]:
    return [module.blob for module in path.modules]


def _present(*blobs: BlobRef | None) -> list[BlobRef]:
    return [blob for blob in blobs if blob is not None]


def _file(files: Mapping[str, Path], blob: BlobRef | None) -> Path | None:
    return None if blob is None else files[blob.digest]
