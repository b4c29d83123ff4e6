"""English prose out of Debian packages, to train on: ``python -m benchmarks.prose_corpus FOLDER``.

The packages are fetched by name with `apt-get download` and unpacked, not installed. Nothing in
them is used by a benchmark.
"""

from __future__ import annotations

import gzip
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

PACKAGES = {
    "anarchism": "usr/share/doc/anarchism/html/*.html",
    "debian-reference-en": "usr/share/debian-reference/*.en.html",
    "debian-faq": "usr/share/doc/debian/FAQ/*.en.html",
    "debian-history": "usr/share/doc/debian-history/**/*.en.html",
    "developers-reference": "usr/share/developers-reference/*.html",
    "jargon-text": "usr/share/doc/jargon-text/*.txt.gz",
    "fortunes": "usr/share/games/fortunes/*",
}
"""Package to its English texts."""
_SHORTEST = 2000
_BLOCKS = {"p", "div", "li", "h1", "h2", "h3", "h4", "pre", "br", "tr", "dt", "dd", "blockquote"}


class _Text(HTMLParser):
    """The text of a page, one line per block."""

    def __init__(self) -> None:
        super().__init__()
        self._hidden, self._parts = 0, list[str]()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in ("script", "style", "head")
        if tag in _BLOCKS:
            self._parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style", "head")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._parts.append(data)

    def text(self) -> str:
        paragraphs = (" ".join(block.split()) for block in "".join(self._parts).split("\n\n"))
        return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _texts(root: Path, pattern: str) -> Iterator[tuple[str, str]]:
    for path in sorted(root.glob(pattern)):
        if not path.is_file() or path.is_symlink() or path.suffix in (".dat", ".u8"):
            continue
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8", errors="ignore")
        if path.suffix == ".html":
            page = _Text()
            page.feed(text)
            text = page.text()
        yield path.name.split(".")[0], text


def collect(out: Path) -> int:
    """Leave one text file per page in `out`; returns the number of characters."""
    out.mkdir(parents=True, exist_ok=True)
    total = 0
    for package, pattern in PACKAGES.items():
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(["apt-get", "-q", "download", package], cwd=scratch, check=True)
            archive = next(Path(scratch).glob("*.deb"))
            subprocess.run(["dpkg-deb", "-x", archive.name, "root"], cwd=scratch, check=True)
            for name, text in _texts(Path(scratch) / "root", pattern):
                if len(text) >= _SHORTEST:
                    total += len(text)
                    (out / f"{package}-{name}.txt").write_text(text, encoding="utf-8")
    return total


if __name__ == "__main__":
    print(f"{collect(Path(sys.argv[1])):,} characters")
