"""`quarot`: the residual stream rotated by a random Hadamard matrix, so that outliers spread."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from pytest_qlab.methods.preprocessing import Preprocessing

if TYPE_CHECKING:
    from pytest_qlab.methods.blocks import BlockContext


class QuaRot(Preprocessing):
    """QuaRot's rotations that weights alone can take up: of section 4, stage 1a and part of 1c.

    Hidden states between the first block's entry and the last block's exit are rotated; layers that
    read or write them are rotated to match, with the norms' weights fused into the readers. What is
    outside of the blocks stays as it is.

    Options:
        seed: of the random signs.
        heads: rotate the values of each attention head as well, where the architecture lets one.
    """

    name: ClassVar[str] = "quarot"
    summary: ClassVar[str] = "rotates the residual stream by a random Hadamard matrix"
    reference: ClassVar[str] = "arXiv 2404.00456; spcl/QuaRot"
    changes_basis: ClassVar[bool] = True

    seed: int = Field(default=0, ge=0, lt=2**32)
    heads: bool = True

    def transform_block(self, block: BlockContext) -> None:
        """Rotate the layers of a block, and see that it computes what it did."""
        from pytest_qlab.methods.rotated import rotate_block

        rotate_block(block, seed=self.seed, heads=self.heads)
