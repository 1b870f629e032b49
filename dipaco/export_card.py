"""The card of an export, README.md: what was exported, what each path was trained on, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.plan import MIXTURE, ROUTING, SHARDING
from coordinator.snapshot import RunSnapshot
from dipaco.export_folder import Manifest
from dipaco.training_sample import domain_shares
from model.layout import num_parameters

_NAMED_DOMAINS = 6


@dataclass(frozen=True, slots=True)
class TextOfPath:
    """What a path was trained on: its share of all training tokens, and the share of its sequences by domain."""

    path: str
    tokens: int
    token_share: float
    domains: Mapping[str, float]


def text_of_paths(snapshot: RunSnapshot) -> tuple[TextOfPath, ...]:
    """Of every path of the mixture; empty before its shards are made, and for a run without one."""
    topology = snapshot.topology
    shards = snapshot.state.shards_of(MIXTURE)
    total = sum(shard.training_tokens for shard in shards)
    found = []
    for path_index in range(topology.num_paths) if total else ():
        own = [shard for shard in shards if shard.path_index == path_index]
        tokens = sum(shard.training_tokens for shard in own)
        files = [snapshot.store.path(file.digest) for shard in own for file in shard.files]
        found.append(TextOfPath(topology.path_id(path_index), tokens, tokens / total, domain_shares(files)))
    return tuple(found)


def card(snapshot: RunSnapshot, texts: Sequence[TextOfPath], manifest: Manifest) -> str:
    """The page in Markdown."""
    parts = [_front(manifest.format), _what(snapshot, manifest)]
    if texts:
        parts.append(_which_text(texts, list(manifest.paths), shards_of(snapshot)))
    parts.append(_loading(manifest))
    if manifest.router is not None:
        parts.append(_routing(manifest.router, manifest))
    return "\n\n".join(parts) + "\n"


def _front(file_format: str) -> str:
    library = "transformers" if file_format == "hf" else "gguf"
    return f"---\nlibrary_name: {library}\ntags: [dipaco, base-model]\npipeline_tag: text-generation\n---"


def _what(snapshot: RunSnapshot, manifest: Manifest) -> str:
    experiment, paths = snapshot.config.experiment, list(manifest.paths)
    millions = num_parameters(experiment.model, snapshot.vocab_size, snapshot.plan.dense) / 1e6
    many = f"{len(paths)} paths" if len(paths) != 1 else f"Path {paths[0]}"
    many = many if paths else "The router"
    lines = [
        f"# {many} of {snapshot.config.name}",
        f"From a mixture of {snapshot.topology.num_paths} paths that share modules (DiPaCo, arXiv 2403.10616); each "
        f"path is a complete language model of {millions:,.2f} million parameters. It is a base model: it continues "
        "text, and has not been taught to follow instructions or to chat.",
        f"It was trained on sequences of at most {experiment.model.sequence_length} tokens that begin with BOS, which "
        "the tokenizer puts there.",
    ]
    if paths:
        versions = "newest" if manifest.version == "last" else "best"
        lines.append(f"Modules ({versions} versions), with the SHA-256 of their weights:")
        rows = {
            (each.module, each.version): f"| {each.module} | {each.version} | {each.sha256} |"
            for path in manifest.paths.values()
            for each in path.modules
        }
        lines.append(
            "\n".join(["| module | version | SHA-256 |", "|---|---|---|", *(rows[key] for key in sorted(rows))])
        )
    return "\n\n".join(lines)


def shards_of(snapshot: RunSnapshot) -> str:
    """Why each path was trained on what it was, and what that says of where new text goes."""
    stages = [stage for stage in snapshot.state.stages.values() if stage.kind in ROUTING and stage.status == "done"]
    dividing = [stage.kind for stage in stages if stage.kind in SHARDING]
    sharding = snapshot.config.experiment.sharding.kind
    by_chance = dividing[-1:] != ["reshard"] and sharding in ("random", "all")
    if by_chance and sharding == "all":
        said = "Every path was trained on all of the text, whatever its domain"
    elif by_chance:
        said = "Each path was trained on sequences that were drawn at random, whatever their domain"
    else:
        said = "Each path was trained on the sequences that a router gave to it"
    if stages and stages[-1].kind == "gater":
        gater = "The run's router is a gater that was fitted to the trained paths afterwards"
        return f"{said}. {gater}: it divides new text otherwise"
    if by_chance:
        return f"{said}: this is not where new text goes"
    return f"{said}, which is the router of the run: it divides new text alike"


def _which_text(texts: Sequence[TextOfPath], here: Sequence[str], why: str) -> str:
    lines = [
        "## What each path was trained on",
        "",
        f"{why}. By the domains that the corpus names:",
        "",
        "| path | share of training tokens | domains of its sequences |",
        "|---|---|---|",
    ]
    for text in texts:
        named = list(text.domains.items())[:_NAMED_DOMAINS]
        domains = ", ".join(f"{name or '(unnamed)'} {share:.0%}" for name, share in named)
        more = ", ..." if len(text.domains) > len(named) else ""
        mark = " (here)" if text.path in here and len(here) < len(texts) else ""
        lines.append(f"| {text.path}{mark} | {text.token_share:.1%} | {domains}{more} |")
    return "\n".join(lines)


def _loading(manifest: Manifest) -> str:
    if not manifest.paths:
        return "## Use\n\nThis is the router alone; the paths are exported by `dipaco export RUN --all OUT`."
    path, folder = next((path, each.folder) for path, each in manifest.paths.items())
    lines = ["## Use", ""]
    if manifest.format == "hf":
        lines += [
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer  # 4.48 or newer",
            f'model = AutoModelForCausalLM.from_pretrained("{folder}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
            "```",
        ]
        if len(manifest.paths) > 1:
            lines += [
                "",
                "A file module-L.M.safetensors is the same file (a hard link) in the folders of all paths that share "
                "it: `cp -a`, `rsync -H` and `tar` keep that, other copies hold it once for every path.",
            ]
    else:
        name = gguf_file_name(path)
        where = Path(folder) / name
        lines += [
            "```",
            f"llama-completion -m {where} -p 'Once'",
            f"ollama create my-path -f {Path(folder) / 'Modelfile'} && ollama run my-path",
            "```",
        ]
        if len(manifest.paths) > 1:
            lines += [
                "",
                "A GGUF file is a whole model, so modules that paths share are in the file of each of them.",
            ]
    return "\n".join(lines)


def _routing(router: str, manifest: Manifest) -> str:
    lines = [
        "## The router",
        "",
        f"`{router}/` is the base model with its tokenizer, the router's weights (router.msgpack) and router.json. It "
        "reads the mean of the base's last hidden states over the first tokens of a text, and names the path for it:",
        "",
        "```python",
        "from pathlib import Path",
        "import numpy",
        "from routing.artefact import RouterArtefact  # of the package dipaco",
        f'artefact = RouterArtefact.open(Path("{router}"))',
        "tokens = [artefact.tokenizer.bos_id, *artefact.tokenizer.encode(text)]",
        "posterior, _ = artefact.router.route(numpy.array(tokens))",
        "path = artefact.paths[posterior.argmax()]",
        "```",
    ]
    if manifest.paths and manifest.format == "hf":
        lines += ["", "`dipaco generate FOLDER --prompt TEXT` does so, and continues the text by that path."]
    return "\n".join(lines)


def gguf_file_name(path: str) -> str:
    """The name of a path's file."""
    return f"path-{path}.gguf"
