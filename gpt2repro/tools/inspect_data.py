"""What a prepared dataset holds: tokens, documents, sources, first lines, and whether it is still what was written.

    python -m gpt2repro.tools.inspect_data data/python-docs             # several folders count as one dataset
    python -m gpt2repro.tools.inspect_data data/python-docs --histogram lengths.png
    python -m gpt2repro.tools.inspect_data data/python-docs --verify    # every sha256 again; exit code 1 if one differs

Prints a page of text; --histogram draws the lengths of the documents in the first 50,000,000 tokens of each split.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from gpt2repro.data.shards import FORMATS, Dataset, TokenStream, load_tokenizer, open_dataset

SAMPLE_TOKENS = 50_000_000  # a second of reading; enough for the shape of the distribution
FIRST_TOKENS = 60  # of the decoded beginning of each split


def document_lengths(stream: TokenStream, eot_id: int) -> np.ndarray:
    """Tokens of each document, without <|endoftext|>, among the first SAMPLE_TOKENS; one that is cut there is not."""
    ids = stream.read(0, min(SAMPLE_TOKENS, stream.tokens))
    ends = np.flatnonzero(ids == eot_id)
    return np.diff(ends if len(ids) < stream.tokens else np.append(ends, len(ids))) - 1


def summary(dataset: Dataset) -> str:
    """The page that the command prints."""
    tokenizer = load_tokenizer(dataset.tokenizer)
    parts = dataset.info.get("datasets", [dataset.info])
    lines = [dataset.path, f"  vocabulary {dataset.vocab_size:,}, <|endoftext|> = {dataset.eot_id}, "
             f"tokenizer {dataset.tokenizer_sha256[:16]}…"]  # fmt: skip
    for info in parts:
        if "source" in info:
            skipped = ", ".join(f"{count:,} {reason}" for reason, count in info["skipped"].items())
            lines.append(f"  source {json.dumps(info['source'], ensure_ascii=False)[:300]}, part {info['part']}")
            lines.append(f"  left out: {skipped}")
    for name, stream in dataset.streams.items():
        lines.append(f"\n  {name}: {stream.tokens:,} tokens in {len(stream.shards):,} shards")
        if documents := sum(info["splits"].get(name, {}).get("documents", 0) for info in parts):
            # A split that was cut inside a document counts it, and every document has one <|endoftext|>.
            mean = stream.tokens / documents - 1
            lines.append(f"    {documents:,} documents, {mean:,.1f} tokens a document in the mean")
        first = tokenizer.decode(stream.read(0, min(FIRST_TOKENS, stream.tokens)).tolist())
        lines += [f"    | {line}" for line in first.splitlines()]
    return "\n".join(lines)


def draw_histogram(dataset: Dataset, path: Path) -> None:
    """Document lengths on a logarithmic axis, as a PNG with a row for each split."""
    from matplotlib.figure import Figure

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
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpt2repro.tools.inspect_data", description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("datasets", nargs="+", metavar="DIR")
    add("--format", default="auto", choices=FORMATS, help="of foreign shards, where it cannot be told")
    add("--tokenizer", help="of foreign shards: a folder or a Hub id")
    add("--verify", action="store_true", help="recompute every sha256")
    add("--histogram", type=Path, metavar="PNG", help="draw the lengths of documents")
    options = parser.parse_args(arguments)
    try:
        dataset = open_dataset(options.datasets, format=options.format, tokenizer=options.tokenizer)
        print(summary(dataset))
        if options.histogram:
            draw_histogram(dataset, options.histogram)
        damaged = dataset.verify() if options.verify else []
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.verify:
        print("\n" + ("\n".join(damaged) or "  verified: every sha256 is as recorded"))
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
