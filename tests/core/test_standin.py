"""The stand-in for a CUDA device: it computes as the CPU does, and refuses what CUDA refuses."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pytest_qlab.testing import tiny_model
from tests.standin import DEVICE, StandIn, StandInDevice, standin_device

pytestmark = pytest.mark.usefixtures("cuda")


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def here(x: Tensor) -> Tensor:
    return x.to("cuda:0")


MIXED: dict[str, Callable[[], object]] = {
    "add": lambda: here(numbers(3)) + numbers(3),
    "the other way round": lambda: numbers(3) + here(numbers(3)),
    "one element is no number": lambda: here(numbers(3)) * numbers(1),
    "a number of the device": lambda: numbers(3) * here(numbers(3)).sum(),
    "matmul": lambda: here(numbers(3, 3)) @ numbers(3, 3),
    "linear": lambda: nn.functional.linear(here(numbers(2, 3)), numbers(4, 3)),
    "embedding": lambda: nn.functional.embedding(torch.tensor([1]), here(numbers(4, 3))),
    "cat": lambda: torch.cat([here(numbers(3)), numbers(3)]),
    "where": lambda: torch.where(here(numbers(3)) > 0, here(numbers(3)), numbers(3)),
    "equal": lambda: torch.equal(here(numbers(3)), numbers(3)),
    "index_select": lambda: here(numbers(3)).index_select(0, torch.tensor([0])),
    "gather": lambda: here(numbers(3)).gather(0, torch.tensor([0])),
    "an index on the device": lambda: numbers(3)[here(torch.tensor([0]))],
    "put": lambda: here(numbers(3)).index_put_((torch.tensor([0, 1]),), numbers(2)),
    "in place": lambda: here(numbers(3)).add_(numbers(3)),
    "into the CPU": lambda: numbers(3).add_(here(numbers(3))),
    "out": lambda: torch.add(here(numbers(3)), here(numbers(3)), out=numbers(3)),
    "clamp": lambda: here(numbers(3)).clamp(min=torch.tensor(0.0)),
}
# What CUDA takes beside its own tensors; each is given what brings a tensor to a device.
TAKEN: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
    "a number": lambda on: on(numbers(3)) + torch.tensor(2.0),
    "a number in where": lambda on: torch.where(
        on(numbers(3)) > 0, torch.tensor(1), on(numbers(3))
    ),
    "a number put": lambda on: on(numbers(3)).index_put((torch.tensor([1]),), torch.tensor(5.0)),
    "a CPU index": lambda on: on(numbers(3))[torch.tensor([2, 0])],
    "a copy": lambda on: on(numbers(3)).copy_(numbers(3)),
}


@pytest.mark.parametrize("mix", MIXED.values(), ids=list(MIXED))
def test_devices_do_not_mix(mix: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mix()


@pytest.mark.parametrize("take", TAKEN.values(), ids=list(TAKEN))
def test_numbers_and_indices_of_the_cpu_are_taken(
    take: Callable[[Callable[[Tensor], Tensor]], Tensor],
) -> None:
    found = take(here)
    assert found.is_cuda
    assert torch.equal(found.cpu(), take(lambda x: x))


def test_it_says_where_it_is() -> None:
    for x in (
        torch.zeros(3, device="cuda:0"),
        torch.arange(3, device=DEVICE),
        torch.tensor([1, 2], device="cuda"),
        torch.empty_like(here(numbers(2))),
        here(numbers(2)).new_zeros(4),
        torch.full((2,), 7.0, device=here(numbers(1)).device),
        numbers(2).new_ones(3, device="cuda:0"),
        numbers(2).to(here(numbers(1))),
        numbers(2).cuda(),
        torch.as_tensor(numbers(2), device="cuda:0"),
    ):
        assert isinstance(x, StandIn)
        assert (x.device, x.is_cuda, x.is_cpu) == (torch.device("cuda:0"), True, False)
        for back in (x.cpu(), x.to("cpu"), x.to(numbers(1).to(x.dtype))):
            assert type(back) is Tensor
            assert back.device.type == "cpu"
    with torch.device("cuda:0"):
        assert torch.zeros(3).is_cuda


def test_a_generator_is_of_one_device() -> None:
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, generator=torch.Generator(), device="cuda:0")


def test_numpy_takes_it_from_the_cpu_alone() -> None:
    with pytest.raises(TypeError, match=r"Use Tensor.cpu\(\)"):
        here(numbers(3)).numpy()
    assert here(numbers(3)).cpu().numpy().tolist() == numbers(3).tolist()


def test_views_and_what_is_written_through_them_have_one_storage() -> None:
    mine, other = here(numbers(4, 6)), numbers(4, 6)
    for x in (mine, other):
        x[0] = 5
        x[:, 1::2].mul_(2)
        x.view(-1)[7:9].fill_(-1)
        x.t()[2].copy_(numbers(4))
        first, *_ = x.unbind(0)
        first += 1
        x.index_copy_(1, torch.tensor([5], device=x.device), x[:, :1])
        torch.add(x[1], x[2], out=x[3])
        x.view(torch.int32)[2, 2] ^= 1
        x[x > 2] = 0
        x.detach()[1, 1] = 9
        x.data[1, 2] = 8
    assert torch.equal(mine.cpu(), other)
    assert mine[1:].untyped_storage().data_ptr() == mine.untyped_storage().data_ptr()
    assert mine[0, 3:].data_ptr() - mine.data_ptr() == 4 * 3
    copied = mine.clone()
    copied[:] = 0
    assert torch.equal(mine.cpu(), other)


def test_numbers_come_out() -> None:
    x = here(numbers(3))
    assert float(x[0]) == x[0].item() == x.tolist()[0] == numbers(3)[0].item()
    assert bool((x == x).all())
    assert int(x.argmax()) == int(numbers(3).argmax())


def test_a_model_computes_what_it_does_on_the_cpu() -> None:
    """Tied parameters stay one, copies are copies, gradients are the CPU's to the bit."""
    ids = torch.tensor([[0, 5, 7, 9]])
    model = tiny_model(tie_word_embeddings=True)
    moved: Any = copy.deepcopy(model)
    moved.to("cuda:0")
    assert all(each.is_cuda for each in (*moved.parameters(), *moved.buffers()))
    assert all(isinstance(each, nn.Parameter) for each in moved.parameters())
    embedding = moved.get_input_embeddings()
    assert moved.get_output_embeddings().weight is embedding.weight
    again = copy.deepcopy(moved)
    with torch.no_grad():
        embedding.weight.zero_()
    expected = model(input_ids=ids).logits
    with torch.inference_mode():
        found = again(input_ids=here(ids)).logits
        assert torch.equal(found.cpu(), expected)
    for each in (model, again):
        each.requires_grad_(True)
        given = ids.to(next(each.parameters()).device)
        each(input_ids=given, labels=given).loss.backward()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad.is_cuda
        assert torch.equal(other.grad.cpu(), one.grad)


def test_other_threads_have_the_device_too() -> None:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(torch.ones(2, device="cuda:0")))
    thread.start()
    thread.join()
    assert found[0].is_cuda


def test_files_take_what_is_on_the_device(tmp_path: Path) -> None:
    """safetensors copies to the CPU what is not there, and still finds what shares memory."""
    x = here(numbers(4, 4))
    save_file({"x": x}, tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], numbers(4, 4))
    with pytest.raises(RuntimeError, match="share memory"):
        save_file({"x": x, "y": x[:2]}, tmp_path / "y.safetensors")


def test_memory_is_what_is_alive(cuda: StandInDevice) -> None:
    before = torch.cuda.memory_allocated("cuda:0")
    x = torch.zeros(256, device="cuda:0")
    view = x[:10]
    assert torch.cuda.memory_allocated("cuda:0") - before == 1024
    del x
    assert torch.cuda.memory_allocated("cuda:0") - before == 1024
    del view
    assert torch.cuda.memory_allocated("cuda:0") == before
    torch.cuda.reset_peak_memory_stats("cuda:0")
    torch.cuda.synchronize("cuda:0")
    for _ in range(3):
        torch.zeros(256, device="cuda:0")
    assert torch.cuda.max_memory_allocated("cuda:0") - before == 1024
    assert cuda.synchronized == 1


def test_what_cuda_has_no_kernel_for_is_refused() -> None:
    whole = here(torch.ones(32, 8, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="not implemented"):
        whole @ whole.t()
    codes = here(torch.ones(32, 8, dtype=torch.int8))
    assert torch._int_mm(codes, codes[:8].t()).is_cuda
    with pytest.raises(RuntimeError, match="greater than 16"):
        torch._int_mm(codes[:16], codes[:8].t())
    with pytest.raises(NotImplementedError, match="'CUDA' backend"):
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)


def test_int4_products_are_of_the_documented_numbers() -> None:
    """Of two codes in a byte the high one first; (code - 8) * scale + shift by group and row."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (16, 256), generator=generator)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    parameters = (2.0 ** torch.randint(-3, 3, (4, 16, 2), generator=generator)).bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack(here(pairs), 8)
    assert packed.shape == (2, 2, 32, 4)
    found = torch.ops.aten._weight_int4pack_mm(
        here(torch.eye(256).bfloat16()), packed, 64, here(parameters)
    )
    for row in range(16):
        for column in range(0, 256, 17):
            scale, shift = parameters[column // 64, row].tolist()
            assert float(found[column, row]) == (int(codes[row, column]) - 8) * scale + shift


def test_what_was_put_in_place_of_torchs_functions_is_taken_back() -> None:
    before = torch.cuda.is_available, nn.Module.to, threading.Thread.run
    with standin_device():
        assert torch.cuda.is_available is not before[0]
    assert (torch.cuda.is_available, nn.Module.to, threading.Thread.run) == before
