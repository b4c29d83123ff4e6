"""Makes one site of the repository's documents: ``make docs``.

Sphinx reads the repository itself, so that links are those that its readers follow, and the README
is the first page.
"""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
PAGES = {
    "Documentation": (
        *("docs/quickstart", "docs/methods", "docs/compressors", "docs/speculation"),
        *("docs/clusters", "docs/evaluation", "docs/planning", "docs/architecture"),
        *("docs/plugins", "docs/troubleshooting", "docs/api"),
    ),
    "More": ("kernels/README", "apb/weights/smollm2-135m/README", "SECURITY", "CHANGELOG"),
    "Reports": ("benchmarks/reports/*", "benchmarks/reports/*/report"),
}
"""The table of contents beside every page."""

project = html_title = "apb"
release = metadata.version("apb")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = [f"{page}.md" for page in (root_doc, *sum(PAGES.values(), ()))]
html_theme = "furo"
html_copy_source = False

myst_enable_extensions = ["html_image"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
default_role = "code"
python_maximum_signature_line_length = 90


def setup(app: Sphinx) -> None:
    app.connect("source-read", _add_contents)
    app.connect("build-finished", _finish)


def _add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """In the repository's README the table of contents would show as a block of code."""
    if name == root_doc:
        for title, pages in PAGES.items():
            options = [f":caption: {title}", ":hidden:", ":glob:"]
            lines = ["", "```{toctree}", *options, "", *pages, "```", ""]
            source[0] += "\n".join(lines)


def _finish(app: Sphinx, error: Exception | None) -> None:
    """Sphinx does not look into HTML, which chooses a dark or a light figure."""
    if error is None:
        site = Path(app.outdir)
        shutil.copytree(ROOT / "docs/img", site / "docs/img", dirs_exist_ok=True)
        (site / "index.html").write_text(
            f'<meta http-equiv="refresh" content="0; {root_doc}.html">'
        )
