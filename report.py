"""Finished runs or sweeps in one table, from their files alone.    python report.py logs/sweeps/<sweep>"""

import argparse
import sys
from pathlib import Path

from thaw.run.console import console, lenient
from thaw.sweeps.ending import say_where, show_run_table
from thaw.sweeps.run_table import write_run_table


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare all runs in and below some folders: best setting first, mean and spread over seeds, "
        "curves, and what failed. Writes report.html, report.md and report.csv; reads nothing but files."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="folder", help="of a sweep, or of runs: logs/sweeps")
    parser.add_argument("--out", type=Path, help="where to write (default: that folder; logs/report for several)")
    arguments = parser.parse_args()
    folders = arguments.folders
    out = arguments.out or (folders[0] if len(folders) == 1 else Path("logs/report"))
    try:
        with console().status("drawing pictures, writing the report"):
            table = write_run_table(folders, out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    show_run_table(table)
    say_where(table, folders, out)


if __name__ == "__main__":
    with lenient():
        main()
