"""Picture files of people: opened safely and upright, and photographs brought to one size."""

import io
import re
import stat
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from thaw.run.errors import UserError

PICTURE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")  # the only decoders that an untrusted file may reach
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp")
LARGEST = 100_000_000  # bytes of a file
MAX_PIXELS = 50_000_000  # of a picture; a small file may claim more
MAX_SCANS = 100  # of a JPEG; decoding takes as long for each. Cameras and programs write about ten
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # but for those within the data of a scan
START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
LEAST_SIDE = 8  # pixels; a smaller picture is doubtful

warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow's warnings of damage lack the file's name; ours have it


def picture_content(path: Path) -> bytes:
    """The bytes of a picture file, which may be of any origin.

    Raises:
        UserError: it is a pipe or a device, which may never end, or is too large.
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a file of bytes on a disk; give PNG or JPEG files.")
    if status.st_size > LARGEST:
        raise UserError(f"{path} has {status.st_size:,} bytes; at most {LARGEST:,} are read: reduce it.")
    return path.read_bytes()


def open_picture(content: bytes, name: str, side: int) -> tuple[Image.Image, list[str]]:
    """Decode the first frame of a picture, upright, and list doubts about it; checks the stated size before decoding.

    A large JPEG is decoded at an eighth, a quarter or half of its size where it stays at least `side` pixels high and
    wide.

    Raises:
        UserError: not a picture, or too large or damaged.
    """
    try:
        picture: Image.Image = Image.open(io.BytesIO(content), formats=PICTURE_FORMATS)
        several = picture.format != "MPO" and getattr(picture, "is_animated", False)  # a phone's MPO is one picture
        picture.draft("RGB", (side, side))  # reduces a JPEG, of which a phone makes more than MAX_PIXELS
        if picture.width * picture.height > MAX_PIXELS:
            raise Image.DecompressionBombError(picture.width * picture.height)
        if picture.format in ("JPEG", "MPO") and has_many_scans(content):
            raise ValueError(f"a JPEG of more than {MAX_SCANS} scans")
        picture.load()
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not a {', '.join(PICTURE_FORMATS)} file; convert it to PNG or JPEG.") from error
    except Image.DecompressionBombError as error:  # ours, or Pillow's, which checks first
        size = int(re.findall(r"\d+", str(error))[0])
        raise UserError(f"{name} claims {size:,} pixels, more than {MAX_PIXELS:,}; reduce it.") from error
    except Exception as error:  # decoders raise nearly anything for damaged data
        raise UserError(f"{name} is a damaged picture ({error or type(error).__name__}).") from error
    doubts = ["only the first of its frames is read"] if several else []
    for key in ("xmp", "XML:com.adobe.xmp"):  # ignored as in browsers: programs that turn a picture leave it unchanged
        picture.info.pop(key, None)
    with suppress(Exception):  # damaged EXIF data raise nearly anything, though the picture itself is whole
        if all(value == value for value in picture.getexif().values()):  # a fraction with the denominator 0 is NaN
            return ImageOps.exif_transpose(picture), doubts
    return picture, [*doubts, "its EXIF data are damaged, so it is not turned"]


def has_many_scans(content: bytes) -> bool:
    """Whether a JPEG goes over its pixels more than `MAX_SCANS` times: a few bytes each can take hours."""
    place, scans = 2, 0
    while scans <= MAX_SCANS and (marker := JPEG_MARKER.search(content, place)) and marker[0] != END_OF_IMAGE:
        scans += marker[0] == START_OF_SCAN
        place = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")
    return scans > MAX_SCANS


def fit_photo(picture: Image.Image, channels: int, size: int) -> np.ndarray:
    """The central square of a picture, antialiased (bicubic), uint8 (channels, size, size): RGB, or grey for 1.

    The square is cut first, so that a picture of 30,000 x 10 pixels is never enlarged as a whole. Transparent pixels
    are white.
    """
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = eight_bits(picture.crop((left, top, left + side, top + side)))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB" if channels == 3 else "L")
    picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture).reshape(size, size, channels).transpose(2, 0, 1)


def eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or of fractions, by its whole range, as 8 bits; another picture unchanged.

    The range ends at 65,535; fractions may also end at 1 or 255, and what exceeds all of these at its own maximum.
    """
    if picture.mode[0] not in "IF":
        return picture
    values = np.array(picture, dtype=np.float64)  # 0.4 GB of MAX_PIXELS, changed in its place
    np.nan_to_num(values, copy=False, posinf=0, neginf=0).clip(min=0, out=values)
    most = values.max()
    ends = (1, 255, 65_535) if picture.mode == "F" else (65_535,)
    values *= 255 / next((end for end in ends if most <= end), most)
    return Image.fromarray(values.round(out=values).astype(np.uint8))


def shape_doubts(picture: Image.Image) -> list[str]:
    """What should be said of a picture of which `fit_photo` shows little."""
    short, long = sorted(picture.size)
    doubts = [f"its short side has less than {LEAST_SIDE} pixels"] * (short < LEAST_SIDE)
    return doubts + ["its middle square is less than a tenth of it"] * (long > 10 * short)
