"""What a client may ask for, and how a request is refused."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on memory and time; `configs/serve.yaml` says what each is.

    Raises:
        ValueError: one that lets nothing through.
    """

    max_batch: int
    max_queue: int
    max_images: int
    max_body_mb: float
    max_connections: int
    request_seconds: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, field.type)):  # type: ignore[arg-type]
                raise ValueError(f"{field.name}={value!r} must be of type {field.type.__name__}.")  # type: ignore[union-attr]
            if not 0 < value < math.inf:
                raise ValueError(f"{field.name}={value} lets nothing through; give a number above 0.")
        if self.max_queue < self.max_images:
            raise ValueError(
                f"max_queue={self.max_queue} has no room for the {self.max_images} images that one request may hold; "
                "give max_queue at least max_images."
            )

    @property
    def max_body(self) -> int:
        """Bytes of one request's body."""
        return int(self.max_body_mb * 1e6)

    @property
    def max_bodies(self) -> int:
        """Bytes of all bodies that are held at once."""
        return 8 * self.max_body


class RefusedError(Exception):
    """A request that is answered by an error.

    Args:
        status: of HTTP.
        detail: for the client: the value, what is allowed and what to do.
        retry_after: seconds after which it may work, for a 503.
    """

    def __init__(self, status: int, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after
