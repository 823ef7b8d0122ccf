"""Write source packages as JSON Lines of long documents: the text files of a folder, joined, are one document.

python docs/results/corpora.py OUTPUT.jsonl FOLDER [FOLDER ...] [--skip PART ...] [--every N] [--smallest CHARACTERS]
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = {".c", ".h", ".S", ".md", ".py", ".pyi", ".pyx", ".rs", ".rst", ".sh", ".txt"}
LARGEST_FILE = 1_000_000  # characters; larger files are tables or generated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--skip", nargs="*", default=[], help="leave out folders whose path contains one of these")
    parser.add_argument("--every", type=int, default=1, help="keep one document of N (1)")
    parser.add_argument("--smallest", type=int, default=2_000, help="leave out shorter documents, in characters (2000)")
    arguments = parser.parse_args()
    count = size = seen = 0
    with arguments.output.open("w", encoding="utf-8") as file:
        for root in arguments.folders:
            for name, text in documents(root, arguments.skip):
                if len(text) < arguments.smallest:
                    continue
                seen += 1
                if seen % arguments.every == 0:
                    file.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
                    count, size = count + 1, size + len(text)
    print(f"{arguments.output}: {count:,} documents, {size / 1e6:,.0f} million characters")


def documents(root: Path, skip: list[str]) -> Iterator[tuple[str, str]]:
    """Yield a name and a text for ``root`` and each folder below it, in the order of their paths."""
    if root.is_file():
        yield root.name, root.read_text(encoding="utf-8")
        return
    for folder in sorted([root, *(path for path in root.rglob("*") if path.is_dir())]):
        name = folder.relative_to(root.parent).as_posix()
        if any(part in f"{name}/" for part in skip):
            continue
        parts = [f"# {name}/{path.name}\n{text}" for path, text in texts(folder)]
        if parts:
            yield name, "\n".join(parts)


def texts(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the text files of a folder."""
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES and path.is_file() and not path.is_symlink():
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if len(text) <= LARGEST_FILE:
                yield path, text


if __name__ == "__main__":
    main()
