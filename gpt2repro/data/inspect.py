"""What a prepared dataset holds: tokens, documents, sources, first lines, and whether it is still what was written.

    python -m gpt2repro.data.inspect data/python-docs             # several folders count as one dataset
    python -m gpt2repro.data.inspect data/python-docs --histogram lengths.png
    python -m gpt2repro.data.inspect data/python-docs --verify    # every sha256 again; exit code 1 if one differs

Prints a page of text; --histogram draws the lengths of the documents in the first --sample tokens of each split.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from gpt2repro.data.shards import FORMATS, Dataset, load_tokenizer, open_dataset, read_documents

SAMPLE_TOKENS = 50_000_000  # a second of reading; enough for the shape of the distribution
FIRST_TOKENS = 60  # of the decoded beginning of each split


def document_lengths(dataset: Dataset, split: str, *, sample: int = SAMPLE_TOKENS) -> np.ndarray:
    """Tokens of each document, without <|endoftext|>, in the first `sample` tokens of a split."""
    documents = read_documents(dataset.split(split), dataset.eot_id, limit=sample)
    return np.array([len(document) for document in documents], dtype=np.int64)


def summary(dataset: Dataset, *, sample: int = SAMPLE_TOKENS) -> str:
    """The page that the command prints."""
    tokenizer = load_tokenizer(str(dataset.tokenizer))
    short_hash = dataset.tokenizer_sha256[:16]
    lines = [
        dataset.path,
        f"  vocabulary {dataset.vocab_size:,}, <|endoftext|> = {dataset.eot_id}, tokenizer {short_hash}…",
    ]
    for info in dataset.info.get("datasets", [dataset.info]):
        if "source" in info:
            lines.append(f"  source {json.dumps(info['source'], ensure_ascii=False)[:300]}, part {info['part']}")
            lines.append(
                f"  left out: {', '.join(f'{count:,} {reason}' for reason, count in info['skipped'].items())}"
            )
    for name, stream in dataset.streams.items():
        record = dataset.info["splits"][name]
        lengths = document_lengths(dataset, name, sample=sample)
        lines.append(f"\n  {name}: {stream.tokens:,} tokens in {len(stream.shards):,} shards")
        if "documents" in record:
            # A split that was cut inside a document counts it, and every document has one <|endoftext|>.
            mean = stream.tokens / record["documents"] - 1
            lines.append(f"    {record['documents']:,} documents, {mean:,.1f} tokens a document in the mean")
        if len(lengths):
            quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1]).astype(int)
            shown = " / ".join(f"{value:,}" for value in quantiles)
            lines.append(f"    shortest / 10 % / median / 90 % / longest of the first {len(lengths):,}: {shown}")
        first = tokenizer.decode(stream.read(0, min(FIRST_TOKENS, stream.tokens)).tolist())
        lines += [f"    | {line}" for line in first.splitlines()]
    return "\n".join(lines)


def draw_histogram(dataset: Dataset, path: Path, *, sample: int = SAMPLE_TOKENS) -> None:
    """Document lengths of every split on a logarithmic axis, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name in dataset.streams:
        lengths = document_lengths(dataset, name, sample=sample)
        if len(lengths):
            label = f"{name}: {len(lengths):,} documents, median {np.median(lengths):,.0f}"
            axes.hist(
                np.maximum(lengths, 1), bins=np.geomspace(1, lengths.max() + 1, 60).tolist(), alpha=0.6, label=label
            )
    axes.set(xscale="log", yscale="log", xlabel="tokens a document", ylabel="documents", title=Path(dataset.path).name)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpt2repro.data.inspect", description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("datasets", nargs="+", metavar="DIR")
    add("--format", default="auto", choices=FORMATS, help="of foreign shards, where it cannot be told")
    add("--tokenizer", help="of foreign shards: a folder or a Hub id")
    add("--verify", action="store_true", help="recompute every sha256")
    add("--histogram", type=Path, metavar="PNG", help="draw the lengths of documents")
    add("--sample", type=int, default=SAMPLE_TOKENS, metavar="N", help="tokens that lengths are taken from")
    options = parser.parse_args(arguments)
    try:
        dataset = open_dataset(options.datasets, format=options.format, tokenizer=options.tokenizer)
        print(summary(dataset, sample=options.sample))
        if options.histogram:
            draw_histogram(dataset, options.histogram, sample=options.sample)
        damaged = dataset.verify() if options.verify else []
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.verify:
        print("\n" + ("\n".join(damaged) or "  verified: every sha256 is as recorded"))
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
