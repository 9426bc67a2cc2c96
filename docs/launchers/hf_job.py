# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.11",
#     "transformers>=5.17",
#     "accelerate>=1.15",
#     "datasets>=4.0",
#     "tokenizers>=0.23.1",
#     "evaluate>=0.4.6",
#     "safetensors>=0.8",
#     "huggingface_hub>=1.21",
#     "fsspec>=2025.3",
#     "filelock>=3.12",
#     "numpy>=2.0",
#     "psutil>=5.9",
#     "pyyaml>=6.0",
#     "tqdm>=4.66.3",
#     "matplotlib>=3.9",
# ]
# ///
"""One run on HF Jobs, on all GPUs of its machine. Not run yet.

    hf jobs uv run --flavor a100x8 --timeout 4h --attempts 3 --secrets HF_TOKEN -v .:/gpt2repro \
        docs/launchers/hf_job.py --recipe /gpt2repro/recipes/gpt2-124m-10b.yaml --micro_batch_size 32 \
        --dataset_dir hf://datasets/ME/fineweb-edu-10b --hub_repo_id ME/gpt2-124m --hub_every 1000 --hub_state true

Start it in this checkout, which the job sees read-only at /gpt2repro. A job's disk ends with it: `hub_state` puts on
the Hub what the next attempt resumes from. The requirements above are those of pyproject.toml.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

CODE = Path(os.environ.get("CODE", "/gpt2repro"))

gpus = torch.cuda.device_count()
config = "ddp_8gpu.yaml" if gpus > 1 else "single_gpu.yaml" if gpus else "cpu.yaml"
launch = ["-m", "accelerate.commands.launch", "--config_file", str(CODE / "accelerate_configs" / config)]
launch += ["--num_processes", str(max(1, gpus)), str(CODE / "train_accelerate.py")]
sys.exit(subprocess.run([sys.executable, *launch, *sys.argv[1:]]).returncode)
