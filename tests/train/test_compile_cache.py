"""What a kill during compilation leaves behind."""

import os
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

from gpt2repro.train.launch import remove_cut_binaries
from tests.conftest import train_rows


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's binaries tell their size")
def test_binaries_that_are_cut_off_are_removed_from_the_cache_and_whole_or_new_ones_are_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    extension = sysconfig.get_config_var("EXT_SUFFIX")
    binary = next(Path(np.__file__).parent.rglob(f"*{extension}")).read_bytes()
    cut = [0, 10, 64, 5000, len(binary) // 2, len(binary) - 100, len(binary) - 1]
    for size in (*cut, len(binary)):
        (tmp_path / f"{size}.so").write_bytes(binary[:size])
        os.utime(tmp_path / f"{size}.so", (time.time() - 60,) * 2)
    (tmp_path / "zeros.so").write_bytes(bytes(5000))
    os.utime(tmp_path / "zeros.so", (time.time() - 60,) * 2)
    (tmp_path / "new.so").write_bytes(b"")
    remove_cut_binaries()
    assert {path.name for path in tmp_path.iterdir()} == {f"{len(binary)}.so", "new.so"}


def test_a_run_starts_in_spite_of_files_in_the_compilers_cache_that_are_cut_off(train_script, tmp_path):
    cache = tmp_path / "cache"
    settings = {"compile": "true", "max_steps": 3, "eval_every": 0, "env": {"TORCHINDUCTOR_CACHE_DIR": str(cache)}}
    train_script(tmp_path / "before", **settings)
    binaries = list(cache.rglob("*.so"))
    assert len(binaries) > 1
    for number, file in enumerate(binaries):  # a kill leaves them empty, or without their end
        os.truncate(file, int(0.6 * file.stat().st_size) if number % 2 else 0)
        os.utime(file, (time.time() - 60,) * 2)
    train_script(tmp_path / "after", **settings)
    before, after = train_rows(tmp_path / "before"), train_rows(tmp_path / "after")
    assert {step: row["loss"] for step, row in after.items()} == {step: row["loss"] for step, row in before.items()}
