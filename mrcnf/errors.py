"""What went wrong: mistakes that are the user's to mend, training that cannot go on, memory."""

import torch

_OUT_OF_MEMORY = (
    "can't allocate memory",  # the host's allocator
    "CUDA error: out of memory",  # the driver, outside of PyTorch's allocator
    "_ALLOC_FAILED",  # cuBLAS, cuDNN and cuFFT, for their workspaces
)


class UserError(Exception):
    """A mistake in what the user supplied: one line that says what, where and what to do.

    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to try."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host.

    PyTorch has no one type for it: its CUDA allocator raises `torch.OutOfMemoryError`, the driver
    an `AcceleratorError` and the host's allocator a bare `RuntimeError`, with all that is wrong
    in the text.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
