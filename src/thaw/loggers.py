"""Weights & Biases, online where that works and offline where it does not, without a question or a wait."""

import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 3.0  # seconds


def wandb_logger(
    project: str, entity: str | None, group: str | None, name: str, mode: str, run_dir: str, id: str | None
) -> "WandbLogger":
    """Lightning's W&B logger in a mode that is decided before W&B starts.

    Args:
        project, entity, name: as in `wandb.init`.
        group: None means the folder above the run's: the experiment, or the sweep that the run is a job of.
        mode: `online`, `offline`, or `auto`: online if a key is configured and the server answers.
        run_dir: the run's folder; W&B writes to `<run_dir>/wandb`.
        id: of the W&B run to go on with, or None for a new one.

    Raises:
        ValueError: an unknown mode, or `online` without a key.
    """
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    if mode not in ("auto", "online", "offline"):
        raise ValueError(f"logger.wandb.mode={mode!r} is unknown; choose auto, online or offline.")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's own crash telemetry
    os.environ.setdefault("WANDB_SILENT", "true")  # the summary says where the run lies
    reason = why_offline()
    if mode == "online" and reason == NO_KEY:
        raise ValueError(f"logger.wandb.mode=online but {reason}; run `wandb login` first, or choose auto or offline.")
    offline = mode == "offline" or (mode == "auto" and reason is not None)
    if mode == "auto" and reason not in (None, NO_KEY):
        log.warning("W&B runs offline: %s.", reason)
    return WandbLogger(
        project=project,
        entity=entity,
        group=group or Path(run_dir).parent.name,
        name=name,
        save_dir=run_dir,
        mode="offline" if offline else "online",
        id=id,
        resume="allow",
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=False),
    )


NO_KEY = "no W&B key is configured"
LOGIN_HOSTS = ("https://api.wandb.ai",)  # `wandb login` may have stored the key under W&B's older address


def why_offline() -> str | None:
    """Why W&B cannot run online, or None if it can; answers within `CONNECT_TIMEOUT`.

    W&B's own check of a key talks to the server and waits for it, so the key is only looked up here.
    """
    import wandb
    from requests.utils import get_netrc_auth

    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return f"WANDB_MODE is {os.environ['WANDB_MODE']}"
    server = wandb.setup().settings.base_url
    in_environment = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    if not in_environment and not any(get_netrc_auth(host) for host in (server, *LOGIN_HOSTS)):
        return NO_KEY
    url = urlsplit(server)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname or "", port), timeout=CONNECT_TIMEOUT).close()
    except OSError as error:
        return f"{url.hostname}:{port} does not answer ({error})"
    return None


def log_image(loggers: list[Any], key: str, path: Path) -> None:
    """Add a PNG to every logger that takes pictures."""
    for logger in loggers:
        kind = type(logger).__name__
        if kind == "WandbLogger":
            logger.log_image(key, [str(path)])
        elif kind == "TensorBoardLogger":
            from torchvision.io import decode_image

            logger.experiment.add_image(key, decode_image(str(path)))


def where_to_look(loggers: list[Any]) -> str | None:
    """How to see the run in W&B: its address, or the commands for an offline run; None without W&B."""
    for logger in loggers:
        if type(logger).__name__ == "WandbLogger":
            run = logger.experiment
            if not run.settings._offline:
                return str(run.url)
            folder = os.path.relpath(Path(run.dir).parent)
            return f"offline; look: wandb leet {folder}\n{'':<14}upload: wandb sync {folder}"
    return None


def finish(loggers: list[Any]) -> None:
    """Close every logger, W&B's run too: the next job of a sweep would otherwise write into it."""
    for logger in loggers:
        logger.finalize("success")
    if any(type(logger).__name__ == "WandbLogger" for logger in loggers):
        import wandb

        wandb.finish()
