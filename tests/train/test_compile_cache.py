"""What a kill during compilation leaves behind."""

import os
import time

from tests.conftest import train_rows


def test_a_run_starts_in_spite_of_empty_files_in_the_compilers_cache(train_script, tmp_path):
    cache = tmp_path / "cache"
    settings = {"compile": "true", "max_steps": 3, "eval_every": 0, "env": {"TORCHINDUCTOR_CACHE_DIR": str(cache)}}
    train_script(tmp_path / "before", **settings)
    binaries = list(cache.rglob("*.so"))
    assert binaries
    for file in binaries:
        file.write_bytes(b"")
        os.utime(file, (time.time() - 60,) * 2)
    train_script(tmp_path / "after", **settings)
    before, after = train_rows(tmp_path / "before"), train_rows(tmp_path / "after")
    assert {step: row["loss"] for step, row in after.items()} == {step: row["loss"] for step, row in before.items()}
