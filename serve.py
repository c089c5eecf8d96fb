"""Serve a checkpoint, or an exported model: a page that takes pictures, and a JSON API.    python serve.py ckpt=last"""

from pathlib import Path

from omegaconf import DictConfig

from thaw.run.command import command
from thaw.run.errors import UserError


@command("serve")
def main(cfg: DictConfig) -> None:
    from thaw.serve.limits import limits_of

    limits = limits_of(cfg)  # before what takes seconds to import
    import torch

    from thaw.data.readers import ImageReader
    from thaw.predict.predictor import ImageModel, Predictor, load_predictor
    from thaw.run.console import say
    from thaw.run.memory import keep_memory

    try:
        from thaw.serve.app import create_app
        from thaw.serve.server import open_port, serve
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing, which serving needs: pip install -e '.[serve]'") from error

    opened = open_port(cfg.host, cfg.port)  # before the model is loaded: a taken port is told at once
    say(f"loading {cfg.ckpt}", stderr=True)
    cores = torch.get_num_threads()
    torch.set_num_threads(1)  # each worker computes on one core
    model: ImageModel | Predictor
    if cfg.ckpt.endswith(".onnx"):
        from thaw.predict.onnx_model import load_onnx

        model, on_cpu = load_onnx(Path(cfg.ckpt).expanduser()), True
    else:
        model = load_predictor(cfg.ckpt, cfg.weights, cfg.trainer.accelerator, cfg.trainer.precision, cfg.allow)
        on_cpu = model.fabric.device.type == "cpu"
    reader = ImageReader(cfg.reader or model.data["reader"], model.data["shape"])
    app = create_app(model, reader, limits, cfg.workers or (cores if on_cpu else 1), [cfg.host, *cfg.hosts])
    address, port = opened.getsockname()[:2]
    url = f"http://{address}:{port}"
    ready = f"page    {url}\nAPI     {url}/docs\n{model.facts()['name']} is ready; Ctrl-C stops it"
    keep_memory()
    serve(app, opened, ready)


if __name__ == "__main__":
    main()
