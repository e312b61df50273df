"""Pages and pictures of the site that lie outside docs/, and links to them; mkdocs calls these."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
_LINK = re.compile(r"(!?)\[([^]]*)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the repository's root, and results with their pictures."""
    results = ROOT / "benchmarks" / "results"
    for path in (ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", results / "README.md", *results.rglob("*.png")):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File(uri, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Make links that leave docs/ those of the site; of what the site has not, such as sources, the text is left."""
    source = Path(page.file.abs_src_path)

    def moved(link: re.Match[str]) -> str:
        sign, text, path, heading = link.groups(default="")
        target = (source.parent / path).resolve()
        uri = target.relative_to(DOCS if target.is_relative_to(DOCS) else ROOT).as_posix()
        if files.get_file_from_path(uri):
            return f"{sign}[{text}]({os.path.relpath(uri, Path(page.file.src_uri).parent)}{heading})"
        return text if target.exists() else link[0]

    return _LINK.sub(moved, markdown)
