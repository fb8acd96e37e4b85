"""For all tests."""

from collections.abc import Iterator

import pytest
import torch

from tests.standin import StandInDevice, standin_device

# As the Lab does: one thread for each operation. On a busy machine it is also far faster.
torch.set_num_threads(1)


@pytest.fixture
def cuda() -> Iterator[StandInDevice]:
    """A device `cuda:0` that computes on the CPU, see `tests.standin`."""
    with standin_device() as device:
        yield device
