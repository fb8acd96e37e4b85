"""What a preprocessing is: a change of a model's blocks that leaves what they compute as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pytest_qlab.methods.configured import Configured, Statistic

if TYPE_CHECKING:
    from pytest_qlab.methods.blocks import BlockContext


class Preprocessing(Configured):
    """A function-preserving change of the model that any method may follow: `smooth+gptq`.

    Options are declared as those of a method are. It sees one decoder block at a time.

    Class variables:
        needs: calibration statistics of the original model.
        changes_basis: whether the inputs of layers are others afterwards, such as rotated ones, so
            that the original model's statistics no longer describe them.
        scales_norms: whether all it does is to move scales between norms and the layers that read
            them, which is undone where a later change of basis fuses norms into these layers.
    """

    needs: ClassVar[frozenset[Statistic]] = frozenset()
    changes_basis: ClassVar[bool] = False
    scales_norms: ClassVar[bool] = False

    def transform_block(self, block: BlockContext) -> None:
        """Change a block before its layers are quantized.

        Raises:
            MethodError: the block cannot be changed so.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to change a block")
