"""Real text that every Python installation has: its documentation topics, then the source of its standard library.

The switch from one to the other is the drift of the demo. Everything is split before it is used: no topic, file or
paragraph occurs in two splits, so neither a prompt nor held-out text was ever trained on.
"""

import hashlib
import random
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Directories of the standard library that are no ordinary source: tests, bundled packages, the topics themselves.
_SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "pydoc_data", "site-packages", "ensurepip"}
#: Shares for pre-training, online training, prompts, held out. Source code is never in the pre-training.
_DOC_SHARES = (0.55, 0.2, 0.15, 0.1)
_CODE_SHARES = (0.0, 0.6, 0.25, 0.15)
#: A paragraph at least this long that occurs twice ties its documents together, characters.
_SHARED_PARAGRAPH_CHARS = 80
_CODE_BYTES = 1_200_000
_CODE_FILE_BYTES = (2_000, 60_000)


@dataclass(frozen=True, slots=True)
class Split:
    """Documents of one kind of text ("docs" or "code"), by use. All text is ASCII: one byte, one token."""

    pretraining: tuple[str, ...]
    training: tuple[str, ...]
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Text before the drift and after it."""

    docs: Split
    code: Split

    def digest(self) -> str:
        """Changes whenever the text does (another Python version): part of the key of cached models."""
        digest = hashlib.sha256()
        for split in (self.docs, self.code):
            for documents in (split.pretraining, split.training, split.prompts, split.held_out):
                for document in documents:
                    digest.update(document.encode())
                    digest.update(b"\0")
        return digest.hexdigest()[:12]


def load_corpus() -> Corpus:
    """The corpus of this interpreter, always the same for one Python version."""
    from pydoc_data.topics import topics

    stdlib = Path(sysconfig.get_paths()["stdlib"])
    return Corpus(docs=split(topics, _DOC_SHARES), code=split(_source_files(stdlib), _CODE_SHARES))


def _source_files(root: Path) -> dict[str, str]:
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not _SKIPPED & set(path.relative_to(root).parts)
        and _CODE_FILE_BYTES[0] <= path.stat().st_size <= _CODE_FILE_BYTES[1]
    )
    chosen: dict[str, str] = {}
    size = 0
    for name in sorted(names, key=_stable_order):
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        chosen[name] = text
        size += len(text)
        if size >= _CODE_BYTES:
            break
    return chosen


def _stable_order(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def split(documents: Mapping[str, str], shares: Sequence[float]) -> Split:
    """Deal documents out by size: (pre-training, online training, prompts, held out) get about these shares.

    Documents that share a long paragraph go to the same split; the largest group goes first, to the emptiest split.
    """
    groups = _groups(documents)
    sized = sorted(
        ((sum(len(documents[name]) for name in names), names) for names in groups),
        key=lambda item: (-item[0], _stable_order(item[1][0])),
    )
    filled = [0.0] * len(shares)
    dealt: list[list[str]] = [[] for _ in shares]
    for size, names in sized:
        target = min(
            (index for index, share in enumerate(shares) if share > 0),
            key=lambda index: (filled[index] + size) / shares[index],
        )
        filled[target] += size
        dealt[target].extend(names)
    texts = [tuple(_without_repeats(_ascii(documents[name]) for name in names)) for names in dealt]
    return Split(*texts)


def _groups(documents: Mapping[str, str]) -> list[list[str]]:
    """Document names, those connected by shared paragraphs together."""
    parent = {name: name for name in documents}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    first_seen: dict[str, str] = {}
    for name, text in documents.items():
        for paragraph in _paragraphs(text):
            if len(paragraph) < _SHARED_PARAGRAPH_CHARS:
                continue
            key = " ".join(paragraph.split())
            parent[root(name)] = root(first_seen.setdefault(key, name))
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(documents):
        groups[root(name)].append(name)
    return [groups[key] for key in sorted(groups)]


def _paragraphs(text: str) -> list[str]:
    return [part for part in text.split("\n\n") if part.strip()]


def _ascii(text: str) -> str:
    return text.encode("ascii", "ignore").decode("ascii")


def _without_repeats(texts: Iterable[str]) -> list[str]:
    """The texts less every long paragraph that an earlier one held already (topics quote each other)."""
    seen: set[str] = set()
    kept = []
    for text in texts:
        paragraphs = []
        for paragraph in _paragraphs(text):
            key = " ".join(paragraph.split())
            if len(paragraph) >= _SHARED_PARAGRAPH_CHARS and key in seen:
                continue
            seen.add(key)
            paragraphs.append(paragraph)
        if paragraphs:
            kept.append("\n\n".join(paragraphs) + "\n\n")
    return kept


def pieces(documents: Sequence[str], length: int, seed: int) -> list[str]:
    """Documents cut into pieces of `length` characters, in random order; a shorter rest of a document is dropped."""
    cut = [
        document[start : start + length]
        for document in documents
        for start in range(0, len(document) - length + 1, length)
    ]
    random.Random(seed).shuffle(cut)
    return cut


def sample_prompt(
    documents: Sequence[str], prompt_length: int, reference_length: int, rng: random.Random
) -> tuple[str, str]:
    """A stretch of real text: (prompt, its true continuation). Raises ValueError when no document is long enough."""
    length = prompt_length + reference_length
    starts = [max(0, len(document) - length + 1) for document in documents]
    total = sum(starts)
    if total == 0:
        raise ValueError(f"no document holds {length} characters")
    position = rng.randrange(total)
    for document, count in zip(documents, starts, strict=True):
        if position < count:
            middle = position + prompt_length
            return document[position:middle], document[middle : middle + reference_length]
        position -= count
    raise AssertionError("unreachable: position < total")
