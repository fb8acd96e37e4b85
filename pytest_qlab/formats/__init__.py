"""Packed weights and activation quantizers: the bits that are stored, and what they stand for."""

from pytest_qlab.formats.activations import (
    ActivationQuantizer,
    PerBlockMxfp4,
    PerBlockNvfp4,
    PerTensorAffine,
    PerTokenFloat8,
    PerTokenSymmetric,
    load_activation,
)
from pytest_qlab.formats.affine import AffineGroups
from pytest_qlab.formats.base import PackedWeight, load_packed, register_format
from pytest_qlab.formats.bilevel import BilevelAffine
from pytest_qlab.formats.blockwise import BlockwiseTable
from pytest_qlab.formats.float4 import MicroscaledFloat4
from pytest_qlab.formats.float8 import ScaledFloat8
from pytest_qlab.formats.ggml import GgmlBlocks
from pytest_qlab.formats.incoherent import Incoherent
from pytest_qlab.formats.lookup import RowLookup
from pytest_qlab.formats.outliers import WithOutliers
from pytest_qlab.formats.plain import PlainWeight

__all__ = [
    "ActivationQuantizer",
    "AffineGroups",
    "BilevelAffine",
    "BlockwiseTable",
    "GgmlBlocks",
    "Incoherent",
    "MicroscaledFloat4",
    "PackedWeight",
    "PerBlockMxfp4",
    "PerBlockNvfp4",
    "PerTensorAffine",
    "PerTokenFloat8",
    "PerTokenSymmetric",
    "PlainWeight",
    "RowLookup",
    "ScaledFloat8",
    "WithOutliers",
    "load_activation",
    "load_packed",
    "register_format",
]
