"""Reports on runs: read their folders, compare them, and write one page or one text."""

from __future__ import annotations

from ds_al.figures.markdown import write_markdown
from ds_al.figures.page import write_page
from ds_al.report.compare import comparability
from ds_al.report.content import content
from ds_al.report.read import Profile, RunRecord, read

__all__ = ["Profile", "RunRecord", "comparability", "content", "read", "write_markdown", "write_page"]
