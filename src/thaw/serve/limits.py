"""Limits on the requests of clients."""

import dataclasses

from omegaconf import DictConfig, OmegaConf

from thaw.run.errors import UserError
from thaw.run.values import Count, Positive, check_types


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds on memory and time, explained in `configs/serve.yaml`.

    Raises:
        UserError: the queue is shorter than one request may be.
    """

    max_batch: Count
    max_queue: Count
    max_images: Count
    max_body_mb: Positive
    max_connections: Count
    request_seconds: Positive

    def __post_init__(self) -> None:
        if self.max_queue < self.max_images:
            raise UserError(
                f"max_queue={self.max_queue} has no room for the {self.max_images} images that one request may hold; "
                "give max_queue at least max_images."
            )

    def for_images_of(self, size: int) -> "Limits":
        """The same for images of `size` bytes: no more of them than fit beside a body into `max_bodies`."""
        most = max(1, (self.max_bodies - self.max_body) // size)
        return dataclasses.replace(self, max_images=min(self.max_images, most), max_queue=min(self.max_queue, most))

    @property
    def max_body(self) -> int:
        """Bytes of one request's body."""
        return int(self.max_body_mb * 1e6)

    @property
    def max_bodies(self) -> int:
        """Bytes of all bodies, and of the images being read from them, in memory together."""
        return 8 * self.max_body


def limits_of(cfg: DictConfig) -> Limits:
    """The limits in a configuration; a UserError names each value that is out of its range."""
    values = {field.name: cfg[field.name] for field in dataclasses.fields(Limits)}
    check_types(OmegaConf.create({"_target_": f"{__name__}.Limits", **values}))
    return Limits(**values)
