"""A checkpoint as one file for other programs, or as a folder to share.    python export.py ckpt=last format=onnx"""

from omegaconf import DictConfig

from thaw.run.command import command


@command("export")
def main(cfg: DictConfig) -> None:
    from thaw.evaluation.combine_settings import check_combination
    from thaw.export.destination import check_request, destination, summary

    ckpts = check_combination(cfg)  # before what takes seconds to import
    check_request(cfg)
    from thaw.data.images import check_same_classes
    from thaw.data.module import load_source
    from thaw.evaluation.combine import combine, common_source
    from thaw.export.export_file import export_file
    from thaw.predict.predictor import load_predictor
    from thaw.run.checkpoint import read_checkpoint
    from thaw.run.console import say

    predictors = [load_predictor(ckpt, cfg.weights, "cpu", "32-true", cfg.allow) for ckpt in ckpts]
    predictor, sources = predictors[0], []
    path = destination(cfg, predictor.checkpoint)
    for ckpt, each in zip(ckpts, predictors, strict=True):
        changes = {key: value for key, value in cfg.data.items() if value is not None}
        sources.append(load_source(each.cfg.data, changes))
        check_same_classes(each.classes, sources[-1], f"ckpt={ckpt}")
    source = sources[0]
    if cfg.combine or cfg.tta > 1:
        source = common_source(cfg, predictors, sources)
        predictor = combine(cfg, predictors, source, None)
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
