"""Read the digits in pictures.    python predict.py ckpt=<run folder> <files or folders>"""

import os
import sys
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
    from tqdm import tqdm

    from thaw.data.batches import EVAL_BATCH
    from thaw.predict.prediction import RowWriter, find_files, open_output, predictions, read_file
    from thaw.predict.predictor import load_predictor

    files, left_out = find_files([*cfg.inputs, *inputs])
    for line in left_out:
        print(line, file=sys.stderr)
    with open_output(cfg.output, cfg.format) as (file, format):
        model = load_predictor(cfg.ckpt, cfg.weights, cfg.trainer.accelerator, cfg.trainer.precision, cfg.allow, True)
        writer = RowWriter(file, format, model.classes)
        read = failed = doubtful = 0
        with tqdm(files, desc="files", unit="file", disable=None, leave=False) as bar:
            digits = (digit for path in bar for digit in read_file(path))
            while batch := list(islice(digits, EVAL_BATCH)):
                for row in predictions(model, batch, model.classes):
                    writer.write(row)
                    read, failed = read + (row["error"] is None), failed + (row["error"] is not None)
                    doubtful += row["warning"] is not None
    if cfg.output:
        print(f"{read:,} digits of {len(files):,} files in {cfg.output}", file=sys.stderr)
    if doubtful:
        print(f"{doubtful:,} of {read + failed:,} rows are doubtful; the column `warning` says why.", file=sys.stderr)
    if failed:
        raise UserError(f"{failed:,} of {read + failed:,} rows have no answer; the column `error` says why.")


if __name__ == "__main__":
    inputs = take_inputs(sys.argv)
    main()
