"""train_accelerate.py with FSDP2 on CPUs over gloo: PyTorch shards there, but Accelerate offers it for GPUs only.

All that this changes is the name that Accelerate's state gives to several processes on a CPU; what is prepared,
gathered and clipped then is what would be on GPUs.
"""

import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType

start = PartialState.__init__


def start_as_if_on_gpus(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = start_as_if_on_gpus
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import train_accelerate

    sys.exit(train_accelerate.main())
