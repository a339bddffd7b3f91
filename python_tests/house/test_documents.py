"""What sources and documents cite exists, the documents' programs run, and no sentence of theirs is too long."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUFFIXES = {".h", ".cpp", ".cu", ".cmake", ".py", ".md", ".sh", ".bash", ".toml", ".in", ".txt", ""}
FOLDERS = ("bench", "csrc", "docs", "findings", "kda_cuda", "python_tests")
LONGEST_SENTENCE = 30  # words
NOT_OURS = {"cuda_bf16.h", "cuda_fp16.h", "cuda_runtime.h", "truth.h"}  # the last one is a tensor of a case file


def text_files() -> list[Path]:
    """Everything written by hand: the files of the root and those in the folders of the project."""
    paths = [*ROOT.iterdir(), *(ROOT / ".ci").iterdir(), *(p for name in FOLDERS for p in (ROOT / name).rglob("*"))]
    return [p for p in sorted(paths) if p.is_file() and p.suffix in SUFFIXES and "__pycache__" not in p.parts]


TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in text_files()}
NAMES = {path.rsplit("/", 1)[-1] for path in TEXTS}
DOCUMENTS = [path for path in TEXTS if path.endswith(".md") and not path.startswith("bench/results/")]
PROSE = [path for path in DOCUMENTS if path != "CHANGELOG.md"]
THIS = Path(__file__).relative_to(ROOT).as_posix()


def is_dated(path: str) -> bool:
    """Notes of the log keep the file names of their day."""
    return re.match(r"bench/log/\d{4}-", path) is not None


def cited_documents(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w*{}./-])[\w-][\w./-]*\.md\b", text))


def cited_paths(text: str) -> set[str]:
    """Paths from the root: files with a suffix anywhere, files and folders in back quotes."""
    anywhere = re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\.(?:h|cpp|cu|cmake|py|json|png|sh)\b", text)
    quoted = re.findall(rf"`((?:{'|'.join(FOLDERS)})(?:/[\w./-]*)?)`", text)
    return {*anywhere, *quoted}


def links(path: str, text: str) -> set[str]:
    """Targets inside the repository that a document links to, from where it stands."""
    folder = path.rpartition("/")[0]
    return {f"{folder}/{name}".strip("/") for name in re.findall(r"\]\(([\w./-]+)\)", text)}


def cited_headers(text: str) -> set[str]:
    """Sources named in comments of C++, with as much of their path as it takes."""
    comments = "\n".join(re.findall(r"//.*", text))
    return set(re.findall(r"(?<![\w./<-])\w[\w/]*\.(?:h|cpp|cu)\b", comments))


def test_cited_documents_exist():
    for path, text in TEXTS.items():
        for name in cited_documents(text) if path != THIS else ():
            assert (ROOT / name).is_file() if "/" in name else name in NAMES, f"{path} cites {name}"


def test_cited_paths_exist():
    for path, text in TEXTS.items():
        cited = cited_paths(text) | (links(path, text) if path in DOCUMENTS else set())
        for name in cited if path != THIS and not is_dated(path) else ():
            assert (ROOT / name).exists(), f"{path} cites {name}"


def test_sources_that_comments_name_exist():
    for path, text in TEXTS.items():
        for name in cited_headers(text) - NOT_OURS if re.search(r"\.(h|cpp|cu)$", path) else ():
            assert any(f"/{other}".endswith(f"/{name}") for other in TEXTS), f"{path} cites {name}"


def test_cited_sections_exist():
    headings = set(re.findall(r"^## (\d)\. ", TEXTS["docs/mathematics.md"], re.M))
    cited = {path: re.findall(r"docs/mathematics\.md, section\s(\d)", text) for path, text in TEXTS.items()}
    assert sum(map(len, cited.values())) > 5
    for path, sections in cited.items():
        assert set(sections) <= headings, f"{path} cites sections {sections}"


@pytest.mark.parametrize("folder", ["findings", "bench/log"])
def test_an_index_lists_its_folder(folder):
    listed = set(re.findall(rf"^\| `({folder}/[\w.-]+)` \|", TEXTS[f"{folder}/README.md"], re.M))
    entries = {p for p in TEXTS if re.fullmatch(rf"{folder}/[\w.-]+\.(sh|md)", p)} - {f"{folder}/README.md"}
    assert listed == entries


def test_findings_are_executable_and_say_what_was_seen():
    for path in (p for p in TEXTS if re.fullmatch(r"findings/.+\.sh", p)):
        assert (ROOT / path).stat().st_mode & 0o111, f"{path} is not executable"
        header = TEXTS[path].split("\n. ")[0]
        assert re.search(r"^# \S+ .*\d+\.\d+", header, re.M) and "# Output seen on 20" in header, path


def test_the_program_of_the_mathematics_runs():
    """The Python blocks in order: they compare the chunk form and its backward with the recurrence."""
    blocks = re.findall(r"^```python\n(.*?)^```", TEXTS["docs/mathematics.md"], re.M | re.S)
    program = "\n".join(blocks)
    assert program.count("assert_close") == 2
    exec(compile(program, "docs/mathematics.md", "exec"), {"__name__": "mathematics"})


def sentences(text: str) -> list[str]:
    """The sentences outside code and tables, with code and formulas as one word each."""
    text = re.sub(r"^```.*?^```|<!--.*?-->", "", text, flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`|\$[^$\n]*\$", "Code", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text))
    text = re.sub(r"^( {4,}|\||#).*$", "", text, flags=re.M)
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:[*-]|\d+\.) )", text)
    pieces = [re.split(r"(?<=[.!?])[*)\"]*\s+(?=[A-Z\"(*\d])", " ".join(p.split())) for p in paragraphs]
    return [sentence for piece in pieces for sentence in piece]


@pytest.mark.parametrize("path", PROSE)
def test_sentences_are_short(path):
    counts = {sentence: len(re.findall(r"\S*\w\S*", sentence)) for sentence in sentences(TEXTS[path])}
    assert not [f"{words} words: {sentence}" for sentence, words in counts.items() if words > LONGEST_SENTENCE]
