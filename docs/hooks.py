"""Links that leave docs/ point into the repository, where a site of pages cannot follow: they become their text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Replace them; a file that is not there fails the build."""
    folder, docs = Path(page.file.abs_src_path).parent, Path(config["docs_dir"])

    def text(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_uri}: {link[2]}: no such file")
        return link[0] if target.is_relative_to(docs) else link[1]

    return LINK.sub(text, markdown)
