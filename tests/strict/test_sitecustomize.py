"""A deprecation is an error where our own code makes the call, and only there."""

import importlib
import subprocess
import sys

import pytest

LIBRARY = """
import warnings

def deprecated(kind=FutureWarning):
    warnings.warn("use the new one", kind, stacklevel=1)

def wrapper(*arguments):
    return deprecated(*arguments)

def uses_it_deep_inside(depth=5):
    return uses_it_deep_inside(depth - 1) if depth else deprecated()
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    (tmp_path / "some_library.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("some_library")
    del sys.modules["some_library"]


@pytest.mark.parametrize("kind", [FutureWarning, DeprecationWarning, PendingDeprecationWarning])
def test_our_own_call_is_an_error_although_the_warning_names_the_library(library, kind):
    for call in (library.deprecated, library.wrapper):
        with pytest.raises(kind, match=r"test_sitecustomize\.py:\d+ uses what is deprecated: use the new one"):
            call(kind)


def test_a_call_that_the_library_makes_itself_passes(library):
    with pytest.warns(FutureWarning, match="^use the new one$"):
        library.uses_it_deep_inside()


def test_other_warnings_pass(library):
    with pytest.warns(UserWarning, match="^use the new one$"):
        library.deprecated(UserWarning)


def test_every_process_that_a_test_starts_is_as_strict():
    code = "import warnings; print(warnings.warn.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.stdout == b"strict_warn\n"
