"""What a run reads: where documents come from, the splits they are cut into, the tokenizer. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.section import Fraction, PositiveInt, Section


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
