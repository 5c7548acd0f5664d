"""Images decoded, resized and put into batches, by worker processes where asked for."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class _PixelBatches(Dataset):
    """Batch i of the model's input; an image that cannot be read gives the error itself, which crosses processes."""

    def __init__(self, processor: Any, images: Sequence[Any], size: int):
        self.processor, self.images, self.size = processor, images, size

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __getitem__(self, number: int) -> Tensor | ValueError:
        try:
            batch = list(self.images[number * self.size : (number + 1) * self.size])
            return self.processor(images=batch, return_tensors="pt")["pixel_values"]  # (B, 3, H, W)
        except ValueError as error:
            return error


def pixel_batches(
    processor: Any, images: Sequence[Any], size: int, workers: int, pin: bool = False
) -> Iterable[Callable[[], Tensor]]:
    """
    Functions that return the batches of `pixel_values`, in order; they raise what reading the images raised.

    Args:
        images: can be cut into slices, as a list can.
        size: images a batch.
        workers: processes that prepare batches ahead; 0: each is prepared when its function is called.
        pin: in page-locked memory, from where a GPU fetches them faster; with workers only.
    """
    batches = _PixelBatches(processor, images, size)
    if not workers:
        return [partial(_checked, batches, number) for number in range(len(batches))]
    return _from_workers(DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=pin))


def _from_workers(loader: DataLoader) -> Iterator[Callable[[], Tensor]]:
    for batch in loader:
        yield partial(_checked, [batch], 0)


def _checked(batches: Any, number: int) -> Tensor:
    batch = batches[number]
    if isinstance(batch, ValueError):
        raise batch
    return batch
