"""One thread a test process: the models are tiny, and the suite runs in parallel (``-n``)."""

import torch

torch.set_num_threads(1)
