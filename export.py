"""A checkpoint as one file for other programs, or as a folder to share.    python export.py ckpt=last format=onnx"""

from omegaconf import DictConfig

from thaw.run.command import command


@command("export")
def main(cfg: DictConfig) -> None:
    from thaw.export.destination import check_request, destination, summary

    check_request(cfg)  # before what takes seconds to import
    from thaw.data.images import check_same_classes
    from thaw.data.module import load_source
    from thaw.export.export_file import export_file
    from thaw.predict.predictor import load_predictor
    from thaw.run.checkpoint import read_checkpoint
    from thaw.run.console import say

    predictor = load_predictor(cfg.ckpt, cfg.weights, accelerator="cpu", precision="32-true", allow=cfg.allow)
    path = destination(cfg, predictor.checkpoint)
    source = load_source(predictor.cfg.data, {key: value for key, value in cfg.data.items() if value is not None})
    check_same_classes(predictor.classes, source, f"ckpt={cfg.ckpt}")
    trained = read_checkpoint(predictor.checkpoint, cfg.allow)["config"]["trainer"]["precision"]
    if cfg.format == "hub_folder":
        from thaw.export.hub_folder import export_folder
        from thaw.export.push import push

        facts = export_folder(predictor, source, cfg.license, path, cfg.allow)
        say(summary(facts, path, trained))
        if cfg.push:
            say(f"uploading to {cfg.push}")
            say(push(path, cfg.push, cfg.private))
    else:
        facts = export_file(predictor, source, cfg.format, cfg.quantize, path, cfg.runtime)
        say(summary(facts, path, trained))


if __name__ == "__main__":
    main()
