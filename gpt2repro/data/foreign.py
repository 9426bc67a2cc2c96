"""Token shards that other projects made, read in place: build-nanogpt, llm.c and modded-nanogpt, nanoGPT, datatrove.

    layout, shards, tokenizer = find_shards(Path("edu_fineweb10B"), "auto")

A file belongs to the split that its name contains, train or val; others are not read. datatrove's files (.ds) may also
lie in a folder `train` or `val`, and are training data where nothing says more. nanoGPT's .bin (raw uint16 without a
header) must be named: format="nanogpt". Only datatrove records a tokenizer.
"""

from pathlib import Path

import numpy as np

from gpt2repro.data.stream import SPLITS, Shard

LLMC_HEADER_BYTES = 256 * 4  # int32: magic, version, tokens, zeros
LLMC_MAGIC, LLMC_VERSION = 20240520, 1
RECOGNISED = {".npy": "build-nanogpt", ".bin": "llm.c", ".ds": "datatrove"}


def find_shards(path: Path, layout: str) -> tuple[str, dict[str, list[Shard]], str | None]:
    """The format of a folder or file, its shards by split in the order of their names, and the recorded tokenizer.

    Raises ValueError for what is missing, damaged or not finished.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files += [file for folder in (*SPLITS, "validation") for file in sorted((path / folder).glob("*.ds"))]
    suffixes = {file.suffix for file in files} & {*RECOGNISED}
    if layout == "auto" and len(suffixes) == 1:
        layout = RECOGNISED[suffixes.pop()]
    if layout not in FOREIGN:
        advice = f"name a prepared dataset, or the format: {', '.join(FOREIGN)}"
        raise ValueError(f"{path} holds neither dataset.json nor .npy, .bin or .ds shards of one kind; {advice}")
    suffix, read = FOREIGN[layout]
    shards: dict[str, list[Shard]] = {name: [] for name in SPLITS}
    for file in files:
        split = next((name for name in SPLITS if name in file.name), None)
        if layout == "datatrove" and not split:
            split = "val" if file.parent.name in ("val", "validation") else "train"
        if split and file.suffix == suffix:
            shards[split].append(read(file))
    if not any(shards.values()):
        raise ValueError(f"{path} has no {suffix} file of {layout} with 'train' or 'val' in its name; rename them")
    return layout, shards, _datatrove_tokenizer(path, shards) if layout == "datatrove" else None


def _npy_shard(path: Path) -> Shard:
    """A shard as numpy.save writes it (build-nanogpt)."""
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no readable .npy file ({error}); copy or tokenise it again") from error
    if array.ndim != 1 or array.dtype.str not in ("<u2", "<u4"):
        raise ValueError(f"{path} holds {array.dtype} of shape {array.shape}, expected 1-D uint16 or uint32")
    return Shard(path, array.dtype, array.offset, len(array))


def _llmc_shard(path: Path) -> Shard:
    """A shard of llm.c or modded-nanogpt: 256 int32 of header, then uint16."""
    header = np.fromfile(path, dtype="<i4", count=3).tolist()
    if len(header) < 3 or header[:2] != [LLMC_MAGIC, LLMC_VERSION]:
        expected = f"magic {LLMC_MAGIC} and version {LLMC_VERSION} (llm.c, modded-nanogpt)"
        advice = 'for nanoGPT\'s raw uint16 ids without a header name the format "nanogpt"'
        raise ValueError(f"{path} begins with {header[:2]}, expected {expected}; {advice}")
    return Shard(path, np.dtype("<u2"), LLMC_HEADER_BYTES, header[2])


def _nanogpt_shard(path: Path) -> Shard:
    """nanoGPT's train.bin or val.bin: uint16 ids and nothing else."""
    size = path.stat().st_size
    if not size or size % 2:
        raise ValueError(f"{path} has {size:,} bytes, which is no whole number of uint16 ids; copy it again")
    return Shard(path, np.dtype("<u2"), 0, size // 2)


def _datatrove_shard(path: Path) -> Shard:
    """A file of datatrove's DocumentTokenizer or of its merger: ids and nothing else.

    When it is complete, datatrove writes .index (the end of every document, uint64), and then .metadata.
    """
    record, index, mask = (Path(f"{path}{end}") for end in (".metadata", ".index", ".loss"))
    if not record.exists():
        raise ValueError(f"{path} has no {record.name}, which datatrove writes last: finish its pipeline first")
    if mask.exists():
        raise ValueError(f"{mask} takes the loss of some tokens away, which is not done here: tokenise without it")
    _, dtype, tokens = _datatrove_record(record)
    shard = Shard(path, dtype, 0, tokens)
    if index.exists():
        size = index.stat().st_size
        last = np.fromfile(index, "<u8", offset=max(0, size - 8)).sum()  # 0 of an empty index
        if size % 8 or last != tokens:
            raise ValueError(f"{index} does not end at token {tokens:,}, as {path.name} does: copy both again")
    return shard


def _datatrove_record(file: Path) -> tuple[str, np.dtype, int]:
    """Tokenizer, type of the ids and tokens of a .metadata file."""
    try:
        first, tokens = file.read_text(encoding="utf-8").splitlines()[:2]
        tokenizer, _, size = first.rpartition("|")
        return tokenizer, np.dtype({"2": "<u2", "4": "<u4"}[size]), int(tokens)
    except (ValueError, KeyError) as error:
        expected = "expected TOKENIZER|2 or TOKENIZER|4, then the number of tokens"
        raise ValueError(f"{file} is damaged ({error}): {expected}; copy or tokenise it again") from None


def _datatrove_tokenizer(path: Path, shards: dict[str, list[Shard]]) -> str | None:
    """The tokenizer that all shards record, if they name one; the merger's totals are compared on the way."""
    found = [shard for name in SPLITS for shard in shards[name]]
    for record in {record for shard in found for record in shard.path.parent.glob("*.ds.metadata")}:
        if not record.with_suffix("").exists():  # the merger's: NAME.ds.metadata is of 000_NAME.ds, 001_NAME.ds, …
            parts = (s for s in found if s.path.parent == record.parent and s.path.name.endswith(f"_{record.stem}"))
            tokens, here = _datatrove_record(record)[2], sum(shard.tokens for shard in parts)
            if here != tokens:
                raise ValueError(f"{record} records {tokens:,} tokens, but its shards have {here:,}: copy all of them")
    names = {_datatrove_record(Path(f"{shard.path}.metadata"))[0] for shard in found}
    if len(names) > 1:
        raise ValueError(f"{path} was made with several tokenizers ({', '.join(sorted(names))}): use one")
    (name,) = names
    if name.startswith("Unknown Tokenizer"):
        return None
    return str(Path(name).parent) if Path(name).is_file() else name  # tokenizer.json


FOREIGN = {
    "build-nanogpt": (".npy", _npy_shard),
    "llm.c": (".bin", _llmc_shard),
    "nanogpt": (".bin", _nanogpt_shard),
    "datatrove": (".ds", _datatrove_shard),
}
