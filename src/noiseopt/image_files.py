"""Image files of users: the names of those in a folder, and their pixels."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}  # of a folder


def image_files(path: Path) -> list[Path]:
    """Return the path itself, or the image files of a folder by name. Raises `ValueError` for a folder without any."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if is_picture(file))
    if not found:
        raise ValueError(
            f"Expected image files in {path}, but got none of {', '.join(sorted(PICTURES))}. Choose another folder."
        )
    return found


def is_picture(path: Path) -> bool:
    """Return whether a path is an image file by its name, and not hidden, as one that is still being written is."""
    return path.suffix.lower() in PICTURES and not path.name.startswith(".") and path.is_file()


def read_image(path: Path) -> "torch.Tensor":
    """Read an image as `(1, 3, H, W)` in [0, 1], upright and on white. Raises `ValueError` if that is impossible."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            mode = picture.mode
            picture = ImageOps.exif_transpose(picture)
            if picture.has_transparency_data:
                rgba = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            pixels = np.array(picture.convert("RGB"))
    except (FileNotFoundError, PermissionError) as error:
        raise ValueError(f"Expected an image file, but {path} cannot be opened: {error.strerror}.") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"Expected an image that Pillow can read, but {path} is not one or is damaged: {error}"
        ) from None
    if mode[0] in "IF":  # 16 or 32 bits, which Pillow would clip at 255
        raise ValueError(f"Expected an image with 8 bits per channel, but {path} has mode {mode}. Convert it first.")
    return torch.from_numpy(pixels).movedim(2, 0)[None].float() / 255
