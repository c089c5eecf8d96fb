"""Reads the images, uint8 (N, C, H, W), in the body of a request, in bounded memory and time."""

import asyncio
import base64
import math
import reprlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    Tag,
    ValidationError,
    create_model,
)
from starlette.requests import ClientDisconnect, Request

from thaw.data.pictures import PICTURE_FORMATS
from thaw.data.readers import ImageReader, Reading, is_idx, read_images, unpack
from thaw.run.errors import UserError
from thaw.serve.limits import Limits
from thaw.serve.refusals import RefusedError

FILE_TYPES = (*(f"image/{kind.lower()}" for kind in PICTURE_FORMATS), "image/jpg", "application/octet-stream")
QUICK = 50_000  # bytes of JSON that are parsed on the event loop, in less than a millisecond
MAX_COLONS = 1_000  # in JSON, beside one in each picture's data URL

Picture = Annotated[
    str,
    Field(
        description=f"a picture ({', '.join(PICTURE_FORMATS)}) in base64, also wrapped, without padding or URL-safe; "
        "`data:image/png;base64,` may stand before it"
    ),
]


def request_model(shape: Sequence[int]) -> type[BaseModel]:
    """The JSON of `POST /predict` for a model of images (C, H, W): `images` and `explain`."""
    channels, height, width = shape

    def exactly(length: int, item: Any, description: str | None = None) -> Any:
        return Annotated[
            list[item], Field(min_length=length, max_length=length, fail_fast=True, description=description)
        ]

    value = Annotated[StrictInt, Field(ge=0, le=255)]
    pixel = value if channels == 1 else exactly(channels, value)
    kind = "numbers from 0 to 255" if channels == 1 else "lists of red, green and blue, from 0 to 255"
    rows: Any = exactly(height, exactly(width, pixel), f"{height} rows of {width} pixels, which are {kind}")
    sent = Annotated[
        Annotated[Picture, Tag("picture")] | Annotated[rows, Tag("pixels")],
        Discriminator(lambda value: "picture" if isinstance(value, str) else "pixels"),
    ]
    images = Annotated[list[sent], Field(min_length=1, fail_fast=True)]  # reports at most one error
    explain = Annotated[StrictBool, Field(description="answer also with the model's input and attention")]
    forbid = ConfigDict(extra="forbid")
    return create_model("PredictRequest", __config__=forbid, images=(images, ...), explain=(explain, False))


class ReceivedImages(NamedTuple):
    """The content of a request: uint8 (N, C, H, W), a doubt or "" for each, and whether to explain the answer."""

    images: np.ndarray
    warnings: list[str]
    explain: bool


class RequestReader:
    """Reads bodies and decodes pictures, on two threads, so that at most two large ones are open at once."""

    def __init__(self, reader: ImageReader, limits: Limits) -> None:
        self.reader, self.limits = reader, limits
        self.form = request_model(reader.shape)
        self.held = 0  # bytes of all bodies in memory, and of the images that are read from them
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
        self.check_room()

    def check_room(self) -> None:
        if self.held > self.limits.max_bodies:
            raise RefusedError(503, f"{self.held:,} bytes of requests are being read; try again later.", retry_after=1)

    async def decode(self, body: bytes, kind: str) -> ReceivedImages:
        if kind != "application/json":
            return await self.read_file(body)
        parse = self.parse
        images, explain = parse(body) if len(body) <= QUICK else await self.in_thread(parse, body)
        with self.room_for(len(images)):
            readings = []
            for place, image in enumerate(images):
                name = f"images[{place}]"
                if isinstance(image, str):
                    readings.append(await self.in_thread(self.read_base64, image, name))
                else:
                    readings.append(await self.read_array(image, name))
            return gathered(readings, explain)

    async def read_file(self, content: bytes) -> ReceivedImages:
        """The images of a picture or an IDX file, one by one, so that the work ends when the client gives up."""
        content = await self.in_thread(unpack, content, "the body")
        if not is_idx(content):
            return gathered([await self.in_thread(self.reader.picture, content, "the body")], False)
        images = await self.in_thread(read_images, content, "the body")
        with self.room_for(len(images)):
            if self.reader.are_inputs(images).all():
                return ReceivedImages(images[:, None], [""] * len(images), False)
            readings = [await self.read_array(image, f"the body, image {n},") for n, image in enumerate(images)]
            return gathered(readings, False)

    async def read_array(self, pixels: np.ndarray, name: str) -> Reading:
        if self.reader.are_inputs(pixels[None])[0]:
            return Reading(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
        return await self.in_thread(self.reader.array, pixels, name)

    @contextmanager
    def room_for(self, count: int) -> Iterator[None]:
        """Count the memory of a request's images while they are read; refuse too many."""
        if count > self.limits.max_images:
            raise RefusedError(
                413,
                f"{count:,} images in one request; at most {self.limits.max_images:,} are read: send them in parts.",
            )
        size = count * math.prod(self.reader.shape)
        self.held += size
        try:
            self.check_room()
            yield
        finally:
            self.held -= size

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A function's result, computed by a decoder; a refusal gives the client thaw.data's reason for no image."""
        try:
            result = await asyncio.get_running_loop().run_in_executor(self.decoders, function, *arguments)
        except UserError as error:
            raise RefusedError(422, str(error)) from error
        if isinstance(result, Reading) and result.image is None:
            raise RefusedError(422, result.error)
        return result

    def parse(self, body: bytes) -> tuple[list[str | np.ndarray], bool]:
        """A request's pictures as text, pixels as uint8 (H, W) or (H, W, 3), and whether to explain the answer.

        A RefusedError names the first value that is wrong.
        """
        channels, height, width = self.reader.shape
        shape = (height, width) if channels == 1 else (height, width, channels)
        if body.count(b":") > MAX_COLONS + self.limits.max_images:  # of wrong names each would be an error of 1 kB
            raise RefusedError(422, "the body has too many names; allowed are images and explain, see /docs.")
        try:
            parsed: Any = self.form.model_validate_json(body)
        except ValidationError as error:
            wrong = error.errors(include_url=False)
            parts = [part for part in wrong[0]["loc"] if part not in ("picture", "pixels")]  # without our union's tags
            place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
            given = reprlib.repr(wrong[0]["input"])  # looks at the first values of a long list only
            given = given if len(given) <= 60 else f"{given[:57]}..."
            value = "" if wrong[0]["type"] in ("json_invalid", "missing") else f", got {given}"
            raise RefusedError(
                422, f"{place.lstrip('.') or 'the body'}: {wrong[0]['msg']}{value}; see /docs for what is allowed."
            ) from None

        def pixels(rows: Any) -> np.ndarray:
            for _ in shape[1:]:
                rows = chain.from_iterable(rows)
            return np.frombuffer(bytes(rows), dtype=np.uint8).reshape(shape)

        return [image if isinstance(image, str) else pixels(image) for image in parsed.images], parsed.explain

    def read_base64(self, text: str, name: str) -> Reading:
        """The image of a picture in base64, also with wrapped lines, in the URL-safe alphabet or without padding."""
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
            raise UserError(
                f"{name} is not a picture; send an IDX file as the whole body, as application/octet-stream."
            )
        return self.reader.picture(content, name)


def gathered(readings: list[Reading], explain: bool) -> ReceivedImages:
    images = np.stack([reading.image for reading in readings if reading.image is not None])
    return ReceivedImages(images, [reading.warning for reading in readings], explain)
