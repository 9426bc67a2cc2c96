"""Inspect a prepared dataset (tokens, documents, sources, hashes) or a checkpoint (position embeddings, weights).

    python -m gpt2repro.tools.inspect data/python-docs              # several folders count as one dataset
    python -m gpt2repro.tools.inspect data/python-docs --verify     # every sha256 again; exit code 1 if one differs
    python -m gpt2repro.tools.inspect data/python-docs --histogram lengths.png
    python -m gpt2repro.tools.inspect runs/demo/latest --output positions.png
    python -m gpt2repro.tools.inspect openai-community/gpt2 --output gpt2.png

The histogram shows the lengths of the documents in the first 50,000,000 tokens of each split. The picture of a
checkpoint shows the position embeddings, three channels of them as curves, and the cosine similarity of all pairs of
positions. After long training the embeddings are smooth along the positions; at initialisation they are noise.
"""

from gpt2repro import command
from gpt2repro.tools import flags

if command.starting(__name__):
    command.parse_early(lambda: flags.inspect(__doc__, None))

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from gpt2repro.data.shards import Dataset, load_tokenizer, open_dataset
from gpt2repro.data.stream import TokenStream
from gpt2repro.eval.loading import load_model
from gpt2repro.eval.output import picture_file
from gpt2repro.run.checkpoints import verify_checkpoint

SAMPLE_TOKENS = 50_000_000  # a second of reading; enough for the shape of the distribution
FIRST_TOKENS = 60  # shown of each split, as text
CHANNELS = (0.2, 0.5, 0.8)  # the channels that are drawn as curves, as shares of n_embd
POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")

# ---- datasets ----------------------------------------------------------------------------------------------


def document_lengths(stream: TokenStream, eot_id: int) -> np.ndarray:
    """Tokens of each whole document, without <|endoftext|>, among the first SAMPLE_TOKENS."""
    ids = stream.read(0, min(SAMPLE_TOKENS, stream.tokens))
    ends = np.flatnonzero(ids == eot_id)
    return np.diff(ends if len(ids) < stream.tokens else np.append(ends, len(ids))) - 1


def dataset_summary(dataset: Dataset) -> Iterator[str]:
    """One page of text about a dataset, line by line."""
    tokenizer = load_tokenizer(dataset.tokenizer)
    parts = dataset.info.get("datasets", [dataset.info])
    yield f"{dataset.path}\n  vocabulary {dataset.vocab_size:,}, <|endoftext|> = {dataset.eot_id}"
    yield f"  tokenizer {dataset.tokenizer} (sha256 {dataset.tokenizer_sha256[:16]}…)"
    for info in (info for info in parts if "source" in info):
        yield f"  source {json.dumps(info['source'], ensure_ascii=False)[:300]}, part {info['part']}"
        yield "  left out: " + ", ".join(f"{count:,} {reason}" for reason, count in info["skipped"].items())
    for name, stream in dataset.streams.items():
        yield f"\n  {name}: {stream.tokens:,} tokens in {len(stream.shards):,} shards"
        if documents := sum(info["splits"].get(name, {}).get("documents", 0) for info in parts):
            mean = stream.tokens / documents - 1  # every document has one <|endoftext|>
            yield f"    {documents:,} documents, {mean:,.1f} tokens a document in the mean"
        first = tokenizer.decode(stream.read(0, min(FIRST_TOKENS, stream.tokens)).tolist())
        yield from (f"    | {line}" for line in first.splitlines())


def draw_lengths(dataset: Dataset, png: Path) -> None:
    """Histograms of document lengths on a logarithmic axis, a row for each split."""
    figure = Figure(figsize=(8, 1 + 2.2 * len(dataset.streams)), layout="constrained")
    rows = figure.subplots(len(dataset.streams), sharex=True, squeeze=False)[:, 0]
    for axes, (name, stream) in zip(rows, dataset.streams.items(), strict=True):
        lengths = np.maximum(document_lengths(stream, dataset.eot_id), 1)
        if len(lengths):
            edges = np.geomspace(lengths.min(), lengths.max() + 1, 60).astype(int)  # whole, so that no bin is empty
            axes.hist(lengths, bins=np.unique(edges).tolist())
            axes.set_title(f"{name}: {len(lengths):,} documents, median {np.median(lengths):,.0f} tokens", loc="left")
        axes.set(xscale="log", ylabel="documents")
    rows[-1].set_xlabel("tokens a document")
    rows[-1].xaxis.set_major_formatter("{x:,.0f}")
    figure.suptitle(Path(dataset.path).name)
    figure.savefig(png, dpi=120)


# ---- checkpoints -------------------------------------------------------------------------------------------


def position_table(model: Any) -> torch.Tensor | None:
    """The learned position embeddings (n_positions, n_embd), or None for a model without such a table."""
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in POSITION_TABLES and isinstance(module, torch.nn.Embedding):
            return module.weight.detach()
    return None


def roughness(table: torch.Tensor) -> torch.Tensor:
    """How much each channel changes from position to position: 1 for noise, near 0 for a smooth curve; (n_embd,).

    Half the mean squared step over the variance (von Neumann's ratio), which is 1 for independent values.
    """
    steps = table.diff(dim=0).square().mean(0)
    return steps / (2 * table.var(0, correction=0)).clamp_min(1e-12)


def similarity(table: torch.Tensor) -> torch.Tensor:
    """Cosine of every pair of positions, (n_positions, n_positions)."""
    unit = torch.nn.functional.normalize(table, dim=-1)
    return unit @ unit.T


def weights_by_kind(model: Any) -> dict[str, torch.Tensor]:
    """All matrices of a kind as one flat tensor; the kind is the end of the name, e.g. `attn.c_proj` in all blocks."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            kind = ".".join(name.removesuffix(".weight").removeprefix("transformer.").split(".")[-2:])
            groups.setdefault(kind, []).append(parameter.detach().flatten())
    return {kind: torch.cat(tensors) for kind, tensors in groups.items()}


def model_summary(model: Any) -> Iterator[str]:
    """One line about the position embeddings, and one for each kind of weights."""
    if (table := position_table(model)) is None:
        yield "position embedding: none (the model has no learned table)"
    else:
        rough, cosine = roughness(table).median(), similarity(table).diagonal(1).mean()
        smoothness = f"roughness {rough:.3f} (noise is 1), cosine of neighbours {cosine:.3f}"
        yield f"position embedding {list(table.shape)}: {smoothness}"
    for kind, values in weights_by_kind(model).items():
        yield f"{kind}: std {values.std():.4f}, largest {values.abs().max():.3f}, {len(values):,} weights"


def draw_positions(table: torch.Tensor, png: Path, *, title: str = "") -> None:
    """Write the picture of the position embeddings: the table, three channels, the similarity of positions."""
    figure = Figure(figsize=(18, 5), dpi=120, layout="constrained")
    figure.suptitle(title)
    picture, curves, cosines = figure.subplots(1, 3)
    for panel, values, bound in (picture, table, 3 * table.std().item()), (cosines, similarity(table), 1):
        image = panel.imshow(values, cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=panel)
    picture.set(title="position embeddings", xlabel="channel", ylabel="position")
    cosines.set(title="cosine similarity of positions", xlabel="position", ylabel="position")
    for channel in (int(share * table.shape[1]) for share in CHANNELS):
        curves.plot(table[:, channel], linewidth=0.9, label=f"channel {channel}")
    smoothness = f"roughness {roughness(table).median():.3f}, noise is 1"
    curves.set(title=f"channels over positions: {smoothness}", xlabel="position")
    curves.legend(frameon=False, fontsize=8)
    curves.grid(alpha=0.25)
    figure.savefig(png)


def main(argv: list[str] | None = None) -> int:
    arguments = flags.inspect(__doc__, argv)
    path = Path(arguments.paths[0])

    def inspect_dataset() -> int:
        dataset = open_dataset(arguments.paths, format=arguments.format, tokenizer=arguments.tokenizer)
        print("\n".join(dataset_summary(dataset)))
        if arguments.output:
            draw_lengths(dataset, picture_file(arguments.output))
        damaged = dataset.verify() if arguments.verify else []
        if arguments.verify:
            print("\n" + ("\n".join(damaged) or "  verified: every sha256 is as recorded"))
        return 1 if damaged else 0

    def inspect_model() -> int:
        model, _ = load_model(str(path), tokenizer=arguments.tokenizer, device="cpu")
        print("\n".join(model_summary(model)))
        if arguments.output:
            table = position_table(model)
            if table is None:
                raise ValueError(f"{path} has no learned position embeddings to draw: leave --output out")
            draw_positions(table, picture_file(arguments.output), title=str(path))
        if arguments.verify:
            verify_checkpoint(path)
            print("verified: every sha256 is as recorded")
        return 0

    def work() -> int:
        is_model = (path / "config.json").is_file() or not path.exists()  # a path that does not exist may be a Hub id
        return inspect_model() if is_model else inspect_dataset()

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
