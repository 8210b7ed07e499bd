"""What a stranger finds in the repository: links that lead somewhere, and nothing of the machine it was written on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"!?\[[^\]]*\]\(<?([^)>\s]+)[^)]*\)|^\[[^\]]+\]:\s*<?(\S+?)>?\s*$", re.MULTILINE)
FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
MACHINE_PATH = re.compile(r"(?<![\w.\-/])/(?:home|root|tmp|work|Users)/[\w.\-]+")
OUTPUT = re.compile(r"\..*|.*\.egg-info|__pycache__|build|dist|out|runs")
KEY_SUFFIXES = {".pem", ".key", ".crt", ".cer", ".csr", ".p12", ".pfx"}
PEM_BLOCK = re.compile(rb"^-----BEGIN [A-Z ]*(?:PRIVATE KEY|CERTIFICATE)-----\s*\n[A-Za-z0-9+/=]{40}", re.MULTILINE)


def repository_files() -> list[Path]:
    """The files git tracks or would; without git, all outside hidden folders and those of build and run outputs."""
    paths: list[Path] = []
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, timeout=60)
        paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    if not paths:
        for folder, folders, files in os.walk(ROOT):
            folders[:] = [name for name in folders if name == ".ci" or not OUTPUT.fullmatch(name)]
            paths += [Path(folder, name) for name in files]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


FILES = repository_files()
DOCUMENTS = [path for path in FILES if path.suffix == ".md"]


def test_the_documents_are_found() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files(document: Path) -> None:
    text = FENCED.sub("", document.read_text(encoding="utf-8"))
    targets = [inline or reference for inline, reference in LINK.findall(text)]
    files = [unquote(target.split("#")[0]) for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [name for name in files if name and not (document.parent / name).exists()]
    assert not missing, f"{document.name} links to files that are not there: {missing}"


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match}"
        for path in FILES
        for match in MACHINE_PATH.findall(path.read_bytes().decode("utf-8", errors="replace"))
    ]
    assert not found


def test_no_key_and_no_certificate_is_kept() -> None:
    kept = [path for path in FILES if path.suffix in KEY_SUFFIXES or PEM_BLOCK.search(path.read_bytes())]
    assert not kept
