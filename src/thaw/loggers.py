"""Weights & Biases, online where that works and offline where it does not, without a question or a wait."""

import logging
import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

import wandb
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from requests.utils import get_netrc_auth

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 3.0  # seconds


def wandb_logger(
    project: str, entity: str | None, group: str | None, name: str, mode: str, run_dir: str, id: str | None
) -> WandbLogger:
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
        settings=wandb.Settings(silent=True, console="off", x_save_requirements=False),  # versions are logged
    )


NO_KEY = "no W&B key is configured"
LOGIN_HOSTS = ("https://api.wandb.ai",)  # `wandb login` may have stored the key under W&B's older address


def why_offline() -> str | None:
    """Why W&B cannot run online, or None if it can; answers within `CONNECT_TIMEOUT`.

    W&B's own check of a key talks to the server and waits for it, so the key is only looked up here.
    """
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


def log_image(loggers: list[Logger], key: str, path: Path) -> None:
    """Add a PNG to every logger that takes pictures."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [str(path)])
        elif isinstance(logger, TensorBoardLogger):
            from torchvision.io import decode_image

            logger.experiment.add_image(key, decode_image(str(path)))


def wandb_run(loggers: list[Logger]) -> wandb.Run | None:
    """The W&B run that is logged to, if there is one."""
    return next((logger.experiment for logger in loggers if isinstance(logger, WandbLogger)), None)


def where_to_look(loggers: list[Logger]) -> str | None:
    """How to see the run in W&B: its address, or the commands for an offline run; None without W&B."""
    run = wandb_run(loggers)
    if run is None:
        return None
    if not run.settings._offline:
        return str(run.url)
    folder = os.path.relpath(Path(run.dir).parent)
    return f"offline; look: wandb leet {folder}\n{'':<14}upload: wandb sync {folder}"


def finish(loggers: list[Logger]) -> None:
    """Close every logger, W&B's run too: the next job of a sweep would otherwise write into it.

    Called while an exception passes, it marks the run as failed.
    """
    failed = sys.exc_info()[0] is not None
    for logger in loggers:
        logger.finalize("failed" if failed else "success")
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        wandb.finish(exit_code=int(failed))
