"""Reads the images, uint8 (N, 1, 28, 28), in the body of a request, in bounded memory and time."""

import asyncio
import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictBool, StrictInt, Tag, ValidationError
from starlette.requests import ClientDisconnect, Request

from thaw.data.digit_image import (
    PICTURE_FORMATS,
    SIDE,
    Digit,
    are_like_mnist,
    is_idx,
    read_array,
    read_images,
    read_picture,
    unpack,
)
from thaw.run.errors import UserError
from thaw.serve.limits import Limits, RefusedError

FILE_TYPES = (*(f"image/{kind.lower()}" for kind in PICTURE_FORMATS), "image/jpg", "application/octet-stream")
QUICK = 50_000  # bytes of JSON that are parsed on the event loop, in less than a millisecond

Pixel = Annotated[StrictInt, Field(ge=0, le=255)]
PixelRow = Annotated[list[Pixel], Field(min_length=SIDE, max_length=SIDE, fail_fast=True)]
PixelRows = Annotated[
    list[PixelRow],
    Field(min_length=SIDE, max_length=SIDE, fail_fast=True, description="28 rows of 28 pixels, ink bright"),
]
Picture = Annotated[
    str,
    Field(
        description=f"a picture ({', '.join(PICTURE_FORMATS)}) in base64, also wrapped, without padding or URL-safe; "
        "`data:image/png;base64,` may stand before it"
    ),
]
Sent = Annotated[
    Annotated[Picture, Tag("picture")] | Annotated[PixelRows, Tag("pixels")],
    Discriminator(lambda value: "picture" if isinstance(value, str) else "pixels"),
]


class PredictRequest(BaseModel):
    """The JSON of `POST /predict`."""

    model_config = ConfigDict(extra="forbid")
    images: Annotated[list[Sent], Field(min_length=1, fail_fast=True)]  # reports at most one error
    explain: Annotated[StrictBool, Field(description="answer also with the model's input and attention")] = False


class ReceivedImages(NamedTuple):
    """The content of a request: uint8 (N, 1, 28, 28), a doubt or "" for each, and whether to explain the answer."""

    images: np.ndarray
    warnings: list[str]
    explain: bool


class RequestReader:
    """Reads bodies and decodes pictures, on two threads, so that at most two large ones are open at once."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held = 0  # bytes of all bodies in memory
        self.decoders = ThreadPoolExecutor(2, thread_name_prefix="decoder")

    async def read(self, request: Request, kind: str, deadline: float) -> ReceivedImages:
        """The images of a request; raises TimeoutError if it is complete, but takes too long to decode.

        `kind` is its Content-Type; `deadline` is in seconds of the event loop's clock.
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

    async def decode(self, body: bytes, kind: str) -> ReceivedImages:
        if kind != "application/json":
            return await self.read_file(body)
        parsed = parse(body) if len(body) <= QUICK else await self.in_thread(parse, body)
        self.check_count(len(parsed.images))
        digits = []
        for place, image in enumerate(parsed.images):
            name = f"images[{place}]"
            if isinstance(image, str):
                digits.append(await self.in_thread(read_base64, image, name))
            else:
                pixels = np.frombuffer(bytes(chain.from_iterable(image)), dtype=np.uint8)
                digits.append(await self.read_array(pixels.reshape(SIDE, SIDE), name))
        return gathered(digits, parsed.explain)

    async def read_file(self, content: bytes) -> ReceivedImages:
        """The images of a picture or an IDX file, one by one, so that the work ends when the client gives up."""
        content = await self.in_thread(unpack, content, "the body")
        if not is_idx(content):
            return gathered([await self.in_thread(read_picture, content, "the body")], False)
        images = await self.in_thread(read_images, content, "the body")
        self.check_count(len(images))
        if are_like_mnist(images).all():
            return ReceivedImages(images[:, None], [""] * len(images), False)
        digits = [await self.read_array(image, f"the body, image {place},") for place, image in enumerate(images)]
        return gathered(digits, False)

    async def read_array(self, image: np.ndarray, name: str) -> Digit:
        if are_like_mnist(image[None])[0]:
            return Digit(image)
        return await self.in_thread(read_array, image, name)

    def check_count(self, count: int) -> None:
        if count > self.limits.max_images:
            raise RefusedError(
                413,
                f"{count:,} images in one request; at most {self.limits.max_images:,} are read: send them in parts.",
            )

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A function's result, computed by a decoder; a refusal gives the client thaw.data's reason for no digit."""
        try:
            result = await asyncio.get_running_loop().run_in_executor(self.decoders, function, *arguments)
        except UserError as error:
            raise RefusedError(422, str(error)) from error
        if isinstance(result, Digit) and result.image is None:
            raise RefusedError(422, result.error)
        return result


def gathered(digits: list[Digit], explain: bool) -> ReceivedImages:
    images = np.stack([digit.image for digit in digits if digit.image is not None])
    return ReceivedImages(images[:, None], [digit.warning for digit in digits], explain)


def parse(body: bytes) -> PredictRequest:
    """Read a request's JSON; a RefusedError names the first value that is wrong."""
    try:
        return PredictRequest.model_validate_json(body)
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        parts = [part for part in wrong[0]["loc"] if part not in ("picture", "pixels")]  # without our union's tags
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
        given = repr(wrong[0]["input"])
        given = given if len(given) <= 60 else f"{given[:57]}..."
        value = "" if wrong[0]["type"] in ("json_invalid", "missing") else f", got {given}"
        raise RefusedError(
            422, f"{place.lstrip('.') or 'the body'}: {wrong[0]['msg']}{value}; see /docs for what is allowed."
        ) from None


def read_base64(text: str, name: str) -> Digit:
    """The digit of a picture in base64, also with wrapped lines, in the URL-safe alphabet or without padding."""
    head, comma, rest = text.partition(",")
    if comma and not (head.lower().startswith("data:image/") and head.lower().endswith(";base64")):
        raise UserError(
            f"{name} starts with {head[:40]!r}; give base64, with data:image/png;base64, or nothing before it."
        )
    letters = "".join((rest if comma else head).split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        content = base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except ValueError as error:
        raise UserError(f"{name} is not base64 ({error}); send a picture in base64, or rows of pixels.") from error
    if is_idx(content) or content[:2] == b"\x1f\x8b":
        raise UserError(f"{name} is not a picture; send an IDX file as the whole body, as application/octet-stream.")
    return read_picture(content, name)
