"""For all tests."""

import torch

# As the Lab does: one thread for each operation. On a busy machine it is also far faster.
torch.set_num_threads(1)
