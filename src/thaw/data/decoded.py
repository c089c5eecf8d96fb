"""What the sources of pictures share: listed files become images of one size, in splits."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_only

from thaw.data.decode import PictureFiles, decode_once
from thaw.data.images import Images, Source
from thaw.data.module import ImageDataModule
from thaw.data.splits import SPLITS, ListedFile, SplitShare, plan_splits, split_files
from thaw.run.errors import UserError
from thaw.run.values import Count, Positive

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class DecodedData(ImageDataModule):
    """Pictures that are decoded once, see `thaw.data.decode`; each source is a subclass that lists them.

    A split that is missing is taken from the training pictures, a share of each class by the hash of their content: the
    same in every run, and equal pictures lie in one split.

    Args:
        image_size: S, pixels; the central square of each picture is kept at C x S x S.
        channels: C, 3 for RGB, 1 for grey.
        val_share, test_share: of the training pictures, where that split is missing.
        skip_unreadable: leave out what cannot be read; otherwise it is an error.
        cache_dir, max_gb: decoded images are kept in `cache_dir`/images, of at most this size in all.
    """

    image_size: Count
    channels: Literal[1, 3]
    val_share: SplitShare
    test_share: SplitShare
    skip_unreadable: bool
    cache_dir: str
    max_gb: Positive

    def decode(
        self,
        files: Sequence[ListedFile],
        content: Callable[[int], bytes],
        classes: Sequence[str],
        name: str,
        **facts: Any,
    ) -> Source:
        """The images of listed files by split; prints what is left out, and how splits are made.

        Args:
            content: gets the number of a file, returns what is in it.
            classes: in the order of the labels; a file has one of them as its label.
            name: of the dataset.
            facts: what else distinguishes the pictures from those of another dataset, as values of JSON.

        Raises:
            UserError: unreadable pictures, or a split without any.
        """
        uses, shares = plan_splits({file.split for file in files}, self.val_share, self.test_share, name)
        files = [file._replace(split=uses.get(file.split, "")) for file in files]
        wanted = PictureFiles(
            names=[file.name for file in files],
            read=content,
            facts={**facts, "files": hashlib.sha256(repr(files).encode()).hexdigest(), **shares},
            arrange=partial(split_files, files, shares),
            skip_unreadable=self.skip_unreadable,
        )
        cache = Path(self.cache_dir).expanduser() / "images"
        images, order, doubts = decode_once(wanted, self.channels, self.image_size, cache, self.max_gb)
        if empty := [split for split in SPLITS if not order[split]]:
            raise UserError(
                f"{name} has no picture for {' and '.join(empty)}. Add some: of a class of three or more different "
                "pictures, each split that is missing gets at least one."
            )
        for doubt in doubts:
            rank_zero_only(log.warning)("%s", doubt)
        numbers = {label: number for number, label in enumerate(classes)}
        labels = torch.tensor([numbers[file.label] for file in files])
        parts = images.split([len(order[split]) for split in SPLITS])
        splits = {split: Images(part, labels[order[split]]) for split, part in zip(SPLITS, parts, strict=True)}
        tested = [files[number].name for number in order["test"]]
        return Source(splits["train"], splits["val"], splits["test"], classes, name, files=tested)
