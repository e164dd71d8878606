"""The language task: what it continues when it is asked to."""

import pytest

from jaxvram.errors import UserError
from jaxvram.sample.text import SampleConfig
from jaxvram.tasks.language import _prompt_of


def test_a_prompt_comes_from_the_recipe_or_from_a_file(tmp_path):
    assert _prompt_of(SampleConfig()) is None and _prompt_of(SampleConfig(prompt="ROMEO:")) == "ROMEO:"
    file = tmp_path / "prompt.txt"
    file.write_text("to be", encoding="utf-8")
    assert _prompt_of(SampleConfig(prompt_file=str(file))) == "to be"
    with pytest.raises(UserError, match=r"gone\.txt does not exist"):
        _prompt_of(SampleConfig(prompt_file=str(tmp_path / "gone.txt")))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        _prompt_of(SampleConfig(prompt_file=str(file)))
