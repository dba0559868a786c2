"""Hooks of the documentation's build: pages from elsewhere in the repository, links, and no loads from other hosts."""

from __future__ import annotations

import logging
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
COPIED = {
    "index.md": "README.md",
    "deepspeed-files.md": "ds_configs/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
"""Pages that are files of the repository outside of docs/."""
REFERENCE = {
    "run_settings": reference.run_settings,
    "backbone_settings": reference.backbone_settings,
    "baseline_settings": reference.baseline_settings,
    "recipe_keys": reference.recipe_keys,
    "commands": reference.commands,
}
"""What takes the place of `<!-- reference: NAME -->` in a page."""
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")

logger = logging.getLogger("mkdocs.hooks.cllm4rec")  # a warning here ends a strict build


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for name, source in COPIED.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is made from the code, and rewrite relative links, which are written for the repository."""
    markdown = re.sub(r"<!-- reference: (\w+) -->", lambda match: REFERENCE[match[1]](), markdown)
    uri = page.file.src_uri
    folder = posixpath.dirname(COPIED.get(uri, f"docs/{uri}"))
    repository = config.extra.get("repository")
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)  # code is at the odd places
    parts[::2] = [LINK.sub(lambda link: _link(link, folder, uri, repository), part) for part in parts[::2]]
    return "".join(parts)


def _link(link: re.Match[str], folder: str, page: str, repository: str | None) -> str:
    mark, text, target = link.groups()
    if ":" in target or target.startswith("#"):
        return link[0]
    path, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(folder, path))
    uri = {source: name for name, source in COPIED.items()}.get(path, path.removeprefix("docs/"))
    if uri in COPIED or path.startswith("docs/"):
        relative = posixpath.relpath(uri, posixpath.dirname(page) or ".")
        return f"{mark}[{text}]({relative}{f'#{anchor}' if anchor else ''})"
    if not (ROOT / path).exists():
        logger.warning("%s: a link to %s, which is not in the repository", page, target)
    return f"[{text}]({repository}/blob/main/{path})" if repository else text


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warn of a page that loads something from another host: the site must work offline."""
    loads = _Loads()
    loads.feed(output)
    for address in loads.from_elsewhere:
        logger.warning("%s loads %s from another host", page.file.src_uri, address)
    return output


class _Loads(HTMLParser):
    """Addresses of other hosts from which a browser loads something to show the page."""

    def __init__(self) -> None:
        super().__init__()
        self.from_elsewhere: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        names = ["src", "srcset", "poster", "data"]
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            names.append("href")
        addresses = [values.get(name) or "" for name in names]
        self.from_elsewhere += [address for address in addresses if re.match(r"(?:[a-z]+:)?//", address)]
