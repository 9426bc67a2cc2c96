"""The tiny models and the tokenizer of the tests of eval."""

from tests.eval.conftest import bpe, checkpoint, stock_model, tiny_model  # noqa: F401 (fixtures)
