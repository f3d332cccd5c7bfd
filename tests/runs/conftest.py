"""Runs on disk that the tests share."""

import shutil

import pytest
from tiny import trained


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A trained run of two levels; not to be changed."""
    return trained(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")
