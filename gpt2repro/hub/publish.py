"""Upload a checkpoint to the Hub, with a model card.

    python -m gpt2repro.hub.publish runs/demo/latest --repo-id me/gpt2-demo --dry-run demo-repo     # look first
    python -m gpt2repro.hub.publish runs/demo/latest --repo-id me/gpt2-demo                         # private
    python -m gpt2repro.hub.publish runs/demo/latest --repo-id me/gpt2-demo-stock --stock --public

Uploaded are weights, configuration, tokenizer, our two Python files, README.md and the run's curves.png; never the
optimizer's state. With `--stock` it is the conversion to stock GPT-2, which loads without our code. All files come in
one commit. `hub_repo_id` in a recipe uploads checkpoints while the run trains (push.py).
"""

from gpt2repro import command
from gpt2repro.hub import flags

if command.starting(__name__):
    command.parse_early(lambda: flags.publish(__doc__, None))

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub.utils import validate_repo_id

from gpt2repro.files import linked
from gpt2repro.hub.card import model_card
from gpt2repro.hub.convert import config_of, convert
from gpt2repro.hub.figures import read_json
from gpt2repro.hub.upload import upload, writable_repo
from gpt2repro.run.checkpoints import OPTIMIZER, RECORD, verify_checkpoint
from gpt2repro.run.folder import CURVES


def publish(
    checkpoint: str | Path, repo_id: str, *, stock: bool = False, private: bool = True, dry_run: Path | None = None,
    **terms: str | None,
) -> str:
    """Upload a checkpoint, or with `dry_run` only make the folder that would be uploaded; returns its address.

    `terms` are a license and a language, for the card.

    Raises:
        ValueError: no complete checkpoint, no network, no token, no right to write, or an upload that failed.
    """
    checkpoint = linked(Path(checkpoint)).resolve()
    validate_repo_id(repo_id)
    if not checkpoint.is_dir():
        raise ValueError(f"there is no folder {checkpoint}: give a checkpoint, e.g. runs/NAME/latest")
    if (checkpoint / RECORD).is_file():
        verify_checkpoint(checkpoint, to_resume=False)
    elif (checkpoint / OPTIMIZER).exists():
        raise ValueError(f"{checkpoint} has {OPTIMIZER} but no {RECORD}: its saving was not finished; give another")
    if dry_run and dry_run.exists():
        raise ValueError(f"{dry_run} exists: give a new folder, or delete it")
    with TemporaryDirectory(prefix="publish-") as temporary:
        folder = dry_run or Path(temporary) / "repository"
        gather(checkpoint, folder, stock=stock)
        if not dry_run:
            repo_id = writable_repo(repo_id, private=private)
        model_card(checkpoint, folder, repo_id=repo_id, **terms).save(folder / "README.md")
        return str(folder) if dry_run else upload(folder, repo_id, message=f"Upload {checkpoint.name}")


def gather(
    checkpoint: Path, folder: Path, *, stock: bool = False, copy: Callable[[Path, Path], object] = shutil.copyfile
) -> None:
    """Make `folder` with the files to upload: those that a checkpoint's record names, or a conversion.

    `copy` puts a file there. A folder without a record is loaded and saved again, without its other files.

    Raises:
        ValueError: no complete checkpoint, or a symbolic link in the place of a file.
    """
    is_of_run = (checkpoint / RECORD).is_file()
    files = [checkpoint.parent / CURVES] if is_of_run and (checkpoint.parent / CURVES).is_file() else []
    if is_of_run and not stock:
        files += [checkpoint / name for name in read_json(checkpoint / RECORD)["files"] if name != OPTIMIZER]
    if links := [file for file in files if file.is_symlink()]:
        raise ValueError(f"{links[0]} is a symbolic link: put the file itself in its place")
    if stock or not is_of_run:
        convert(checkpoint, folder, to="gpt2" if stock else config_of(checkpoint).model_type)
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        copy(file, folder / file.name)


def main(argv: list[str] | None = None) -> int:
    args = flags.publish(__doc__, argv)

    def work() -> None:
        print(publish(
            args.checkpoint, args.repo_id, stock=args.stock, private=not args.public, dry_run=args.dry_run,
            license=args.license, language=args.language,
        ))

    return command.run(work, errors_only=True)


if __name__ == "__main__":
    sys.exit(main())
