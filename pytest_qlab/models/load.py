"""Loading the base model: any causal language model that transformers can load."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytest_qlab.errors import ModelError, did_you_mean
from pytest_qlab.models.checks import check_causal, check_vocabulary, prepare
from pytest_qlab.models.digest import digest_of, digest_of_directory
from pytest_qlab.models.lazy import LazyModel, skeleton, stored_tensors
from pytest_qlab.models.source import (
    EMBEDDED,
    checkpoint_dtypes,
    read_config,
    resolve,
    weight_files,
)

# transformers takes seconds to import, and a run that finds everything in the store needs none of
# it; so its functions are imported where they are called.
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "EMBEDDED",
    "LoadedModel",
    "context_length",
    "device_kind",
    "digest_of",
    "from_memory",
    "load_model",
    "load_tokenizer",
    "model_digest",
    "open_lazily",
    "size_of",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(eq=False)
class LoadedModel:
    """A model ready to be measured and quantized, in eval mode and without gradients.

    Attributes:
        model: its mixtures of experts have one linear layer for each matrix.
        tokenizer: the model's own.
        name: what the user gave.
        digest: hex SHA-256 of what was loaded (files, or tensors of a model in memory).
        storage_dtypes: for every parameter the dtype it has in the checkpoint, which sizes are
            counted in; the model itself computes in the dtype asked for.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    digest: str
    storage_dtypes: dict[str, torch.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters, tied ones once, in the dtypes of the checkpoint."""
        return sum(
            parameter.numel() * self.storage_dtypes.get(name, parameter.dtype).itemsize
            for name, parameter in self.model.named_parameters()
        )


def load_model(
    source: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal language model and its tokenizer, and check that both can be used.

    Args:
        source: `embedded`, a directory, or a Hub id.
        dtype: what to compute in: float32, bfloat16 or float16.
        device: as torch names it.
        revision: branch, tag or commit of a Hub model.
        trust_remote_code: run the modelling code that comes with the model.

    Raises:
        ModelError: whatever is wrong with the model, with the remedy.
    """
    from transformers import AutoModelForCausalLM

    compute = _dtype(dtype)
    where = _device(device)
    directory = resolve(source, revision)
    config = read_config(directory, source)
    check_causal(config, source, trust_remote_code)
    stored = checkpoint_dtypes(directory, source)
    tokenizer = _load_tokenizer(directory, source, trust_remote_code)
    with _quiet():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=compute,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
            )
            model: PreTrainedModel = loaded[0]
            missing = sorted(loaded[1]["missing_keys"])
        except Exception as error:  # whatever the modelling code makes of a wrong file
            raise ModelError(
                f"The model {source!r} cannot be loaded: {_first_line(error)} Check that its "
                "config.json belongs to its weights, or download it again."
            ) from error
    if missing:
        raise ModelError(
            f"The weights of the model {source!r} lack {len(missing)} of the tensors that its "
            f"config.json calls for, the first being {missing[0]}. Check that both belong "
            "together, or download the model again."
        )
    prepare(model, tokenizer, source)
    _move(model, where)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=source,
        digest=digest_of_directory(directory, source),
        storage_dtypes=_storage_dtypes(model, stored, compute),
    )


def open_lazily(
    source: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LazyModel:
    """Open a model whose weights are read where they are used; arguments as for `load_model`.

    That its weights are finite is checked as they are read. That it is causal is not checked here,
    since that takes a forward pass; `measuring.streamed.prove` does.

    Raises:
        ModelError: whatever is wrong with the model, or with reading it part by part.
    """
    compute = _dtype(dtype)
    where = _device(device)
    directory = resolve(source, revision)
    check_causal(read_config(directory, source), source, trust_remote_code)
    tensors = stored_tensors(directory, source)
    tokenizer = _load_tokenizer(directory, source, trust_remote_code)
    config = _load_config(directory, source, trust_remote_code)
    with _quiet():
        model, tensors = skeleton(config, compute, tensors, trust_remote_code)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(where)
    check_vocabulary(model, tokenizer, source)
    stored = {name: each.dtype for name, each in tensors.items()}
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=source,
        digest=digest_of_directory(directory, source),
        storage_dtypes=_storage_dtypes(model, stored, compute),
    )
    return LazyModel(loaded, where, tensors)


def size_of(source: str, *, dtype: str, revision: str | None = None) -> int | None:
    """Bytes of a model's weights in a dtype; None where they are no safetensors files.

    Raises:
        ModelError: there is no such model, or a file is damaged.
    """
    directory = resolve(source, revision)
    if weight_files(directory, source)[0].suffix != ".safetensors":
        return None
    stored = stored_tensors(directory, source).values()
    return sum(each.nbytes // each.dtype.itemsize for each in stored) * _dtype(dtype).itemsize


def from_memory(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str = "in memory",
    *,
    dtype: str = "float32",
    device: str | None = None,
) -> LoadedModel:
    """Use a model that is in memory already; a copy is taken and the model itself left alone.

    Raises:
        ModelError: the model or its tokenizer cannot be used.
    """
    from transformers import PreTrainedModel

    compute = _dtype(dtype)
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"A model in memory must be a transformers PreTrainedModel with a language model head, "
            f"but a {type(model).__name__} was given. Load it with AutoModelForCausalLM."
        )
    if tokenizer is None:
        raise ModelError(
            "A model in memory was given without a tokenizer, so no text can be scored with it. "
            "Give the tokenizer too: Lab(model, tokenizer=...), or override the fixture "
            "`tokenizer` beside `base_model`."
        )
    stored = {key: value.dtype for key, value in model.named_parameters(remove_duplicate=False)}
    digest = digest_of(model, tokenizer)
    used = copy.deepcopy(model)
    for parameter in used.parameters():  # and no buffers: rotary frequencies stay as exact
        parameter.data = parameter.data.to(compute)
    if device is not None:
        _move(used, _device(device))
    prepare(used, tokenizer, name)
    return LoadedModel(used, tokenizer, name, digest, _storage_dtypes(used, stored, compute))


def load_tokenizer(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without the model.

    Raises:
        ModelError: there is no such model, or it has no usable tokenizer.
    """
    return _load_tokenizer(resolve(source, revision), source, trust_remote_code)


def context_length(
    source: str | PreTrainedModel, *, revision: str | None = None, trust_remote_code: bool = False
) -> int | None:
    """The longest sequence a model takes, from its configuration; None where it has no limit.

    Raises:
        ModelError: there is no such model, or its configuration cannot be read.
    """
    if not isinstance(source, str):
        config = source.config
    else:
        directory = resolve(source, revision)
        check_causal(read_config(directory, source), source, trust_remote_code)
        config = _load_config(directory, source, trust_remote_code)
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(length) if isinstance(length, int) and length > 0 else None


def model_digest(source: str, revision: str | None = None) -> str:
    """Hex SHA-256 of a model's configuration, tokenizer and weight files, without loading it.

    Raises:
        ModelError: there is no such model, or it has no configuration or weights.
    """
    return digest_of_directory(resolve(source, revision), source)


def _move(model: nn.Module, device: torch.device) -> None:
    model.to(device)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ModelError(f"Unknown dtype {name!r}.{did_you_mean(name, DTYPES)}")
    return DTYPES[name]


def device_kind(name: str) -> str:
    """The kind of a device, such as `cuda` for `cuda:0`, whether this machine has it or not.

    Raises:
        ModelError: torch knows no such device.
    """
    try:
        return torch.device(name).type
    except RuntimeError as error:
        raise _no_device(name, error) from error


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise _no_device(name, error) from error
    return device


def _no_device(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"The device {name!r} cannot be used: {_first_line(error)} Give cpu, or a device that "
        "this machine and this build of torch have."
    )


def _load_config(directory: Path, source: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    with _quiet():
        try:
            return AutoConfig.from_pretrained(
                directory, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:  # whatever the configuration's code makes of a wrong file
            raise ModelError(
                f"The config.json of the model {source!r} cannot be used: {_first_line(error)} "
                "Download or save the model again."
            ) from error


def _load_tokenizer(
    directory: Path, source: str, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    present = any((directory / name).is_file() for name in known)
    if not present and not any(directory.glob("*.tiktoken")) and not trust_remote_code:
        raise ModelError(
            f"The model {source!r} has no tokenizer: none of {', '.join(known)} is in its "
            "directory. Save the tokenizer there with tokenizer.save_pretrained."
        )
    with _quiet():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:  # whatever the tokenizers make of a wrong file
            raise ModelError(
                f"The tokenizer of the model {source!r} cannot be loaded: {_first_line(error)} "
                "Save it again with tokenizer.save_pretrained."
            ) from error
    # Texts are longer than the model's context before they are cut: no warning about that.
    warned = getattr(tokenizer, "deprecation_warnings", {})
    warned["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _storage_dtypes(
    model: PreTrainedModel, stored: Mapping[str, torch.dtype], default: torch.dtype
) -> dict[str, torch.dtype]:
    """The checkpoint's dtype of every parameter of the model.

    A parameter whose name is another in the checkpoint (a prefix, experts that were fused) has
    the dtype that most of the checkpoint's tensors have.
    """
    floating = Counter(dtype for dtype in stored.values() if dtype.is_floating_point)
    common = floating.most_common(1)[0][0] if floating else default
    prefix = f"{model.base_model_prefix}."
    dtypes = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        names = (name, name.removeprefix(prefix), prefix + name)
        dtypes[name] = next((stored[n] for n in names if n in stored), common)
    return dtypes


def _first_line(error: BaseException) -> str:
    """The error's first line, as a sentence."""
    text = str(error).strip()
    line = text.splitlines()[0].strip() if text else type(error).__name__
    return line if line.endswith((".", "!", "?")) else f"{line}."


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers without progress bars and notes: errors are all that matters here."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
