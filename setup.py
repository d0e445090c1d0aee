"""Makes the README for a package index, which pyproject.toml can't.

An index shows the text alone: links to files of the repository would lead nowhere.
"""

import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).with_name("README.md")
PICTURE = re.compile(r"^!\[[^\]]*\]\([^)]*\)\n\n", re.MULTILINE)
# A link whose target isn't an address.
LINK_TO_FILE = re.compile(r"\[[^\]]*\]\((?!\w+:|#)([^)]*)\)")


def readme_for_index(text):
    """The README with paths in the place of links to them, and without pictures."""
    return LINK_TO_FILE.sub(r"`\1`", PICTURE.sub("", text))


setup(
    long_description=readme_for_index(README.read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
