"""How Sphinx builds these pages: `sphinx-build -W docs OUT`, with the extra `docs`."""

import contextlib
import io

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

import mrcnf
from mrcnf import cli

project = "mrcnf"
author = "the mrcnf authors"
version = release = mrcnf.__version__
html_title = f"mrcnf {version}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_show_copyright = False
default_role = "code"  # docstrings say `name`
myst_heading_anchors = 3
# Links of included pages to files of the repository that are no pages: their text alone.
nitpick_ignore = [("myst", "CHANGELOG.md"), ("myst", "CITATION.cff"), ("myst", "models/cifar10")]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_rtype = False
pygments_style = "friendly"


class Help(Directive):
    """`{help} COMMAND`: what `mrcnf COMMAND --help` says."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            cli.main([self.arguments[0], "--help"])
        return [nodes.literal_block(said.getvalue(), said.getvalue(), language="none")]


def setup(app: Sphinx) -> None:
    app.add_directive("help", Help)
