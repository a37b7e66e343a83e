"""What a rank has imported before it begins. The fork server of tests.support.pool imports it once for all ranks."""

import gc
import os
import warnings

os.environ.update(
    DS_ACCELERATOR="cpu",  # DeepSpeed reads it at import
    OMP_NUM_THREADS="1",
)
warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's use of names that torch has renamed

import deepspeed  # noqa: F401, E402

from tests.support import trainers, training  # noqa: F401, E402

gc.freeze()  # else every collection in a rank, one after each function, would go through all that was imported
