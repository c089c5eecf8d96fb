"""Predict the class of images.    python predict.py ckpt=<run folder> <files or folders>"""

import os
import sys
from collections.abc import Iterator
from itertools import islice, pairwise

from omegaconf import DictConfig

from thaw.run.command import command
from thaw.run.errors import UserError

TAKE_A_VALUE = {"-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir"}


def take_inputs(arguments: list[str]) -> list[str]:
    """Remove files and folders, all that is neither a setting nor an option, from the command line and return them."""
    inputs: list[str] = []
    others = arguments[:1]
    for before, word in pairwise(arguments):
        # Path.exists raises an error for a word that is too long to be a name
        is_input = os.path.exists(word) or ("=" not in word and word[:1] not in ("", "-", "~", "+"))  # noqa: PTH110
        (inputs if is_input and before not in TAKE_A_VALUE else others).append(word)
    arguments[:] = others
    return inputs


inputs: list[str] = []


@command("predict")
def main(cfg: DictConfig) -> None:
    from thaw.data.batches import EVAL_BATCH
    from thaw.data.readers import ImageReader
    from thaw.predict.prediction import Read, RowWriter, find_files, open_output, predictions, read_file
    from thaw.predict.predictor import load_predictor
    from thaw.run.console import progress, say

    files, left_out = find_files([*cfg.inputs, *inputs])
    for line in left_out:
        say(line, stderr=True)
    with open_output(cfg.output, cfg.format) as (file, format):
        model = load_predictor(
            cfg.ckpt, cfg.weights, cfg.trainer.accelerator, cfg.trainer.precision, cfg.allow, stderr=True
        )
        reader = ImageReader(cfg.reader or model.data["reader"], model.data["shape"])
        writer = RowWriter(file, format, model.classes)
        read = failed = doubtful = 0
        rows_on_terminal = cfg.output is None and sys.stdout.isatty()
        with progress("predicting", len(files), "files", stderr=True, hidden=rows_on_terminal) as advance:

            def read_all() -> Iterator[Read]:
                for path in files:
                    yield from read_file(path, reader)
                    advance(1)

            images = read_all()
            while batch := list(islice(images, EVAL_BATCH)):
                for row in predictions(model, batch, model.classes):
                    writer.write(row)
                    read, failed = read + (row["error"] is None), failed + (row["error"] is not None)
                    doubtful += row["warning"] is not None
    if cfg.output:
        say(f"{read:,} images of {len(files):,} files predicted:\n{cfg.output}", stderr=True)
    if doubtful:
        say(f"{doubtful:,} of {read + failed:,} rows are doubtful; the column `warning` says why.", stderr=True)
    if failed:
        raise UserError(f"{failed:,} of {read + failed:,} rows have no prediction; the column `error` says why.")


if __name__ == "__main__":
    inputs = take_inputs(sys.argv)
    main()
