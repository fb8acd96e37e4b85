"""Files written and read tensor by tensor, against the safetensors library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pytest_qlab.errors import ModelError
from pytest_qlab.models.tensorfile import join_files, read_header, write_tensors


def tensors(prefix: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(3, 5, generator=generator)
    return {
        f"{prefix}b": real,
        f"{prefix}a": real.bfloat16()[:1, :3],
        f"{prefix}ü": real.half().t(),
        f"{prefix}codes": torch.arange(7, dtype=torch.uint8),
        f"{prefix}signed": torch.arange(-3, 3, dtype=torch.int8),
        f"{prefix}order": torch.arange(5),
        f"{prefix}narrow": torch.arange(5, dtype=torch.int32),
        f"{prefix}flag": torch.tensor([True, False, True]),
        f"{prefix}float8": real.to(torch.float8_e4m3fn),
        f"{prefix}double": real.double(),
        f"{prefix}scalar": torch.tensor(2.5),
        f"{prefix}empty": torch.empty(0, 4),
    }


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    save_file({k: v.contiguous() for k, v in tensors().items()}, tmp_path / "theirs")
    write_tensors(tmp_path / "ours", tensors())
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_joined_files_are_those_of_safetensors(tmp_path: Path) -> None:
    both = {**tensors("x."), **tensors("a.")}
    save_file({k: v.contiguous() for k, v in both.items()}, tmp_path / "theirs")
    for prefix in ("x.", "a."):
        write_tensors(tmp_path / prefix, tensors(prefix))
    join_files(tmp_path / "ours", [tmp_path / "x.", tmp_path / "a."])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_no_tensors_are_a_file_too(tmp_path: Path) -> None:
    write_tensors(tmp_path / "none", {})
    assert load_file(tmp_path / "none") == {}
    assert read_header(tmp_path / "none") == {}


def test_reads_what_safetensors_reads(tmp_path: Path) -> None:
    save_file({k: v.contiguous() for k, v in tensors().items()}, tmp_path / "file", {"a": "note"})
    expected = load_file(tmp_path / "file")
    found = read_header(tmp_path / "file")
    assert found.keys() == expected.keys()
    for name, stored in found.items():
        value = stored.read()
        assert value.dtype == expected[name].dtype
        assert value.shape == expected[name].shape
        assert value.contiguous().view(-1).view(torch.uint8).tolist() == (
            expected[name].contiguous().view(-1).view(torch.uint8).tolist()
        )
        assert torch.equal(stored.read(torch.float32), expected[name].float())
        # Products of memory that starts elsewhere may add in another order.
        assert value.data_ptr() % 64 == 0


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_cut_file_is_an_error_that_names_it(tmp_path: Path, keep: int) -> None:
    write_tensors(tmp_path / "whole", tensors())
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"cut is damaged or cannot be read"):
        read_header(tmp_path / "cut")


def test_an_unknown_type_is_an_error(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "odd").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(ModelError, match="Q9"):
        read_header(tmp_path / "odd")
