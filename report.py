"""Finished runs or sweeps in one table, from their files alone.    python report.py logs/sweeps/<sweep>"""

import argparse
import sys
from pathlib import Path

from thaw.run.console import harmless, lenient
from thaw.run.errors import UserError
from thaw.sweeps.ending import report_runs

DESCRIPTION = """
Compare all runs in and below some folders: best setting first, mean and spread
over seeds, curves, and what failed. Writes report.html, report.md and
report.csv; reads nothing but files.
"""
EXAMPLES = """\
examples:
  python report.py logs/sweeps/<sweep>          a learning rate sweep, or any other
  python report.py logs/sweeps                  all sweeps in one table
  python report.py logs/runs                    single runs: linear probe, fine-tuning, LoRA, ...
  python report.py logs/runs logs/sweeps        several folders; written to logs/report
  python report.py logs/runs --out table        written to another folder
Each run in the table is the folder of a checkpoint: python eval.py ckpt=<run folder> evaluates it.
"""


def main() -> None:
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=DESCRIPTION, epilog=EXAMPLES, formatter_class=as_it_stands)
    parser.add_argument("folders", nargs="*", type=Path, metavar="folder", help="of a sweep, or of runs: logs/sweeps")
    parser.add_argument("--out", type=Path, help="where to write (default: that folder; logs/report for several)")
    arguments = parser.parse_args()
    folders = arguments.folders
    try:
        if not folders:
            raise UserError("No folder is named; give that of a sweep or of runs: python report.py logs/sweeps")
        out = arguments.out or (folders[0] if len(folders) == 1 else Path("logs/report"))
        report_runs(folders, out)
    except (UserError, OSError) as error:
        sys.exit(harmless(f"error: {error}"))


if __name__ == "__main__":
    with lenient():
        main()
