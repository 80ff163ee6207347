"""The site: MyST Markdown by Sphinx. CONTRIBUTING.md has the command.

The root of the project is the folder of sources, so that links between docs/, README.md, LOG.md and
CONTRIBUTING.md are the same here and in a checkout, and are checked.
"""

import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

sys.path.insert(0, str(Path(__file__).parent))

import docstrings

project = "dinov3core"
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md"]
exclude_patterns = [".*", "build", "runs", "venv"]
extensions = ["myst_parser"]
myst_heading_anchors = 3  # links may name a heading, and are checked
nitpicky = True

html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sphinx = False

# By page, the pages below it in the order in which a stranger reads them.
CONTENTS = {
    "docs/index": [
        "your-images",
        "stages",
        "distill",
        "judge",
        "weights",
        "ops",
        "inside",
        "reference/index",
        "gallery/README",
        "README </README>",
        "/CONTRIBUTING",
        "/LOG",
    ],
    "docs/reference/index": [
        "package",
        "ops",
        "models",
        "losses",
        "data",
        "evals",
        "pictures",
        "checkpoints",
    ],
}


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Write the reference into a page, and the list of the pages below it."""
    try:
        source[0] = docstrings.filled(source[0])
    except docstrings.NoSuchName as error:
        logging.getLogger(__name__).warning(str(error), location=page)
    if page in CONTENTS:
        listed = "\n".join(CONTENTS[page])
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"


def send_on(app: Sphinx, error: Exception | None) -> None:
    """The front page of the site leads to the first page of docs/."""
    if error is None:
        there = f"{root_doc}.html"
        front = (
            f'<meta http-equiv="refresh" content="0; url={there}"><a href="{there}">{project}</a>\n'
        )
        Path(app.outdir, "index.html").write_text(front, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", fill)
    app.connect("build-finished", send_on)
    return {"parallel_read_safe": True}
