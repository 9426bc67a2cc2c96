"""Tokenise FineWeb-Edu's larger samples, or JSONL files, with datatrove; training reads what comes out.

    pip install -e ".[datatrove]"
    python docs/launchers/tokenise_datatrove.py hf://datasets/HuggingFaceFW/fineweb-edu/sample/100BT data/edu-100bt \
        --tasks 100 --workers 16
    accelerate launch … train_accelerate.py --recipe … --dataset_dir data/edu-100bt --tokenizer openai-community/gpt2

The ids are those of `gpt2repro.data.prepare`: <|endoftext|> precedes every document and is never read out of a text,
and about one document in a hundred, by its own hash, is validation. A task writes one file for each split. Run the
command again after a failure: finished tasks are not repeated. SLURM and Ray: change the line with the executor.
"""

import argparse

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.tokens import DocumentTokenizer
from tokenizers.processors import TemplateProcessing

from gpt2repro.data.encoding import EOT, split_of
from gpt2repro.data.sources import Document

VAL_FRACTION = 0.01


class SplitTokenizer(DocumentTokenizer):
    """Writes each document to its split, in the order in which they come: training shuffles windows itself."""

    @property
    def tokenizer(self):
        tokenizer = super().tokenizer
        tokenizer.encode_special_tokens = True  # a text that spells <|endoftext|> gets the letters
        special = [(EOT, tokenizer.token_to_id(EOT))]
        tokenizer.post_processor = TemplateProcessing(single=f"{EOT} $A", special_tokens=special)
        return tokenizer

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        validation = []  # 1 % of a task's documents

        def training():
            for document in data:
                split = split_of(Document(document.text.encode(errors="surrogatepass"), None, None), VAL_FRACTION)
                if split == "train":
                    yield document
                elif split == "val":
                    validation.append(document)

        for self.save_filename, documents in (("train", training()), ("val", validation)):
            super().run(documents, rank, world_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("source", help="folder or fsspec address of .parquet, or of .jsonl with --jsonl")
    parser.add_argument("out", help="folder of the shards")
    parser.add_argument("--tokenizer", default="openai-community/gpt2", help="a tokenizer.json, or a Hub id")
    parser.add_argument("--jsonl", action="store_true")
    parser.add_argument("--tasks", type=int, default=1, help="shares of the source's files: at most as many as files")
    parser.add_argument("--workers", type=int, default=1, help="tasks at a time on this machine")
    given = parser.parse_args()
    reader = JsonlReader(given.source) if given.jsonl else ParquetReader(given.source)
    steps = [reader, SplitTokenizer(given.out, given.tokenizer, shuffle_documents=False)]
    settings = {"pipeline": steps, "tasks": given.tasks, "workers": given.workers, "logging_dir": f"{given.out}/logs"}
    # SlurmPipelineExecutor(**settings, time="08:00:00", partition="cpu") or RayPipelineExecutor(**settings): not run
    LocalPipelineExecutor(**settings).run()


if __name__ == "__main__":
    main()
