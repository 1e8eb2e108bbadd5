"""GGUF files: key-value pairs and dequantised tensors, read with the ``gguf`` package."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae.errors import InputError


class GGUFFile:
    """One opened GGUF file, memory-mapped.

    Raises:
      InputError: it does not exist or is not a whole GGUF file.
    """

    def __init__(self, path: str | Path):
        from gguf import GGUFReader

        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{path} does not exist; give a .gguf file or a folder with model.safetensors")
        try:
            self._reader = GGUFReader(str(path))
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise InputError(f"{path} is not a whole GGUF file ({error}); fetch it again") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The key-value pairs as Python values."""
        return {key: field.contents() for key, field in self._reader.fields.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, outermost axis first.

        Raises:
          InputError: there is none of that name, or it is quantised in a way that cannot be undone.
        """
        from gguf import dequantize

        if name not in self._tensors:
            raise InputError(f"{self.path} has no tensor {name}; give a whole Llama")
        tensor = self._tensors[name]
        try:
            return dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise InputError(
                f"{self.path}: tensor {name} is {tensor.tensor_type.name}, which cannot be dequantised; "
                "give a file with F32, F16, BF16, Q4_1, Q8_0 or k-quant tensors"
            ) from error
