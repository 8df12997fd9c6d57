"""Images with prompts in the place of labels."""

from collections.abc import Sequence

from torch import Tensor

from elit.data.images import ImageData
from elit.models.conditioning import Condition


class PromptedImages:
    """A data set whose labels number prompts: gives the prompts' rows of `table` in their place."""

    def __init__(self, data: ImageData, table: Condition):
        self.data, self.table = data, table

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Condition]:
        """images (B, C, H, W), and y of their prompts."""
        images, labels = self.data.__getitems__(indices)
        return images, self.table[labels]
