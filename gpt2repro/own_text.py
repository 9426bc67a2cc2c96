"""`--text FILE …`: the fields of a recipe that follow from a text; all others are those of recipes/shakespeare.yaml.

    python train_accelerate.py --text my.txt

The text's size chooses the tokenizer, the shape and the largest number of steps. The run measures this machine and
lowers the steps to MINUTES. Name and content of the text name the run and its dataset: no two texts share a folder.
"""

import hashlib
import re
from pathlib import Path

from gpt2repro.command import UsageError
from gpt2repro.recipe import Recipe

LEAST, MOST = 10_000, 2**28  # bytes: enough to validate on; what is held in memory at once
LARGE = 50_000_000  # bytes, for which the demo's 4.3M parameters are few: 8 passes are 30 tokens a parameter
EPOCHS, LEAST_STEPS, MINUTES = 8, 200, 8
BYTES_PER_TOKEN, STEP_TOKENS = 3, 4096  # of English with a small vocabulary; of recipes/shakespeare.yaml

Words = dict[str, str | list[str]]


def fields_for(files: list[str]) -> Words:
    """What the texts choose, as words of a command line.

    Raises:
        UsageError: a file that is missing, a folder or not plain text; too little or too much text.
    """
    paths = [Path(file).expanduser() for file in files]
    size = sum(path.stat().st_size for path in paths if path.is_file())
    texts = [] if size > MOST else [_read(path) for path in paths]
    size = sum(map(len, texts)) or size
    if not LEAST <= size <= MOST:
        advice = "give more text" if size < LEAST else "prepare it with python -m gpt2repro.data.prepare --workers N"
        raise UsageError(f"--text has {size:,} bytes, expected {LEAST:,} to {MOST:,}: {advice}")
    name = re.sub(r"[^\w.-]+", "-", paths[0].stem)[:40]
    name += "-" + hashlib.sha256("\0".join(texts).encode()).hexdigest()[:8]
    entries = 2 ** min(13, max(9, (size // 500).bit_length() - 1))  # one for about 500 bytes: 512 to 8,192
    steps = max(LEAST_STEPS, EPOCHS * size * 9 // 10 // BYTES_PER_TOKEN // STEP_TOKENS)
    return {
        "files": files, "dataset_dir": [f"data/{name}"], "output_dir": f"runs/{name}", "tokenizer": f"train:{entries}",
        "max_steps": str(steps), "max_minutes": str(MINUTES), "sample_prompt": " ".join(texts[0].split()[:2]),
        **({"n_layer": "6", "n_head": "6", "n_embd": "384"} if size > LARGE else {}),
    }  # fmt: skip


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"--text {path} cannot be read ({error.strerror}): give a file of text") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {path} is not UTF-8 ({error}): give a file of text, or convert it") from None
    if "\0" in text or not text.strip():
        raise UsageError(f"--text {path} is {'binary' if text.strip() else 'empty'}: give a file of text")
    return text


def explanation(recipe: Recipe) -> str:
    """What was chosen and why, for a person."""
    steps = f"{recipe.max_steps:,} steps of {recipe.global_batch_tokens:,} tokens"
    if recipe.max_minutes:
        steps = f"at most {steps}: {EPOCHS} passes over the text, or {LEAST_STEPS} steps if these are more"
    return (
        f"by the size of the text: tokenizer {recipe.tokenizer}, {recipe.n_layer or 4} layers, {steps}\n"
        f"the last tenth of the text validates; the run is {recipe.output_dir}, its data {recipe.dataset_dir[0]}\n"
        "every field of the recipe is a flag, such as --dropout 0.2"
    )
