"""The tiny model and the tokenizer of the tests of eval."""

from tests.eval.conftest import bpe, checkpoint, tiny_model  # noqa: F401 (fixtures)
