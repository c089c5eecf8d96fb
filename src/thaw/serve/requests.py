"""From the body of a request to digits, uint8 (N, 28, 28), in bounded memory and time."""

import asyncio
import base64
import binascii
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Annotated, Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictBool, StrictInt, Tag, ValidationError
from starlette.requests import ClientDisconnect, Request

from thaw.data.digit_image import SIDE, decompress, find_digit, read_digits
from thaw.data.idx import read_idx
from thaw.serve.limits import Limits, RefusedError

FILE_TYPES = ("image/png", "image/jpeg", "application/octet-stream")
QUICK = 50_000  # bytes of JSON that are parsed on the event loop, in less than a millisecond

Pixel = Annotated[StrictInt, Field(ge=0, le=255)]
Row = Annotated[list[Pixel], Field(min_length=SIDE, max_length=SIDE, fail_fast=True)]
Rows = Annotated[
    list[Row],
    Field(min_length=SIDE, max_length=SIDE, fail_fast=True, description="28 rows of 28 pixels, ink bright"),
]
Picture = Annotated[str, Field(description="a PNG or JPEG in base64; `data:image/png;base64,` may stand before it")]
Digit = Annotated[
    Annotated[Picture, Tag("picture")] | Annotated[Rows, Tag("pixels")],
    Discriminator(lambda value: "picture" if isinstance(value, str) else "pixels"),
]


class PredictRequest(BaseModel):
    """What `POST /predict` takes as JSON."""

    model_config = ConfigDict(extra="forbid")
    images: Annotated[list[Digit], Field(min_length=1, fail_fast=True)]  # one error is told, and only one is kept
    explain: Annotated[StrictBool, Field(description="answer with what the model saw and where it looked, too")] = False


class Digits(NamedTuple):
    """The content of a request: uint8 (N, 28, 28), and whether its client wants an explanation."""

    images: np.ndarray
    explain: bool


class RequestReader:
    """Reads bodies, and decodes pictures on two threads, so that at most two large ones are open at once."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held = 0  # bytes of all bodies in memory
        self.decoders = ThreadPoolExecutor(2, thread_name_prefix="decoder")

    async def read(self, request: Request, kind: str, deadline: float) -> Digits:
        """The digits of a request.

        Args:
            kind: its Content-Type.
            deadline: in seconds of the event loop's clock.

        Raises:
            RefusedError: it is not what it must be.
            TimeoutError: it is complete, but takes too long to decode.
        """
        body = bytearray()
        try:
            await self.receive(request, deadline, body)
            async with asyncio.timeout_at(deadline):
                return await self.decode(bytes(body), kind)
        finally:
            self.held -= len(body)

    async def receive(self, request: Request, deadline: float, body: bytearray) -> None:
        self.check_size(int(request.headers.get("content-length", 0)))  # uvicorn has checked that it is a number
        try:
            async with asyncio.timeout_at(deadline):
                async for part in request.stream():
                    body += part
                    self.held += len(part)
                    self.check_size(len(body))
        except TimeoutError:
            raise RefusedError(
                408, f"only {len(body):,} bytes came in {self.limits.request_seconds:g} s; send the request faster."
            ) from None
        except ClientDisconnect:
            raise RefusedError(400, f"the connection ended after {len(body):,} bytes; send the whole body.") from None

    def check_size(self, size: int) -> None:
        if size > self.limits.max_body:
            raise RefusedError(
                413, f"a body of {size:,} bytes or more; at most {self.limits.max_body:,} are read: send fewer images."
            )
        if self.held > self.limits.max_bodies:
            raise RefusedError(503, f"{self.held:,} bytes of requests are being read; try again later.", retry_after=1)

    async def decode(self, body: bytes, kind: str) -> Digits:
        if kind != "application/json":
            return Digits(await self.read_file(body), False)
        if len(body) <= QUICK:
            parsed = parse(body)
        else:
            parsed = await self.in_thread(parse, body)
        self.check_count(len(parsed.images))
        images = [
            await self.in_thread(read_base64, image, f"images[{place}]") if isinstance(image, str) else from_rows(image)
            for place, image in enumerate(parsed.images)
        ]
        return Digits(images[0] if len(images) == 1 else np.concatenate(images), parsed.explain)

    async def read_file(self, content: bytes) -> np.ndarray:
        """The digits of a PNG, JPEG or IDX file; pictures one by one, so that a client that gave up stops it."""
        if content[:2] == b"\x1f\x8b":
            content = await self.in_thread(decompress, content, "the body")
        if content[:2] != b"\0\0":
            return (await self.in_thread(read_digits, content, "the body")).numpy()
        images = told(read_idx, content, "the body").numpy()
        if images.ndim != 3 or not images.size:
            raise RefusedError(
                422, f"the body: IDX data of shape {tuple(images.shape)}; send images (N, height, width)."
            )
        self.check_count(len(images))
        if images.shape[1:] == (SIDE, SIDE):
            return images
        pictures = [Image.fromarray(image) for image in images]
        return np.stack([(await self.in_thread(find_digit, picture, "the body")).numpy() for picture in pictures])

    def check_count(self, count: int) -> None:
        if count > self.limits.max_images:
            raise RefusedError(
                413,
                f"{count:,} images in one request; at most {self.limits.max_images:,} are read: send them in parts.",
            )

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.decoders, told, function, *arguments)


def told(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of thaw's data; what it says of bad data goes to the client."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise RefusedError(422, str(error)) from error


def parse(body: bytes) -> PredictRequest:
    """JSON as a request.

    Raises:
        RefusedError: names the first value that is wrong.
    """
    try:
        return PredictRequest.model_validate_json(body)
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place_of(wrong[0]["loc"]))
        value = "" if wrong[0]["type"] in ("json_invalid", "missing") else f", got {shortened(wrong[0]['input'])}"
        raise RefusedError(
            422, f"{place.lstrip('.') or 'the body'}: {wrong[0]['msg']}{value}; see /docs for what is allowed."
        ) from None


def place_of(location: tuple[int | str, ...]) -> list[int | str]:
    """Where in the client's JSON an error is: without the names of our union."""
    return [part for part in location if part not in ("picture", "pixels")]


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def from_rows(rows: list[list[int]]) -> np.ndarray:
    """28 rows of 28 valid pixels -> uint8 (1, 28, 28)."""
    return np.frombuffer(bytes(chain.from_iterable(rows)), dtype=np.uint8).reshape(1, SIDE, SIDE)


def read_base64(text: str, name: str) -> np.ndarray:
    """A picture, uint8 (1, 28, 28)."""
    head, comma, rest = text.partition(",")
    if comma and not (head.startswith("data:image/") and head.endswith(";base64")):
        raise ValueError(
            f"{name} starts with {head[:40]!r}; give base64, with data:image/png;base64, or nothing before it."
        )
    try:
        content = base64.b64decode(rest if comma else head, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} is not base64 ({error}); send a PNG or JPEG in base64, or rows of pixels.") from error
    if content[:2] in (b"\0\0", b"\x1f\x8b"):
        raise ValueError(f"{name} is no PNG or JPEG; send an IDX file as the whole body, as application/octet-stream.")
    return read_digits(content, name).numpy()
