"""MkDocs hooks: pages from outside docs/, and relative links that work both on the file system and on the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

OUTSIDE = {  # source in the repository: page of the site
    "data/README.md": "data.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
PAGES = OUTSIDE | {"README.md": "index.md"}
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of `OUTSIDE`."""
    root = Path(config.config_file_path).parent
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(root / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links that leave docs/: to a page of the site if there is one, else to the plain text of the link."""
    sources = {site_page: source for source, site_page in OUTSIDE.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewrite(match: re.Match[str]) -> str:
        text, link, anchor = match[1], match[2], match[3] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        target = PAGES.get(target, target.removeprefix("docs/") if target.startswith("docs/") else "")
        if not target:
            return text.strip("![]")
        return f"{text}({posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(rewrite, markdown)
