"""A value is compared with the type and range in a signature, and the message says both in words."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from conftest import compose_run
from omegaconf import OmegaConf
from pydantic import Field

from thaw.run.values import Count, Positive, Probability, check_types, in_words


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Count, "a whole number, 1 or more"),
        (Positive, "a number above 0"),
        (Probability, "a number from 0 to 1"),
        (Annotated[int, Field(ge=-1, description="-1 for all")], "a whole number, -1 or more; -1 for all"),
        (Literal["a", "b", None], "a, b or null"),
        (Count | Positive | timedelta | None, "a whole number, 1 or more, a number above 0, a duration as"),
        (Literal[0] | Count, "0, or a whole number, 1 or more"),
        (list[float], "a list, each item a number"),
        (Annotated[list, Field(min_length=2)], "a list of 2 or more"),
    ],
)
def test_in_words(annotation: Any, words: str) -> None:
    assert in_words(annotation).startswith(words)


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lr=0 must be a number above 0\. .*decay=-1 must be a number, 0 or more\.$"):
        check_types(compose_run(tmp_path, "optim.lr=0", "optim.weight_decay=-1"))
    with pytest.raises(ValueError, match=r"head\._target_=thaw\.none\.Head cannot be imported: thaw has no none\."):
        check_types(OmegaConf.create({"head": {"_target_": "thaw.none.Head"}}))


@pytest.mark.parametrize(
    "override",
    ["optim.lr=1", "data.train_size=null", "data.train_size=100", "trainer.devices=auto", "trainer.devices=[0]"],
)
def test_values_that_have_the_type(override: str, tmp_path: Path) -> None:
    check_types(compose_run(tmp_path, override))
