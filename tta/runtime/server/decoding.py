"""From the body of a request to what the model takes; nothing in it is unpickled.

A body is told by its first bytes, not by what its headers claim: JPEG and PNG pictures by Pillow,
and tensors as ``.npy`` or safetensors. Sizes are read off headers and refused before anything of
that size is made.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from torch import Tensor

from tta.core.checks import shown, told
from tta.core.pictures import as_rgb
from tta.runtime.extras import needed
from tta.runtime.server.limits import Limits, RefusedError

__all__ = ["Decoder"]

FORMATS = ("JPEG", "PNG")
NPY = b"\x93NUMPY"
LONGEST_HEADER = 4096  # bytes of the text in a .npy header, which is parsed as Python
THUMBNAIL = 96  # pixels of the longer side
WAYS = "send a JPEG or PNG picture, or one tensor as .npy or safetensors."


class Decoder:
    """Makes the model's input from bodies of requests.

    Args:
        transform: From a picture of Pillow in RGB to what the model takes, without a batch axis;
            None takes tensors alone.
        shape: Of what the model takes, without a batch axis; None for any.
        dtype: What the model takes.
        limits: Of sizes.
    """

    def __init__(
        self,
        transform: Callable[[Any], Tensor] | None,
        shape: tuple[int, ...] | None,
        dtype: torch.dtype,
        limits: Limits,
    ) -> None:
        self.transform, self.shape, self.dtype, self.limits = transform, shape, dtype, limits
        self._pillow = needed("PIL.Image", "serve")

    def __call__(self, body: bytes, thumbnail: bool) -> tuple[Tensor, bytes | None]:
        """The image of a body, and a small JPEG of it if that is asked for.

        Args:
            body: The whole of it.
            thumbnail: Whether to make the JPEG.

        Returns:
            (1, ...) as the model takes it; the bytes of a JPEG.

        Raises:
            RefusedError: 422 for what is no image that the model takes, 413 for too large a one.
        """
        if not body:
            raise _undecodable("an empty body")
        values = self._tensor(body)
        if values is None:
            picture: Any = self._picture(body)
        elif values.dtype == torch.uint8:
            picture = self._as_picture(values)
        else:
            return self._as_model_takes(values), self._small_of(values) if thumbnail else None
        if self.transform is None:
            raise RefusedError(
                422,
                "`image` must be a tensor of floating-point numbers, as this server has no "
                "transform, got a picture: send what the model takes as .npy or safetensors.",
            )
        small = _jpeg(picture) if thumbnail else None
        try:
            image = self.transform(picture)
        except MemoryError:
            raise
        except Exception as error:
            raise _undecodable(f"a picture of {picture.size} that the transform refuses "
                               f"({told(error)})") from error  # fmt: skip
        return self._checked(image), small

    def _picture(self, body: bytes) -> Any:
        """A picture in RGB, decoded in full."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's own limit of pixels is a warning
                picture = self._pillow.open(io.BytesIO(body), formats=FORMATS)
                self._check_pixels(math.prod(picture.size))
                return as_rgb(picture, "image")
        except (RefusedError, MemoryError):
            raise
        except self._pillow.UnidentifiedImageError:
            raise _undecodable(f"{len(body)} bytes that begin with {shown(body[:8])}") from None
        except self._pillow.DecompressionBombError as error:
            raise RefusedError(413, f"`image` must be smaller, got {told(error)}.") from None
        except Exception as error:  # decoders raise anything
            reason = told(error.__cause__ or error)  # what `as_rgb` says of it is said here
            raise _undecodable(f"a damaged picture ({reason})") from error

    def _tensor(self, body: bytes) -> Tensor | None:
        """The tensor in a body; None where it is no file of one."""
        if body.startswith(NPY):
            return self._from_npy(body)
        if len(body) > 8 and body[8:9] == b"{" and body[:8].endswith(b"\0\0\0\0"):
            try:
                found = from_bytes(body)
            except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
                raise _undecodable(f"damaged safetensors ({told(error)})") from None
            if len(found) != 1:
                raise _undecodable(f"safetensors with {len(found)} tensors in place of one")
            (values,) = found.values()
            return self._numbers(values)
        return None

    def _from_npy(self, body: bytes) -> Tensor:
        """The array of a .npy file; the size that its header claims must be that of the body."""
        file = io.BytesIO(body)
        reader: Any = np.lib.format
        try:
            version = reader.read_magic(file)
            read = reader.read_array_header_1_0 if version == (1, 0) else None
            read = reader.read_array_header_2_0 if version == (2, 0) else read
            if read is None:
                raise ValueError(f"version {version}")
            shape, fortran, dtype = read(file, max_header_size=LONGEST_HEADER)
            if dtype.hasobject or dtype.kind not in "fu":
                raise ValueError(f"an array of {dtype}")
            left = len(body) - file.tell()
            if min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize != left:
                raise ValueError(f"shape {shape} of {dtype} in {left} bytes")
            array = np.frombuffer(body, dtype, offset=file.tell())
            array = array.reshape(shape, order="F" if fortran else "C")
            array = array.astype(dtype.newbyteorder("="), order="C")  # a copy, of native order
            return self._numbers(torch.from_numpy(array))
        except (MemoryError, RefusedError):
            raise
        except Exception as error:  # the header is text that anybody may have written
            raise _undecodable(f"a .npy file that is damaged or no image ({told(error)})") from None

    def _numbers(self, values: Tensor) -> Tensor:
        if values.dtype != torch.uint8 and not values.is_floating_point():
            raise _undecodable(f"a tensor of {values.dtype}")
        if values.ndim > 0 and values.shape[0] == 1 and values.ndim == 4:
            values = values[0]
        if not 1 <= values.ndim <= 4 or values.numel() == 0:
            raise _undecodable(f"a tensor of shape {tuple(values.shape)}")
        return values

    def _as_picture(self, values: Tensor) -> Any:
        """Pixels (H, W), (H, W, 3) or (3, H, W) as a picture."""
        if values.ndim == 3 and values.shape[2] not in (1, 3) and values.shape[0] in (1, 3):
            values = values.permute(1, 2, 0)
        if values.ndim == 3 and values.shape[2] == 1:
            values = values[..., 0]
        if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3):
            raise _undecodable(f"uint8 values of shape {tuple(values.shape)}")
        self._check_pixels(values.shape[0] * values.shape[1])
        return self._pillow.fromarray(values.contiguous().numpy()).convert("RGB")

    def _as_model_takes(self, values: Tensor) -> Tensor:
        if values.ndim >= 2:
            self._check_pixels(values.shape[-1] * values.shape[-2])
        return self._checked(values)

    def _checked(self, image: Any) -> Tensor:
        if not isinstance(image, Tensor):
            raise TypeError(
                f"`transform` must give a tensor, got {type(image).__name__}: end it with one, "
                "such as torchvision's ToTensor."
            )
        if self.shape is not None and tuple(image.shape) != self.shape:
            raise _undecodable(
                f"one of shape {tuple(image.shape)} where the model takes {self.shape}"
            )
        if image.is_floating_point():
            image = image.to(self.dtype)
            if not bool(image.isfinite().all()):
                raise _undecodable("values that are not finite")
        return image[None]

    def _check_pixels(self, pixels: int) -> None:
        if pixels > self.limits.pixels:
            raise RefusedError(
                413,
                f"`image` must have at most {self.limits.pixels} pixels, got {pixels}: make it "
                "smaller.",
            )

    def _small_of(self, values: Tensor) -> bytes | None:
        """A small picture of what the model takes, its values stretched from black to white."""
        if values.ndim != 3 or values.shape[0] not in (1, 3):
            return None
        values = values.float()
        low, high = values.min(), values.max()
        pixels = ((values - low) / (high - low).clamp_min(1e-12) * 255).round().clamp(0, 255)
        array = pixels.to(torch.uint8).permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()
        return _jpeg(self._pillow.fromarray(array))


def _jpeg(picture: Any) -> bytes:
    small = picture.copy() if max(picture.size) <= THUMBNAIL else picture.reduce(
        max(1, max(picture.size) // (2 * THUMBNAIL))
    )  # fmt: skip
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=75)
    return file.getvalue()


def _undecodable(got: str) -> RefusedError:
    return RefusedError(422, f"`image` must be one image that the model takes, got {got}: {WAYS}")
