"""What the tests of the commands share: calling one, and reading what it says."""

import pytest

from mrcnf import cli


def mrcnf_says(capsys, *arguments):
    """What a command prints when it succeeds."""
    cli.main([str(a) for a in arguments])
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """The one line on stderr of a command that the user got wrong."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and said.err.startswith("mrcnf: ")
    return said.err
